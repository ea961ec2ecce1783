"""Resizing and cropping that a library carries out itself (`--resize-inside`), on pixels of one fixed size, as `Preprocess.pixels` does on any.

480 x 640 pixels  --slice-->  what is read at all  --resample columns-->  --resample rows-->  224 x 224, the centre of what resizing gives
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from qcompiler.base.errors import DataError
from qcompiler.calibration.preprocess import LARGEST_IMAGE, LARGEST_SIDE, Preprocess, shown
from qcompiler.numerics import operators as numerics
from qcompiler.numerics.resample import FILTERS, resample_weights


def parse_size(given: Any) -> tuple[int, int]:
    """ "480x640", or (480, 640): height and width. Raises DataError."""
    found = re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", given.strip()) if isinstance(given, str) else None
    sides: Sequence[Any] = [int(n) for n in found.groups()] if found else given if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if len(sides) != 2 or not all(isinstance(s, (int, np.integer)) and not isinstance(s, bool) and 1 <= s <= LARGEST_SIDE for s in sides):
        raise DataError(
            f"resize_inside is {shown(given)}; expected the height and width of the pixels that come in, such as 480x640, each from 1 to {LARGEST_SIDE}"
        )
    if sides[0] * sides[1] > LARGEST_IMAGE:
        raise DataError(f"resize_inside: pixels of {spelled(sides)} are {sides[0] * sides[1]}; at most {LARGEST_IMAGE} are supported")
    return int(sides[0]), int(sides[1])


class Resize:
    """From pixels [N, height, width, C] of the size `source` to those of `settings`' resize and crop. Raises DataError where these can't be carried out inside.

    size: (height, width) of the result.
    """

    def __init__(self, settings: Preprocess, source: tuple[int, int]) -> None:
        if settings.resize is None and settings.crop is None:
            raise DataError(
                "resize_inside: the preprocessing file has neither resize nor crop, so nothing is left to do inside; add them, or leave the option out"
            )
        if settings.resize is not None and settings.interpolation not in FILTERS:
            raise DataError(f"resize_inside: interpolation {settings.interpolation} can't be carried out inside; supported: {', '.join(FILTERS)}")
        self.source = source
        whole = source if settings.resize is None else settings.resized(source[1], source[0])[::-1]
        crop = whole if settings.crop is None else settings.crop if isinstance(settings.crop, tuple) else (settings.crop, settings.crop)
        if any(c > w for c, w in zip(crop, whole, strict=True)):
            raise DataError(f"resize_inside: pixels of {spelled(source)} become {spelled(whole)}, smaller than the crop {spelled(crop)}")
        self.size, self._method = crop, settings.interpolation
        self._axes = [self._along(old, new, kept) for old, new, kept in zip(source, whole, crop, strict=True)]

    def _along(self, old: int, new: int, kept: int) -> tuple[int, int, dict[str, Any] | None]:
        """(first and end of what is read along an axis; `qc.resample`'s lists, relative to that, or None where the axis is only cut)."""
        begin = round((new - kept) / 2)
        if old == new:
            return begin, begin + kept, None
        first, weights = resample_weights(old, new, self._method)
        first, weights = first[begin : begin + kept], weights[begin : begin + kept]
        low, high = min(first), max(first) + weights.shape[1]
        return low, high, {"first": [f - low for f in first], "weights": weights.reshape(-1).tolist()}

    @cached_property
    def steps(self) -> list[tuple[str, dict[str, Any], tuple[int, int]]]:
        """(operator, attributes but for the batch and channels of `qc.slice`, height and width of its result), in order: columns before rows."""
        (top, bottom, rows), (left, right, columns) = self._axes
        found: list[tuple[str, dict[str, Any], tuple[int, int]]] = []
        height, width = bottom - top, right - left
        if (height, width) != self.source:
            found.append(("qc.slice", {"begin": [top, left], "end": [bottom, right]}, (height, width)))
        if columns is not None:
            width = len(columns["first"])
            found.append(("qc.resample", {"axis": 2, **columns}, (height, width)))
        if rows is not None:
            found.append(("qc.resample", {"axis": 1, **rows}, (len(rows["first"]), width)))
        return found

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [N, height, width, C] of the source, resized and cropped."""
        for name, attrs, _ in self.steps:
            if name == "qc.slice":
                (top, left), (bottom, right) = attrs["begin"], attrs["end"]
                pixels = pixels[:, top:bottom, left:right]
            else:
                pixels = numerics.OPERATORS[name](pixels, **attrs)
        return np.ascontiguousarray(pixels)

    def back(self, pixels: np.ndarray) -> np.ndarray:
        """Some pixels of the source's size that look like `pixels`, of the result's: the nearest ones repeated or left out."""
        rows, columns = ((np.arange(old) * new // old) for old, new in zip(self.source, self.size, strict=True))
        return np.ascontiguousarray(pixels[:, rows][:, :, columns])


def spelled(size: Sequence[int]) -> str:
    """(480, 640) as "480 x 640"."""
    return " x ".join(map(str, size))
