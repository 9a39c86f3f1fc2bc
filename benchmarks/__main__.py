"""``python -m benchmarks``: list the scripts; ``NAME ...``: run one; ``all``: the whole report."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import harness


@dataclass(frozen=True)
class Script:
    """One script of this package.

    Args:
        purpose: one line for the list.
        in_report: ``all`` runs it, writing <name>.json.
        full, quick: its arguments for ``all`` and ``all --quick``.
        malloc: the allocator that it would otherwise restart itself with.
    """

    purpose: str
    in_report: bool = False
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    malloc: Mapping[str, str] = field(default_factory=lambda: harness.TUNED_MALLOC)


SCRIPTS: dict[str, Script] = {
    "module": Script(
        "one Ghost module: time in floors, ratios to the peers, saved memory, call overhead",
        True,
        # Compiling a hundred modules would take half of the twenty minutes.
        ("--rounds", "9", "--compile-minutes", "3"),
    ),
    "network": Script(
        "whole networks: inference, training step, saved memory",
        True,
        # A network takes torch.compile a minute or two: the first one gets them.
        ("--rounds", "3", "--compile-minutes", "1"),
        ("--quick", "--rounds", "3"),
    ),
    "scaling": Script(
        "how the cost grows with batch, size, channels, ratio, d, threads", True, ("--rounds", "9")
    ),
    "memory": Script(
        "peak memory of a training step, eager against fused", True, malloc=harness.LEAN_MALLOC
    ),
    "plan": Script(
        "time predicted from bytes and FLOPs against time measured", True, ("--rounds", "9")
    ),
    "product": Script("the primary product alone, against the GEMM peak", True, ("--rounds", "9")),
    "paper": Script(
        "the paper's questions: speed-up by FLOPs and measured; redundancy", True, ("--rounds", "9")
    ),
    "page": Script("REPORT.md and pictures from a folder of results"),
    "plots": Script("pictures from one results file"),
    "compare": Script("regressions between two results files or folders, beyond noise"),
    "beside": Script("one Markdown table from the results of several machines"),
    "demo": Script("train on real digits with the reference and the fused modules"),
    "digits": Script("train on real digits in 16 bits, plain beside fused"),
    "gpu": Script("one GPU: correctness, times, networks, counters, tests"),
}


def _run(script: str, arguments: Sequence[str], settings: Mapping[str, str] | None = None) -> int:
    # A process of its own: the allocator is set up when a process starts.
    process = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{script}", *arguments],
        env={**os.environ, **(settings or {})},
    )
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # it has been interrupted too, and says what it keeps


def usage() -> str:
    """The list of scripts."""
    lines = [
        "usage: python -m benchmarks NAME [options]      one script; NAME --help says more",
        "       python -m benchmarks all [--quick]       every script marked *, then the report",
        "",
    ]
    lines += [
        f" {'*' if s.in_report else ' '} {name:11} {s.purpose}" for name, s in SCRIPTS.items()
    ]
    return "\n".join(lines)


def run_all(argv: Sequence[str]) -> int:
    """Run the scripts of the report one after the other, then write the page.

    Returns:
        0; 130 if interrupted; otherwise the status of the first script that failed. A script that
        fails does not keep the others from running.
    """
    in_report = [name for name, script in SCRIPTS.items() if script.in_report]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks all", description="Every question, one folder, one page."
    )
    parser.add_argument("--quick", action="store_true", help="in three minutes instead of twenty")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder")
    parser.add_argument("--only", nargs="+", choices=in_report, default=in_report)
    parser.add_argument("--fresh", action="store_true", help="forget interrupted earlier runs")
    parser.add_argument("--clock", choices=tuple(harness.CLOCKS), default="wall")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.out
    try:
        harness.prepare_output(folder / "REPORT.md")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options = ["--clock", arguments.clock]
    state = RunState(folder / harness.RUN_FILE, ["all", *argv])
    if not arguments.fresh:
        state.load()
    status = 0
    for name in arguments.only:
        script = SCRIPTS[name]
        if name in state.done:
            print(f"\n== {name}: done before the interruption (--fresh does it again)")
            continue
        given = ["--out", str(folder / f"{name}.json"), *options]
        given += script.quick if arguments.quick else script.full
        if arguments.fresh:
            given.append("--fresh")
        print(f"\n== {name}: {script.purpose}", flush=True)
        started = time.monotonic()
        result = _run(name, given, script.malloc)
        state.add(name, time.monotonic() - started)
        if result in (130, -2):  # interrupted, with or without a handler of its own
            state.save()
            print("interrupted: the same command goes on from here", file=sys.stderr)
            return 130
        if result:
            print(f"{name} ended with status {result}", file=sys.stderr)
        status = status or result
        state.done.append(name)
        state.save()
    state.save(complete=True)
    started = time.monotonic()
    status = _run("page", [str(folder)]) or status
    seconds = {**state.seconds, "page": time.monotonic() - started}
    taken = [f"{name} {took:.0f} s" for name, took in seconds.items()]
    print(f"{', '.join(taken)}; in all {sum(seconds.values()):.0f} s", flush=True)
    return status


class RunState:
    """What a report has done so far and how long it took, in a file beside its results.

    Args:
        path: the file.
        argv: the command line after ``python -m benchmarks``.
    """

    def __init__(self, path: Path, argv: Sequence[str]) -> None:
        self.path, self.commit = path, harness.git_commit()
        self.command = harness.command_line(["python", "-m", "benchmarks", *argv])
        self.done: list[str] = []
        self.seconds: dict[str, float] = {}

    def load(self) -> None:
        """Take over what the same command left unfinished on the same commit."""
        try:
            state = json.loads(self.path.read_text())
            same = (state["command"], state["commit"]) == (self.command, self.commit)
            if same and not state["complete"]:
                self.done, self.seconds = list(state["done"]), dict(state["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # nothing there, or nothing that could be gone on with

    def add(self, name: str, seconds: float) -> None:
        """Count time spent on a part; what it took before an interruption is kept."""
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 1)

    def save(self, *, complete: bool = False) -> None:
        """Write everything so far."""
        state = {"command": self.command, "commit": self.commit, "complete": complete}
        harness.write_json(self.path, {**state, "done": self.done, "seconds": self.seconds})


def main(argv: Sequence[str] | None = None) -> int:
    """List, run one script, or run them all."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "list"):
        print(usage())
        return 0
    name, arguments = argv[0], argv[1:]
    if name == "all":
        return run_all(arguments)
    if name not in SCRIPTS:
        known = ", ".join(["all", *SCRIPTS])
        print(f"error: no script {name!r}; known: {known}", file=sys.stderr)
        return 2
    return _run(name, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
