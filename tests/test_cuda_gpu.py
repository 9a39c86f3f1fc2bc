"""The CUDA kernels on a GPU: the checks of the emulator, CUDA graphs, streams, several devices.

Skipped without a CUDA device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cuda_cases import World, assert_same, check_eval, check_train
from cuda_driver import SMALL
from cuda_grids import EMPTY, EVAL, FROZEN, MANY_IMAGES, MIXED, STATISTICS, TRAIN, identity
from cuda_statistics_cases import check_empty, check_statistics
from helpers import GHOSTNET, LAYOUTS, Case, make_input, make_module, same_bits

import ghost_ops
from ghost_ops import models

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture
def world() -> Iterator[World]:
    from ghost_ops import backends

    for dtype in (*DTYPES, torch.float64):
        ok, reason = backends.native.can_run("cuda", dtype)
        assert ok, reason
    with backends.use_backend("native"):
        yield World(torch.ops.ghost_ops, "cuda")


@pytest.mark.parametrize("row", EVAL, ids=map(identity, EVAL))
def test_eval(world: World, row: dict[str, Any]) -> None:
    check_eval(world, **row)


@pytest.mark.parametrize("row", TRAIN, ids=map(identity, TRAIN))
def test_train(world: World, row: dict[str, Any]) -> None:
    check_train(world, **row)


@pytest.mark.parametrize("row", FROZEN, ids=map(identity, FROZEN))
def test_frozen_batch_norms(world: World, row: dict[str, Any]) -> None:
    check_train(world, batch_stats=False, **{**row, "keep_u": False})


@pytest.mark.parametrize("row", MIXED, ids=map(identity, MIXED))
def test_mixed_norms_and_slopes(world: World, row: dict[str, Any]) -> None:
    check_train(world, **row)


@pytest.mark.parametrize("name", SMALL)
def test_small(world: World, name: str) -> None:
    SMALL[name](world)


@pytest.mark.parametrize("has_primary", [True, False])
@pytest.mark.parametrize("case", STATISTICS, ids=str)
def test_statistics(world: World, case: Case, has_primary: bool) -> None:
    check_statistics(world, case, has_primary)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "inp", "oup", "relu"), GHOSTNET)
def test_ghostnet_shapes(
    world: World, size: int, inp: int, oup: int, relu: bool, dtype: torch.dtype, layout: str
) -> None:
    act = "relu" if relu else "none"
    check_eval(world, Case(2, inp, size, size, oup, act1=act, act2=act, layout=layout, dtype=dtype))


@pytest.mark.parametrize(("size", "inp", "oup", "relu"), GHOSTNET[::4])
def test_training_of_ghostnet_shapes(
    world: World, size: int, inp: int, oup: int, relu: bool
) -> None:
    act = "silu" if relu else "none"
    case = Case(2, inp, size, size, oup, act1=act, act2=act, layout="nhwc", dtype=torch.float16)
    check_train(world, case, rms=True)


@pytest.mark.parametrize("case", STATISTICS, ids=str)
def test_bits(world: World, case: Case) -> None:
    case = case.replace(n=64, act2="none")
    first = check_train(world, case)
    for _ in range(3):
        assert_same(first, check_train(world, case), "from run to run")


def on_gpu(case: Case) -> tuple[torch.nn.Module, torch.Tensor]:
    return make_module(case).cuda().eval(), make_input(case).cuda()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graph(world: World, layout: str, training: bool) -> None:
    """A captured step replays on new input: no host synchronisation, no memory kept elsewhere."""
    case = Case(8, 40, 14, 14, 80, layout=layout, dtype=torch.float16)
    module, x = on_gpu(case)
    module.train(training)
    x.requires_grad_(training)
    grad = make_input(case.replace(c=case.oup), 3).cuda()

    def step() -> list[torch.Tensor]:
        out = module(x)
        if not training:
            return [out]
        inputs = [x, *module.parameters()]
        return [out, *torch.autograd.grad(out, inputs, grad)]

    with torch.set_grad_enabled(training):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for seed in (11, 12):
            with torch.no_grad():
                x.copy_(make_input(case, seed))
            graph.replay()
            torch.cuda.synchronize()
            replayed = [t.clone() for t in captured]
            for got, want in zip(replayed, step(), strict=True):
                assert same_bits(got.cpu(), want.cpu())


def test_streams(world: World) -> None:
    """Concurrent work on several streams gives the same results: each stream has its scratch."""
    cases = [Case(16, 40, 28, 28, 80 + 8 * i, dtype=torch.float16, act1="silu") for i in range(4)]
    modules = [(on_gpu(case)[0].train(), on_gpu(case)[1].requires_grad_()) for case in cases]

    def step(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        out = module(x)
        return [out, *torch.autograd.grad(out.sum(), [x, *module.parameters()])]

    want = [[t.clone() for t in step(module, x)] for module, x in modules]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(5):
        got = []
        for stream, (module, x) in zip(streams, modules, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got.append(step(module, x))
        torch.cuda.synchronize()
        for a, b in zip(want, got, strict=True):
            for first, second in zip(a, b, strict=True):
                assert same_bits(first.detach().cpu(), second.detach().cpu())


def steps_on(
    stream: torch.cuda.Stream, step: Callable[[int], list[torch.Tensor]], count: int
) -> list[torch.Tensor]:
    """The results of step(0), step(1), ..., queued on a stream without waiting for any."""
    with torch.cuda.stream(stream):
        return [t.detach() for i in range(count) for t in step(i)]


@pytest.mark.parametrize("host_threads", [1, 2])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_streams_at_the_same_time(
    world: World, layout: str, training: bool, host_threads: int
) -> None:
    """The same module on two streams at once gives the same bits as on one after the other.

    Sizes alternate, so that the launches of a kernel differ in shared memory: its limit must not
    fall between the launches of two host threads.
    """
    count, act = 24, "silu"
    sizes = [(56, 56), (7, 7), (28, 20), (14, 14)]
    case = Case(16, 40, 56, 56, 80, layout=layout, dtype=torch.float16, act1=act, act2=act)
    inputs = [make_input(case.replace(h=h, w=w)).cuda() for h, w in sizes]
    grads = [make_input(case.replace(c=case.oup, h=h, w=w), 3).cuda() for h, w in sizes]
    first = make_module(case).cuda().train(training)
    modules = [first, copy.deepcopy(first)]  # running statistics of their own

    def stepping(turn: int) -> Callable[[int], list[torch.Tensor]]:
        def step(i: int) -> list[torch.Tensor]:
            which = (i + turn) % len(sizes)
            module, x = modules[turn], inputs[which]
            with torch.set_grad_enabled(training):  # a setting of each host thread
                if not training:
                    return [module(x)]
                x = x.detach().requires_grad_()
                out = module(x)
                return [out, *torch.autograd.grad(out, [x, *module.parameters()], grads[which])]

        return step

    steps = [stepping(turn) for turn in range(2)]
    default = torch.cuda.current_stream()
    want = [steps_on(default, step, count) for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    if host_threads == 2:
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(steps_on, streams, steps, [count] * 2))
    else:
        got = [[], []]
        for i in range(count):  # in turns: neither stream is ever far ahead
            for turn, (stream, step) in enumerate(zip(streams, steps, strict=True)):
                got[turn] += steps_on(stream, lambda _, step=step, i=i: step(i), 1)
    torch.cuda.synchronize()
    for a, b in zip(want, got, strict=True):
        for before, at_once in zip(a, b, strict=True):
            assert same_bits(before.cpu(), at_once.cpu())


@pytest.mark.parametrize("has_primary", [True, False])
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty_batch(world: World, case: Case, has_primary: bool) -> None:
    check_empty(world, case, has_primary)
    torch.cuda.synchronize()  # a launch that failed is reported here at the latest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_module_on_an_empty_batch(world: World, layout: str, dtype: torch.dtype) -> None:
    case = Case(0, 4, 5, 7, 6, layout=layout, dtype=dtype)
    module, x = on_gpu(case)
    with torch.inference_mode():
        assert module(x).shape == (0, 6, 5, 7)
    before = {name: b.clone() for name, b in module.named_buffers()}
    module.train()
    x.requires_grad_()
    out = module(x)
    assert out.shape == (0, 6, 5, 7)
    out.sum().backward()
    torch.cuda.synchronize()
    assert x.grad.shape == x.shape
    for p in module.parameters():
        assert p.grad is None or not p.grad.any()
    for name, b in module.named_buffers():
        assert torch.equal(b, before[name] + 1 if "num_batches" in name else before[name]), name


@pytest.mark.parametrize("case", MANY_IMAGES, ids=str)
def test_more_images_than_a_grid_has_rows(world: World, case: Case) -> None:
    """A grid has at most 65,535 blocks along y and z."""
    for size in (1, 2):
        many = case.replace(h=size, w=size)
        check_eval(world, many)
        check_train(world, many, keep_u=size == 2)


def test_another_device_than_the_current_one(world: World) -> None:
    """Tensors on cuda:1 while cuda:0 is current: launches, scratch and the limits of shared memory
    belong to the device of the tensors."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, there is {torch.cuda.device_count()}")
    second = World(world.ops, "cuda:1")
    case = Case(8, 40, 28, 28, 80, layout="nhwc", dtype=torch.float16, act1="silu", act2="silu")
    with torch.cuda.device(0):
        for name in SMALL:
            SMALL[name](world)  # raises the limits of cuda:0 first
            SMALL[name](second)
        check_empty(second, EMPTY[0])
        results = []
        for device in ("cuda:1", "cuda:0"):
            module, x = make_module(case).to(device), make_input(case).to(device)
            with torch.inference_mode():
                out = module.eval()(x)
            x.requires_grad_()
            trained = module.train()(x)
            grads = torch.autograd.grad(trained.sum(), [x, *module.parameters()])
            results.append([out, trained.detach(), *grads, *module.buffers()])
            assert all(t.device == torch.device(device) for t in results[-1])
        assert torch.cuda.current_device() == 0
    if torch.cuda.get_device_properties(0).name == torch.cuda.get_device_properties(1).name:
        for a, b in zip(*results, strict=True):
            assert same_bits(a.cpu(), b.cpu())
    else:
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=2e-2, atol=2e-2)


def kernels_of(call: Any) -> list[str]:
    """The names of the kernels that a call launches."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_launch_counts(world: World, layout: str) -> None:
    """Eval: one kernel. Training: 4, the running statistics and counters among them; backward 4.

    Batch-norm parameters are float32, as under autocast: 16-bit ones cost a conversion each.
    """
    case = Case(8, 40, 28, 28, 80, layout=layout, dtype=torch.float16)
    module, x = on_gpu(case)
    for norm in (m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.float()
    with torch.inference_mode():
        assert len(kernels_of(lambda: module(x))) == 1
    module.train()
    x.requires_grad_()
    forward = kernels_of(lambda: module(x))
    assert len([name for name in forward if "update_running" in name]) == 1
    assert len(forward) <= 4
    out = module(x)
    grad = torch.ones_like(out)
    backward = kernels_of(lambda: torch.autograd.grad(out, [x], grad, retain_graph=True))
    assert len(backward) <= 4


def test_offsets_beyond_32_bits(world: World) -> None:
    """A tensor of more than 2^31 elements."""
    case = Case(1, 16, 112, 112, 16, layout="nhwc", dtype=torch.float16)
    images = 2**31 // (16 * 112 * 112) + 8
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * images * 16 * 112 * 112 * 2:
        pytest.skip("not enough device memory")
    module, x = on_gpu(case)
    many = x.expand(images, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        want, got = module(x), module(many)
        for image in (0, images // 2, images - 1):  # the plan of a large batch is another one
            torch.testing.assert_close(got[image], want[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fused_network(world: World, dtype: torch.dtype, layout: str) -> None:
    """A fused network in 16 bits has an error of at most twice that of eager."""
    check_network("cuda", dtype, layout)


def check_network(device: str, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    network = models.ghostnet(0.5, 100, dropout=0.0)
    ghost_ops.unfuse(network)
    network(torch.randn(16, 3, 64, 64))  # statistics unlike those of a new batch norm
    network = network.eval().to(device, dtype)
    formats = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
    x = torch.randn(4, 3, 64, 64).to(device, dtype, memory_format=formats[layout])
    fused = copy.deepcopy(network)
    ghost_ops.fuse(fused, inference=True)
    with torch.inference_mode():
        exact = copy.deepcopy(network).double()(x.double())
        eager, got = ((m(x) - exact).abs().max().item() for m in (network, fused))
    assert got <= 2 * eager + torch.finfo(dtype).eps * exact.abs().max().item()
