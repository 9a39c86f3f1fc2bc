"""Whole GhostNets: the stem and the head around the bottlenecks are fused too.

A GhostNet is a stem (convolution, batch norm, activation), bottlenecks, a last 1x1 convolution with
batch norm and activation, average pooling, a second 1x1 convolution (the head), an activation and a
linear layer. In eval mode without gradients the norms are folded; the last convolution runs as a
Ghost module of ratio 1, the head as a matrix product, and the bottlenecks as modules. On a CPU, if
there are kernels for the whole forward as an ``expression``, the network is one operator.

In training on a CPU the stem and the last convolution run as Ghost modules of ratio 1: only their
inputs are saved, and backward computes the convolution and the activation's mask again. The layers
between stem and last convolution run in NCHW, which is faster in training on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activations, ops
from ..autograd import layers
from ..conventions import dense, memory_format
from .bottleneck import FusedBottleneck
from .branch import (
    Branch,
    BranchForm,
    called,
    match_any_branch,
    match_branch,
    why_not_together,
)
from .expression import Expression, ExpressionForm, match_expression
from .fused import FusedInference
from .ghost import FusedGhost
from .ghost_parts import Ghost, PackedGhost, packed_conv, run_conv
from .guards import Path, Refusal, at
from .read import Failed, Reading, read
from .symbols import Node


class Network:
    """The parts of a GhostNet.

    Attributes:
        stem, last: the first convolution and the one after the bottlenecks.
        blocks: the modules between stem and last, in the order of their calls.
        head, head_act: the convolution after the pooling, and (code, slope) of its activation.
        dropout: share of the values that are dropped before the linear layer.
        classifier: the linear layer.
        pools, head_modules: the modules that compute the pooling, and head with activation.
        expression: the whole network, if the CPU has kernels for it; else None.
        layers, first, dw_size, alone: as in ``state.Parts``.
    """

    alone = False
    dw_size = 1

    def __init__(
        self,
        stem: Branch,
        blocks: tuple[nn.Module, ...],
        last: Branch,
        head: nn.Conv2d,
        head_act: tuple[int, float],
        dropout: float,
        classifier: nn.Linear,
        pools: tuple[nn.Module, ...],
        head_modules: tuple[nn.Module, ...],
        expression: Expression | None,
    ) -> None:
        self.dropout = dropout
        self.stem, self.blocks, self.last = stem, blocks, last
        self.head, self.head_act, self.classifier = head, head_act, classifier
        self.pools, self.head_modules = pools, head_modules
        self.expression = expression
        self.first = stem.conv
        self.layers: tuple[nn.Module, ...] = (*stem.layers, *last.layers, head)
        if expression is not None:
            self.layers = expression.layers

    def check(self, x: Tensor) -> None:
        """Does nothing: for an x that does not fit, the network's own forward runs."""

    def why_not_packed(self) -> str:
        """Why the network cannot be packed in its present modes; empty if it can."""
        return "it drops values at random" if self.dropout else why_not_together(self.layers)

    def run(self, x: Tensor) -> Tensor | str:
        """The logits, differentiable; or an empty reason, as in ``state.Parts.run``."""
        if not layers.has_kernels(x):
            return ""
        head = self.head
        x = run_conv(self.stem, x)
        if x.dtype in (torch.float32, torch.float64):
            x = x.contiguous()  # training is faster in NCHW, and the logits have no layout
        for block in self.blocks:
            x = block(x)
        x = run_conv(self.last, x).mean((2, 3))
        if head._forward_pre_hooks:  # the hooks compute the weight
            x = head(x[:, :, None, None]).flatten(1)
        else:
            x = F.linear(x, head.weight.flatten(1), head.bias)
        x = activations.apply(x, *self.head_act)
        return self.classifier(F.dropout(x, self.dropout) if self.dropout else x)

    def pack(self, backend: str) -> tuple[Callable[..., Tensor], tuple]:
        """An operator or a function, and its arguments after a dense x that fits."""
        expression = self.expression
        on_cpu = backend == "native" and not ops.on_gpu(self.first.weight)
        if on_cpu and expression is not None and not expression.why_not_packed():
            return expression.pack(backend)
        return PackedNetwork(self, backend), ()

    def description(self) -> str:
        """The network in words, for the report."""
        return "network: stem, last convolution and head folded"


class _PackedStem:
    """The first convolution with its batch norm folded in, and its activation.

    On a GPU ``ghost_ops::conv_stem`` computes it; on a CPU ``ghost_conv_apply`` in channels_last,
    because the whole network is faster in channels_last. If the operator has no kernel, PyTorch's
    convolution runs.
    """

    def __init__(self, branch: Branch, backend: str) -> None:
        conv, bn = branch.conv, branch.bn
        assert bn is not None
        ghost = Ghost(branch, None, conv.out_channels)
        on_cpu = backend == "native" and not ops.on_gpu(conv.weight) and ghost.is_conv()
        self.packed = PackedGhost(ghost, backend) if on_cpu else None
        self.weight, self.shift = ops.fold(
            conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps
        )
        self.arguments = (conv.stride, branch.padding, conv.dilation, conv.groups)
        self.act = branch.act, branch.slope
        self.direct = ops.on_gpu(conv.weight) and ops.has_stem(conv)
        # As in PyTorch's convolution, the output is channels_last if x or the weight is.
        self.format = memory_format(conv.weight)
        if not self.direct:
            self.weight = self.weight.to(conv.weight.dtype).contiguous(memory_format=self.format)
            self.shift = self.shift.to(conv.weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed(x.contiguous(memory_format=torch.channels_last))
        if self.direct:
            channels_last = torch.channels_last in (self.format, memory_format(x))
            stride = self.arguments[0][0]
            return ops.conv_stem(
                x, self.weight, self.shift, stride, *self.act, channels_last=channels_last
            )
        return activations.apply(
            F.conv2d(x, self.weight, self.shift, *self.arguments), *self.act, inplace=True
        )


class PackedNetwork:
    """A GhostNet in inference: packed stem and head, and the bottlenecks as modules."""

    def __init__(self, parts: Network, backend: str) -> None:
        self.stem, self.blocks = _PackedStem(parts.stem, backend), parts.blocks
        self.last = packed_conv(parts.last, backend)
        self.head = parts.head.weight.detach().flatten(1)
        self.head_bias, self.head_act = parts.head.bias, parts.head_act
        self.packed_head: PackedGhost | None = None
        if backend == "native" and not ops.on_gpu(self.head):
            head = Branch(parts.head, None, *parts.head_act, None, (0, 0), ())
            self.packed_head = packed_conv(head, backend)
        self.classifier = parts.classifier

    def __call__(self, x: Tensor) -> Tensor:
        """Logits for a dense x that fits."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.last.pooled(dense(x))
        if self.packed_head is not None:
            # x [N, C] as one channels_last map [1, C, N, 1], whose pixels are the images.
            x = self.packed_head(x[None, :, None].permute(0, 3, 1, 2))[0, :, :, 0].t()
        else:
            x = F.linear(x, self.head, self.head_bias)
            x = activations.apply(x, *self.head_act, inplace=True)
        return self.classifier(x)


class NetworkForm(NamedTuple):
    """The paths of a network's modules; attributes as in ``Network``."""

    stem: BranchForm
    blocks: tuple[Path, ...]
    last: BranchForm
    head: Path
    head_act: tuple[int, float]
    dropout: float
    classifier: Path
    pools: tuple[Path, ...]
    head_modules: tuple[Path, ...]
    expression: ExpressionForm | None

    def bind(self, module: nn.Module) -> Network:
        """The parts in a module, as ``state.Form.bind``."""
        stem, last = self.stem.bind(module), self.last.bind(module)
        head: Any = at(module, self.head)
        if stem.bn is None or stem.prelu is not None:
            raise Refusal("its stem has no batch norm, or a PReLU")
        plain = (1, 1), (1, 1), (0, 0), 1
        for name, conv in (("last stage", last.conv), ("head", head)):
            if (conv.kernel_size, conv.stride, conv.padding, conv.groups) != plain:
                raise Refusal(f"its {name} is not a plain 1x1 convolution")
        if last.prelu is not None:
            raise Refusal("its last stage has a PReLU, which only Ghost modules compute")
        paths = self.blocks, self.pools, self.head_modules
        blocks, pools, modules = (tuple(at(module, path) for path in some) for some in paths)
        classifier: Any = at(module, self.classifier)
        expression = None
        with suppress(Refusal):
            expression = None if self.expression is None else self.expression.bind(module)
        return Network(
            stem=stem,
            blocks=blocks,
            last=last,
            head=head,
            head_act=self.head_act,
            dropout=self.dropout,
            classifier=classifier,
            pools=pools,
            head_modules=modules,
            expression=expression,
        )

    def shape(self, module: nn.Module) -> None:
        """None: compiled graphs have no operator for a network."""
        return None


def match_network(reading: Reading) -> NetworkForm:
    """The network that a reading's forward computes.

    Raises:
        Refusal: the forward computes no GhostNet.
    """
    classifier = _expect(reading.out, "linear", "a linear layer")
    calls = reading.calls.get(classifier, ())
    path = next((call.path for call in calls if call.x is classifier.inputs[0]), None)
    if path is None:
        raise Refusal("its linear layer is not a module of its own")
    node, dropout = classifier.inputs[0], 0.0
    if node.op == "dropout":
        (dropout,), (node,) = node.args, node.inputs
    node = _expect(node, "flatten", "a flattening").inputs[0]
    act = _expect(node, "act", "an activation")
    head = _expect(act.inputs[0], "conv", "a convolution")
    pool = _expect(head.inputs[0], "mean", "an average pooling")
    last, node = match_any_branch(reading, pool.inputs[0], "the last stage")
    blocks: list[Path] = []
    while True:
        with suppress(Refusal):
            stem, x = match_branch(reading, node, "the stem")
            if x.op == "input":
                break
        calls = [call for call in reading.calls.get(node, ()) if call.x is not node]
        if not calls:
            raise Refusal("its forward is not stem, blocks and head")
        blocks.insert(0, calls[-1].path)
        node = calls[-1].x
    expression = None
    with suppress(Refusal):
        expression = match_expression(reading)
    return NetworkForm(
        stem=stem,
        blocks=tuple(blocks),
        last=last,
        head=head.args[0],
        head_act=act.args,
        dropout=dropout,
        classifier=path,
        pools=called(reading, pool),
        head_modules=called(reading, act, head),
        expression=expression,
    )


def _expect(node: Node, op: str, what: str) -> Node:
    """The node. Raises ``Refusal`` if its operation is another."""
    if node.op != op:
        raise Refusal(f"its forward has {node.op} in the place of {what}")
    return node


def _read(module: nn.Module, training: bool) -> Reading:
    """The reading of a network in one mode."""
    whole = (FusedGhost, FusedBottleneck)
    if training:
        return read(module, training, whole)
    # If a bottleneck cannot be followed or has no kernels, the stem and the head are still
    # fused, from a second reading. The record of the first reading guards this decision.
    try:
        reading = read(module, training)
        match_expression(reading)
        return reading
    except Failed as failed:
        seen = failed.record
    except Refusal:
        seen = reading.record
    reading = read(module, training, whole)
    return reading._replace(record=reading.record.joined(seen))


class FusedNetwork(FusedInference):
    """A fused GhostNet."""

    _ghost_kind = "network"

    @classmethod
    def _ghost_read(cls, module: nn.Module, training: bool | None = None) -> Reading:
        if training is not None:
            return _read(module, training)
        # ``_read`` reads in different ways in the two modes. So the mode is a guard, also if the
        # forward itself does not read it.
        try:
            reading = _read(module, module.training)
        except Failed as failed:
            raise Failed(str(failed), failed.record.with_mode(module)) from None
        return reading._replace(record=reading.record.with_mode(module))

    @classmethod
    def _ghost_match(cls, reading: Reading) -> NetworkForm:
        return match_network(reading)

    def _ghost_eager(self, x: Tensor) -> Tensor | str:
        if not (self.training or torch.is_grad_enabled()):
            return super()._ghost_eager(x)
        # In training a fallback is intended, so it gives no warning.
        parts = self._ghost_state().parts if layers.has_kernels(x) else None
        return "" if parts is None else parts.run(x)
