"""Promises of the benchmark scripts: rows keep their schema, interrupted runs go on."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import types
from collections.abc import Callable

import pytest
import torch
from benchmark_rows import LIMITS, SCRIPTS, row, skip_without_native

from benchmarks import __main__ as listing
from benchmarks import (
    compare,
    engines,
    harness,
    memory,
    module,
    providers,
    scaling,
    session,
    shapes,
)

for package in ("numpy", "rich"):
    pytest.importorskip(package)


ROOT = pathlib.Path(__file__).resolve().parent.parent


# ---- the schema


def test_schema_takes_a_whole_row() -> None:
    session.check_row(row())
    session.check_row(row(median_s=None, note="failed: no memory"))


@pytest.mark.parametrize("field", [*session.ROW_FIELDS, *session.TIMED_FIELDS])
def test_schema_wants_every_field(field: str) -> None:
    broken = row()
    del broken[field]
    with pytest.raises(ValueError, match=field):
        session.check_row(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": "1"}, "batch"),
        ({"rounds": True}, "rounds"),
        ({"p20_s": 2.5}, "out of order"),
        ({"median_s": math.nan}, "out of order"),
        ({"median_s": None}, "without median_s"),
    ],
)
def test_schema_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session.check_row(row(**changes))


def test_committed_results_keep_the_schema() -> None:
    files = [p for p in (ROOT / "benchmarks/results").glob("*.json") if "rows" in p.read_text()]
    for path in files:
        for line in compare.load(path)["rows"]:
            if line.get("median_s") is not None and line.get("question") in SCRIPTS:
                session.check_row(line)


# ---- interrupted runs


def make_session(out: pathlib.Path, **changes: object) -> session.Session:
    arguments = argparse.Namespace(**{"rounds": 3, "fresh": False, "out": out, **changes})
    console = types.SimpleNamespace(print=lambda *a, **k: None, is_terminal=False)
    meta = harness.metadata(threads=1, cores=[], allocation="as it comes")
    return session.Session("test", arguments, console, meta, LIMITS, out)


def tasks(run: session.Session, ran: list[str], stop_at: str | None) -> list[session.Task]:
    def work(name: str) -> Callable[[], None]:
        def task() -> None:
            ran.append(name)
            run.add(row(shape=name))
            if name == stop_at:
                raise KeyboardInterrupt

        return task

    return [(name, work(name)) for name in ("a", "b", "c")]


def test_interrupted_run_keeps_its_rows_and_goes_on(tmp_path: pathlib.Path) -> None:
    out, ran = tmp_path / "test.json", []
    first = make_session(out)
    assert first.run(tasks(first, ran, "b")) == 130
    document = json.loads(out.read_text())
    session.check_document(document)
    # The row of the task that was cut short is not there: it will be made again.
    assert [r["shape"] for r in document["rows"]] == ["a"]
    assert not document["complete"]

    second = make_session(out)
    assert second.run(tasks(second, ran, None)) == 0
    second.save(complete=True)
    assert ran == ["a", "b", "b", "c"]
    document = json.loads(out.read_text())
    assert [r["shape"] for r in document["rows"]] == ["a", "b", "c"]
    assert document["complete"]
    assert make_session(out).done == [], "a finished run is not gone on with"


@pytest.mark.parametrize("changes", [{"rounds": 4}, {"fresh": True}])
def test_another_command_starts_over(tmp_path: pathlib.Path, changes: dict) -> None:
    out = tmp_path / "test.json"
    first = make_session(out)
    first.run(tasks(first, [], "b"))
    assert make_session(out).done == ["a"]
    assert make_session(out, **changes).done == []


def test_malformed_rows_are_refused(tmp_path: pathlib.Path) -> None:
    run = make_session(tmp_path / "test.json")
    with pytest.raises(ValueError, match="batch"):
        run.run([("a", lambda: run.add(row(batch=None)) and None)])


def test_interrupted_report_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, list[str]]] = []
    answers = {"network": 130}

    def run(name: str, arguments: list[str], *settings: object) -> int:
        ran.append((name, list(arguments)))
        return answers.pop(name, 0)

    monkeypatch.setattr(listing, "_run", run)
    command = ["--quick", "--out", str(tmp_path)]
    assert listing.run_all(command) == 130
    assert [name for name, _ in ran] == ["module", "network"]
    assert "--quick" in ran[0][1] and str(tmp_path / "module.json") in ran[0][1]
    ran.clear()
    assert listing.run_all(command) == 0
    assert [name for name, _ in ran] == ["network", "scaling", "memory", "plan", "paper", "page"]
    ran.clear()
    assert listing.run_all(command) == 0
    assert next(name for name, _ in ran) == "module", "a finished report is made anew"


def test_failing_script_does_not_stop_the_report(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(listing, "_run", lambda name, *_: ran.append(name) or (name == "scaling"))
    assert listing.run_all(["--out", str(tmp_path)]) == 1
    assert ran[-1] == "page" and "paper" in ran


# ---- bad input


@pytest.mark.parametrize("name", SCRIPTS)
def test_unwritable_folder_is_refused(
    name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "memory" and memory.unavailable():
        pytest.skip(memory.unavailable() or "")
    if name == "paper":
        pytest.importorskip("mlxtend")
    if name == "plan":
        skip_without_native()
    (tmp_path / "file").write_text("kept")
    arguments = ["--malloc", "default", "--out", str(tmp_path / "file" / "x.json")]
    assert SCRIPTS[name].main(arguments) == 2
    assert "cannot write results to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_unwritable_report_folder_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert listing.run_all(["--out", str(tmp_path / "file")]) == 2
    assert "cannot write results to" in capsys.readouterr().err


def test_missing_extra_stops_a_script(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = scaling.parse_arguments(["--malloc", "default", "--out", str(tmp_path / "x.json")])
    extras = [("no_such_package_here", "a test", "demo")]
    assert session.start("scaling", [], arguments, extras=extras) is None
    assert 'pip install "ghost_ops[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("scaling", ["--axis", "colour"], "invalid choice"),
        ("scaling", ["--providers", "tensorflow"], "matches none"),
        ("scaling", ["--rounds", "0"], "positive"),
        ("plan", ["--batch", "0"], "positive"),
        ("plan", ["--shapes", "1-2@3-relu"], "matches no shape"),
        ("memory", ["--batch", "-1"], "positive"),
        ("paper", ["--ratio", "1"], "from 2 up"),
        ("paper", ["--digits", "7"], "100 to 5000"),
        ("paper", ["--dw-size", "2"], "invalid choice"),
    ],
)
def test_bad_arguments(
    name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[name].parse_arguments(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# ---- engines


def test_missing_engine_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert engines.installed() == []
    for engine in providers.ENGINES:
        reason = engines.unavailable(engine, torch.float32)
        assert reason is not None and 'pip install "ghost_ops[engines]"' in reason
    with pytest.raises(SystemExit):
        module.parse_arguments(["--providers", "openvino"])
    assert "ghost_ops[engines]" in capsys.readouterr().err


def test_engines_are_asked_for_by_name_only() -> None:
    everyone = (*providers.PROVIDERS, *providers.ENGINES)
    assert not any(p.engine for p in providers.select(["all"], everyone))
    assert [p.name for p in providers.select(["openvino*"], everyone) if p.engine] == [
        "openvino_nchw",
        "openvino_cl",
    ]


def test_engines_take_no_other_dtype() -> None:
    assert "float32 only" in (engines.unavailable(providers.ENGINES[0], torch.bfloat16) or "")


@pytest.mark.parametrize("engine", providers.ENGINES, ids=lambda p: p.name)
@pytest.mark.parametrize("activation", ["relu", "silu", "none"])
def test_engines_agree(engine: providers.Provider, activation: str) -> None:
    lacking = engines.missing(engine)
    if lacking is not None:
        pytest.skip(str(lacking))
    # 7 outputs of ratio 2: the last ghost map is dropped.
    shape = shapes.Shape(6, 7, 9, activation, dw_size=5)
    with torch.inference_mode():
        reference = providers.reference_module(shape).eval()
        x = torch.randn(2, 6, 9, 9)
        own = engine.input(x)
        got = engines.build(engine, reference, own)(own)
        torch.testing.assert_close(got, reference(x), rtol=1e-4, atol=1e-5)
