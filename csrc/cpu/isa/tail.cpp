// The kernels of training with one norm behind the concatenation, of one instruction set.
#include "cpu/tail.h"

#include "cpu/tail_kernels.h"
#include "cpu/tail_lanes.h"

namespace ghost {
namespace GHOST_ISA {

using B = BFloat16;
using H = Float16;

extern const TailKernels kTailKernels;
const TailKernels kTailKernels = {
    GHOST_ISA_NAME,
    {tail_forward<float>, tail_forward<double>, tail_forward<B>, tail_forward<H>},
    {tail_backward<float>, tail_backward<double>, tail_backward<B>, tail_backward<H>},
    {tail_lanes<float>, tail_lanes<double>, tail_lanes<B>, tail_lanes<H>},
};

}  // namespace GHOST_ISA
}  // namespace ghost
