"""``Branch``: a convolution, with the batch norm and the activation that follow it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import activations
from ..autograd.forward import RunningUpdate
from ..conventions import LOW_PRECISION, compute_dtype
from ..sync import NORMS, group_of, run_norm
from .guards import Path, Refusal, at
from .read import Reading
from .symbols import Node

NO_ACT = (activations.NONE, activations.DEFAULT_SLOPE)
_WORDS = {"conv": "a convolution", "bn": "a batch norm", "act": "an activation"}


class Branch(NamedTuple):
    """act(bn(conv(x))), bound to its layers.

    Attributes:
        conv, bn, prelu: the layers; bn and prelu may be None.
        act, slope: code and slope of the activation, as in ``activations``.
        padding: of the convolution, as two numbers.
        modules: all modules that the branch calls.
    """

    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None
    act: int
    slope: float
    prelu: nn.PReLU | None
    padding: tuple[int, int]
    modules: tuple[nn.Module, ...]

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The modules with parameters."""
        return tuple(m for m in (self.conv, self.bn, self.prelu) if m is not None)

    def uses_batch_stats(self) -> bool:
        """Whether the norm uses the batch's statistics."""
        bn = self.bn
        return bn is not None and (
            bn.training or (bn.running_mean is None and bn.running_var is None)
        )

    def group(self) -> Any:
        """The process group whose batches share one statistic; None: this process alone."""
        return None if self.bn is None else group_of(self.bn)

    def norm(
        self, weight: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """gamma, beta, mean and var [out_channels] of the norm; without a norm, of the identity.

        beta includes the convolution's bias. Statistics of the batch cancel a bias; in this case
        beta includes bias * 0, which propagates NaN and infinity and has gradient zero.

        Args:
            weight: of the convolution. An argument, because a parametrised weight is computed at
                each access.
        """
        bn, bias = self.bn, self.conv.bias
        if bn is None:
            size = weight.size(0)
            return None, bias, weight.new_zeros(size), weight.new_ones(size)
        gamma, mean, var = bn.weight, bn.running_mean, bn.running_var
        beta: Tensor | None = bn.bias
        if bn.training and not bn.track_running_stats:
            mean = var = None
        if bias is not None:
            wide = compute_dtype(bias.dtype)
            if self.uses_batch_stats():
                shift = bias.to(wide) * 0
            else:
                shift = bias.to(wide) * torch.rsqrt(var.to(wide) + bn.eps)
                shift = shift if gamma is None else shift * gamma
            beta = shift if beta is None else beta + shift
        return gamma, beta, mean, var

    def running_update(self) -> RunningUpdate:
        """How a training step updates the running statistics."""
        bn = self.bn
        if bn is None:
            return RunningUpdate()
        counts = bn.training and bn.track_running_stats
        batches = bn.num_batches_tracked if counts else None
        if bn.momentum is None and batches is None:
            return RunningUpdate()
        return RunningUpdate(bn.momentum, batches)

    def add_bias_to_running_mean(self) -> None:
        """Add the bias's share to the running mean, after a training step without the bias."""
        bn, bias = self.bn, self.conv.bias
        if bn is None or bias is None or bn.running_mean is None:
            return
        if not (bn.training and bn.track_running_stats):
            return
        share = bn.momentum
        if share is None and bn.num_batches_tracked is None:
            return
        if share is None:
            share = 1.0 / float(bn.num_batches_tracked)
        with torch.no_grad():
            bn.running_mean.add_(bias.to(bn.running_mean.dtype), alpha=share)

    def slopes(self) -> Tensor | None:
        """The slopes [out_channels] of the PReLU; None without one."""
        if self.prelu is None:
            return None
        return activations.slopes_of(self.prelu, self.conv.out_channels)

    def then(self, x: Tensor) -> Tensor:
        """Norm and activation of the convolution's result x, by PyTorch's layers."""
        if self.bn is not None:
            x = run_norm(self.bn, x)
        return activations.apply(x, self.act, self.slope)


class BranchForm(NamedTuple):
    """The paths of a branch's layers, and its activation."""

    conv: Path
    bn: Path | None
    act: int
    slope: float
    prelu: Path | None
    modules: tuple[Path, ...]

    def bind(self, module: nn.Module) -> Branch:
        """The branch in a module. Raises ``Refusal`` if the ops cannot compute a layer of it."""
        conv = layer_at(module, self.conv, nn.Conv2d)
        bn = None if self.bn is None else layer_at(module, self.bn, NORMS)
        prelu = None if self.prelu is None else layer_at(module, self.prelu, nn.PReLU)
        name = ".".join(self.conv)
        if conv.padding_mode != "zeros":
            raise Refusal(f"{name} pads with {conv.padding_mode!r}, not with zeros")
        m = conv.out_channels
        if bn is not None and bn.num_features != m:
            raise Refusal(
                f"{name} has a batch norm of {bn.num_features} channels behind a convolution of {m}"
            )
        modules: list[Any] = [at(module, path) for path in self.modules]
        padding = padding_of(conv)
        return Branch(conv, bn, self.act, self.slope, prelu, padding, tuple(modules))


def layer_at(
    module: nn.Module, path: Path, kind: type[nn.Module] | tuple[type[nn.Module], ...]
) -> Any:
    """The layer at a path. Raises ``Refusal`` if it is no instance of ``kind``."""
    layer = at(module, path)
    if not isinstance(layer, kind):
        kind = kind[0] if isinstance(kind, tuple) else kind
        raise Refusal(f"{'.'.join(path)} is no {kind.__name__}")
    return layer


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """A convolution's padding as numbers. Raises ``Refusal`` if opposite sides differ."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding != "same":
        return conv.padding  # type: ignore[return-value]
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(r % 2 for r in reach):
        raise Refusal(f"a convolution of kernel {conv.kernel_size} pads one side more")
    return reach[0] // 2, reach[1] // 2


def is_plain(conv: nn.Conv2d) -> bool:
    """Whether a convolution is a 1x1 of stride 1, without padding and groups."""
    return (
        conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid", "same")
        and conv.groups == 1
    )


def why_not_together(layers: tuple[nn.Module, ...]) -> str:
    """Why layers cannot be packed for one operator; empty if they can.

    All must have one device and dtype, except that batch norms may be float32 behind convolutions
    of low precision. All norms must use their running statistics.
    """
    first = next(layers[0].parameters(False), None)
    if first is None:
        return "its weights are computed at every call"
    for layer in layers:
        norm = isinstance(layer, NORMS)
        if norm and (layer.training or layer.running_mean is None):
            return "a batch norm uses the batch's statistics"
        wide = norm and first.dtype in LOW_PRECISION
        dtypes = {t.dtype for t in layer.parameters(False)}
        dtypes |= {t.dtype for t in layer.buffers(False) if t.is_floating_point()}
        if dtypes and dtypes != {first.dtype} and not (wide and dtypes == {torch.float32}):
            return "its layers have several dtypes"
        if any(t.device != first.device for t in (*layer.parameters(False), *layer.buffers(False))):
            return "its parameters are on several devices"
    return ""


def called(reading: Reading, *nodes: Node) -> tuple[Path, ...]:
    """The modules whose calls returned these nodes, without modules that return their input."""
    return tuple(c.path for node in nodes for c in reading.calls.get(node, ()) if c.x is not node)


def match_branch(reading: Reading, node: Node, name: str) -> tuple[BranchForm, Node]:
    """The branch that computes a node, and the node of the branch's input.

    Args:
        name: of the branch, for the message.

    Raises:
        Refusal: no branch computes the node.
    """
    act, prelu, bn, nodes = NO_ACT, None, None, [node]
    if node.op == "act":
        act, (node,) = node.args, node.inputs
    elif node.op == "prelu":
        act, prelu, (node,) = (activations.PRELU, NO_ACT[1]), node.args[0], node.inputs
    nodes.append(node)
    if node.op == "bn":
        bn, (node,) = node.args[0], node.inputs
        nodes.append(node)
    if node.op != "conv":
        raise Refusal(f"{name} is not convolution, norm and activation: it has {what_it_is(node)}")
    modules = tuple(dict.fromkeys(called(reading, *nodes)))
    return BranchForm(node.args[0], bn, *act, prelu, modules), node.inputs[0]


def match_any_branch(reading: Reading, node: Node, name: str) -> tuple[BranchForm, Node]:
    """As ``match_branch``; also timm's batch norm with activation, which calls F.batch_norm."""
    act, inner = NO_ACT, node
    if node.op == "act":
        act, (inner,) = node.args, node.inputs
    if inner.op != "frozen_bn" or inner.inputs[0].op != "conv":
        return match_branch(reading, node, name)
    conv = inner.inputs[0]
    modules = tuple(dict.fromkeys(called(reading, node, inner, conv)))
    return BranchForm(conv.args[0], inner.args[0], *act, None, modules), conv.inputs[0]


def what_it_is(node: Node) -> str:
    """A node's operation in words, for messages."""
    if node.op == "module":
        path, reason = node.args
        return reason or ".".join(path)
    return _WORDS.get(node.op, node.op)
