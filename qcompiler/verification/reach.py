"""Do the samples of a verification lie where those of the calibration did? Else both were not preprocessed alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

MOST_OUTSIDE = 0.05
"""Of an input's values, beyond what its 8 bits can say: a sound range clips less than a hundredth, another scaling half of everything."""

LEAST_USED = 0.125
"""Of the range of an input's 8 bits, that its values must span."""


class Reach:
    """Counts, of every input that a library rounds to 8 or 16 bits (`scale` and `zero_point` in its manifest), what lies beyond them, and the span."""

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self._ranges = {}
        self._calibrated = manifest.get("calibration_samples", 1) > 0  # else the ranges stand in the model file
        for port in manifest.get("inputs", ()):
            if "scale" in port and port.get("dtype") == "float32":
                stored = np.iinfo(port.get("stored", "int8"))
                low, high = (port["scale"] * (q - port["zero_point"]) for q in (stored.min, stored.max))
                self._ranges[port["name"]] = (low - port["scale"], high + port["scale"])
        self._count = dict.fromkeys(self._ranges, 0)
        self._outside = dict.fromkeys(self._ranges, 0)
        self._seen = dict.fromkeys(self._ranges, (math.inf, -math.inf))

    def add(self, sample: Mapping[str, np.ndarray]) -> None:
        for name, (low, high) in self._ranges.items():
            array, (least, most) = sample[name], self._seen[name]
            self._count[name] += array.size
            self._outside[name] += int(((array < low) | (array > high)).sum())
            self._seen[name] = (min(least, float(array.min())), max(most, float(array.max())))

    def doubts(self) -> list[str]:
        """A sentence for every input whose values are elsewhere than those of the calibration, or than the quantized file has them."""
        found = []
        led = "calibration led to" if self._calibrated else "the model file has the range"
        ask = "Was the calibration data preprocessed as these samples are?" if self._calibrated else "Are these samples preprocessed as the model wants it?"
        for name, (low, high) in self._ranges.items():
            outside, (least, most) = self._outside[name] / max(self._count[name], 1), self._seen[name]
            said = f"input '{name}' lies in [{least:.4g}, {most:.4g}] here, and {led} [{low:.4g}, {high:.4g}]"
            if outside > MOST_OUTSIDE:
                found.append(f"{said}: {100 * outside:.0f} % of it is cut off. {ask}")
            elif self._count[name] and most - least < LEAST_USED * (high - low):
                found.append(f"{said}, of which little is used. {ask}")
        return found
