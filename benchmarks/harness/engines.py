"""ONNX Runtime and OpenVINO as peers: optional, inference only, batch norms folded beforehand.

Both come with the pip extra ``engines``. They compute in float32 (OpenVINO would choose bfloat16 on
some processors) on as many threads as PyTorch has. Input and output are bound once, in memory
that both sides share, so that a call copies and allocates nothing. Slices that keep everything
(traced from ``[:, :oup]``; ONNX Runtime would copy) are taken out of the graph. Where instruction
sets are limited (``machine.ISA_VARIABLES``), oneDNN's limit is OpenVINO's too; ONNX Runtime has
none and is left out.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import machine, providers, timing
from benchmarks.harness.machine import MissingExtra, require
from benchmarks.harness.providers import CHANNELS_LAST, Provider

EXTRA = "engines"


def missing(provider: Provider) -> MissingExtra | None:
    """The package that an engine lacks here, as an error with the command that installs it."""
    for package in ("onnx", provider.family):
        if importlib.util.find_spec(package) is None:
            needs = f"{provider.family} needs the package {package!r}, which is not installed"
            return MissingExtra(f'{needs}; install it with: pip install "ghost_ops[{EXTRA}]"')
    return None


def installed() -> list[Provider]:
    """The engines that can run here."""
    return [p for p in providers.ENGINES if missing(p) is None]


def print_missing() -> None:
    """Print which engines are not measured, and how to install them."""
    for reason in sorted({str(error) for p in providers.ENGINES if (error := missing(p))}):
        print(f"not measured: {reason}")


def choose(patterns: Sequence[str] | None, default: Sequence[str]) -> tuple[Provider, ...]:
    """The providers named, engines among them; ``default`` and all engines installed if none is.
    ValueError for a pattern that matches nothing or an engine that is not installed."""
    if not patterns:
        return (*providers.select(default), *installed())
    chosen = providers.select(patterns, (*providers.PROVIDERS, *providers.ENGINES))
    for provider in chosen:
        if provider.engine and (lacking := missing(provider)):
            raise ValueError(f"providers: {lacking}")
    return chosen


def unavailable(provider: Provider, dtype: torch.dtype) -> str | None:
    """Why ``provider`` cannot run here in ``dtype``, or None if it can."""
    if provider.family.startswith("compile"):
        return providers.compile_unavailable()
    if not provider.engine:
        return None
    if dtype is not torch.float32:
        return f"{provider.family} is measured in float32 only, not in {dtype}"
    if provider.family == "onnxruntime" and (limits := machine.forced(machine.ISA_VARIABLES)):
        return f"onnxruntime cannot be held to an instruction set ({', '.join(limits)})"
    return str(lacking) if (lacking := missing(provider)) else None


@torch.inference_mode(False)
@torch.no_grad()
def build(provider: Provider, folded: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """``folded``, a module in eval mode without batch norms, compiled by an engine for float32 x.

    Each call reads x, in the provider's memory format, anew, and gives the output in memory that
    the next call writes again. Raises MissingExtra if the engine is not installed.
    """
    model = _onnx(folded, x)
    if provider.family == "onnxruntime":
        return _onnxruntime(model, x)
    return _openvino(model, x, provider.layout == CHANNELS_LAST)


def _onnx(module: nn.Module, x: Tensor) -> bytes:
    onnx = require("onnx", "engines outside PyTorch", extra=EXTRA)
    file = io.BytesIO()
    # The tracing exporter: the newer one takes seconds for a module, and there are dozens here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x.clone().contiguous(),), file, input_names=["x"], dynamo=False)
    model = onnx.load_from_string(file.getvalue())
    drop_whole_slices(onnx.shape_inference.infer_shapes(model, data_prop=True))
    return model.SerializeToString()


def drop_whole_slices(model: Any) -> int:
    """Take Slice nodes whose output has their input's shape out of an ONNX graph; count them.

    Shapes are inferred before. Steps are taken to be positive, as PyTorch's always are.
    """
    graph = model.graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    inputs, outputs = ({v.name for v in values} for values in (graph.input, graph.output))
    whole = [
        node
        for node in graph.node
        if node.op_type == "Slice"
        and node.input[0] not in inputs
        and node.output[0] in shapes
        and all(shapes[node.output[0]])
        and shapes.get(node.input[0]) == shapes[node.output[0]]
    ]
    for node in whole:
        graph.node.remove(node)
        source, target = node.input[0], node.output[0]
        old, new = (source, target) if target in outputs else (target, source)
        for other in graph.node:
            for names in (other.input, other.output):
                for index, name in enumerate(names):
                    if name == old:
                        names[index] = new
    return len(whole)


def _onnxruntime(model: bytes, x: Tensor) -> Callable[[], Tensor]:
    onnxruntime = require("onnxruntime", "ONNX Runtime as a peer", extra=EXTRA)
    numpy = require("numpy", "element types")
    levels = onnxruntime.GraphOptimizationLevel
    calls: dict[Any, Callable[[], Tensor]] = {}
    # The highest level blocks channels by 16 and converts on the way in and out; where that costs
    # more than it brings, the level below, which stays in NCHW, is the faster.
    for level in (levels.ORT_ENABLE_ALL, levels.ORT_ENABLE_EXTENDED):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        out = torch.empty(session.get_outputs()[0].shape)
        binding = session.io_binding()
        for bind, value, tensor in (
            (binding.bind_input, session.get_inputs()[0], x),
            (binding.bind_output, session.get_outputs()[0], out),
        ):
            bind(value.name, "cpu", 0, numpy.float32, tuple(tensor.shape), tensor.data_ptr())

        # The default argument keeps x alive: the binding holds its address only.
        def run(session: Any = session, binding: Any = binding, held: Any = (out, x)) -> Tensor:
            session.run_with_iobinding(binding)
            return held[0]

        calls[level] = run
    clock = timing.CLOCKS["cpu" if torch.get_num_threads() == 1 else "wall"]
    timings = timing.time_interleaved(calls, rounds=7, min_sample=1e-3, clock=clock)
    return calls[min(calls, key=lambda level: timings[level].p20)]


@functools.cache
def _core() -> Any:
    return require("openvino", "OpenVINO as a peer", extra=EXTRA).Core()


def _openvino(serialized: bytes, x: Tensor, channels_last: bool) -> Callable[[], Tensor]:
    openvino = require("openvino", "OpenVINO as a peer", extra=EXTRA)
    model = _core().read_model(serialized)
    if channels_last:
        steps = openvino.preprocess.PrePostProcessor(model)
        ends = [steps.input(), *([steps.output()] if len(model.output().shape) == 4 else [])]
        for end in ends:
            end.tensor().set_layout(openvino.Layout("NHWC"))
            end.model().set_layout(openvino.Layout("NCHW"))
        model = steps.build()
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # its threads stay on the cores of this process
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = _core().compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    out = torch.empty(list(compiled.output().shape))
    given = x.permute(0, 2, 3, 1) if channels_last else x
    request.set_input_tensor(openvino.Tensor(given.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(out.numpy(), shared_memory=True))
    result = out.permute(0, 3, 1, 2) if channels_last and out.dim() == 4 else out

    # The default argument keeps both tensors alive: the request holds their addresses only.
    def run(held: Any = (given, result)) -> Tensor:
        # Without sharing, every call would copy the results.
        request.infer(share_inputs=True, share_outputs=True)
        return held[1]

    return run
