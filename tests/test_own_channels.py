"""Every row that says that it leaves the channels behind a pixel's own alone does: run between guards, into an output with a pitch. Those of Arm are in
test_kernels_arm.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from x86_emulation import ALL, HOST, build, runs_here

from qcompiler import schedules
from qcompiler.base.targets import Target
from qcompiler.numerics import operators as numerics
from qcompiler.numerics.spec import resize_indices
from qcompiler.schedules.harness import fetch, run_kernel, store
from qcompiler.schedules.table import KERNELS, Layout, OpCall, Row

pytestmark = runs_here
for _target in ALL:
    schedules.load(_target)
PORTABLE = dataclasses.replace(HOST, name="plain", tvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"}, features=())
TARGET = {isa: target for target in reversed(ALL) for isa in target.rows}  # a target whose code may hold a row's instructions
OWN = [(name, row) for name, rows in sorted(KERNELS.items()) for row in rows if row.own_channels and row.isa in (*TARGET, "any")]
X8, XF = (1, 9, 11, 21), (2, 3, 5, 21)  # images of int8 and of float32: no number of channels that fills vectors
QUANT = {"zero_point": 5, "low": -128, "high": 127}
FLOAT = {"low": -3.4e38, "high": 3.4e38}
PLAIN = {"strides": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1]}


def conv(image: tuple[int, ...], outputs: int, groups: int, floats: bool = False, transposed: bool = False) -> tuple[list[Any], dict[str, Any]]:
    rng, shape = np.random.default_rng(outputs), (outputs, 3, 3, image[3] // groups)
    extra = {"output_padding": [0, 0]} if transposed else {}
    if floats:
        return [image, *(rng.standard_normal(s).astype(np.float32) for s in (shape, outputs))], {**PLAIN, "groups": groups, **FLOAT, **extra}
    constants = rng.integers(-126, 128, shape).astype(np.int8), rng.integers(-900, 900, outputs).astype(np.int32)
    scale = (rng.uniform(20, 90, outputs) / (5000 * np.sqrt(9 * shape[3]))).astype(np.float32)
    return [image, *constants, scale], {**PLAIN, "groups": groups, "x_zero_point": -7, **QUANT, "out_dtype": "int8", **extra}


def resize() -> dict[str, Any]:
    attrs: dict[str, Any] = {"size": [13, 17], "method": "linear"}
    for axis, old, new in (("y", 9, 13), ("x", 11, 17)):
        first, second, weight = resize_indices(old, new, "linear", "half_pixel", "round")
        attrs |= {f"i{axis}0": first, f"i{axis}1": second, f"w{axis}": weight}
    return attrs


POOL = {"kernel": [3, 2], "strides": [2, 1], "padding": [1, 0, 1, 1]}
AVERAGE = {"x_zero_point": -7, "ratio": 1.3, **QUANT}
CASES: dict[str, list[tuple[list[Any], dict[str, Any]]]] = {  # operands: shapes of what is computed at run time, and constants
    "qc.conv2d": [conv((1, 12, 13, 64), 75, 1), conv((1, 9, 11, 21), 21, 21)],
    "qc.f32.conv2d": [conv((1, 9, 11, 7), 19, 1, floats=True), conv((1, 9, 11, 21), 21, 21, floats=True)],
    "qc.conv2d_transpose": [conv((1, 5, 6, 7), 19, 1, transposed=True)],
    "qc.f32.conv2d_transpose": [conv((1, 5, 6, 7), 19, 1, floats=True, transposed=True)],
    "qc.dequantize": [([X8], {"scale": 0.1, "zero_point": 3})],
    "qc.enter": [([X8], {}), ([(1, 21, 9, 11)], {"axes": [0, 2, 3, 1]})],
    "qc.leave": [([X8], {"dtype": "int8"})],
    "qc.add": [([X8, X8], {"a_zero_point": 3, "a_multiplier": 900, "b_zero_point": -4, "b_multiplier": 700, "shift": 11, **QUANT})],
    "qc.mul": [([X8, (1, 1, 1, 21)], {"a_zero_point": 3, "b_zero_point": -4, "multiplier": 0.01, **QUANT})],
    "qc.prelu": [([X8, np.linspace(-0.3, 0.9, 21, dtype=np.float32)], {"multiplier": 0.7, "x_zero_point": -7, **QUANT})],
    "qc.lut": [([X8, np.arange(127, -129, -1).astype(np.int8)], {})],
    "qc.max_pool2d": [([X8], {**POOL, "dilation": [1, 1]})],
    "qc.avg_pool2d": [([X8], {**POOL, "count_include_pad": False, **AVERAGE})],
    "qc.mean": [([X8], {"axes": [1], "keepdims": True, **AVERAGE})],
    "qc.resize2d": [([X8], resize())],
    "qc.concat": [([X8, (1, 9, 11, 5)], {"axis": 3})],
    "qc.copy": [([X8], {}), ([XF], {})],
    "qc.transpose": [([(1, 21, 9, 11)], {"axes": [0, 2, 3, 1]}), ([X8], {"axes": [0, 2, 1, 3]})],
    "qc.slice": [([X8], {"begin": [0, 1, 0, 2], "end": [1, 9, 11, 21], "strides": [1, 1, 2, 1]})],
    "qc.pad": [([X8], {"pads": [[0, 0], [1, 2], [0, 1], [1, 3]], "value": -7})],
    "qc.select": [([X8], {"indices": [[], [1, 0, 1, *range(2, 9), 7], [], [3, 2, 1, *range(21), 20, 20, 20]]})],
}


def op_call(
    name: str, operands: list[Any], attrs: dict[str, Any], storage: str, row: Row, target: Target, pitch: int
) -> tuple[OpCall, list[np.ndarray], np.ndarray]:
    """(the call, its stored inputs, what it must give)."""
    rng, floats = np.random.default_rng(1), name.startswith("qc.f32.")
    arrays = []
    for o in operands:
        made = (
            o if isinstance(o, np.ndarray) else rng.standard_normal(o).astype(np.float32) if floats or o == XF else rng.integers(-128, 128, o).astype(np.int8)
        )
        arrays.append(made)
    want = arrays[0] if name == "qc.copy" else np.asarray(numerics.OPERATORS[name](*arrays, **attrs))
    layouts = [Layout(a.shape, storage if a.dtype == np.int8 else str(a.dtype)) for a in arrays]
    given = [o if isinstance(o, np.ndarray) else layout for o, layout in zip(operands, layouts, strict=True)]
    op = OpCall(name, given, attrs, Layout(want.shape, storage if want.dtype == np.int8 else str(want.dtype), (1, 0, 2, 1), want.shape[-1] + pitch))
    if row.refuse(op, target) is None:
        need = row.needs(op, target)[0]
        padded = -(-arrays[0].shape[-1] // need.pitch) * need.pitch
        op.operands[0] = Layout(arrays[0].shape, layouts[0].dtype, need.halo, padded)
    tensors = [a for a, o in zip(arrays, operands, strict=True) if not isinstance(o, np.ndarray)]
    return op, [store(a, layout, int(attrs.get("x_zero_point", 0))) for a, layout in zip(tensors, op.tensors, strict=True)], want


@pytest.mark.parametrize(("name", "row"), OWN, ids=[f"{row.name}" for _, row in OWN])
def test_only_a_pixels_own_channels_are_written(name: str, row: Row) -> None:
    """`run_kernel` looks at the bytes behind; at least one case must be for each row."""
    targets = [(HOST, "uint8"), (PORTABLE, "int8")] if row.isa == "any" else [(TARGET[row.isa], "uint8")]
    for target, storage in targets:
        ran = 0
        for operands, attrs in CASES[name]:
            for pitch in (1, 40):
                op, inputs, want = op_call(name, operands, attrs, storage, row, target, pitch)
                if row.refuse(op, target) is not None:
                    continue
                kernel, host = build(row, op, row.default(op, target), target)
                got = fetch(run_kernel(kernel, inputs, op.output, host), op.output)
                if want.dtype == np.float32:
                    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
                else:
                    np.testing.assert_array_equal(got, want)
                ran += 1
        assert ran, f"no case is for {row.name}"


def test_a_row_that_says_so_and_does_not_is_caught() -> None:
    """`any/quantize` writes whole words over the channels behind, which is why it doesn't say so."""
    (row,) = KERNELS["qc.quantize"]
    assert isinstance(row.own_channels, bool) and not row.own_channels
    op = OpCall(
        "qc.quantize",
        [Layout((1, 3, 19, 23), "float32")],
        {"scale": 0.1, "zero_point": 3, "low": -128, "high": 127, "axes": [0, 2, 3, 1]},
        Layout((1, 19, 23, 3), "uint8", pitch=4),
    )
    kernel = row.build(op, {}, HOST)
    inputs = [np.zeros(3 * 19 * 23, np.float32)]
    run_kernel(kernel, inputs, op.output, HOST)
    row.own_channels = True  # type: ignore[misc]
    try:
        with pytest.raises(AssertionError, match="channels behind its own"):
            run_kernel(kernel, inputs, op.output, HOST)
    finally:
        row.own_channels = False  # type: ignore[misc]
