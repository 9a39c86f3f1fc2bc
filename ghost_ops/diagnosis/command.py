"""The command line of the report."""

from __future__ import annotations

import argparse
import json
import os
import sys

from . import collect, text

DESCRIPTION = "What was built, which backend runs where, and why not another."
EPILOG = """Exit status: 1 if something that was requested is not available (a wrong or unknown
GHOST_OPS_ variable, an instruction set or backend that cannot run here, torch or a library that
does not load), if a check of the self-test fails, or if the report cannot be written; else 0. A
library that was never built and a GPU that is not there are no failures."""


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
    output = None
    if sys.stdout is not None:  # None if it was closed before Python started
        output = os.fdopen(os.dup(1), "w", -1, sys.stdout.encoding, "backslashreplace")
    # From here on, what libraries print to the standard output goes to the standard error output.
    os.dup2(os.open(os.devnull, os.O_WRONLY) if sys.stderr is None else 2, 1)
    info = collect.collect(options.selftest)
    content = json.dumps(info, indent=2) if options.json else text.report(info, options.all)
    try:
        if output is not None:
            with output:
                print(content, file=output)
    except BrokenPipeError:  # the reader has seen enough
        pass
    except OSError as error:
        if sys.stderr is not None:
            print(f"ghost_ops: the report cannot be written: {error}", file=sys.stderr)
        return 1
    return collect.exit_status(info)
