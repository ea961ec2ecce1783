"""What is said of a network's input or output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TensorInfo:
    """An input or output as the user sees it: `shape` with the batch axis, in the model file's own layout; `dtype` as numpy spells it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def first_states(inputs: Iterable[TensorInfo], state: Mapping[str, str], initial: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the states (input -> output) are in the first call: zeros, but for those in `initial`, a number or nested lists."""
    return {i.name: np.broadcast_to(np.asarray(initial.get(i.name, 0), i.dtype), i.shape).copy() for i in inputs if i.name in state}


@lru_cache(maxsize=256)  # spelling a type takes numpy two microseconds, and every call of a session asks
def fits(dtype: np.dtype, wanted: str) -> bool:
    """May arrays of `dtype` be fed where `wanted` is? float16 may serve as float32, of which it is a part: networks of float16 compute in float32."""
    return str(dtype) in (wanted, "float16" if wanted == "float32" else wanted)


def as_array(value: Any) -> np.ndarray | None:
    """An array, or a tensor of another library (one of PyTorch on a GPU, or with a gradient, included), as a numpy array; None for anything else."""
    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)
    for step in ("detach", "cpu"):  # PyTorch's tensors refuse `__array__` otherwise
        if callable(getattr(value, step, None)):
            value = getattr(value, step)()
    if hasattr(value, "__array__"):
        return np.asarray(value)
    return np.from_dlpack(value) if hasattr(value, "__dlpack__") else None
