"""Tables for people: text in a terminal, HTML in a notebook."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Shown", "Table", "in_bytes", "shown"]

LONGEST = 300  # characters of a value in an error


@dataclass(frozen=True)
class Table:
    """Columns of text, with or without heads, between lines that stand above and below."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    above: Sequence[str] = ()
    below: Sequence[str] = ()

    def text(self) -> str:
        """The table in aligned columns; the last one is not padded."""
        cells = [*([self.columns] if self.columns else []), *self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                 .rstrip() for row in cells]
        if self.columns:
            lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*self.above, *lines, *self.below])

    def html(self) -> str:
        """The table for a notebook."""

        def row(cells: Sequence[str], tag: str) -> str:
            style = ' style="text-align:left;padding:0.1em 1.5em 0.1em 0"'
            inside = "".join(f"<{tag}{style}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{inside}</tr>"

        above, below = ("".join(f"<p>{html.escape(line)}</p>" for line in lines)
                        for lines in (self.above, self.below))
        body = "".join(row(cells, "td") for cells in self.rows)
        head = f"<thead>{row(self.columns, 'th')}</thead>" if self.columns else ""
        table = f"<table>{head}<tbody>{body}</tbody></table>"
        return f'{above}<div style="overflow-x:auto">{table}</div>{below}'

    def rich(self) -> Any:
        """What ``rich`` prints."""
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(*self.columns, show_header=bool(self.columns))
        for row in self.rows:
            table.add_row(*map(Text, row))
        return Group(*map(Text, self.above), table, *map(Text, self.below))


class Shown:
    """What prints as a table."""

    def table(self) -> Table:
        """The table."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()

    def __rich__(self) -> Any:
        return self.table().rich()


def in_bytes(number: float) -> str:
    """A number of bytes with its unit: ``392.5 MB``."""
    power = 0
    while number >= 999.95 and power < 4:
        number, power = number / 1000, power + 1
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    return f"{number:.1f} {unit}" if power else f"{number:.0f} B"


def shown(value: Any) -> str:
    """How a value reads in an error, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # of an int with thousands of digits, or a class of the user's own
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
