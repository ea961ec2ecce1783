"""GPU kernels equal numerics.py bit for bit, executed thread by thread on the emulation of tests/cuda_emulation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from cuda_emulated import Emulated

from qcompiler import numerics, schedules
from qcompiler.schedules.harness import fetch, store
from qcompiler.schedules.table import Kernel, Layout, OpCall, select
from qcompiler.targets import find_target

TARGET = find_target("cuda-sm80")
schedules.load(TARGET)
HALO = (1, 2, 3, 1)
GARBAGE = -77  # in halos: no kernel may read them


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

    def prepare(self) -> Kernel:
        with np.errstate(over="ignore"):
            self.expected = np.asarray(numerics.OPERATORS[self.name](*self.operands, **self.attrs))
        stored: list[Layout | np.ndarray] = []
        self.inputs = []
        for index, operand in enumerate(self.operands):
            if index in self.constants:
                stored.append(operand)
                continue
            layout = Layout(operand.shape, str(operand.dtype), **self.layouts.get(index, {}))
            stored.append(layout)
            self.inputs.append(store(operand, layout, zero_point=GARBAGE))
        self.output = Layout(self.expected.shape, str(self.expected.dtype), **self.out)
        op = OpCall(self.name, stored, self.attrs, self.output, "node")
        row = select(op, TARGET)
        return row.build(op, row.default(op, TARGET), TARGET)


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
    ((30, 50), ()),
]


def binary() -> dict[str, Case]:
    cases = {}
    for i, (a, b) in enumerate(BROADCASTS):
        for name, attrs in (("add", ADD), ("mul", MUL)):
            operands = [data(1, *a), data(2, *b)]
            cases[f"{name}_{i}"] = Case(f"qc.{name}", operands, attrs)
            cases[f"{name}_{i}_constant"] = Case(f"qc.{name}", operands[::-1], attrs, constants=(0,))
            if len(a) == 4:
                cases[f"{name}_{i}_padded"] = Case(f"qc.{name}", operands, attrs, {0: {"halo": HALO}}, {"pitch": a[-1] + 3})
    return cases


CASES = binary()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated({f"k_{name}": case.prepare() for name, case in CASES.items()}, TARGET, tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("name", CASES)
def test_exact(name: str, emulated: Emulated) -> None:
    case = CASES[name]
    result = fetch(emulated.run(f"k_{name}", case.inputs, case.output), case.output)
    if case.tolerance:
        np.testing.assert_allclose(result, case.expected, rtol=case.tolerance, atol=case.tolerance)
    else:
        np.testing.assert_array_equal(result, case.expected)
