"""The process that measures for ``gpu_report``: a crash or a hang costs one candidate of one shape.

It reads a job a line on stdin, as JSON, and answers in lines of JSON on stdout: ``{"at": name}``
when a candidate begins, then one of ``rows``, ``copy``, ``failed`` (the job) and ``lost`` (the
device, with this process). Everything that libraries print goes to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, not as a module
    sys.path.insert(0, str(ROOT))

Job = dict[str, Any]
Message = dict[str, Any]
START_SECONDS = 120.0  # importing torch from a cold disk, and the device's context
COMMAND = (sys.executable, str(Path(__file__).resolve()))
# Signals to a terminal's group are for the report, which ends its children itself.
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends a process of ``OWN_GROUP`` and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---------------------------------------------------------------- the report's side


class Lost(Exception):
    """The worker has ended, or fell silent and was ended.

    Args:
        at: the candidate that was at work; None: starting, or timing.
        reason: what became of the worker.
    """

    def __init__(self, at: str | None, reason: str) -> None:
        super().__init__(reason)
        self.at, self.reason = at, reason


class Worker:
    """A process that measures, one job after the other.

    Args:
        environment: of the process.
        log: gets what it prints.
        command: what to run.
    """

    def __init__(
        self, environment: Mapping[str, str], log: IO[str], command: Sequence[str] = COMMAND
    ) -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=log, **OWN_GROUP,
        )  # fmt: skip
        self.inbox: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ready = False

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.inbox.put(line)
        self.inbox.put(None)

    def ask(self, job: Job, silence: float, until: float) -> Message:
        """The answer to one job.

        Args:
            silence: seconds without a word after which the worker is taken to hang.
            until: time.monotonic() at which it is ended in any case.

        Raises:
            Lost: the worker is no more.
            TimeoutError: ``until`` has come; the worker is no more.
            RuntimeError: the job failed; the worker lives.
        """
        at: str | None = None
        if not self.ready:
            self._next(at, START_SECONDS, until)
            self.ready = True
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            self.stop()
            raise Lost(None, f"the process that measures has ended ({error})") from error
        while True:
            message = self._next(at, silence, until)
            if "at" in message:
                at = None if message["at"] == "timing" else message["at"]
            elif "lost" in message:
                self.stop()
                raise Lost(at, message["lost"])
            elif "failed" in message:
                raise RuntimeError(message["failed"])
            else:
                return message

    def _next(self, at: str | None, silence: float, until: float) -> Message:
        left = until - time.monotonic()
        try:
            line = self.inbox.get(timeout=max(min(silence, left), 0.0))
        except queue.Empty:
            self.stop()
            if left <= silence:
                raise TimeoutError from None
            raise Lost(at, f"no answer in {silence:.0f} s") from None
        if line is None:
            self.stop()
            code = self.process.returncode
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise Lost(at, f"the process ended: {name}")
        return json.loads(line)

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        end_group(self.process)


# ---------------------------------------------------------------- the worker's side


def do(job: Job, tell: Callable[[str], None]) -> Message:
    """The answer to one job."""
    import torch

    from benchmarks import gpu_clock, gpu_timing, shapes

    torch.backends.cudnn.benchmark = job.get("cudnn_benchmark", False)
    if job["kind"] == "copy":
        return {"copy": gpu_clock.measure_copy()}
    options = gpu_timing.Options(
        copy=job["copy"], compile_mode=job["compile_mode"], avoid=job["avoid"], tell=tell
    )
    measure = {
        "time": gpu_timing.time_shape,
        "memory": gpu_timing.memory_shape,
        "warm": gpu_timing.warm_shape,
    }[job["kind"]]
    candidates = [gpu_timing.NAMED[name] for name in job["candidates"]]
    dtype = getattr(torch, job["dtype"])
    try:
        rows = measure(
            job["mode"], shapes.Shape(**job["shape"]), job["batch"], dtype, candidates, options
        )
    finally:
        if "compile_cl" in job["candidates"]:
            torch._dynamo.reset()  # else a shape meets another's recompile limit
        if torch.cuda.memory_reserved() > torch.cuda.get_device_properties(0).total_memory // 2:
            torch.cuda.empty_cache()
    return {"rows": [{**row, "mode": job["label"]} for row in rows]}


def serve(lines: Iterable[str], say: Callable[[Message], None]) -> int:
    """Answers jobs until there are no more. Returns the exit status."""
    from benchmarks import gpu_timing

    say({"ready": True})
    for line in lines:
        try:
            say(do(json.loads(line), lambda name: say({"at": name})))
        except gpu_timing.DeviceLost as error:
            say({"lost": str(error)})
            return 1
        except Exception as error:
            say({"failed": f"{type(error).__name__}: {error}\n{traceback.format_exc()[-2000:]}"})
    return 0


def shape_fields(shape: Any) -> dict[str, Any]:
    """A shape, as a job holds it."""
    return dataclasses.asdict(shape)


def main() -> int:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer

    def say(message: Message) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    return serve(sys.stdin, say)


if __name__ == "__main__":
    raise SystemExit(main())
