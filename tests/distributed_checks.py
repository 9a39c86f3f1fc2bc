"""A module on two processes against one on the whole batch: what the distributed tests share.

A test calls a function ``check_...(rank, ...)`` in both processes. From the same seed each of them
computes the numbers of one process with the whole batch, and compares its part.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from helpers import autograd_nodes
from processes import WORLD
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def part(rank: int, sizes: tuple[int, int]) -> slice:
    """The images of a process."""
    return slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))


def dtype_of(module: nn.Module) -> torch.dtype:
    """float32 or float64; the latter for a module without tensors."""
    tensors = (*module.parameters(), *module.buffers())
    return next((t.dtype for t in tensors), torch.float64)


def summed(t: Tensor) -> Tensor:
    """The sum over both processes."""
    t = t.clone()
    dist.all_reduce(t)
    return t


def close(got: Tensor, want: Tensor, what: str, tolerance: float | None = None) -> None:
    limit, got = TOLERANCE[got.dtype] if tolerance is None else tolerance, got.to(want.dtype)
    if not want.numel():
        assert got.shape == want.shape, what
        return
    error = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
    assert error <= limit, f"{what}: differs by {error:.1e}"


def compare(
    rank: int, split: nn.Module, whole: nn.Module, x: Tensor, sizes: tuple[int, int], steps: int = 1
) -> set[str]:
    """Training steps of ``split`` on this process's images, of ``whole`` on all of them.

    x in the dtype of ``whole``. Returns the names of the autograd functions of ``split``.
    """
    mine, functions = part(rank, sizes), set()
    dtype = dtype_of(split)
    for _ in range(steps):
        ours, all_of_x = x[mine].to(dtype), x.clone().requires_grad_()
        if not x.is_contiguous():
            ours = ours.contiguous(memory_format=torch.channels_last)
        ours = ours.detach().requires_grad_()
        got, want = split(ours), whole(all_of_x)
        functions = set(autograd_nodes(got))
        close(got, want[mine], "output")
        weights = torch.linspace(-1, 1, want.numel(), dtype=x.dtype).view_as(want).sin()
        for net in (split, whole):
            net.zero_grad()
        (want.square() * weights).sum().backward()
        (got.square() * weights[mine].to(dtype)).sum().backward()
        assert ours.grad is not None
        assert all_of_x.grad is not None
        close(ours.grad, all_of_x.grad[mine], "gradient of the input")
        pairs = zip(split.named_parameters(), whole.named_parameters(), strict=True)
        for (name, p), (_, q) in pairs:
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                close(summed(p.grad), q.grad, f"gradient of {name}")
        with torch.no_grad():
            for p, q in zip(split.parameters(), whole.parameters(), strict=True):
                if q.grad is not None:
                    p -= 0.01 * summed(p.grad)
                    q -= 0.01 * q.grad
    state = whole.state_dict()
    assert list(split.state_dict()) == list(state)
    for name, got in split.state_dict().items():
        if got.is_floating_point():
            close(got, state[name], name)
        else:
            assert torch.equal(got, state[name]), name
        assert torch.equal(summed(got), got * WORLD), f"{name} differs"
    return functions
