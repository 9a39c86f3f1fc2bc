"""Squeeze-and-excitation gates: x * gate(expand(act(reduce(mean of x over pixels)))).

``reduce`` and ``expand`` are 1x1 convolutions with bias; gate is sigmoid or hard sigmoid.

Source: Hu et al., CVPR 2018 (arXiv:1709.01507).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import activations, ops
from ..activations import hard_sigmoid
from ..autograd import layers
from .branch import NO_ACT, called, is_plain, layer_at
from .guards import Path, Refusal, at
from .read import Reading
from .symbols import Node


class Gate(NamedTuple):
    """A squeeze-and-excitation, bound to its layers.

    Attributes:
        reduce, expand: the convolutions.
        act, slope: code and slope of the activation between them.
        code: of the gate function, ``SIGMOID`` or ``HARD_SIGMOID``.
        modules: all modules that the squeeze-and-excitation calls.
    """

    reduce: nn.Conv2d
    expand: nn.Conv2d
    act: int
    slope: float
    code: int
    modules: tuple[nn.Module, ...]

    def run(self, x: Tensor) -> Tensor:
        """x times its gate; differentiable."""
        w1, b1, w2, b2 = self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias
        if layers.can_train(x, w1, b1, w2, b2):
            return layers.SqueezeExciteFunction.apply(
                x, w1, b1, w2, b2, self.act, self.slope, self.code
            )
        s = activations.apply(self.reduce(x.mean((2, 3), keepdim=True)), self.act, self.slope)
        s = self.expand(s)
        return x * (hard_sigmoid(s) if self.code == ops.HARD_SIGMOID else torch.sigmoid(s))


class PackedGate:
    """A squeeze-and-excitation in inference."""

    def __init__(self, gate: Gate) -> None:
        self.tensors = ops.pack_gate(
            gate.reduce.weight, gate.reduce.bias, gate.expand.weight, gate.expand.bias
        )
        self.arguments = (gate.act, gate.slope, gate.code)

    def __call__(self, x: Tensor) -> None:
        """x *= gate(x), in place."""
        ops.squeeze_excite_(x, *self.tensors, *self.arguments)

    def values(self, x: Tensor, sums: Tensor | None) -> Tensor:
        """gate(x) [N, C], from the sums [N, parts, C] of x over pixels if they are given."""
        return ops.squeeze_excite_gate(x, sums, *self.tensors, *self.arguments)


class GateForm(NamedTuple):
    """The paths of a squeeze-and-excitation's layers; attributes as in ``Gate``."""

    reduce: Path
    expand: Path
    act: int
    slope: float
    code: int
    modules: tuple[Path, ...]

    def bind(self, module: nn.Module) -> Gate:
        """The gate in a module. Raises ``Refusal`` if its convolutions are not 1x1 with bias."""
        reduce = layer_at(module, self.reduce, nn.Conv2d)
        expand = layer_at(module, self.expand, nn.Conv2d)
        for conv in (reduce, expand):
            if not is_plain(conv) or conv.bias is None:
                raise Refusal("its gate has a convolution other than 1x1 with bias")
        if expand.out_channels != reduce.in_channels:
            raise Refusal("its gate has another number of channels than its input")
        modules: list[Any] = [at(module, path) for path in self.modules]
        return Gate(reduce, expand, self.act, self.slope, self.code, tuple(modules))


def find_gate(reading: Reading, node: Node) -> tuple[GateForm, Node] | None:
    """The gate that computes a node, and the node of its input; None if no gate computes it."""
    pairs = (node.inputs, node.inputs[::-1]) if node.op == "mul" and len(node.inputs) == 2 else ()
    for x, gate in pairs:
        code, s = _gate_function(gate)
        if s is None or s.op != "conv":
            continue
        expand, (s,) = s.args[0], s.inputs
        act = NO_ACT
        if s.op == "act":
            act, (s,) = s.args, s.inputs
        if s.op == "conv" and s.inputs[0].op == "mean" and s.inputs[0].inputs[0] is x:
            modules = (*called(reading, node), s.args[0], expand)
            return GateForm(s.args[0], expand, *act, code, modules), x
    return None


def _gate_function(gate: Node) -> tuple[int, Node | None]:
    """The code of the function that ends a gate, and its input; (-1, None) for other functions."""
    if gate.op == "sigmoid":
        return ops.SIGMOID, gate.inputs[0]
    if gate.op == "hardsigmoid":
        return ops.HARD_SIGMOID, gate.inputs[0]
    if gate.op == "div" and gate.args == (6,):  # relu6(x + 3) / 6
        (act,) = gate.inputs
        if act.op == "clamp6" or (act.op == "act" and act.args[0] == activations.RELU6):
            (add,) = act.inputs
            if add.op == "add" and add.args == (3,):
                return ops.HARD_SIGMOID, add.inputs[0]
    return -1, None
