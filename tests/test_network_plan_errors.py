"""Promise: bad arguments and models that cannot be planned raise errors that say why."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conftest import native_module
from torch import Tensor, nn

from ghost_ops import planner
from ghost_ops.planner.network import NetworkPlan, explain_network
from ghost_ops.reference import GhostModule

pytestmark = pytest.mark.skipif(native_module() is None, reason="the native library is not built")

POINT = (1, 3, 8, 8)
NOT_SIZES, NOT_INTS = "input_shape must be four positive sizes", "input_shape must be four ints"


@pytest.mark.parametrize(
    ("shape", "options", "error", "words"),
    [
        *((s, {}, ValueError, NOT_SIZES) for s in ((3, 8, 8), (1, 3, 8, 8, 8), (1, 3, 0, 8), ())),
        *((s, {}, TypeError, NOT_INTS) for s in (224, (1, 3, 8.5, 8), None)),
        *(
            (POINT, {"device": d}, ValueError, r"one of 'cuda', 'sm_80'.* on the CPU")
            for d in ("cpu", "sm_70", "")
        ),
        (POINT, {"device": 8}, TypeError, "device must be a str"),
        pytest.param(
            POINT,
            {"device": "cuda"},
            RuntimeError,
            "torch sees none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
        (POINT, {"dtype": torch.int8}, ValueError, r"dtype must be one of .*got torch\.int8"),
        (POINT, {"training": True}, ValueError, "evaluation mode only"),
        *(
            (POINT, {name: 1}, TypeError, name)
            for name in ("ratio", "out_channels", "residual", "threads")
        ),
    ],
    ids=str,
)
def test_bad_arguments(shape: Any, options: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        planner.explain(nn.Conv2d(3, 4, 1), shape, **options)


def test_both_forms_by_keyword() -> None:
    module, shape = GhostModule(6, 8), (1, 6, 8, 8)
    assert isinstance(planner.explain(model=module, input_shape=shape), NetworkPlan)
    assert isinstance(planner.explain(shape=shape, out_channels=8), planner.Plan)
    with pytest.raises(TypeError, match="input_shape"):
        planner.explain(shape, 8, input_shape=shape)


class Odd(nn.Module):
    """A forward that needs a value of its input, or raises."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.anchors = [torch.ones(3)]

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "branch":
            return x if x.sum() > 0 else -x
        if self.kind == "nonzero":
            return x.nonzero()
        if self.kind == "numpy":
            return x.numpy()
        if self.kind == "raises":
            raise KeyError("own")
        return x + self.anchors[0]


@pytest.mark.parametrize("kind", ["branch", "nonzero", "numpy", "another device"])
def test_a_forward_that_needs_values(kind: str) -> None:
    with pytest.raises(ValueError, match="without the values of tensors: ") as caught:
        planner.explain(nn.Sequential(nn.Identity(), Odd(kind)), (1, 3, 2, 3))
    assert caught.value.__cause__ is not None


def test_errors_of_the_model_pass() -> None:
    for model, error, words in (
        (Odd("raises"), KeyError, "own"),
        (nn.Conv2d(4, 4, 1), RuntimeError, "channel"),
    ):
        with pytest.raises(error, match=words):
            planner.explain(model, POINT)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_models_that_cannot_be_read() -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got str"):
        explain_network("ghostnet", POINT)
    with pytest.raises(ValueError, match="lazy layer"):
        planner.explain(nn.LazyConv2d(4, 1), POINT)
    with pytest.raises(ValueError, match="scripted"):
        planner.explain(torch.jit.trace(nn.ReLU(), torch.zeros(1)), POINT)
    module = nn.Conv2d(3, 4, 1)
    module.lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot be copied: TypeError"):
        planner.explain(module, POINT)
