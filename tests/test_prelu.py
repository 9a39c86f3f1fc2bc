"""Promise: PReLU activations run fused, in inference and in training.

A PReLU has one slope, or one per channel as in cavaface's GhostNets.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ghost_forms import Sliced, randomize
from helpers import (
    DTYPES,
    LAYOUTS,
    LOW,
    Case,
    Params,
    assert_close,
    close,
    make_input,
    make_module,
    ops_of,
)
from module_checks import function_arguments
from operator_cases import apply_packed
from torch import Tensor, nn
from twins import unfused_copy

import ghost_ops
from ghost_ops import FusedGhostModule
from ghost_ops.activations import PRELU

# PReLU in either branch or both, in shapes that the kernels tile in different ways.
CASES = [
    Case(2, 5, 6, 7, 8, act1="prelu", act2="prelu"),
    Case(3, 40, 7, 7, 30, act1="prelu", act2="none"),
    Case(2, 9, 9, 17, 23, ratio=3, d=5, act1="relu", act2="prelu"),
    Case(1, 6, 30, 56, 12, stride=2, act1="silu", act2="prelu"),
    Case(2, 4, 5, 6, 6, ratio=1, act1="prelu", act2="none"),
    Case(1, 3, 66, 66, 130, act1="prelu", act2="prelu"),
]


def slopes_for(case: Case) -> list[Tensor | None]:
    """The slopes of both branches, with negative ones and ones above 1."""
    gen = torch.Generator().manual_seed(5)
    return [
        torch.randn(size, generator=gen).to(case.dtype) if act == "prelu" else None
        for act, size in ((case.act1, case.m), (case.act2, case.g))
    ]


def formula(p: Params, x: Tensor, case: Case, slopes: list[Tensor | None]) -> Tensor:
    """The module in evaluation, in the dtype of its arguments."""

    def act(t: Tensor, name: str, slope: Tensor | None) -> Tensor:
        if slope is not None:
            return torch.where(t > 0, t, slope[:, None, None] * t)
        return {"none": lambda v: v, "relu": F.relu, "silu": F.silu}[name](t)

    def norm(t: Tensor, n: object) -> Tensor:
        return F.batch_norm(t, n.mean, n.var, n.gamma, n.beta, False, 0.0, n.eps)

    y = act(norm(F.conv2d(x, p.w1, None, case.stride), p.bn1), case.act1, slopes[0])
    if case.ratio == 1:
        return y
    v = F.conv2d(y, p.w2, None, 1, case.d // 2, 1, case.m)
    return torch.cat([y, act(norm(v, p.bn2), case.act2, slopes[1])], 1)[:, : case.oup]


def params(case: Case) -> Params:
    return Params.of(make_module(case.replace(act1="none", act2="none")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(every_isa: str, case: Case, layout: str, dtype: torch.dtype) -> None:
    case = case.replace(layout=layout, dtype=dtype)
    p, x, slopes = params(case), make_input(case), slopes_for(case)
    wide = [None if t is None else t.double() for t in slopes]
    with torch.no_grad():
        got = apply_packed(every_isa, case, p, x, slopes=slopes)
        want = formula(p.to(torch.float64), x.double(), case, wide)
        assert_close(got, want, formula(p, x, case, slopes))
    fmt = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    assert got.is_contiguous(memory_format=fmt)


def test_nan_and_signed_infinity(every_isa: str) -> None:
    case = Case(1, 4, 5, 6, 4, ratio=1, act1="prelu", act2="none")
    p, slopes = params(case), [torch.tensor([0.5, -0.5, 0.0, 2.0]), None]
    p.w1 = torch.eye(4)[:, :, None, None]
    p.bn1.gamma = p.bn1.beta = p.bn1.mean = p.bn1.var = None
    x = make_input(case)
    x[0, :, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    # Without a primary convolution, whose products would spread the NaN to other channels.
    ops, b2 = ops_of(every_isa), p.bn2
    first = (None, torch.ones(4), torch.zeros(4), None, None, 0.0)
    second = (p.w2.detach(), b2.gamma, b2.beta, b2.mean, b2.var, b2.eps)
    packed = ops.ghost_pack(*first, *second, *slopes)
    got = ops.ghost_apply(x, packed, None, None, 4, 4, 1, 3, 1, PRELU, 0.0, 0, 0.0, False)
    torch.testing.assert_close(got, F.prelu(x, slopes[0]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("which", [0, 1])
def test_slopes_of_the_wrong_size(backend: str, which: int) -> None:
    case = CASES[0]
    slopes = slopes_for(case)
    slopes[which] = torch.ones(case.m + 1)
    with pytest.raises(RuntimeError, match=f"prelu{which + 1} must have {case.m} elements, got 5"):
        apply_packed(backend, case, params(case), make_input(case), slopes=slopes)


def test_slopes_that_are_missing(backend: str) -> None:
    case = CASES[0]
    with pytest.raises(RuntimeError, match="packed"):
        apply_packed(
            backend, case, params(case), make_input(case), slopes=[slopes_for(case)[0], None]
        )


def test_training_operators_need_slopes(backend: str) -> None:
    case = CASES[0]
    p, x, ops = params(case), make_input(case), ops_of(backend)
    first = (p.w1, p.bn1.gamma, p.bn1.beta, None, None, p.bn1.eps, None)
    second = (p.w2, p.bn2.gamma, p.bn2.beta, None, None, p.bn2.eps, None)
    numbers = (case.oup, 1, PRELU, 0.0, 0, 0.0, False)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"slopes|prelu1 must be given"):
        ops.ghost_train_forward(x, *first, *second, *numbers)


# --- modules ----------------------------------------------------------------------------------


def trained(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(x)
    out.backward(grad.to(out.dtype))
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads, **dict(module.named_buffers())}


def of_case(case: Case, one: bool) -> nn.Module:
    """A module with PReLUs of one slope, or of one slope per channel.

    In low precision some pre-activations round to the other side of 0. Slopes near 1 keep the error
    small.
    """
    silu = case.replace(act1="silu", act2="silu")
    module = make_module(silu)
    for branch, channels in ((module.primary_conv, case.m), (module.cheap_operation, case.g)):
        branch[2] = nn.PReLU(1 if one else channels, dtype=case.dtype)
    spread(module)
    if case.dtype in LOW:
        with torch.no_grad():
            for branch in (module.primary_conv, module.cheap_operation):
                branch[2].weight.mul_(0.4).add_(1.0)
    return module


TRAINED = [
    Case(2, 5, 6, 7, 8),
    Case(3, 40, 7, 7, 30),
    Case(2, 9, 9, 17, 23, ratio=3, d=5),
    Case(2, 6, 30, 31, 12, stride=2),
    Case(4, 8, 33, 32, 7),
]


@pytest.mark.parametrize("frozen", ["", "primary_conv", "cheap_operation", "both"])
@pytest.mark.parametrize("one", [True, False], ids=["one slope", "a slope a channel"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_training(
    every_isa: str, case: Case, dtype: torch.dtype, layout: str, one: bool, frozen: str
) -> None:
    """Outputs, gradients (the slopes' too) and statistics of one step, norms frozen or not."""
    case = case.replace(dtype=dtype, layout=layout)
    module, x = of_case(case, one).train(), make_input(case)
    for name in ("primary_conv", "cheap_operation"):
        getattr(module, name)[1].train(frozen not in (name, "both"))
    double, eager = unfused_copy(module).double(), unfused_copy(module)
    h, w = ((size - 1) // case.stride + 1 for size in (case.h, case.w))
    grad = make_input(case.replace(c=case.oup, h=h, w=w), 3)
    want = trained(double, x.double(), grad)
    # PyTorch's sums in channels_last lose digits: the error allowed is that of its NCHW.
    peer = trained(eager, x.contiguous(), grad.contiguous())
    got = trained(module, x, grad)
    low = dtype in LOW
    count = grad[:, 0].numel()
    for name, value in got.items():
        if not value.is_floating_point():
            assert torch.equal(value, want[name])
            continue
        assert value.dtype is peer[name].dtype
        # Terms of sums over all pixels cancel by chance, and a pre-activation near 0 may round to
        # the other side.
        terms = count * case.m if value.numel() == 1 else count
        scale = torch.tensor(max(terms**0.5, terms / 32)) if value.dim() == 1 else None
        assert_close(
            value, want[name], peer[name], name, rms=low, slack=8, scale=scale, dtype=dtype
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_values_in_training(every_isa: str, dtype: torch.dtype) -> None:
    """Gradients at NaN, infinity and zero are those of PyTorch's PReLU, with frozen statistics."""
    case = Case(1, 4, 3, 16, 8, dtype=dtype, d=1)
    module = of_case(case, False).eval()
    with torch.no_grad():
        module.primary_conv[0].weight.copy_(torch.eye(4)[:, :, None, None])
        for branch in (module.primary_conv, module.cheap_operation):
            branch[1].running_mean.zero_()
            branch[1].bias.zero_()
    x = torch.ones(1, 4, 3, 16, dtype=dtype)
    for i, value in enumerate((0.0, -0.0, float("inf"), -float("inf"), float("nan"))):
        x[0, :, 0, i] = value
    x[0, 2:, 0, 2:] = -1.0  # channels 2 and 3 stay finite
    grad = torch.ones(1, 8, 3, 16, dtype=dtype)
    want, got = trained(unfused_copy(module), x, grad), trained(module, x, grad)
    for name, value in got.items():
        torch.testing.assert_close(
            value,
            want[name],
            equal_nan=True,
            rtol=0.02,
            atol=0.02,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def spread(module: nn.Module) -> nn.Module:
    """Give every PReLU random slopes."""
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.PReLU):
                child.weight.copy_(torch.randn(child.weight.shape, generator=gen) * 0.5)
    return module


def own(oup: int = 7) -> nn.Module:
    return spread(randomize(FusedGhostModule(6, oup, activation="prelu")))


def one_slope() -> nn.Module:
    return spread(randomize(FusedGhostModule(6, 8, activation=nn.PReLU())))


def one_branch() -> nn.Module:
    return spread(randomize(FusedGhostModule(6, 8, cheap_activation="prelu")))


def library_primary() -> nn.Module:
    return spread(randomize(FusedGhostModule(6, 8, kernel_size=3, stride=2, activation="prelu")))


def cavaface() -> nn.Module:
    module = randomize(Sliced(6, 8, act1=nn.PReLU(4), act2=nn.PReLU(4)))
    ghost_ops.fuse(spread(module))
    return module


MODULES = [own, one_slope, one_branch, library_primary, cavaface]
EACH_MODULE = pytest.mark.parametrize("make", MODULES, ids=lambda f: f.__name__)


def image(dtype: torch.dtype = torch.float32, layout: str = "nchw") -> Tensor:
    return make_input(Case(3, 6, 8, 7, dtype=dtype, layout=layout))


@pytest.fixture
def nothing_unfused() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("nothing_unfused")
@pytest.mark.parametrize("layout", LAYOUTS)
@EACH_MODULE
def test_inference(backend: str, make: Callable, layout: str) -> None:
    module = make().eval().double()
    plain, x = unfused_copy(module), image(torch.float64, layout)
    with torch.no_grad():
        for _ in range(2):  # packing, then from packed weights
            torch.testing.assert_close(module(x), plain(x), rtol=1e-9, atol=1e-10)
        for p, q in zip(module.parameters(), plain.parameters(), strict=True):
            for t in (p, q):
                t.mul_(1.25).add_(0.1)
            torch.testing.assert_close(module(x), plain(x), rtol=1e-9, atol=1e-10)
    frozen, other = module.requires_grad_(False), plain.requires_grad_(False)
    torch.testing.assert_close(frozen(x), other(x), rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("nothing_unfused")
@EACH_MODULE
def test_slopes_replaced(backend: str, make: Callable) -> None:
    module, x = make().eval(), image()
    with torch.no_grad():
        before = module(x)
        act = next(m for m in module.modules() if isinstance(m, nn.PReLU))
        act.weight = nn.Parameter(act.weight + 1.0)
        after = module(x)
        close(after, unfused_copy(module)(x))
        assert not torch.equal(before, after)
        act.weight.data = act.weight.data * 2  # another memory
        close(module(x), unfused_copy(module)(x))


@pytest.mark.usefixtures("nothing_unfused")
@pytest.mark.parametrize("mode", ["train", "eval"])
@EACH_MODULE
def test_gradients(backend: str, make: Callable, mode: str) -> None:
    module = make().double().train(mode == "train")
    plain, results = unfused_copy(module), []
    for model in (module, plain):
        x = image(torch.float64).requires_grad_()
        out = model(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("nothing_unfused")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EACH_MODULE
def test_low_precision_and_autocast(backend: str, make: Callable, dtype: torch.dtype) -> None:
    module = make().eval()
    want = unfused_copy(module).double()(image(torch.float64)).detach()
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            got = module(image())
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), want, rtol=0.06, atol=0.06)
        got = module.to(dtype)(image(dtype))
        torch.testing.assert_close(got.double(), want, rtol=0.06, atol=0.06)


def test_constructor() -> None:
    module = FusedGhostModule(6, 7, ratio=3, activation="prelu", dtype=torch.float64)
    first, second = module.primary_conv[2], module.cheap_operation[2]
    assert (first.num_parameters, second.num_parameters) == (3, 6)
    assert first.weight.dtype is torch.float64
    given = nn.PReLU(4, init=0.1)
    module = FusedGhostModule(6, 8, activation=given, dtype=torch.float64)
    assert module.primary_conv[2].weight is not given.weight
    assert module.primary_conv[2].weight.dtype is torch.float64
    assert given.weight.dtype is torch.float32
    with pytest.raises(ValueError, match="prelu"):
        FusedGhostModule(6, 8, activation="tanh")
    for activation in ("prelu", nn.PReLU()):
        with pytest.raises(ValueError, match="activation"):
            ghost_ops.ghost_module(
                torch.randn(1, 4, 3, 3), None, torch.randn(4, 1, 3, 3), activation=activation
            )


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
def test_function_of_tensors(backend: str, training: bool) -> None:
    """``ghost_module`` with slopes as arguments, against the module's layers."""
    plain, x = unfused_copy(own(8).double().train(training)), image(torch.float64)
    p, grad = Params.of(plain), make_input(Case(3, 8, 8, 7, dtype=torch.float64), 3)
    slopes = [plain.primary_conv[2].weight, plain.cheap_operation[2].weight]
    wanted = [p.w1, p.w2, p.bn1.gamma, *slopes]
    arguments = function_arguments(p) | {"training": training, "activation": "prelu"}
    arguments |= {name: t.clone() for name, t in arguments.items() if "running" in name}
    weights = {"activation_weight": slopes[0], "cheap_activation_weight": slopes[1]}
    got = ghost_ops.ghost_module(x, p.w1, p.w2, **arguments, **weights)
    want = plain(x)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(out, wanted, grad) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    shared = ghost_ops.ghost_module(x, p.w1, p.w2, **arguments, activation_weight=slopes[0])
    twice = ghost_ops.ghost_module(
        x, p.w1, p.w2, **arguments, activation_weight=slopes[0], cheap_activation_weight=slopes[0]
    )
    assert torch.equal(shared, twice)
    before = arguments["primary_running_mean"].clone()
    three = torch.ones(3, dtype=torch.float64)
    for wrong, error in ((three, RuntimeError), (None, ValueError), (0.1, TypeError)):
        with pytest.raises(error, match="activation_weight"):
            ghost_ops.ghost_module(x, p.w1, p.w2, **arguments, activation_weight=wrong)
    assert torch.equal(arguments["primary_running_mean"], before)


@pytest.mark.parametrize("replaced", [False, True], ids=["the layer", "its weight"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("which", ["primary_conv", "cheap_operation"])
def test_a_module_with_slopes_of_the_wrong_size(
    backend: str, which: str, training: bool, grad: bool, replaced: bool
) -> None:
    """PyTorch's exception; the running statistics do not change."""
    module = own(8).train(training)
    branch = getattr(module, which)
    if replaced:
        branch[2].weight = nn.Parameter(torch.ones(3))
    else:
        branch[2] = nn.PReLU(3)
    before = [b.clone() for b in module.buffers()]
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="shape"):
        module(image())
    for old, new in zip(before, module.buffers(), strict=True):
        assert torch.equal(old, new)


def test_report_says_what_is_fused() -> None:
    model = nn.Sequential(Sliced(6, 8, act1=nn.PReLU(4), act2=nn.PReLU()))
    (entry,) = ghost_ops.report(ghost_ops.fuse(model)).entries
    assert entry.state == "fused"
    assert entry.detail.endswith(", PReLU")


class Bottleneck(nn.Module):
    """Two Ghost modules and a shortcut, with PReLUs as in cavaface."""

    def __init__(self, act_after_dw: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            Sliced(6, 12, act1=nn.PReLU(6), act2=nn.PReLU(6)),
            nn.Sequential(
                nn.Conv2d(12, 12, 3, 2, 1, groups=12, bias=False),
                nn.BatchNorm2d(12),
                nn.PReLU(12) if act_after_dw else nn.Sequential(),
            ),
            Sliced(12, 8, act1=nn.Sequential(), act2=nn.Sequential()),
        )
        self.shortcut = nn.Sequential(
            *(nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False), nn.BatchNorm2d(6)),
            *(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


@pytest.mark.usefixtures("nothing_unfused")
@pytest.mark.parametrize("act_after_dw", [False, True])
def test_bottlenecks(backend: str, act_after_dw: bool) -> None:
    """Fused as a whole if only its Ghost modules have PReLUs, else its Ghost modules alone."""
    plain = spread(randomize(Bottleneck(act_after_dw))).eval()
    fused, x = copy.deepcopy(plain), image()
    report = ghost_ops.report(ghost_ops.fuse(fused))
    assert [e.state for e in report.entries if e.kind == "Sliced"] == ["fused", "fused"]
    whole = next(e for e in report.entries if e.kind == "Bottleneck")
    assert whole.state == ("left" if act_after_dw else "fused")
    assert ("only Ghost modules compute" in whole.detail) == act_after_dw
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)
        for model in (fused, plain):
            model.conv[0].primary_conv[2].weight.mul_(-3)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


def test_compiled_inference(backend: str) -> None:
    torch.compiler.reset()
    for make in (own, cavaface):
        module = make().eval()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            close(compiled(image()), unfused_copy(module)(image()))


@pytest.mark.parametrize("frozen", [False, True], ids=["", "first norm frozen"])
def test_compiled_training(backend: str, frozen: bool) -> None:
    torch.compiler.reset()
    for make in (own, one_slope):
        module = make().train()
        module.primary_conv[1].train(not frozen)
        plain = unfused_copy(module)
        x, oup = image(), module.oup
        grad = make_input(Case(3, oup, 8, 7), 3)
        want = trained(plain, x, grad)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x = x.clone().requires_grad_()
        out = compiled(x)
        out.backward(grad)
        close(out, want["out"])
        close(x.grad, want["x"])
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-4)
        for name, b in module.named_buffers():
            close(b, want[name], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(backend: str, dtype: torch.dtype) -> None:
    """Slopes and their gradients stay float32."""
    module, grad = own(8).train(), make_input(Case(3, 8, 8, 7), 3)
    want = trained(unfused_copy(module).double(), image(torch.float64), grad.double())
    with torch.autocast("cpu", dtype):
        out = module(image())
    assert out.dtype is dtype
    out.backward(grad.to(dtype))
    for name, p in module.named_parameters():
        assert p.grad.dtype is torch.float32
        scale = want[name].abs().max().item()
        torch.testing.assert_close(p.grad.double(), want[name], rtol=0.1, atol=0.1 * scale)
