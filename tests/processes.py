"""Two worker processes with a gloo group between them, for tests of distributed training.

They are started once for a file, and run one function after the other. A worker that fails or does
not answer ends both: the other may wait for it in a collective. The next test starts new ones.
"""

from __future__ import annotations

import datetime
import multiprocessing
import pathlib
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2
LIMIT = 60.0  # seconds for one function
START = 120.0  # and with the start of the processes


def join_group(rank: int, store: pathlib.Path) -> None:
    """Open the default group; a file of its own for each time."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=LIMIT / 2),
    )  # fmt: skip


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
        """``function(rank, *arguments)`` in both; what they return.

        Raises:
            AssertionError: one of them raised, died, or did not answer in time.
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
                raise AssertionError(f"no answer of processes {sorted(waiting)}: they hang")
            for rank in list(waiting):
                if self.ends[rank] in ready:
                    self._receive(rank, answers)
                    waiting.remove(rank)
        return answers

    def _receive(self, rank: int, answers: list[Any]) -> None:
        try:
            error, answers[rank] = self.ends[rank].recv()
        except EOFError:
            error = "it died"
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
        """Whether they run."""
        return bool(self.processes)
