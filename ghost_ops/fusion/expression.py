"""Modules of convolutions, Ghost modules, sums and concatenations as one operator of the CPU.

The module may be one convolution with batch norm and activation, a whole network, or anything
between: a residual block of Ghost-ResNet, Ultralytics' C3Ghost, a GhostNet with stem and head.
``read`` gives the expression of its forward. This file turns the expression into a list of steps,
and each step into one instruction of a ``Program``::

    ghost       a Ghost module, or a convolution (ratio 1), with norm and activation; if its result
                is used by one sum only, the other term of the sum is its residual. Also a linear
                layer, on vectors
    depthwise   a depthwise convolution with norm and activation
    excite      x times its squeeze-and-excitation gate
    sum         act(a + b), or act(a)
    concat      concatenation along channels
    mean        mean over pixels: one vector per image
    flatten     the vectors as [N, C]

The program runs in eval mode without gradients, on a CPU with native kernels. With gradients on
such a CPU, a residual block whose batch norms follow its concatenations runs its Ghost modules with
the operator ``ghost_tail``. In every other case the module's own forward runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import activations
from ..autograd.checks import LARGEST_DW_SIZE
from ..modes import autocast_dtype
from .branch import (
    NO_ACT,
    Branch,
    layer_at,
    match_any_branch,
    what_it_is,
    why_not_together,
)
from .depthwise import PackedDepthwise, bind_depthwise
from .fused import FusedInference
from .gate import Gate, PackedGate, find_gate
from .ghost import GhostForm, match_ghost
from .ghost_parts import Ghost, PackedGhost, packed_conv
from .guards import Refusal
from .program import Program
from .read import PARAMETER_HOOKS, Reading
from .symbols import Node


class Step(NamedTuple):
    """One instruction, before it is bound to modules.

    Attributes:
        op: a name of the table in this file's docstring.
        values: the numbers of its inputs: 0 is the module's input, k the result of steps[k - 1].
        form: the paths of its layers; for a sum, (code, slope) of its activation.
    """

    op: str
    values: tuple[int, ...]
    form: Any = None


class Shape(NamedTuple):
    """The part of a value's shape that does not depend on the input's size.

    Attributes:
        channels: C.
        pixels: (base, vertical stride, horizontal stride) relative to the module's input. Two
            values with equal ``pixels`` have equal height and width for every input. None: the
            value is one vector per image.
        flat: the vectors are [N, C], not [N, C, 1, 1].
    """

    channels: int
    pixels: tuple[Any, ...] | None
    flat: bool = False

    def behind(self, conv: nn.Conv2d, padding: tuple[int, int], out_channels: int) -> Shape:
        """The shape of a convolution's result. Raises ``Refusal`` if there is no kernel for it."""
        if conv.in_channels != self.channels:
            raise Refusal(f"a convolution of {conv.in_channels} channels gets {self.channels}")
        if self.pixels is None:
            plain = (conv.kernel_size, conv.stride, padding) == ((1, 1), (1, 1), (0, 0))
            if self.flat or not plain or conv.groups > 1:
                raise Refusal("a convolution other than a plain 1x1 follows a pooling")
            return Shape(out_channels, None)
        base, *strides = self.pixels
        for i, (pad, k, d) in enumerate(zip(padding, conv.kernel_size, conv.dilation, strict=True)):
            strides[i] *= conv.stride[i]
            if 2 * pad != d * (k - 1):
                base = object()  # unequal to every other base: the size may differ
        return Shape(out_channels, (base, *strides))


class Expression:
    """The steps of a forward, bound to its modules.

    Attributes:
        steps: the instructions.
        parts: one for each step: a ``Ghost``, a ``Branch``, a ``Gate``, a linear layer, or (code,
            slope) of an activation.
        result: the shape of the last value.
        layers, first, dw_size, alone: as in ``state.Parts``.
    """

    alone = False

    def __init__(self, steps: tuple[Step, ...], parts: tuple[Any, ...], result: Shape) -> None:
        self.steps, self.parts, self.result = steps, parts, result
        self.layers = tuple(layer for part in parts for layer in _layers(part))
        self.first = _first_conv(steps, parts)
        ghosts = [part for part in parts if isinstance(part, Ghost)]
        self.dw_size = max((ghost.dw_size for ghost in ghosts), default=1)

    def check(self, x: Tensor) -> None:
        """Does nothing: for an x that does not fit, the module's own forward runs."""

    def why_not_packed(self) -> str:
        """Why the steps cannot be packed in their present modes; empty if they can."""
        hooks = (hook for layer in self.layers for hook in layer._forward_pre_hooks.values())
        if any(isinstance(hook, PARAMETER_HOOKS) for hook in hooks):
            return "its weights are computed at every call"
        if self.first.weight.device.type != "cpu":
            return "only the CPU has kernels for it"
        reasons = [part.why_not_packed() for part in self.parts if isinstance(part, Ghost)]
        shapes = map(_why_not_shape, self.layers)
        return why_not_together(self.layers) or next(filter(None, (*reasons, *shapes)), "")

    def run(self, x: Tensor) -> str:
        """An empty reason: the module's own forward runs, without a warning."""
        return ""

    def can_run_tail_ops(self, x: Tensor) -> bool:
        """Whether ``run_tail_ops`` computes the module on x.

        ``run_tail_ops`` supports convolutions, sums, and Ghost modules whose batch norm follows the
        concatenation.
        """
        if autocast_dtype(x.device.type) not in (None, x.dtype):
            return False  # under autocast a sum in place and a new sum have different dtypes
        ghosts = [part for part in self.parts if isinstance(part, Ghost)]
        sums = sum(step.op == "sum" for step in self.steps)
        tails = [ghost.can_run_tail_op(x) for ghost in ghosts if ghost.cheap is not None]
        if len(ghosts) + sums < len(self.steps) or not tails or not all(tails):
            return False
        if any(map(_why_not_shape, self.layers)):
            return False
        # A layer in two steps would update its running statistics twice.
        return len({id(layer) for layer in self.layers}) == len(self.layers)

    def run_tail_ops(self, x: Tensor) -> Tensor | str:
        """The output, differentiable; or a reason, as in ``state.Parts.run``."""
        values, uses = [x], Counter(value for step in self.steps for value in step.values)
        done = False  # the previous step has applied the activation of this step
        for number, (step, part) in enumerate(zip(self.steps, self.parts, strict=True), 1):
            given = [values[value] for value in step.values]
            other = given[1] if len(given) > 1 else None
            out: Tensor | str
            if isinstance(part, Ghost) and part.cheap is not None:
                # If the next step is only the activation of this sum, it is applied here.
                then = self.steps[number] if number < len(self.steps) else None
                ends = then is not None and (then.op, then.values) == ("sum", (number,))
                done = ends and other is not None and uses[number] == 1
                out = part.run_tail_op(given[0], other, self.parts[number] if done else NO_ACT)
                if isinstance(out, str):
                    return out
            elif isinstance(part, Ghost):
                out = part.primary.then(part.first(given[0]))
                out = out if other is None else out + other
            else:
                out = given[0] if other is None else given[0] + other
                out = out if done else activations.apply(out, *part)
                done = False
            values.append(out)
        return values[-1]

    def pack(self, backend: str) -> tuple[Callable[..., Tensor], tuple]:
        """As ``state.Parts.pack``."""
        parts = [_pack(part, backend) for part in self.parts]
        if len(parts) == 1 and isinstance(parts[0], PackedGhost):
            return parts[0].operator, (parts[0].packed, None, *parts[0].arguments)
        return self._program(parts).packed()

    def _program(self, parts: list[Any]) -> Program:
        """The program that computes the steps with packed parts."""
        program = Program()
        # Networks run faster in channels_last. If the result is a map, it keeps the layout of x.
        vector = self.result.pixels is None
        numbers = [program.channels_last(0) if vector else 0]
        # Uses of the memory of each value; a flattened value shares the memory of its input.
        uses: Counter[int] = Counter()
        owners = list(range(len(self.steps) + 1))
        for number, (op, values, _) in enumerate(self.steps, 1):
            if op == "flatten":
                owners[number] = owners[values[0]]
            else:
                uses.update(owners[value] for value in values)
        for (op, values, _), part in zip(self.steps, parts, strict=True):
            x, *others = [numbers[value] for value in values]
            other = others[0] if others else None
            if op == "ghost":
                made = part.add_to(program, x, other)
            elif op == "depthwise":
                made = part.add_to(program, x)
            elif op == "excite":
                made = program.excite(x, part.tensors, part.arguments)
            elif op == "sum":
                # This is false for the module's input, because ``first`` takes the input too.
                in_place = uses[owners[values[0]]] == 1
                made = program.sum(x, other, part, in_place=in_place)
            elif op == "concat":
                made = program.concat((x, *others))
            elif op == "mean":
                made = program.mean(x)
            else:  # flatten: the same memory
                made = x
            numbers.append(made)
        if vector:
            program.rows(numbers[-1], 2 if self.result.flat else 4)
        return program

    def description(self) -> str:
        """The module in words, for the report."""
        if len(self.steps) > 1:
            words = Counter(map(_word, self.steps, self.parts))
            return "one operator: " + ", ".join(f"{n} {word}" for word, n in words.items() if word)
        conv = self.first
        k, s = conv.kernel_size[0], conv.stride[0]
        text = f"conv {conv.in_channels} -> {conv.out_channels}, {k}x{k}"
        if conv.groups > 1:
            text = f"depthwise {conv.in_channels}, {k}x{k}"
        return text + (f" stride {s}" if s > 1 else "")


def _layers(part: Any) -> tuple[nn.Module, ...]:
    """The modules of a part that have parameters."""
    if isinstance(part, Gate):
        return part.reduce, part.expand
    if isinstance(part, nn.Linear):
        return (part,)
    return part.layers if isinstance(part, (Ghost, Branch)) else ()


def _why_not_shape(layer: nn.Module) -> str:
    """Why the shape of a weight or bias does not match the layer's attributes; empty if it does."""
    if isinstance(layer, nn.Conv2d):
        want = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    elif isinstance(layer, nn.Linear):
        want = (layer.out_features, layer.in_features)
    else:
        return ""
    bias = layer.bias
    if layer.weight.shape == want and (bias is None or bias.shape == want[:1]):
        return ""
    return f"a {type(layer).__name__} has a weight or bias of another shape than it says"


def _conv_of(part: Any) -> nn.Conv2d | None:
    if isinstance(part, Ghost):
        return part.first
    return part.conv if isinstance(part, Branch) else None


def _first_conv(steps: tuple[Step, ...], parts: tuple[Any, ...]) -> nn.Conv2d:
    """A convolution that takes the module's input. Raises ``Refusal`` if there is none."""
    for step, part in zip(steps, parts, strict=True):
        conv = _conv_of(part)
        if conv is not None and step.values[0] == 0:
            return conv
    raise Refusal("its input goes to no convolution")


def _pack(part: Any, backend: str) -> Any:
    """The packed form of a part; activations are returned unchanged."""
    if isinstance(part, Ghost):
        return PackedGhost(part, backend)
    if isinstance(part, Branch):
        return PackedDepthwise(part)
    if isinstance(part, Gate):
        return PackedGate(part)
    if isinstance(part, nn.Linear):
        conv = nn.Conv2d(part.in_features, part.out_features, 1, device="meta")
        bias = None if part.bias is None else part.bias.detach()
        parameters: dict = conv._parameters
        parameters.update(weight=part.weight.detach()[:, :, None, None], bias=bias)
        return packed_conv(Branch(conv, None, *NO_ACT, None, (0, 0), ()), backend)
    return part


def _word(step: Step, part: Any) -> str:
    if isinstance(part, nn.Linear):
        return "linear"
    if isinstance(part, Ghost):
        return "conv" if part.cheap is None else "ghost"
    return {"excite": "squeeze-excite", "flatten": ""}.get(step.op, step.op)


class ExpressionForm(NamedTuple):
    """The steps of a forward, with the paths of their layers."""

    steps: tuple[Step, ...]

    def bind(self, module: nn.Module) -> Expression:
        """The parts in a module, as ``state.Form.bind``."""
        parts = tuple(_bind(step, module) for step in self.steps)
        first = _first_conv(self.steps, parts)
        shapes = [Shape(first.in_channels, (None, 1, 1))]
        for step, part in zip(self.steps, parts, strict=True):
            shapes.append(_shape(step, part, [shapes[value] for value in step.values]))
        return Expression(self.steps, parts, shapes[-1])

    def shape(self, module: nn.Module) -> None:
        """None: compiled graphs have no operator for an expression."""
        return None


def _bind(step: Step, module: nn.Module) -> Any:
    """The part of a step in a module. Raises ``Refusal`` if there is no kernel for it."""
    op, _, form = step
    if op == "depthwise":
        return bind_depthwise(form, module)
    if op == "excite":
        return form.bind(module)
    if isinstance(form, GhostForm):
        ghost = form.bind(module)
        known = ghost.is_conv() or ghost.has_plain_primary()
        known = known and ghost.dw_size <= LARGEST_DW_SIZE
        if not known or ghost.gate is not None or (ghost.tail and ghost.foldable_tail is None):
            raise Refusal(f"there is no kernel for {'.'.join(form.primary.conv)}")
        return ghost
    return layer_at(module, form, nn.Linear) if op == "ghost" else form


def _shape(step: Step, part: Any, given: list[Shape]) -> Shape:
    """The shape of a step's result. Raises ``Refusal`` if the step has no kernel for ``given``."""
    x, *others = given
    if x.pixels is None and (isinstance(part, Gate) or getattr(part, "dw_size", 1) > 1):
        raise Refusal("a gate or a Ghost module follows a pooling")
    if isinstance(part, Ghost):
        out = x.behind(part.first, part.primary.padding, part.settings.out_channels)
        return _same(out, others)
    if isinstance(part, Branch):
        return x.behind(part.conv, part.padding, part.conv.out_channels)
    if isinstance(part, Gate):
        return x.behind(part.reduce, (0, 0), x.channels)
    if isinstance(part, nn.Linear):
        if not x.flat or x.channels != part.in_features:
            raise Refusal("a linear layer gets something other than pooled channels")
        return _same(x._replace(channels=part.out_features), others)
    if step.op == "concat":
        _same(x, [other._replace(channels=x.channels) for other in others])
        return x._replace(channels=sum(shape.channels for shape in given))
    if step.op in ("mean", "flatten"):
        if (x.pixels is None) != (step.op == "flatten"):
            raise Refusal("it pools twice, or flattens what is not pooled")
        return Shape(x.channels, None, flat=step.op == "flatten")
    return _same(x, others)


def _same(shape: Shape, others: list[Shape]) -> Shape:
    """``shape``. Raises ``Refusal`` if one of the others may differ from it."""
    if any(other != shape for other in others):
        raise Refusal("it joins tensors whose shapes may differ")
    return shape


def match_expression(reading: Reading) -> ExpressionForm:
    """The steps of a reading's forward.

    Raises:
        Refusal: there is no kernel for one of its operations.
    """
    return ExpressionForm(_Matcher(reading).steps())


class _Matcher:
    """Turns the nodes of a reading into steps."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.layers = {one.path: dict(one.own) for one in reading.record.modules}
        self.uses: Counter[Node] = Counter()  # uses of each node as an input
        seen, todo = {reading.out}, [reading.out]
        while todo:
            for node in todo.pop().inputs:
                self.uses[node] += 1
                if node not in seen:
                    seen.add(node)
                    todo.append(node)

    def steps(self) -> tuple[Step, ...]:
        """All steps, each after the steps whose results it takes."""
        steps: list[Step] = []
        numbers: dict[Node, int] = {}
        found: dict[Node, tuple[str, tuple[Node, ...], Any]] = {}
        todo = [self.reading.out]
        while todo:
            node = todo[-1]
            if node in numbers:
                todo.pop()
            elif node.op == "input":
                numbers[node] = 0
            else:
                op, inputs, form = found[node] = found.get(node) or self.match(node)
                missing = [x for x in reversed(inputs) if x not in numbers]
                todo += missing
                if not missing:
                    steps.append(Step(op, tuple(numbers[x] for x in inputs), form))
                    numbers[node] = len(steps)
        if not steps:
            raise Refusal("its forward gives its input")
        uses = Counter(value for step in steps for value in step.values)
        if any(s.op == "excite" and (s.values[0] == 0 or uses[s.values[0]] > 1) for s in steps):
            raise Refusal("a gate multiplies what is used elsewhere")
        return tuple(steps)

    def match(self, node: Node) -> tuple[str, tuple[Node, ...], Any]:
        """The step that computes a node: its op, the nodes of its inputs, and its form."""
        found = self.find_layers(node)
        if found is not None:
            return found
        if node.op == "add" and len(node.inputs) == 2:
            return self.match_sum(node) or ("sum", node.inputs, NO_ACT)
        if node.op == "act":
            (x,) = node.inputs
            terms = x.op == "add" and len(x.inputs) == 2 and self.uses[x] == 1
            if terms and self.match_sum(x) is None:
                return "sum", x.inputs, node.args
            return "sum", (x,), node.args
        if node.op == "cat":
            return "concat", node.inputs, None
        if node.op in ("mean", "flatten"):
            return node.op, node.inputs, None
        if node.op == "linear":
            return "ghost", node.inputs, node.args[0]
        gate = find_gate(self.reading, node)
        if gate is not None:
            return "excite", (gate[1],), gate[0]
        raise Refusal(f"its forward has {what_it_is(node)}, for which there is no kernel")

    def find_layers(self, node: Node) -> tuple[str, tuple[Node, ...], Any] | None:
        """The step of a convolution or a Ghost module; None if neither computes the node."""
        try:
            branch, x = match_any_branch(self.reading, node, "it")
        except Refusal:
            try:
                ghost, x = match_ghost(self.reading, node)
            except Refusal:
                return None
            acts = ghost.primary.act, NO_ACT[0] if ghost.cheap is None else ghost.cheap.act
            if ghost.tail and acts != (NO_ACT[0],) * 2:
                return None  # the operator's epilogue has one activation
            return "ghost", (x,), ghost
        if self.layers[branch.conv]["groups"] > 1:
            return "depthwise", (x,), branch
        return "ghost", (x,), GhostForm(branch, None, None, None, ())

    def match_sum(self, node: Node) -> tuple[str, tuple[Node, ...], Any] | None:
        """The step of a sum as a Ghost module or convolution with a residual.

        None if no term of the sum is a Ghost module or convolution that only this sum uses.
        """
        for main, short in (node.inputs, node.inputs[::-1]):
            if self.uses[main] == 1 and main is not short:
                op, inputs, form = self.find_layers(main) or ("", (), None)
                if op == "ghost":
                    return op, (*inputs, short), form
        return None


class FusedExpression(FusedInference):
    """A fused module of several operations, or a fused convolution."""

    _ghost_kind = "expression"
    _ghost_device = "cpu"

    @classmethod
    def _ghost_match(cls, reading: Reading) -> ExpressionForm:
        return match_expression(reading)

    def _ghost_eager(self, x: Tensor) -> Tensor | str:
        if self.training or torch.is_grad_enabled():
            parts = self._ghost_state().parts
            if isinstance(parts, Expression) and parts.can_run_tail_ops(x):
                return parts.run_tail_ops(x)
            return ""
        return super()._ghost_eager(x)
