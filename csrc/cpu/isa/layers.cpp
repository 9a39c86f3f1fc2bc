// The kernels between the Ghost modules of a network, of one instruction set.
#include "cpu/layers.h"

#include "cpu/depthwise_conv.h"
#include "cpu/depthwise_norm.h"
#include "cpu/squeeze_excite.h"
#include "cpu/sum.h"

namespace ghost {
namespace GHOST_ISA {

using B = BFloat16;
using H = Float16;

extern const LayerKernels kLayerKernels;
const LayerKernels kLayerKernels = {
    GHOST_ISA_NAME,
    {depthwise_items<float>, depthwise_items<double>, depthwise_items<B>, depthwise_items<H>},
    {depthwise_norm<float>, depthwise_norm<double>, depthwise_norm<B>, depthwise_norm<H>},
    {plane_affine<float>, plane_affine<double>, plane_affine<B>, plane_affine<H>},
    {plane_dot<float>, plane_dot<double>, plane_dot<B>, plane_dot<H>},
    {gate_means<float>, gate_means<double>, gate_means<B>, gate_means<H>},
    {gate_values<float>, gate_values<double>},
    {gate_scale<float>, gate_scale<double>, gate_scale<B>, gate_scale<H>},
    {sum<float>, sum<double>, sum<B>, sum<H>},
};

}  // namespace GHOST_ISA
}  // namespace ghost
