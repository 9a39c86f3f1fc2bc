// The plan of the CUDA kernels as Python sees it. Needs no GPU: it is plain arithmetic.
#include <pybind11/pybind11.h>

#include "core/cuda_plan.h"
#include "core/cuda_plan_backward.h"
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
  return py::dict("launches"_a = plan.launches, "stores_u"_a = plan.stores_u,
                  "sums"_a = plan.runs_sums ? py::object(describe("ghost_backward_sums", plan.sums))
                                            : py::object(py::none()),
                  "channels"_a = g.channels, "channel_blocks"_a = g.channel_blocks,
                  "images"_a = g.images, "rows"_a = g.rows, "cols"_a = g.cols,
                  "halo_rows"_a = g.halo_rows, "halo_cols"_a = g.halo_cols, "tiles"_a = g.tiles,
                  "workers"_a = g.workers, "grads_smem_bytes"_a = g.smem_bytes,
                  "dx_blocks"_a = q.dx_blocks, "dx_groups"_a = q.dx_groups,
                  "dx_depth"_a = q.dx_depth, "dw1_blocks"_a = q.dw1_blocks(),
                  "dw1_splits"_a = q.dw1_splits, "dw1_pixels"_a = q.dw1_pixels,
                  "primary_smem_bytes"_a = q.smem_bytes, "scratch_bytes"_a = plan.scratch_bytes);
}

}  // namespace

// The launches of an eval pass, or of a training forward, one dictionary each, and whether the
// first of them writes u; for training the backward pass, too.
py::dict plan_cuda_passes(const ghost::Problem& problem, int sm, bool allow_tf32, bool training) {
  using ghost::CudaKernel;
  const ghost::CudaArch arch = ghost::cuda_arch(sm);
  py::list passes;
  const auto add = [&](const char* name, const ghost::Problem& p, CudaKernel kernel) {
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
