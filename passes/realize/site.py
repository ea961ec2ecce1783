"""What a realization rule sees of its group, and what it may emit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.numerics.spec import LIMITS, QParams
from qcompiler.passes.graph import make_op
from qcompiler.passes.groups import Group


@dataclass(frozen=True)
class Tensor:
    """An int8 or int16 value of the integer module, or such a constant, and what its numbers mean."""

    expr: Any
    params: QParams


@dataclass
class Site:
    """A group about to become one integer operator.

    inputs, residual: its integer operands. plain: what it reads as it is (`Group.plain`). output: parameters of its integer output, or None when float32
    consumers read the accumulator directly. requantized(tensor, params): the same real values under other parameters (a `qc.lut` or `qc.requantize` when they
    differ). interior(group, what, call): a value inside. once(group, what, call): the same, of a relax operator that other groups may need as well.
    packed(tensor, shape): the same numbers under another shape. behind: the float module's bindings.
    """

    group: Group
    inputs: list[Tensor]
    residual: Tensor | None
    plain: list[Any]
    output: QParams | None
    requantized: Callable[[Tensor, QParams], Tensor]
    interior: Callable[[Group, str, Any], Any]
    once: Callable[[Group, str, Any], Any]
    packed: Callable[[Tensor, Sequence[int]], Any]
    behind: Mapping[str, Any]

    @property
    def quantized(self) -> QParams:
        """Parameters of the output of a group that is always stored as integers."""
        assert self.output is not None
        return self.output

    def bounds(self) -> dict[str, int]:
        """The fused activation in quantized units; clamping commutes with quantizing because quantizing is monotone."""
        low, high = self.group.low, self.group.high
        least, most = LIMITS[self.quantized.dtype]
        return {
            "low": least if low is None else int(self.quantized.quantize(np.array(low))),
            "high": most if high is None else int(self.quantized.quantize(np.array(high))),
        }

    def call(self, name: str, tensors: Iterable[Any], attrs: dict[str, Any], dtype: str | None = None) -> Any:
        """`name(tensors)` with the group's output shape, in the type of its stored output where none is given."""
        return make_op(name, tensors, attrs, self.group.shape, dtype or self.quantized.dtype)


def typed(params: QParams) -> dict[str, str]:
    """The attribute that says what an operator writes; int8 goes without saying."""
    return {} if params.dtype == "int8" else {"out_dtype": params.dtype}
