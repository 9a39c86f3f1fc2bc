"""Promise: bad input raises PyTorch's exceptions, names the argument, and changes no state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Case, Params, make_input, make_module, ops_of
from torch import Tensor, nn

from ghost_ops import FusedGhostModule
from ghost_ops.functional import ghost_module
from ghost_ops.reference import GhostModule

CASE = Case(act1="relu", act2="relu")

# --- constructors -----------------------------------------------------------------------------

CONSTRUCTORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dw_size": 2}, ValueError, r"dw_size.*odd.*2"),
    ({"dw_size": 4}, ValueError, r"dw_size.*odd.*4"),
    ({"dw_size": 0}, ValueError, r"dw_size.*0"),
    ({"dw_size": -3}, ValueError, r"dw_size.*-3"),
    ({"dw_size": 3.0}, TypeError, r"dw_size.*float"),
    ({"ratio": 0}, ValueError, r"ratio.*at least 1.*0"),
    ({"ratio": -2}, ValueError, r"ratio.*-2"),
    ({"ratio": 2.0}, TypeError, r"ratio.*int.*float"),
    ({"ratio": 1.5}, TypeError, r"ratio.*1\.5"),
    ({"ratio": "2"}, TypeError, r"ratio.*str"),
    ({"ratio": None}, TypeError, r"ratio.*NoneType"),
    ({"stride": 0}, ValueError, r"stride.*0"),
    ({"stride": -1}, ValueError, r"stride.*-1"),
    ({"stride": 1.5}, TypeError, r"stride.*float"),
    ({"kernel_size": 0}, ValueError, r"kernel_size.*0"),
    ({"kernel_size": -1}, ValueError, r"kernel_size.*-1"),
    ({"inp": 0}, ValueError, r"inp.*0"),
    ({"oup": 0}, ValueError, r"oup.*0"),
    ({"oup": -4}, ValueError, r"oup.*-4"),
    ({"oup": 4.5}, TypeError, r"oup.*4\.5"),
]


@pytest.mark.parametrize("cls", [GhostModule, FusedGhostModule])
@pytest.mark.parametrize(("change", "kind", "message"), CONSTRUCTORS, ids=str)
def test_constructor(
    cls: type[nn.Module], change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        cls(**{"inp": 5, "oup": 8, **change})


@pytest.mark.parametrize("name", ["activation", "cheap_activation"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        pytest.param("swish", ValueError, id="swish"),
        pytest.param("RELU", ValueError, id="RELU"),
        pytest.param("", ValueError, id="empty"),
        pytest.param(3, TypeError, id="number"),
        pytest.param(nn.Tanh(), ValueError, id="tanh"),
        pytest.param(torch.relu, TypeError, id="function"),
        pytest.param(nn.ReLU, TypeError, id="class"),
    ],
)
def test_activation(name: str, value: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=rf"^{name}.*"):
        FusedGhostModule(5, 8, **{name: value})


# --- calls of the module ----------------------------------------------------------------------


# (change of the input, exception, what the message names)
CALLS: list[tuple[str, Callable[[Tensor], Any], type[Exception], str]] = [
    ("3-D", lambda x: x[0], ValueError, r"4D.*3D|x.*\[N, C, H, W\].*3"),
    ("2-D", lambda x: x[0, 0], (RuntimeError, ValueError), r"x|input"),
    ("5-D", lambda x: x[None], (RuntimeError, ValueError), r"x|input"),
    ("0-D", lambda x: x.sum(), (RuntimeError, ValueError), r"x|input"),
    ("too few channels", lambda x: x[:, :4], RuntimeError, r"5.*4|4.*5"),
    ("too many channels", lambda x: torch.cat([x, x], 1), RuntimeError, r"5.*10|10.*5"),
    ("no height", lambda x: x[:, :, :0], RuntimeError, r"x|H|height|size"),
    ("no width", lambda x: x[..., :0], RuntimeError, r"x|W|width|size"),
    ("float64", lambda x: x.double(), RuntimeError, r"(?i)float64|double"),
    ("bfloat16", lambda x: x.bfloat16(), RuntimeError, r"(?i)bfloat16"),
    ("float16", lambda x: x.half(), RuntimeError, r"(?i)float16|half"),
    ("int64", lambda x: x.long(), RuntimeError, r"(?i)int64|long"),
    ("complex", lambda x: x.to(torch.complex64), RuntimeError, r"(?i)complex"),
    ("meta", lambda x: x.to("meta"), RuntimeError, r"meta.*cpu|cpu.*meta"),
    ("list", lambda x: x.tolist(), TypeError, r"list|Tensor"),
    ("None", lambda _: None, TypeError, r"NoneType|Tensor|None"),
    ("numpy", lambda x: x.numpy(), TypeError, r"ndarray|Tensor"),
]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def assert_untouched(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, t in module.state_dict().items():
        assert torch.equal(t, before[name]), f"{name} changed although the call failed"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("change", "kind", "message"), [pytest.param(*c[1:], id=c[0]) for c in CALLS]
)
def test_call(
    backend: str,
    change: Callable[[Tensor], Any],
    kind: type[Exception],
    message: str,
    k: int,
    training: bool,
) -> None:
    module = make_module(CASE.replace(k=k)).train(training)
    before = state(module)
    bad = change(make_input(CASE))
    with pytest.raises(kind, match=message):
        module(bad)
    assert_untouched(module, before)
    module(make_input(CASE))  # and it still works


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_one_value_per_channel(backend: str, ratio: int, k: int) -> None:
    case = CASE.replace(n=1, h=1, w=1, ratio=ratio, k=k)
    module, x = make_module(case), make_input(case)
    before = state(module)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(x)
    assert_untouched(module, before)
    assert torch.isfinite(module.eval()(x)).all()


def test_one_value_per_channel_after_the_stride(backend: str) -> None:
    case = CASE.replace(n=1, h=2, w=2, stride=2)
    module = make_module(case)
    before = state(module)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(make_input(case))
    assert_untouched(module, before)


def damage(change: Callable[[nn.Module], None]) -> nn.Module:
    module = make_module(CASE)
    change(module)
    return module


def cheap_in_float64(m: nn.Module) -> None:
    m.cheap_operation[0].double()


def norm_in_float64(m: nn.Module) -> None:
    m.primary_conv[1].double()


def cheap_on_meta(m: nn.Module) -> None:
    m.cheap_operation[0].to("meta")


def norm_on_meta(m: nn.Module) -> None:
    m.cheap_operation[1].to("meta")


def other_number_of_maps(m: nn.Module) -> None:
    m.cheap_operation[0] = nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False)


def other_norm(m: nn.Module) -> None:
    m.primary_conv[1] = nn.BatchNorm2d(7)


def other_cheap_norm(m: nn.Module) -> None:
    m.cheap_operation[1] = nn.BatchNorm2d(9)


def stride_zero(m: nn.Module) -> None:
    m.primary_conv[0].stride = (0, 0)


WRONG_TYPE = (cheap_in_float64, norm_in_float64, norm_on_meta)
WRONG_SIZE = (other_number_of_maps, other_norm, other_cheap_norm, stride_zero)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", [*WRONG_TYPE, *WRONG_SIZE], ids=lambda f: f.__name__)
def test_children_that_do_not_fit(
    backend: str, change: Callable[[nn.Module], None], training: bool
) -> None:
    """The exception has the type that the children raise one by one, and it has a message."""
    module = damage(change).train(training)
    x = make_input(CASE)
    other = copy.deepcopy(module)
    before = state(module)
    with pytest.raises(Exception) as expected:
        other.cheap_operation(other.primary_conv(x))
    with pytest.raises((type(expected.value), RuntimeError)) as got:
        module(x)
    assert len(str(got.value)) > 10
    if "meta" not in change.__name__:
        # The running statistics are unchanged, or changed as by the children.
        now, there = state(module), state(other)
        same = [all(torch.equal(t, s[name]) for name, t in now.items()) for s in (before, there)]
        assert any(same)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_weights_on_two_devices(backend: str, training: bool) -> None:
    module = damage(cheap_on_meta).train(training)
    statistics = module.primary_conv[1].running_mean.clone()
    with pytest.raises(RuntimeError, match=r"meta.*cpu|cpu.*meta"):
        module(make_input(CASE))
    assert torch.equal(module.primary_conv[1].running_mean, statistics)


# --- the function -----------------------------------------------------------------------------


OF_A_BRANCH = ("weight", "bn_weight", "bn_bias", "running_mean", "running_var")
NAMES = [f"{branch}_{name}" for branch in ("primary", "cheap") for name in OF_A_BRANCH]


def arguments() -> dict[str, Any]:
    p = Params.of(make_module(CASE)).to()
    first = (p.w1, p.bn1.gamma, p.bn1.beta, p.bn1.mean, p.bn1.var)
    second = (p.w2, p.bn2.gamma, p.bn2.beta, p.bn2.mean, p.bn2.var)
    return {"x": make_input(CASE), **dict(zip(NAMES, (*first, *second), strict=True))}


FUNCTION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"eps": "1e-5"}, TypeError, "eps"),
    ({"momentum": (0.1, None)}, TypeError, "momentum"),
    ({"stride": 0}, RuntimeError, r"stride.*0"),
    ({"stride": -1}, RuntimeError, r"stride.*-1"),
    ({"stride": 1.5}, TypeError, "stride"),
    ({"stride": (1, 1, 1)}, TypeError, "stride"),
    ({"padding": -1}, RuntimeError, r"padding.*-1"),
    ({"dilation": 0}, RuntimeError, r"dilation.*0"),
    ({"groups": 0}, RuntimeError, "groups"),
    ({"groups": 3}, RuntimeError, "groups"),
    ({"out_channels": 3}, RuntimeError, r"out_channels.*4.*8.*3"),
    ({"out_channels": 9}, RuntimeError, r"out_channels.*4.*8.*9"),
    ({"activation": "tanh"}, ValueError, r"activation.*relu.*tanh"),
    ({"cheap_activation": "tanh"}, ValueError, r"cheap_activation.*relu.*tanh"),
    ({"activation": 1}, TypeError, "activation"),
    ({"x": None}, TypeError, "x.*NoneType"),
    ({"cheap_weight": None}, TypeError, "cheap_weight.*NoneType"),
    ({"primary_weight": "w"}, TypeError, "primary_weight.*str"),
    ({"primary_bn_weight": 1.0}, TypeError, "primary.*weight.*float"),
    ({"cheap_weight": torch.randn(4, 1, 2, 2)}, ValueError, r"(dw_size|d).*odd.*2"),
    ({"cheap_weight": torch.randn(4, 1, 3, 5)}, RuntimeError, r"cheap weight.*3, 5"),
    ({"cheap_weight": torch.randn(6, 1, 3, 3)}, RuntimeError, r"cheap weight.*4.*6"),
    ({"cheap_weight": torch.randn(4, 2, 3, 3)}, RuntimeError, r"cheap weight.*4, 2"),
    ({"cheap_weight": torch.randn(4, 9)}, RuntimeError, r"cheap weight.*4, 9"),
    ({"cheap_weight": torch.randn(4, 1, 3, 3).double()}, RuntimeError, "cheap weight.*float64"),
    ({"cheap_weight": torch.randn(4, 1, 3, 3, device="meta")}, RuntimeError, "cheap weight.*meta"),
    ({"primary_weight": torch.randn(4, 5)}, RuntimeError, r"primary weight.*4, 5"),
    ({"primary_weight": torch.randn(0, 5, 1, 1)}, RuntimeError, r"0 intrinsic maps"),
    ({"primary_weight": torch.randn(4, 6, 1, 1)}, RuntimeError, r"6.*5"),
    ({"primary_weight": torch.randn(4, 5, 1, 1).double()}, RuntimeError, "primary weight.*float64"),
    ({"primary_weight": torch.randn(4, 5, 9, 9)}, RuntimeError, r"small|size"),
    ({"primary_bn_weight": torch.ones(5)}, RuntimeError, r"primary.*weight.*4.*5"),
    ({"primary_bn_weight": torch.ones(1)}, RuntimeError, r"primary.*weight.*4.*1"),
    ({"primary_bn_weight": torch.ones(4, 1)}, RuntimeError, r"primary.*weight"),
    ({"primary_bn_bias": torch.ones(4).double()}, RuntimeError, "primary.*bias.*float64"),
    ({"primary_bn_bias": torch.ones(4).long()}, RuntimeError, "primary.*bias.*int64"),
    ({"cheap_bn_bias": torch.ones(3)}, RuntimeError, r"cheap.*bias.*4.*3"),
    ({"cheap_running_mean": torch.ones(3)}, RuntimeError, r"cheap.*running_mean.*4.*3"),
    ({"cheap_running_var": torch.ones(4, device="meta")}, RuntimeError, r"running_var.*meta"),
    ({"primary_running_var": torch.ones(9)}, RuntimeError, r"primary.*running_var.*4.*9"),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    FUNCTION,
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_function(
    backend: str, change: dict[str, Any], kind: type[Exception], message: str, training: bool
) -> None:
    given = arguments() | change
    running = {name: given[name] for name in NAMES if "running" in name}
    before = {name: t.clone() for name, t in running.items()}
    with pytest.raises(kind, match=message):
        ghost_module(**given, training=training)
    for name, t in running.items():
        assert t.is_meta or torch.equal(t, before[name]), name


@pytest.mark.parametrize("name", [name for name in NAMES if "running" in name])
def test_evaluation_without_running_statistics(backend: str, name: str) -> None:
    given = arguments() | {name: None}
    branch, _, what = name.partition("_")
    with pytest.raises(RuntimeError, match=rf"{branch}.*{what}.*must be defined in evaluation"):
        ghost_module(**given)
    with pytest.raises(RuntimeError, match="running mean and running var"):
        ghost_module(**given, training=True)


def test_evaluation_without_any_running_statistics(backend: str) -> None:
    given = {k: v for k, v in arguments().items() if "running" not in k}
    with pytest.raises(RuntimeError, match=r"running_mean must be defined in evaluation mode"):
        ghost_module(**given)
    assert ghost_module(**given, training=True).shape == (2, 8, 6, 7)


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="relu"):
        ghost_module(**arguments(), relu=True)


# --- the operators, which must not read out of bounds even if called directly -----------------


@pytest.mark.parametrize(
    ("position", "value"),
    [
        pytest.param(0, torch.randn(2, 5, 6), id="rank"),
        pytest.param(0, torch.randn(2, 4, 6, 7), id="channels"),
        pytest.param(1, torch.randn(3), id="packed"),
        pytest.param(4, 5, id="intrinsic"),
        pytest.param(5, 40, id="out_channels"),
        pytest.param(7, 5, id="dw_size"),
        pytest.param(2, torch.randn(2, 8, 6, 6), id="residual"),
        pytest.param(0, torch.randn(2, 5, 6, 7).double(), id="dtype"),
    ],
)
def test_operator(native: str, position: int, value: Any) -> None:
    ops = ops_of(native)
    p = Params.of(make_module(CASE)).to()
    a, b = p.bn1, p.bn2
    with torch.no_grad():
        packed = ops.ghost_pack(
            p.w1, a.gamma, a.beta, a.mean, a.var, 1e-5, p.w2, b.gamma, b.beta, b.mean, b.var, 1e-5
        )
        numbers = (4, 8, 2, 3, 1, 1, 0.01, 1, 0.01, True)
        good: list[Any] = [make_input(CASE), packed, None, None, *numbers]
        ops.ghost_apply(*good)
        good[position] = value
        with pytest.raises(RuntimeError):
            ops.ghost_apply(*good)
