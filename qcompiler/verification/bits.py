"""Bit parity: every integer value of a library against the reference arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qcompiler.base.errors import ArtifactError
from qcompiler.verification.compared import Runner


@dataclass(frozen=True)
class Mismatch:
    """A value that is not the reference's: how many elements differ, where first, both numbers there, and the channels touched."""

    name: str
    elements: int
    index: tuple[int, ...]
    actual: float
    expected: float
    channels: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"value '{self.name}': {self.elements} elements differ, first at {list(self.index)}: {self.actual:g}, "
            f"expected {self.expected:g}; channels {', '.join(map(str, self.channels[:8]))}{', ...' if len(self.channels) > 8 else ''}"
        )


def bit_parity(actual: Runner, expected: Mapping[str, np.ndarray], sample: Mapping[str, np.ndarray]) -> list[Mismatch]:
    """Values of the library that are not equal, bit for bit, to `expected` (value id -> array, from `qcompiler.verification.interpreter.run`), in order.

    Only int8, int16 and uint8 values are promised to be equal; float values are left out. Raises ArtifactError when no int8 value is compared at all.
    """
    mismatches: list[Mismatch] = []
    compared = 0

    def visit(name: str, array: np.ndarray) -> None:
        nonlocal compared
        if name not in expected or array.dtype not in (np.int8, np.int16, np.uint8):
            return
        compared += 1
        wanted = expected[name]
        if wanted.shape != array.shape or wanted.dtype != array.dtype:
            raise ArtifactError(f"value '{name}' is {array.dtype}{list(array.shape)} in the library, {wanted.dtype}{list(wanted.shape)} in the reference")
        where = np.argwhere(array != wanted)
        if len(where):
            first = tuple(int(i) for i in where[0])
            channels = tuple(int(c) for c in np.unique(where[:, -1])) if array.ndim else ()
            mismatches.append(Mismatch(name, len(where), first, float(array[first]), float(wanted[first]), channels))

    actual.trace(sample, visit)
    if not compared:
        raise ArtifactError("no int8 value of the library occurs in the reference: nothing was compared")
    return mismatches
