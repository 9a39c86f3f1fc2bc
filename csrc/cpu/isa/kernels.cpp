// The Ghost kernels of one instruction set. setup.py compiles every source of this folder once for
// each instruction set, with its flags and its name in GHOST_ISA and GHOST_ISA_NAME.
#include "cpu/kernels.h"

#include "cpu/apply.h"
#include "cpu/channels.h"
#include "cpu/lane_train.h"
#include "cpu/weight_grad.h"

namespace ghost {
namespace GHOST_ISA {

using B = BFloat16;
using H = Float16;

template void stencil(int64_t, const Stencil<float>&);
template void stencil(int64_t, const Stencil<double>&);

extern const Kernels kKernels;
const Kernels kKernels = {
    GHOST_ISA_NAME,
    kLanes<float>,
    kRegisters,
    kHasTiles,
    {apply_items<float, float>, apply_items<double, double>, apply_items<B, B>, apply_items<H, H>},
    {apply_items<float, float>, apply_items<double, double>, apply_items<B, float>,
     apply_items<H, float>},
    {apply_items<float, float>, apply_items<double, double>, apply_items<float, B>,
     apply_items<float, H>},
    {channels_forward<float>, channels_forward<double>, channels_forward<B>, channels_forward<H>},
    {channels_backward<float>, channels_backward<double>, channels_backward<B>,
     channels_backward<H>},
    {primary_stats<float>, primary_stats<double>},
    {weight_grad<float>, weight_grad<double>, weight_grad<B>, weight_grad<H>},
    {lane_train<float>, lane_train<double>},
};

}  // namespace GHOST_ISA
}  // namespace ghost
