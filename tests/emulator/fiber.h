// Cooperative threads on one OS thread: fast switch on x86-64 ELF systems, ucontext elsewhere.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__x86_64__) && defined(__ELF__) && !defined(GHOST_EMU_UCONTEXT)
#define GHOST_EMU_FAST_SWITCH 1
#else
#define GHOST_EMU_FAST_SWITCH 0
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if GHOST_EMU_FAST_SWITCH
// Saves the callee-saved registers on the running stack, its pointer in *from, and goes on at to.
extern "C" void ghost_emu_switch(void** from, void* to);
#endif

namespace ghost::emu {

// A stack with a page below that may not be touched.
class Stack {
  static constexpr size_t kBytes = 256 * 1024;
  unsigned char* memory_;
  size_t page_ = size_t(sysconf(_SC_PAGESIZE));

 public:
  Stack() {
    void* p = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(p);
    mprotect(memory_, page_, PROT_NONE);
  }
  ~Stack() { munmap(memory_, kBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  unsigned char* bottom() const { return memory_ + page_; }
  size_t bytes() const { return kBytes - page_; }
  unsigned char* top() const { return memory_ + kBytes; }
};

// One of two sides of a switch: a fiber, or the OS thread that runs the fibers.
class Context {
#if GHOST_EMU_FAST_SWITCH
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  const void* bottom_ = nullptr;  // of the stack, for the address sanitizer
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;

 public:
  // Makes the next switch to this context call entry, which must never return.
  void start(const Stack& stack, void (*entry)()) {
    bottom_ = stack.bottom();
    bytes_ = stack.bytes();
    fake_stack_ = nullptr;
#if GHOST_EMU_FAST_SWITCH
    void** sp = reinterpret_cast<void**>(stack.top());
    *--sp = nullptr;  // where entry's caller would be: keeps the stack aligned, ends backtraces
    *--sp = reinterpret_cast<void*>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--sp = nullptr;
    stack_pointer_ = sp;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack.bottom();
    context_.uc_stack.ss_size = stack.bytes();
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Leaves from, which must be the running context, and goes on in to. Inline, so that a fiber's
  // frames stay the caller's.
  static void switch_to(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.bytes_);
#endif
#if GHOST_EMU_FAST_SWITCH
    ghost_emu_switch(&from.stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
    arrived(from, &to);
  }

  // To be called first thing by a fiber's entry; came_from then learns its own stack.
  static void arrived(Context& self, Context* came_from) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(self.fake_stack_, &bottom, &bytes);
    if (came_from->bottom_ == nullptr) {
      came_from->bottom_ = bottom;
      came_from->bytes_ = bytes;
    }
#else
    (void)self, (void)came_from;
#endif
  }
};

}  // namespace ghost::emu
