"""Promise: a fused model leaves PyTorch with its numbers, in files that hold what the page says.

ONNX, OpenVINO, torch.export, AOTInductor and TorchScript; every line of docs/deployment.md runs.
"""

from __future__ import annotations

import collections
import copy
import importlib.util
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ghost_forms import randomize
from helpers import Case, assert_close, close, make_input, make_module, recorded
from torch import Tensor, nn
from twins import (
    all_close,
    image,
    images,
    setting,
    small_network,
    twins,
    unfused_copy,
)

import ghost_ops
from ghost_ops import modes

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "tracing"])


def needs(*packages: str) -> None:
    """Skip the test if a package is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture(autouse=True)
def quiet_exporter() -> Iterator[None]:
    """Without the exporter's messages about torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


# --- ONNX -------------------------------------------------------------------------------------


def to_onnx(model: Any, x: Tensor, dynamo: bool = True, **options: Any) -> Any:
    """The ONNX model."""
    import onnx

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*runs its own forward")
        torch.onnx.export(model, (x,), file, dynamo=dynamo, verbose=False, **options)
    return onnx.load_from_string(file.getvalue())


def operators(exported: Any) -> collections.Counter[tuple[str, str]]:
    """How often each operator, (domain, name), is in an ONNX graph."""
    return collections.Counter((node.domain, node.op_type) for node in exported.graph.node)


def run_onnxruntime(exported: bytes | str, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(out)


def run_openvino(exported: bytes | str, x: Tensor) -> Tensor:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(exported), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return torch.from_numpy(compiled(x.numpy())[0].copy())


def check_numbers(got: Tensor, plain: nn.Module, x: Tensor) -> None:
    """Compare with the plain model in float64; slack for the sums of the other engine."""
    with torch.no_grad():
        want = copy.deepcopy(plain).double()(x.double())
        assert_close(got, want, plain(x), slack=4.0)


def check_onnx(fused: nn.Module, plain: nn.Module, x: Tensor, dynamo: bool, **options: Any) -> Any:
    """Standard operators, as many of each as the plain model's graph has; returns the model."""
    if dynamo:
        options["optimize"] = False  # the optimiser would hide a difference
    got, want = (to_onnx(model, x, dynamo, **options) for model in (fused, plain))
    assert {domain for domain, _ in operators(got)} == {""}
    assert operators(got) == operators(want)
    return got


# The exporter by Dynamo takes seconds for each model.
FAMILIES = ["authors", "Ultralytics", "FusedGhostModule", "PReLU", "GhostModuleV2"]
FAMILIES += ["batch norm after", "bottleneck, stride 2, gated", "network"]
EXPORTS = [pytest.param(family, False, id=f"{family}, tracing") for family in FAMILIES]
EXPORTS += [pytest.param(family, True, id=f"{family}, dynamo") for family in ("PReLU", "network")]


@pytest.mark.parametrize(("family", "dynamo"), EXPORTS)
def test_onnx(native: str, family: str, dynamo: bool) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    fused, plain = (model.float() for model in twins(family))
    x = image().float()
    with torch.no_grad():
        fused(x)  # the cached call does not run during the export
    exported = check_onnx(fused, plain, x, dynamo)
    check_numbers(run_onnxruntime(exported.SerializeToString(), x), plain, x)


@EXPORTERS
def test_onnx_in_training_mode(native: str, dynamo: bool) -> None:
    needs("onnx", "onnxscript")
    fused, plain = (model.float() for model in twins("authors", training=True))
    check_onnx(fused, plain, image().float(), dynamo, training=torch.onnx.TrainingMode.PRESERVE)
    assert fused.training


@EXPORTERS
def test_onnx_in_half_precision(native: str, dynamo: bool) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    fused, plain = (model.half() for model in twins("authors"))
    x = image().half()
    exported = check_onnx(fused, plain, x, dynamo)
    check_numbers(run_onnxruntime(exported.SerializeToString(), x), plain, x)


@EXPORTERS
def test_onnx_of_changed_modules(native: str, dynamo: bool) -> None:
    """The graph has the module's hooks and its present activation."""
    needs("onnx", "onnxscript", "onnxruntime")
    fused, plain = (model.float() for model in twins("authors"))
    for model in (fused, plain):
        setting("primary_conv.2", nn.SiLU)(model)
        model.cheap_operation[0].register_forward_hook(lambda _m, _i, out: out * 2)
    x = image().float()
    exported = check_onnx(fused, plain, x, dynamo)
    check_numbers(run_onnxruntime(exported.SerializeToString(), x), plain, x)


class OnTensors(nn.Module):
    """A Ghost module by ``ghost_ops.ghost_module``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = randomize(ghost_ops.reference.GhostModule(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        tensors: dict[str, Tensor] = {}
        branches = self.layers.primary_conv, self.layers.cheap_operation
        for name, (conv, bn, _) in zip(("primary", "cheap"), branches, strict=True):
            tensors[f"{name}_weight"] = conv.weight
            tensors |= {f"{name}_bn_{key}": getattr(bn, key) for key in ("weight", "bias")}
            for key in ("running_mean", "running_var"):
                tensors[f"{name}_{key}"] = getattr(bn, key)
        return ghost_ops.ghost_module(x, **tensors, training=self.training)


@pytest.mark.parametrize(("training", "dynamo"), [(True, False), (False, False), (False, True)])
def test_onnx_of_ghost_module(native: str, training: bool, dynamo: bool) -> None:
    needs("onnx", "onnxscript")
    model = OnTensors().train(training)
    options = {"training": torch.onnx.TrainingMode.PRESERVE}
    check_onnx(model, model.layers, image().float(), dynamo, **options)


def test_onnx_of_a_strict_export(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter's second way, after its first has failed: Dynamo, which inlines constants."""
    needs("onnx", "onnxscript")
    ways = importlib.import_module("torch.onnx._internal.exporter._capture_strategies")
    if not hasattr(ways, "CAPTURE_STRATEGIES"):
        pytest.skip("this PyTorch has no list of ways to capture a model")
    monkeypatch.setattr(ways, "CAPTURE_STRATEGIES", (ways.TorchExportStrictStrategy,))
    fused, plain = (model.float() for model in twins("authors"))
    check_onnx(fused, plain, image().float(), dynamo=True)


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("not exportable")


@pytest.mark.usefixtures("fresh_compiler")
@EXPORTERS
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_after_an_onnx_export(native: str, fails: bool, dynamo: bool) -> None:
    needs("onnx", "onnxscript")
    fused = twins("authors")[0].float()
    x = image().float()
    if fails:
        with pytest.raises(Exception, match="not exportable"):
            to_onnx(nn.Sequential(fused, Raises()).eval(), x, dynamo)
        torch.set_autocast_cache_enabled(True)  # PyTorch's older exporter leaves it off
    else:
        to_onnx(fused, x, dynamo)
    assert not modes.in_onnx_export()
    with torch.no_grad(), recorded() as names:
        fused(x)
    assert "ghost_ops::ghost_apply" in names
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        torch.compile(fused, backend=backend)(x)
    assert any("fused_inference" in target for target in targets)
    program = torch.export.export(fused, (x,))
    assert "ghost_ops.ghost_apply.default" in {str(node.target) for node in program.graph.nodes}


def test_onnx_of_an_exported_program(native: str) -> None:
    """Its operators are rewritten before; the graph is as small as the plain model's."""
    needs("onnx", "onnxscript", "onnxruntime")
    model, x = small_network().eval(), images()
    plain = unfused_copy(model)
    program = torch.export.export(model, (x,))
    program = program.run_decompositions(ghost_ops.ops.decompositions())
    exported = to_onnx(program, x)
    assert {domain for domain, _ in operators(exported)} == {""}
    assert len(exported.graph.node) <= len(to_onnx(plain, x).graph.node)
    check_numbers(run_onnxruntime(exported.SerializeToString(), x), plain, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["models.ghostnet", "timm"])
def test_onnx_of_a_whole_network(native: str, name: str) -> None:
    needs("onnx", "onnxscript", "onnxruntime", "openvino")
    if name == "timm":
        needs("timm")
        from examples import third_party

        try:
            model = randomize(third_party.timm().create_model("ghostnet_100")).eval()
        except ImportError as error:
            pytest.skip(f"timm does not import here: {error}")
        ghost_ops.fuse(model)
    else:
        model = randomize(ghost_ops.models.ghostnet()).eval()
    plain = unfused_copy(model)
    x = torch.randn(2, 3, 96, 96)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = check_onnx(model, plain, x, True, dynamic_shapes=shapes).SerializeToString()
    for n in (1, 5):
        x = torch.randn(n, 3, 96, 96)
        check_numbers(run_onnxruntime(exported, x), plain, x)
        check_numbers(run_openvino(exported, x), plain, x)


# --- torch.export -----------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_module(backend: str, strict: bool) -> None:
    case = Case(act2="silu")
    module, x = make_module(case).eval(), make_input(case)
    program = torch.export.export(module, (x,), strict=strict)
    close(program.module()(x), module(x))


@pytest.mark.parametrize(("strict", "grad"), [(False, False), (False, True), (True, True)])
def test_export_with_a_dynamic_batch(native: str, strict: bool, grad: bool) -> None:
    """Fused operators in the program; plain ones after a decomposition."""
    model = small_network().eval()
    plain = unfused_copy(model)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(
            model, (images(),), dynamic_shapes=({0: batch},), strict=strict
        )
    portable = program.run_decompositions(ghost_ops.ops.decompositions())
    assert "ghost_ops.ghost_apply.default" in called(program)
    assert not [name for name in called(portable) if "ghost_ops" in name]
    for n in (3, 7):
        for exported in (program, portable):
            all_close([exported.module()(images(n))], [plain(images(n))], 1e-5)


def called(program: torch.export.ExportedProgram) -> set[str]:
    """The operators of a program and of the graphs inside it."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = (node for graph in graphs for node in graph.graph.nodes)
    return {str(node.target) for node in nodes if node.op == "call_function"}


# --- the page ---------------------------------------------------------------------------------

BLOCK = re.compile(r"^```python( deployed)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE = (ROOT / "docs" / "deployment.md").read_text()
FIRST, *_rest = re.split(r"^## (.+)\n", PAGE, flags=re.MULTILINE)
SECTIONS = dict(zip(_rest[::2], _rest[1::2], strict=True))
NEEDS = {"ONNX": ("onnx", "onnxscript", "onnxruntime", "openvino")}


def deployed(code: str, has_ghost_ops: bool) -> subprocess.CompletedProcess[str]:
    """Run a block in a fresh process: x is in x.pt, and out comes to out.pt."""
    lines = [
        "import sys",
        "" if has_ghost_ops else "sys.modules['ghost_ops'] = None",
        "import torch",
        "x = torch.load('x.pt')",
        code,
        "torch.save(torch.as_tensor(out).detach(), 'out.pt')",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def check_file(plain: nn.Module) -> None:
    check_numbers(torch.load("out.pt"), plain, torch.load("x.pt"))


@pytest.mark.filterwarnings("ignore:.*runs its own forward")
@pytest.mark.parametrize(
    "section",
    [pytest.param(s, marks=pytest.mark.slow if s == "AOTInductor" else ()) for s in SECTIONS],
)
def test_every_line_of_the_page(
    native: str, section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small network for ``ghostnet``, and three images in the deployed process."""
    needs(*NEEDS.get(section, ()))
    if section == "AOTInductor" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ghost_ops.models, "ghostnet", lambda _width: small_network())
    torch.save(torch.randn(3, 3, 224, 224), "x.pt")
    names: dict[str, Any] = {}
    for kind, code in [*BLOCK.findall(FIRST), *BLOCK.findall(SECTIONS[section])]:
        if not kind:
            exec(compile(code, f"deployment.md, {section}", "exec"), names)
            continue
        fused = "import ghost_ops" in code
        process = deployed(code, has_ghost_ops=fused)
        assert process.returncode == 0, process.stderr
        check_file(names["plain"])
        if fused:
            process = deployed(code.replace("import ghost_ops", ""), has_ghost_ops=False)
            assert process.returncode != 0
            assert "ghost_ops" in process.stderr
            assert "ghost_pack" in process.stderr
    plain, x = names["plain"], torch.load("x.pt")
    for file in tmp_path.glob("*.onnx"):
        check_numbers(run_onnxruntime(str(file), x), plain, x)
    for file in tmp_path.glob("*.xml"):
        check_numbers(run_openvino(str(file), x), plain, x)
    assert not [m for m in plain.modules() if type(m).__module__.startswith("ghost_ops.fusion")]
