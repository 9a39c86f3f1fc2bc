"""Promise: a watch is part of no reference cycle, and gives every reference back."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from watch_cases import KINDS, Thing, made, watch_class


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return watch_class(request.param)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Turns the garbage collector off, so that only reference counts free objects."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_own_is_not_kept(kind: Any, no_collector: None) -> None:
    owner, payload = Thing(), Thing()
    owner.__dict__.update(stride=1, payload=payload)
    own = owner.__dict__
    gone_owner, gone_payload = weakref.ref(owner), weakref.ref(payload)
    count = sys.getrefcount(own)
    watched = made(
        kind,
        items=((None, "stride"),),
        absent=((None, "forward"),),
        attributes=((Thing, "forward"),),
        own=own,
    )
    assert sys.getrefcount(own) == count
    for _ in range(100):
        assert watched.unchanged(own)
        assert not watched.unchanged({})
    assert sys.getrefcount(own) == count
    owner.__dict__["watched"] = watched
    del owner, own, payload, watched
    assert gone_owner() is None
    assert gone_payload() is None


def _through_dicts(kind: Any, owner: Any) -> Any:
    return made(kind, (owner.__dict__,))


def _through_items(kind: Any, owner: Any) -> Any:
    own = {"owner": owner}
    return made(kind, items=((None, "owner"),), own=own)


def _through_the_object_of_an_attribute(kind: Any, owner: Any) -> Any:
    return made(kind, attributes=((owner, "missing"),))


def _through_the_value_of_an_attribute(kind: Any, owner: Any) -> Any:
    place = types.SimpleNamespace(owner=owner)
    watched = made(kind, attributes=((place, "owner"),))
    del place.owner
    return watched


def _through_a_bound_method(kind: Any, owner: Any) -> Any:
    return made(kind, attributes=((owner, "__repr__"),))


@pytest.mark.parametrize(
    ("through", "unchanged"),
    [
        (_through_dicts, False),
        (_through_items, False),
        (_through_the_object_of_an_attribute, True),
        (_through_the_value_of_an_attribute, False),
        (_through_a_bound_method, True),
    ],
    ids=lambda given: given.__name__[1:] if callable(given) else "",
)
def test_cycles_are_collected(kind: Any, through: Any, unchanged: bool) -> None:
    owner = Thing()
    watched = through(kind, owner)
    owner.watched = watched  # type: ignore[attr-defined]
    assert watched.unchanged() is unchanged
    gone = weakref.ref(owner)
    del owner, watched
    gc.collect()
    assert gone() is None


def test_references_are_given_back(kind: Any, no_collector: None) -> None:
    value, thing = nn.Linear(2, 2), Thing()
    thing.module = value  # type: ignore[attr-defined]
    mapping, tensors = {"module": value}, (torch.zeros(2),)
    gone = weakref.ref(value), weakref.ref(thing), weakref.ref(tensors[0])
    watched = made(
        kind,
        (mapping,),
        ((mapping, "module"), (None, "module")),
        ((mapping, "no"), (None, "no")),
        tensors,
        ((thing, "module"), (thing, "no"), (thing, "__repr__")),
        mapping,
    )
    count = sys.getrefcount(value)
    for _ in range(100):
        assert watched.unchanged(mapping)
        assert not watched.unchanged({})
        assert not watched.unchanged({"module": object()})
    assert sys.getrefcount(value) == count
    del value, thing, mapping, tensors
    gc.collect()
    assert all(one() is not None for one in gone)  # the watch refers to the values that it compares
    del watched
    gc.collect()
    assert all(one() is None for one in gone)


@pytest.mark.parametrize(
    "wrong",
    [
        {"absent": ((None, "module"),)},
        {"items": ((None, "no"),)},
        {"tensors": (1,)},
        {"attributes": ((1, 1),)},
        {"attributes": ((int, "no"), 1)},
    ],
    ids=repr,
)
def test_references_are_given_back_after_an_error(
    kind: Any, wrong: dict[str, tuple], no_collector: None
) -> None:
    value = Thing()
    own = {"module": value}
    count, count_own = sys.getrefcount(value), sys.getrefcount(own)
    given: dict[str, tuple] = {
        "dicts": (own,),
        "items": ((None, "module"), (own, "module")),
        "absent": ((None, "no"),),
        "tensors": (torch.zeros(2),),
        "attributes": ((value, "no"),),
    }
    given = {name: given[name] + wrong.get(name, ()) for name in given}
    with pytest.raises((KeyError, TypeError, AttributeError)):
        made(kind, **given, own=own)
    del given
    assert (sys.getrefcount(value), sys.getrefcount(own)) == (count, count_own)
