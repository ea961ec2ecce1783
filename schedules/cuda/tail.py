"""Operators that go on with a kernel's results in registers, so that what lies between need not be written and read again.

    dense, lut16, requantize   -->   a dense layer whose end interpolates and rescales
    layer_norm, requantize     -->   a normalization that writes its 16-bit stream and the 8-bit copy of it

The arithmetic is that of the operators' own rows (`schedules/portable/elementwise.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.builder import Emitter
from qcompiler.schedules.portable.base import PortableRow
from qcompiler.schedules.portable.elementwise import interpolated, looked_up, rescaled, stored_entries
from qcompiler.schedules.portable.nest import Compute
from qcompiler.schedules.table import Layout, OpCall

TAILS: Mapping[str, Callable[[Emitter], Compute]] = {"qc.requantize": rescaled, "qc.lut": looked_up, "qc.lut16": interpolated}


def tail_arrays(op: OpCall, channels: np.ndarray | None = None) -> list[np.ndarray]:
    """A constant for each operator of the tail. channels: of the result, those that lie in the places of one that has a number per channel (negative: none)."""

    def array(call: OpCall) -> np.ndarray:
        found = stored_entries(call) if call.name == "qc.lut" else np.asarray(call.operands[1])
        return found if channels is None or not _by_channel(call) else np.where(channels < 0, 0, found[np.maximum(channels, 0)]).astype(found.dtype)

    return [array(call) for call in op.tail]


def _by_channel(call: OpCall) -> bool:
    return call.name == "qc.requantize" and np.asarray(call.operands[1]).size > 1


class GoesOn:
    """Rows whose kernels compute tails (`Ending`): those of integers, for operators that read them."""

    def goes_on(self, op: OpCall, after: OpCall) -> bool:
        source, *rest = after.operands
        integers = isinstance(source, Layout) and source.dtype in ("int8", "int16")
        return integers and op.output.dtype in ("int8", "int16") and after.name in TAILS and all(isinstance(o, np.ndarray) for o in rest)


class EndingRow(GoesOn, PortableRow):
    """A plain row whose kernels compute tails."""


class Tail:
    """The tail of a kernel's operator. arrays: the buffers of `tail_arrays`."""

    def __init__(self, k: Emitter, arrays: Sequence[Any]) -> None:
        self.calls = [(call, array, TAILS[call.name](replace(k, op=call, arrays=[array]))) for call, array in zip(k.op.tail, arrays, strict=True)]

    def __call__(self, values: Sequence[Any], constants: Callable[[Any], Sequence[Any]]) -> list[Any]:
        """int32 of what the last operator yields for numbers of adjacent channels, int32 with the number at the bottom.
        constants: of a buffer that has a number per channel, those of these channels."""
        for call, array, compute in self.calls:
            source = call.tensors[0].dtype
            factors: Iterator[list[Any]] = iter([[]] * len(values))
            if call.name == "qc.requantize":
                factors = ([f] for f in (constants(array) if _by_channel(call) else [array[0]] * len(values)))
            values = [T.bind(T.Cast("int32", compute([T.Cast(source, v), *f], 1))) for v, f in zip(values, factors, strict=True)]
        return list(values)
