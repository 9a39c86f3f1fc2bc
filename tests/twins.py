"""Fused models and their plain twins, and the comparison of the two.

The plain twin is a copy made before ``fuse``. Outputs, gradients, buffers and hook calls are
compared in float64. ``FAMILIES`` are the models: Ghost modules in every form, our own modules,
bottlenecks and a small GhostNet. All take 6 channels.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ghost_forms import FORMS, GhostConv, Sliced, randomize
from torch import Tensor, nn

import ghost_ops
from ghost_ops import FusedGhostBottleneck, FusedGhostModule
from ghost_ops.models import GhostNet
from ghost_ops.reference import GhostBottleneck, GhostModule

Seen = dict[str, Any]


# --- the formulas of FORMS, written in other ways ---------------------------------------------


class Flat(nn.Module):
    """Layers without Sequentials, and a functional ReLU."""

    def __init__(self, padding: int | str = 1) -> None:
        super().__init__()
        self.oup = 7
        self.conv1, self.bn1 = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=padding, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        z = F.relu(self.bn2(self.conv2(y)))
        return torch.cat([y, z], 1)[:, : self.oup]


class Functional(nn.Module):
    """Sequentials, each followed by a functional activation."""

    slope = 0.1

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.primary = nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.cheap = nn.Sequential(conv, nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.primary(x), self.slope)
        return torch.cat([y, F.leaky_relu(self.cheap(y), self.slope)], 1)


class Scaled(Sliced):
    """The input is named ``feat``, and forward has an optional argument."""

    def forward(self, feat: Tensor, scale: float = 1.0) -> Tensor:
        y = self.primary_conv(feat)
        return torch.cat([y, self.cheap_operation(y)], 1)[:, : self.out_chs] * scale


class Tail(Sliced):
    """With layers after the concatenation; ``act`` is None or a module."""

    def __init__(self, *tail: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__(6, 8)
        self.out, self.act = nn.Sequential(*tail), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary_conv(x)
        out = self.out(torch.cat([y, self.cheap_operation(y)], 1))
        return out if self.act is None else self.act(out)


def biased() -> nn.Module:
    module = Sliced(6, 8)
    module.primary_conv[0] = nn.Conv2d(6, 4, 1)
    module.cheap_operation[0] = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    return module


def network() -> nn.Module:
    """A GhostNet of two bottlenecks."""
    net = GhostNet(0.25, num_classes=5, dropout=0.0, in_chans=6)
    c, last = net.conv_stem.out_channels, type(net.blocks[-1][0])
    blocks = GhostBottleneck(c, 8, c), GhostBottleneck(c, 12, 8, 5, 2, se_ratio=0.25), last(8, 12)
    net.blocks = nn.Sequential(*(nn.Sequential(block) for block in blocks))
    net.conv_head, net.classifier = nn.Conv2d(12, 16, 1), nn.Linear(16, 5)
    return net


REWRITTEN: dict[str, Callable[[], nn.Module]] = {
    "flat": Flat,
    "flat, padding same": lambda: Flat("same"),
    "functional activation": Functional,
    "biases before batch norms": biased,
    "optional argument": lambda: Scaled(6, 7),
    "identity after": lambda: Tail(nn.Identity()),
    "activation after": lambda: Tail(nn.ReLU(), act=nn.SiLU()),
    "batch norm after": lambda: Tail(nn.BatchNorm2d(8), nn.ReLU()),
    "dropout after": lambda: Tail(nn.Dropout2d(0.0)),
    "PReLU": lambda: Sliced(6, 8, act1=nn.PReLU(4), act2=nn.PReLU()),
}
OURS: dict[str, Callable[[], nn.Module]] = {
    "FusedGhostModule": lambda: GhostModule(6, 8),
    "FusedGhostModule, odd, ratio 3, 5x5": lambda: GhostModule(6, 10, ratio=3, dw_size=5),
}
BOTTLENECKS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: GhostBottleneck(6, 12, 6),
    "bottleneck, gated": lambda: GhostBottleneck(6, 12, 8, 5, se_ratio=0.25),
    "bottleneck, stride 2": lambda: GhostBottleneck(6, 12, 8, stride=2),
    "bottleneck, stride 2, gated": lambda: GhostBottleneck(6, 12, 8, 5, 2, se_ratio=0.25),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {"network": network}
FAMILIES = {**FORMS, **REWRITTEN, **OURS, **BOTTLENECKS, **NETWORKS}


# --- twins, and the comparison of them --------------------------------------------------------


@functools.cache
def made(family: str) -> nn.Module:
    """The plain model of a family in float64. It is cached: a test changes copies only."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(FAMILIES[family]()).double()


def fuse_copy(plain: nn.Module) -> nn.Module:
    fused = copy.deepcopy(plain)
    report = ghost_ops.report(ghost_ops.fuse(fused))
    assert report.in_state("fused"), report
    return fused


def unfused_copy(model: nn.Module) -> nn.Module:
    """The plain model with the same state."""
    other = copy.deepcopy(model)
    ghost_ops.unfuse(other)
    return other


def twins(family: str, training: bool = False) -> tuple[nn.Module, nn.Module]:
    """A fused model and its plain twin, both in training or in evaluation mode."""
    plain = copy.deepcopy(made(family)).train(training)
    if family in OURS:
        return FusedGhostModule.from_reference(copy.deepcopy(plain)), plain
    return fuse_copy(plain), plain


def image(n: int = 3, h: int = 12, w: int = 11, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, h, w, generator=generator, dtype=torch.float64)


def observe(
    model: nn.Module,
    x: Tensor,
    call: Callable[..., Tensor] | None = None,
    *,
    grad: bool = True,
    x_grad: bool = True,
    owner: nn.Module | None = None,
    calls: list | None = None,
) -> Seen:
    """Run a forward, and a backward if the output requires a gradient; return all results.

    Args:
        call: what runs instead of the model, such as its compiled form.
        x_grad: whether the input requires a gradient.
        owner: another model whose gradients and buffers are returned too.
        calls: the list that hooks append to; it is returned and emptied.

    Returns:
        Output, gradients, buffers, state_dict keys and hook calls by name; after an exception only
        its type and message.
    """
    torch.manual_seed(7)
    models = [model] if owner is None else [model, owner]
    for p in (p for m in models for p in m.parameters()):
        p.grad = None
    x = x.clone().requires_grad_(grad and x_grad)
    try:
        with torch.set_grad_enabled(grad):
            out = (model if call is None else call)(x)
            seen: Seen = {"output": out.detach().clone(), "recorded": out.requires_grad}
            if out.requires_grad:
                weights = torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)
                (out * weights).sum().backward()
    except Exception as error:
        if calls is not None:
            calls.clear()
        return {"raised": type(error), "message": str(error)}
    seen["gradient of the input"] = x.grad
    for index, m in enumerate(models):
        seen |= {f"{index}: gradient of {name}": p.grad for name, p in m.named_parameters()}
        seen |= {f"{index}: {name}": b.clone() for name, b in m.named_buffers()}
        seen[f"{index}: keys"] = list(m.state_dict())
    for index, (name, tensors) in enumerate(calls or ()):
        seen[f"call {index}"] = name
        seen |= {f"call {index}, {name}, tensor {i}": t for i, t in enumerate(tensors)}
    if calls is not None:
        calls.clear()
    return seen


def same(got: Seen, want: Seen, *, may_raise: bool = False) -> None:
    """Compare two observations; with ``may_raise``, two exceptions of one type are equal."""
    if "raised" in want and may_raise:
        assert got.get("raised") is want["raised"], (got.get("message"), want["message"])
        return
    assert "raised" not in want, want["message"]
    assert "raised" not in got, got["message"]
    assert list(got) == list(want), sorted(set(got) ^ set(want))
    for key, b in want.items():
        if not isinstance(b, Tensor) or not isinstance(got[key], Tensor):
            assert got[key] == b, key
            continue
        torch.testing.assert_close(
            got[key], b, rtol=1e-8, atol=1e-9, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}"
        )


def agree(fused: nn.Module, plain: nn.Module, **kwargs: Any) -> None:
    """Compare once with gradients, then twice without: the second time weights are cached."""
    for grad in (True, False, False):
        same(*(observe(model, image(), grad=grad) for model in (fused, plain)), **kwargs)


def setting(path: str, make: Callable[[], Any]) -> Callable[[nn.Module], None]:
    """A change that sets the attribute at a dotted path to what ``make`` returns."""
    parent, _, name = path.rpartition(".")
    return lambda model: setattr(model.get_submodule(parent), name, make())


HOOKS = ("forward pre", "forward", "full backward pre", "full backward")


def add_hook(
    module: nn.Module | None,
    kind: str,
    calls: list,
    name: str = "",
    factor: float | None = None,
    names: dict[nn.Module, str] | None = None,
) -> Any:
    """Register a hook that appends its tensors to ``calls``.

    Args:
        module: the module of the hook; None registers a global hook.
        factor: the hook multiplies the tensors by it; None leaves them as they are.
        names: names of the modules, for a global hook.
    """

    def hook(m: nn.Module, *passed: Any) -> Any:
        last = passed[0] if kind == "full backward" else passed[-1]
        flat = (last,) if isinstance(last, Tensor) else last
        where = name if names is None else names.get(m, "another module")
        # PyTorch's compiler calls modules of its own with lists, and global hooks see them.
        tensors = [t.detach().clone() for t in flat if isinstance(t, Tensor)]
        calls.append((f"{kind} hook of {where}", tensors))
        if factor is None:
            return None
        scaled = tuple(None if t is None else t * factor for t in flat)
        return scaled[0] if isinstance(last, Tensor) else scaled

    method = f"{kind.replace(' ', '_')}_hook"
    if module is not None:
        return getattr(module, f"register_{method}")(hook)
    return getattr(nn.modules.module, f"register_module_{method}")(hook)


TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
FEW = ("authors", "Ultralytics", "FusedGhostModule", "bottleneck, stride 2, gated", "network")


# --- a small classifier of our own modules ----------------------------------------------------


def small_network() -> nn.Module:
    """A classifier with both kinds of fused modules, in training mode; it takes ``images()``."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        FusedGhostBottleneck(8, 16, 8),
        FusedGhostBottleneck(8, 20, 12, stride=2, se_ratio=0.25),
        GhostConv(12, 16),
        Sliced(16, 16),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )
    randomize(net)
    ghost_ops.fuse(net)
    assert isinstance(net[5], GhostConv)
    assert type(net[5]) is not GhostConv
    return net


def images(n: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, 18, 16, generator=torch.Generator().manual_seed(n)).to(dtype)


def training_step(net: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> list[Tensor]:
    """Output, gradients and statistics of one step; ``net`` is ``model`` or its compiled form."""
    out = net(x)
    grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    return [out.detach(), *grads, *(b.clone().to(out.dtype) for b in model.buffers())]


def all_close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-7) -> None:
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
