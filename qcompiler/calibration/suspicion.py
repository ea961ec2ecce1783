"""Signs that calibration data is not what the network will see. They are warnings: what is strange for one network is right for another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from qcompiler.calibration.table import CalibrationTable

LEAST_CHANGE = 0.04
"""Of an output's mean square, the part that differs between samples. Photographs give classifiers 0.8 to 0.9, noise gives them 0.01 to 0.03."""


def doubts(table: CalibrationTable, inputs: Iterable[str], outputs: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    """Sentences for people, none if all is well. outputs: of the float network for several samples (possibly none)."""
    found = []
    for name in inputs:
        seen = table.values.get(name)
        if seen is not None and seen.count and seen.low == seen.high:
            found.append(
                f"input '{name}' is {seen.low:g} everywhere in all {table.samples} calibration samples; "
                "give data that looks like what the network will see, and check the preprocessing"
            )
    if found or len(outputs) < 2:
        return found
    for name, first in outputs[0].items():
        if first.dtype != np.float32 or first.size < 2:
            continue
        every = np.stack([o[name].ravel() for o in outputs]).astype(np.float64)
        power = float(np.square(every).mean())
        change = float(every.var(axis=0).mean()) / power if power else 1.0
        if change < LEAST_CHANGE:
            found.append(
                f"output '{name}' hardly depends on the calibration sample: only {100 * change:.2g} % of its power differs between {len(outputs)} of "
                "them, as with noise or with images that are scaled wrongly; check the data and the preprocessing"
            )
    return found
