"""Several shapes of a network's inputs: a table with a row for each, in which stands the shape of every input that is given.

    ids=1,{16,32}  mask=1,{16,32}      -->     ids [1, 16], mask [1, 16];  ids [1, 32], mask [1, 32]

Sets vary together: the rows have the first of every set, then the second, and so on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler.base.errors import ModelError
from qcompiler.base.yaml_file import read_yaml

Row = dict[str, tuple[int, ...]]
_WANTED = "input shapes are {input: shape}, {input: [shape, shape, ...]} or a list of {input: shape}, with shapes of positive integers"


def shape_rows(given: Any) -> list[Row]:
    """The rows of `given`: None (one row without shapes), {input: shape or list of shapes}, or a list of {input: shape}.

    Raises ModelError for lists of different lengths, rows with different inputs or ranks, and a row that is given twice.
    """
    if given is None:
        return [{}]
    if isinstance(given, Mapping):
        columns = {str(name): _column(str(name), value) for name, value in given.items()}
        counts = {name: len(column) for name, column in columns.items() if len(column) > 1}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"'{name}' has {count}" for name, count in counts.items())
            raise ModelError(f"input shapes vary together, so every input that has several needs the same number of them: {said}. Give a table of rows instead")
        rows = [{name: column[min(i, len(column) - 1)] for name, column in columns.items()} for i in range(max(counts.values(), default=1))]
    elif isinstance(given, Sequence) and not isinstance(given, (str, bytes)) and given and all(isinstance(row, Mapping) for row in given):
        rows = [{str(name): _shape(str(name), shape) for name, shape in row.items()} for row in given]
    else:
        raise ModelError(f"{_WANTED}; got {given!r}")
    for number, row in enumerate(rows):
        if set(row) != set(rows[0]):
            raise ModelError(f"every row of input shapes names the same inputs; row 1 has {', '.join(rows[0])}, row {number + 1} has {', '.join(row)}")
        for name, shape in row.items():
            if len(shape) != len(rows[0][name]):
                raise ModelError(f"input '{name}' has shape {list(rows[0][name])} in one row and {list(shape)} in another; the number of dimensions can't vary")
        if row in rows[:number]:
            raise ModelError(f"the input shapes {', '.join(f'{n} {list(s)}' for n, s in row.items())} are given twice")
    return rows


def check_single(rows: Sequence[Row], what: str) -> None:
    """Raises ModelError, naming `what`, for several rows."""
    if len(rows) > 1:
        first = ", ".join(f"{name} {list(shape)}" for name, shape in rows[0].items())
        raise ModelError(f"{what} takes one shape of each input, and {len(rows)} are given; name one of them, such as {first}")


def read_shape_table(path: str | os.PathLike[str]) -> list[Row]:
    """The rows in a YAML file: a list of {input: shape}, or {input: list of shapes}. Raises ModelError."""
    try:
        return shape_rows(read_yaml(path) or "nothing")
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def parse_shape(text: str) -> tuple[str, list[tuple[int, ...]]]:
    """(input, its shapes) of "ids=1,{16,32}". Raises ValueError."""
    name, _, dimensions = text.rpartition("=")
    if name and not dimensions.strip():
        return name, [()]
    parts = re.findall(r"\{[\d,\s]*\}|[^,{}]+", dimensions)
    if not name or ",".join(parts) != re.sub(r"\s*,\s*$", "", dimensions):
        raise ValueError("expected NAME=1,3,224,224 or NAME=1,{16,32,64}")
    sets = [[int(d) for d in part.strip("{}").split(",")] for part in parts]
    count = max(map(len, sets), default=1)
    if not sets or any(len(s) not in (1, count) for s in sets) or any(d < 1 for s in sets for d in s):
        raise ValueError("expected positive dimensions; sets in braces vary together, so they are equally long")
    return name, [tuple(s[min(i, len(s) - 1)] for s in sets) for i in range(count)]


def _column(name: str, value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and value and all(isinstance(v, Sequence) for v in value):
        return [_shape(name, shape) for shape in value]
    return [_shape(name, value)]


def _shape(name: str, value: Any) -> tuple[int, ...]:
    try:
        shape = tuple(int(d) for d in value)
    except (TypeError, ValueError):
        shape = (0,)
    if isinstance(value, (str, bytes)) or any(d < 1 for d in shape) or any(int(d) != d for d in value):
        raise ModelError(f"the shape of input '{name}' can't be {value!r}; {_WANTED}")
    return shape
