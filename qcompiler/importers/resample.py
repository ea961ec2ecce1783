"""Sampling positions and weights of ONNX Resize along one axis, in float64 (numpy only)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompiler.importers.nodes import Refused


@dataclass(frozen=True)
class Axis:
    """One resized axis: `size` elements in, `out` elements out, `scale` as ONNX has it (out / in, unless given otherwise)."""

    size: int
    out: int
    scale: float
    coordinates: str
    roi: tuple[float, float] = (0.0, 1.0)

    def positions(self) -> np.ndarray:
        """Where each output element samples the input, float64 [out]. Source: ONNX operator documentation, Resize."""
        i = np.arange(self.out, dtype=np.float64)
        match self.coordinates:
            case "half_pixel":
                return (i + 0.5) / self.scale - 0.5
            case "half_pixel_symmetric":
                adjustment = self.out / (self.scale * self.size)
                center = self.size / 2
                return center * (1 - adjustment) + (i + 0.5) / self.scale - 0.5
            case "pytorch_half_pixel":
                return (i + 0.5) / self.scale - 0.5 if self.out > 1 else np.zeros_like(i)
            case "align_corners":
                length = self.scale * self.size  # not rounded: with scales, the last element may lie before the border
                return i * (self.size - 1) / (length - 1) if self.out > 1 else np.zeros_like(i)
            case "asymmetric":
                return i / self.scale
            case "tf_crop_and_resize":
                start, end = self.roi
                if self.out > 1:
                    return start * (self.size - 1) + i * (end - start) * (self.size - 1) / (self.out - 1)
                return np.full_like(i, 0.5 * (start + end) * (self.size - 1))
        raise Refused(f"coordinate_transformation_mode '{self.coordinates}' is unknown")

    def outside(self) -> np.ndarray:
        """bool [out]: does an output element sample beyond the input's border?"""
        positions = self.positions()
        return np.asarray((positions < 0) | (positions > self.size - 1))


def _round(x: np.ndarray, rounding: str) -> np.ndarray:
    match rounding:
        case "round_prefer_floor":
            return np.asarray(np.ceil(x - 0.5))
        case "round_prefer_ceil":
            return np.asarray(np.floor(x + 0.5))
        case "floor":
            return np.asarray(np.floor(x))
        case "ceil":
            return np.asarray(np.ceil(x))
    raise Refused(f"nearest_mode '{rounding}' is unknown")


def nearest_indices(axis: Axis, rounding: str) -> np.ndarray:
    """int64 [out]: the input element that each output element copies."""
    return np.asarray(np.clip(_round(axis.positions(), rounding), 0, axis.size - 1), np.int64)


def weights(axis: Axis, mode: str, rounding: str, antialias: bool, cubic: float, exclude_outside: bool) -> np.ndarray:
    """float32 [out, in]: output = weights @ input. Interpolates linearly or with Keys' cubic kernel (coefficient `cubic`).

    With `antialias` and scale below 1, the kernel is stretched by 1 / scale. Elements beyond the border repeat the border's, or are left out
    (weights renormalized) with `exclude_outside`. Source: ONNX operator documentation, Resize; the cubic kernel: Keys 1981.
    """
    positions = axis.positions()
    matrix = np.zeros((axis.out, axis.size))
    if mode == "nearest":
        matrix[np.arange(axis.out), nearest_indices(axis, rounding)] = 1.0
    else:
        kernel, reach = {"linear": (_linear, 1.0), "cubic": (lambda d: _cubic(d, cubic), 2.0)}[mode]
        stretch = min(axis.scale, 1.0) if antialias else 1.0
        for row, position in enumerate(positions):
            taps = np.arange(np.floor(position - reach / stretch), np.ceil(position + reach / stretch) + 1).astype(np.int64)
            values = kernel((taps - position) * stretch)
            inside = (taps >= 0) & (taps < axis.size)
            if exclude_outside:
                values = np.where(inside, values, 0.0)
            if antialias or exclude_outside:
                values = np.asarray(values / values.sum())
            np.add.at(matrix[row], np.clip(taps, 0, axis.size - 1), values)
    return matrix.astype(np.float32)


def _linear(d: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(1.0 - np.abs(d), 0.0))


def _cubic(d: np.ndarray, a: float) -> np.ndarray:
    d = np.abs(d)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))
