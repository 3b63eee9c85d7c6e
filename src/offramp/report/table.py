"""A table as a value: text in rows and columns, shown as pages, documents and terminals need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Told = str | Callable[[Any], str]
"""What a cell tells of an entry: a function of it, or a format of its fields, "{seconds:.2f} s"."""


def told(what: Told, entry: Any) -> str:
    """Return the text of a cell. what: a format for `entry`, or a function of it."""
    return what.format_map(entry) if isinstance(what, str) else what(entry)


@dataclass(frozen=True)
class Table:
    """A table whose rows have a cell for every column. The report's templates show it as HTML.

    Raises:
        ValueError: a row has not a cell for every column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        if uneven := [row for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"{uneven[0]} has not {len(self.columns)} cells")

    @classmethod
    def of(cls, entries: Iterable[Any], columns: Mapping[str, Told]) -> Table:
        """Return a table with a row for each entry. columns: by title, the text or function of a
        cell."""
        return cls(tuple(columns), [[told(cell, e) for cell in columns.values()] for e in entries])

    @classmethod
    def grid(
        cls,
        rows: Mapping[str, Any],
        columns: Mapping[str, Any],
        cell: Callable[[Any, Any], str],
        corner: str = "",
    ) -> Table:
        """Return a table of `rows` by `columns`, both by title. cell: a function of a row's and a
        column's value."""
        return cls(
            (corner, *columns),
            [(title, *(cell(r, c) for c in columns.values())) for title, r in rows.items()],
        )

    def markdown(self) -> str:
        """Return the table as GitHub's Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

    def plain(self) -> str:
        """Return the table as text for a terminal: the first column to the left, numbers to the
        right."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = (
            [
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            for line in lines
        )
        return "\n".join("  ".join(cells).rstrip() for cells in padded)
