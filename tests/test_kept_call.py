"""Promise: a kept call runs its operator only where all is as it was, in C as in Python."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import ghost_ops
from ghost_ops import kept_call, watch
from ghost_ops.backends import native

KINDS = ["python", pytest.param("native", marks=pytest.mark.skipif(
    not native.load(), reason=f"no compiled library: {native.reason()}"))]  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    """The class of a kept call and of the watch that belongs to it."""
    if request.param == "python":
        return kept_call.PythonKeptCall, watch.PythonWatch
    return native.library().KeptCall, native.library().Watch


def no() -> bool:
    return False


def call_of(kind: Any, settings: dict | None = None, **changes: Any) -> Any:
    settings = {} if settings is None else settings
    arguments: dict[str, Any] = {
        "watch": kind[1]((settings,), (), (), ()),
        "questions": ((no, ()),),
        "tensor_type": Tensor,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "channels_last": torch.channels_last,
        "channels": 3,
        "out_channels": 8,
        "operator": lambda x, *rest: (x, *rest),
        "arguments": (1, "two"),
    }
    return kind[0](**{**arguments, **changes})


X = torch.ones(2, 3, 4, 5)


def test_make_prefers_the_compiled_one() -> None:
    expected = native.library().KeptCall if native.load() else kept_call.PythonKeptCall
    given = {"questions": (), "tensor_type": Tensor, "dtype": X.dtype, "device": X.device,
             "channels_last": torch.channels_last, "channels": 3, "out_channels": 8,
             "operator": no, "arguments": ()}  # fmt: skip
    assert type(kept_call.make(watch=watch.make(), **given)) is expected


@pytest.mark.parametrize("x", [X, X.to(memory_format=torch.channels_last)], ids=["nchw", "nhwc"])
def test_runs_with_the_kept_arguments(kind: Any, x: Tensor) -> None:
    result = call_of(kind).run(x, 8)
    assert result[0] is x
    assert result[1:] == (1, "two")


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "x",
    [
        X.double(), X[0], X[..., None], X[:, :2], X[:0], X[:, :, :0], X[..., ::2],
        X.transpose(2, 3), X.to("meta"), X.as_subclass(Subclass), nn.Parameter(X), None, 3,
    ],
    ids=[
        "dtype", "3-D", "5-D", "channels", "no images", "no rows", "strided", "transposed",
        "device", "subclass", "parameter", "None", "number",
    ],
)  # fmt: skip
def test_another_input_takes_the_long_way(kind: Any, x: Any) -> None:
    assert call_of(kind).run(x, 8) is None


@pytest.mark.parametrize("out_channels", [7, 8.0, None, 2**70, True])
def test_another_out_channels_takes_the_long_way(kind: Any, out_channels: Any) -> None:
    assert call_of(kind).run(X, out_channels) is None


def test_a_change_takes_the_long_way(kind: Any) -> None:
    settings = {"stride": 1}
    call = call_of(kind, settings)
    assert call.run(X, 8) is not None
    settings["stride"] = 2
    assert call.run(X, 8) is None


def test_every_question_is_asked_with_its_arguments(kind: Any) -> None:
    answers = {"first": False, "second": False}
    call = call_of(kind, questions=tuple((answers.__getitem__, (name,)) for name in answers))
    assert call.run(X, 8) is not None
    for name in answers:
        answers[name] = True
        assert call.run(X, 8) is None
        answers[name] = False
    assert call.run(X, 8) is not None


def test_an_error_of_the_operator_is_not_hidden(kind: Any) -> None:
    def fails(x: Tensor) -> Tensor:
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        call_of(kind, operator=fails, arguments=()).run(X, 8)


def test_a_question_without_an_answer_takes_the_long_way() -> None:
    if not native.load():
        pytest.skip(native.reason())
    compiled = native.library().KeptCall, native.library().Watch
    assert call_of(compiled, questions=(({}.__getitem__, ("absent",)),)).run(X, 8) is None
    assert torch.ones(1).item() == 1  # and no exception is left behind


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"watch": object()}, TypeError),
        ({"questions": (no,)}, TypeError),
        ({"questions": [(no, ())]}, TypeError),
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
        call_of((native.library().KeptCall, native.library().Watch), **changes)
    with pytest.raises(TypeError):
        call_of((native.library().KeptCall, native.library().Watch)).run(X)


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
    assert holder["call"].run(X, 8) is X


# What a module in eval mode takes the short way for, and what it does not.


@pytest.fixture
def module() -> Iterator[ghost_ops.FusedGhostModule]:
    torch.manual_seed(0)
    module = ghost_ops.FusedGhostModule(3, 8).eval()
    with torch.no_grad():
        module(X)
    yield module


def test_modes_of_torch_are_noticed(module: ghost_ops.FusedGhostModule) -> None:
    kept = module._packed
    assert kept is not None
    with torch.no_grad():
        assert kept.run(X, 8) is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert kept.run(X, 8) is None
        with forward_ad.dual_level():
            assert kept.run(X, 8) is None
        seen = []
        torch.func.vmap(lambda scale: seen.append(kept.run(X, 8)) or scale)(torch.ones(2))
        assert seen == [None]
        with ghost_ops.use_backend("eager"):
            assert kept.run(X, 8) is None
        assert kept.run(X, 8) is not None
    assert kept.run(X, 8) is None  # gradients are recorded


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_device_and_primary_is_called_again(
    kind: Any, device: str, kernel_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call is the one that the kept call answers, or leaves to the long way."""
    monkeypatch.setattr(kept_call, "make", kind[0])
    monkeypatch.setattr(watch, "make", lambda *given: kind[1](*given, *((),) * (4 - len(given))))
    torch.manual_seed(0)
    module = ghost_ops.FusedGhostModule(3, 8, kernel_size, device=device).eval()
    with torch.no_grad():
        first, again = (module(X.to(device)) for _ in range(2))
        assert module._packed is not None
        assert type(module._packed.run.__self__) is kind[0]
        answer = module._packed.run(X.to(device), 8)
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
