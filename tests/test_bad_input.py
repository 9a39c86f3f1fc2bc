"""Promise: bad input raises PyTorch's exceptions, names the argument, and changes no state."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Case, Params, make_input, make_module, ops_of
from torch import Tensor, nn

import ghost_ops
from ghost_ops import (
    FusedGhostBottleneck,
    FusedGhostModule,
    activations,
    backends,
    environment,
    models,
)
from ghost_ops.functional import ghost_module
from ghost_ops.reference import GhostBasicBlock, GhostBottleneck, GhostModule, SqueezeExcite

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
    ({"relu": "none"}, TypeError, r"relu must be a bool, got str: 'none'"),
    ({"relu": None}, TypeError, r"relu must be a bool, got NoneType"),
    *(
        ({name: value}, TypeError, rf"{name} must be an int, got {type(value).__name__}")
        for name in ("inp", "oup", "kernel_size", "stride")
        for value in ("3", (3, 3), None, True, torch.tensor(3.0))
    ),
]


@pytest.mark.parametrize("cls", [GhostModule, FusedGhostModule])
@pytest.mark.parametrize(("change", "kind", "message"), CONSTRUCTORS, ids=str)
def test_constructor(
    cls: type[nn.Module], change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        cls(**{"inp": 5, "oup": 8, **change})


CHANNELS = {"in_chs": 8, "mid_chs": 12, "out_chs": 16}
NOT_A_BOTTLENECK: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(
        ({name: value}, kind, rf"{name} must be .*got .*{value}")
        for name in (*CHANNELS, "dw_kernel_size", "stride")
        for value, kind in ((0, ValueError), (-1, ValueError), ("3", TypeError), (2.5, TypeError))
    ),
    ({"dw_kernel_size": 4}, ValueError, "dw_kernel_size must be odd for stride 1, got 4"),
    ({"se_ratio": "0.25"}, TypeError, r"se_ratio must be a number, got str: '0\.25'"),
    ({"se_ratio": -0.25}, ValueError, r"se_ratio must be .*got -0\.25"),
    ({"se_ratio": float("nan")}, ValueError, r"se_ratio must be .*got nan"),
]


@pytest.mark.parametrize("cls", [GhostBottleneck, FusedGhostBottleneck])
@pytest.mark.parametrize(("change", "kind", "message"), NOT_A_BOTTLENECK, ids=str)
def test_constructor_of_a_bottleneck(
    cls: type[nn.Module], change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        cls(**(CHANNELS | change))


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"oup": 4}, ValueError), ({"oup": "16"}, TypeError), ({"stride": 0}, ValueError)],
    ids=str,
)
def test_constructor_of_a_basic_block(change: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"{next(iter(change))} must be .*got"):
        GhostBasicBlock(**({"inp": 8, "oup": 16} | change))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"in_chs": "8"}, TypeError),
        ({"in_chs": 0}, ValueError),
        ({"se_ratio": None}, TypeError),
        ({"reduced_base_chs": 2.5}, TypeError),
        ({"act_layer": "relu"}, TypeError),
        ({"gate_fn": "sigmoid"}, TypeError),
        ({"divisor": 0}, ValueError),
        ({"se_ration": 0.5}, TypeError),
    ],
    ids=str,
)
def test_constructor_of_a_gate(change: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=next(iter(change))):
        SqueezeExcite(**({"in_chs": 8} | change))


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


def quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)


def nested(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in prototype stage"
        return torch.nested.nested_tensor(list(x))


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
    ("tuple", lambda x: (x,), TypeError, r"tuple|Tensor"),
    ("string", lambda _: "x", TypeError, r"str|Tensor"),
    ("bool", lambda x: x > 0, RuntimeError, r"(?i)bool"),
    ("uint8", lambda x: x.to(torch.uint8), RuntimeError, r"(?i)uint8|byte"),
    ("float8", lambda x: x.to(torch.float8_e4m3fn), RuntimeError, r"(?i)float8"),
    ("quantized", quantized, RuntimeError, r"(?i)quint8|quantized"),
    ("sparse", lambda x: x.to_sparse(), RuntimeError, r"x must be .*dense.*sparse_coo.*to_dense"),
    ("nested", nested, RuntimeError, r"x must be .*dense.*nested"),
]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, t in module.state_dict().items() if not torch.equal(t, before[name])}


def assert_untouched(module: nn.Module, before: dict[str, Tensor]) -> None:
    assert not changed(module, before), "changed although the call failed"


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


@functools.cache
def networks() -> dict[str, tuple[nn.Module, nn.Module]]:
    """Fused models and the same models unfused; they take 5 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fused = {
            "module": FusedGhostModule(5, 8),
            "bottleneck": FusedGhostBottleneck(5, 12, 8, stride=2, se_ratio=0.25),
            "ghostnet": models.ghostnet(0.25, 10, in_chans=5),
            "ghost_resnet": models.ghost_resnet(8, in_chans=5),
        }
    plain = copy.deepcopy(fused)
    for model in plain.values():
        ghost_ops.unfuse(model)
    return {name: (model, plain[name]) for name, model in fused.items()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["module", "bottleneck", "ghostnet", "ghost_resnet"])
@pytest.mark.parametrize("change", [pytest.param(c[1], id=c[0]) for c in CALLS])
def test_same_exception_as_unfused(
    native: str, change: Callable[[Tensor], Any], name: str, training: bool
) -> None:
    """The type is that of the plain model, and no more state changes than there."""
    fused, plain = (model.train(training) for model in networks()[name])
    x = torch.randn(2, 5, 32, 32)
    bad = change(x)
    with torch.set_grad_enabled(training):
        fused(x)  # in eval mode the next call may be a cache hit
        before = state(fused), state(plain)
        with pytest.raises(Exception) as expected:
            plain(bad)
        with pytest.raises(Exception) as got:
            fused(bad)
    kinds = type(got.value), type(expected.value)
    assert issubclass(*kinds) or issubclass(*kinds[::-1]), (got.value, expected.value)
    assert changed(fused, before[0]) <= changed(plain, before[1])


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


@pytest.mark.parametrize("eps", [0.0, -1.0])
@pytest.mark.parametrize("norm", ["primary_conv", "cheap_operation"])
def test_eps_that_is_not_positive(backend: str, norm: str, eps: float) -> None:
    """As in PyTorch's batch norm: an error with the statistics of the batch."""
    module = make_module(CASE)
    module.get_submodule(norm)[1].eps = eps
    before = state(module)
    with pytest.raises(ValueError, match=f"eps must be positive during training.*{eps}"):
        module(make_input(CASE))
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
    ({"groups": "1"}, TypeError, "groups must be an int, got str: '1'"),
    ({"groups": 1.5}, TypeError, r"groups must be an int, got float: 1\.5"),
    ({"groups": True}, TypeError, "groups must be an int, got bool"),
    ({"stride": "1"}, TypeError, r"stride must be an int or a pair of ints, got '1'"),
    ({"stride": True}, TypeError, r"stride must be an int or a pair of ints, got True"),
    ({"out_channels": "8"}, TypeError, "out_channels must be an int, got str: '8'"),
    ({"out_channels": 8.0}, TypeError, "out_channels must be an int, got float"),
    ({"activation": None}, TypeError, "activation must be .*NoneType"),
    ({"activation_weight": 1.0}, ValueError, "activation_weight.*prelu"),
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


@pytest.mark.parametrize("name", ["x", *NAMES])
def test_function_with_a_sparse_tensor(backend: str, name: str) -> None:
    given = arguments()
    given[name] = given[name].detach().to_sparse()
    with pytest.raises(RuntimeError, match=rf"^{name} must be a dense tensor.*sparse_coo"):
        ghost_module(**given)


@pytest.mark.parametrize("value", ["no", 1, None], ids=str)
def test_training_that_is_no_bool(value: object) -> None:
    """As in ``F.batch_norm``."""
    with pytest.raises(TypeError, match="training must be a bool, got"):
        ghost_module(**arguments(), training=value)


def test_eps_of_the_function(backend: str) -> None:
    given = arguments() | {"eps": (1e-5, 0.0)}
    with pytest.raises(ValueError, match=r"eps must be positive.*1e-05 .*primary.* 0\.0 .*cheap"):
        ghost_module(**given, training=True)
    assert torch.isfinite(ghost_module(**given)).all()


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


# --- everything else --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [(1, TypeError), (None, TypeError), ("cuda", ValueError), ("Native", ValueError)],
    ids=str,
)
def test_use_backend(name: Any, kind: type[Exception]) -> None:
    before = backends.requested()
    with pytest.raises(kind, match=f"name must be one of 'auto', .*'eager', got {name!r}"):
        ghost_ops.use_backend(name)
    assert backends.requested() == before


@pytest.mark.parametrize("devices", ["cpu", None, (0,)], ids=str)
def test_status(devices: Any) -> None:
    with pytest.raises(TypeError, match="devices must be a tuple of device types, got"):
        backends.status(devices)


CHOICES = [variable for variable in environment.VARIABLES if variable.choices]


@pytest.mark.parametrize("variable", CHOICES, ids=lambda variable: variable.name)
@pytest.mark.parametrize("value", ["yes", "AUTO", "01"])
def test_environment(
    monkeypatch: pytest.MonkeyPatch, variable: environment.Variable, value: str
) -> None:
    monkeypatch.setenv(variable.name, value)
    allowed = ", ".join(map(repr, variable.choices))
    with pytest.raises(ValueError, match=f"{variable.name}='{value}': expected one of {allowed}"):
        variable.get()


@pytest.mark.parametrize("value", [None, "model", [nn.ReLU()], nn.ReLU], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        ghost_ops.fuse,
        ghost_ops.unfuse,
        ghost_ops.reset_cache,
        ghost_ops.convert_sync_batchnorm,
        lambda model: ghost_ops.graphed(model, torch.zeros(1, 3, 8, 8)),
        lambda model: models.count_macs(model, (1, 3, 8, 8)),
        lambda model: models.load_checkpoint(model, {"weight": torch.zeros(1)}),
    ],
    ids="fuse unfuse reset_cache convert_sync_batchnorm graphed count_macs load_checkpoint".split(),
)
def test_no_model(function: Callable[[Any], object], value: Any) -> None:
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"model must be an nn\.Module, got {kind}"):
        function(value)


@pytest.mark.parametrize("code", [9, -1, "relu", None], ids=str)
def test_activation_code(code: Any) -> None:
    with pytest.raises(ValueError, match=f"code must be from 0 to 8.*got {code!r}"):
        activations.apply(torch.ones(3), code, 0.01)
