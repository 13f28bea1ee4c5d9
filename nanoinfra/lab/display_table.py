"""A table that displays itself: by rich in a terminal, as HTML in a notebook.

The last cell of a row is its verdict. It is green for pass, red for miss and wrong, and else grey.
"""
import io
from dataclasses import dataclass
from html import escape

from rich.console import Console
from rich.table import Table as RichTable

_VERDICT_COLOURS = {"pass": ("green", "#00684c"), "miss": ("red", "#a33b00"), "wrong": ("red", "#a33b00")}
_OTHER_COLOURS = ("bright_black", "#666666")


@dataclass(frozen=True)
class DisplayTable:
    """Rows of text under named columns, with the verdict in the last one."""
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def show(self) -> None:
        """Print the table to the terminal, in colour."""
        Console().print(self._rich())

    def __repr__(self):
        console = Console(file=io.StringIO(), width=110, force_jupyter=False)
        console.print(self._rich())
        return console.file.getvalue().rstrip()

    def _repr_html_(self):
        head = "".join(f"<th style='text-align:left'>{escape(c)}</th>" for c in self.columns)
        body = "".join(f"<tr>{''.join(_cell(text, row) for text in row)}</tr>" for row in self.rows)
        title = f"<caption style='text-align:left;white-space:nowrap'><b>{escape(self.title)}</b></caption>"
        return f"<table>{title}<tr>{head}</tr>{body}</table>"

    def _rich(self):
        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        for column in self.columns:
            table.add_column(column, overflow="fold")
        for row in self.rows:
            *cells, verdict = row
            table.add_row(*cells, f"[{_VERDICT_COLOURS.get(verdict, _OTHER_COLOURS)[0]}]{verdict}[/]")
        return table


def _cell(text, row):
    verdict = f";color:{_VERDICT_COLOURS.get(text, _OTHER_COLOURS)[1]};font-weight:bold"
    colour = verdict if text is row[-1] else ""
    return f"<td style='text-align:left{colour}'>{escape(text)}</td>"
