"""A run of ``gpu_report``: the results file, the time, the parts, and the process that measures."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_programs, gpu_tables, shapes
from benchmarks.gpu_programs import OutOfTime
from benchmarks.gpu_worker import Lost, Message, Worker

MARGIN = 10.0  # seconds kept for the last job's end and for writing the tables
MOST_LOSSES = 12  # workers that end before their time
SAME = ("gpu", "sources", "torch", "cudnn_benchmark")  # what rows of one file have in common


def slug(name: str) -> str:
    """A file name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Part:
    """One resumable piece of the report.

    Args:
        name: as in ``--part`` and in the results file.
        run: does it; returns a summary in words. Raises OutOfTime, or RuntimeError on failure.
        always: done again in every run, because it leaves more behind than its rows.
        complete: whether a part that was done has all that it is to have now.
    """

    name: str
    run: Callable[[Report], str]
    always: bool = False
    complete: Callable[[Report], bool] = lambda report: True


class Report:
    """The results file, the clock, the rows, and the process that measures.

    Args:
        path: the JSON file; its rows and finished parts are taken over unless ``fresh``.
        meta: what identifies this run; a file of another device, torch or source is not taken over.
        minutes: time for everything.
        chosen: the shapes to time.
        started: time.monotonic() when it all began.
    """

    def __init__(
        self,
        path: Path,
        meta: Mapping[str, Any],
        minutes: float,
        chosen: Sequence[shapes.Shape],
        fresh: bool = False,
        started: float | None = None,
    ) -> None:
        self.path, self.log_path = path, path.with_suffix(".log")
        self.shapes = list(chosen)
        self.deadline = (time.monotonic() if started is None else started) + 60 * minutes
        self.document: dict[str, Any] = {"meta": dict(meta), "parts": {}, "copy": None, "rows": []}
        if not fresh and (earlier := load_earlier(path, meta)) is not None:
            rows = (r for r in earlier["rows"] if not r.get("note", "").startswith("skipped"))
            self.document.update(parts=earlier["parts"], copy=earlier.get("copy"), rows=list(rows))
        self.children: set[subprocess.Popen[Any]] = set()
        self.stopping = False
        self.losses = 0
        self.blamed: dict[tuple[str, str], int] = {}
        self._worker: Worker | None = None
        self._lock = threading.RLock()
        self._lines: dict[int, str] = {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.document["rows"]

    # ---- the clock

    def left(self) -> float:
        """Seconds until the tables have to be written."""
        return self.deadline - MARGIN - time.monotonic()

    def check_time(self, needed: float = 0.0) -> None:
        if self.stopping or self.left() < needed:
            raise OutOfTime

    # ---- the file

    def save(self) -> None:
        """Writes the JSON file, one row a line. Atomic: a run that ends here leaves the old one."""
        with self._lock:
            head = {key: value for key, value in self.document.items() if key != "rows"}
            text = json.dumps(head, indent=1).removesuffix("\n}")
            # A row does not change any more: its text is made once.
            for row in self.rows:
                if id(row) not in self._lines:
                    self._lines[id(row)] = json.dumps(row)
            lines = [self._lines[id(row)] for row in self.rows]
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_text(text + ',\n "rows": [\n' + ",\n".join(lines) + "\n ]\n}\n")
            temporary.replace(self.path)

    def write_tables(self) -> None:
        with self._lock:
            try:
                self.path.with_suffix(".md").write_text(gpu_tables.render(self.document))
            except Exception:  # what was measured is in the JSON file; go on measuring
                traceback.print_exc()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Takes rows in, and saves."""
        with self._lock:
            self.rows.extend(rows)
            self.save()

    def drop(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Forgets rows."""
        with self._lock:
            kept = [row for row in self.rows if not wanted(row)]
            self._lines = {id(row): self._lines[id(row)] for row in kept if id(row) in self._lines}
            self.document["rows"] = kept

    # ---- the process that measures

    def start_worker(self, **more: str) -> Worker:
        with self.log_path.open("a") as log:
            worker = Worker({**gpu_programs.environment(), **more}, log)
        self.children.add(worker.process)
        return worker

    def end_worker(self, worker: Worker) -> None:
        worker.stop()
        self.children.discard(worker.process)

    def ask(self, job: dict[str, Any], silence: float) -> Message:
        """The worker's answer; a worker that ends is replaced, and told what to avoid.

        Raises:
            OutOfTime: the time came first.
            RuntimeError: the job failed, or too many workers ended.
        """
        while True:
            if self.losses >= MOST_LOSSES:
                raise RuntimeError(f"{self.losses} processes that measure have ended: see the log")
            if self._worker is None:
                self._worker = self.start_worker()
            job["cudnn_benchmark"] = bool(self.document["meta"].get("cudnn_benchmark"))
            job["avoid"] = {**self.avoided(job), **job["avoid"]}
            try:
                return self._worker.ask(job, silence, self.deadline - MARGIN / 2)
            except TimeoutError:
                self.lose_worker()
                raise OutOfTime from None
            except Lost as lost:
                # One that never began has a fault that the next will have too.
                self.losses += 1 if self._worker.ready else 4
                self.lose_worker()
                if lost.at is None:
                    raise RuntimeError(f"{lost.reason}; see {self.log_path.name}") from lost
                blame = (job["mode"], lost.at)
                self.blamed[blame] = self.blamed.get(blame, 0) + 1
                job["avoid"] = {**job["avoid"], lost.at: lost.reason}

    def avoided(self, job: Mapping[str, Any]) -> dict[str, str]:
        """Candidates that have brought down so many processes that no more are risked."""
        return {
            name: f"ended {count} processes at other shapes"
            for (mode, name), count in self.blamed.items()
            if mode == job.get("mode") and count >= 3
        }

    def lose_worker(self) -> None:
        if self._worker is not None:
            self.end_worker(self._worker)
            self._worker = None

    def stop(self) -> None:
        """Ends all processes."""
        self.stopping = True
        for process in list(self.children):
            gpu_programs.end_group(process)
        self.children.clear()
        self._worker = None

    # ---- the parts

    def run(self, groups: Sequence[Sequence[Part]], again: bool) -> int:
        """Runs what is not done yet; ``again``: also what is. Returns the exit status.

        Parts of one group run side by side. What failed before comes last.
        """
        first: list[list[Part]] = []
        later: list[list[Part]] = []
        for group in groups:
            states = {part: self.document["parts"].get(part.name, {}) for part in group}
            todo = [part for part, state in states.items() if self.wanted(part, state, again)]
            failed = [p for p in todo if states[p].get("status") == "failed" and not p.always]
            first.append([part for part in todo if part not in failed])
            later.append(failed)
        try:
            statuses = [self.run_together(group) for group in (*first, *later) if group]
        finally:
            self.stop()
            self.save()
            self.write_tables()
        return max(statuses, default=0)

    def wanted(self, part: Part, state: Mapping[str, Any], again: bool) -> bool:
        if state.get("status") != "done" or again or part.always or not part.complete(self):
            return True
        print(f"{part.name}: done before ({state['summary']})", flush=True)
        return False

    def run_together(self, group: Sequence[Part]) -> int:
        if len(group) == 1:
            return self.run_part(group[0])
        with ThreadPoolExecutor(len(group)) as pool:
            futures = [pool.submit(self.run_part, part) for part in group]
            try:
                return max(future.result() for future in futures)
            except BaseException:
                self.stop()
                raise

    def run_part(self, part: Part) -> int:
        started, status = time.monotonic(), 0
        try:
            self.check_time()
            print(f"{part.name} ...", flush=True)
            state: dict[str, Any] = {"status": "done", "summary": part.run(self)}
        except OutOfTime:
            state = {"status": "out of time", "summary": "run the command again to go on"}
        except Exception as error:  # the other parts are worth having all the same
            message = f"{type(error).__name__}: {str(error).strip()}"
            state = {"status": "failed", "summary": message.splitlines()[-1]}
            state["log"] = message + "\n" + traceback.format_exc()
            status = 1
        state["seconds"] = time.monotonic() - started
        with self._lock:
            self.document["parts"][part.name] = state
            self.save()
        self.write_tables()
        print(f"{part.name}: {state['status']}, {state['summary']}", flush=True)
        return status


def load_earlier(path: Path, meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """An earlier report of this device, torch and source, or None: another is kept aside."""
    try:
        document = json.loads(path.read_text())
        known = document["meta"]
        different = [key for key in SAME if known.get(key) != meta.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not different:
        return document
    aside = path.with_name(f"{path.stem}-{slug(str(known.get('date', 'earlier')))}.json")
    path.rename(aside)
    print(f"{path.name} is of another {', '.join(different)}: now {aside.name}", flush=True)
    return None
