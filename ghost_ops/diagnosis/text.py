"""The report as text: sections of labelled lines, at most ``WIDTH`` columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

WIDTH = 100


def section(title: str, pairs: Iterable[tuple[str, Any]]) -> list[str]:
    """A title and one line for each label and value, wrapped; an empty line follows."""
    pairs = [(printable(label), printable(value)) for label, value in pairs]
    column = min(26, max((len(label) for label, _ in pairs), default=0))
    indent = " " * (column + 4)
    lines = [title]
    for label, value in pairs:
        line = f"  {label:<{column}}  {value}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
    return [*lines, ""]


def printable(value: Any) -> str:
    """The value in one line; characters that move a terminal's cursor are escaped."""
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    text = " ".join(str("none" if value is None else value).split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def report(info: dict[str, Any], everything: bool = False) -> str:
    """The text for the result of ``collect``.

    Args:
        everything: list every variable with its meaning, not only those that are set.
    """
    lines = _head(info) + _libraries(info) + _cpu(info) + _gpu(info) + _backends(info)
    lines += _environment(info, everything)
    if info["selftest"] is not None:
        lines += _selftest(info["selftest"])
    return "\n".join(lines).rstrip()


def _head(info: dict[str, Any]) -> list[str]:
    versions = info["versions"]
    pairs = [
        ("package", info["package"]["path"]),
        ("torch", versions["torch"]),
        ("Python", f"{versions['python']}, {versions['platform']}"),
    ]
    lines = section(f"ghost_ops {versions['ghost_ops']}", pairs)
    problems = [pair for entry in info["problems"] for pair in entry.items()]
    notes = [("-", text) for text in [*info["hints"], *info["warnings"]]]
    for title, pairs in (("PROBLEMS", problems), ("Hints", notes)):
        lines += section(title, pairs) if pairs else []
    return lines


def _libraries(info: dict[str, Any]) -> list[str]:
    pairs = []
    for name, library in info["libraries"].items():
        reason = library["reason"]
        pairs.append((name, reason if library["loaded"] else f"NOT LOADED: {reason}"))
        pairs += [("", library["path"])] if library["path"] else []
    build = ", ".join(f"{key} {value}" for key, value in info["build"].items())
    return section("Libraries of kernels", [*pairs, ("build", build or "no record")])


def _cpu(info: dict[str, Any]) -> list[str]:
    isas, threads = info["instruction_sets"], info["threads"]
    chosen = isas["chosen"]
    if isinstance(isas["available"], list):
        chosen += f" of {', '.join(isas['available'])} (GHOST_OPS_CPU_ISA chooses)"
    cores = f"{threads['usable']} of {threads['logical']} logical processors may be used"
    pairs = [
        ("processor", f"{info['processor']}; {cores}"),
        ("threads", f"torch {threads['torch']}"),
        ("instruction set", chosen),
        ("PyTorch's", isas["torch"]),
        ("allocator", info["allocator"]),
    ]
    return section("CPU", pairs)


def _gpu(info: dict[str, Any]) -> list[str]:
    gpu = info["gpu"]
    pairs = [
        ("devices", gpu["devices"] or f"none: {gpu['reason']}"),
        ("driver", gpu["driver"]),
        ("torch's", f"CUDA {gpu['torch_cuda'] or 'none'}, cuDNN {gpu['cudnn'] or 'none'}"),
        ("nvcc", info["nvcc"]),
    ]
    return section("GPU", pairs)


def _backends(info: dict[str, Any]) -> list[str]:
    pairs = [("requested", info["requested_backend"])]
    dtypes: dict[tuple[str, str], list[str]] = {}
    for row in info["backends"]:
        text = f"{row['backend']}: {row['reason']}"
        dtypes.setdefault((row["device"], text), []).append(row["dtype"])
    pairs += [(device, f"{', '.join(names)}: {text}") for (device, text), names in dtypes.items()]
    if info["gpu"]["available"] is not True:
        pairs.append(("cuda", "no GPU"))
    return section("Backends", pairs)


def _environment(info: dict[str, Any], everything: bool) -> list[str]:
    pairs = []
    for name, entry in info["environment"].items():
        allowed = f"one of {', '.join(entry['choices'])}" if entry["choices"] else "text"
        if everything:
            text = f"{entry['value'] or 'not set'} (default {entry['default'] or 'none'}; {allowed}"
            pairs.append((name, f"{text}; read at {entry['read_at']}). {entry['meaning']}"))
        elif entry["value"]:
            pairs.append((name, entry["value"]))
    pairs += list(info["other_variables"].items())
    if everything:
        return section("Environment variables", pairs)
    title = "Environment variables that are set (--all lists all, with their meaning)"
    return section(title, pairs or [("none", "")])


def _selftest(checks: list[dict[str, Any]]) -> list[str]:
    seconds = sum(check["seconds"] for check in checks)
    failed = sum(check["status"] == "FAILED" for check in checks)
    title = f"Self-test: {failed} of {len(checks)} checks failed ({seconds:.1f} s)"
    lines = [(c["status"], f"{c['engine']}, {c['what']}: {c['detail']}") for c in checks]
    return section(title, lines)
