"""Comparing two results files: what is beyond noise is flagged, what is not is left alone."""

from __future__ import annotations

import copy
import json
import pathlib
import re

import pytest
from benchmark_rows import row

from benchmarks.report import compare

pytest.importorskip("numpy")


# ---- comparing


def pair(**changes: object) -> list[dict]:
    """Ours and the baseline, in one run."""
    ours = row(median_s=1.0, p20_s=0.99, p80_s=1.01)
    eager = row(provider="eager_nchw", median_s=4.0, p20_s=3.96, p80_s=4.04)
    return [{**ours, **changes}, eager]


def test_equal_runs_do_not_differ() -> None:
    same = compare.compare(pair(), pair())
    assert [(c.ratio, c.worse, c.better) for c in same.found] == [(1.0, False, False)]
    assert (same.broken, same.lonely) == ([], 0)


def test_slower_beyond_noise_is_a_regression() -> None:
    slower = pair(median_s=1.2, p20_s=1.19, p80_s=1.21)
    assert [c.worse for c in compare.compare(pair(), slower).found] == [True]
    assert [c.better for c in compare.compare(slower, pair()).found] == [True]
    assert not compare.compare(pair(), slower, tolerance=0.3).found[0].worse


def test_noise_hides_what_it_can_explain() -> None:
    noisy = pair(median_s=1.2, p20_s=1.0, p80_s=1.5)
    assert [c.worse for c in compare.compare(pair(), noisy).found] == [False]


def test_a_slow_spell_of_the_machine_is_no_regression() -> None:
    spell = copy.deepcopy(pair())
    for line in spell:
        for key in ("median_s", "p20_s", "p80_s"):
            line[key] *= 2
    assert not compare.compare(pair(), spell).found[0].worse


def test_what_fails_now_is_broken() -> None:
    failed = pair(median_s=None, note="wrong result: error 1, allowed 0.1")
    broken = compare.compare(pair(), failed).broken
    assert len(broken) == 1 and "wrong result" in broken[0]


def test_bytes_are_compared() -> None:
    def saved(nbytes: int) -> list[dict]:
        return [row(mode="saved", median_s=None, saved_total=nbytes)]

    assert compare.compare(saved(1000), saved(1010)).found[0].worse
    assert not compare.compare(saved(1000), saved(1000)).found[0].worse


def test_other_measurements_are_counted_not_compared() -> None:
    found = compare.compare(pair(), [*pair(batch=2)])
    assert (found.found, found.lonely) == ([], 2)


def modules(ours: float, spread: float) -> list[dict]:
    """One module of the report, with its noise as a share of its time."""
    common = {"question": "module", "group": "ghostnet", "count": 1}
    times = {"fused_nchw": ours, "eager_nchw": 4.0}
    return [
        row(provider=name, median_s=t, p20_s=t * (1 - spread), p80_s=t * (1 + spread), **common)
        for name, t in times.items()
    ]


@pytest.mark.parametrize(
    ("after", "spread", "note"),
    [
        (1.05, 0.01, ""),
        (1.3, 0.01, "apart 30%, beyond the spread"),
        (1.3, 0.3, "apart 30%, within the spread"),
    ],
)
def test_geometric_means_of_two_runs(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    after: float,
    spread: float,
    note: str,
) -> None:
    for name, ours in (("a", 1.0), ("b", after)):
        rows = [{**r, "floors": r["median_s"]} for r in modules(ours, spread)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"meta": {}, "rows": rows}))
    status = compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--means"])
    assert status == (1 if note and spread < 0.1 else 0)
    out = " ".join(capsys.readouterr().out.split())
    # Over eager, the best of PyTorch, the best peer and eager of its layout; the floors of those
    # three, of ours and of the best of ours.
    assert f"{out.count('agrees ')} of 9 geometric means agree within 10%" in out
    assert note in out
    low, high = 4 * (1 - spread) / (1 + spread), 4 * (1 + spread) / (1 - spread)
    assert f"4.00 ({low:.2f} to {high:.2f}), then {4 / after:.2f}" in out


def test_compare_command(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = pair(median_s=2.0, p20_s=1.99, p80_s=2.01)
    for name, rows in (("before", pair()), ("after", slower)):
        (tmp_path / name).mkdir()
        document = {"meta": {"cpu": name}, "rows": rows}
        (tmp_path / name / "module.json").write_text(json.dumps(document))
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    assert compare.main([before, before]) == 0
    assert compare.main([before, after]) == 1
    out = capsys.readouterr().out
    assert "cpu differs: before, after" in out
    assert "worse  2.00x time" in out
    assert compare.main([f"{after}/module.json", f"{before}/module.json"]) == 0
    assert compare.main([before, after, "--tolerance", "1.5"]) == 0


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"meta": {}, "rows": []}'])
def test_compare_refuses(
    tmp_path: pathlib.Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    assert compare.main([str(file), str(file)]) == 2
    assert compare.main([str(file), str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err


# ---- beside


def test_machines_stand_beside_each_other(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = {"question": "network", "shape": "Net at 224", "group": "network"}
    avx512 = {"cpu": "A", "cpu_capability": "AVX512", "ghost_ops": {"isa": "avx512"}}
    avx2 = {"cpu": "A", "cpu_capability": "AVX2", "ghost_ops": {"isa": "avx2"}}
    setups = {"wide": avx512, "narrow": {**avx2, "forced": {"GHOST_OPS_CPU_ISA": "avx2"}}}
    for (name, meta), ours in zip(setups.items(), (1.0, 2.0), strict=True):
        rows = [{**r, **network} for r in pair(median_s=ours, p20_s=ours, p80_s=ours)]
        if name == "narrow":
            rows.append(row(median_s=3.0, provider="openvino_cl", **network))
        (tmp_path / f"{name}.json").write_text(json.dumps({"meta": meta, "rows": rows}))
    files = [str(tmp_path / f"{name}.json") for name in setups]
    assert compare.beside(files) == 0
    out = re.sub(" +", " ", capsys.readouterr().out)
    assert "- narrow: instruction sets ghost_ops avx2, ATen AVX2; forced: GHOST_OPS_CPU_ISA" in out
    assert "| | wide | narrow |" in out
    assert "| networks, eval, batch 1: times faster than eager_nchw | 4.00 | 2.00 |" in out
    what = "Net at 224, eval, batch 1, 1 thread(s): ms"
    assert f"| {what}, fused_nchw | 1000.00 | 2000.00 |" in out
    assert f"| {what}, openvino_cl | | 3000.00 |" in out, "what one file has"


def test_what_is_no_results_file_stands_nowhere(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert compare.beside([str(tmp_path / "a.json")]) == 2
    assert "not a results file" in capsys.readouterr().err
