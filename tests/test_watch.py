"""Promise: a watch tells every change of what it watches, in C as in Python."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from ghost_ops import watch
from ghost_ops.backends import native

KINDS = ["python", pytest.param("native", marks=pytest.mark.skipif(
    not native.load(), reason=f"no compiled library: {native.reason()}"))]  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return watch.PythonWatch if request.param == "python" else native.library().Watch


def test_make_prefers_the_compiled_one() -> None:
    expected = native.library().Watch if native.load() else watch.PythonWatch
    assert type(watch.make()) is expected
    assert watch.make().unchanged()


@pytest.mark.parametrize("mapping_type", [dict, OrderedDict])
def test_dictionaries(kind: Any, mapping_type: type) -> None:
    first, second = object(), object()
    mapping = mapping_type(a=first, b=second)
    watched = kind((mapping,), (), (), ())
    assert watched.unchanged()
    mapping["b"] = object()
    assert not watched.unchanged()
    mapping["b"] = second
    assert watched.unchanged()
    mapping["c"] = None
    assert not watched.unchanged()
    del mapping["c"], mapping["a"]
    assert not watched.unchanged()
    mapping.clear()
    assert not watched.unchanged()


def test_empty_dictionary(kind: Any) -> None:
    mapping: dict = {}
    watched = kind((mapping,), (), (), ())
    assert watched.unchanged()
    mapping[0] = None
    assert not watched.unchanged()


def test_items_may_be_replaced_by_equal_ones(kind: Any) -> None:
    mapping = {"stride": (1, 1000), "eps": 1e-5, "other": 1}
    watched = kind((), ((mapping, "stride"), (mapping, "eps")), (), ())
    mapping["stride"] = (*range(1, 1001, 999),)
    mapping["eps"] = float("1e-5")
    mapping["other"] = 2
    assert watched.unchanged()
    mapping["eps"] = 1e-3
    assert not watched.unchanged()
    mapping["eps"] = 1e-5
    assert watched.unchanged()
    del mapping["stride"]
    assert not watched.unchanged()


def test_value_that_cannot_be_compared_counts_as_changed() -> None:
    if not native.load():
        pytest.skip(native.reason())
    mapping: dict = {"a": torch.ones(2)}
    watched = native.library().Watch((), ((mapping, "a"),), (), ())
    mapping["a"] = torch.ones(2)
    assert not watched.unchanged()
    assert torch.ones(1).item() == 1  # and no exception is left behind


def test_absent_keys(kind: Any) -> None:
    mapping: dict = {}
    watched = kind((), (), ((mapping, "forward"),), ())
    assert watched.unchanged()
    mapping["forward"] = None
    assert not watched.unchanged()
    del mapping["forward"]
    assert watched.unchanged()


def _in_place(t: torch.Tensor) -> None:
    with torch.no_grad():
        t.add_(1)


def _swap_data(t: torch.Tensor) -> None:
    t.data = torch.zeros(3)


def _resize(t: torch.Tensor) -> None:
    t.data.resize_(1000)


@pytest.mark.parametrize("change", [_in_place, _swap_data, _resize])
@pytest.mark.parametrize("make", [torch.zeros, lambda n: nn.Parameter(torch.zeros(n))])
def test_tensors(kind: Any, change: Any, make: Any) -> None:
    tensors = (make(3), make(3))
    alive = [t.detach() for t in tensors]
    watched = kind((), (), (), tensors)
    assert watched.unchanged()
    change(tensors[1])
    assert not watched.unchanged()
    del alive


def test_wrong_arguments(kind: Any) -> None:
    with pytest.raises(KeyError):
        kind((), (({}, "missing"),), (), ())
    with pytest.raises(KeyError):
        kind((), (), (({"there": 1}, "there"),), ())
    with pytest.raises((TypeError, AttributeError)):
        kind((1,), (), (), ())
    with pytest.raises((TypeError, AttributeError)):
        kind((), (), (), (1,))


def test_compiled_one_takes_nothing_but_what_it_says() -> None:
    if not native.load():
        pytest.skip(native.reason())
    make = native.library().Watch
    for arguments in [(), ([], (), (), ()), ((), (1,), (), ()), ((), ((1, "a"),), (), ())]:
        with pytest.raises(TypeError):
            make(*arguments)


def test_cycles_are_collected(kind: Any) -> None:
    class Owner:
        pass

    owner = Owner()
    watched = kind((owner.__dict__,), (), (), ())
    owner.watched = watched
    assert not watched.unchanged()
    gone = weakref.ref(owner)
    del owner, watched
    gc.collect()
    assert gone() is None


def test_references_are_given_back(kind: Any) -> None:
    value = nn.Linear(2, 2)
    mapping, tensors = {"module": value}, (torch.zeros(2),)
    gone = weakref.ref(value)
    watched = kind((mapping,), ((mapping, "module"),), ((mapping, "no"),), tensors)
    assert watched.unchanged()
    del value, mapping, watched
    gc.collect()
    assert gone() is None
