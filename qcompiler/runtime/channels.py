"""Equalized values in a library: how each channel is stored (see `equalization.py`), as the manifest records it."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Channels:
    """How a value is stored: scale * (value - shift) along the last axis; both float32[C]."""

    scale: np.ndarray
    shift: np.ndarray

    def stored(self, array: np.ndarray) -> np.ndarray:
        """float32: `array` of the source model as the equalized network has it."""
        result: np.ndarray = (array - self.shift) * self.scale
        return result

    def to_json(self) -> dict[str, str]:
        """Both arrays as base64 of deflated little-endian float32."""
        return {k: base64.b64encode(zlib.compress(v.astype("<f4").tobytes(), 9)).decode() for k, v in (("scale", self.scale), ("shift", self.shift)) if v.any()}

    @staticmethod
    def from_json(row: Mapping[str, str]) -> Channels:
        scale = np.frombuffer(zlib.decompress(base64.b64decode(row["scale"])), "<f4")
        shift = np.frombuffer(zlib.decompress(base64.b64decode(row["shift"])), "<f4") if "shift" in row else np.zeros_like(scale)
        return Channels(scale, shift)


def stored_form(manifest: Mapping[str, Any], value_id: str, array: np.ndarray) -> np.ndarray:
    """A float value of the source model in the form that a library with this manifest stores it."""
    row = manifest.get("channels", {}).get(value_id)
    return array if row is None else Channels.from_json(row).stored(array)
