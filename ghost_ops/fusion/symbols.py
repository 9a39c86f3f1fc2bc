"""``Symbol``: a tensor without data. An operation on a symbol returns the symbol of a ``Node``.

A forward is read by calling it with a symbol. The operations of Ghost networks are supported. Every
other operation raises ``Refusal``, and so does control flow that depends on a symbol's values or
sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations
from .guards import Refusal


@dataclass(eq=False, frozen=True)
class Node:
    """One operation of an expression, with the nodes of its inputs.

    ====================  =======================================================================
    op                    args
    ====================  =======================================================================
    input                 none; the input of the forward
    tensor                path of a module, name of its parameter, buffer or tensor attribute
    conv, bn, prelu,      path of the layer
    linear
    frozen_bn             path of the batch norm, eps; F.batch_norm with its running statistics
    act                   code and slope, as in ``activations``
    sigmoid, hardsigmoid  none
    add, mul, div         one input: the number; two inputs: "in place", or none
    clamp6                none; clamp to [0, 6], whose gradient at 0 and 6 differs from ReLU6's
    cat                   none; along channels
    slice                 n: the first n channels
    mean                  none; over height and width, which become 1
    halve                 none; average pooling with kernel 2 and stride 2
    grow                  none; nearest interpolation of the first input to the size of the second
    flatten               none; all dimensions but the first
    dropout               the share of values that are dropped
    module                path of a module that is called as a whole, and the reason, in words
    ====================  =======================================================================
    """

    op: str
    inputs: tuple[Node, ...] = ()
    args: tuple[Any, ...] = ()


def refuse(what: str) -> NoReturn:
    """Raise a ``Refusal``; ``what`` is a verb phrase about the forward."""
    raise Refusal(f"its forward {what}, which cannot be followed")


class _Unknown:
    """A value that is unknown while a forward is read; every operator on it raises ``Refusal``."""

    _what = "looks at values of its input"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        refuse(self._what)


for _name in (
    "bool len iter contains eq ne lt le gt ge int index float complex abs neg pos invert getitem "
    "setitem add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv "
    "rfloordiv mod rmod divmod pow rpow matmul rmatmul and or xor round trunc floor ceil "
    "hash format str repr"
).split():
    setattr(_Unknown, f"__{_name}__", _Unknown._refuse)


class Size(_Unknown):
    """The unknown size of a symbol along a dimension."""

    _what = "computes with sizes of its input"

    def __init__(self, node: Node, dim: int) -> None:
        self.node, self.dim = node, dim


class Symbol(_Unknown):
    """Stands for a tensor [N, C, H, W] in a forward that is being read.

    Attributes:
        node: the operation that computes the present value; an in-place operation replaces the
            node.
    """

    def __init__(self, node: Node, outside: bool = False, same: Symbol | None = None) -> None:
        self.node = node
        self._outside = outside  # the memory is also visible outside of the forward
        self._lost = ""  # why the value is no longer known
        # All symbols of the same memory.
        self._memory: list[Symbol] = [] if same is None else same._memory
        self._memory.append(self)

    __hash__, __repr__ = object.__hash__, object.__repr__

    # For isinstance(symbol, Tensor).
    __class__ = property(lambda self: Tensor)

    @classmethod
    def __torch_function__(
        cls, function: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        known = any(getattr(place, name, None) is function for place in _PLACES)
        if name not in _FUNCTIONS or not known:
            refuse(f"calls {name}")
        return _bind(name, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name == "ndim":
            return 4
        if name == "shape":
            return self.size()
        if name in _METHODS:
            return functools.partial(_bind_method, name, self)
        refuse(f"takes {name} of a tensor")

    def size(self, dim: int | None = None) -> Any:
        sizes = tuple(Size(self.value(), i) for i in range(4))
        return sizes if dim is None else sizes[dim]

    def dim(self) -> int:
        return 4

    def value(self) -> Node:
        """The node, for use as an operand. Raises ``Refusal`` if the value is no longer known."""
        if self._lost:
            raise Refusal(self._lost)
        return self.node

    def lose(self, reason: str) -> None:
        """Make every later use of this memory raise ``Refusal``."""
        for other in self._memory:
            other._lost = reason

    def alias(self, node: Node) -> Symbol:
        """A symbol that shares this symbol's memory."""
        return Symbol(node, same=self)

    def become(self, node: Node, inplace: bool) -> Symbol:
        """The result ``node`` of an operation on this symbol: the symbol itself if in place."""
        if not inplace:
            return Symbol(node)
        for other in self._memory:
            if other._outside:
                refuse("changes its input in place")
            if other is not self:
                other._lost = "its forward uses a tensor that was changed in place through another"
        self.node = node
        return self

    def __getitem__(self, index: Any) -> Symbol:
        index = index if isinstance(index, tuple) else (index,)
        index = tuple(i for i in index if i is not Ellipsis)
        if any(not isinstance(i, slice) or i.step not in (None, 1) for i in index):
            refuse("takes a part of a tensor other than its first channels")
        ends = [(i.start or 0, i.stop) for i in index]
        whole = [end for i, end in enumerate(ends) if i != 1]
        stop = ends[1][1] if len(ends) > 1 else None
        start = ends[1][0] if len(ends) > 1 else 0
        if any(end != (0, None) for end in whole) or type(start) is not int or start != 0:
            refuse("takes a part of a tensor other than its first channels")
        if stop is None:
            return self.alias(self.value())
        if type(stop) is not int or stop < 0:
            refuse(f"takes the first {stop} channels")
        return self.alias(Node("slice", (self.value(),), (stop,)))

    def __add__(self, other: Any) -> Symbol:
        return _binary("add", self, other)

    def __iadd__(self, other: Any) -> Symbol:
        return _binary("add", self, other, True)

    def __mul__(self, other: Any) -> Symbol:
        return _binary("mul", self, other)

    def __imul__(self, other: Any) -> Symbol:
        return _binary("mul", self, other, True)

    def __truediv__(self, other: Any) -> Symbol:
        return _binary("div", self, other)

    def __itruediv__(self, other: Any) -> Symbol:
        return _binary("div", self, other, True)

    __radd__, __rmul__ = __add__, __mul__


def _is_symbol(value: Any) -> bool:
    return type(value) is Symbol


def _binary(op: str, a: Any, b: Any, inplace: bool = False) -> Symbol:
    if not _is_symbol(a):
        a, b = b, a
        if op == "div" or not _is_symbol(a):
            refuse(f"computes {op} with something other than its tensors")
    if _is_symbol(b):
        return a.become(Node(op, (a.value(), b.value()), ("in place",) if inplace else ()), inplace)
    if type(b) not in (int, float) or not math.isfinite(b):
        refuse(f"computes {op} with {type(b).__name__}")
    if b == 1 and op != "add":
        return a if inplace else Symbol(a.value())
    return a.become(Node(op, (a.value(),), (b,)), inplace)


def _act(x: Symbol, code: int, inplace: bool, slope: float = activations.DEFAULT_SLOPE) -> Symbol:
    return x.become(Node("act", (x.value(),), (code, float(slope))), inplace)


def _clamp(x: Symbol, low: Any, high: Any, inplace: bool) -> Symbol:
    if (low, high) != (0, 6):
        refuse(f"clamps to [{low}, {high}]")
    return x.become(Node("clamp6", (x.value(),)), inplace)


def _hardtanh(
    x: Symbol, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Symbol:
    if (min_val, max_val) != (0, 6):
        refuse(f"clamps to [{min_val}, {max_val}]")
    return _act(x, activations.RELU6, inplace)


def _mean(x: Symbol, dim: Any, keepdim: bool) -> Symbol:
    if not isinstance(dim, (tuple, list)) or {d % 4 for d in dim} != {2, 3}:
        refuse("takes a mean other than over height and width")
    mean = Node("mean", (x.value(),))
    return Symbol(mean if keepdim else Node("flatten", (mean,)))


def _adaptive_avg_pool2d(x: Symbol, output_size: Any) -> Symbol:
    if output_size not in (1, (1, 1), [1, 1]):
        refuse(f"pools to {output_size}")
    return Symbol(Node("mean", (x.value(),)))


def _avg_pool2d(
    x: Symbol,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> Symbol:
    two = (2, (2, 2), [2, 2])
    stride = kernel_size if stride is None else stride
    if kernel_size not in two or stride not in two or padding not in (0, (0, 0)):
        refuse(f"pools with kernel {kernel_size} and stride {stride}")
    if ceil_mode or divisor_override is not None:
        refuse("pools with ceil_mode or a divisor of its own")
    return Symbol(Node("halve", (x.value(),)))


def _interpolate(
    x: Symbol,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: Any = None,
    recompute_scale_factor: Any = None,
    antialias: bool = False,
) -> Symbol:
    sizes = size if isinstance(size, (tuple, list)) else ()
    like = [s.node for s in sizes if type(s) is Size]
    dims = [s.dim for s in sizes if type(s) is Size]
    if mode != "nearest" or scale_factor is not None or antialias or dims != [2, 3]:
        refuse("interpolates other than to the nearest values at the size of a tensor")
    if like[0] is not like[1]:
        refuse("interpolates to the sizes of two tensors")
    return Symbol(Node("grow", (x.value(), like[0])))


def _flatten(x: Symbol, start_dim: int = 0, end_dim: int = -1) -> Symbol:
    if start_dim != 1 or end_dim not in (-1, 3):
        refuse("flattens other than all but the first dimension")
    return x.alias(Node("flatten", (x.value(),)))


def _reshape(x: Symbol, *shape: Any) -> Symbol:
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    first = shape[0] if shape else None
    if len(shape) != 2 or type(first) is not Size or first.dim != 0 or shape[1] != -1:
        refuse("reshapes other than to [N, -1]")
    return x.alias(Node("flatten", (x.value(),)))


def _cat(tensors: Any, dim: int = 0) -> Symbol:
    if dim not in (1, -3) or not all(map(_is_symbol, tensors)):
        refuse("concatenates other than its tensors along channels")
    return Symbol(Node("cat", tuple(t.value() for t in tensors)))


def _dropout(x: Symbol, p: float = 0.5, training: bool = True, inplace: bool = False) -> Symbol:
    if training and p != 0:
        if inplace or not isinstance(p, (int, float)):
            refuse("drops values at random")
        return Symbol(Node("dropout", (x.value(),), (float(p),)))
    return x if inplace else x.alias(x.value())


def _batch_norm(
    x: Symbol,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Symbol:
    tensors = (running_mean, running_var, weight, bias)
    nodes = [t.value() for t in tensors if _is_symbol(t)]
    paths = {n.args[0] for n in nodes if n.op == "tensor"}
    names = tuple(n.args[1] for n in nodes if n.op == "tensor")
    if training or len(paths) != 1 or names != ("running_mean", "running_var", "weight", "bias"):
        refuse("normalises other than by one batch norm's running statistics")
    return Symbol(Node("frozen_bn", (x.value(),), (*paths, float(eps))))


def _linear(x: Symbol, weight: Any, bias: Any = None) -> Symbol:
    nodes = [t.value() for t in (weight, bias) if _is_symbol(t)]
    if not nodes or any(n.op != "tensor" for n in nodes) or len({n.args[0] for n in nodes}) != 1:
        refuse("multiplies by something other than one layer's weight")
    return Symbol(Node("linear", (x.value(),), (nodes[0].args[0],)))


def _relu(x: Symbol, inplace: bool = False) -> Symbol:
    return _act(x, activations.RELU, inplace)


def _gelu(x: Symbol, approximate: str = "none") -> Symbol:
    tanh = approximate == "tanh"
    return _act(x, activations.GELU_TANH if tanh else activations.GELU, False)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "relu": _relu,
    "relu_": lambda x: _relu(x, True),
    "relu6": lambda x, inplace=False: _act(x, activations.RELU6, inplace),
    "hardtanh": _hardtanh,
    "clamp": lambda x, min=None, max=None: _clamp(x, min, max, False),
    "clamp_": lambda x, min=None, max=None: _clamp(x, min, max, True),
    "leaky_relu": lambda x, negative_slope=0.01, inplace=False: _act(
        x, activations.LEAKY_RELU, inplace, negative_slope
    ),
    "silu": lambda x, inplace=False: _act(x, activations.SILU, inplace),
    "hardswish": lambda x, inplace=False: _act(x, activations.HARDSWISH, inplace),
    "gelu": _gelu,
    "sigmoid": lambda x: Symbol(Node("sigmoid", (x.value(),))),
    "sigmoid_": lambda x: x.become(Node("sigmoid", (x.value(),)), True),
    "hardsigmoid": lambda x, inplace=False: x.become(Node("hardsigmoid", (x.value(),)), inplace),
    "add": lambda x, other: _binary("add", x, other),
    "add_": lambda x, other: _binary("add", x, other, True),
    "mul": lambda x, other: _binary("mul", x, other),
    "mul_": lambda x, other: _binary("mul", x, other, True),
    "div": lambda x, other: _binary("div", x, other),
    "div_": lambda x, other: _binary("div", x, other, True),
    "mean": lambda x, dim=None, keepdim=False: _mean(x, dim, keepdim),
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "avg_pool2d": _avg_pool2d,
    "interpolate": _interpolate,
    "flatten": _flatten,
    "view": _reshape,
    "reshape": _reshape,
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "dropout": _dropout,
    "dropout2d": _dropout,
    "batch_norm": _batch_norm,
    "linear": _linear,
}
_PLACES = (torch, F, torch._C._nn, Tensor)
_METHODS = frozenset(
    "relu relu_ clamp clamp_ sigmoid sigmoid_ add add_ mul mul_ div div_ mean flatten view "
    "reshape".split()
)


def _bind(name: str, args: tuple, kwargs: dict) -> Any:
    for first in ("input", "tensors"):  # PyTorch's names for the first argument
        if first in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop(first), *args)
    if "axis" in kwargs:
        kwargs = {"dim" if key == "axis" else key: value for key, value in kwargs.items()}
    try:
        return _FUNCTIONS[name](*args, **kwargs)
    except (TypeError, AttributeError):
        refuse(f"calls {name} with arguments that are not known")


def _bind_method(name: str, x: Symbol, *args: Any, **kwargs: Any) -> Any:
    return _bind(name, (x, *args), kwargs)
