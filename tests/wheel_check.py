"""What an installed wheel must do, in the Python that runs this file; prints facts as JSON.

``python wheel_check.py`` imports nothing of the checkout and needs no NumPy and no GPU. Forward,
evaluation and gradients of the native kernels are compared with plain PyTorch in float64, and so is
a fused GhostNet.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import pathlib
import platform
import re
from typing import Any

import torch
from torch import nn

import ghost_ops
from ghost_ops import backends, models, reference


def check_close(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raises unless got is within 2e-4 of the largest value of the float64 tensor want."""
    error = (got.double() - want).abs().max().item() / max(want.abs().max().item(), 1e-30)
    if not error <= 2e-4:
        raise AssertionError(f"{name}: relative error {error:.1e}")


def check_module(nhwc: bool) -> None:
    """Training step and evaluation of a Ghost module."""
    plain = reference.GhostModule(16, 33, dw_size=3).double()
    fused = ghost_ops.FusedGhostModule(16, 33, dw_size=3)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(3, 16, 15, 13)
    if nhwc:
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = x.clone().requires_grad_(), x.double().requires_grad_()
    outs = fused(inputs[0]), plain(inputs[1])
    grad = torch.randn_like(outs[1])
    outs[0].backward(grad.float())
    outs[1].backward(grad)
    check_close("training output", outs[0], outs[1])
    check_close("gradient of x", inputs[0].grad, inputs[1].grad)
    for (name, got), want in zip(fused.named_parameters(), plain.parameters(), strict=True):
        check_close(f"gradient of {name}", got.grad, want.grad)
    for (name, got), want in zip(fused.named_buffers(), plain.buffers(), strict=True):
        check_close(name, got, want)
    with torch.no_grad():
        check_close("evaluation", fused.eval()(x), plain.eval()(x.double()))


def check_network() -> None:
    """A fused GhostNet with statistics of its own, twice: the second call is the cached one."""
    fused = models.ghostnet(width=0.5, num_classes=10)
    for buffer_name, buffer in fused.named_buffers():
        if buffer_name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.1)
    plain = copy.deepcopy(fused)
    ghost_ops.unfuse(plain)
    again = copy.deepcopy(plain)
    ghost_ops.fuse(again)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = plain.double().eval()(x.double())
        for name, model in (("models.ghostnet", fused), ("fuse", again)):
            for _ in range(2):
                check_close(name, model.eval()(x), want)


def cuda_loads() -> str:
    """The reason of the CUDA library's loader, or "not in this wheel"."""
    return backends.cuda.reason() if backends.cuda.PATH.exists() else "not in this wheel"


def facts() -> dict[str, Any]:
    """Versions, and what of the wheel is in use."""
    triton = importlib.util.find_spec("triton")
    version = None
    if triton is not None and triton.origin is not None:
        text = pathlib.Path(triton.origin).read_text(encoding="utf-8")
        version = re.search(r"__version__ = ['\"]([^'\"]+)", text)[1]
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "triton": version,
        "cpu_library": backends.native.reason(),
        "cuda_library": cuda_loads(),
        "package": str(pathlib.Path(ghost_ops.__file__).parent),
    }


def main() -> None:
    """Check, then print the facts."""
    if not backends.native.load():
        raise AssertionError(backends.native.reason())
    torch.manual_seed(0)
    ghost_ops.use_backend("native")
    for nhwc in (False, True):
        check_module(nhwc)
    check_network()
    print(json.dumps(facts()))


if __name__ == "__main__":
    main()
