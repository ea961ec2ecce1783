"""Batches as samples: a DataLoader of PyTorch, a list of what it yields, one array, or a mapping of arrays as an `.npz` holds them.

    a mapping of input names to arrays     the inputs
    a tuple or list                        its first elements are the inputs, in the network's order; what stands behind them (labels) is dropped
    an array or a tensor                   the one input

The first axis of all counts rows. They are divided into the network's batch, over the ends of the loader's own; of the last rows that fill none, none is used.
A DataLoader is read once and kept: it may shuffle, and every pass has to see the same samples.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.base.errors import DataError
from qcompiler.base.tensor import TensorInfo, as_array

LARGEST = 1 << 30
"""Bytes of samples that are kept."""


def is_loader(source: Any) -> bool:
    """Is this a DataLoader of PyTorch, or one that is made alike?"""
    return all(hasattr(source, name) for name in ("__iter__", "dataset", "batch_size"))


def is_batches(source: Any) -> bool:
    """Does this hold rows rather than samples that are whole calls?"""
    listed = isinstance(source, (list, tuple)) and bool(source) and not isinstance(source[0], Mapping)
    return listed or isinstance(source, Mapping) or _is_array(source) or is_loader(source)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "__dlpack__")


def named(item: Any, inputs: Sequence[TensorInfo], where: str) -> Mapping[str, Any]:
    """An item of a source as {input name: array}. Raises DataError for one with too few elements, and for what is no item at all."""
    if isinstance(item, Mapping):
        return item
    parts = [item] if _is_array(item) else item
    if not isinstance(parts, (list, tuple)):
        raise DataError(f"{where}: a sample is a mapping of input names to arrays, a tuple of arrays, or an array, not {type(item).__name__}")
    if len(parts) < len(inputs):
        raise DataError(f"{where}: {len(parts)} arrays, and the model has {len(inputs)} inputs: {', '.join(repr(i.name) for i in inputs)}")
    return {info.name: part for info, part in zip(inputs, parts, strict=False)}


class Rows:
    """The samples in batches. `left_out`: rows at the end that fill no batch of the network, once all are read. Raises DataError for batches that are none."""

    unit = "rows"

    def __init__(self, source: Any, inputs: Sequence[TensorInfo]) -> None:
        self._source: Iterable[Any] = [source] if isinstance(source, Mapping) or _is_array(source) else source
        self._inputs = inputs
        self.left_out = 0

    def head(self, count: int) -> list[Mapping[str, Any]]:
        """The first samples; no more of the source is read than they take."""
        return list(itertools.islice(self._read(), count))

    @functools.cached_property
    def all(self) -> list[Mapping[str, Any]]:
        """Every sample. Raises DataError where they are too many to keep."""
        return list(self._read())

    def _read(self) -> Iterator[Mapping[str, Any]]:
        rest: dict[str, np.ndarray] = {}  # rows that don't fill a batch yet
        size, count = 0, 0
        for place, item in enumerate(self._source):
            where = f"batch {place}"
            given = named(item, self._inputs, where)
            if given.keys() != {i.name for i in self._inputs}:
                count += 1
                yield given  # for a check that says so
                continue
            parts = {name: self._divided(name, value, rest) for name, value in given.items()}
            if len(counts := {name: len(found) for name, found in parts.items()}) and len(set(counts.values())) > 1:
                raise DataError(f"{where}: the inputs make different numbers of samples: {counts}")
            for sample in zip(*parts.values(), strict=True):
                count += 1
                size += sum(a.nbytes for a in sample if isinstance(a, np.ndarray))
                if size > LARGEST:
                    raise DataError(f"more than {LARGEST >> 30} GiB of samples: a DataLoader may shuffle, so it is read once and kept. Give max_samples=300")
                yield dict(zip(parts, sample, strict=True))
        self.left_out = max((len(rows) for rows in rest.values()), default=0)
        if not count:
            rows = f"{self.left_out} rows make no batch of the model" if self.left_out else "the data is empty"
            raise DataError(f"{rows}: at least one sample is needed. The model has: {', '.join(f'{i.name!r} {list(i.shape)}' for i in self._inputs)}")

    def _divided(self, name: str, value: Any, rest: dict[str, np.ndarray]) -> list[Any]:
        """What a batch makes of an input, a sample each; rows that are left go to `rest`. What doesn't fit stays as it is, for a check that says so."""
        wanted = next((tuple(i.shape) for i in self._inputs if i.name == name), None)
        array = as_array(value)
        if array is None or wanted is None or array.ndim == 0:
            return [value]
        if array.shape[1:] == wanted:
            return list(array)
        if not wanted or array.shape[1:] != wanted[1:]:
            return [array]
        rows = np.concatenate([rest[name], array]) if name in rest else array
        whole = len(rows) // wanted[0]
        rest[name] = rows[whole * wanted[0] :]
        return [rows[i * wanted[0] : (i + 1) * wanted[0]] for i in range(whole)]
