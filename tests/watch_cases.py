"""What the tests of ``Watch`` and ``CachedCall`` share: the classes in Python and in C."""

from __future__ import annotations

from typing import Any

import pytest

from ghost_ops.backends import native
from ghost_ops.fusion import watch

KINDS = [
    "python",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            not native.load(), reason=f"no compiled library: {native.reason()}"
        ),
    ),
]


def watch_class(kind: str) -> Any:
    """The ``Watch`` of a kind in ``KINDS``."""
    return watch.Watch if kind == "python" else native.library().Watch


def made(
    kind: Any,
    dicts: tuple = (),
    items: tuple = (),
    absent: tuple = (),
    tensors: tuple = (),
    attributes: tuple = (),
    own: Any = None,
) -> Any:
    """A watch of this class."""
    return kind(dicts, items, absent, tensors, attributes, own)


class Thing:
    """Has a __dict__ and can be referred to weakly."""
