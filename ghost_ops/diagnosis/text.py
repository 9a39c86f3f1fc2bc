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
    wrapper = textwrap.TextWrapper(
        WIDTH,
        initial_indent="  ",
        subsequent_indent=" " * (column + 4),
        break_on_hyphens=False,
    )
    lines = [title]
    for label, value in pairs:
        lines += wrapper.wrap(f"{label:<{column}}  {value}")
    return [*lines, ""]


def printable(value: Any) -> str:
    """The value in one line; characters that move a terminal's cursor are escaped."""
    text = " ".join(str(value).split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def merged(rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The keys of equal values joined: value by keys."""
    keys: dict[str, list[str]] = {}
    for key, value in rows:
        keys.setdefault(value, []).append(key)
    return {", ".join(found): value for value, found in keys.items()}


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
    versions, package = info["versions"], info["package"]
    pairs = [
        ("package", f"{package['path']} ({package['kind']})"),
        ("torch", known(versions["torch"])),
        ("Python", f"{versions['python']}, {versions['platform']}"),
    ]
    lines = section(f"ghost_ops {versions['ghost_ops']}", pairs)
    if info["problems"]:
        pairs = []
        for entry in info["problems"]:
            pairs += [("what", entry["what"]), ("mend", entry["mend"])]
        lines += section("PROBLEMS", pairs)
    if notes := [("-", text) for text in [*info["hints"], *info["warnings"]]]:
        lines += section("Hints", notes)
    return lines


def known(value: Any) -> str:
    """A fact, or the word for one that was not found."""
    return "unknown" if value is None else str(value)


def _libraries(info: dict[str, Any]) -> list[str]:
    pairs = []
    for name, library in info["libraries"].items():
        where = library["path"] or ""
        if library["date"]:
            where += f" ({library['bytes'] / 2**20:.1f} MiB, {library['date']})"
        reason = library["reason"]
        if not library["loaded"]:
            reason = f"NOT LOADED: {reason}"
        elif not reason.startswith("loaded"):
            reason = f"loaded {reason}"
        pairs.append((name, reason))
        if where:
            pairs.append(("", where))
    build = ", ".join(f"{key} {value}" for key, value in info["build"].items())
    return section("Libraries of kernels", [*pairs, ("build", build or "no record")])


def _cpu(info: dict[str, Any]) -> list[str]:
    isas, threads, allocator = info["instruction_sets"], info["threads"], info["allocator"]
    if isas["chosen"]:
        ours = f"{isas['chosen']} of {', '.join(isas['available'])}: {isas['why']}"
    else:
        ours = "none: the CPU library is not loaded"
    limit = threads["cgroup_limit"]
    cores = (
        f"{known(threads['usable'])} to use: {known(threads['logical'])} logical processors, "
        f"{known(threads['affinity'])} by affinity on {known(threads['physical'])} cores, "
        + ("no cgroup limit" if limit is None else f"cgroup limit {limit:g}")
    )
    pairs = [
        ("processor", known(info["processor"])),
        ("cores", cores),
        (
            "threads",
            f"torch {known(threads['torch'])} ({known(threads['parallel_by'])}), between operators "
            f"{known(threads['interop'])}",
        ),
        ("instruction set", ours),
        ("PyTorch's", f"ATen {known(isas['torch'])}; {isas['onednn'] or 'no oneDNN'}"),
    ]
    if allocator is None:
        pairs.append(("allocator", known(None)))
    else:
        text = allocator["library"] or allocator["settings"] or "default settings"
        pairs.append(("allocator", f"{allocator['name']}, {text}"))
    return section("CPU", pairs)


def _gpu(info: dict[str, Any]) -> list[str]:
    gpu = info["gpu"]
    pairs = [
        (
            f"cuda:{index}",
            f"{device['name']}, compute capability {device['capability']}, "
            f"{device['memory_gib']} GiB",
        )
        for index, device in enumerate(gpu["devices"])
    ]
    if not pairs:
        pairs = [("devices", f"none: {gpu['reason'] or 'see the problems'}")]
    driver = gpu["driver"] or {"reason": "unknown", "gpus": []}
    pairs.append(("driver", "; ".join([driver["reason"], *driver["gpus"]])))
    built = f"CUDA {gpu['torch_cuda'] or 'none'}, cuDNN {gpu['cudnn'] or 'none'}"
    pairs.append(("torch's", f"{built}, HIP {gpu['torch_hip']}" if gpu["torch_hip"] else built))
    pairs.append(("nvcc", info["nvcc"]["reason"] if info["nvcc"] else "unknown"))
    return section("GPU", pairs)


def _backends(info: dict[str, Any]) -> list[str]:
    pairs = []
    for device in dict.fromkeys(row["device"] for row in info["backends"]):
        rows = [row for row in info["backends"] if row["device"] == device]
        chosen = merged((row["dtype"], f"{row['backend']}: {row['reason']}") for row in rows)
        refused = merged(
            (row["dtype"], f"not {name}: {reason}")
            for row in rows
            for name, reason in row["others"].items()
        )
        pairs += [(device, f"{dtypes}: {text}") for dtypes, text in chosen.items()]
        pairs += [("", f"{dtypes}: {text}") for dtypes, text in refused.items()]
    if not info["gpu"]["available"]:
        pairs.append(("cuda", "no GPU"))
    title = f"Backends (requested: {known(info['requested_backend'])})"
    return section(title, pairs)


def _environment(info: dict[str, Any], everything: bool) -> list[str]:
    pairs = []
    for name, entry in info["environment"].items():
        allowed = f"one of {', '.join(entry['allowed'])}" if entry["allowed"] else "text"
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
    pairs = [
        (check["status"], f"{check['engine']}, {check['what']}: {check['detail']}")
        for check in checks
    ]
    failed = sum(check["status"] == "FAILED" for check in checks)
    title = f"Self-test: {failed} of {len(checks)} checks failed ({seconds:.1f} s)"
    return section(title, pairs)
