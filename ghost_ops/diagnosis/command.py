"""The command line of the report."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator

from . import collect, text

DESCRIPTION = "What was built, which backend runs where, and why not another."
EPILOG = """Exit status: 1 if something that was requested is not available (a wrong or unknown
GHOST_OPS_ variable, an instruction set or backend that cannot run here, torch or a library that
does not load), if a fact cannot be found, or if a check of the self-test fails; else 0. A library
that was never built and a GPU that is not there are no failures."""


def main(arguments: list[str] | None = None) -> int:
    """Print the report. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ghost_ops", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="check numbers and determinism of every backend, in about five seconds",
    )
    parser.add_argument(
        "--all", action="store_true", help="list every variable of ghost_ops with its meaning"
    )
    options = parser.parse_args(arguments)
    with output_kept_clean():
        info = collect.collect(options.selftest)
    content = json.dumps(info, indent=2) if options.json else text.report(info, options.all)
    return write(content) or collect.exit_status(info)


@contextlib.contextmanager
def output_kept_clean() -> Iterator[None]:
    """What libraries print to the standard output goes to the standard error output."""
    if sys.stdout is None:  # the standard output was closed before Python started
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        yield
        return
    with collect.captured_output() as read:
        yield
        noise = read()
    if noise and sys.stderr is not None:
        sys.stderr.write(noise)


def write(content: str) -> int:
    """Print text in whatever encoding the standard output has. Returns the exit status."""
    if sys.stdout is None:
        return 0
    try:
        encoding = sys.stdout.encoding or "utf-8"
        data = f"{content}\n".encode(encoding, errors="backslashreplace")
        print(data.decode(encoding), end="", flush=True)
    except BrokenPipeError:
        # The reader has seen enough. Python flushes again at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if sys.stderr is not None:
            print(f"ghost_ops: the report cannot be written: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
