"""``graphed``: a model's inference as CUDA graphs, one for each shape of the input.

A fused network is a sequence of short kernels. The host needs more time to launch a kernel than the
device needs to run it. A CUDA graph replays all kernels with one launch. The graph contains the
addresses and numbers of the captured call. Therefore it is replayed only if the model is unchanged
since the capture (``_ModelWatch``), and all memory that its kernels read is kept alive
(``_Reads``).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .. import arguments
from ..announce import announce
from ..conventions import dense
from ..modes import in_transform
from ..ops.ghost import allow_tf32
from ..sync import NORMS
from . import watch
from .guards import GLOBAL_HOOKS, REQUESTED_BACKEND, STATE, hooks_of

# After this number of graphs in a row that became invalid before a second call, a model is not
# captured again.
_MOST_UNUSED = 3
_WEIGHTED = (nn.Conv2d, *NORMS, nn.PReLU)
_CONSTANTS = (type(None), bool, int, float, complex, str)


class _NoGraph(Exception):
    """The model cannot be captured; the message says why."""


def _announce(module: nn.Module, reason: str) -> None:
    announce(f"{type(module).__name__} runs without a CUDA graph: {reason}.")


class _Device:
    """All uses of torch.cuda: captures on a side stream, and the order of replays.

    The graphs of a model share one memory pool. This is safe because replays are never concurrent
    and the outputs of each are copied before the next one starts (``in_order``).
    """

    type = "cuda"
    _capturing = threading.Lock()  # PyTorch allows one capture at a time in a process

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side, self.done = torch.cuda.Stream(device), torch.cuda.Event()

    @staticmethod
    def is_capturing() -> bool:
        """Whether the caller is capturing another graph."""
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run the block on the side stream, in order with the work of the current stream."""
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        try:
            with torch.cuda.stream(self.side):
                yield
        finally:
            current.wait_stream(self.side)

    def capture(self, model: nn.Module, x: Tensor, pool_of: Any) -> tuple[Any, Any]:
        """A graph of model(x), and the output in its memory.

        Args:
            pool_of: a graph whose memory pool is used, or None for a new pool.
        """
        graph = torch.cuda.CUDAGraph()
        pool = None if pool_of is None else pool_of.pool()
        # After a failed capture torch.cuda.graph leaves the side stream current; the outer context
        # restores the stream of the caller. thread_local: other threads may allocate device memory
        # during the capture.
        inner = torch.cuda.graph(graph, pool, self.side, capture_error_mode="thread_local")
        with self._capturing, torch.cuda.stream(self.side), inner:
            out = model(x)
        return graph, out

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Run the block on the current stream, after all earlier blocks of ``in_order``."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.done)
        try:
            yield
        finally:
            self.done.record(stream)

    def finish(self) -> None:
        """Wait for the last replay, so that its memory can be freed."""
        self.done.synchronize()


class _ModelWatch:
    """Watches everything that a captured call depends on: tensors, children, hooks, attributes."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        tensors = tuple(t for m in modules for t in (*m.parameters(False), *m.buffers(False)))
        # Keeps the memory alive, so that no other tensor can come to a watched address.
        self._alive = [t.detach() for t in tensors]
        dicts: list[dict] = []
        for m in modules:
            dicts += [m._modules, m._parameters, m._buffers, *hooks_of(m)]
        self._watch = watch.make_watch((*dicts, *GLOBAL_HOOKS), (REQUESTED_BACKEND,), (), tensors)
        self._modules, self._attributes = modules, watch.make_watch()

    def add_attributes(self) -> None:
        """Watch attributes and fusion states too. Called after the model has packed its weights.

        ``eval()`` and ``reset_cache()``, which are called after a write to ``parameter.data``, drop
        the packed weights. This changes a watched state, and so invalidates the graph.
        """
        states = (vars(module).get(STATE) for module in self._modules)
        kept = (vars(state) for state in states if state is not None)
        self._attributes = watch.make_watch((*map(vars, self._modules), *kept))

    def unchanged(self) -> bool:
        """Whether no watched object has changed since the capture."""
        return self._attributes.unchanged() and self._watch.unchanged()


class _Reads(TorchDispatchMode):
    """Keeps alive the memory that captured operators read and that no captured operator made.

    Examples: packed weights; a table that the forward caches for one shape and later drops.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}
        self._made: set[int] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: code compiled by torch.compile keeps running compiled under this mode."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = _storages((args, kwargs)).items()
        self.storages.update((a, storage) for a, storage in read if a not in self._made)
        out = func(*args, **kwargs)
        self._made.update(a for a in _storages(out) if a not in self.storages)
        return out


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """The storages of all strided tensors in a pytree, by address."""
    tensors = (t for t in tree_leaves(tree) if isinstance(t, Tensor))
    storages = [t.untyped_storage() for t in tensors if t.layout is torch.strided]
    return {storage.data_ptr(): storage for storage in storages}


class _Graph:
    """The captured call of a model for one form of input.

    Attributes:
        watch: the watch over the model.
        uses: the number of calls after the one that captured.
        failed: why the capture failed; empty if it succeeded.
        graph: the CUDA graph; None if the capture failed.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, device: _Device, warm_ups: int, pool_of: Any
    ) -> None:
        self.watch = _ModelWatch(tuple(model.modules()))
        self.uses, self.failed, self.graph = 0, "", None
        self._device, kind = device, x.device.type
        # Outside of inference mode, because ``replay`` writes the tensor outside of it.
        with torch.inference_mode(False), torch.no_grad(), device.aside():
            self._x = (dense(x) if x.dim() == 4 else x).clone()
        version = self._x._version
        # No autocast cache: a cast during a capture computes nothing until a replay, so a cached
        # cast would have no values.
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.no_grad(), torch.autocast(kind, dtype, enabled, cache_enabled=False):
            with device.aside():
                for i in range(warm_ups):
                    model(self._x)
                    if i == 0:
                        self.watch.add_attributes()
            try:
                with _Reads() as self._reads:
                    self.graph, out = device.capture(model, self._x, pool_of)
                self._leaves, self._spec = tree_flatten(out)
                if self._x._version != version:
                    raise _NoGraph("its forward writes its input")
                for t in self._leaves:
                    if isinstance(t, Tensor) and t.device != x.device:
                        raise _NoGraph(f"its output has a tensor on {t.device}")
                    if not isinstance(t, (Tensor, *_CONSTANTS)):
                        raise _NoGraph(f"its output has a {type(t).__name__}")
            except Exception as error:
                reason = str(error).partition("\n")[0]
                self.failed = reason if isinstance(error, _NoGraph) else f"capture failed: {reason}"
                self.graph = self._leaves = self._reads = self._x = None

    def replay(self, x: Tensor) -> Any:
        """A copy of the output for x, whose shape, strides and dtype must be the captured ones."""
        with torch.no_grad(), self._device.in_order():
            self._x.copy_(x)
            self.graph.replay()
            copies = [t.clone() if isinstance(t, Tensor) else t for t in self._leaves]
        return tree_unflatten(copies, self._spec)


def _check(modules: tuple[nn.Module, ...]) -> None:
    """Raise ``_NoGraph`` if a graph cannot replace these modules in their present state."""
    for module in modules:
        if module.training:
            raise _NoGraph(f"a {type(module).__name__} inside it is in training mode")
        if isinstance(module, torch.jit.ScriptModule):
            raise _NoGraph("it has TorchScript inside, whose changes cannot be watched")
        if any(hooks_of(module)):
            raise _NoGraph(
                f"a {type(module).__name__} inside it has hooks, which run only if it does"
            )
        computed = isinstance(module, _WEIGHTED) and "weight" not in module._parameters
        tensors = (*module.parameters(False), *module.buffers(False))
        if computed or any(
            type(t) not in (Tensor, nn.Parameter) or t.is_inference() for t in tensors
        ):
            raise _NoGraph(
                "its parameters can change unnoticed: inference tensors or computed ones"
            )
    if any(GLOBAL_HOOKS):
        raise _NoGraph("there are hooks on all modules, which would not run for those inside")


def _key(x: Tensor) -> tuple:
    """The key of a graph: shape, strides and dtype of x, and the settings that select kernels."""
    kind, matmul = x.device.type, torch.backends.cuda.matmul
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    backends_of_torch: Any = torch.backends
    tf32 = allow_tf32(), matmul.fp32_precision, backends_of_torch.fp32_precision
    return (
        x.shape,
        x.stride(),
        x.dtype,
        autocast,
        tf32,
        torch.are_deterministic_algorithms_enabled(),
    )


class GraphedModel:
    """A model whose inference runs as CUDA graphs; ``graphed`` makes it.

    Attributes:
        module: the model.
    """

    def __init__(self, module: nn.Module, example: Tensor, max_graphs: int, warm_ups: int) -> None:
        self.module, self._origin = module, example.device
        self._device = _Device(example.device)
        self._max_graphs, self._warm_ups = max_graphs, warm_ups
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._unused, self._lock = 0, threading.Lock()
        if self._can_replay(example):
            self._graph_for(example)

    def __call__(self, x: Tensor) -> Any:
        """``module(x)``, from a graph if possible; then the outputs are copies.

        Raises:
            RuntimeError: autograd would record this call.
        """
        if torch.compiler.is_compiling() or not self._can_replay(x):
            return self.module(x)
        if torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.module.parameters())
        ):
            raise RuntimeError(
                "a graphed model computes no gradients: call it under torch.no_grad() or "
                "torch.inference_mode(), or call its .module"
            )
        with self._lock:
            graph = self._graph_for(x)
            if graph is not None:
                return graph.replay(x)
        return self.module(x)

    def _can_replay(self, x: Tensor) -> bool:
        return (
            self._unused < _MOST_UNUSED
            and not (torch.jit.is_tracing() or in_transform() or self._device.is_capturing())
            and type(x) is Tensor
            and x.device == self._origin
            and x.layout is torch.strided
            and not (x.is_nested or x.is_quantized)
            and x.numel() > 0
        )

    def _graph_for(self, x: Tensor) -> _Graph | None:
        """A valid graph for x, captured if necessary; None if the model itself must run."""
        key = _key(x)
        graph = self._graphs.get(key)
        if graph is None or not graph.watch.unchanged():
            if graph is not None:
                self._unused += graph.uses == 0
                del graph  # frees its memory for the new one
                self._drop_changed()
            return self._capture(key, x)
        graph.uses, self._unused = graph.uses + 1, 0
        self._graphs.move_to_end(key)
        return None if graph.failed else graph

    def _drop_changed(self) -> None:
        """Free the graphs that a change of the model has invalidated."""
        self._device.finish()
        for key, graph in list(self._graphs.items()):
            if self._unused >= _MOST_UNUSED or not graph.watch.unchanged():
                del self._graphs[key]

    def _capture(self, key: tuple, x: Tensor) -> _Graph | None:
        try:
            if self._unused >= _MOST_UNUSED:
                raise _NoGraph("it changes from call to call, before a graph is used again")
            _check(tuple(self.module.modules()))
        except _NoGraph as reason:
            _announce(self.module, str(reason))
            return None
        while len(self._graphs) >= self._max_graphs:
            self._device.finish()
            self._graphs.popitem(last=False)
        # A graph identifies its pool. A pool whose last graph is deleted cannot be used again.
        pool_of = next((g.graph for g in self._graphs.values() if g.graph is not None), None)
        graph = _Graph(self.module, x, self._device, self._warm_ups, pool_of)
        self._graphs[key] = graph
        if graph.failed:
            _announce(self.module, graph.failed)
        return None if graph.failed else graph

    def __del__(self) -> None:
        with suppress(Exception):  # CUDA may be gone at the interpreter's exit
            self._device.finish()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a graphed model holds CUDA graphs and cannot be copied or pickled; copy its .module "
            "and call ghost_ops.graphed again"
        )


def graphed(
    model: nn.Module, example: Tensor, *, max_graphs: int = 8, num_warmup_iters: int = 3
) -> nn.Module | GraphedModel:
    """Make a model's inference one launch per call: a CUDA graph, captured once and replayed.

    The result is called like the model, ``fast(x)``, and gives the same numbers. One graph is
    captured here, for ``example``. Every other combination of shape, strides and dtype of x and of
    the settings of autocast, TF32 and deterministic algorithms is captured at its first call.
    Outputs are copies: a later call does not overwrite them, and no output shares memory with x.

    A change of parameters and buffers (also in place), children, modes, attributes of modules or
    the requested backend invalidates the graphs, and the next call captures again. The following
    changes are not detected: an in-place write to ``parameter.data`` until ``eval()`` or
    ``train()`` is called, a change inside a list or another object that is an attribute, and a
    change of a global setting not named above.

    The model itself runs, without a graph, for an empty x, a tensor subclass, an x on another
    device, and inside torch.compile, torch.jit.trace, torch.func transforms and other captures.
    The model itself also runs, and a warning says why once, if

    - the model cannot be captured: it synchronises, computes on the CPU, writes its input, or
      returns anything other than tensors and constants;
    - a module has hooks or is in training mode;
    - the model changed three times in a row before a graph was used a second time; then it is not
      captured again.

    The Python code of the forward runs during captures only: its side effects, such as counters and
    prints, happen only then.

    Calls from several threads and streams are safe; replays run one after the other.

    Each graph occupies device memory for its input and outputs. The activations of all graphs share
    one pool, about as large as the largest graph needs.

    Args:
        model: in eval mode, with all parameters on one device.
        example: an input of the model, such as [N, 3, H, W], in the dtype and layout of later
            calls; its values do not matter.
        max_graphs: the largest number of graphs; the least recently used one is dropped.
        num_warmup_iters: calls on a side stream before each capture.

    Returns:
        The model itself if it is not on a CUDA device; else a ``GraphedModel``, whose attribute
        ``module`` is the model.

    Raises:
        TypeError: model is not a module, or example not a tensor.
        ValueError: a module of model is in training mode, parameters and example are on several
            devices, or a number is not an int of at least 1.
        Any error of ``model(example)``. In calls: any error of ``model(x)``, and RuntimeError if
        autograd would record.

    Example::

        model = ghost_ops.models.ghostnet().eval().cuda().half()
        ghost_ops.fuse(model)
        fast = ghost_ops.graphed(model, torch.zeros(1, 3, 224, 224).cuda().half())
        with torch.inference_mode():
            logits = fast(images)

    Source: PyTorch documentation, "CUDA semantics", section "CUDA Graphs", and
    ``torch.cuda.make_graphed_callables``.
    """
    arguments.module("model", model)
    if not isinstance(example, Tensor):
        raise TypeError(f"example must be a Tensor, got {type(example).__name__}")
    for name, number in (("max_graphs", max_graphs), ("num_warmup_iters", num_warmup_iters)):
        if type(number) is not int or number < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {number!r}")
    for name, module in model.named_modules():
        if module.training:
            place = f"{name!r} of model" if name else "model"
            raise ValueError(f"{place} is in training mode; call model.eval() first")
    devices = list(dict.fromkeys(p.device for p in model.parameters()))
    if len(devices) > 1:
        found = f"{devices[0]} and {devices[1]}"
        raise ValueError(f"model must be on one device, its parameters are on {found}")
    if devices and devices[0] != example.device:
        raise ValueError(f"example is on {example.device}, but model is on {devices[0]}")
    if example.device.type != _Device.type:
        return model
    return GraphedModel(model, example, max_graphs, num_warmup_iters)
