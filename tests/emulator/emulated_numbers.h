// float16 and bfloat16 with the rounding of the GPU, in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace ghost::prim {

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline uint32_t as_uint(float v) {
  return bits_as<uint32_t>(v);
}
inline float as_float(uint32_t v) {
  return bits_as<float>(v);
}

// Rounds to odd: the last bit of the float is set if the double is not exact. A second rounding to
// fewer bits then gives the same result as one rounding of the double.
inline float round_to_odd(double v) {
  const float f = float(v);
  if (double(f) == v || v != v) return f;
  const uint32_t bits = as_uint(f);
  const bool away = f > 0 ? double(f) > v : double(f) < v;
  return as_float((away ? bits - 1 : bits) | 1u);
}

// Storage only: arithmetic happens in float.
struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

inline float to_float(half_t v) {
  const uint32_t magnitude = v.bits & 0x7fffu;
  // The exponent moved to its place and multiplied up by 2^(127 - 15): right for subnormals too.
  uint32_t bits = as_uint(as_float(magnitude << 13) * as_float(0x77800000u));
  if (magnitude >= 0x7c00u) bits |= 0x7f800000u;  // infinity and NaN
  return as_float(bits | uint32_t(v.bits & 0x8000u) << 16);
}

inline half_t half_from_float(float v) {
  const uint32_t sign = as_uint(v) >> 16 & 0x8000u;
  uint32_t bits = as_uint(v) & 0x7fffffffu;
  if (bits > 0x7f800000u) return {0x7fff};                     // the NaN of the GPU
  if (bits >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
  if (bits < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the multiple of 2^-24, rounded to even, in the low bits.
    bits = as_uint(as_float(bits) + 0.5f) - 0x3f000000u;
  } else {
    bits = ((bits + 0xfffu + (bits >> 13 & 1u)) - 0x38000000u) >> 13;
  }
  return {uint16_t(sign | bits)};
}

inline float to_float(bfloat16_t v) {
  return as_float(uint32_t(v.bits) << 16);
}

inline bfloat16_t bfloat16_from_float(float v) {
  const uint32_t bits = as_uint(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

}  // namespace ghost::prim
