"""Whole GhostNets in inference: what comes before the bottlenecks and after them, folded as well.

A GhostNet is a stem (convolution, batch norm, activation), stages of bottlenecks, a last 1x1
convolution with batch norm and activation, average pooling, one more 1x1 convolution and a linear
layer. In eval mode without gradients the norms are folded, the last convolution runs as a Ghost
module of ratio 1 and the one behind the pooling as the matrix product that it is. The bottlenecks
run as the modules that they are, see ``bottleneck``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import activations, convert_probe, model_ops
from .autograd import backend_for, dense
from .bottleneck import packed_conv
from .convert_forward import PackedGhost, PackedWhole, Watch, _rebuild
from .convert_layouts import Branch, Refusal, check_hooks, read_branch
from .eager_ops import memory_format

_NAMES = ("conv_stem", "bn1", "act1", "blocks", "global_pool", "conv_head", "act2", "classifier")


class Ends(NamedTuple):
    """The parts of a GhostNet around its bottlenecks."""

    stem: Branch
    stages: nn.Sequential
    last: Branch
    head: nn.Conv2d
    head_act: nn.Module
    classifier: nn.Linear

    def modules(self) -> tuple[nn.Module, ...]:
        """What the packed form computes in the place of, and the containers of the stages."""
        head = (self.head, self.head_act, self.classifier)
        return (*self.stem.modules, *self.last.modules, self.stages, self.stages[-1], *head)

    def formula(self, x: Tensor) -> Tensor:
        """The network in plain PyTorch, the stages as they are."""
        x = self.stem.act(self.stem.bn(self.stem.conv(x)))  # type: ignore[misc]
        for stage in self.stages[:-1]:
            x = stage(x)
        x, bn = self.last.conv(x), self.last.bn
        assert bn is not None
        x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        act = activations.of_module(self.last.act) if self.last.act is not None else None
        x = (x if act is None else activations.apply(x, *act)).mean((2, 3), keepdim=True)
        return self.classifier(self.head_act(self.head(x)).flatten(1))

    def verify(self, module: nn.Module) -> None:
        """Raise ``Refusal`` if the module's forward is not ``formula`` in eval mode."""
        generator = torch.Generator().manual_seed(0)
        copy = convert_probe.clone(module, generator).eval()
        ends = read_ends(copy)
        assert ends is not None
        shape = (2, self.stem.conv.in_channels, 33, 40)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        got = convert_probe.run(lambda: copy(x.clone()))
        convert_probe.compare(got, convert_probe.run(lambda: ends.formula(x.clone())), "eval")


def read_ends(module: nn.Module) -> Ends | None:
    """The ends of a GhostNet, or None if the module does not have its children.

    Raises:
        Refusal: it has them, but an invariant does not hold.
    """
    children = module._modules
    if any(children.get(name) is None for name in _NAMES):
        return None
    stages = children["blocks"]
    if type(stages) is not nn.Sequential or not len(stages):
        raise Refusal("blocks is not a Sequential")
    for name, child in children.items():
        if name not in _NAMES and child is not None and any(True for _ in child.parameters()):
            raise Refusal(f"it has a further child, {name}")
    if "forward" in module.__dict__:
        raise Refusal("its forward is replaced on the object")
    stem = read_branch(nn.Sequential(*(children[name] for name in _NAMES[:3])), "the stem")
    last = _read_last(stages[-1])
    if stem.bn is None or stem.act is None:
        raise Refusal("its stem has no batch norm or activation")
    if type(stem.act) is nn.PReLU:
        raise Refusal("its stem has a PReLU, which only Ghost modules compute")
    conv = last.conv
    if (conv.kernel_size, conv.stride, conv.padding, conv.groups) != ((1, 1), (1, 1), (0, 0), 1):
        raise Refusal("its last stage is not a plain 1x1 convolution")
    if stem.conv.padding_mode != "zeros" or isinstance(stem.conv.padding, str):
        raise Refusal("its stem does not pad with a number of zeros")
    head, head_act, classifier = (children[name] for name in _NAMES[5:])
    if not isinstance(head, nn.Conv2d) or head.kernel_size != (1, 1) or head.groups != 1:
        raise Refusal("conv_head is not a plain 1x1 convolution")
    if activations.of_module(head_act) is None or not isinstance(classifier, nn.Linear):
        raise Refusal("conv_head is not followed by an activation and a linear layer")
    ends = Ends(stem, stages, last, head, head_act, classifier)
    check_hooks(ends.modules(), "it")
    return ends


def _read_last(stage: nn.Module) -> Branch:
    """The 1x1 convolution, batch norm and activation of the last stage.

    timm's batch norm has its activation in it: a subclass with children ``drop`` and ``act``.
    """
    norms = [m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)]
    convs = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
    acts = [m for m in stage.modules() if activations.of_module(m) is not None]
    acts = [m for m in acts if activations.of_module(m)[0] != activations.NONE]  # type: ignore[index]
    if len(norms) != 1 or len(convs) != 1 or len(acts) > 1:
        raise Refusal("its last stage is not one convolution, batch norm and activation")
    return Branch(convs[0], norms[0], acts[0] if acts else None, tuple(stage.modules()))


class _PackedStem:
    """A convolution with its batch norm folded in, and its activation.

    On a GPU one operator, ``ghost_ops::conv_stem``, where that computes it; else the library's
    convolution.
    """

    def __init__(self, branch: Branch) -> None:
        conv, bn = branch.conv, branch.bn
        assert bn is not None and branch.act is not None
        self.weight, self.shift = model_ops.fold(
            conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps
        )
        self.arguments = (conv.stride, conv.padding, conv.dilation, conv.groups)
        found = activations.of_module(branch.act)
        assert found is not None
        self.act = found
        self.direct = model_ops.on_gpu(conv.weight) and model_ops.has_stem(conv)
        # As PyTorch's convolution: channels_last if x or the weight is.
        self.format = memory_format(conv.weight)
        if not self.direct:
            self.weight = self.weight.to(conv.weight.dtype).contiguous(memory_format=self.format)
            self.shift = self.shift.to(conv.weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if self.direct:
            x = dense(x)
            channels_last = torch.channels_last in (self.format, memory_format(x))
            stride = self.arguments[0][0]
            return model_ops.conv_stem(
                x, self.weight, self.shift, stride, *self.act, channels_last=channels_last
            )
        return activations.apply(
            F.conv2d(x, self.weight, self.shift, *self.arguments), *self.act, inplace=True
        )


class PackedEnds(PackedWhole):
    """The ends of a GhostNet in inference, and the values that they were made from."""

    def __init__(self, module: nn.Module, ends: Ends, backend: str) -> None:
        modules = ends.modules()
        super().__init__(module, modules, ends.stem.conv)
        with torch.no_grad():
            self.stem = _PackedStem(ends.stem)
            self.last: PackedGhost = packed_conv(ends.last, backend)
            self.head = ends.head.weight.detach().flatten(1)
        self.head_bias, self.head_act = ends.head.bias, activations.of_module(ends.head_act)
        self.stages, self.classifier = ends.stages, ends.classifier

    def __call__(self, x: Tensor) -> Tensor:
        """Logits for an x that fits."""
        x = self.stem(x)
        for stage in self.stages[:-1]:
            x = stage(x)
        x = self.last.pooled(dense(x))
        x = F.linear(x, self.head, self.head_bias)
        assert self.head_act is not None
        x = activations.apply(x, *self.head_act, inplace=True)
        return self.classifier(x)


class NetworkState:
    """What a fused network keeps: its packed ends, or how it was when it could not have them."""

    def __init__(self) -> None:
        self.packed: PackedEnds | None = None
        self.failed: Watch | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"packed": None, "failed": None}

    def infer(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The logits; None where the network's own forward has to run."""
        if torch.is_grad_enabled() or module.training or torch.jit.is_tracing():
            return None
        packed = self.packed
        if packed is None or not packed.is_current():
            packed = self._pack(module, x)
        if packed is None or not packed.fits(x):
            return None
        return packed(x)

    def _pack(self, module: nn.Module, x: Tensor) -> PackedEnds | None:
        if self.failed is not None and self.failed.same():
            return None
        self.packed = self.failed = None
        try:
            ends = read_ends(module)
            if ends is None:
                raise Refusal("no GhostNet")
        except Refusal:
            self.failed = Watch(tuple(module.modules()), module)
            return None
        modules = ends.modules()
        norms = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
        if any(bn.training or bn.running_mean is None for bn in norms):
            return None
        if not PackedEnds.can_pack(modules, backend_for(x, 1)):
            return None
        self.packed = PackedEnds(module, ends, "native")
        return self.packed


class ConvertedNetwork(nn.Module):
    """The forward of a GhostNet made fused by ``fuse``, before its own class in the lookup."""

    _ghost_ops_base: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> logits [N, num_classes]."""
        if not torch.compiler.is_compiling():
            state = self.__dict__.get("_ghost_ops")
            if state is None:
                state = self.__dict__["_ghost_ops"] = NetworkState()
            out = state.infer(self, x)
            if out is not None:
                return out
        return super().forward(x)

    def reset_cache(self) -> None:
        """Forget the packed weights; the next call makes them anew."""
        self.__dict__["_ghost_ops"] = NetworkState()

    def train(self, mode: bool = True) -> Any:
        """As ``nn.Module.train``; forgets the packed weights."""
        self.reset_cache()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.reset_cache()
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (ConvertedNetwork, self._ghost_ops_base), self.__getstate__()
