"""GPU kernels equal numerics.py bit for bit, executed thread by thread on the emulation of tests/cuda_emulation."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import binary_cases
import numpy as np
import pytest
from binary_cases import ADD, MUL
from cuda_emulated import FLAGS, HEADERS, TARGET, Emulated
from kernel_cases import HALO, Case, data

from qcompiler.numerics import operators as numerics
from qcompiler.schedules.harness import fetch, store
from qcompiler.schedules.table import Layout, OpCall, select

BIG = 3.4028234663852886e38

BROADCASTS = [*binary_cases.BROADCASTS, ((30, 50), ())]


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


NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]
QUANT = {"x_zero_point": -128, "zero_point": 5, "low": -128, "high": 127, "out_dtype": "int8"}


def converting() -> dict[str, Case]:
    """quantize, dequantize, tables."""
    cases = {}
    attrs = {"scale": float(np.float32(0.02)), "zero_point": 7, "low": -100, "high": 127}
    for i, (shape, axes, out) in enumerate(
        [
            ((1,), None, {}),
            ((3, 37), None, {}),
            ((1, 3, 19, 23), NHWC, {"pitch": 4, "halo": (3, 3, 3, 3)}),
            ((2, 37, 6, 5), NHWC, {}),
            ((1, 16, 3, 3), NHWC, {"pitch": 20}),
            ((2, 5, 6, 8), None, {"halo": HALO, "pitch": 16}),
        ]
    ):
        x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        special = [np.nan, np.inf, -np.inf, 0.5 * 0.02, 1.5 * 0.02, -0.0, 3e38, -1e-40]
        x.reshape(-1)[: len(special)] = special[: x.size]
        cases[f"quantize_{i}"] = Case("qc.quantize", [x], attrs | ({"axes": axes} if axes else {}), out=out)
    ties = np.arange(-300, 300, dtype=np.float32) * np.float32(0.5)
    cases["quantize_ties"] = Case("qc.quantize", [ties], {"scale": 1.0, "zero_point": 1})
    for i, (shape, axes, layout) in enumerate(
        [((5, 33), None, {}), ((1, 7, 9, 21), NCHW, {"halo": HALO, "pitch": 24}), ((2, 4, 5, 4), NCHW, {}), ((2, 4, 5, 4), None, {})]
    ):
        attrs = {"scale": float(np.float32(0.037)), "zero_point": -128} | ({"axes": axes} if axes else {})
        cases[f"dequantize_{i}"] = Case("qc.dequantize", [data(2, *shape)], attrs, {0: layout})
    table = data(3, 256)
    cases["lut_every"] = Case("qc.lut", [np.arange(-128, 128, dtype=np.int8), table], {}, constants=(1,))
    negative = np.linspace(-0.3, 0.9, 24, dtype=np.float32)
    attrs = {"multiplier": 0.7, "x_zero_point": -3, "zero_point": 2, "low": -100, "high": 90}
    cases["prelu"] = Case("qc.prelu", [data(1, 2, 5, 6, 24), negative], attrs, constants=(1,))
    cases["prelu_padded"] = Case("qc.prelu", [data(1, 2, 5, 6, 7), negative[:7]], attrs, {0: {"pitch": 9}}, constants=(1,), out={"halo": HALO, "pitch": 8})
    cases["lut_padded"] = Case("qc.lut", [data(1, 2, 5, 6, 7), table], {}, constants=(1,), out={"halo": HALO, "pitch": 8})
    return cases


def pooling() -> dict[str, Case]:
    cases = {}
    for i, (shape, kernel, strides, padding, dilation) in enumerate(
        [
            ((1, 12, 13, 64), [3, 3], [2, 2], [1, 1, 1, 1], [1, 1]),
            ((2, 7, 9, 5), [2, 3], [1, 2], [0, 1, 1, 0], [1, 1]),
            ((1, 11, 10, 12), [3, 3], [2, 1], [2, 0, 1, 2], [2, 3]),
            ((1, 2, 2, 8), [5, 5], [1, 1], [2, 2, 2, 2], [1, 1]),
        ]
    ):
        geometry = {"kernel": kernel, "strides": strides, "padding": padding}
        padded = {"layouts": {0: {"halo": (2, 1, 0, 1)}}, "out": {"halo": HALO, "pitch": shape[-1] + 7}}
        cases[f"max_pool_{i}"] = Case("qc.max_pool2d", [data(4, *shape)], geometry | {"dilation": dilation})
        cases[f"max_pool_{i}_padded"] = Case("qc.max_pool2d", [data(4, *shape)], geometry | {"dilation": dilation}, **padded)
        if dilation == [1, 1]:
            for include in (True, False):
                attrs = {"count_include_pad": include, "x_zero_point": 9, "ratio": 0.7312, "zero_point": -3, "low": -128, "high": 127}
                cases[f"avg_pool_{i}_{include}"] = Case("qc.avg_pool2d", [data(4, *shape)], geometry | attrs, **(padded if include else {}))
    geometry = {"kernel": [2, 2], "strides": [1, 1], "padding": [3, 0, 0, 2]}
    attrs = geometry | {"count_include_pad": False, "x_zero_point": 9, "ratio": 0.7, "zero_point": -3}
    cases["avg_pool_padding_only"] = Case("qc.avg_pool2d", [data(4, 1, 4, 5, 8)], attrs)
    for i, (shape, axes, keepdims) in enumerate(
        [
            ((1, 7, 7, 132), [1, 2], True),
            ((2, 5, 6, 70), [1, 2], False),
            ((2, 6, 75), [-1], True),
            ((2, 6, 76), [1], False),
            ((3, 4, 5, 6), [0, 3], False),
            ((40, 30), [1], False),
            ((64,), [0], True),
            ((5, 31), [0, 1], True),
        ]
    ):
        attrs = {"axes": axes, "keepdims": keepdims, "x_zero_point": -11, "ratio": 1.913, "zero_point": 4, "low": -128, "high": 127}
        layouts = {0: {"halo": HALO, "pitch": shape[-1] + 4}} if len(shape) == 4 else {}
        cases[f"mean_{i}"] = Case("qc.mean", [data(5, *shape)], attrs)
        cases[f"mean_{i}_padded"] = Case("qc.mean", [data(5, *shape)], attrs, layouts)
    return cases


def movement() -> dict[str, Case]:
    cases = {}
    for i, (axis, extents) in enumerate([(3, (5, 64, 17)), (3, (8, 16)), (1, (2, 3)), (0, (1, 2))]):
        shapes = [[2 if axis else e, 4, 5, 16] for e in extents]
        for shape, extent in zip(shapes, extents, strict=True):
            shape[axis] = extent
        operands = [data(i, *shape) for i, shape in enumerate(shapes)]
        cases[f"concat_{i}"] = Case("qc.concat", operands, {"axis": axis})
        cases[f"concat_{i}_padded"] = Case("qc.concat", operands, {"axis": axis - 4}, {1: {"halo": HALO}}, {"halo": HALO, "pitch": 100}, (0,))
    for i, (name, shape, attrs, layout) in enumerate(
        [
            ("reshape", (2, 6, 35), {"shape": [2, 5, 6, 7]}, {"halo": HALO, "pitch": 8}),
            ("reshape", (2, 3, 4, 5), {"shape": [6, 20]}, {}),
            ("transpose", (2, 33, 20, 5), {"axes": NHWC}, {"halo": HALO}),
            ("transpose", (2, 9, 10, 37), {"axes": NCHW}, {}),
            ("transpose", (3, 4, 5, 6), {"axes": [3, 1, 0, 2]}, {}),
            ("slice", (2, 9, 10, 40), {"begin": [1, 2, 0, 4], "end": [2, 9, 9, 40], "strides": [1, 3, 2, 1]}, {"pitch": 44}),
            ("slice", (9, 50), {"begin": [0, 5], "end": [9, 50], "strides": [1, 7]}, {}),
            ("pad", (2, 5, 6, 7), {"pads": [[0, 1], [2, 1], [0, 3], [1, 2]], "value": -7}, {"halo": HALO, "pitch": 12}),
            ("pad", (40,), {"pads": [[3, 9]], "value": 100}, {}),
            ("select", (2, 5, 6, 7), {"indices": [[1, 0], [2, 1, *range(5), 3, 2], [], [1, *range(7), 5, 4]]}, {"halo": HALO, "pitch": 12}),
            ("select", (1, 5, 6, 70), {"indices": [[0, 0, 0], [], [5, 4, 3, 2, 1, 0], [*range(69, -1, -1)]]}, {}),
            ("select", (9, 50), {"indices": [[], [49, 49, 49, *range(0, 50, 7), *range(40, 3, -2)]]}, {}),
        ]
    ):
        layouts = {0: {"pitch": shape[-1] + 2, "halo": HALO}} if len(shape) == 4 and name != "reshape" else {}
        cases[f"{name}_{i}"] = Case(f"qc.{name}", [data(6, *shape)], attrs, layouts, layout)
    rng = np.random.default_rng(8)
    attrs = {n: sorted(rng.integers(0, e, o).tolist()) for n, e, o in (("iy0", 5, 9), ("iy1", 5, 9), ("ix0", 6, 11), ("ix1", 6, 11))}
    attrs |= {"wy": [0, 1024, 512, *rng.integers(0, 1025, 6).tolist()], "wx": rng.integers(0, 1025, 11).tolist(), "size": [9, 11]}
    for channels in (3, 40):
        for method in ("nearest", "linear"):
            operands, layouts = [data(9, 2, 5, 6, channels)], {0: {"pitch": channels + channels % 2}}
            cases[f"resize_{method}_{channels}"] = Case("qc.resize2d", operands, attrs | {"method": method}, layouts, {"halo": HALO})
    return cases


def matmul() -> dict[str, Case]:
    cases = {}
    for i, (a, b) in enumerate([((5, 7), (7, 33)), ((2, 3, 9, 20), (2, 3, 20, 16)), ((2, 1, 4, 5), (3, 5, 64)), ((6, 10, 40), (40, 100)), ((1, 40), (40, 1))]):
        attrs = {"a_zero_point": -128, "b_zero_point": 127, "multiplier": float(np.float32(3e-4)), "zero_point": 2, "low": -128, "high": 127}
        operands = [data(1, *a), data(2, *b)]
        cases[f"matmul_{i}"] = Case("qc.matmul", operands, attrs | {"out_dtype": "int8"})
        cases[f"matmul_{i}_float"] = Case("qc.matmul", operands, attrs | {"out_dtype": "float32", "float_low": -1.5}, constants=(1,))
    return cases


def weights(shape: tuple[int, ...], outputs: int, kernel: tuple[int, ...], groups: int) -> list[np.ndarray]:
    """Operands of a convolution or dense layer."""
    rng = np.random.default_rng(11)
    w = rng.integers(-127, 128, (outputs, *kernel, shape[-1] // groups)).astype(np.int8)
    bias = rng.integers(-3000, 3000, outputs).astype(np.int32)
    multiplier = (rng.uniform(0.5, 1.5, outputs) * 0.5 / (74 * np.sqrt(w[0].size))).astype(np.float32)
    return [data(10, *shape), w, bias, multiplier]


# input, outputs, kernel, strides, padding, dilation, groups
CONVS: dict[str, tuple[Any, ...]] = {
    "five_channels": ((1, 6, 7, 5), 9, (3, 3), [1, 1], [1, 1, 1, 1], [1, 1], 1),
    "dilated": ((2, 9, 8, 6), 70, (3, 2), [2, 1], [0, 2, 1, 0], [1, 2], 1),
    "depthwise": ((1, 7, 7, 20), 20, (3, 3), [1, 1], [1, 1, 1, 1], [1, 1], 20),
    "grouped": ((1, 6, 5, 6), 9, (3, 3), [1, 1], [1, 0, 1, 0], [1, 1], 3),
    "grouped_dilated": ((1, 6, 5, 4), 12, (3, 3), [1, 1], [2, 2, 2, 2], [2, 2], 4),
    "one_dimension": ((1, 1, 20, 3), 8, (1, 5), [1, 2], [0, 2, 0, 2], [1, 1], 1),
}


def convolutions() -> dict[str, Case]:
    cases = {}
    for name, (shape, outputs, kernel, strides, padding, dilation, groups) in CONVS.items():
        operands = weights(shape, outputs, kernel, groups)
        geometry = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
        layouts = {0: {"halo": HALO, "pitch": shape[-1] + 1}}
        cases[f"conv_{name}"] = Case("qc.conv2d", operands, geometry | QUANT, constants=(1, 2, 3))
        cases[f"conv_{name}_padded"] = Case("qc.conv2d", operands, geometry | QUANT, layouts, {"halo": HALO, "pitch": outputs + 3}, (1, 2, 3))
        cases[f"conv_{name}_float"] = Case("qc.conv2d", operands, geometry | QUANT | {"out_dtype": "float32"}, constants=(1, 2, 3))
        output = numerics.conv2d(*operands, **geometry, **QUANT)
        residual = {"residual_zero_point": 127, "residual_multiplier": -39_000, "residual_shift": 15}
        with_residual = [*operands[:3], operands[3] * np.float32(2.0**15), data(12, *output.shape)]
        cases[f"conv_{name}_residual"] = Case("qc.conv2d", with_residual, geometry | QUANT | residual, {4: {"pitch": outputs + 1}}, constants=(1, 2, 3))
        x, w, bias = operands[0].astype(np.float32) / 50, operands[1].astype(np.float32) / 90, operands[2].astype(np.float32) / 1000
        floats = [x, w, bias, output.astype(np.float32) / 40]
        cases[f"f32_conv_{name}"] = Case("qc.f32.conv2d", floats, geometry | {"low": 0.0, "high": 6.0}, layouts, constants=(1, 2), tolerance=1e-4)
    for i, (shape, outputs, kernel, strides, padding, output_padding, dilation, groups) in enumerate(
        [
            ((1, 5, 6, 7), 10, (3, 3), [2, 2], [1, 1, 1, 1], [1, 1], [1, 1], 1),
            ((2, 4, 3, 6), 4, (2, 4), [1, 3], [0, 2, 1, 1], [0, 0], [2, 1], 2),
            ((1, 4, 4, 18), 18, (4, 4), [2, 2], [1, 1, 1, 1], [0, 0], [1, 1], 18),
            ((1, 3, 3, 2), 1, (2, 2), [2, 2], [0, 0, 0, 0], [0, 0], [1, 1], 1),
        ]
    ):
        attrs = {"strides": strides, "padding": padding, "output_padding": output_padding, "dilation": dilation, "groups": groups}
        operands = weights(shape, outputs, kernel, groups)
        cases[f"conv_transpose_{i}"] = Case("qc.conv2d_transpose", operands, attrs | QUANT, {0: {"halo": HALO}}, {"pitch": outputs + 2}, (1, 2, 3))
        floats = [operands[0].astype(np.float32) / 50, operands[1].astype(np.float32) / 90, operands[2].astype(np.float32) / 1000]
        bounds = {"low": 0.0, "high": 6.0}
        cases[f"f32_conv_transpose_{i}"] = Case("qc.f32.conv2d_transpose", floats, attrs | bounds, {0: {"halo": HALO}}, constants=(1, 2), tolerance=1e-4)
    for i, (shape, outputs) in enumerate([((1, 100), 1000), ((5, 33), 10), ((2, 3, 16), 65), ((1, 4, 5, 24), 7), ((3, 8), 1), ((16,), 5)]):
        operands = weights(shape, outputs, (), 1)
        residual = {"residual_zero_point": -3, "residual_multiplier": 20_000, "residual_shift": 14}
        cases[f"dense_{i}"] = Case("qc.dense", operands, QUANT, constants=(1, 2, 3))
        cases[f"dense_{i}_float"] = Case("qc.dense", operands, QUANT | {"out_dtype": "float32"}, constants=(1, 2, 3))
        cases[f"dense_{i}_residual"] = Case("qc.dense", [*operands, data(13, *shape[:-1], outputs)], QUANT | residual, constants=(1, 2, 3))
        x, w, bias = operands[0].astype(np.float32) / 50, operands[1].astype(np.float32) / 90, operands[2].astype(np.float32) / 1000
        cases[f"f32_dense_{i}"] = Case("qc.f32.dense", [x, w, bias], {"low": -BIG, "high": BIG}, constants=(1, 2), tolerance=2e-4)
    return cases


CASES = binary() | converting() | pooling() | movement() | matmul() | convolutions()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated({f"k_{name}": case.prepare(TARGET) for name, case in CASES.items()}, TARGET, tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("name", CASES)
def test_exact(name: str, emulated: Emulated) -> None:
    case = CASES[name]
    case.check(emulated.run(f"k_{name}", case.inputs, case.output))


# -- layouts without an operator of numerics.py: copies and halos ----------------------------------------------------------------------------


def test_copy(tmp_path: Path) -> None:
    kernels, expected = {}, {}
    for dtype in ("int8", "float32", "int64", "bool"):
        x = (data(7, 2, 5, 6, 20) > 0) if dtype == "bool" else data(7, 2, 5, 6, 20).astype(dtype)
        source, output = Layout(x.shape, dtype, HALO, 24), Layout(x.shape, dtype, (2, 0, 1, 1))
        for kind, operands in (("computed", [source]), ("constant", [x])):
            op = OpCall("qc.copy", list(operands), {}, output)
            kernels[f"{dtype}_{kind}"] = select(op, TARGET).build(op, {}, TARGET)
            expected[f"{dtype}_{kind}"] = (x, [] if operands[0] is x else [store(x, source)], output)
    emulated = Emulated(kernels, TARGET, tmp_path)
    for name, (x, inputs, output) in expected.items():
        np.testing.assert_array_equal(fetch(emulated.run(name, inputs, output), output), x)


@pytest.mark.parametrize("layout", [Layout((2, 5, 6, 21), "int8", HALO, 24), Layout((1, 3, 4, 5), "float32", (0, 1, 2, 0))])
def test_fill_halo(layout: Layout, tmp_path: Path) -> None:
    """Every stored pixel outside the image holds the value; nothing else is written."""
    op = OpCall("qc.fill_halo", [], {"value": -9}, layout)
    emulated = Emulated({"halo": select(op, TARGET).build(op, {}, TARGET)}, TARGET, tmp_path)
    stored = emulated.run("halo", [], layout).reshape(layout.shape[0], *layout.rows, layout.channel_pitch)
    top, left = layout.halo[:2]
    inside = np.zeros(stored.shape[:3], bool)
    inside[:, top : top + layout.shape[1], left : left + layout.shape[2]] = True
    untouched = np.frombuffer(bytes([0xA5]) * stored.itemsize, stored.dtype)[0]
    assert (stored[inside] == untouched).all()
    assert (stored[~inside] == -9).all()


# -- the emulation itself ---------------------------------------------------------------------------------------------------------------------

RACE = """
extern "C" __global__ void race(void* out) {
  __shared__ int last[64];
  last[threadIdx.x] = 1 + threadIdx.x;
  %s
  ((int*)out)[threadIdx.x] = last[63 - threadIdx.x];
}
"""


@pytest.mark.parametrize("barrier", ["__syncthreads();", ""])
def test_a_missing_barrier_shows(barrier: str, tmp_path: Path) -> None:
    (tmp_path / "race.cc").write_text(f'#include "emulation.h"\n{RACE % barrier}')
    build = ["g++", *FLAGS, f"-I{HEADERS}", str(tmp_path / "race.cc"), "-o", str(tmp_path / "race.so")]
    subprocess.run(build, check=True)
    library = ctypes.CDLL(str(tmp_path / "race.so"))
    out = np.zeros(64, np.int32)
    pointers = (ctypes.c_void_p * 1)(out.ctypes.data)
    library.qc_emulate(library.race, 1, 1, 64, pointers)
    assert (out == np.arange(64, 0, -1)).all() == bool(barrier)
