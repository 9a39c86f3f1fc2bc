"""Who is measured: eager PyTorch, its best options, other engines, and ghost_ops.

A provider turns one reference Ghost module and one input into a call without arguments. All of them
hold the same parameters and see the same values, in the layout that their name ends with.
"""

from __future__ import annotations

import copy
import fnmatch
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.nn.utils.fusion import fuse_conv_bn_eval

import ghost_ops
from benchmarks.harness.rows import BASELINE, ENGINE_FAMILIES
from benchmarks.harness.shapes import Shape
from ghost_ops.reference import GhostModule

CHANNELS_LAST = "channels_last"
NCHW = "nchw"


@dataclass(frozen=True)
class Provider:
    """A way to run the module."""

    family: str  # eager, folded, compile, compile_frozen, fused, or one of ENGINE_FAMILIES
    layout: str  # memory format of x (and of grad_out): nchw or channels_last
    trains: bool = True  # whether it can run forward + backward

    @property
    def name(self) -> str:
        """``family_layout``, as the rows and tables show it."""
        return f"{self.family}_{'cl' if self.layout == CHANNELS_LAST else 'nchw'}"

    @property
    def engine(self) -> bool:
        """Whether this is neither PyTorch nor ghost_ops, see ``engines.py``."""
        return self.family in ENGINE_FAMILIES

    def input(self, x: Tensor) -> Tensor:
        """``x`` in this provider's memory format."""
        return x.contiguous(memory_format=_FORMATS[self.layout])


_FORMATS = {NCHW: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}
LAYOUTS = tuple(_FORMATS)
PROVIDERS: tuple[Provider, ...] = (
    *(Provider("eager", layout) for layout in LAYOUTS),
    *(Provider("folded", layout, trains=False) for layout in LAYOUTS),
    Provider("compile", CHANNELS_LAST),
    Provider("compile_frozen", CHANNELS_LAST, trains=False),
    *(Provider("fused", layout) for layout in LAYOUTS),
)
ENGINES: tuple[Provider, ...] = (
    Provider("onnxruntime", NCHW, trains=False),
    *(Provider("openvino", layout, trains=False) for layout in LAYOUTS),
)


def select(
    patterns: Sequence[str], candidates: Sequence[Provider] = PROVIDERS
) -> tuple[Provider, ...]:
    """Providers whose name or family matches a pattern, which may be a glob or ``all`` (PyTorch's
    and ours), and eager NCHW in any case. ValueError for a pattern that matches nothing."""
    chosen = {BASELINE}
    for pattern in patterns:
        matches = [
            p.name
            for p in candidates
            if (pattern == "all" and not p.engine)
            or p.family == pattern
            or fnmatch.fnmatchcase(p.name, pattern)
        ]
        if not matches:
            known = ", ".join(p.name for p in candidates)
            raise ValueError(f"providers: {pattern!r} matches none; known are: all, {known}")
        chosen.update(matches)
    return tuple(p for p in candidates if p.name in chosen)


def compile_unavailable() -> str | None:
    """Why torch.compile cannot run here, or None if it can."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if any(map(shutil.which, names)):
        return None
    return "torch.compile needs a C++ compiler for the CPU (g++ or clang++ on PATH, or CXX)"


def reference_module(shape: Shape, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The plain PyTorch module of ``shape``, batch-norm parameters and statistics randomised."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    sizes = (shape.kernel_size, shape.ratio, shape.dw_size, shape.stride)
    module = GhostModule(shape.inp, shape.oup, *sizes, relu=shape.activation != "none")
    for branch in (module.primary_conv, module.cheap_operation):
        if shape.activation == "silu":
            branch[2] = nn.SiLU(inplace=True)
        norm = branch[1]
        norm.eps = shape.eps
        count = norm.num_features
        with torch.no_grad():
            norm.weight.copy_(torch.rand(count, generator=generator) + 0.5)
            norm.bias.copy_(torch.randn(count, generator=generator) * 0.2)
            norm.running_mean.copy_(torch.randn(count, generator=generator) * 0.1)
            norm.running_var.copy_(torch.rand(count, generator=generator) + 0.5)
    return module.to(dtype)


def folded(network: nn.Module) -> nn.Module:
    """A copy in eval mode with each batch norm folded into its convolution.

    A norm of a concatenation stays: it scales the intrinsic maps after the cheap operation has read
    them, and zero padding keeps its shift out of the convolutions before.
    """
    network = copy.deepcopy(network).eval()
    if not isinstance(network, GhostModule):
        return optimization.fuse(network)
    for branch in (network.primary_conv, network.cheap_operation):
        branch[0] = fuse_conv_bn_eval(branch[0], branch[1])
        branch[1] = nn.Identity()
    return network


@torch.inference_mode(False)
def build(provider: Provider, plain: nn.Module, *, training: bool) -> Any:
    """The provider's own copy of a plain Ghost module or network, to be called with x.

    Parameters are made outside inference mode, as a user's are, whatever the caller's mode.
    """
    module: Any = copy.deepcopy(plain).train(training)
    if provider.family == "fused":
        if type(module) is GhostModule:
            return ghost_ops.FusedGhostModule.from_reference(module).train(training)
        ghost_ops.fuse(module, inference=True)
        return module
    if provider.family == "folded":
        module = folded(module)
    if provider.layout == CHANNELS_LAST:
        module = module.to(memory_format=torch.channels_last)
    if provider.family.startswith("compile"):
        # Freezing folds the batch norms and packs the weights ahead of time.
        options = {"freezing": True} if provider.family == "compile_frozen" else None
        return torch.compile(module, dynamic=False, options=options)
    return module
