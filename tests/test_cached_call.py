"""Promise: a cached call runs its operator only if every guard holds, in C as in Python."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from watch_cases import KINDS, made, watch_class

import ghost_ops
from ghost_ops.backends import native
from ghost_ops.fusion import cached_call, watch
from ghost_ops.fusion.state import Packed, State


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    """The classes of a cached call and of its watch."""
    python = request.param == "python"
    calls = cached_call.CachedCall if python else native.library().CachedCall
    return calls, watch_class(request.param)


def no() -> bool:
    return False


def call_of(kind: Any, settings: dict | None = None, **changes: Any) -> Any:
    settings = {} if settings is None else settings
    arguments: dict[str, Any] = {
        "watch": made(kind[1], dicts=(settings,)),
        "guards": ((no, ()),),
        "tensor_type": Tensor,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "channels_last": torch.channels_last,
        "channels": 3,
        "operator": lambda x, *rest: (x, *rest),
        "arguments": (1, "two"),
    }
    return kind[0](**{**arguments, **changes})


X = torch.ones(2, 3, 4, 5)


def test_make_prefers_the_compiled_one() -> None:
    expected = native.library().CachedCall if native.load() else cached_call.CachedCall
    given = {
        "guards": (),
        "tensor_type": Tensor,
        "dtype": X.dtype,
        "device": X.device,
        "channels_last": torch.channels_last,
        "channels": 3,
        "operator": no,
        "arguments": (),
    }
    assert type(cached_call.make_cached_call(watch=watch.make_watch(), **given)) is expected


@pytest.mark.parametrize("x", [X, X.to(memory_format=torch.channels_last)], ids=["nchw", "nhwc"])
def test_runs_with_the_kept_arguments(kind: Any, x: Tensor) -> None:
    result = call_of(kind).run(x, {})
    assert result[0] is x
    assert result[1:] == (1, "two")


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "x",
    [
        X.double(),
        X[0],
        X[..., None],
        X[:, :2],
        X[:0],
        X[:, :, :0],
        X[..., ::2],
        X.transpose(2, 3),
        X.to("meta"),
        X.as_subclass(Subclass),
        nn.Parameter(X),
        None,
        3,
    ],
    ids=[
        "dtype",
        "3-D",
        "5-D",
        "channels",
        "no images",
        "no rows",
        "strided",
        "transposed",
        "device",
        "subclass",
        "parameter",
        "None",
        "number",
    ],
)
def test_another_input_takes_the_long_way(kind: Any, x: Any) -> None:
    assert call_of(kind).run(x, {}) is None


OTHER_CHANNELS = [7, 8.0, None, 2**70, True]


def call_of_own(kind: Any, own: dict, **changes: Any) -> Any:
    """A call with two guards on ``own``: one item, and the absence of ``forward``."""
    watched = made(kind[1], items=((None, "channels"),), absent=((None, "forward"),), own=own)
    return call_of(kind, watch=watched, **changes)


@pytest.mark.parametrize("channels", OTHER_CHANNELS)
def test_a_changed_item_of_own_takes_the_long_way(kind: Any, channels: Any) -> None:
    own = {"channels": 8, "other": 1}
    call = call_of_own(kind, own)
    assert call.run(X, own)[0] is X
    own["channels"] = channels
    assert call.run(X, own) is None
    own["channels"] = 8
    own["other"] = 2
    assert call.run(X, own)[0] is X
    own["forward"] = no
    assert call.run(X, own) is None
    del own["forward"], own["channels"]
    assert call.run(X, own) is None


def test_own_is_the_dictionary_of_the_call(kind: Any) -> None:
    own = {"channels": 8}
    call = call_of_own(kind, own)
    for another in ({"channels": 8}, OrderedDict(channels=8, other=1)):
        assert call.run(X, another)[0] is X
    for another in ({}, {"channels": 7}, {"channels": 8, "forward": no}):
        assert call.run(X, another) is None
    assert call.run(X, own)[1:] == (1, "two")  # own is not passed to the operator


@pytest.mark.parametrize("own", [None, 3, "own", [("channels", 8)]], ids=repr)
def test_own_that_is_no_dictionary(kind: Any, own: Any) -> None:
    called = []
    call = call_of_own(kind, {"channels": 8}, operator=lambda *given: called.append(given))
    assert call.run(X, own) is None
    assert torch.ones(1).item() == 1  # no exception is left pending
    assert not called


def test_compiled_one_takes_the_long_way_without_own() -> None:
    if not native.load():
        pytest.skip(native.reason())
    call = call_of((native.library().CachedCall, native.library().Watch))
    assert call.run(X, {}) is not None
    for own in (None, 3, "own", []):
        assert call.run(X, own) is None


def test_run_takes_two_arguments(kind: Any) -> None:
    call = call_of(kind)
    for given in ((), (X,), (X, {}, {})):
        with pytest.raises(TypeError):
            call.run(*given)


def test_own_is_not_kept(kind: Any) -> None:
    own = {"channels": 8}
    count = sys.getrefcount(own)
    call = call_of_own(kind, own)
    for channels in (8, 7) * 100:
        own["channels"] = channels
        assert (call.run(X, own) is None) is (channels == 7)
    assert sys.getrefcount(own) == count


def test_a_change_takes_the_long_way(kind: Any) -> None:
    settings = {"stride": 1}
    call = call_of(kind, settings)
    assert call.run(X, {}) is not None
    settings["stride"] = 2
    assert call.run(X, {}) is None


def test_a_changed_attribute_takes_the_long_way(kind: Any) -> None:
    class Layer:
        def method(self) -> None: ...

    layer = Layer()
    call = call_of(kind, watch=made(kind[1], attributes=((layer, "method"), (layer, "no"))))
    assert call.run(X, {}) is not None
    layer.no = None  # type: ignore[attr-defined]
    assert call.run(X, {}) is None
    del layer.no  # type: ignore[attr-defined]
    assert call.run(X, {}) is not None
    layer.__class__ = type("Layer", (Layer,), {"method": no})
    assert call.run(X, {}) is None


def test_an_attribute_that_raises_takes_the_long_way() -> None:
    if not native.load():
        pytest.skip(native.reason())

    class Layer:
        fails = False

        @property
        def stride(self) -> int:
            if self.fails:
                raise ArithmeticError("no")
            return 1

    layer, compiled = Layer(), (native.library().CachedCall, native.library().Watch)
    call = call_of(compiled, watch=made(compiled[1], attributes=((layer, "stride"),)))
    assert call.run(X, {}) is not None
    layer.fails = True
    assert call.run(X, {}) is None
    assert torch.ones(1).item() == 1  # no exception is left pending


def test_every_question_is_asked_with_its_arguments(kind: Any) -> None:
    answers = {"first": False, "second": False}
    call = call_of(kind, guards=tuple((answers.__getitem__, (name,)) for name in answers))
    assert call.run(X, {}) is not None
    for name in answers:
        answers[name] = True
        assert call.run(X, {}) is None
        answers[name] = False
    assert call.run(X, {}) is not None


def test_an_error_of_the_operator_is_not_hidden(kind: Any) -> None:
    def fails(x: Tensor) -> Tensor:
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        call_of(kind, operator=fails, arguments=()).run(X, {})


def test_a_question_without_an_answer_takes_the_long_way() -> None:
    if not native.load():
        pytest.skip(native.reason())
    compiled = native.library().CachedCall, native.library().Watch
    assert call_of(compiled, guards=(({}.__getitem__, ("absent",)),)).run(X, {}) is None
    assert torch.ones(1).item() == 1  # no exception is left pending


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"watch": object()}, TypeError),
        ({"out_channels": 8}, TypeError),
        ({"guards": (no,)}, TypeError),
        ({"guards": [(no, ())]}, TypeError),
        ({"tensor_type": 3}, TypeError),
        ({"channels": "3"}, TypeError),
        ({"arguments": (0,) * 32}, ValueError),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else given.__name__,
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception]) -> None:
    if not native.load():
        pytest.skip(native.reason())
    with pytest.raises(error):
        call_of((native.library().CachedCall, native.library().Watch), **changes)


def test_cycles_are_collected(kind: Any) -> None:
    class Owner:
        def operator(self, x: Tensor) -> Tensor:
            return x

    owner = Owner()
    owner.call = call_of(kind, operator=owner.operator, arguments=())  # type: ignore[attr-defined]
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


def test_operator_that_drops_its_own_call(kind: Any) -> None:
    holder = {}

    def operator(x: Tensor, *rest: Any) -> Tensor:
        holder.clear()
        gc.collect()
        return x

    holder["call"] = call_of(kind, operator=operator)
    assert holder["call"].run(X, {}) is X


# The cached call of a module in eval mode.


@pytest.fixture
def module() -> Iterator[ghost_ops.FusedGhostModule]:
    torch.manual_seed(0)
    module = ghost_ops.FusedGhostModule(3, 8).eval()
    with torch.no_grad():
        module(X)
    yield module


def packed_of(module: ghost_ops.FusedGhostModule) -> Packed:
    state = module.__dict__["_ghost_ops"]
    assert isinstance(state, State)
    assert state.packed is not None
    return state.packed


def test_modes_of_torch_are_noticed(module: ghost_ops.FusedGhostModule) -> None:
    kept, own = packed_of(module), module.__dict__
    with torch.no_grad():
        assert kept.run(X, own) is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert kept.run(X, own) is None
        with forward_ad.dual_level():
            assert kept.run(X, own) is None
        seen = []
        torch.func.vmap(lambda scale: seen.append(kept.run(X, own)) or scale)(torch.ones(2))
        assert seen == [None]
        with ghost_ops.use_backend("eager"):
            assert kept.run(X, own) is None
        assert kept.run(X, own) is not None
    assert kept.run(X, own) is None  # grad mode is on


@pytest.mark.parametrize("channels", OTHER_CHANNELS)
def test_own_attribute_of_a_module_is_watched(
    module: ghost_ops.FusedGhostModule, channels: Any
) -> None:
    kept, own = packed_of(module), module.__dict__
    with torch.no_grad():
        assert kept.run(X, own) is not None
        module.oup = channels
        assert kept.run(X, own) is None
        module.oup = 8
        assert kept.run(X, own) is not None


def test_dictionary_of_another_module_is_a_miss(
    module: ghost_ops.FusedGhostModule,
) -> None:
    kept = packed_of(module)
    other = ghost_ops.FusedGhostModule(3, 8).eval()
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert kept.run(X, other.__dict__) is None
        assert kept.run(X, {}) is None
        assert kept.run(X, module.__dict__) is not None


def test_module_is_freed_without_the_collector() -> None:
    """Its packed weights are part of no reference cycle with the module."""
    module = ghost_ops.FusedGhostModule(3, 8).eval()
    with torch.no_grad():
        module(X)
        assert packed_of(module).run(X, module.__dict__) is not None
    gone = weakref.ref(module), weakref.ref(module.primary_conv[0].weight)
    gc.collect()
    gc.disable()
    try:
        del module
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_device_and_primary_is_called_again(
    kind: Any, device: str, kernel_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call is a cache hit."""
    monkeypatch.setattr(cached_call, "make_cached_call", kind[0])
    rest = ((), (), (), (), (), None)
    monkeypatch.setattr(watch, "make_watch", lambda *given: kind[1](*given, *rest[len(given) :]))
    torch.manual_seed(0)
    module = ghost_ops.FusedGhostModule(3, 8, kernel_size, device=device).eval()
    with torch.no_grad():
        first, again = (module(X.to(device)) for _ in range(2))
        cached = packed_of(module)
        assert type(cached.run.__self__) is kind[0]  # type: ignore[attr-defined]
        assert type(cached.watch) is kind[1]
        answer = cached.run(X.to(device), module.__dict__)
        assert packed_of(module) is cached
        assert answer is not None
    assert first.shape == again.shape == answer.shape == (2, 8, 4, 5)
    if device == "cpu":
        assert first.equal(again) and first.equal(answer)


def test_dispatch_modes_see_the_operator(module: ghost_ops.FusedGhostModule) -> None:
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Names():
        module(X)
    if native.load():
        assert names == ["ghost_ops.ghost_apply.default"]
