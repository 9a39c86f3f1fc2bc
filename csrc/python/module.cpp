// ghost_ops._C: build information, instruction sets and plans. Importing it also registers the CPU
// operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/plan.h"
#include "cpu/dispatch.h"
#include "python/cached_call.h"
#include "python/watch.h"

namespace py = pybind11;
using namespace py::literals;

// cuda_plan.cpp
py::dict plan_cuda_passes(const ghost::Problem& problem, int sm, bool allow_tf32, bool training,
                          int alternatives);
py::dict cuda_arch_figures(int sm);
void define_cost_model(py::module_& m);
void define_layer_plans(py::module_& m);

namespace {

// Defines a Python function whose first arguments are the fields of a problem; f gets the problem
// and the arguments that `more` names.
template <class... Args, class... More>
void define_planner(py::module_& m, const char* name, py::dict (*f)(ghost::Problem, Args...),
                    const More&... more) {
  m.def(
      name,
      [f](int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t intrinsic,
          int64_t out_channels, int64_t ratio, int64_t dw_size, int64_t stride, int act1, int act2,
          int dtype, bool channels_last, bool has_primary, bool has_residual, Args... args) {
        ghost::Problem p;
        p.batch = batch;
        p.channels = channels;
        p.height = height;
        p.width = width;
        p.intrinsic = intrinsic;
        p.out_channels = out_channels;
        p.ratio = ratio;
        p.dw_size = dw_size;
        p.stride = stride;
        p.act1.act = ghost::Act(act1);
        p.act2.act = ghost::Act(act2);
        p.dtype = ghost::DType(dtype);
        p.layout = channels_last ? ghost::Layout::kNHWC : ghost::Layout::kNCHW;
        p.has_primary = has_primary;
        p.has_residual = has_residual;
        return f(p, args...);
      },
      "batch"_a, "channels"_a, "height"_a, "width"_a, "intrinsic"_a, "out_channels"_a,
      "ratio"_a = 2, "dw_size"_a = 3, "stride"_a = 1, "act1"_a = 1, "act2"_a = 1, "dtype"_a = 0,
      "channels_last"_a = false, "has_primary"_a = true, "has_residual"_a = false, more...);
}

// The plan of a Ghost module in inference, without a gate and without a PReLU.
py::dict cpu_plan(ghost::Problem p, int64_t lanes, int64_t registers, int64_t l1_bytes,
                  int64_t l2_bytes, int64_t cores, bool amx) {
  p.allows_channel_lanes = true;
  p.has_pairs = p.dtype == ghost::DType::kBFloat16 && p.has_primary && p.depth() % 2 == 0;
  const ghost::ApplyPlan plan =
      ghost::plan_apply(p, {lanes, registers, l1_bytes, l2_bytes, cores, amx});
  const ghost::Traffic t = ghost::traffic(p);
  static constexpr const char* kFetch[] = {"nothing", "columns", "images"};
  return py::dict("along_lanes"_a = plan.channel_lanes ? "channels" : "pixels",
                  "depth"_a = plan.depth, "amx"_a = plan.amx, "in_place"_a = plan.in_place,
                  "pack"_a = plan.pack, "images"_a = plan.images, "band_rows"_a = plan.band_rows,
                  "row_splits"_a = plan.row_splits, "channel_splits"_a = plan.channel_splits,
                  "group"_a = plan.group, "vecs"_a = plan.vecs, "fetch"_a = kFetch[int(plan.fetch)],
                  "fetch_results"_a = plan.fetch_results, "stream"_a = plan.stream,
                  "items"_a = plan.items, "scratch_bytes"_a = plan.scratch_bytes,
                  "bytes_fused"_a = t.bytes_fused, "bytes_eager"_a = t.bytes_eager,
                  "flops"_a = t.flops, "keep_primary"_a = ghost::keep_primary(p));
}

py::dict cuda_plan(ghost::Problem p, bool has_in_gate, bool pooled, int64_t gate_height,
                   int64_t gate_width, int sm, bool allow_tf32, bool training, int alternatives) {
  p.has_in_gate = has_in_gate;
  p.pooled = pooled;
  p.gate_height = gate_height;
  p.gate_width = gate_width;
  return plan_cuda_passes(p, sm, allow_tf32, training, alternatives);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native side of ghost_ops: build information, instruction sets and the tile plan.";
  if (add_watch_type(m.ptr()) != 0 || add_cached_call_type(m.ptr()) != 0)
    throw py::error_already_set();
  m.def("build_info", [] {
    return py::dict("compiler"_a = __VERSION__, "cxx_standard"_a = int64_t(__cplusplus),
                    "stable_abi"_a = "2.10");
  });
  m.def("available_isas", &ghost::available_isas);
  m.def("isa", [] { return std::string(ghost::active_isa().name); });
  m.def("set_isa", &ghost::set_isa, "name"_a);
  // The names of the instruction sets that the tables in use were compiled for.
  m.def("tables", [] {
    const ghost::Isa& isa = ghost::active_isa();
    return std::vector<std::string>{isa.ghost.name, isa.layers.name, isa.tail.name};
  });
  m.def(
      "machine",
      [](int64_t threads) {
        const ghost::CpuMachine c = ghost::cpu_machine(threads);
        return py::dict("lanes"_a = c.lanes, "registers"_a = c.registers, "l1_bytes"_a = c.l1_bytes,
                        "l2_bytes"_a = c.l2_bytes, "cores"_a = c.cores, "amx"_a = c.amx);
      },
      "threads"_a);
  m.def("force_machine", &ghost::force_machine, "l1_bytes"_a = 0, "l2_bytes"_a = 0, "cores"_a = 0);
  define_planner(m, "plan", &cpu_plan, py::kw_only(), "lanes"_a, "registers"_a, "l1_bytes"_a,
                 "l2_bytes"_a, "cores"_a, "amx"_a = false);
  define_planner(m, "cuda_plan", &cuda_plan, "has_in_gate"_a = false, "pooled"_a = false,
                 "gate_height"_a = 0, "gate_width"_a = 0, "sm"_a = 90, "allow_tf32"_a = true,
                 "training"_a = false, "alternatives"_a = 0);
  m.def("cuda_arch", &cuda_arch_figures, "sm"_a);
  define_cost_model(m);
  define_layer_plans(m);
}
