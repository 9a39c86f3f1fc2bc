"""Promise: if no graph can replace a model, ``graphed`` runs the model itself or raises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ghost_forms import randomize
from graphed_cases import (  # noqa: F401
    MODELS,
    MODULE,
    CpuDevice,
    Net,
    Outputs,
    captured,
    check,
    device,
    image,
    make,
    no_grad,
)
from torch import Tensor, nn

import ghost_ops


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["net", "bottleneck"])
def test_hooks_run(name: str, inside: bool) -> None:
    fast, x, calls = ghost_ops.graphed(make(name), image()), image(), []
    target = next(fast.module.children()) if inside else fast.module
    handle = target.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="has hooks"):
        check(fast, x)
    check(fast, x)
    assert len(calls) == 4 and len(captured()) == 1
    handle.remove()
    check(fast, x)
    check(fast, x)
    assert len(captured()) == 2


def test_global_hooks_run() -> None:
    fast, calls = ghost_ops.graphed(make(), image()), []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.warns(UserWarning, match="hooks on all modules"):
            fast(image())
    finally:
        handle.remove()
    assert calls


def test_training_mode() -> None:
    model = make()
    model.drop.train()
    with pytest.raises(ValueError, match=r"'drop' of model is in training mode.*eval\(\)"):
        ghost_ops.graphed(model, image())
    with pytest.raises(ValueError, match=r"^model is in training mode"):
        ghost_ops.graphed(model.train(), image())
    fast = ghost_ops.graphed(model.eval(), image())
    model.drop.train()
    with pytest.warns(UserWarning, match="a Dropout inside it is in training mode"):
        first = fast(image())
    assert not torch.equal(first, fast(image()))
    model.eval()
    check(fast, image())


def test_capture_that_fails() -> None:
    class Synchronising(Net):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(torch.utils._python_dispatch._get_current_dispatch_mode(), MODULE._Reads):
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            return super().forward(x)

    model = randomize(Synchronising()).double().eval()
    with pytest.warns(UserWarning, match="Synchronising runs without .* capturing. .Said once"):
        fast = ghost_ops.graphed(model, image())
    for _ in range(3):
        check(fast, image())
        check(fast, image(1))
    assert len(captured()) == 2


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (lambda x: (x + 1, object()), "its output has a object"),
        (lambda x: x.to("meta"), "its output has a tensor on meta"),
        (lambda x: x.add_(1), "its forward writes its input"),
    ],
)
def test_outputs_that_no_graph_has(output: Callable[[Tensor], Any], reason: str) -> None:
    with pytest.warns(UserWarning, match=reason):
        fast = ghost_ops.graphed(Outputs(output).eval(), image())
    x = image()
    assert type(fast(x)) is type(output(image()))
    assert reason != "its forward writes its input" or torch.equal(x, image() + 1)


@pytest.mark.parametrize("change", [nn.Conv2d(8, 6, 1), "spectral", "subclass", "script"])
def test_parameters_that_cannot_be_watched(change: Any) -> None:
    model = make()
    if change == "spectral":
        torch.nn.utils.parametrizations.spectral_norm(model.conv).eval()
    elif change == "subclass":
        model.conv.weight = nn.Parameter(torch.Tensor._make_subclass(Odd, model.conv.weight.data))
    elif change == "script":
        model.act = torch.jit.script(model.act)
    else:
        with torch.inference_mode():
            model.conv.weight = nn.Parameter(model.conv.weight * 1)
    with pytest.warns(UserWarning, match="change unnoticed|TorchScript"):
        fast = ghost_ops.graphed(model, image())
    check(fast, image())
    assert not captured()


class Odd(Tensor):
    pass


def test_inputs_that_no_graph_takes() -> None:
    fast = ghost_ops.graphed(make(), image())
    assert fast(image(0)).shape == (0, 6, 9, 10)
    assert type(fast(image().as_subclass(Odd))) is Odd
    torch.testing.assert_close(
        torch.func.vmap(fast)(image()[None]), fast.module(image())[None], rtol=1e-12, atol=1e-12
    )
    torch.func.jvp(fast, (image(),), (image(),))
    torch.func.grad(lambda x: fast(x).sum())(image())
    fast.module.requires_grad_(False)
    traced = torch.jit.trace(lambda x: fast(x), image(), check_trace=False)
    torch.testing.assert_close(traced(image(seed=2)), fast.module(image(seed=2)))
    assert len(captured()) == 1
    for x in (image().float(), image()[:, :5], image().to("meta"), None):
        with pytest.raises(Exception) as own:
            fast.module(x)
        with pytest.raises(own.type) as raised:
            fast(x)
        assert str(raised.value) == str(own.value)
    assert len(captured()) == 1
    check(fast, image())


def test_inside_compile() -> None:
    fast = ghost_ops.graphed(make(), image())
    compiled = torch.compile(lambda x: fast(x) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image(1)), fast.module(image(1)) + 1)
    assert len(captured()) == 1


def test_autograd_is_refused() -> None:
    fast = ghost_ops.graphed(make(), image())
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match=r"torch.no_grad\(\) or torch.inference_mode\(\)"):
            fast(image())
        fast.module.requires_grad_(False)
        check(fast, image())
        with pytest.raises(RuntimeError, match="computes no gradients"):
            fast(image().requires_grad_())
        assert not fast(image()).requires_grad


def test_wrong_arguments() -> None:
    model, x = make(), image()
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got function"):
        ghost_ops.graphed(lambda x: x, x)
    with pytest.raises(TypeError, match="example must be a Tensor, got list"):
        ghost_ops.graphed(model, [x])
    for number in (0, -1, 2.0, True, "8"):
        with pytest.raises(ValueError, match="max_graphs must be an int of at least 1"):
            ghost_ops.graphed(model, x, max_graphs=number)
        with pytest.raises(ValueError, match="num_warmup_iters must be an int of at least 1"):
            ghost_ops.graphed(model, x, num_warmup_iters=number)
    with pytest.raises(ValueError, match="example is on meta, but model is on cpu"):
        ghost_ops.graphed(model, x.to("meta"))
    model.bn.to("meta")
    with pytest.raises(ValueError, match="on cpu and meta"):
        ghost_ops.graphed(model, x)


def test_the_models_own_error_at_construction() -> None:
    model, x = make(), image()[:, :5]
    with pytest.raises(RuntimeError) as own:
        model(x)
    with pytest.raises(RuntimeError) as raised:
        ghost_ops.graphed(model, x)
    assert str(raised.value) == str(own.value)


def test_copies_are_refused() -> None:
    fast = ghost_ops.graphed(make(), image())
    for function in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            function(fast)
    check(fast, image())


def test_on_the_cpu_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "type", "cuda")
    model = make()
    assert ghost_ops.graphed(model, image()) is model
