"""Primitives of text for people: plain tables, numbers with units."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int = 140) -> str:
    """A plain-text table; a column whose name ends in "|" is aligned right. Long cells wrap; `width` is in characters."""
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="", title_style="")
    for column in columns:
        grid.add_column(column.removesuffix("|"), justify="right" if column.endswith("|") else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=width, no_color=True, highlight=False, markup=False, emoji=False).print(grid)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else str(value) if not math.isfinite(value) else format(value, form)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def size(count: int) -> str:
    """Bytes in decimal units."""
    return f"{count} B" if count < 1000 else f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def float_layers(count: int, wide: int = 0) -> str:
    """wide: operands that are read in 16 bits."""
    return f"{count} layer{'' if count == 1 else 's'} in float" + (f", {wide} in 16 bits" if wide else "")


def count_text(count: Mapping[str, int]) -> str:
    """The operators of a network by type: {"int8": n, "float": m}, and "int16" where there are such."""
    wide = f", {count['int16']} in 16 bits" if "int16" in count else ""
    return f"{count['int8']} of {sum(count.values())} operators in int8{wide}"
