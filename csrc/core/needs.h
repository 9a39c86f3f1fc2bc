// The gradients that a backward pass computes.
#pragma once

namespace ghost {

// The bits of ops.eager.NEEDS in Python. "Norm" stands for gamma and beta.
enum BackwardNeed : int {
  kNeedDx = 1,
  kNeedDw1 = 2,
  kNeedNorm1 = 4,
  kNeedPrelu1 = 8,
  kNeedDw2 = 16,
  kNeedNorm2 = 32,
  kNeedPrelu2 = 64,
  kNeedDy = kNeedDx | kNeedDw1 | kNeedNorm1 | kNeedPrelu1,  // those that need the gradient of y
  kNeedAll = 127
};

}  // namespace ghost
