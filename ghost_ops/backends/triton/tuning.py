"""The choice of a kernel's tile: the plan's, or the fastest of several, cached on disk.

With GHOST_OPS_TRITON_AUTOTUNE=1 the first call of a kernel on a new problem times the plan's
candidates and writes the winner to a JSON file in GHOST_OPS_CACHE_DIR (by default ghost_ops in
$XDG_CACHE_HOME or ~/.cache), one file for each device and version of Triton and of ghost_ops.
Without the variable the file is not read, and the plan's default runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ... import environment
from ..._version import __version__
from ...announce import warn_once
from .plan import Device, Problem, Tile, candidates

Result = TypeVar("Result")

autotune: bool = environment.TRITON_AUTOTUNE.get() == "1"

_lock = threading.RLock()
_chosen: dict[tuple[Device, str], Tile] = {}
_loaded: dict[Device, dict[str, Any]] = {}


def cache_file(device: Device) -> Path:
    """The file with the fastest tiles for a device."""
    import triton

    root = environment.CACHE_DIR.get()
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ghost_ops")
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.name} triton {triton.__version__}")
    return Path(root).expanduser() / f"{name}-ghost_ops-{__version__}.json"


def key(kind: str, p: Problem, variant: str = "") -> str:
    """The key of a problem in the cache; without the slopes, which do not change the time."""
    fields = {k: v for k, v in vars(p).items() if not k.startswith("slope")}
    return " ".join((f"{kind} {variant}".strip(), *(f"{k}={v}" for k, v in fields.items())))


def forget() -> None:
    """Clear the tiles chosen and loaded in this process; the files stay."""
    with _lock:
        _chosen.clear()
        _loaded.clear()


def run(
    kind: str, p: Problem, device: Device, launch: Callable[[Tile], Result], variant: str = ""
) -> Result:
    """The result of ``launch`` with the tile that is chosen for a kernel and a problem.

    ``launch`` may run several times, so it must not read memory that it writes. A tile that needs
    more shared memory or registers than the device has is skipped; if all tiles are skipped, the
    first error is raised.

    Args:
        kind: one of ``plan.KINDS``.
        variant: distinguishes compiled variants of the kernel that are tuned separately.
    """
    name = key(kind, p, variant)
    tile = _chosen.get((device, name))
    if tile is not None:
        return launch(tile)
    with _lock:
        if autotune and not device.interpreter and not _capturing():
            tile = _remembered(device, name) or _fastest(kind, name, p, device, launch)
            _chosen[device, name] = tile
            return launch(tile)
        tile, result = _first_that_fits(kind, p, device, launch)
        _chosen[device, name] = tile
        return result


def _capturing() -> bool:
    """Whether a CUDA graph is being recorded, in which nothing can be timed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _errors() -> tuple[type[Exception], ...]:
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError


def _first_that_fits(
    kind: str, p: Problem, device: Device, launch: Callable[[Tile], Result]
) -> tuple[Tile, Result]:
    first_error: Exception | None = None
    for tile in candidates(kind, p, device):
        try:
            return tile, launch(tile)
        except _errors() as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _fastest(
    kind: str, name: str, p: Problem, device: Device, launch: Callable[[Tile], Any]
) -> Tile:
    times: dict[Tile, float] = {}
    first_error: Exception | None = None
    for tile in candidates(kind, p, device):
        try:
            times[tile] = measure(lambda tile=tile: launch(tile))
        except _errors() as error:
            first_error = first_error or error
    if not times:
        assert first_error is not None
        raise first_error
    best = min(times, key=times.__getitem__)
    _remember(device, name, best, times[best])
    return best


def measure(call: Callable[[], Any]) -> float:
    """Median of the milliseconds that a call takes on the device."""
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=25, return_mode="median")


# ---------------------------------------------------------------- the file


def _remembered(device: Device, name: str) -> Tile | None:
    if device not in _loaded:
        _loaded[device] = _read(cache_file(device))
    return _as_tile(_loaded[device].get(name))


def _as_tile(entry: Any) -> Tile | None:
    fields = {field.name for field in dataclasses.fields(Tile)}
    tile = entry.get("tile") if isinstance(entry, dict) else None
    if not isinstance(tile, dict) or tile.keys() != fields:
        return None
    return Tile(**tile) if all(type(v) is int for v in tile.values()) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        text = f"ghost_ops: the autotuning cache {path} cannot be read and is begun anew ({error})"
        warn_once(text, stacklevel=3)
        return {}
    return found if isinstance(found, dict) else {}


def _remember(device: Device, name: str, tile: Tile, milliseconds: float) -> None:
    path = cache_file(device)
    # Another process may have added entries. If two write at once, the later file wins.
    entries = _read(path)
    entries[name] = {"tile": dataclasses.asdict(tile), "milliseconds": milliseconds}
    _loaded[device] = entries
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
        ) as file:
            json.dump(entries, file, indent=1, sort_keys=True)
        os.replace(file.name, path)  # atomic: a reader sees the old file or the new one
    except OSError as error:
        text = f"ghost_ops: the autotuning cache {path} cannot be written ({error})"
        warn_once(text, stacklevel=3)
