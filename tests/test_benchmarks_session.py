"""Promises of the benchmark scripts: rows keep their schema, interrupted runs go on."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Callable

import pytest
import torch
from benchmark_rows import LIMITS, row, skip_without_native

from benchmarks import __main__ as listing
from benchmarks.harness import engines, machine, providers, rows, runner, shapes
from benchmarks.questions import QUESTIONS, Question, memory
from benchmarks.report import page

pytest.importorskip("numpy")
ROOT = pathlib.Path(__file__).resolve().parent.parent


# ---- the schema


def test_schema_takes_a_whole_row() -> None:
    rows.check_row(row())
    rows.check_row(row(median_s=None, note="failed: no memory"))


@pytest.mark.parametrize("field", [*rows.ROW_FIELDS, *rows.TIMED_FIELDS])
def test_schema_wants_every_field(field: str) -> None:
    broken = row()
    del broken[field]
    with pytest.raises(ValueError, match=field):
        rows.check_row(broken)


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
        rows.check_row(row(**changes))


def test_committed_results_keep_the_schema() -> None:
    files = [p for p in (ROOT / "benchmarks/results").glob("*.json") if "rows" in p.read_text()]
    for path in files:
        for line in rows.load(path)["rows"]:
            if line.get("median_s") is not None and line.get("question") in QUESTIONS:
                rows.check_row(line)


# ---- interrupted runs


def make_session(out: pathlib.Path, **changes: object) -> runner.Session:
    arguments = argparse.Namespace(**{"rounds": 3, "fresh": False, "out": out, **changes})
    meta = machine.metadata(["test"], cores=[], allocation="as it comes")
    return runner.Session("test", arguments, meta, LIMITS)


def tasks(run: runner.Session, ran: list[str], stop_at: str | None) -> list[runner.Task]:
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
    rows.check_document(document)
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

    def ask(question: Question, arguments: list[str]) -> int:
        ran.append((question.name, list(arguments)))
        return answers.pop(question.name, 0)

    def write_page(arguments: list[str]) -> int:
        ran.append(("page", arguments))
        return 0

    monkeypatch.setattr(listing, "ask", ask)
    monkeypatch.setattr(page, "main", write_page)
    command = ["--quick", "--out", str(tmp_path)]
    assert listing.run_all(command) == 130
    assert [name for name, _ in ran] == ["module", "network"]
    assert "--quick" in ran[0][1] and str(tmp_path / "module.json") in ran[0][1]
    state = json.loads((tmp_path / page.RUN_FILE).read_text())
    assert (state["complete"], state["done"]) == (False, ["module"])
    ran.clear()
    assert listing.run_all([*command, "--clock", "cpu", "--only", "plan"]) == 0
    assert [name for name, _ in ran] == ["plan", "page"], "another command starts over"
    (tmp_path / page.RUN_FILE).write_text(json.dumps(state))
    ran.clear()
    assert listing.run_all(command) == 0
    rest = "network order scaling memory plan product paper settings page".split()
    assert [name for name, _ in ran] == rest
    out = capsys.readouterr().out
    assert "1 tasks were done before" in out
    state = json.loads((tmp_path / page.RUN_FILE).read_text())
    assert state["complete"] and [*state["seconds"]] == [*state["done"]]
    assert "in all" in out and "network 0 s" in out
    ran.clear()
    assert listing.run_all(command) == 0
    assert next(name for name, _ in ran) == "module", "a finished report is made anew"


def test_failing_script_does_not_stop_the_report(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(listing, "ask", lambda q, _: ran.append(q.name) or (q.name == "scaling"))
    monkeypatch.setattr(page, "main", lambda argv: ran.append("page") or 0)
    assert listing.run_all(["--out", str(tmp_path)]) == 1
    assert ran[-1] == "page" and "paper" in ran


# ---- bad input


@pytest.mark.parametrize("name", QUESTIONS)
def test_unwritable_folder_is_refused(
    name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "memory" and memory.unavailable():
        pytest.skip(memory.unavailable() or "")
    if name == "plan":
        skip_without_native()
    (tmp_path / "file").write_text("kept")
    arguments = ["--malloc", "default", "--out", str(tmp_path / "file" / "x.json")]
    assert QUESTIONS[name].main(arguments) == 2
    assert "cannot write results to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"done": 3}'])
def test_broken_state_of_a_report_is_forgotten(content: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / page.RUN_FILE
    path.write_text(content)
    run = listing.report_run(tmp_path, [])
    assert (run.done, run.seconds) == ([], {})


def test_unwritable_report_folder_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert listing.run_all(["--out", str(tmp_path / "file")]) == 2
    assert "cannot write results to" in capsys.readouterr().err


def test_missing_extra_stops_a_question(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    arguments = ["--malloc", "default", "--out", str(tmp_path / "x.json")]
    assert QUESTIONS["scaling"].main(arguments) == 2
    assert 'pip install "ghost_ops[bench]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("scaling", ["--axis", "colour"], "invalid choice"),
        ("scaling", ["--providers", "tensorflow"], "matches none"),
        ("scaling", ["--rounds", "0"], "positive"),
        ("plan", ["--batch", "0"], "positive"),
        ("plan", ["--shapes", "1-2@3-relu"], "matches no shape"),
        ("memory", ["--batch", "-1"], "positive"),
        ("paper", ["--ratio", "1"], "at least 2"),
        ("paper", ["--dw-size", "2"], "invalid choice"),
        ("network", ["--networks", "resnet"], "invalid choice"),
        ("network", ["--size", "8"], "at least 32"),
        ("network", ["--batch", "0"], "positive"),
        ("network", ["--train-batch", "1"], "at least 2"),
        ("network", ["--train-threads", "0"], "train-threads: expected "),
        ("network", ["--train-threads", "99999"], "train-threads: expected "),
        ("network", ["--providers", "tensorflow"], "matches none"),
        ("network", ["--compile-minutes", "-1"], "at least 0"),
        ("network", ["--rounds", "0"], "positive"),
        ("module", ["--compile-minutes", "nan"], "at least 0"),
        ("settings", ["--threads", "2"], "threads are a setting"),
        ("settings", ["--dtype", "float16"], "dtype is a setting"),
        ("settings", ["--page", "nothing.md"], "page: expected a file with the lines"),
    ],
)
def test_bad_arguments(
    name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        QUESTIONS[name].parse(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# ---- forced instruction sets


def test_a_forced_run_says_so(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.FORCING:
        monkeypatch.delenv(name, raising=False)
    out, plain = tmp_path / "test.json", make_session(tmp_path / "test.json")
    assert plain.meta["forced"] == {} and "forced" not in machine.instructions(plain.meta)
    with pytest.raises(ZeroDivisionError):
        plain.run([("a", lambda: plain.add(row())), ("b", lambda: 1 // 0)])
    assert make_session(out).done == ["a"]

    monkeypatch.setenv("GHOST_OPS_CPU_ISA", "avx2")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    run = make_session(out)
    assert run.done == [], "rows of another instruction set are not gone on with"
    assert run.meta["forced"] == {"GHOST_OPS_CPU_ISA": "avx2", "DNNL_MAX_CPU_ISA": "AVX2"}
    assert run.meta["command"].startswith("GHOST_OPS_CPU_ISA=avx2 DNNL_MAX_CPU_ISA=AVX2 ")
    words = machine.instructions({**run.meta, "ghost_ops": {"isa": "avx2"}})
    assert words.startswith("ghost_ops avx2, ATen ")
    assert words.endswith("; forced: GHOST_OPS_CPU_ISA=avx2 DNNL_MAX_CPU_ISA=AVX2")
    free = machine.not_held(run.meta["forced"])
    assert free == "ATEN_CPU_CAPABILITY, MKL_ENABLE_INSTRUCTIONS"
    assert "cannot be held" in (engines.unavailable(providers.ENGINES[0], torch.float32) or "")
    report = listing.report_run(tmp_path, [])
    assert report.fingerprint["command"].startswith("GHOST_OPS_CPU_ISA=avx2 ")


def test_auto_forces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHOST_OPS_CPU_ISA", "auto")
    assert "GHOST_OPS_CPU_ISA" not in machine.forced()
    assert machine.not_held({}) == ""


# ---- engines


def test_missing_engine_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert engines.installed() == []
    for engine in providers.ENGINES:
        reason = engines.unavailable(engine, torch.float32)
        assert reason is not None and 'pip install "ghost_ops[engines]"' in reason
    engines.print_missing()
    assert 'pip install "ghost_ops[engines]"' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        QUESTIONS["module"].parse(["--providers", "openvino"])
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
        own = engine.input(x).clone(memory_format=torch.preserve_format)
        call = engines.build(engine, providers.folded(reference), own)
        torch.testing.assert_close(call(), reference(x), rtol=1e-4, atol=1e-5)
        own.neg_()  # the input is read anew at every call
        torch.testing.assert_close(call(), reference(-x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", providers.ENGINES, ids=lambda p: p.name)
def test_engines_hold_what_they_read(engine: providers.Provider) -> None:
    """A call must not read memory that was freed with the tensor it was built for."""
    lacking = engines.missing(engine)
    if lacking is not None:
        pytest.skip(str(lacking))
    with torch.inference_mode():
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten()).eval()
        x = torch.randn(4, 3, 64, 64)
        call = engines.build(engine, network, engine.input(x.clone()))
        junk = [torch.full_like(x, 1e30) for _ in range(8)]
        torch.testing.assert_close(call(), network(x), rtol=1e-4, atol=1e-4)
        del junk


@pytest.mark.parametrize(("kept", "whole"), [(8, 1), (7, 0)])
def test_only_slices_that_keep_everything_go(kept: int, whole: int) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnx.reference")
    make, kind = onnx.helper, onnx.TensorProto
    ends = [make.make_tensor(n, kind.INT64, [1], [v]) for n, v in (("b", 0), ("e", kept), ("a", 1))]
    nodes = [
        make.make_node("Relu", ["x"], ["y"]),
        make.make_node("Slice", ["y", "b", "e", "a"], ["z"]),
        make.make_node("Neg", ["y"], ["other"]),
    ]
    x, z, other = (
        make.make_tensor_value_info(name, kind.FLOAT, shape)
        for name, shape in (("x", [2, 8]), ("z", [2, kept]), ("other", [2, 8]))
    )
    graph = make.make_graph(nodes, "g", [x], [z, other], initializer=ends)
    model = onnx.shape_inference.infer_shapes(make.make_model(graph), data_prop=True)
    assert engines.drop_whole_slices(model) == whole
    assert sum(node.op_type == "Slice" for node in model.graph.node) == 1 - whole
    onnx.checker.check_model(model)
    given = torch.randn(2, 8).numpy()
    got = onnx.reference.ReferenceEvaluator(model).run(None, {"x": given})
    assert (got[0] == given.clip(0)[:, :kept]).all() and (got[1] == -given.clip(0)).all()
