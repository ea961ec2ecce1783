"""A network's float outputs against those of its float twin: sums of squares, sample by sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from qcompiler.base.tensor import TensorInfo
from qcompiler.numerics.metrics import Parts
from qcompiler.pipeline.goal import Scores


class ErrorSums:
    """Collects samples' outputs. An output that holds several quantities, as the first sample shows them, counts as several."""

    def __init__(self, outputs: Iterable[TensorInfo]) -> None:
        self._names = [o.name for o in outputs if o.dtype == "float32"]
        self._parts: list[Parts] = []
        self._power: list[np.ndarray] = []
        self._noise: list[np.ndarray] = []

    def add(self, got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
        """Of one sample: the network's outputs, and the twin's."""
        wanted = [expected[n].astype(np.float64) for n in self._names]
        self._parts = self._parts or [Parts.of(a) for a in wanted]
        errors = [got[n] - a for n, a in zip(self._names, wanted, strict=True)]
        for sums, arrays in ((self._power, wanted), (self._noise, errors)):
            sums.append(np.concatenate([p.sums(np.square(a)) for p, a in zip(self._parts, arrays, strict=True)]))

    def scores(self) -> Scores:
        return Scores(np.array(self._power), np.array(self._noise))
