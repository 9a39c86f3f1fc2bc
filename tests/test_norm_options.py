"""Promise: every option of a batch norm gives PyTorch's outputs, gradients and statistics.

Momentum, eps, cumulative averages, norms without parameters or running statistics, and a different
norm in each branch.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import Case, Params, make_input, make_module, oracle, reference_like
from module_checks import gradients
from torch import Tensor


def test_cumulative_average(backend: str) -> None:
    case = Case(dtype=torch.float64)
    module = make_module(case)
    for branch in (module.primary_conv, module.cheap_operation):
        branch[1].reset_running_stats()
        branch[1].momentum = None
    batches = [make_input(case, seed) for seed in range(1, 5)]
    stats = [oracle(Params.of(module).to(), x, case, True) for x in batches]
    for i, x in enumerate(batches, 1):
        module(x)
        assert module.primary_conv[1].num_batches_tracked == i
        assert module.cheap_operation[1].num_batches_tracked == i
        unbiased = 84 / 83  # 2 x 6 x 7 values per channel
        for name, key, factor in (
            ("mean", "running_mean", 1.0),
            ("var", "running_var", unbiased),
        ):
            for bn, which in ((module.primary_conv[1], "1"), (module.cheap_operation[1], "2")):
                want = sum(getattr(s, name + which) for s in stats[:i]) / i * factor
                torch.testing.assert_close(bn.get_buffer(key), want)


@pytest.mark.parametrize("momentum", [0.0, 0.01, 1.0])
def test_momentum(backend: str, momentum: float) -> None:
    case = Case(dtype=torch.float64)
    module, x = make_module(case), make_input(case)
    module.primary_conv[1].momentum = momentum
    module.cheap_operation[1].momentum = 1 - momentum
    p = Params.of(module).to()
    stats = oracle(p, x, case, True)
    module(x)
    for bn, old, mean, m in (
        (module.primary_conv[1], p.bn1.mean, stats.mean1, momentum),
        (module.cheap_operation[1], p.bn2.mean, stats.mean2, 1 - momentum),
    ):
        torch.testing.assert_close(bn.running_mean, (1 - m) * old + m * mean)


@pytest.mark.parametrize("eps", [1e-3, 0.5])
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
def test_eps(backend: str, training: bool, eps: float) -> None:
    case = Case(dtype=torch.float64, act1="silu")
    module, x = make_module(case).train(training), make_input(case)
    module.primary_conv[1].eps = eps
    module.cheap_operation[1].eps = eps / 3
    grad = torch.ones(2, 8, 6, 7, dtype=torch.float64)
    p = Params.of(module).to()
    want_out, want = gradients(p, x, grad, case, training, oracle)
    out = module(x)
    torch.testing.assert_close(out, want_out)
    out.backward(grad)
    for name, param in Params.of(module).tensors().items():
        torch.testing.assert_close(param.grad, want[name], rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 3])
def test_without_affine(backend: str, k: int, ratio: int, training: bool) -> None:
    case = Case(dtype=torch.float64, act1="silu", act2="silu", ratio=ratio, k=k)
    module, x = make_module(case).train(training), make_input(case)
    for branch in (module.primary_conv, module.cheap_operation):
        bn = torch.nn.BatchNorm2d(branch[1].num_features, affine=False, dtype=torch.float64)
        bn.running_mean.copy_(branch[1].running_mean)
        bn.running_var.copy_(branch[1].running_var)
        branch[1] = bn.train(training)
    x.requires_grad_()
    grad = make_input(case.replace(c=8), extra_seed=3)
    want_out, want = gradients(Params.of(module).to(), x, grad, case, training, oracle)
    out = module(x)
    torch.testing.assert_close(out, want_out)
    out.backward(grad)
    assert_gradients(module, x, want)


def assert_gradients(module: torch.nn.Module, x: Tensor, want: dict[str, Tensor]) -> None:
    got = {"x": x.grad, **{name: t.grad for name, t in Params.of(module).tensors().items()}}
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("which", ["primary_conv", "cheap_operation", "both"])
def test_without_running_statistics(backend: str, which: str, training: bool) -> None:
    """A batch norm without running statistics uses the batch's in evaluation, too."""
    case = Case(dtype=torch.float64, act1="silu", act2="silu")
    module, x = make_module(case), make_input(case).requires_grad_()
    for name in ("primary_conv", "cheap_operation"):
        if which in (name, "both"):
            branch = getattr(module, name)
            bn = torch.nn.BatchNorm2d(
                branch[1].num_features, track_running_stats=False, dtype=torch.float64
            )
            bn.load_state_dict({"weight": branch[1].weight, "bias": branch[1].bias})
            branch[1] = bn
    module.train(training)
    grad = make_input(case.replace(c=8), extra_seed=3)
    copied = copy.deepcopy(module)
    want_x = x.detach().clone().requires_grad_()
    want = reference_like(copied)(want_x)
    want.backward(grad)
    out = module(x)
    torch.testing.assert_close(out, want)
    out.backward(grad)
    torch.testing.assert_close(x.grad, want_x.grad, rtol=1e-8, atol=1e-9)
    assert_same_state(module, copied)


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-9, msg=name)
    for (name, p), q in zip(a.named_buffers(), b.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


KINDS = ("batch", "frozen", "untracked", "untracked later", "average", "none")


def set_norm(branch: torch.nn.Sequential, kind: str) -> None:
    """Change the batch norm of a branch as fine-tuning recipes do."""
    bn = branch[1]
    if kind == "frozen":
        bn.eval()
    elif kind == "untracked":
        branch[1] = torch.nn.BatchNorm2d(
            bn.num_features, track_running_stats=False, dtype=bn.weight.dtype
        )
    elif kind == "untracked later":
        bn.track_running_stats = False
    elif kind == "average":
        bn.momentum = None
    elif kind == "none":
        branch[1] = torch.nn.Identity()


@pytest.mark.usefixtures("unsaid")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("cheap", KINDS)
@pytest.mark.parametrize("primary", KINDS)
def test_every_pair_of_norms(backend: str, primary: str, cheap: str, bias: bool) -> None:
    """Two steps give the numbers of the layers, without a warning that the layers run."""
    case = Case(dtype=torch.float64, act1="silu", act2="silu")
    module = make_module(case)
    for branch, kind in ((module.primary_conv, primary), (module.cheap_operation, cheap)):
        set_norm(branch, kind)
        if bias:
            branch[0].bias = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    copied, grad = copy.deepcopy(module), make_input(case.replace(c=8), extra_seed=3)
    for step in range(2):
        x = make_input(case, step).requires_grad_()
        want_x = x.detach().clone().requires_grad_()
        want = reference_like(copied)(want_x)
        want.backward(grad)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = module(x)
        torch.testing.assert_close(out, want)
        out.backward(grad)
        torch.testing.assert_close(x.grad, want_x.grad, rtol=1e-8, atol=1e-9)
        assert_same_state(module, copied)
