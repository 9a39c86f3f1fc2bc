"""``python -m ghost_ops``: what was built, which backend runs where, and why not another."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

from . import backends, environment
from ._version import __version__
from .backends import cuda, native, triton


def collect() -> dict[str, Any]:
    """The content of the report, as data for JSON."""
    cpu_loaded = native.load()
    library = native.library() if cpu_loaded else None
    return {
        "versions": {
            "ghost_ops": __version__,
            "torch": torch.__version__,
            "torch CUDA": torch.version.cuda or "none",
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "build": {str(k): str(v) for k, v in library.build_info().items()} if library else {},
        "instruction_sets": {
            "available": list(library.available_isas()) if library else [],
            "chosen": library.isa() if library else None,
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
        "libraries": {
            "cpu": {"loaded": cpu_loaded, "reason": native.reason()},
            "cuda": {"loaded": cuda.load(), "reason": cuda.reason()},
            "triton": {"loaded": triton.load(), "reason": triton.reason()},
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "requested_backend": backends.requested(),
        "backends": [row._asdict() for row in backends.status()],
        "environment": {
            variable.name: {
                "value": os.environ.get(variable.name, ""),
                "default": variable.default,
                "allowed": list(variable.choices),
                "read_at": variable.read_at,
                "meaning": variable.meaning,
            }
            for variable in environment.VARIABLES
        },
    }


def table(rows: list[list[str]]) -> list[str]:
    """Rows of text as indented lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join(row).rstrip() for row in padded]


def backend_rows(rows: list[dict[str, str]]) -> list[list[str]]:
    """Table rows: one for all dtypes of a device with the same backend and reason."""
    merged: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        merged.setdefault((row["device"], row["backend"], row["reason"]), []).append(row["dtype"])
    return [[device, ", ".join(d), backend, why] for (device, backend, why), d in merged.items()]


def report(info: dict[str, Any]) -> str:
    """The text for the result of :func:`collect`."""
    isas = info["instruction_sets"]
    pairs = [[key, value] for key, value in info["versions"].items()]
    pairs += [[f"build: {key}", value] for key, value in info["build"].items()]
    pairs += [["GPU", info["gpu"] or "none visible to torch"]]
    libraries = [
        [key, "loaded" if entry["loaded"] else "NOT LOADED", entry["reason"]]
        for key, entry in info["libraries"].items()
    ]
    environment = [["name", "value", "default", "allowed", "read at", "meaning"]]
    for name, entry in info["environment"].items():
        allowed = "|".join(entry["allowed"]) or "text"
        value = entry["value"] or "-"
        environment.append(
            [name, value, entry["default"], allowed, entry["read_at"], entry["meaning"]]
        )
    lines = [f"ghost_ops {info['versions']['ghost_ops']}", "", "Versions", *table(pairs)]
    lines += ["", "Instruction sets of the CPU kernels"]
    lines += table(
        [
            ["available", ", ".join(isas["available"]) or "none: the CPU library is not loaded"],
            ["chosen", isas["chosen"] or "none"],
            ["torch uses", isas["torch"]],
        ]
    )
    lines += ["", "Libraries of kernels", *table(libraries)]
    lines += ["", f"Backends (request: {info['requested_backend']})"]
    lines += table([["device", "dtypes", "backend", "why"], *backend_rows(info["backends"])])
    lines += ["", "Environment variables", *table(environment)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m ghost_ops", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    info = collect()
    print(json.dumps(info, indent=2) if options.json else report(info))


if __name__ == "__main__":
    main()
