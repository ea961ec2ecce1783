"""Tables that are printed as text, CSV or one page of HTML."""

from __future__ import annotations

import argparse
import csv
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.base.text import table
from qcompiler.cli.process import show
from qcompiler.verification.page_table import html_table

FORMATS = ("text", "json", "csv", "html")
_STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:2em}table{border-collapse:collapse;margin:0 0 2em}"
    "td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}.n{text-align:right;font-variant-numeric:tabular-nums}"
)


@dataclass(frozen=True)
class Sheet:
    """A table. A column whose name ends in "|" holds numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self, width: int = 200) -> str:
        return table(self.title, self.columns, self.rows, width)

    def csv(self) -> str:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([c.removesuffix("|") for c in self.columns])
        writer.writerows(self.rows)
        return stream.getvalue().rstrip("\n")

    def html(self) -> str:
        cells = [[html.escape(cell) for cell in row] for row in self.rows]
        return f"<h2>{html.escape(self.title)}</h2>{html_table(self.columns, cells)}"


def add_format(p: argparse.ArgumentParser) -> None:
    """The option --format, of verbs that show a table."""
    p.add_argument("--format", choices=FORMATS, default="text", help="text; json, as --json; csv, of the last table alone; or html, one page of all tables")


def present(options: argparse.Namespace, heading: str, document: Any, text: Callable[[], str], sheets: Sequence[Sheet]) -> None:
    """Print a result in the format that was asked for. The last of `sheets` is what it is about."""
    options.json = options.json or options.format == "json"
    page = [f"<!doctype html><meta charset=utf-8><title>{html.escape(heading)}</title><style>{_STYLE}</style>", *(s.html() for s in sheets)]
    forms: dict[str, Callable[[], str]] = {"csv": sheets[-1].csv, "html": lambda: "\n".join(page)}
    show(options, document, forms.get(options.format, text))
