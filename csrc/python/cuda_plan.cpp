// The plans of the CUDA kernels as Python dictionaries. Plain arithmetic: needs no GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <vector>

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
  const ghost::GradsTile& g = plan.grads;
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

// Returns {"passes": the launches of a forward pass in eval or training mode, one dictionary each;
// "writes_u": whether the first launch writes u; "backward": the plan of the backward pass, or None
// in eval mode}. alternatives: each launch lists up to this many plans, best first.
py::dict plan_cuda_passes(const ghost::Problem& problem, int sm, bool allow_tf32, bool training,
                          int alternatives) {
  using ghost::CudaKernel;
  const ghost::CudaArch arch = ghost::cuda_arch(sm);
  py::list passes;
  const auto add = [&](const char* name, const ghost::Problem& p, CudaKernel kernel) {
    if (kernel == CudaKernel::kApply) {
      const ghost::PipelinedPlan pipelined = ghost::choose_pipelined(p, arch);
      if (pipelined.base.blocks > 0) {
        py::dict pass = describe("ghost_apply_pipelined", pipelined.base);
        pass["alternatives"] = py::tuple();
        passes.append(pass);
        return;
      }
    }
    py::dict pass = describe(name, ghost::plan_cuda(p, kernel, arch, allow_tf32));
    py::list ranked;
    ghost::CudaPlan last;
    for (int rank = 1; rank <= alternatives; ++rank) {
      const ghost::CudaPlan plan = ghost::plan_cuda(p, kernel, arch, allow_tf32, rank);
      if (rank > 1 && ghost::choice_of(plan.tile) == ghost::choice_of(last.tile)) break;
      ranked.append(describe(name, plan));
      last = plan;
    }
    pass["alternatives"] = py::tuple(ranked);
    passes.append(pass);
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
  ghost::BackwardTask task;
  task.u_given = kept || !problem.has_primary;
  task.u_rows = rows;
  const py::dict backward =
      describe_backward(ghost::plan_cuda_backward(problem, arch, allow_tf32, task));
  return py::dict("passes"_a = passes, "writes_u"_a = t.writes_u, "backward"_a = backward);
}

// The rates and sizes of an architecture that the model of time uses.
py::dict cuda_arch_figures(int sm) {
  const ghost::CudaArch arch = ghost::cuda_arch(sm);
  return py::dict("sm"_a = arch.sm, "multiprocessors"_a = arch.multiprocessors,
                  "smem_per_block"_a = arch.smem_per_block, "l2_bytes"_a = arch.l2_bytes,
                  "dram_gb_s"_a = arch.dram_gb_s, "l2_gb_s"_a = arch.l2_gb_s,
                  "clock_ghz"_a = arch.clock_ghz, "tensor_flops_clock"_a = arch.tensor_flops_clock);
}

namespace {

py::list cost_table() {
  static constexpr const char* kOrigins[] = {"data sheet", "counted", "chosen", "estimate",
                                             "fitted"};
  py::list table;
  for (const ghost::CudaCost& cost : ghost::kCudaCostTable)
    table.append(py::dict("name"_a = cost.name, "value"_a = ghost::kCudaCosts.*cost.value,
                          "origin"_a = kOrigins[int(cost.origin)], "meaning"_a = cost.meaning));
  return table;
}

ghost::CudaCosts costs_of(const std::map<std::string, double>& given) {
  ghost::CudaCosts costs;
  for (const auto& [name, value] : given) {
    bool known = false;
    for (const ghost::CudaCost& cost : ghost::kCudaCostTable)
      if (name == cost.name) {
        costs.*cost.value = value;
        known = true;
      }
    if (!known) throw py::value_error("costs: there is no constant " + name);
  }
  return costs;
}

// instance, channels, resident, images, rows, cols
using TileTuple = std::array<int64_t, 6>;

// For each tile of ghost_apply in float16 and channels_last: the seconds that the constants
// predict, bytes of shared memory, blocks, and direct_tiles of the instance; None if the kernel has
// no such tile.
py::list predict(int64_t batch, int64_t channels, int64_t height, int64_t width,
                 int64_t out_channels, int64_t ratio, int64_t dw_size, int sm,
                 const std::vector<TileTuple>& tiles, const std::map<std::string, double>& costs) {
  ghost::Problem p;
  p.batch = batch;
  p.channels = channels;
  p.height = height;
  p.width = width;
  p.intrinsic = ghost::ceil_div(out_channels, ratio);
  p.out_channels = out_channels;
  p.ratio = ratio;
  p.dw_size = dw_size;
  p.has_primary = true;
  p.dtype = ghost::DType::kFloat16;
  p.layout = ghost::Layout::kNHWC;
  const ghost::CudaArch arch = ghost::cuda_arch(sm);
  const ghost::CudaCosts given = costs_of(costs);
  py::list found;
  for (const auto& [instance, block, resident, images, rows, cols] : tiles) {
    if (std::min({instance, block, images, rows, cols}) < 1)
      throw py::value_error("tiles: a size is below 1");
    const ghost::CudaChoice choice = {
        instance, ghost::ceil_div(p.intrinsic, block), 1, images, rows, cols, 32, resident != 0};
    const auto plan =
        ghost::plan_cuda_choice(p, ghost::CudaKernel::kApply, arch, true, choice, given);
    if (plan && plan->tile.channels == block)
      found.append(py::make_tuple(plan->seconds, plan->tile.smem_bytes, plan->blocks,
                                  ghost::direct_tiles(instance, ghost::CudaKernel::kApply)));
    else
      found.append(py::none());
  }
  return found;
}

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

// The model of time: its constants, and its predictions with other constants.
void define_cost_model(py::module_& m) {
  m.def("cuda_costs", &cost_table);
  m.def("cuda_predict", &predict, "batch"_a, "channels"_a, "height"_a, "width"_a, "out_channels"_a,
        "ratio"_a, "dw_size"_a, "sm"_a, "tiles"_a, "costs"_a);
}

// Blocks, bytes and predicted time of the kernels between the Ghost modules. "splits": the parts of
// an image that a depthwise convolution sums separately.
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
