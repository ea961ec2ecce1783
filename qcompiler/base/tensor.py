"""What is said of a network's input or output."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorInfo:
    """An input or output as the user sees it: `shape` with the batch axis, in the model file's own layout; `dtype` as numpy spells it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
