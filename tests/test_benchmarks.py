"""The benchmarks' own promises: models of bytes and FLOPs, the harness, pictures, command lines."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import helpers
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as listing  # noqa: E402
from benchmarks.harness import floor, machine, measure, providers, rows, shapes, timing  # noqa: E402
from benchmarks.harness.machine import MissingExtra, require  # noqa: E402
from benchmarks.questions import QUESTIONS, module  # noqa: E402
from benchmarks.report import page, plot, table  # noqa: E402
from examples import demo, demo_report  # noqa: E402

RED = shapes.Shape(16, 48, 112)


class FakeClock:
    """A clock that only calls advance, by what each call is said to cost."""

    def __init__(self) -> None:
        self.now = 100.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, costs: list[float]):
        """A call that costs the next of ``costs``, the last one for ever after."""

        def run() -> None:
            self.order.append(name)
            self.now += costs.pop(0) if len(costs) > 1 else costs[0]

        return run


# ---- shapes and the floor


def test_shapes_are_those_of_ghostnet() -> None:
    expected = [(s, i, o, "relu" if relu else "none") for s, i, o, relu in helpers.GHOSTNET]
    assert [(s.size, s.inp, s.oup, s.activation) for s in shapes.GHOSTNET] == expected
    assert sum(s.count for s in shapes.GHOSTNET) == 32
    assert len({s.name for s in shapes.ALL}) == len(shapes.ALL) == 25
    assert len(shapes.QUICK) == 6


def test_forward_model_by_hand() -> None:
    # x: 16 x 112 x 112 floats, out: 48 x 112 x 112; m = g = 24, 16 and 9 multiply-adds each.
    assert floor.forward_bytes(RED, 1) == (16 + 48) * 12544 * 4
    assert floor.forward_flops(RED, 1) == 2 * 12544 * (16 * 24 + 9 * 24)
    assert floor.forward_bytes(RED, 3, itemsize=2) == 3 * (16 + 48) * 12544 * 2


def test_models_with_stride_ratio_and_kernel() -> None:
    # oup 10, ratio 3: m = 4, g = 8; 3x3 primary with stride 2 on 9x9 gives 5x5.
    shape = shapes.Shape(6, 10, 9, kernel_size=3, ratio=3, dw_size=5, stride=2)
    assert (shape.intrinsic, shape.ghosts, shape.out_size) == (4, 8, 5)
    assert floor.forward_bytes(shape, 2) == 2 * (6 * 81 + 10 * 25) * 4
    assert floor.forward_flops(shape, 2) == 2 * 2 * 25 * (6 * 9 * 4 + 25 * 8)


def test_training_model_by_hand() -> None:
    x, out = 16 * 12544 * 4, 48 * 12544 * 4
    assert floor.training_bytes(RED, 1) == 3 * x + 2 * out
    assert floor.training_flops(RED, 1) == 3 * floor.forward_flops(RED, 1)


def test_roofline_interpolates_and_takes_the_larger() -> None:
    roof = floor.Roofline(
        100.0, 8, (1 << 10, 1 << 12), (8.0, 4.0), ("torch", "torch"), 1, "float32"
    )
    assert roof.bandwidth_at(1 << 11) == pytest.approx(6.0)
    assert roof.bandwidth_at(1) == 8.0
    assert roof.bandwidth_at(1 << 20) == 4.0
    assert roof.floor(1 << 10, 100.0) == pytest.approx(128.0)
    assert roof.bound(1 << 10, 100.0) == "memory"
    assert roof.floor(1 << 10, 50_000.0) == pytest.approx(500.0)
    assert roof.bound(1 << 10, 50_000.0) == "gemm"


def test_roofline_is_measured() -> None:
    roof = floor.measure_roofline(gemm_sizes=(64,), copy_sizes=(1 << 16, 1 << 17), samples=1)
    assert roof.gemm_size == 64
    assert roof.gemm_peak > 1e7
    assert all(rate > 1e6 for rate in roof.bandwidth)
    json.dumps(dataclasses.asdict(roof))


def test_native_copies_copy() -> None:
    copies, reason = floor.native_copies()
    if not copies:
        pytest.skip(reason)
    for copy in copies.values():
        source = torch.arange(1024, dtype=torch.float32)
        target = torch.zeros(1024)
        copy(target.data_ptr(), source.data_ptr(), 2048)
        assert torch.equal(target[:512], source[:512])
        assert not target[512:].any()


# ---- harness


def test_rounds_are_interleaved_and_quantiles_right() -> None:
    clock = FakeClock()
    # Two calls settle warm-up and repeats (a second each exceeds both), then one per round.
    calls = {
        "a": clock.call("a", [1.0, 1.0, 5.0, 1.0, 3.0, 2.0, 4.0]),
        "b": clock.call("b", [10.0]),
    }
    result = timing.time_interleaved(calls, rounds=5, min_sample=0.5, warmup=0.5, clock=clock)
    assert "".join(clock.order) == "aabb" + "ab" * 5
    assert result["a"].median == pytest.approx(3.0)
    assert result["a"].p20 == pytest.approx(1.8)
    assert result["a"].p80 == pytest.approx(4.2)
    assert result["b"] == timing.Timing(10.0, 10.0, 10.0, 5, 1)


def test_short_calls_are_repeated() -> None:
    clock = FakeClock()
    result = timing.time_interleaved(
        {"a": clock.call("a", [1e-3])}, rounds=2, min_sample=20e-3, warmup=5e-3, clock=clock
    )
    assert result["a"].repeats == 20
    assert result["a"].median == pytest.approx(1e-3)


def test_rounds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rounds"):
        timing.time_interleaved({}, rounds=0)


def test_relative_error_and_check() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    got = torch.tensor([3.0, 4.5])
    assert timing.relative_error(got, exact, norm="max") == pytest.approx(0.125)
    assert timing.relative_error(got, exact, norm="l2") == pytest.approx(0.1)
    assert timing.relative_error(torch.ones(3), exact, norm="max") == math.inf
    assert timing.check_errors([0.3], [0.1], [0.1]).ok
    check = timing.check_errors([0.0, 0.31], [0.1, 0.1], [0.1, 0.1])
    assert not check.ok
    assert check.allowed == pytest.approx(0.3)
    nan = timing.relative_error(torch.tensor([math.nan, 4.0]), exact, norm="max")
    assert not timing.check_errors([nan, 0.0], [0.0, 0.0], [1.0, 1.0]).ok


def test_saved_bytes_counts_storages_once() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(8, 4, requires_grad=True)

    def call() -> torch.Tensor:
        y = layer(x)  # saves x and the weight, which is a parameter
        return (y * y).exp()  # saves y twice, and exp's output

    assert timing.saved_bytes(call, layer) == {"maps": 3 * 128, "stats": 0, "total": 3 * 128}


def test_metadata_is_json() -> None:
    meta = machine.metadata(["module"], cores=[0], allocation="as it comes")
    assert json.loads(json.dumps(meta))["torch"] == torch.__version__


def test_output_that_cannot_be_written_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="cannot write results to"):
        machine.prepare_output(tmp_path / "file" / "results.json")
    existing = machine.prepare_output(tmp_path / "file")
    assert existing.read_text() == "kept"
    assert not machine.prepare_output(tmp_path / "new" / "results.json").exists()


def test_missing_extra_is_named() -> None:
    with pytest.raises(MissingExtra, match=r'pip install "ghost_ops\[demo\]"'):
        require("no_such_package_here", "a test", extra="demo")


# ---- providers


@pytest.mark.parametrize("name", ["16-16@112-linear", "128-128@40-silu"])
def test_providers_agree(name: str) -> None:
    shape = dataclasses.replace(shapes.select([name])[0], size=9)
    reference = providers.reference_module(shape).eval()
    x = torch.randn(2, shape.inp, 9, 9)
    with torch.inference_mode():
        expected = reference(x)
        for provider in providers.PROVIDERS:
            if not provider.family.startswith("compile"):
                out = providers.build(provider, reference, training=False)(provider.input(x))
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_parameters_are_no_inference_tensors() -> None:
    """Else nothing can be cached for them, which no user's module suffers from."""
    reference = providers.reference_module(shapes.Shape(4, 8, 5))
    with torch.inference_mode():
        for provider in providers.PROVIDERS:
            if not provider.family.startswith("compile"):
                made = providers.build(provider, reference, training=False)
                assert not any(p.is_inference() for p in made.parameters())


def test_yolo_shapes_have_their_eps_and_activation() -> None:
    reference = providers.reference_module(shapes.YOLO[0])
    for branch in (reference.primary_conv, reference.cheap_operation):
        assert branch[1].eps == 1e-3
        assert isinstance(branch[2], torch.nn.SiLU)
    assert reference.cheap_operation[0].kernel_size == (5, 5)


def test_compile_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "C++ compiler" in (providers.compile_unavailable() or "")


# ---- report and pictures


def rows_by_hand() -> list[dict]:
    """Two shapes, three providers; ours wins twofold on one and loses twofold on the other."""
    common = {"question": "module", "dtype": "float32", "layout": "nchw", "threads": 1, "batch": 16}
    common |= {"group": "ghostnet", "count": 1, "floor_s": 1.0, "bound": "gemm", "error": 0.0}
    times = {"16-16@112-relu": (8.0, 4.0, 2.0), "16-48@112-relu": (8.0, 2.0, 4.0)}
    who = ("eager_nchw", "eager_cl", "fused_nchw")
    return [
        {**common, "mode": mode, "shape": shape, "provider": provider, "floors": seconds}
        | dict.fromkeys(rows.QUANTILES, seconds)
        for mode in ("eval", "train")
        for shape, three in times.items()
        for provider, seconds in zip(who, three, strict=True)
    ]


def test_summary_by_hand() -> None:
    found = [r for r in rows_by_hand() if r["mode"] == "eval"]
    means = QUESTIONS["module"].means(found)
    mean = {name.removeprefix("ghostnet, eval, batch 16: "): m.value for name, m in means.items()}
    assert mean["floors of eager_nchw"] == pytest.approx(8.0)
    assert mean["floors of best_pytorch"] == pytest.approx(math.sqrt(8.0))
    assert mean["times faster than eager_nchw"] == pytest.approx(math.sqrt(8.0))
    assert mean["times faster than the best peer"] == pytest.approx(1.0)
    assert module.network_ms(found)["fused_nchw"] == pytest.approx(6000.0)
    (line,) = (w for w in page.worst(QUESTIONS["module"].ratios(found)) if "the best peer" in w)
    assert "slower on 1 of 2: 16-48@112-relu (eager_cl) **0.50x**, 16-16@112-relu" in line


def test_saved_bytes_are_summed_by_network() -> None:
    saved = {"mode": "saved", "provider": "eager_nchw"}
    sizes = (("ghostnet", 4, 10), ("ghostnet", 1, 5), ("yolo", 1, 1000))
    found = [{**saved, "group": g, "count": n, "saved_total": size} for g, n, size in sizes]
    assert module.saved_totals(found) == {
        "ghostnet": {"eager_nchw": 45},
        "yolo": {"eager_nchw": 1000},
    }


def test_losses_are_bold_and_columns_line_up() -> None:
    """One format on the console and in the report: Markdown."""
    lines = table.Table("T", ("shape", "x"), [("a", table.times(0.5)), ("long", 1)]).lines()
    assert lines[:3] == ["### T", "", "| shape |         x |"]
    assert lines[4:6] == ["| a     | **0.50x** |", "| long  |         1 |"]
    assert table.times(1.0) == "1.00x" and table.times(None) == ""


def test_rows_that_failed_their_check_are_not_timed_and_are_reported() -> None:
    found = rows_by_hand()
    found[2].update(median_s=None, note="wrong result")
    assert "fused_nchw" not in rows.by_shape(found[:3])["16-16@112-relu"]
    assert measure.failures(found) == ["eval batch 16 16-16@112-relu fused_nchw: wrong result"]


def test_pictures_render(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    meta = machine.metadata(["module"], cores=[0], allocation="as it comes")
    results = tmp_path / "module.json"
    results.write_text(json.dumps({"meta": meta, "rows": rows_by_hand()}))
    assert plot.main([str(results), "--out", str(tmp_path / "pictures")]) == 0
    written = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    names = ("floors", "ratios", "training")  # no roofline: no limits in the file
    assert written == [f"module_{name}.png" for name in names]
    assert (tmp_path / "pictures/module_floors.png").stat().st_size > 10_000
    assert plot.main([str(results), "--out", str(tmp_path / "one"), "--only", "ratios"]) == 0
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["module_ratios.png"]


def bars_of(figure) -> dict[str, list[tuple[float, bool]]]:
    """Label of each series of bars -> (length, whether hatched) of each bar."""
    (axes,) = figure.axes
    series = (c for c in axes.containers if hasattr(c, "patches"))
    return {
        c.get_label(): [(bar.get_width(), bool(bar.get_hatch())) for bar in c.patches]
        for c in series
    }


def test_pictures_show_losses_and_name_the_competitor() -> None:
    pytest.importorskip("matplotlib")
    found = rows_by_hand()
    compiled = [{**r, "provider": "compile_cl"} for r in found if r["provider"] == "eager_cl"]
    document = {"meta": machine.metadata(["module"], cores=[0], allocation="as it comes")}
    training = plot.draw_training({**document, "rows": [*found, *compiled]})
    assert bars_of(training) == {
        "than eager PyTorch, NCHW: 2.83x": [(4.0, False), (2.0, False)],
        "than eager PyTorch, channels_last: 1.00x": [(2.0, False), (0.5, True)],
        "than torch.compile, channels_last: 1.00x": [(2.0, False), (0.5, True)],
    }
    ratios = plot.draw_ratios({**document, "rows": found})
    assert list(bars_of(ratios).values()) == [[(0.5, True), (2.0, False)]]  # the smallest first
    assert "1 of 2 slower" in ratios.axes[0].get_title(loc="left")
    assert "p20" in ratios.get_label() and "PyTorch in 2 of 2" in ratios.get_label()
    floors = plot.draw_floors({**document, "rows": found})
    assert "floor = max(bytes / bandwidth, FLOPs / GEMM peak)" in floors.get_label()


def test_committed_pictures_are_small_and_have_rows() -> None:
    pictures = list((ROOT / "benchmarks" / "results").glob("*.png"))
    assert pictures or not (ROOT / "benchmarks" / "results").exists()
    for picture in pictures:
        assert picture.stat().st_size < 150_000, picture
        stem = picture.stem.rpartition("_")[0]
        assert picture.with_name(f"{stem}.json").is_file(), picture


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_pictures_refuse_what_is_no_results_file(
    tmp_path: pathlib.Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    results.write_text(content)
    assert plot.main([str(results)]) == 2
    assert "error: " in capsys.readouterr().err


# ---- command lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "1-2@3-none"], "matches no shape"),
        (["--providers", "tensorflow"], "matches none"),
        (["--batch", "0"], "positive"),
        (["--rounds", "-1"], "positive"),
        (["--threads", "0"], "positive"),
        (["--clock", "cpu", "--threads", "2"], "needs --threads 1"),
        (["--mode", "sideways"], "invalid choice"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_module_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        QUESTIONS["module"].main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs: expected a positive integer, got 0"),
        (["--batch", "64", "--digits", "50"], "more than the digits"),
        (["--shapes", "nothing"], "invalid choice"),
        (["--threads", "100000"], "cores present"),
    ],
)
def test_demo_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(["nothing"]) == 2
    assert "known: all, module" in capsys.readouterr().err
    assert listing.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f" {name} " in listed for name in (*QUESTIONS, *listing.TOOLS))


def test_every_question_is_listed() -> None:
    files = {path.stem for path in (ROOT / "benchmarks" / "questions").glob("*.py")}
    assert files - {"__init__", "question"} == QUESTIONS.keys()


@pytest.mark.parametrize("name", [*QUESTIONS, *listing.TOOLS])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        listing.main([name, "--help"])
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_examples_import_no_benchmarks() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert not re.search(r"^\s*(from|import) benchmarks", path.read_text(), re.MULTILINE), path


def test_demo_refuses_an_unwritable_folder(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("rich", "matplotlib", "mlxtend"):
        pytest.importorskip(package)
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file")]) == 2
    assert "cannot write results" in capsys.readouterr().err


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", *command]
    options = {"cwd": ROOT, "env": environment, "timeout": 300}
    return subprocess.run(words, capture_output=True, text=True, **options)


def test_module_runs(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("numpy")
    out = tmp_path / "module.json"
    arguments = ("--quick", "--rounds", "1", "--batch", "2", "--shapes", "672-160@7-linear")
    result = run("benchmarks", "module", *arguments, "--out", str(out))
    document = json.loads(out.read_text())
    modes = {row["mode"] for row in document["rows"]}
    assert modes == {"eval", "train", "saved", "overhead"}
    assert "tuned" in document["meta"]["allocation"] or "default" in document["meta"]["allocation"]
    wrong = [r for r in document["rows"] if r["mode"] != "saved" and r["median_s"] is None]
    assert not wrong
    # Without the native kernels the memory contract is not kept, and the command says so.
    assert result.returncode in ((0,) if "isa" in document["meta"]["ghost_ops"] else (0, 1))


def test_demo_runs(tmp_path: pathlib.Path) -> None:
    for package in ("rich", "matplotlib", "mlxtend"):
        pytest.importorskip(package)
    arguments = "--quick --digits 300 --epochs 1 --rounds 1 --threads 1 --shape-batch 2".split()
    arguments += ["--shapes", "672-160@7-linear", "--out", str(tmp_path / "results")]
    result = run("examples.demo", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads((tmp_path / "results/demo.json").read_text())
    assert len(document["training"]["fused"]["losses"]) == 7
    assert {(row["mode"], *row["seconds"]) for row in document["shapes"]} == {
        ("train", "eager", "fused", "channels_last"),
        ("eval", "eager", "fused", "channels_last", "folded"),
    }
    # The settings behind the numbers, and against whom.
    assert all(text in result.stdout for text in document["meta"].values())
    for peer in ("eager NCHW", "eager channels_last", "best of PyTorch"):
        assert f"than {peer}" in result.stdout
    assert "torch.compile (in 0 of 2 rows: not asked for)" in result.stdout
    assert "Other figures than the README's, because of" in result.stdout
    assert all(promise["kept"] for promise in document["verified"])
    assert (tmp_path / "results/demo.png").stat().st_size > 10_000


def test_demo_runs_every_shape_of_ghostnet() -> None:
    expected = [s.name for s in shapes.GHOSTNET]
    assert [s.name for s in demo.parse_arguments([]).shapes] == expected
    assert [s.name for s in demo.parse_arguments(["--quick"]).shapes] == demo.QUICK


def test_demo_quotes_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for name, mode in (("inference", "eval"), ("training step", "train")):
        figures = " | ".join(f"{value}x" for value in demo_report.README[mode])
        assert f"| {name}, batch 16 | {figures} |" in text


def test_demo_says_why_its_figures_differ() -> None:
    same = {**demo_report.README_RUN}
    assert demo_report.reasons(same, 16) == "nothing but the day and the version"
    found = demo_report.reasons({**same, "threads": "2 threads"}, 4)
    assert found == "threads: 2 threads, not 1 thread; batch: 4, not 16"


def test_demo_compiles_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled takes part; what was not is named with the reason."""
    runs: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    compiler = demo.Compiler(1e-9)
    network = torch.nn.Linear(2, 2)
    assert compiler(network, runs.append) is network and runs == [network]
    assert compiler(network, runs.append) is None and len(runs) == 1
    assert "--compile-seconds" in compiler.why

    def fail(network: object) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    compiler = demo.Compiler(60.0)
    assert compiler(network, fail) is None
    assert compiler.why == "no C++ compiler"
    assert demo.Compiler(0.0).why == "not asked for"


def test_compiled_networks_start_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    run = demo.Run(demo.ghost_network(demo.GhostModule))
    before = {key: value.clone() for key, value in run.plain.state_dict().items()}
    assert run.compile(demo.Compiler(60.0), torch.randn(4, 1, 28, 28), torch.arange(4))
    assert all(torch.equal(value, before[key]) for key, value in run.plain.state_dict().items())


def test_demo_counts_losses_against_the_best_of_pytorch() -> None:
    seconds = {"eager": [4.0, 4.0, 4.0], "channels_last": [1.0, 0.9, 1.2], "fused": [2.0, 1.5, 2.0]}
    row = {"mode": "train", "seconds": seconds, "best": "channels_last"}
    assert demo_report.faster(row, "eager")[0] == 2.0
    assert demo_report.faster(row, "best") == pytest.approx((0.5, 0.45, 0.8))
    assert demo_report.mean([row, row], "best") == pytest.approx(0.5)


def test_demo_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.allocator("tuned", "cuda") == "PyTorch's CUDA allocator"
    monkeypatch.setenv("LD_PRELOAD", "/lib/libjemalloc.so")
    assert demo.allocator("tuned", "cpu") == "/lib/libjemalloc.so"
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setattr(demo.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert demo.allocator("default", "cpu") == "glibc malloc as it comes"


# ---- the demo's verdict


def test_demo_notices_a_different_module() -> None:
    """Another initialisation and another formula must both be seen."""
    training = {
        "same_start": True,
        "double_deviation": 1e-13,
        "early_deviation": 1e-6,
        "control_early_deviation": 1e-5,
        "rms_deviation": 1e-2,
        "control_rms_deviation": 1e-2,
        "double_steps": 30,
        "early_steps": 10,
        "steps": 100,
        "test_digits": 1000,
        "eager": {"accuracy": 0.95},
        "fused": {"accuracy": 0.95},
    }
    good = {
        "training": training,
        "shapes": [{"shape": "s", "mode": "eval", "ok": True}],
    }
    assert all(kept for _, kept, _ in demo.verify(good))
    for change in (
        {"same_start": False},
        {"double_deviation": 1e-6},
        {"early_deviation": 1e-2},
        {"early_deviation": math.nan},
        {"rms_deviation": 1.0},
        {"fused": {"accuracy": 0.9}},
    ):
        verdict = demo.verify({**good, "training": {**training, **change}})
        assert [kept for _, kept, _ in verdict].count(False) == 1, change
    wrong = {**good, "shapes": [*good["shapes"], {"shape": "s", "mode": "train", "ok": False}]}
    assert not demo.verify(wrong)[-1][1]


@pytest.mark.parametrize(("load", "threads"), [(0.2, 2), (0.9, 1), (5.0, 1)])
def test_demo_leaves_busy_cores_alone(
    monkeypatch: pytest.MonkeyPatch, load: float, threads: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert demo.free_threads() == threads


def test_deviation_keeps_nan() -> None:
    assert demo.deviation([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert math.isnan(demo.deviation([1.0, math.nan], [1.0, 1.0]))


def test_network_takes_any_ghost_module_class() -> None:
    from ghost_ops.reference import GhostModule

    made = []

    class Counted(GhostModule):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    network = demo.ghost_network(Counted)
    assert len(made) == 9
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 10)
