"""Promise: the rows of a network's plan follow by formula, and the model does not change."""

from __future__ import annotations

import copy
import itertools
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import native_module
from ghost_forms import FORMS, Conv, Gated, GhostConv, conv_bn_act
from helpers import our_launches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ghost_ops
from ghost_ops import planner
from ghost_ops.conventions import DTYPES
from ghost_ops.planner import network as network_plan
from ghost_ops.planner.network import NetworkPlan, NetworkRow
from ghost_ops.reference import GhostBottleneck, GhostModule

pytestmark = pytest.mark.skipif(native_module() is None, reason="the native library is not built")

IMAGES = (256, 3, 224, 224)
HALF, SINGLE = 2, 4  # bytes of a float16, and of the compute dtype
DRAM = 3350 * 0.92e9  # bytes a second that the cost model assumes for sm_90
TENSOR = 4096 * 132 * 1.76e9 / 2  # FLOPs a second: half of the float16 peak of sm_90
LAUNCH = 2e-6
# A batch norm reads four vectors of its parameters and returns two of float32.
NORM = 4 * HALF + 2 * SINGLE


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return ghost_ops.models.ghostnet().eval()


@pytest.fixture(scope="module")
def plan(network: nn.Module) -> NetworkPlan:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fixture `steady` runs after module fixtures
    found = planner.explain(network, IMAGES, device="sm_90", dtype=torch.float16)
    torch.set_num_threads(threads)
    return found


def row(plan: NetworkPlan, name: str, kind: str | None = None) -> NetworkRow:
    (found,) = (one for one in plan.rows if one.name == name and kind in (None, one.kind))
    return found


def seconds(moved: float, flops: float = 0, launches: int = 1) -> float:
    return max(moved / DRAM, flops / TENSOR) + LAUNCH * launches


class Launches(TorchDispatchMode):
    """Counts the ATen operators that write memory in a real run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if not func.is_view and not name.startswith("aten::empty"):
            bias = name == "aten::convolution" and args[2] is not None
            self.count += 2 if bias else 1
        return func(*args, **(kwargs or {}))


def eager_launches(model: nn.Module, shape: tuple[int, ...]) -> int:
    plain = copy.deepcopy(model).eval()
    ghost_ops.unfuse(plain)
    x = torch.randn(shape)
    with torch.no_grad(), Launches() as launches:
        plain(x)
    return launches.count


# --- GhostNet 1.0x ------------------------------------------------------------------------------


def test_rows_and_totals(network: nn.Module, plan: NetworkPlan) -> None:
    """32 Ghost modules, 4 strided convolutions, 5 shortcuts of two, 7 gates, stem and head."""
    kinds = Counter(one.kind for one in plan.rows)
    assert kinds == {
        network_plan.GHOST_APPLY: 32 - 7 + 5,
        network_plan.GHOST_APPLY_POOLED: 1,
        network_plan.GHOST_APPLY_GATED: 7,
        network_plan.DEPTHWISE_CONV: 2 + 5,
        network_plan.DEPTHWISE_CONV_SUMS: 2,
        network_plan.SQUEEZE_EXCITE_GATE: 7,
        network_plan.CONV_STEM: 1,
        network_plan.ADDMM: 2,
        network_plan.ACTIVATION: 1,
    }
    assert kinds.keys() <= set(network_plan.KINDS)
    names = [one.name for one in plan.rows]
    assert len(set(names)) == len(names)
    assert set(names) <= {name for name, _ in network.named_modules()}
    assert names[:3] == ["conv_stem", "blocks.0.0.ghost1", "blocks.0.0.ghost2"]
    assert names[-4:] == ["blocks.9.0.conv", "conv_head", "act2", "classifier"]
    stages = [int(name.split(".")[1]) for name in names if name.startswith("blocks")]
    assert stages == sorted(stages)
    for name in ("launches", "dram_bytes", "seconds"):
        assert getattr(plan, name) == sum(getattr(one, name) for one in plan.rows)
        name = f"eager_{name.removeprefix('dram_')}"
        assert getattr(plan, name) == sum(getattr(one, name) for one in plan.rows)
    assert plan.eager_launches == eager_launches(network, (1, 3, 32, 32))


def test_two_small_images(network: nn.Module, plan: NetworkPlan) -> None:
    """The input of ``test_cuda_network.test_ghostnet``: a gate of few images is two launches."""
    small = planner.explain(network, (2, 3, 33, 40))
    ours = [one for one in small.rows if one.kind in network_plan.OWN_KINDS]
    assert len(ours) == 55
    gates = [one for one in ours if one.kind == network_plan.SQUEEZE_EXCITE_GATE]
    assert our_launches(small) == 55 - 7 + sum(gate.launches for gate in gates)
    assert {gate.launches for gate in gates} <= {1, 2}
    assert our_launches(small) > our_launches(plan) == 55
    assert small.launches == our_launches(small) + 3  # head, its activation, classifier
    assert [(r.name, r.kind, r.eager_launches) for r in small.rows] == [
        (r.name, r.kind, r.eager_launches) for r in plan.rows
    ]
    assert small.dram_bytes < plan.dram_bytes / 50
    assert small.eager_seconds > LAUNCH * small.eager_launches


def test_our_kernels_cost_what_their_plans_say(plan: NetworkPlan) -> None:
    """A gate reads the partial sums that the depthwise convolution before it writes."""
    library, n = native_module(), IMAGES[0]
    target = {"dtype": DTYPES.index(torch.float16), "sm": 90}
    layout = {**target, "channels_last": True}
    with_sums, depthwise = (
        library.cuda_depthwise_plan(*sizes, sums=sums, **layout)
        for *sizes, sums in ((n, 72, 56, 56, 5, 2, True), (n, 48, 112, 112, 3, 2, False))
    )
    for name, want in {
        "conv_stem": library.cuda_stem_plan(n, 3, 224, 224, 2, 16, **layout),
        "blocks.1.0.conv_dw": depthwise,
        "blocks.3.0.conv_dw": with_sums,
        "blocks.3.0.se": library.cuda_gate_plan(n, 72, 20, 28 * 28, with_sums["splits"], **target),
        "blocks.4.0.se": library.cuda_gate_plan(n, 120, 32, 28 * 28, 0, **target),
    }.items():
        got = row(plan, name)
        assert got.launches == want.get("launches", 1)
        assert (got.dram_bytes, got.seconds) == (want["dram_bytes"], want["seconds"])


def test_ghost_rows_against_explain(plan: NetworkPlan) -> None:
    """Both sides of a Ghost module's row agree with ``explain`` for its shape.

    The second module of a bottleneck adds the shortcut: in eager two maps read, one written.
    """
    options = {"device": "sm_90", "dtype": torch.float16, "channels_last": True}
    for name, n, c, side, middle in (
        ("blocks.0.0", 256, 16, 112, 16),
        ("blocks.2.0", 256, 24, 56, 72),
        ("blocks.8.0", 256, 160, 7, 960),
    ):
        inside = (n, middle, side, side)
        first = planner.explain((n, c, side, side), middle, **options)
        second = planner.explain(inside, c, activation="none", residual=True, **options)
        shortcut = 3 * n * c * side**2 * HALF
        for number, want, more in ((1, first, 0), (2, second, shortcut)):
            got = row(plan, f"{name}.ghost{number}")
            assert (got.dram_bytes, got.seconds) == (want.passes[0].dram_bytes, want.seconds)
            assert got.eager_bytes == pytest.approx(want.bytes_eager + more, rel=0.01)


def test_ghost_with_residual_by_hand(plan: NetworkPlan) -> None:
    """Fused: x, residual, out and w1 once. Eager: its passes over the maps, and the sum."""
    n, c, m, p = 256, 72, 12, 56 * 56
    got = row(plan, "blocks.2.0.ghost2")
    assert got.dram_bytes == (n * (c + 2 * 2 * m) * p + m * c) * HALF
    maps = c + m + 2 * m + 2 * m + 2 * m + 4 * m  # conv, bn, depthwise, bn, cat
    vectors = (m * c + 9 * m) * HALF + 2 * m * NORM
    assert got.eager_bytes == n * p * (maps + 3 * 2 * m) * HALF + vectors
    assert got.eager_launches == 6
    norm = n * p * 2 * m * HALF + m * NORM
    moved = [(n * p * (c + m) + m * c) * HALF, norm, (n * p * 2 * m + 9 * m) * HALF, norm]
    moved += [n * p * 4 * m * HALF, n * p * 3 * 2 * m * HALF]
    assert got.eager_seconds == pytest.approx(sum(map(seconds, moved)))


def test_depthwise_and_gates_by_hand(plan: NetworkPlan) -> None:
    """Maps and float32 weights; in eager PyTorch a gate is ten launches."""
    n, c, maps = 256, 48, 256 * 48 * (112 * 112 + 56 * 56)
    got = row(plan, "blocks.1.0.conv_dw")
    assert got.dram_bytes == maps * HALF + c * (9 + 1) * SINGLE
    assert got.eager_bytes == (maps + 9 * c) * HALF + 2 * n * c * 56 * 56 * HALF + c * NORM
    assert got.eager_launches == 2
    n, c, reduced, p = 256, 120, 32, 28 * 28
    gate, ghost2 = row(plan, "blocks.4.0.se"), row(plan, "blocks.4.0.ghost2")
    weights = 2 * c * reduced * HALF + (c + reduced) * SINGLE
    assert gate.dram_bytes == (n * c * p + n * c) * HALF + weights
    # Mean, two convolutions of one pixel with bias and ReLU, three for the gate, the product.
    pixel = n * (c + reduced) + c * reduced
    bias = 2 * n * (c + reduced) + (c + reduced)
    eager = n * c * p + n * c + 2 * pixel + bias + 2 * n * reduced + 3 * 2 * n * c
    eager += 2 * n * c * p + n * c + n * (c + reduced)
    assert gate.eager_launches == 1 + 2 + 1 + 2 + 3 + 1
    assert gate.eager_bytes == pytest.approx(eager * HALF, rel=0.002)
    assert ghost2.dram_bytes == (n * p * (c + 2 * 40) + 20 * c + n * c) * HALF


def test_ends_by_hand(plan: NetworkPlan) -> None:
    n, hidden, classes = 256, 1280, 1000
    assert row(plan, "conv_stem").eager_launches == 3
    last = row(plan, "blocks.9.0.conv")
    assert last.dram_bytes == (n * (49 * 160 + 960) + 160 * 960) * HALF
    assert last.eager_launches == 3 + 1
    head = row(plan, "conv_head")
    assert head.dram_bytes == (n * (960 + hidden) + 960 * hidden + hidden) * HALF
    assert head.eager_launches == 2
    assert head.eager_bytes == head.dram_bytes + 2 * n * hidden * HALF
    classifier = row(plan, "classifier")
    assert classifier.dram_bytes == (n * (hidden + classes) + (hidden + 1) * classes) * HALF
    assert classifier.dram_bytes == classifier.eager_bytes
    flops = 2 * n * hidden * classes
    assert classifier.seconds == pytest.approx(seconds(classifier.dram_bytes, flops))


def test_shortcuts_move_the_same_either_way(plan: NetworkPlan) -> None:
    shortcuts = [one.name for one in plan.rows if one.name.endswith("shortcut.2")]
    names = [*shortcuts, *(name.replace("shortcut.2", "ghost2") for name in shortcuts)]
    moved = sum(row(plan, name).dram_bytes for name in names)
    (note,) = plan.notes
    assert note.count(f"{moved:,} bytes") == 2, note
    assert note.startswith("shortcuts (5)")


def test_text(plan: NetworkPlan) -> None:
    text = str(plan)
    for one in plan.rows:
        assert any(one.name in line and f" {one.kind} " in line for line in text.splitlines())
        assert f"{one.dram_bytes / 1e6:,.3f}" in text
    for words in ("GhostNet on sm_90", "[256, 3, 224, 224] float16 channels_last", *plan.notes):
        assert words in text
    assert "not measured" in text
    assert f"{plan.eager_bytes / 1e6:,.3f}" in text
    assert all(line == line.rstrip() for line in text.splitlines())
    table = [line for line in text.splitlines() if line[-1].isdigit() or line.endswith("us")]
    assert len({len(line) for line in table}) == 1


# --- the model is only read ---------------------------------------------------------------------


def small_network(fused: bool = False) -> nn.Module:
    torch.manual_seed(0)
    blocks = [GhostBottleneck(8, 16, 12, 3, 2, se_ratio=0.25), GhostBottleneck(12, 24, 12)]
    model = nn.Sequential(*conv_bn_act(3, 8, 3, 2, 1, nn.SiLU()), *blocks, Gated(12, 16))
    if fused:
        ghost_ops.fuse(model, inference=True)
    return model


def short_ghostnet(stem: nn.Conv2d | None = None) -> nn.Module:
    """A fused GhostNet of one bottleneck."""
    model = ghost_ops.models.ghostnet(0.5).eval()
    model.conv_stem = stem or model.conv_stem
    model.blocks = nn.Sequential(
        model.blocks[0], nn.Sequential(*conv_bn_act(8, 480, 1, 1, 1, nn.ReLU()))
    )
    return model


def test_plain_and_fused_give_the_same() -> None:
    shape = (2, 3, 32, 32)
    for fused, plain in (
        (small_network(True), small_network()),
        (small_network(True).eval(), torch.compile(small_network(), backend="eager")),
        (short_ghostnet(), short_ghostnet()),
    ):
        ghost_ops.unfuse(plain)
        assert planner.explain(fused, shape) == planner.explain(plain, shape)


class Watcher:
    """A hook that cannot be copied, and records its calls."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.calls: list[nn.Module] = []

    def hook(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.calls.append(module)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_untouched(fused: bool, training: bool) -> None:
    model = small_network(fused).train(training)
    watcher = Watcher()
    model.register_forward_hook(watcher.hook)
    model[0].register_forward_hook(watcher.hook)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        model.eval()(x)  # fills the caches of fused modules
        model.train(training)
    seen = len(watcher.calls)

    def state() -> list[Any]:
        tensors = [*model.parameters(), *model.buffers()]
        return [
            [(type(m), m.training, list(m.__dict__)) for m in model.modules()],
            [(id(t), t.device, t.dtype, t._version, t.requires_grad) for t in tensors],
            [t.clone() for t in tensors],
            [list(m._forward_hooks.values()) for m in model.modules()],
        ]

    before, generator = state(), torch.get_rng_state()
    planner.explain(model, (2, 3, 32, 32))
    after = state()
    assert before[:2] == after[:2]
    assert before[3] == after[3]
    assert all(torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    assert len(watcher.calls) == seen


def test_weights_that_a_hook_computes() -> None:
    """They are no leaves, so deepcopy raises for them."""
    with pytest.warns(FutureWarning):
        model = nn.utils.weight_norm(nn.Conv2d(3, 8, 1))
    (one,) = planner.explain(model, (1, 3, 8, 8)).rows
    assert one.kind == network_plan.PLAIN


# --- other modules ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_lone_ghost_modules(name: str) -> None:
    module = FORMS[name]()
    shape = (4, 6, 20, 20)
    plan = planner.explain(module, shape)
    ghost = plan.rows[-1]
    assert (ghost.name, ghost.kind, ghost.launches) == ("(model)", network_plan.GHOST_APPLY, 1)
    assert plan.eager_launches == eager_launches(module, shape)
    others = [one.kind for one in plan.rows[:-1]]
    if name == "GhostModuleV2":
        assert others == [network_plan.PLAIN]
        assert plan.rows[0].launches == plan.rows[0].eager_launches == 8
    else:
        library = any(word in name for word in ("k=3", "grouped"))
        assert others == [network_plan.LIBRARY_CONV] * library
    assert not plan.notes


def test_library_convolution_by_hand() -> None:
    """The library computes u by the primary 3x3 of stride 2, and ghost_apply reads u."""
    n, c, m, p = 4, 6, 4, 10 * 10
    plan = planner.explain(GhostModule(c, 2 * m, 3, stride=2), (n, c, 20, 20))
    conv, ghost = plan.rows
    assert conv.name == "primary_conv.0"
    assert conv.dram_bytes == conv.eager_bytes == (n * (c * 400 + m * p) + 9 * c * m) * HALF
    assert ghost.dram_bytes == pytest.approx(n * p * 3 * m * HALF, rel=0.01)
    assert (conv.eager_launches, ghost.eager_launches) == (1, 6)


@pytest.mark.parametrize(
    ("stem", "fused"),
    [
        (nn.Conv2d(3, 8, 3, 1, 1, bias=False), True),
        (nn.Conv2d(3, 8, 5, 2, 2, bias=False), False),
        (nn.Conv2d(3, 8, 3, 2, 2, dilation=2, bias=False), False),
        (nn.Conv2d(3, 8, 3, (2, 1), 1, bias=False), False),
        (nn.Conv2d(4, 8, 3, 2, 1, groups=2, bias=False), False),
        (nn.Conv2d(6, 8, 3, 2, 1, bias=False), False),
    ],
    ids=["stride 1", "5x5", "dilation", "strides", "groups", "channels"],
)
def test_stems(stem: nn.Conv2d, fused: bool) -> None:
    """One launch if ``conv_stem`` has a kernel; else a convolution, its bias, the activation."""
    shape = (2, stem.in_channels, 16, 16)
    model = short_ghostnet(stem)
    plan = planner.explain(model, shape)
    assert not any("not fused" in note for note in plan.notes)
    assert plan.eager_launches == eager_launches(model, shape)
    first, second, *_ = plan.rows
    assert first.name == "conv_stem"
    if fused:
        assert (first.kind, first.launches) == (network_plan.CONV_STEM, 1)
        assert (first.eager_launches, second.name) == (3, "blocks.0.0.ghost1")
        return
    assert (first.kind, first.launches) == (network_plan.LIBRARY_CONV, 2)
    with torch.no_grad():
        out = stem.to("meta")(torch.empty(shape, device="meta")).numel()
    elements = 2 * stem.in_channels * 256 + stem.weight.numel() + 8 + 3 * out
    assert first.dram_bytes == elements * HALF
    assert (second.name, second.kind) == ("act1", network_plan.ACTIVATION)
    assert second.dram_bytes == second.eager_bytes == 2 * out * HALF
    assert (first.eager_launches, second.eager_launches) == (2, 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_gate_before_a_library_convolution(stride: int) -> None:
    """The gate multiplies its map in place, because ghost_apply does not read that map."""
    model = GhostBottleneck(8, 20, 12, 3, stride, se_ratio=0.25)
    model.ghost2 = GhostModule(20, 12, 3, relu=False)
    shape, pixels = (2, 8, 8, 8), 64 // stride**2
    plan = planner.explain(model, shape)
    assert not any("not fused" in note for note in plan.notes)
    assert plan.eager_launches == eager_launches(model, shape)
    kinds = [one.kind for one in plan.rows if "shortcut" not in one.name]
    sums = [network_plan.DEPTHWISE_CONV_SUMS] if stride == 2 else []
    assert kinds == [
        network_plan.GHOST_APPLY,
        *sums,
        network_plan.SQUEEZE_EXCITE_GATE,
        network_plan.GATE_PRODUCT,
        network_plan.LIBRARY_CONV,
        network_plan.GHOST_APPLY,
    ]
    product = row(plan, "se", network_plan.GATE_PRODUCT)
    assert (product.launches, product.eager_launches) == (1, 1)
    assert product.dram_bytes == product.eager_bytes == 2 * 20 * (2 * pixels + 1) * HALF
    assert row(plan, "se", network_plan.SQUEEZE_EXCITE_GATE).eager_launches == 9


def test_attention_gate_by_hand() -> None:
    """ghost_apply reads the half-size gate; eager PyTorch interpolates and multiplies it."""
    n, c, out, p = 2, 6, 8, 20 * 20
    plan = planner.explain(Gated(c, out), (n, c, 20, 20))
    gate, ghost = plan.rows
    assert gate.name == "short_conv"
    assert gate.dram_bytes == gate.eager_bytes
    alone = planner.explain(FORMS["authors"](), (n, c, 20, 20)).rows[0]
    assert ghost.dram_bytes == alone.dram_bytes + n * out * p // 4 * HALF
    enlarged = n * out * (p // 4 + p) + 3 * n * out * p
    assert ghost.eager_bytes == alone.eager_bytes + enlarged * HALF


class Bottleneck(nn.Module):
    """Ultralytics' GhostBottleneck."""

    def __init__(self, c1: int, c2: int, stride: int, act: nn.Module) -> None:
        super().__init__()
        middle, none = c2 // 2, nn.Identity()
        self.conv = nn.Sequential(
            GhostConv(c1, middle, act=act),
            Conv(middle, middle, 3, stride, middle, none) if stride == 2 else nn.Identity(),
            GhostConv(middle, c2, act=none),
        )
        self.shortcut = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(
                Conv(c1, c1, 3, stride, c1, none), Conv(c1, c2, 1, 1, 1, none)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


class C3(nn.Module):
    """Ultralytics' C3Ghost."""

    def __init__(self, c: int, act: nn.Module) -> None:
        super().__init__()
        self.cv1, self.cv2 = (Conv(c, c // 2, 1, 1, 1, act) for _ in range(2))
        self.m = nn.Sequential(Bottleneck(c // 2, c // 2, 1, act))
        self.cv3 = Conv(c, c, 1, 1, 1, act)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


def test_yolo_like_stack() -> None:
    act = nn.SiLU()  # one module for all layers, as in Ultralytics
    shape, model = (
        (2, 3, 64, 64),
        nn.Sequential(
            Conv(3, 16, 3, 2, 1, act),
            GhostConv(16, 32, 3, 2, act=act),
            Bottleneck(32, 64, 2, act),
            C3(64, act),
            nn.Upsample(scale_factor=2),
            GhostConv(64, 64, act=act),
        ),
    )
    plan = planner.explain(model, shape)
    assert plan.eager_launches == eager_launches(model, shape)
    kinds = {one.name: one.kind for one in plan.rows}
    assert len(kinds) == len(plan.rows)
    assert {name for name, kind in kinds.items() if kind == network_plan.GHOST_APPLY} == {
        "1",
        "2.conv.0",
        "2.conv.2",
        "2.shortcut.1.conv",
        "3.m.0.conv.0",
        "3.m.0.conv.2",
        "5",
    }
    assert kinds["1.cv1.conv"] == network_plan.LIBRARY_CONV
    assert kinds["2.conv.1.conv"] == kinds["2.shortcut.0.conv"] == network_plan.DEPTHWISE_CONV
    plain = [one for one in plan.rows if one.kind == network_plan.PLAIN]
    names = [f"{path}.{leaf}" for path in ("0", "3.cv1", "3.cv2") for leaf in ("conv", "bn", "act")]
    names += ["3", "3.cv3.conv", "3.cv3.bn", "3.cv3.act", "4"]  # "3" concatenates
    assert [one.name for one in plain] == names
    for one in plain:
        assert (one.launches, one.dram_bytes, one.seconds) == (
            one.eager_launches,
            one.eager_bytes,
            one.eager_seconds,
        )
    # Two convolutions with norm and SiLU, and the concatenation; ghost2 is linear, and adds.
    for name, launches in {
        "5": 7,
        "2.conv.0": 7,
        "2.conv.2": 6,
        "3.m.0.conv.2": 6,
        "2.shortcut.0.conv": 2,
        "2.shortcut.1.conv": 2,
    }.items():
        assert row(plan, name).eager_launches == launches
    assert len(plan.notes) == 1


class Steps(nn.Module):
    """Views, an expanded tensor, a slice that is written, new tensors."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(x.shape, dtype=x.dtype)
        y[:, :, ::2] = x[:, :, ::2]
        return y.transpose(1, 2) * x.mean((2, 3), keepdim=True).expand(x.shape).transpose(1, 2)


def test_ordinary_operators_by_hand() -> None:
    """Operators that are not fused are the same on both sides."""
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(512, 4)
    plan = planner.explain(nn.Sequential(*layers), (2, 3, 8, 8), dtype=torch.float32)
    assert [one.name for one in plan.rows] == ["0", "1", "3"]
    conv, relu, linear = plan.rows
    out = 2 * 8 * 64
    assert conv.launches == 2
    assert conv.dram_bytes == (2 * 3 * 64 + 8 * 27 + 8 + out + 2 * out) * 4
    assert relu.dram_bytes == 2 * out * 4
    assert linear.dram_bytes == (out + 512 * 4 + 4 + 8) * 4
    assert plan.dram_bytes == plan.eager_bytes
    plan = planner.explain(Steps(), (2, 4, 6, 6))
    size = 2 * 4 * 6 * 6
    zeros, copied, mean, product = size, size // 2 * 2, size + 8, 2 * size + 8
    assert plan.eager_bytes == (zeros + copied + mean + product) * HALF
    assert plan.launches == 4


@pytest.mark.filterwarnings("ignore:ghost_ops runs plain PyTorch operators")
def test_what_is_not_fused_is_said() -> None:
    model = small_network()
    model[3].ghost1.primary_conv[0].register_forward_hook(lambda *_: None)
    model[4].ghost1.cheap_operation[0] = nn.Conv2d(12, 12, 9, padding=4, groups=12, bias=False)
    model[5].primary_conv[1] = nn.BatchNorm2d(8, track_running_stats=False)
    plan = planner.explain(model, (2, 3, 32, 32))
    notes = "\n".join(plan.notes)
    for words in ("3.ghost1", "has hooks", "size 9", "no running statistics", "not fused: "):
        assert words in notes, notes
    assert {one.name for one in plan.rows if one.kind == network_plan.GHOST_APPLY} == {
        "3.ghost2",
        "4.ghost2",
    }
    assert notes in str(plan)


# --- devices and dtypes -------------------------------------------------------------------------


def test_devices() -> None:
    """Slower memory takes longer; eager PyTorch's bytes and launches do not depend on it."""
    devices = ("sm_89", "sm_86", "sm_80", "sm_90", "sm_100")
    model = small_network()[3]
    plans = [planner.explain(model, (64, 8, 112, 112), device=device) for device in devices]
    for slow, fast in itertools.pairwise(plans):
        assert slow.seconds > fast.seconds
        assert slow.eager_seconds > fast.eager_seconds
        assert (slow.eager_launches, slow.eager_bytes) == (fast.eager_launches, fast.eager_bytes)
    assert [plan.device for plan in plans] == list(devices)


def test_dtypes_and_layouts() -> None:
    model, shape = small_network()[3], (32, 8, 32, 32)
    half = planner.explain(model, shape)
    single = planner.explain(model, shape, "sm_90", torch.float32, channels_last=False)
    assert single.dtype is torch.float32
    assert "float32 NCHW" in str(single)
    assert single.eager_bytes == pytest.approx(2 * half.eager_bytes, rel=0.01)
    assert single.dram_bytes == pytest.approx(2 * half.dram_bytes, rel=0.02)
    assert planner.explain(model, shape, dtype=torch.bfloat16).dram_bytes == half.dram_bytes
    assert planner.explain(model, shape, dtype=torch.float64).seconds > single.seconds


def test_tf32_follows_torch() -> None:
    model = nn.Sequential(nn.Conv2d(512, 512, 3, padding=1, bias=False))
    before = torch.backends.cudnn.allow_tf32
    times = {}
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            plan = planner.explain(model, (64, 512, 28, 28), dtype=torch.float32)
            times[allowed] = plan.seconds
    finally:
        torch.backends.cudnn.allow_tf32 = before
    flops = 2 * 64 * 28 * 28 * 512 * 512 * 9
    assert times[True] == pytest.approx(flops / (TENSOR / 2) + LAUNCH)
    assert times[False] == pytest.approx(flops / (2 * 64 * 132 * 1.76e9) + LAUNCH)
