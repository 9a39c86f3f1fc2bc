"""Who is measured: eager PyTorch, its best options, other engines, and ghost_ops.

A provider turns one reference Ghost module and one input into a call without arguments. All of them
hold the same parameters and see the same values, in the layout that their name ends with.
"""

from __future__ import annotations

import copy
import fnmatch
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.shapes import Shape

Forward = Callable[[Tensor], Tensor]
CHANNELS_LAST = "channels_last"
NCHW = "nchw"


@dataclass(frozen=True)
class Provider:
    """A way to run the module.

    Args:
        family: what runs: eager, folded, compile, compile_frozen, fused, or an engine outside
            PyTorch (onnxruntime, openvino).
        layout: memory format of x (and of grad_out): nchw or channels_last.
        trains: whether it can run forward + backward.
    """

    family: str
    layout: str
    trains: bool = True

    @property
    def name(self) -> str:
        """``family_layout``, as the rows and tables show it."""
        return f"{self.family}_{'cl' if self.layout == CHANNELS_LAST else 'nchw'}"

    @property
    def ours(self) -> bool:
        """Whether this is ghost_ops."""
        return self.family == "fused"

    @property
    def engine(self) -> bool:
        """Whether this is neither PyTorch nor ghost_ops, see ``benchmarks.engines``."""
        return self.family in ENGINE_FAMILIES

    def input(self, x: Tensor) -> Tensor:
        """``x`` in this provider's memory format."""
        return x.contiguous(memory_format=_FORMATS[self.layout])


ENGINE_FAMILIES = ("onnxruntime", "openvino")
_FORMATS = {NCHW: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}

PROVIDERS: tuple[Provider, ...] = (
    Provider("eager", NCHW),
    Provider("eager", CHANNELS_LAST),
    Provider("folded", NCHW, trains=False),
    Provider("folded", CHANNELS_LAST, trains=False),
    Provider("compile", CHANNELS_LAST),
    Provider("compile_frozen", CHANNELS_LAST, trains=False),
    Provider("fused", NCHW),
    Provider("fused", CHANNELS_LAST),
)
ENGINES: tuple[Provider, ...] = (
    Provider("onnxruntime", NCHW, trains=False),
    Provider("openvino", NCHW, trains=False),
    Provider("openvino", CHANNELS_LAST, trains=False),
)
BASELINE = "eager_nchw"


def select(
    patterns: Sequence[str], candidates: Sequence[Provider] = PROVIDERS
) -> tuple[Provider, ...]:
    """Providers whose name or family matches; the eager NCHW baseline is always among them.

    Args:
        patterns: names, families, globs, or ``all`` for PyTorch's and ours.
        candidates: what to choose from; ``PROVIDERS + ENGINES`` where engines can run.

    Raises:
        ValueError: a pattern matches nothing.
    """
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
    compiler = os.environ.get("CXX") or next(
        (c for c in ("g++", "clang++") if shutil.which(c)), None
    )
    if compiler is None or shutil.which(compiler) is None:
        return "torch.compile needs a C++ compiler for the CPU (g++ or clang++ on PATH, or CXX)"
    return None


def reference_module(
    shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """The plain PyTorch module of ``shape``, batch-norm parameters and statistics randomised."""
    from ghost_ops.reference import GhostModule

    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    module = GhostModule(
        shape.inp, shape.oup, shape.kernel_size, shape.ratio, shape.dw_size, shape.stride,
        relu=shape.activation != "none",
    )  # fmt: skip
    for branch in (module.primary_conv, module.cheap_operation):
        if shape.activation not in ("relu", "none"):
            branch[2] = _ACTIVATIONS[shape.activation](inplace=True)
        norm = branch[1]
        norm.eps = shape.eps
        with torch.no_grad():
            norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
            norm.bias.copy_(torch.randn(norm.num_features, generator=generator) * 0.2)
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 0.1)
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return module.to(dtype)


_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU}


def folded_module(module: nn.Module) -> nn.Module:
    """A copy in eval mode with each batch norm folded into its convolution."""
    folded = copy.deepcopy(module).eval()
    for branch in (folded.primary_conv, folded.cheap_operation):
        branch[0] = fuse_conv_bn_eval(branch[0], branch[1])
        branch[1] = nn.Identity()
    return folded


@torch.inference_mode(False)
def build(provider: Provider, reference: nn.Module, *, training: bool) -> nn.Module | Forward:
    """The provider's own copy of ``reference`` in the mode asked for, to be called with x.

    Parameters are made outside inference mode, as a user's are, whatever the caller's mode.
    """
    module = copy.deepcopy(reference).train(training)
    if provider.family == "fused":
        from ghost_ops import FusedGhostModule

        return FusedGhostModule.from_reference(module).train(training)
    if provider.family == "folded":
        module = folded_module(module)
    return arrange(provider, module)


def arrange(provider: Provider, module: nn.Module) -> nn.Module | Forward:
    """``module`` in the provider's memory format, compiled if it is a provider that compiles."""
    if provider.layout == CHANNELS_LAST:
        module = module.to(memory_format=torch.channels_last)
    if provider.family == "compile":
        return torch.compile(module, dynamic=False)
    if provider.family == "compile_frozen":
        # Freezing folds the batch norms and packs the weights ahead of time.
        return torch.compile(module, dynamic=False, options={"freezing": True})
    return module
