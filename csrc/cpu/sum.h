// The sum of two tensors with an activation.
//
//   out = act(x + other)       other: 0 if null
//
// Tile map: an item is kSumValues values, a vector at a time. Binding resource: the memory bus.
#pragma once

#include <algorithm>

#include "cpu/activation.h"
#include "cpu/layers.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

template <class T>
void sum(const SumArgs& a, int64_t begin, int64_t end) {
  using A = ComputeOf<T>;
  using S = Storage<T>;
  constexpr int L = kLanes<A>;
  const T* const x = static_cast<const T*>(a.x);
  const T* const other = static_cast<const T*>(a.other);
  T* const out = static_cast<T*>(a.out);
  const int64_t stop = std::min(end * kSumValues, a.count);
  with_activation(a.act.act, [&](auto act) {
    constexpr Act kAct = decltype(act)::value;
    int64_t i = begin * kSumValues;
    for (; i + L <= stop; i += L) {
      Vec<A> v = S::load(x + i);
      if (other) v += S::load(other + i);
      S::store(out + i, activate<kAct, A>(v, A(a.act.slope)));
    }
    if (i < stop) {
      Vec<A> v = S::load_n(x + i, stop - i);
      if (other) v += S::load_n(other + i, stop - i);
      S::store_n(out + i, activate<kAct, A>(v, A(a.act.slope)), stop - i);
    }
  });
}

}  // namespace GHOST_ISA
}  // namespace ghost
