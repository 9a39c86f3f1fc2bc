"""The one format of tables: Markdown with padded columns, on the console and in the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.rows import Mean, Row, Versus


@dataclass
class Table:
    """Rows of cells under headings; the first column is text, the others are numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()

    def lines(self) -> list[str]:
        """A heading, the table, the notes."""
        found = [f"### {self.title}", ""] if self.title else []
        if self.rows:
            body = [[str(cell) for cell in row] for row in (self.headings, *self.rows)]
            widths = [max(4, *map(len, column)) for column in zip(*body, strict=True)]
            body.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
            for first, *others in body:
                pairs = zip(others, widths[1:], strict=True)
                cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in pairs)]
                found.append("| " + " | ".join(cells) + " |")
            found.append("")
        return [*found, *self.notes, *([""] if self.notes else [])]


def times(value: float | None) -> str:
    """A ratio; losses are set in bold."""
    if value is None:
        return ""
    return f"**{value:.2f}x**" if value < 1.0 else f"{value:.2f}x"


def cell(row: Row | None, key: str = "median_s", scale: float = 1e6, digits: int = 1) -> str:
    """A scaled number of a row, by default its microseconds; empty without a row."""
    return "" if row is None else f"{scale * row[key]:.{digits}f}"


def against_peers(
    title: str, pairs: Iterable[tuple[str, Versus]], show: Callable[[Row | None], str]
) -> Table:
    """Ours beside eager NCHW and the best peer; ``show`` gives a row's time."""
    body = []
    for label, v in pairs:
        peers = (show(v.eager), show(v.best), v.best["provider"])
        ours = (show(v.ours), v.ours["provider"], cell(v.ours, "floors", 1, 2))
        body.append((label, *peers, *ours, times(v.over_eager), times(v.over_best)))
    headings = ("", "eager", "best peer", "by", "ours", "by", "floors", "over eager", "over best")
    return Table(title, headings, body)


def untimed(rows: Iterable[Row]) -> Table:
    """Why rows have no time, each reason once."""
    found = dict.fromkeys(f"- {row['provider']}: {row['note']}" for row in rows if row.get("note"))
    return Table("Not timed" if found else "", (), (), list(found))


def of_means(means: Mapping[str, Mean]) -> Table:
    """Geometric means with their spreads."""
    body = []
    for name, mean in means.items():
        spread = "" if mean.low == mean.high else f"{mean.low:.2f} to {mean.high:.2f}"
        body.append((name, mean.count, f"{mean.value:.2f}", spread))
    return Table("", ("geometric mean of", "values", "mean", "spread"), body)


def text(tables: Iterable[Table]) -> str:
    """All tables as one text."""
    return "\n".join(line for table in tables for line in table.lines())
