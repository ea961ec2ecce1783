"""Sums and products of two tensors that kernels of every architecture are tested on: attributes, and shapes that broadcast."""

from __future__ import annotations

import numpy as np

ADD = {
    "a_zero_point": -128,
    "a_multiplier": 51234,
    "b_zero_point": 127,
    "b_multiplier": -40321,
    "shift": 16,
    "zero_point": 3,
    "low": -128,
    "high": 120,
}
MUL = {"a_zero_point": -128, "b_zero_point": 5, "multiplier": float(np.float32(0.0037)), "zero_point": -20, "low": -128, "high": 127}
BROADCASTS = [
    ((2, 5, 6, 24), (2, 5, 6, 24)),
    ((1, 5, 6, 17), (1, 1, 1, 17)),
    ((2, 5, 6, 16), (2, 1, 1, 16)),
    ((2, 5, 6, 16), (1, 5, 6, 1)),
    ((3, 1), (1, 4)),
    ((7, 65), (65,)),
]
