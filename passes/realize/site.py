"""What a realization rule sees of its group, and what it may emit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import make_op
from qcompiler.passes.groups import Group


@dataclass(frozen=True)
class Tensor:
    """An int8 value of the integer module, or an int8 constant, and what its numbers mean."""

    expr: Any
    params: QParams


@dataclass
class Site:
    """A group about to become one integer operator.

    inputs, residual: its int8 operands. output: parameters of its int8 output, or None when float32 consumers read the accumulator
    directly. requantized(tensor, params): the same real values under other parameters (a `qc.lut` when they differ).
    """

    group: Group
    inputs: list[Tensor]
    residual: Tensor | None
    output: QParams | None
    requantized: Callable[[Tensor, QParams], Tensor]

    @property
    def quantized(self) -> QParams:
        """Parameters of the output of a group that is always int8."""
        assert self.output is not None
        return self.output

    def bounds(self) -> dict[str, int]:
        """The fused activation in quantized units; clamping commutes with quantizing because quantizing is monotone."""
        low, high = self.group.low, self.group.high
        return {
            "low": -128 if low is None else int(self.quantized.quantize(np.array(low))),
            "high": 127 if high is None else int(self.quantized.quantize(np.array(high))),
        }

    def call(self, name: str, tensors: Iterable[Any], attrs: dict[str, Any], dtype: str = "int8") -> Any:
        """`name(tensors)` with the group's output shape."""
        return make_op(name, tensors, attrs, self.group.shape, dtype)
