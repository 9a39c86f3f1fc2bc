// The plan of the CUDA kernels as Python sees it. Needs no GPU: it is plain arithmetic.
#include <pybind11/pybind11.h>

#include "core/cuda_plan.h"
#include "core/cuda_plan_backward.h"
#include "core/cuda_plan_layers.h"
#include "core/cuda_plan_pipelined.h"
#include "core/plan.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

py::dict describe(const char* kernel, const ghost::CudaPlan& plan) {
  const ghost::CudaTile& t = plan.tile;
  return py::dict(
      "kernel"_a = kernel, "channels"_a = t.channels, "channel_blocks"_a = t.channel_blocks,
      "ghosts"_a = t.ghosts, "ghost_blocks"_a = t.ghost_blocks, "images"_a = t.images,
      "rows"_a = t.rows, "cols"_a = t.cols, "halo"_a = t.halo, "tiles"_a = t.tiles,
      "blocks"_a = plan.blocks, "blocks_per_sm"_a = plan.blocks_per_sm, "instance"_a = t.instance,
      "slice"_a = t.slice, "resident"_a = bool(t.resident), "smem_bytes"_a = t.smem_bytes,
      "tensor_cores"_a = plan.tensor_cores, "dram_bytes"_a = plan.dram_bytes,
      "l2_bytes"_a = plan.l2_bytes, "seconds"_a = plan.seconds);
}

py::dict describe_backward(const ghost::BackwardPlan& plan) {
  const ghost::CheapTile& g = plan.grads;
  const ghost::PrimaryGradPlan& q = plan.primary;
  return py::dict(
      "launches"_a = plan.launches, "stores_u"_a = plan.stores_u,
      "sums"_a = plan.runs_sums ? py::object(describe("ghost_backward_sums", plan.sums))
                                : py::object(py::none()),
      "channels"_a = g.channels, "channel_blocks"_a = g.channel_blocks, "images"_a = g.images,
      "rows"_a = g.rows, "cols"_a = g.cols, "halo_rows"_a = g.halo_rows,
      "halo_cols"_a = g.halo_cols, "tiles"_a = g.tiles, "workers"_a = g.workers,
      "grads_smem_bytes"_a = g.smem_bytes, "du_workers"_a = q.du.workers,
      "du_slices"_a = q.du.slices, "du_channels"_a = q.du.channels, "du_pixels"_a = q.du.pixels,
      "makes_u"_a = q.du.makes_u, "dx_blocks"_a = q.dx_blocks, "dx_groups"_a = q.dx_groups,
      "dx_depth"_a = q.dx_depth, "dw1_blocks"_a = q.dw1_blocks(), "dw1_splits"_a = q.dw1_splits,
      "dw1_pixels"_a = q.dw1_pixels, "primary_smem_bytes"_a = q.smem_bytes,
      "scratch_bytes"_a = plan.scratch_bytes);
}

}  // namespace

// The launches of an eval pass, or of a training forward, one dictionary each, and whether the
// first of them writes u; for training the backward pass, too.
py::dict plan_cuda_passes(const ghost::Problem& problem, int sm, bool allow_tf32, bool training) {
  using ghost::CudaKernel;
  const ghost::CudaArch arch = ghost::cuda_arch(sm);
  py::list passes;
  const auto add = [&](const char* name, const ghost::Problem& p, CudaKernel kernel) {
    if (kernel == CudaKernel::kApply) {
      const ghost::PipelinedPlan pipelined = ghost::choose_pipelined(p, arch);
      if (pipelined.base.blocks > 0) {
        passes.append(describe("ghost_apply_pipelined", pipelined.base));
        return;
      }
    }
    passes.append(describe(name, ghost::plan_cuda(p, kernel, arch, allow_tf32)));
  };
  if (!training) {
    add("ghost_apply", problem, CudaKernel::kApply);
    return py::dict("passes"_a = passes, "writes_u"_a = false, "backward"_a = py::none());
  }
  const ghost::CudaTraining t = ghost::cuda_training(problem, ghost::keep_primary(problem));
  add("ghost_primary_stats", t.primary,
      t.writes_u ? CudaKernel::kPrimaryStatsKeep : CudaKernel::kPrimaryStats);
  if (problem.ghosts() > 0) add("ghost_cheap_stats", t.cheap, CudaKernel::kCheapStats);
  add("ghost_apply", t.apply, CudaKernel::kApply);
  const bool kept = problem.has_primary && ghost::keep_primary(problem);
  const bool rows = (kept || !problem.has_primary) && problem.layout == ghost::Layout::kNHWC &&
                    problem.intrinsic * ghost::element_size(problem.dtype) % 16 == 0;
  const py::dict backward = describe_backward(ghost::plan_cuda_backward(
      problem, arch, allow_tf32, kept || !problem.has_primary, rows, true, problem.has_primary));
  return py::dict("passes"_a = passes, "writes_u"_a = t.writes_u, "backward"_a = backward);
}

// The figures of an architecture that the models of time divide by.
py::dict cuda_arch_figures(int sm) {
  const ghost::CudaArch arch = ghost::cuda_arch(sm);
  return py::dict("sm"_a = arch.sm, "multiprocessors"_a = arch.multiprocessors,
                  "smem_per_block"_a = arch.smem_per_block, "l2_bytes"_a = arch.l2_bytes,
                  "dram_gb_s"_a = arch.dram_gb_s, "l2_gb_s"_a = arch.l2_gb_s,
                  "clock_ghz"_a = arch.clock_ghz, "tensor_flops_clock"_a = arch.tensor_flops_clock);
}

namespace {

ghost::Problem layer_problem(int64_t batch, int64_t channels, int64_t height, int64_t width,
                             int64_t dw_size, int64_t stride, int64_t out_channels, int dtype,
                             bool channels_last) {
  ghost::Problem p;
  p.batch = batch;
  p.channels = channels;
  p.height = height;
  p.width = width;
  p.dw_size = dw_size;
  p.stride = stride;
  p.out_channels = out_channels;
  p.dtype = ghost::DType(dtype);
  p.layout = channels_last ? ghost::Layout::kNHWC : ghost::Layout::kNCHW;
  return p;
}

template <class Plan>
py::dict figures(const Plan& plan) {
  return py::dict("blocks"_a = plan.blocks, "dram_bytes"_a = plan.dram_bytes,
                  "seconds"_a = plan.seconds);
}

}  // namespace

// Blocks, bytes and the model's time of the kernels between the Ghost modules, and in how many
// parts a depthwise convolution sums an image.
void define_layer_plans(py::module_& m) {
  m.def(
      "cuda_depthwise_plan",
      [](int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t dw_size,
         int64_t stride, int dtype, bool channels_last, bool sums, int sm) {
        const ghost::Problem p = layer_problem(batch, channels, height, width, dw_size, stride,
                                               channels, dtype, channels_last);
        const ghost::DepthwisePlan plan = ghost::plan_depthwise(p, sums, 16, ghost::cuda_arch(sm));
        py::dict found = figures(plan);
        found["splits"] = plan.splits;
        return found;
      },
      "batch"_a, "channels"_a, "height"_a, "width"_a, "dw_size"_a, "stride"_a, "dtype"_a,
      "channels_last"_a, "sums"_a, "sm"_a);
  m.def(
      "cuda_stem_plan",
      [](int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t stride,
         int64_t out_channels, int dtype, bool channels_last, int sm) {
        return figures(ghost::plan_stem(layer_problem(batch, channels, height, width, 3, stride,
                                                      out_channels, dtype, channels_last),
                                        ghost::cuda_arch(sm)));
      },
      "batch"_a, "channels"_a, "height"_a, "width"_a, "stride"_a, "out_channels"_a, "dtype"_a,
      "channels_last"_a, "sm"_a);
  m.def(
      "cuda_gate_plan",
      [](int64_t batch, int64_t channels, int64_t reduced, int64_t pixels, int64_t splits,
         int dtype, int sm) {
        const ghost::GatePlan plan =
            ghost::plan_gate(batch, channels, reduced, pixels, splits > 0, splits,
                             ghost::DType(dtype), ghost::cuda_arch(sm));
        py::dict found = figures(plan);
        found["launches"] = plan.parts > 1 ? 2 : 1;
        return found;
      },
      "batch"_a, "channels"_a, "reduced"_a, "pixels"_a, "splits"_a, "dtype"_a, "sm"_a);
}
