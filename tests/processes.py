"""Other processes: a fresh interpreter, and a pair of workers with a gloo group between them.

The workers are started once per test file and run one function after the other. If one worker fails
or does not reply in time, both are killed, because the other may wait for it in a collective; the
next test starts a new pair.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

import ghost_ops

WORLD = 2
LIMIT = 60.0  # seconds for one function
START = 120.0  # seconds for the first function, with the start of the processes


ROOT = pathlib.Path(ghost_ops.__file__).parents[1]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, without the GHOST_OPS_ variables of this one."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GHOST_OPS_")}
    path = os.pathsep.join([str(ROOT), clean.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-W", "always", "-c", code]
    env = {**clean, "PYTHONPATH": path, **environment}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=env
    )


# Three calls of a module, and the backend that ran them.
RUN = (
    "import torch, ghost_ops; m = ghost_ops.FusedGhostModule(4, 6).eval();"
    "[m(torch.randn(1, 4, 5, 5)) for _ in range(3)];"
    "print(ghost_ops.backends.select('cpu', torch.float32))"
)


def join_group(rank: int, store: pathlib.Path) -> None:
    """Open the default group; ``store`` is a file that no other group uses."""
    timeout = datetime.timedelta(seconds=LIMIT / 2)
    where = f"file://{store}"
    dist.init_process_group("gloo", where, timeout, WORLD, rank)


def _serve(rank: int, connection: Connection, store: pathlib.Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    join_group(rank, store)
    while True:
        function, arguments = connection.recv()
        try:
            torch.manual_seed(0)
            answer: Any = function(rank, *arguments)
            connection.send((None, answer))
        except BaseException:
            connection.send((traceback.format_exc(), None))


class Pair:
    """The two processes."""

    def __init__(self) -> None:
        self.folder = pathlib.Path(tempfile.mkdtemp())
        context = multiprocessing.get_context("spawn")
        self.processes, self.ends = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, theirs, self.folder / "store"), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.ends.append(ours)
        self.limit = START

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(rank, *arguments)`` in both; return the two results.

        Raises:
            AssertionError: a process raised an error, died, or did not reply in time.
        """
        until, self.limit = time.monotonic() + self.limit, LIMIT
        answers: list[Any] = [None] * WORLD
        for end in self.ends:
            end.send((function, arguments))
        waiting = set(range(WORLD))
        while waiting:
            ready = multiprocessing.connection.wait(
                [self.ends[rank] for rank in waiting], max(0.0, until - time.monotonic())
            )
            if not ready:
                self.close()
                raise AssertionError(f"processes {sorted(waiting)} do not reply: they hang")
            for rank in list(waiting):
                if self.ends[rank] in ready:
                    self._receive(rank, answers)
                    waiting.remove(rank)
        return answers

    def _receive(self, rank: int, answers: list[Any]) -> None:
        try:
            error, answers[rank] = self.ends[rank].recv()
        except EOFError:
            error = "the process died"
        if error is not None:
            self.close()
            raise AssertionError(f"process {rank}: {error}")

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes = []
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def is_open(self) -> bool:
        """Whether the processes run."""
        return bool(self.processes)
