"""The one runner: executes named tasks in turn and keeps the finished ones in a file.

After an interruption the same command on the same commit and machine goes on with the missing
tasks. Its users are a question (:class:`Session`: tasks add rows to a results file), ``python -m
benchmarks all`` (tasks are questions) and ``benchmarks/gpu.py`` (tasks are steps).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import floor, machine
from benchmarks.harness.rows import check_document, check_row

INTERRUPTED = 130  # exit status
Failure = int | str | None  # of a task: none (or 0), an exit status, or a reason
Task = tuple[str, Callable[[], Failure]]


class Runner:
    """Runs tasks and keeps the finished ones in a JSON file, if there is a path.

    Two runs must have the fingerprint in common for one to go on where the other stopped; a
    ``fresh`` one forgets an interrupted earlier run.
    """

    def __init__(
        self, path: Path | None, fingerprint: Mapping[str, Any], *, fresh: bool = False
    ) -> None:
        self.path, self.fingerprint = path, dict(fingerprint)
        self.done: list[str] = []
        self.seconds: dict[str, float] = {}  # by task; those before an interruption count too
        if path is None or fresh:
            return
        try:
            self.load(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return  # no file, or no state that a run could go on from
        if self.done:
            print(f"Going on with {path}: {len(self.done)} tasks were done before")

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over an unfinished run with the same fingerprint."""
        if state["fingerprint"] == self.fingerprint and not state["complete"]:
            self.done, self.seconds = list(state["done"]), dict(state["seconds"])

    def state(self) -> dict[str, Any]:
        """What the file holds besides ``complete``."""
        return {"fingerprint": self.fingerprint, "done": self.done, "seconds": self.seconds}

    def save(self, *, complete: bool = False) -> None:
        """Write everything so far."""
        if self.path is not None:
            machine.write_json(self.path, {**self.state(), "complete": complete})

    def finish(self, name: str, failure: Failure) -> None:
        """Keep what a task has done."""
        self.done.append(name)
        self.save()

    def run(self, tasks: Sequence[Task]) -> int:
        """Run the tasks that are not done yet; a failed task does not stop the others.

        Returns:
            0; 130 if interrupted; otherwise the status of the first task that failed.
        """
        status = 0
        for number, (name, work) in enumerate(tasks, 1):
            if name in self.done:
                continue
            taken = sum(self.seconds.values())
            print(f"  {number} of {len(tasks)}, after {taken:.0f} s: {name}", flush=True)
            started = time.monotonic()
            try:
                failure = work()
            except KeyboardInterrupt:
                failure = INTERRUPTED
            spent = self.seconds.get(name, 0.0) + time.monotonic() - started
            self.seconds[name] = round(spent, 1)
            if failure == INTERRUPTED:
                self.save()
                kept = f"{len(self.done)} of {len(tasks)} tasks are kept"
                print(f"\ninterrupted: {kept}; the same command goes on from there")
                return INTERRUPTED
            self.finish(name, failure)
            status = status or (1 if isinstance(failure, str) else failure or 0)
        return status


class Session(Runner):
    """One run of one question: its machine (``metadata``), its limits if it times, its rows."""

    def __init__(
        self, question: str, arguments: Any, meta: dict[str, Any], roofline: floor.Roofline | None
    ) -> None:
        self.question, self.arguments = question, arguments
        self.meta, self.roofline = meta, roofline
        self.rows: list[dict[str, Any]] = []
        self.unsaved: list[dict[str, Any]] = []  # of the task in progress
        given = {k: str(v) for k, v in sorted(vars(arguments).items()) if k not in ("out", "fresh")}
        same = {key: str(meta.get(key)) for key in ("cpu", "torch", "commit", "allocation")}
        fingerprint = {**same, "instructions": machine.instructions(meta), "arguments": given}
        out = machine.prepare_output(arguments.out)
        super().__init__(out, fingerprint, fresh=arguments.fresh)

    def load(self, state: Mapping[str, Any]) -> None:
        check_document(state)
        super().load(state)
        if self.done:
            self.rows = list(state["rows"])

    def state(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "meta": {**self.meta, "seconds": round(sum(self.seconds.values()), 1)},
            **super().state(),
            "roofline": self.roofline and asdict(self.roofline),
            "rows": self.rows,
        }

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Add a row; it is checked and written when its task ends."""
        row = {"question": self.question, **row}
        self.unsaved.append(row)
        return row

    def finish(self, name: str, failure: Failure) -> None:
        for row in self.unsaved:
            check_row(row)
        self.rows += self.unsaved
        self.unsaved.clear()
        super().finish(name, failure)
