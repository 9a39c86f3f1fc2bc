"""Promise: a watch notices every change of the values that it watches, in C as in Python."""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from watch_cases import KINDS, Thing, made, watch_class

from ghost_ops.backends import native
from ghost_ops.fusion import watch


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return watch_class(request.param)


@pytest.fixture
def compiled() -> Any:
    if not native.load():
        pytest.skip(native.reason())
    return native.library().Watch


class Raises:
    """``read`` raises ``error`` if it is set."""

    error: BaseException | None = None

    @property
    def read(self) -> int:
        if self.error is not None:
            raise self.error
        return 1


def no_exception_is_left() -> bool:
    return torch.ones(1).item() == 1


def test_make_prefers_the_compiled_one() -> None:
    expected = native.library().Watch if native.load() else watch.Watch
    assert type(watch.make_watch()) is expected
    assert watch.make_watch().unchanged()
    assert watch.make_watch().unchanged({"any": 1})


def test_make_passes_every_argument_on() -> None:
    mapping, own, thing, tensor = {"a": 1}, {"b": 1}, Thing(), torch.zeros(2)
    changes: tuple[tuple[dict[str, Any], Callable[[], Any]], ...] = (
        ({"dicts": (mapping,)}, lambda: mapping.update(c=1)),
        ({"items": ((mapping, "a"),)}, lambda: mapping.update(a=2)),
        ({"items": ((None, "b"),), "own": own}, lambda: own.update(b=2)),
        ({"absent": ((mapping, "d"),)}, lambda: mapping.update(d=2)),
        ({"tensors": (tensor,)}, lambda: tensor.add_(1)),
        ({"attributes": ((thing, "e"),)}, lambda: thing.__dict__.update(e=1)),
    )
    for given, change in changes:
        watched = watch.make_watch(**given)
        assert watched.unchanged(own)
        change()
        assert not watched.unchanged(own), given


@pytest.mark.parametrize("mapping_type", [dict, OrderedDict])
def test_dictionaries(kind: Any, mapping_type: type) -> None:
    first, second = object(), object()
    mapping = mapping_type(a=first, b=second)
    watched = made(kind, (mapping,))
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
    watched = made(kind, (mapping,))
    assert watched.unchanged()
    mapping[0] = None
    assert not watched.unchanged()


def test_items_may_be_replaced_by_equal_ones(kind: Any) -> None:
    mapping = {"stride": (1, 1000), "eps": 1e-5, "other": 1}
    watched = made(kind, items=((mapping, "stride"), (mapping, "eps")))
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


class Text(str):
    pass


OTHER_TYPES = [
    (8, 8.0),
    (1, True),
    (False, 0),
    (0, None),
    (2**70, float(2**70)),
    ("relu", Text("relu")),
    ((1, 1), [1, 1]),
    ({"a": 1}, OrderedDict(a=1)),
]
PLACES = ["item", "own", "attribute"]


def one_value(kind: Any, place: str, value: Any) -> tuple[Callable[[], bool], Callable[[Any], Any]]:
    """A watch over one value: a function that checks it, and one that sets the value."""
    thing, own = Thing(), {"key": value}
    thing.key = value  # type: ignore[attr-defined]
    if place == "item":
        watched = made(kind, items=((thing.__dict__, "key"),))
    elif place == "own":
        watched = made(kind, items=((None, "key"),), own=own)
    else:
        watched = made(kind, attributes=((thing, "key"),))

    def put(new: Any) -> None:
        own["key"] = new
        thing.key = new  # type: ignore[attr-defined]

    return lambda: watched.unchanged(own), put


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("first", "second"), OTHER_TYPES)
def test_equal_value_of_another_type_is_a_change(
    kind: Any, place: str, first: Any, second: Any
) -> None:
    for value, other in ((first, second), (second, first)):
        unchanged, put = one_value(kind, place, value)
        assert unchanged()
        put(other)
        assert not unchanged()
        put(value)
        assert unchanged()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("value", "equal", "other"),
    [
        (2**70, int(str(2**70)), 2**70 + 1),
        (1.5, float("1.5"), 1.25),
        ((1, 1000), (*range(1, 1001, 999),), (1, 999)),
        ("relu", "".join("relu"), "gelu"),
        (None, None, False),
        (float("inf"), float("inf"), float("nan")),
    ],
)
def test_equal_value_of_the_same_type_is_none(
    kind: Any, place: str, value: Any, equal: Any, other: Any
) -> None:
    unchanged, put = one_value(kind, place, value)
    put(equal)
    assert unchanged()
    put(other)
    assert not unchanged()


@pytest.mark.parametrize("place", PLACES)
def test_same_object_need_not_be_equal_to_itself(kind: Any, place: str) -> None:
    assert one_value(kind, place, torch.ones(2))[0]()
    unchanged, put = one_value(kind, place, float("nan"))
    assert unchanged()
    put(float("nan"))
    assert not unchanged()


@pytest.mark.parametrize("place", PLACES)
def test_value_that_cannot_be_compared_counts_as_changed(compiled: Any, place: str) -> None:
    unchanged, put = one_value(compiled, place, torch.ones(2))
    put(torch.ones(2))
    assert not unchanged()
    assert no_exception_is_left()


@pytest.mark.parametrize("place", PLACES)
def test_value_may_be_dropped_while_it_is_compared(kind: Any, place: str) -> None:
    class Values(list):
        pass

    class Drops:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            put(None)
            alive.append(value() is not None)
            return True

    alive: list[bool] = []
    unchanged, put = one_value(kind, place, Values([Drops(), Drops()]))
    new = Values([Drops(), Drops()])
    value = weakref.ref(new)
    put(new)
    del new
    assert unchanged()
    assert alive == [True, True]
    assert value() is None
    assert not unchanged()


def test_absent_keys(kind: Any) -> None:
    mapping: dict = {}
    watched = made(kind, absent=((mapping, "forward"),))
    assert watched.unchanged()
    mapping["forward"] = None
    assert not watched.unchanged()
    del mapping["forward"]
    assert watched.unchanged()


def test_own_is_the_dictionary_of_the_call(kind: Any) -> None:
    own: dict = {"stride": 1000, "other": 1}
    items, absent = ((None, "stride"),), ((None, "forward"),)
    watched = made(kind, items=items, absent=absent, own=own)
    assert watched.unchanged(own)
    assert watched.unchanged({"stride": int("1000")})
    assert watched.unchanged(OrderedDict(stride=1000))
    assert not watched.unchanged({"stride": 2})
    assert not watched.unchanged({"stride": 1000, "forward": None})
    own["other"] = 2
    assert watched.unchanged(own)
    own["stride"] = 2
    assert not watched.unchanged(own)
    own["stride"] = 1000
    assert watched.unchanged(own)
    own["forward"] = None
    assert not watched.unchanged(own)
    del own["forward"], own["stride"]
    assert not watched.unchanged(own)


def test_without_own_its_items_have_changed(kind: Any) -> None:
    watched = made(kind, items=((None, "stride"),), own={"stride": 1})
    assert not watched.unchanged()
    assert not watched.unchanged({})
    assert watched.unchanged({"stride": 1})


def test_own_is_not_the_dictionary_of_other_items(kind: Any) -> None:
    named, own = {"a": 1}, {"a": 2}
    watched = made(kind, items=((named, "a"), (None, "a")), absent=((named, "b"),), own=own)
    assert watched.unchanged({"a": 2, "b": 3})
    assert not watched.unchanged(named)
    named["b"] = 1
    assert not watched.unchanged(own)
    empty: dict = {}
    watched = made(kind, absent=((empty, "a"),), own=own)
    assert watched.unchanged(own)
    empty["a"] = 2
    assert not watched.unchanged({})


@pytest.mark.parametrize("arguments", [(3,), ("own",), ([],), ({}, {})])
def test_compiled_one_is_given_one_dictionary(compiled: Any, arguments: tuple) -> None:
    watched = made(compiled, items=((None, "a"),), own={"a": 1})
    with pytest.raises(TypeError):
        watched.unchanged(*arguments)
    with pytest.raises(TypeError):
        watched.unchanged(own={"a": 1})
    assert watched.unchanged({"a": 1})


def _fresh() -> Any:
    """An object of a new class with a new base class."""

    class Base:
        stride = 1000

        def method(self) -> int:
            return 1

    class Kind(Base):
        pass

    return Kind()


def test_attribute_of_an_object(kind: Any) -> None:
    thing = _fresh()
    watched = made(kind, attributes=((thing, "stride"),))
    assert watched.unchanged()
    thing.stride = int("1000")
    assert watched.unchanged()
    thing.stride = 1
    assert not watched.unchanged()
    del thing.stride
    assert watched.unchanged()


@pytest.mark.parametrize("of", ["object", "class"])
@pytest.mark.parametrize("changed", ["class", "base class"])
def test_attribute_of_a_class_is_replaced(kind: Any, of: str, changed: str) -> None:
    thing = _fresh()
    owner = type(thing) if changed == "class" else type(thing).__base__
    watched = made(
        kind, attributes=((thing if of == "object" else type(thing), "method"), (thing, "stride"))
    )
    method = type(thing).method
    assert watched.unchanged()
    owner.method = lambda self: 1
    assert not watched.unchanged()
    owner.method = method
    assert watched.unchanged()
    owner.stride = 2
    assert not watched.unchanged()


def test_class_of_an_object_is_replaced(kind: Any) -> None:
    thing, other = _fresh(), _fresh()
    before = type(thing)
    watched = made(kind, attributes=((thing, "__class__"),))
    assert watched.unchanged()
    thing.__class__ = type(other)
    assert not watched.unchanged()
    thing.__class__ = type("Kind", (before,), {})
    assert not watched.unchanged()
    thing.__class__ = before
    assert watched.unchanged()


def test_attribute_comes_with_another_class(kind: Any) -> None:
    thing = _fresh()
    watched = made(kind, attributes=((thing, "method"), (thing, "no")))
    before = type(thing)
    thing.__class__ = type("Kind", (before,), {})
    assert watched.unchanged()
    thing.__class__ = type("Kind", (before,), {"no": None})
    assert not watched.unchanged()
    thing.__class__ = type("Kind", (before,), {"method": len})
    assert not watched.unchanged()


@pytest.mark.parametrize("where", ["object", "class", "base class"])
@pytest.mark.parametrize("value", [None, 1, object()])
def test_missing_attribute_must_stay_missing(kind: Any, where: str, value: Any) -> None:
    thing = _fresh()
    place = {"object": thing, "class": type(thing), "base class": type(thing).__base__}[where]
    watched = made(kind, attributes=((thing, "no"),))
    assert watched.unchanged()
    place.no = value
    assert not watched.unchanged()
    del place.no
    assert watched.unchanged()


def test_attribute_that_goes_has_changed(kind: Any) -> None:
    thing = Thing()
    thing.key = None  # type: ignore[attr-defined]
    watched = made(kind, attributes=((thing, "key"),))
    assert watched.unchanged()
    del thing.key  # type: ignore[attr-defined]
    assert not watched.unchanged()


def test_attribute_is_looked_up_as_python_does(kind: Any) -> None:
    module = nn.Conv2d(3, 4, 1)
    watched = made(kind, attributes=((module, "weight"), (module, "bias"), (module, "forward")))
    assert watched.unchanged()
    module.forward = module.forward  # type: ignore[method-assign]
    assert watched.unchanged()
    bias = module.bias
    module.bias = None
    assert not watched.unchanged()
    module.bias = bias
    assert watched.unchanged()
    del module.weight
    assert not watched.unchanged()


def test_bound_methods_and_properties_are_compared_by_value(kind: Any) -> None:
    class Kind:
        def __init__(self) -> None:
            self.sizes: Any = [3, 1000]

        @property
        def shape(self) -> Any:
            return self.sizes and (*self.sizes,)

        def method(self) -> None: ...

    thing = Kind()
    assert thing.method is not thing.method and thing.shape is not thing.shape
    shape = made(kind, attributes=((thing, "shape"),))
    method = made(kind, attributes=((thing, "method"), (thing.sizes, "append")))
    assert shape.unchanged() and method.unchanged()
    thing.sizes = [3, 1000]
    assert shape.unchanged() and method.unchanged()
    thing.sizes = [3, 1001]
    assert not shape.unchanged() and method.unchanged()
    thing.sizes = None
    assert not shape.unchanged()
    thing.method = Kind().method  # type: ignore[method-assign]
    assert not method.unchanged()
    thing.method = types.MethodType(Kind.method, thing)  # type: ignore[method-assign]
    assert method.unchanged()


def test_attributes_of_functions_and_cells(kind: Any) -> None:
    scale = 1000

    def function(x: int = 2) -> int:
        return x * scale

    assert function.__closure__ is not None
    watched = made(
        kind,
        attributes=(
            (function, "__code__"),
            (function, "__defaults__"),
            (function.__closure__[0], "cell_contents"),
        ),
    )
    assert watched.unchanged()
    scale = int("1000")
    assert watched.unchanged()
    scale = 3
    assert not watched.unchanged()
    scale = 1000
    function.__defaults__ = (3,)
    assert not watched.unchanged()
    function.__defaults__ = (2,)
    assert watched.unchanged()
    function.__code__ = (lambda x=2: x + scale).__code__
    assert not watched.unchanged()


def test_one_changed_attribute_of_many(kind: Any) -> None:
    things = [Thing() for _ in range(5)]
    for thing in things:
        thing.key = 1  # type: ignore[attr-defined]
    watched = made(kind, attributes=tuple((thing, "key") for thing in things))
    for thing in things:
        thing.key = 2  # type: ignore[attr-defined]
        assert not watched.unchanged()
        thing.key = 1  # type: ignore[attr-defined]
        assert watched.unchanged()


def test_getter_without_an_answer_is_a_missing_attribute(kind: Any) -> None:
    thing = Raises()
    watched = made(kind, attributes=((thing, "read"),))
    assert watched.unchanged()
    thing.error = AttributeError("read")
    assert not watched.unchanged()
    missing = made(kind, attributes=((thing, "read"),))
    assert missing.unchanged()
    thing.error = None
    assert watched.unchanged()
    assert not missing.unchanged()


def test_getter_that_raises_is_never_unchanged(kind: Any) -> None:
    thing = Raises()
    watched = made(kind, attributes=((thing, "read"),))
    thing.error = ArithmeticError("no")
    assert not watched.unchanged()
    assert no_exception_is_left()
    thing.error = None
    assert watched.unchanged()


def test_getter_that_raises_from_the_start_is_missing(kind: Any) -> None:
    thing = Raises()
    thing.error = ArithmeticError("no")
    watched = made(kind, attributes=((thing, "read"),))
    assert no_exception_is_left()
    assert watched.unchanged()
    assert no_exception_is_left()
    thing.error = None
    assert not watched.unchanged()


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
    watched = made(kind, tensors=tensors)
    assert watched.unchanged()
    change(tensors[1])
    assert not watched.unchanged()
    del alive


def test_wrong_arguments(kind: Any) -> None:
    with pytest.raises(KeyError):
        made(kind, items=(({}, "missing"),))
    with pytest.raises(KeyError):
        made(kind, items=((None, "missing"),), own={})
    with pytest.raises(KeyError):
        made(kind, absent=(({"there": 1}, "there"),))
    with pytest.raises(KeyError):
        made(kind, absent=((None, "there"),), own={"there": 1})
    with pytest.raises((KeyError, TypeError)):
        made(kind, items=((None, "a"),))
    with pytest.raises(TypeError):
        made(kind, items=((None, "a"),), own=3)
    with pytest.raises(TypeError):
        made(kind, absent=((None, "a"),), own=3)
    with pytest.raises((TypeError, AttributeError)):
        made(kind, dicts=(1,))
    with pytest.raises((TypeError, AttributeError)):
        made(kind, tensors=(1,))
    with pytest.raises(TypeError):
        made(kind, attributes=((Thing(), 3),))
    with pytest.raises(TypeError):
        made(kind, attributes=(3,))
    with pytest.raises((TypeError, ValueError)):
        made(kind, attributes=((Thing(), "a", 1),))
    with pytest.raises(TypeError):
        kind((), (), (), ())


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ((), (), (), (), ()),
        ((), (), (), (), (), None, ()),
        ([], (), (), (), (), None),
        ((), [], (), (), (), None),
        ((), (), [], (), (), None),
        ((), (), (), [], (), None),
        ((), (), (), (), [], None),
        ((), (), (), (), None, None),
        ((), (1,), (), (), (), None),
        ((), (({},),), (), (), (), None),
        ((), ([{}, "a"],), (), (), (), None),
        ((), ((1, "a"),), (), (), (), None),
        ((), ((1, "a"),), (), (), (), {"a": 1}),
        ((), ((None, "a"),), (), (), (), None),
        ((), ((None, "a"),), (), (), (), [("a", 1)]),
        ((), (), ((1, "a"),), (), (), None),
        ((), (), ((None, "a"),), (), (), 3),
        ((), (), (), (), (("a",),), None),
        ((), (), (), (), (["a", "b"],), None),
        ((), (), (), (), ("ab",), None),
        ((), (), (), (), ((1, "real", "imag"),), None),
        ((), (), (), (), ((1, b"real"),), None),
        ((), (), (), (), ((1, None),), None),
    ],
    ids=repr,
)
def test_compiled_one_takes_nothing_but_what_it_says(compiled: Any, arguments: tuple) -> None:
    with pytest.raises(TypeError):
        compiled(*arguments)
    assert compiled((), (), (), (), (), None).unchanged()
