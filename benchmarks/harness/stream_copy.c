/* The fastest copies one core can do, for the bandwidth floor: torch has no copy with non-temporal stores.
 * Compiled by floor.py with the machine's own C compiler; without one the floor uses torch and memcpy alone.
 * n is in bytes, a multiple of 64; both pointers are aligned to 64 bytes. */
#include <stddef.h>

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512i vec;
#define LOAD(p) _mm512_load_si512(p)
#define STORE(p, v) _mm512_store_si512(p, v)
#define STREAM(p, v) _mm512_stream_si512((vec*)(p), v)
#define FENCE() _mm_sfence()
#elif defined(__AVX__)
#include <immintrin.h>
typedef __m256i vec;
#define LOAD(p) _mm256_load_si256((const vec*)(p))
#define STORE(p, v) _mm256_store_si256((vec*)(p), v)
#define STREAM(p, v) _mm256_stream_si256((vec*)(p), v)
#define FENCE() _mm_sfence()
#else
typedef struct { double lanes[8]; } vec;
#define LOAD(p) (*(const vec*)(p))
#define STORE(p, v) (*(vec*)(p) = (v))
#define STREAM(p, v) STORE(p, v)
#define FENCE()
#endif

void copy_cached(char* dst, const char* src, size_t n) {
  for (size_t i = 0; i < n; i += sizeof(vec)) STORE(dst + i, LOAD(src + i));
}

void copy_streamed(char* dst, const char* src, size_t n) {
  for (size_t i = 0; i < n; i += sizeof(vec)) STREAM(dst + i, LOAD(src + i));
  FENCE();
}
