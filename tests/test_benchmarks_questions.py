"""What the benchmark scripts compute, against numbers by hand, and that they run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from benchmark_rows import LIMITS, row

from benchmarks.harness import floor, providers, rows, runner, shapes, subjects
from benchmarks.questions import QUESTIONS, memory, network, paper, plan, product, scaling, settings
from benchmarks.report import compare, page
from examples import networks as forms
from examples import redundancy

pytest.importorskip("numpy")
ROOT = pathlib.Path(__file__).resolve().parent.parent


# ---- models by hand


def test_theoretical_speedup_by_hand() -> None:
    # 64 -> 128: 64 k^2 multiply-adds a map against half as many and 9 for each of 64 ghosts.
    ghost = shapes.Shape(64, 128, 28, ratio=2, dw_size=3)
    assert paper.theoretical_speedup(ghost) == pytest.approx(64 * 128 / (64 * 64 + 9 * 64))
    wide = shapes.Shape(64, 128, 28, kernel_size=3, ratio=4, dw_size=5)
    expected = 9 * 64 * 128 / (9 * 64 * 32 + 25 * 96)
    assert paper.theoretical_speedup(wide) == pytest.approx(expected)


def test_plain_convolution_is_ratio_one() -> None:
    plain = paper.convolution(3)
    assert (plain.intrinsic, plain.ghosts) == (128, 0)
    assert floor.forward_flops(plain, 1) == 2 * 28 * 28 * 9 * 64 * 128
    reference = providers.reference_module(plain).eval()
    x = torch.randn(1, 64, 5, 5)
    with torch.inference_mode():
        branch = reference.primary_conv
        torch.testing.assert_close(reference(x), branch(x))
        folded = providers.folded(reference)
        torch.testing.assert_close(folded(x), branch(x), rtol=1e-4, atol=1e-5)


def test_names_of_a_grid_are_unique() -> None:
    each = itertools.product((1, 3), (1, 2), (1, 3))
    grid = [shapes.Shape(64, 128, 28, "relu", k, s, d, group=shapes.GRID) for k, s, d in each]
    assert len({s.name for s in grid}) == 8
    assert scaling.CENTRE.name == "40-120@28-relu-k1-s2-d3"


def test_prediction_by_hand() -> None:
    # 1e9 bytes at 20 GB/s take 50 ms, 1e10 FLOPs at 1e11 take 100: the larger, and the call.
    assert plan.predict(LIMITS, 1e9, 1e10, 0.01, 1e11) == pytest.approx(0.11)
    assert plan.predict(LIMITS, 1e9, 1e10, 0.0, 1e12) == pytest.approx(0.05)


def test_plan_errors_by_hand() -> None:
    found = [
        row(shape=name, predicted_s=predicted, median_s=measured, p20_s=0.0, p80_s=9e9)
        for name, predicted, measured in (("a", 1.0, 2.0), ("b", 2.0, 4.0), ("c", 4.0, 64.0))
    ]
    found = plan.summarize(plan.predictions(found)["fused_nchw, batch 1"])
    assert found["factor"] == pytest.approx(4.0)  # of 2, 2 and 16
    assert found["error"] == pytest.approx(0.5)
    assert (found["worst"], found["worst_shape"]) == (pytest.approx(4.0), "c")
    assert found["rank"] == pytest.approx(1.0)


# ---- the product alone


def test_products_are_the_primary_convolutions() -> None:
    found = product.products(shapes.ALL)
    # Two modules differ in their activation alone: 16 -> 8 at 112.
    assert len(found) == len(shapes.ALL) - 1
    names = [s.name for s in found]
    assert {"16-8@112-linear", "960-80@7-linear", "64-64@80-linear"} <= {*names}
    assert len({*names}) == len(names)
    deepest = next(s for s in found if s.inp == 960)
    assert floor.forward_flops(deepest, 16) == 2 * 16 * 49 * 960 * 80


def test_shares_of_the_peak_by_hand() -> None:
    # 8 FLOPs in 2 s (1 s, 4 s) at a peak of 16 a second.
    times = {"median_s": 2.0, "p20_s": 1.0, "p80_s": 4.0, "flops": 8, "gemm_peak": 16.0}
    found = [
        row(question="product", group="ghostnet", shape=f"{k}-8@7-linear", inner=k, **times)
        for k in (40, product.DEEP, 960)
    ]
    found[2]["gemm_peak"] = 4.0
    assert product.share(found[0]) == (0.25, 0.125, 0.5)
    (mean,) = compare.means_of({"rows": found}).values()
    assert mean.count == 2, "of a quarter and one"
    assert (mean.value, mean.low, mean.high) == tuple(map(pytest.approx, (0.5, 0.25, 1.0)))


def test_bad_products_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--batch", "0"], "--batch: expected a positive"),
        (["--shapes", "1-2@3-relu"], "matches no shape"),
        (["--providers", "tensorflow"], "matches none"),
    ):
        with pytest.raises(SystemExit):
            QUESTIONS["product"].parse(arguments)
        assert message in capsys.readouterr().err


# ---- geometric means


def cell(question: str, ours: float, **more: object) -> list[dict]:
    """Eager, a faster peer and ours, each with p20 and p80 10% off."""
    times = {"eager_nchw": 8.0, "folded_cl": 4.0, "fused_nchw": ours}
    return [
        row(question=question, provider=name, median_s=t, p20_s=0.9 * t, p80_s=1.1 * t, **more)
        for name, t in times.items()
    ]


@pytest.mark.parametrize(
    ("question", "places", "name"),
    [
        ("network", [{"shape": "a"}, {"shape": "b"}], "networks, eval, batch 1"),
        (
            "network",
            [{"shape": s, "group": subjects.CIFAR} for s in "ab"],
            "CIFAR networks, eval, batch 1",
        ),
        ("scaling", [{"axis": "d", "value": 1}, {"axis": "d", "value": 3}], "along d"),
    ],
)
def test_means_by_hand(question: str, places: list[dict], name: str) -> None:
    pairs = zip(places, (2.0, 8.0), strict=True)
    measured = [r for place, ours in pairs for r in cell(question, ours, **place)]
    found = compare.means_of({"rows": measured})
    who = ("eager_nchw", "the best peer")
    assert [*found] == [f"{name}: times faster than {peer}" for peer in who]
    eager, best = found.values()
    assert (eager.value, best.value) == (pytest.approx(2.0), pytest.approx(1.0))
    assert eager.count == 2
    assert (eager.low, eager.high) == (pytest.approx(2 * 9 / 11), pytest.approx(2 * 11 / 9))


def test_means_of_the_plan_by_hand() -> None:
    found = [
        row(question="plan", predicted_s=1.0, median_s=t, p20_s=t / 2, p80_s=t * 2)
        for t in (2.0, 8.0)
    ]
    (mean,) = compare.means_of({"rows": found}).values()
    assert (mean.value, mean.low, mean.high) == tuple(map(pytest.approx, (4.0, 2.0, 8.0)))


# ---- networks


@pytest.mark.parametrize("key", subjects.NETWORKS)
def test_networks_are_there_and_fuse(key: str) -> None:
    known = subjects.NETWORKS[key]
    plain = known.plain(64).eval()
    # Of a Ghost-ResNet every norm is one of a concatenation.
    stay = sum(isinstance(m, forms.GhostUnit) for m in plain.modules())
    with torch.inference_mode():
        x = torch.randn(2, 3, 64, 64)
        expected = plain(x)
        assert expected.shape == (2, known.classes)
        folded = providers.folded(plain)
        assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules()) == stay
        torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-3)
    import ghost_ops

    report = ghost_ops.report(ghost_ops.fuse(plain))
    names = [type(module).__name__ for module in plain.modules()]
    fused = ("FusedGhostModule", "FusedGhostConv", "FusedGhostUnit")
    expected = {"yolo": 4 + 2 * 6, "ghost-resnet-56": 57, "ghost-resnet-20": 21}.get(key, 32)
    assert sum(name in fused for name in names) == expected, report


def test_ghost_resnet_by_hand() -> None:
    # The paper has 0.43 M parameters.
    plain = forms.ghost_resnet()
    assert sum(p.numel() for p in plain.parameters()) == pytest.approx(0.43e6, rel=0.03)
    assert plain(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="6 n"):
        forms.ghost_resnet(57)


def test_sizes_are_the_networks_own_or_as_given() -> None:
    def of(key: str, *argv: str) -> tuple[int, list[int], int]:
        return network.sizes(subjects.NETWORKS[key], QUESTIONS["network"].parse(argv))

    assert of("ghostnet-1.0") == (224, [1, 16], 16)
    assert of("ghost-resnet-56") == (32, [1, 32], 32)
    assert of("ghostnet-1.0", "--quick") == (96, [1, 4], 4)
    assert of("ghost-resnet-56", "--quick") == (32, [1, 4], 4)
    given = ("--size", "64", "--batch", "8", "2", "8", "--train-batch", "3")
    assert of("yolo", *given) == of("ghost-resnet-20", "--quick", *given) == (64, [2, 8], 3)


def test_network_model_by_hand() -> None:
    head = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 1000))
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), *head)
    assert subjects.flops(network, 8) == 2 * (64 * 3 * 4 + 4 * 1000)
    parameters, images, logits = 12 + 4 + 4000 + 1000, 2 * 3 * 64, 2 * 1000
    forward = 4 * (parameters + images + logits)
    x = torch.randn(2, 3, 8, 8)
    assert subjects.least_bytes(network, x, False) == forward
    training = 4 * (3 * parameters + 2 * images + logits)
    assert subjects.least_bytes(network, x, True) == training


# ---- paper, scaling


def test_map_errors_see_a_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(8, 3, 9, 9, generator=generator, dtype=torch.float64)
    kernel = torch.randn(1, 1, 3, 3, generator=generator, dtype=torch.float64)
    target = torch.nn.functional.conv2d(source[:, 1:2], kernel, padding=1)
    for d, exact in ((1, False), (3, True), (5, True)):
        errors, power = redundancy.map_errors(source, target, d)
        relative = (errors / power)[:, 0]
        assert relative.argmin() == 1
        assert (relative[1] < 1e-20) == exact
        assert relative[0] > 0.5, "noise says nothing about other noise"


def test_scaling_varies_one_thing() -> None:
    for axis in ("batch", "ratio", "d"):
        for value in scaling.AXES[axis]:
            shape, batch = scaling.point(axis, value)
            same = (shape.inp, shape.oup, shape.size) == (40, 120, 28)
            assert same and (axis == "batch" or batch == scaling.BATCH)
    assert scaling.point("d", 7)[0].dw_size == 7
    assert scaling.point("size", 224)[1] == 1
    assert scaling.AXES["batch"][-1] == 256


# ---- memory


@pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
def test_peak_is_that_of_live_memory() -> None:
    """In a process of its own: what other tests left in the allocator would count as well."""
    code = """
import torch
from benchmarks.questions import memory

def call():
    torch.ones(16 << 20).add_(1)  # 64 MiB, freed
    torch.ones(24 << 20).add_(1)  # 96 MiB

torch.ones(64 << 20)  # 256 MiB before it, which is not its peak
print(memory.peak_growth(call) >> 20)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], check=True, **options)
    assert 94 <= int(done.stdout) <= 112


# ---- the scripts, with limits that are not measured


FEW = "--providers eager fused"
TINY = {
    "module": f"--shapes 672-160@7-linear --batch 1 --mode eval {FEW}",
    "network": f"--networks yolo --size 32 --batch 2 --train-batch 2 --train-threads 1 {FEW}",
    "order": "--networks ghost-resnet-20 --batch 2 --train-batch 2",
    "scaling": "--axis ratio --providers fused",
    "plan": "--shapes 672-160@7-linear 160-960@7-relu --batch 1",
    "product": f"--shapes 672-160@7-linear 160-960@7-relu --batch 1 {FEW}",
    "memory": "--shapes 160-960@7-relu --batch 2 --size 32",
    "paper": "--ratio 2 3 --dw-size 3 --kernel-size 1",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with tiny results of every script that can run here."""
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.floor, "measure_roofline", lambda *a, **k: LIMITS)
        for name, arguments in TINY.items():
            if name == "memory" and memory.unavailable():
                continue
            options = "--quick --rounds 1 --malloc default --no-pin".split()
            words = [*options, *arguments.split(), "--out", str(folder / f"{name}.json")]
            status = QUESTIONS[name].main(words)
            if name == "plan" and status == 2:
                continue  # the native library is not there
            assert status == 0, name
    torch.set_num_threads(threads)
    return folder


def test_questions_write_the_schema(results: pathlib.Path) -> None:
    files = sorted(results.glob("*.json"))
    assert {"module", "scaling", "paper"} <= {f.stem for f in files}
    for path in files:
        document = json.loads(path.read_text())
        rows.check_document(document)
        assert document["complete"] and document["rows"], path.stem
        assert {r["question"] for r in document["rows"]} == {path.stem}
        assert not any("note" in r for r in document["rows"])


def test_compiling_stops_when_its_time_is_used_up(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.floor, "measure_roofline", lambda *a, **k: LIMITS)
    out, threads = tmp_path / "module.json", torch.get_num_threads()
    arguments = "--shapes 672-160@7-linear --batch 1 --mode eval --rounds 1 --malloc default"
    arguments += " --no-pin --providers eager compile --compile eval --compile-minutes 0"
    assert QUESTIONS["module"].main([*arguments.split(), "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    found = {row["provider"]: row for row in json.loads(out.read_text())["rows"]}
    assert found["eager_cl"]["median_s"] > 0
    note = found["compile_cl"]["note"]
    assert found["compile_cl"]["median_s"] is None
    assert "used up" in note or "compiler" in note


def test_redundancy_is_real(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("mlxtend", "matplotlib"):
        pytest.importorskip(package)
    found: list[dict] = []
    draw = redundancy.draw

    def drawn(rows: list[dict], path: pathlib.Path) -> None:
        found.extend(rows)
        draw(rows, path)

    monkeypatch.setattr(redundancy, "draw", drawn)
    out = tmp_path / "maps.png"
    arguments = "--digits 200 --epochs 1 --images 40".split()
    assert redundancy.main([*arguments, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    by = {(r["maps"], r["source"], r["d"]): r["median"] for r in found}
    for panel in {r["maps"] for r in found}:
        same = [by[panel, "same image", d] for d in redundancy.KERNELS]
        other = [by[panel, "other images", d] for d in redundancy.KERNELS]
        # Maps of the same image tell more than those of another, and larger kernels more still.
        assert same[-1] < same[0]
        assert all(s < o for s, o in zip(same, other, strict=True))


def test_report_page(results: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    target = page.write(results)
    text = target.read_text()
    documents = {p.stem: json.loads(p.read_text()) for p in results.glob("*.json")}
    for name, document in documents.items():
        assert document["meta"]["command"] in text
        assert page.QUESTIONS[name].title in text
    assert text.index("Worst cases first") < text.index(page.QUESTIONS["module"].title)
    pictures = {p.name for p in results.glob("*.png")}
    assert {"module_floors.png", "module_ratios.png", "module_roofline.png"} <= pictures
    assert {"scaling_curves.png", "paper_speedup.png"} <= pictures
    drawn = {name for name in documents if any(p.startswith(name) for p in pictures)}
    assert drawn == {*documents} - {"order"}  # a table is enough
    for picture in pictures:
        assert f"]({picture})" in text
        assert (results / picture).stat().st_size > 5_000


def test_report_of_nothing_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert page.main([str(tmp_path)]) == 2
    assert "module.json" in capsys.readouterr().err


# ---- settings


def settings_rows() -> list[dict]:
    """The base and one setting: twice as fast, on twice the images, in the second column."""
    column = settings.COLUMNS[1].title
    fields = {"question": "settings", "column": column, "p20_s": 0.0, "p80_s": 9.0}
    base = row(**fields, setting="base", batch=16, median_s=0.5)
    return [base, row(**fields, setting="batch 64", batch=64, median_s=1.0)]


def test_settings_by_hand() -> None:
    base, other = settings.ratios(settings_rows())
    assert base[:4] == ["base", "", "500.00 ms", ""]
    assert other[:4] == ["batch 64", "", "2.00x", ""]


def test_settings_change_one_thing() -> None:
    base = dataclasses.asdict(settings.BASE)
    for setting in settings.SETTINGS:
        changed = {k for k, v in dataclasses.asdict(setting).items() if v != base[k]}
        assert len(changed - {"title", "advice"}) == 1 + setting.title.count(","), setting


def test_settings_fill_their_page(tmp_path: pathlib.Path) -> None:
    page, out = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*settings.MARKS))
    meta = {"cpu": "a CPU", "torch": "2", "date": "2026-11-28T00:00", "command": "python -m x"}
    document = {"meta": meta, "rows": settings_rows()}
    out.write_text(json.dumps(document))
    settings.into_page(page, document, out)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "2.00x" in text and "(rows.json)" in text and "old" not in text
    assert settings.is_current(page)
    page.write_text(text.replace("2.00x", "3.00x"))
    assert not settings.is_current(page)


def test_settings_page_has_the_numbers_of_its_rows() -> None:
    assert settings.is_current(ROOT / "docs" / "settings.md")


def test_settings_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module alone, in two processes."""
    monkeypatch.setattr(settings.floor, "measure_roofline", lambda *a, **k: LIMITS)
    monkeypatch.setattr(settings, "COLUMNS", settings.COLUMNS[2:])
    chosen = [s for s in settings.SETTINGS if s.title in ("channels_last", "tuned glibc")]
    monkeypatch.setattr(settings, "SETTINGS", chosen)
    out, threads = tmp_path / "settings.json", torch.get_num_threads()
    assert QUESTIONS["settings"].main(["--quick", "--rounds", "1", "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    document = json.loads(out.read_text())
    rows.check_document(document)
    assert [r["setting"] for r in document["rows"]] == ["base", *(s.title for s in chosen)]
    assert all(r["median_s"] > 0 for r in document["rows"])
    means = QUESTIONS["settings"].means(document["rows"])
    assert [*means] == [f"{s.title}: images a second" for s in chosen]
