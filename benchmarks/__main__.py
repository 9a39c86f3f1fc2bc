"""``python -m benchmarks``: list the commands; ``NAME ...``: run one; ``all``: the whole report."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import gpu
from benchmarks.harness import machine
from benchmarks.harness.runner import INTERRUPTED, Runner
from benchmarks.harness.timing import CLOCKS
from benchmarks.questions import QUESTIONS, Question
from benchmarks.report import compare, page, plot

TOOLS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "page": ("REPORT.md and pictures from a folder of results", page.main),
    "plots": ("pictures from one results file", plot.main),
    "compare": ("regressions between two results files or folders, beyond noise", compare.main),
    "beside": ("one Markdown table from the results of several machines", compare.beside),
    "gpu": ("one GPU: correctness, times, networks, counters, tests", gpu.main),
}


def usage() -> str:
    """The list of commands."""
    lines = [
        "usage: python -m benchmarks NAME [options]      one command; NAME --help says more",
        "       python -m benchmarks all [--quick]       every question (*), then the report",
        "",
    ]
    lines += [f" * {name:11} {question.purpose}" for name, question in QUESTIONS.items()]
    return "\n".join([*lines, *(f"   {name:11} {purpose}" for name, (purpose, _) in TOOLS.items())])


def ask(question: Question, arguments: Sequence[str]) -> int:
    """Run a question in a separate process: the allocator is configured at process start."""
    command = [sys.executable, "-m", "benchmarks", question.name, *arguments]
    process = subprocess.Popen(command, env={**os.environ, **question.malloc})
    while True:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            continue  # the question was interrupted too, and prints what it keeps
        if status in (INTERRUPTED, -2):  # with or without a handler
            return INTERRUPTED
        if status:
            print(f"{question.name} ended with status {status}", file=sys.stderr)
        return status


def report_run(folder: Path, argv: Sequence[str], *, fresh: bool = False) -> Runner:
    """The runner of ``all``: what the same command left unfinished on this commit counts."""
    command = machine.command_line(["python", "-m", "benchmarks", "all", *argv])
    fingerprint = {"command": command, "commit": machine.git_commit()}
    return Runner(folder / page.RUN_FILE, fingerprint, fresh=fresh)


def run_all(argv: Sequence[str]) -> int:
    """Ask the questions one after the other, then write the page; returns the first failure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks all", description="Every question, one folder, one page."
    )
    parser.add_argument("--quick", action="store_true", help="in three minutes instead of twenty")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder")
    parser.add_argument("--only", nargs="+", choices=tuple(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--fresh", action="store_true", help="forget interrupted earlier runs")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    given = parser.parse_args(argv)
    try:
        machine.prepare_output(given.out / "REPORT.md")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run = report_run(given.out, argv, fresh=given.fresh)

    def task(question: Question) -> Callable[[], int]:
        options = ["--out", str(given.out / f"{question.name}.json"), "--clock", given.clock]
        options += question.quick if given.quick else question.full
        return lambda: ask(question, [*options, *(["--fresh"] if given.fresh else [])])

    status = run.run([(name, task(QUESTIONS[name])) for name in given.only])
    if status == INTERRUPTED:
        return status
    run.save(complete=True)
    taken = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in run.seconds.items())
    print(f"{taken}; in all {sum(run.seconds.values()):.0f} s", flush=True)
    return page.main([str(given.out)]) or status


def main(argv: Sequence[str] | None = None) -> int:
    """List the commands, run one of them, or ask all questions."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["list"]
    if name in ("-h", "--help", "list"):
        print(usage())
        return 0
    if name == "all":
        return run_all(arguments)
    if name in QUESTIONS:
        return QUESTIONS[name].main(arguments)
    if name in TOOLS:
        return TOOLS[name][1](arguments)
    print(f"error: no {name!r}; known: {', '.join(['all', *QUESTIONS, *TOOLS])}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
