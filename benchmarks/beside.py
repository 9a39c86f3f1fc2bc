"""Results of several machines in one Markdown table, a column a file: for the README.

    python -m benchmarks.beside xeon-avx512.json xeon-avx2.json
    python -m benchmarks.beside a/network.json b/network.json

Rows are the geometric means that the report prints, then the milliseconds of whole networks, those
that any of the files has. Above the table stands each file's machine, with what it was held to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import compare, harness, means, report
from benchmarks.sections import Document, table

SETUP = ("cpu", "threads", "clock", "torch", "commit", "date")


def values(document: Document) -> dict[str, str]:
    """What is compared, in words -> the number, of one file: all means but those in floors."""
    found = {
        name: f"{mean.value:.2f}"
        for name, mean in means.of_document(document).items()
        if ": floors of " not in name
    }
    for row in report.timed(document["rows"]):
        if row.get("question") == "network":
            what = f"{row['shape']}, {row['mode']}, batch {row['batch']}"
            name = f"{what}, {row['threads']} thread(s): ms, {row['provider']}"
            found[name] = f"{1e3 * row['median_s']:.2f}"
    return found


def render(documents: Mapping[str, Document]) -> str:
    """The page of ``title -> document``: machines, then the table."""
    lines = []
    for title, document in documents.items():
        meta = document["meta"]
        setup = {"instruction sets": harness.instructions(meta)}
        setup |= {key: meta.get(key, "unknown") for key in SETUP}
        lines.append(f"- {title}: " + "; ".join(f"{key} {what}" for key, what in setup.items()))
    columns = [values(document) for document in documents.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    body = [(name, *(column.get(name, "") for column in columns)) for name in names]
    return "\n".join([*lines, "", *table(("", *documents), body)])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: print the table; 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.beside", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON, in the order of the columns")
    arguments = parser.parse_args(argv)
    # Files of one name are told apart by their folders.
    stems = [path.stem for path in arguments.results]
    try:
        loaded = {
            str(path) if stems.count(path.stem) > 1 else path.stem: compare.load(path)
            for path in arguments.results
        }
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(render(loaded))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
