"""One operator on any target, and what the reference arithmetic says of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qcompiler import schedules
from qcompiler.base.targets import Target
from qcompiler.numerics import operators as numerics
from qcompiler.schedules.harness import fetch, store
from qcompiler.schedules.table import Kernel, Layout, OpCall, Row, select

HALO = (1, 2, 3, 1)
GARBAGE = -77  # in halos that no kernel may read


def data(seed: int, *shape: int) -> np.ndarray:
    """Random int8 with both extremes in it."""
    values = np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)
    values.reshape(-1)[:: max(1, values.size // 7)] = -128
    values.reshape(-1)[1 :: max(2, values.size // 5)] = 127
    return values


@dataclass
class Case:
    """One operator. `layouts`, `out`: halo and pitch of operands and output; `constants`: indices of constant operands."""

    name: str
    operands: list[Any]
    attrs: dict[str, Any]
    layouts: dict[int, dict[str, Any]] = field(default_factory=dict)
    out: dict[str, Any] = field(default_factory=dict)
    constants: tuple[int, ...] = ()
    tolerance: float = 0.0

    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return np.shape(numerics.OPERATORS[self.name](*self.operands, **self.attrs))

    def check(self, stored: np.ndarray) -> None:
        """Compare what a kernel stored with what numerics.py says. Raises AssertionError."""
        result = fetch(stored, self.output)
        if self.tolerance:
            np.testing.assert_allclose(result, self.expected, rtol=self.tolerance, atol=self.tolerance)
        else:
            assert result.dtype == self.expected.dtype
            np.testing.assert_array_equal(result, self.expected)

    def prepare(self, target: Target, params: dict[str, Any] | None = None, row: Row | None = None) -> Kernel:
        """The kernel of the row that is selected, or of `row`, with `params` at a point of its design space; inputs as it needs them, and what to expect."""
        schedules.load(target)
        with np.errstate(over="ignore"):
            self.expected = np.asarray(numerics.OPERATORS[self.name](*self.operands, **self.attrs))

        def layout(array: np.ndarray, changes: dict[str, Any]) -> Layout:
            return Layout(np.shape(array), target.storage if array.dtype == np.int8 else str(array.dtype), **changes)

        layouts = [layout(o, self.layouts.get(i, {})) for i, o in enumerate(self.operands)]
        self.output = layout(self.expected, self.out)
        stored = [o if i in self.constants else layouts[i] for i, o in enumerate(self.operands)]
        self.op = op = OpCall(self.name, stored, self.attrs, self.output, "node")
        row = row or select(op, target)
        needs = iter(row.needs(op, target))
        self.inputs = []
        for i, operand in enumerate(self.operands):
            if i not in self.constants:
                need = next(needs)
                if len(layouts[i].shape) == 4:
                    halo = tuple(max(pair) for pair in zip(need.halo, layouts[i].halo, strict=True))
                    layouts[i] = replace(layouts[i], halo=halo, pitch=-(-layouts[i].channel_pitch // need.pitch) * need.pitch)
                op.operands[i] = layouts[i]
                self.inputs.append(store(operand, layouts[i], zero_point=self.attrs.get("x_zero_point", 0) if any(need.halo) else GARBAGE))
        return row.build(op, row.default(op, target) | (params or {}), target)
