"""Promise: ``conv_backward`` of the eager operators avoids a fault of oneDNN, which is still there.

If the first test fails, PyTorch has repaired the fault. Once the oldest supported torch has, delete
``onednn_corrupts``, ``helpers.peer_conv2d``, this file and ``onednn_fault.py``.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from conftest import running
from helpers import Case, make_input, make_module

from ghost_ops.ops.conv_gradient import conv_backward, onednn_corrupts

SCRIPT = pathlib.Path(__file__).with_name("onednn_fault.py")
AVX2 = {**os.environ, "DNNL_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=AVX2, capture_output=True, text=True, check=False)


def test_plain_pytorch_corrupts_its_heap() -> None:
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        pytest.skip("not this processor: the code at fault needs AVX2")
    if not torch.backends.mkldnn.is_available():
        pytest.skip("not this PyTorch: it was built without oneDNN")
    assert run(str(SCRIPT)).returncode < 0, f"torch {torch.__version__} is repaired, see above"


def few_channels() -> None:
    """Training steps of the eager backend in the shapes of the fault."""
    torch.set_num_threads(1)
    kept: list[torch.Tensor] = []  # allocations that a corrupted heap breaks
    for channels in (2, 3, 5, 7):
        case = Case(2, channels, 16, 30, 6, stride=2, layout="nhwc")
        module, x = make_module(case).train(), make_input(case).requires_grad_()
        for i in range(100):
            with running("eager"):
                module(x).sum().backward()
            kept = [*kept[-50:], torch.empty(1 + 37 * i % 2000)]


def test_the_eager_backend_avoids_it() -> None:
    path = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); "
    code = "import test_onednn_fault as t; t.few_channels(); print('whole')"
    done = run("-c", path + code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["whole"]


@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_the_replacement_gives_the_same_gradient(
    stride: tuple[int, int], needs: tuple[bool, bool]
) -> None:
    x = torch.randn(2, 3, 9, 10, requires_grad=True)
    weight = torch.randn(4, 3, 1, 1, requires_grad=True)
    grad = torch.randn(2, 4, -(-9 // stride[0]), -(-10 // stride[1]))
    assert onednn_corrupts(x, weight, stride)
    got = conv_backward(grad, x.detach(), weight.detach(), stride, (0, 0), (1, 1), 1, *needs)
    out = torch.nn.functional.conv2d(x.double(), weight.double(), None, stride)
    wanted = torch.autograd.grad(out, [x, weight], grad.double())
    for have, want, needed in zip(got, wanted, needs, strict=True):
        assert (have is not None) == needed
        if needed:
            torch.testing.assert_close(have, want)
