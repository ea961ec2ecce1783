"""Indices of embedding tables in calibration data: what lies outside of a table is a mistake (another tokenizer's ids), and ONNX defines nothing for it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm

from qcompiler.base.errors import DataError
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import find_groups


class Lookups:
    """A calibration watcher that refuses a sample whose indices don't fit: DataError with the input (or value), the index and the table's size."""

    def __init__(self, module: tvm.IRModule) -> None:
        self._inputs = {str(p.name) for p in Graph.of(module).inputs}
        self._sizes: dict[str, int] = {}
        for group in find_groups(module):
            if group.kind == "take" and group.weight is not None and group.attrs["axis"] == 0:
                self._sizes[group.inputs[0]] = min(len(group.weight), self._sizes.get(group.inputs[0], len(group.weight)))

    def look(self, sample: int, value_id: str, array: np.ndarray, seen: object) -> None:
        size = self._sizes.get(value_id)
        if size is None or array.size == 0 or (array.min() >= -size and array.max() < size):
            return
        wrong = int(array.max() if array.max() >= size else array.min())
        what = "input" if value_id in self._inputs else "value"
        raise DataError(
            f"{what} '{value_id}' holds {wrong}, which is no row of the table of {size} that it selects from: allowed are 0 to {size - 1}, and -1 to -{size} "
            "from the end; make the data with the tokenizer of this model"
        )

    def take(self, value_id: str, seen: object) -> None:
        """There is nothing to be kept."""

    def end_sample(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Outputs are of no interest here."""
