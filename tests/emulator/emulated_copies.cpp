// Copies in the background: cp.async, and the bulk copies of sm_90 with their barriers. Each lands
// at the latest or the earliest possible time, depending on the schedule.

#include <algorithm>
#include <string>
#include <utility>

#include "emulator_state.h"

namespace ghost::emu {
namespace {

void perform(const Copy& copy) {
  if (copy.wanted) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

// The first of the two-byte pieces of shared memory that hold [p, p + bytes), and how many.
std::pair<size_t, size_t> pieces_of(const void* p, size_t bytes) {
  const size_t at = size_t(static_cast<const unsigned char*>(p) -
                           static_cast<const unsigned char*>(g_block->shared.data()));
  return {at / 2, (at + bytes + 1) / 2 - at / 2};
}

Mbarrier& mbarrier_at(void* barrier, const Site& site) {
  const auto found = g_block->mbarriers.find(barrier);
  if (found == g_block->mbarriers.end()) fault(site, "the mbarrier is not initialised");
  if (std::memcmp(barrier, &kMbarrierMark, sizeof kMbarrierMark) != 0)
    fault(site, "the mbarrier was overwritten");
  return found->second;
}

void check_bulk(const void* shared, const void* global, size_t bytes, const Site& site) {
  check_aligned(shared, 16, site);
  check_aligned(global, 16, site);
  if (bytes % 16 != 0) fault(site, std::to_string(bytes) + " bytes are no multiple of 16");
  check_shared(shared, bytes, site);
  if (g_block->last_writes.empty()) return;
  const auto [first, count] = pieces_of(shared, bytes);
  for (size_t i = first; i < first + count; ++i) {
    const LastWrite& last = g_block->last_writes[i];
    if (last.thread >= 0 && g_block->threads[size_t(last.thread)].fences == last.fences)
      fault(site, "thread " + std::to_string(last.thread) +
                      " wrote to the shared memory of a bulk copy, without a fence_async after it");
  }
}

}  // namespace

void copy_async(void* shared, const void* global, size_t bytes, bool wanted, Site site) {
  check_aligned(shared, bytes, site);
  check_aligned(global, bytes, site);
  check_shared(shared, bytes, site);
  check_waited(global, site);
  const Copy copy{shared, global, bytes, wanted};
  if (g_block->schedule & kEagerCopies) perform(copy);
  // A copy that is already performed must be waited for, too.
  g_thread->copies.push_back(copy);
}

void copy_commit() {
  g_thread->group_ends.push_back(g_thread->copies.size());
}

void copy_wait(size_t pending) {
  Thread& self = *g_thread;
  if (self.group_ends.size() <= pending) return;
  const size_t finished = self.group_ends.size() - pending;
  const size_t count = self.group_ends[finished - 1];
  if (!(g_block->schedule & kEagerCopies)) {
    std::for_each(self.copies.begin(), self.copies.begin() + ptrdiff_t(count), perform);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + ptrdiff_t(count));
  self.group_ends.erase(self.group_ends.begin(), self.group_ends.begin() + ptrdiff_t(finished));
  for (size_t& end : self.group_ends) end -= count;
}

void note_store(const void* p, size_t bytes) {
  Block& block = *g_block;
  if (block.last_writes.empty() || !block.shared.holds(p, bytes)) return;
  const auto [first, count] = pieces_of(p, bytes);
  const LastWrite last{int(g_thread - block.threads.data()), g_thread->fences};
  std::fill_n(block.last_writes.begin() + ptrdiff_t(first), count, last);
}

void fence_async() {
  ++g_thread->fences;
}

void mbarrier_init(void* barrier, unsigned arrivals, Site site) {
  Block& block = *g_block;
  check_aligned(barrier, 8, site);
  check_shared(barrier, 8, site);
  if (arrivals == 0 || arrivals >= 1u << 20) fault(site, "arrivals out of range");
  std::memcpy(barrier, &kMbarrierMark, sizeof kMbarrierMark);
  Mbarrier fresh{};
  fresh.arrivals = fresh.missing = arrivals;
  fresh.thread = unsigned(g_thread - block.threads.data());
  fresh.fences = g_thread->fences;
  if (!block.mbarriers.emplace(barrier, fresh).second) fault(site, "initialised twice");
  if (block.last_writes.empty()) block.last_writes.resize((block.shared.bytes() + 1) / 2);
}

void mbarrier_arrive_expect(void* barrier, size_t bytes, Site site) {
  Mbarrier& b = mbarrier_at(barrier, site);
  b.bytes += int64_t(bytes);
  if (std::abs(b.bytes) >= 1 << 20) fault(site, "too many bytes for one phase");
  if (b.missing == 0) fault(site, "more arrivals than the phase has");
  --b.missing;
  b.settle();
}

void mbarrier_wait(void* barrier, unsigned parity, Site site) {
  const Mbarrier& b = mbarrier_at(barrier, site);
  if (parity > 1) fault(site, "the parity of a phase is 0 or 1");
  while ((b.phase & 1) == parity) wait_for(b.phase, site);
}

void bulk_load(void* shared, const void* global, size_t bytes, void* barrier, Site site) {
  check_bulk(shared, global, bytes, site);
  Mbarrier& b = mbarrier_at(barrier, site);
  if (g_block->threads[b.thread].fences == b.fences)
    fault(site, "the mbarrier was initialised without a fence_async after it");
  const auto [first, count] = pieces_of(shared, bytes);
  std::fill_n(g_block->last_writes.begin() + ptrdiff_t(first), count, LastWrite{});
  const Copy copy{shared, global, bytes, true};
  if (g_block->schedule & kEagerCopies) {
    perform(copy);
    b.bytes -= int64_t(bytes);
    b.settle();
  } else {
    for (size_t i = 0; i < bytes; i += sizeof kPoison)
      std::memcpy(static_cast<unsigned char*>(shared) + i, &kPoison, sizeof kPoison);
    b.loads.push_back(copy);
  }
}

void bulk_store(void* global, const void* shared, size_t bytes, Site site) {
  check_bulk(shared, global, bytes, site);
  BulkStore store{global, shared, bytes, {}};
  if (g_block->schedule & kEagerCopies) {
    store.read();
    store.write();
  }
  g_thread->bulk_open.push_back(std::move(store));
}

void bulk_commit() {
  Thread& self = *g_thread;
  self.bulk_groups.push_back({std::move(self.bulk_open), false});
  self.bulk_open.clear();
}

void bulk_wait(size_t pending, bool written) {
  std::vector<BulkGroup>& groups = g_thread->bulk_groups;
  if (groups.size() <= pending) return;
  const auto end = groups.end() - ptrdiff_t(pending);
  for (auto group = groups.begin(); group != end; ++group) {
    group->waited = true;
    for (BulkStore& store : group->stores) {
      store.read();
      if (written) store.write();
    }
  }
  if (written) groups.erase(groups.begin(), end);
}

bool land_loads(Block& block) {
  for (auto& entry : block.mbarriers) {
    Mbarrier& barrier = entry.second;
    const auto waits = [&](const Thread& t) { return !t.done && t.generation == &barrier.phase; };
    if (barrier.loads.empty() || std::none_of(block.threads.begin(), block.threads.end(), waits))
      continue;
    for (const Copy& copy : barrier.loads) {
      perform(copy);
      barrier.bytes -= int64_t(copy.bytes);
    }
    barrier.loads.clear();
    barrier.settle();
    return true;
  }
  return false;
}

void finish_bulk_stores() {
  Thread& self = *g_thread;
  const auto waited = [](const BulkGroup& group) { return group.waited; };
  if (!self.bulk_open.empty() ||
      !std::all_of(self.bulk_groups.begin(), self.bulk_groups.end(), waited)) {
    fault({"kernel end", 0, "bulk_store"}, "a thread ends while its bulk stores read");
  }
  for (const BulkGroup& group : self.bulk_groups) {
    for (const BulkStore& store : group.stores) store.write();
  }
}

}  // namespace ghost::emu
