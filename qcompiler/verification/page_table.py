"""Tables of the report."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]], name: str = "", last: bool = False) -> str:
    """`rows` are HTML already. A column whose name ends in "|" holds numbers. last: the last row is a total."""
    classes = [' class="n"' if c.endswith("|") else "" for c in columns]
    head = "".join(f"<th{k}>{html.escape(c.removesuffix('|'))}</th>" for c, k in zip(columns, classes, strict=True))
    body = ["".join(f"<td{k}>{cell}</td>" for cell, k in zip(row, classes, strict=True)) for row in rows]
    lines = [f'<tr class="total">{r}</tr>' if last and i == len(body) - 1 else f"<tr>{r}</tr>" for i, r in enumerate(body)]
    return f"<table{f' id={chr(34)}{name}{chr(34)}' if name else ''}><thead><tr>{head}</tr></thead><tbody>" + "\n".join(lines) + "</tbody></table>"
