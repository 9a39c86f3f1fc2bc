"""ONNX Runtime and OpenVINO as peers: optional, inference only, batch norms folded beforehand.

Both come with the pip extra ``engines``. They are given the folded module and the number of threads
that PyTorch has, and compute in float32 (OpenVINO is told not to drop to bfloat16 by itself).
"""

from __future__ import annotations

import functools
import importlib.util
import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import providers
from benchmarks.extras import MissingExtra, require
from benchmarks.providers import CHANNELS_LAST, Forward, Provider

EXTRA = "engines"
_PACKAGES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}


def missing(provider: Provider) -> MissingExtra | None:
    """What an engine lacks here, as the error that says how to get it; None if it can run."""
    for package in _PACKAGES[provider.family]:
        if importlib.util.find_spec(package) is None:
            return MissingExtra(
                f"{provider.family} needs the package {package!r}, which is not installed; "
                f'install it with: pip install "ghost_ops[{EXTRA}]"'
            )
    return None


def installed() -> list[Provider]:
    """The engines that can run here."""
    return [p for p in providers.ENGINES if missing(p) is None]


def unavailable(provider: Provider, dtype: torch.dtype) -> str | None:
    """Why ``provider`` cannot run here in ``dtype``, or None if it can."""
    if provider.family.startswith("compile"):
        return providers.compile_unavailable()
    if not provider.engine:
        return None
    if dtype is not torch.float32:
        return f"{provider.family} is measured in float32 only, not in {dtype}"
    lacking = missing(provider)
    return None if lacking is None else str(lacking)


@torch.inference_mode(False)
@torch.no_grad()
def build(provider: Provider, reference: nn.Module, x: Tensor) -> Forward:
    """``reference`` in eval mode, compiled by the engine for inputs like ``x``."""
    model = _onnx(providers.folded_module(reference), x)
    if provider.family == "onnxruntime":
        return _onnxruntime(model)
    return _openvino(model, provider.layout == CHANNELS_LAST)


def _onnx(module: nn.Module, x: Tensor) -> bytes:
    require("onnx", "engines outside PyTorch", extra=EXTRA)
    file = io.BytesIO()
    # The tracing exporter: the newer one takes seconds for a module, and there are dozens here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(module, (x.clone().contiguous(),), file, input_names=["x"], dynamo=False)
    return file.getvalue()


def _onnxruntime(model: bytes) -> Forward:
    onnxruntime = require("onnxruntime", "ONNX Runtime as a peer", extra=EXTRA)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda own: torch.from_numpy(session.run(None, {"x": own.numpy()})[0])


@functools.cache
def _core() -> Any:
    return require("openvino", "OpenVINO as a peer", extra=EXTRA).Core()


def _openvino(serialized: bytes, channels_last: bool) -> Forward:
    openvino = require("openvino", "OpenVINO as a peer", extra=EXTRA)
    model = _core().read_model(serialized)
    if channels_last:
        steps = openvino.preprocess.PrePostProcessor(model)
        steps.input().tensor().set_layout(openvino.Layout("NHWC"))
        steps.input().model().set_layout(openvino.Layout("NCHW"))
        steps.output().tensor().set_layout(openvino.Layout("NHWC"))
        steps.output().model().set_layout(openvino.Layout("NCHW"))
        model = steps.build()
    compiled = _core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            # Its threads stay on the cores that this process is pinned to.
            "ENABLE_CPU_PINNING": False,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()

    def run(own: Tensor) -> Tensor:
        array = (own.permute(0, 2, 3, 1) if channels_last else own).numpy()
        out = torch.from_numpy(request.infer([array], share_inputs=True, share_outputs=True)[0])
        return out.permute(0, 3, 1, 2) if channels_last else out

    return run
