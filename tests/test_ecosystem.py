"""Fused models among PyTorch's tools: compile, export, ONNX, mixed precision."""

from __future__ import annotations

import concurrent.futures
import copy
import importlib.util
import io
import os
import shutil
import tempfile
import warnings

import pytest
import torch
import torch.nn.functional as F
from ghost_forms import GhostConv, Sliced, randomize
from helpers import same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrize

import ghost_ops
from ghost_ops import FusedGhostBottleneck, FusedGhostModule

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def small() -> nn.Module:
    """A network with both kinds of fused modules, in training mode."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        FusedGhostBottleneck(8, 16, 8), FusedGhostBottleneck(8, 20, 12, stride=2, se_ratio=0.25),
        GhostConv(12, 16), Sliced(16, 16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    randomize(net)
    ghost_ops.fuse(net)
    assert isinstance(net[5], GhostConv)
    assert type(net[5]) is not GhostConv
    return net


def plain(net: nn.Module) -> nn.Module:
    other = copy.deepcopy(net)
    ghost_ops.unfuse(other)
    return other


def images(n: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, 18, 16, generator=torch.Generator().manual_seed(n)).to(dtype)


def step(net: nn.Module, x: Tensor, model: nn.Module) -> list[Tensor]:
    """Output, gradients and statistics of one training step; ``net`` computes for ``model``."""
    out = net(x)
    grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    return [out.detach(), *grads, *(b.clone().to(out.dtype) for b in model.buffers())]


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-7) -> None:
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# --- torch.compile, export, packages ----------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_training(native: str) -> None:
    """Fullgraph, with a batch that changes: compiled once for one, and once for all others."""
    model = small().double()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (3, 5, 7):
        x = images(n, torch.float64)
        close(step(compiled, x, model), step(other, x, other))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_evaluation(native: str) -> None:
    model = small().double().eval()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for n in (3, 5, 7):
            x = images(n, torch.float64)
            close([compiled(x)], [other(x)])
        model[5].cv1.conv.weight.mul_(1.5)
        other[5].cv1.conv.weight.mul_(1.5)
        close([compiled(x)], [other(x)])


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_inductor(native: str) -> None:
    model = small()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    close(step(compiled, images(), model), step(other, images(), other), 1e-4)


def test_export_with_a_dynamic_batch(native: str) -> None:
    model = small().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
        for n in (3, 7):
            close([program.module()(images(n))], [model(images(n))], 1e-5)
    names = {str(node.target) for node in program.graph.nodes}
    assert any("ghost_apply" in name for name in names)


@pytest.mark.slow
def test_aot_inductor_package(native: str) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    model = small().eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(model, (images(),))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=os.path.join(folder, "model.pt2")
        )
        runner = torch._inductor.aoti_load_package(path)
        close([runner(images())], [model(images())], 1e-4)


@pytest.mark.parametrize("how", ["unfuse", "eager backend"])
def test_onnx(how: str) -> None:
    """Through standard operators only, so that any runtime takes it."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    import onnxruntime

    model = small().eval()
    x = images()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = model(x)
        exported = plain(model) if how == "unfuse" else model
        context = ghost_ops.use_backend("auto" if how == "unfuse" else "eager")
        with context:
            program = torch.onnx.export(exported, (x,), dynamo=True, verbose=False)
    domains = {node.domain for node in program.model.graph}
    assert domains <= {"", "ai.onnx"}, domains
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_cuda_graph() -> None:
    model = small().cuda().eval()
    x = images().cuda()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        x.copy_(images(3).cuda() * 2)
        graph.replay()
        torch.testing.assert_close(out, model(x))


# --- training ---------------------------------------------------------------------------------


def test_autocast_and_grad_scaler(native: str) -> None:
    """Steps with a scaled loss in bfloat16 go where the unfused network's go."""
    losses = []
    model = small()
    for net in (model, plain(model)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        curve = []
        for i in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(images(8))
            loss = F.cross_entropy(logits.float(), torch.arange(8) % 4)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
            curve.append(loss.item())
            assert scaler.get_scale() == 2.0**10, f"step {i} was skipped"
        losses.append(torch.tensor(curve))
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05, atol=0.05)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(native: str, reentrant: bool) -> None:
    model = small().double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0  # the second forward would move the statistics twice
    x = images(dtype=torch.float64).requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    out = torch.utils.checkpoint.checkpoint_sequential(model, 3, x, use_reentrant=reentrant)
    out.square().sum().backward()
    close([x.grad, *(p.grad for p in model.parameters())], list(want))


def test_running_statistics_under_checkpointing(native: str) -> None:
    """With early stop the last module inside is not recomputed: it has all that backward needs."""
    counts = []
    for early, fuse in ((True, True), (False, True), (True, False)):
        model = nn.Sequential(Sliced(3, 8), Sliced(8, 8))
        if fuse:
            ghost_ops.fuse(model)
        with torch.utils.checkpoint.set_checkpoint_early_stop(early):
            out = torch.utils.checkpoint.checkpoint(model, images(), use_reentrant=False)
            out.sum().backward()
        norms = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        counts.append([int(bn.num_batches_tracked) for bn in norms])
    assert counts == [[2, 2, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]]


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return (w + w.transpose(-1, -2)) / 2


def test_parametrised_weights(native: str) -> None:
    model = randomize(nn.Sequential(GhostConv(3, 8), Sliced(8, 8))).double()
    parametrize.register_parametrization(model[0].cv2.conv, "weight", Symmetric())
    torch.nn.utils.parametrizations.weight_norm(model[1].primary_conv[0])
    fused = copy.deepcopy(model)
    assert {"0", "1"} <= {e.name for e in ghost_ops.fuse(fused).swapped}
    x = images(dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(step(fused, x, fused), step(model, x, model), 1e-8)
        with torch.no_grad():
            for net in (fused.eval(), model.eval()):
                net(x)
                net[0].cv2.conv.parametrizations.weight.original.mul_(1.5)
            close([fused(x)], [model(x)])


def test_parametrised_after_fuse(native: str) -> None:
    model = randomize(nn.Sequential(GhostConv(3, 8))).double().eval()
    fused = copy.deepcopy(model)
    ghost_ops.fuse(fused)
    x = images(dtype=torch.float64)
    with torch.no_grad():
        fused(x)
        for net in (fused, model):
            parametrize.register_parametrization(net[0].cv2.conv, "weight", Symmetric())
        close([fused(x)], [model(x)])


def test_moving_average_of_a_model(native: str) -> None:
    model = small().double()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.7), use_buffers=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for i in range(3):
        model(images(4 + i, torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        with torch.no_grad():
            x = images(2, torch.float64)
            twin = plain(average.module).eval()
            close([average.eval()(x)], [twin(x)])
    with torch.no_grad():
        assert (average(x) - model.eval()(x)).abs().max() > 1e-6


def test_state_dict_files(native: str) -> None:
    model, file = small(), io.BytesIO()
    model(images())
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh, unfused = small(), plain(small())
    for net in (fresh, unfused):
        assert not any(net.load_state_dict(state))
    with torch.no_grad():
        x = images(2)
        assert same_bits(fresh.eval()(x), model.eval()(x))
        close([unfused.eval()(x)], [model(x)], 1e-4)


def test_threads_share_a_model(native: str) -> None:
    model = small().eval()
    inputs = [images(n) for n in range(1, 9)]
    with torch.no_grad():
        want = [model(x) for x in inputs]
    fresh = copy.deepcopy(model)  # its caches are empty: the threads fill them

    def work(x: Tensor) -> Tensor:
        with torch.no_grad():
            return fresh(x)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, expected in zip(pool.map(work, inputs), want, strict=True):
                assert same_bits(got, expected)


@pytest.mark.slow
def test_more_elements_than_int32(native: str) -> None:
    """An output of 2^31 + elements: its last image is what it is alone."""
    module = randomize(FusedGhostModule(1, 4)).to(torch.bfloat16).eval()
    n = 2**31 // (4 * 512 * 512) + 1
    one = torch.randn(1, 1, 512, 512).bfloat16()
    try:
        x = torch.zeros(n, 1, 512, 512, dtype=torch.bfloat16)
        x[-1:] = one
        with torch.no_grad():
            out = module(x)
    except RuntimeError as error:
        if "memory" in str(error):
            pytest.skip(f"not enough memory: {error}")
        raise
    assert out.numel() > 2**31
    with torch.no_grad():
        assert same_bits(out[-1:], module(one))
        assert same_bits(out[:1], module(x[:1]))
