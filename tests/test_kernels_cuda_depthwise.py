"""Depthwise convolution with dp4a: every tile of a thread gives the bits of numerics.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from cuda_emulated import TARGET, Emulated
from kernel_cases import HALO, Case
from test_kernels_cuda_gemm import Conv

from qcompiler.schedules.cuda import depthwise
from qcompiler.schedules.cuda.depthwise import DepthwiseRow, Taps, Tile
from qcompiler.schedules.depthwise_plan import Geometry
from qcompiler.schedules.table import Layout, OpCall

CONVS = {
    "three": Conv((1, 9, 8, 20), 20, (3, 3), pad=1, groups=20),
    "strided": Conv((2, 9, 11, 16), 16, (3, 3), (2, 2), 1, groups=16),
    "five": Conv((1, 7, 9, 8), 8, (5, 5), pad=2, groups=8),
    "five_strided": Conv((1, 11, 10, 8), 8, (5, 5), (2, 2), (1, 2, 2, 1), groups=8),
    "seven": Conv((1, 9, 9, 4), 4, (7, 7), pad=3, groups=4),
    "dilated": Conv((1, 9, 9, 8), 8, (3, 3), pad=2, dilation=(2, 2), groups=8),
    "asymmetric": Conv((1, 8, 9, 12), 12, (2, 4), (2, 1), (0, 3, 1, 1), groups=12),
    "eight": Conv((1, 3, 13, 4), 4, (2, 8), pad=1, groups=4),
    "eight_dilated": Conv((1, 3, 20, 8), 8, (1, 8), (1, 2), dilation=(1, 2), groups=8),
    "nine_dilated": Conv((1, 2, 20, 4), 4, (1, 9), dilation=(1, 2), groups=4),
    "one_row": Conv((1, 1, 17, 8), 8, (1, 5), (1, 2), (0, 2, 0, 2), groups=8),
    "ragged": Conv((1, 5, 6, 6), 6, (3, 3), pad=1, groups=6),
    "ragged_padded": Conv((1, 5, 6, 7), 7, (3, 3), pad=1, groups=7, layout={"halo": HALO, "pitch": 8}, out={"halo": HALO, "pitch": 8}),
    "residual": Conv((1, 6, 5, 12), 12, (3, 3), pad=1, groups=12, residual=True),
    "extreme": Conv((1, 6, 6, 8), 8, (3, 3), pad=1, groups=8, extreme=True, attrs={"x_zero_point": -128}),
    "overflow": Conv((1, 4, 7, 16), 16, (3, 3), groups=16, scale=1e9),
    "clamped": Conv((1, 6, 7, 16), 16, (3, 3), pad=1, groups=16, attrs={"low": -20, "high": 33, "x_zero_point": 127}),
    "wide": Conv((1, 6, 7, 16), 16, (3, 3), pad=1, groups=16, scale=200, wide=True),
    "wide_ragged": Conv((1, 6, 5, 7), 7, (3, 3), (1, 2), 1, groups=7, scale=200, wide=True),
    "wide_residual": Conv((1, 5, 6, 10), 10, (3, 3), pad=1, groups=10, residual=True, scale=200, wide=True, out={"pitch": 12}),
    "float_out": Conv((1, 5, 9, 8), 8, (3, 3), pad=1, groups=8, attrs={"out_dtype": "float32"}),
}


def geometry(conv: Conv) -> Geometry:
    case = conv.case()
    case.prepare(TARGET)
    return Geometry.of(OpCall(case.name, [Layout(conv.image, "int8"), *case.operands[1:4]], case.attrs, case.output))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[tuple[str, Case]]], Emulated]:
    kernels: dict[str, Any] = {}
    cases: dict[str, list[tuple[str, Case]]] = {}
    for name, conv in CONVS.items():
        case = conv.case()
        for tile in depthwise.space(geometry(conv)):
            mine, symbol = copy.copy(case), f"{name}_{tile.rows}_{tile.cols}"
            kernels[symbol] = mine.prepare(TARGET, {"rows": tile.rows, "cols": tile.cols})
            cases.setdefault(name, []).append((symbol, mine))
    return cases, Emulated(kernels, TARGET, tmp_path_factory.mktemp("depthwise"))


@pytest.mark.parametrize("name", CONVS)
def test_exact(name: str, emulated: tuple[dict[str, list[tuple[str, Case]]], Emulated]) -> None:
    cases, library = emulated
    for symbol, case in cases[name]:
        assert library.kernels[symbol].row == "cuda-dp4a/depthwise"
        case.check(library.run(symbol, case.inputs, case.output))


def test_taps_of_two_outputs_share_their_pixels() -> None:
    taps = Taps.of(geometry(CONVS["three"]), 2)
    assert (taps.columns, taps.quads) == (4, 1)
    assert taps.uses == ((0, 0, 0), (0, 1, 1)) and taps.patterns == ((0, 1, 2, None), (None, 0, 1, 2))


def test_large_images_get_large_tiles() -> None:
    large = Geometry(32, 96, (112, 112), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    small = Geometry(1, 96, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    best = [min(depthwise.space(g), key=lambda t, g=g: depthwise.cycles(g, t, 108)) for g in (large, small)]
    assert best[0].rows * best[0].cols >= 4 and best[0].cols > 1 and best[1].rows * best[1].cols < best[0].rows * best[0].cols, best


def test_a_tile_that_cannot_be_is_refused() -> None:
    case = CONVS["three"].case()
    with pytest.raises(ValueError, match="outputs of a thread"):
        case.prepare(TARGET, {"rows": 4, "cols": 4})
    x = Layout((1, 4, 4, 8), "int8")
    op = OpCall("qc.conv2d", [x, *case.operands[1:4]], case.attrs | {"groups": 2}, x)
    assert "must be equal" in str(DepthwiseRow().refuse(op, TARGET))
    assert Tile(1, 1) in depthwise.space(geometry(CONVS["three"]))
