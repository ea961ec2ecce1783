"""Convolution and dense layers as tiled matrix products, on tensor cores and on dp4a: every tiling gives the bits of numerics.py."""

from __future__ import annotations

import copy
import math
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_emulated import Emulated, compile_emulated
from kernel_cases import HALO, Case, data

from qcompiler import schedules
from qcompiler.backend.codegen_cuda import cuda_source
from qcompiler.base.targets import find_target
from qcompiler.numerics import operators as numerics
from qcompiler.schedules.cuda import gemm_plan as plan
from qcompiler.schedules.cuda.cards import card_of
from qcompiler.schedules.cuda.conv import GemmRow
from qcompiler.schedules.harness import fetch
from qcompiler.schedules.table import KERNELS, Layout, OpCall, select

ARCHITECTURES = {"cuda-wgmma": "cuda-sm90a", "cuda-mma": "cuda-sm80", "cuda-dp4a": "cuda-sm75-dp4a"}
TARGETS = {unit: find_target(ARCHITECTURES[unit.name]) for unit in plan.UNITS}
UNITS = list(TARGETS)
schedules.load(TARGETS[plan.MMA])


def tag(unit: plan.Unit) -> str:
    return unit.name + "-int4" * (unit.bits == 4)


def row_of(unit: plan.Unit, operator: str) -> Any:
    return next(r for r in KERNELS[operator] if getattr(r, "unit", None) == unit)


@dataclass
class Conv:
    """A convolution on random data. `pad`: [t, l, b, r] or one number; `scale` of the multipliers: large ones saturate nearly everything."""

    image: tuple[int, ...]
    outputs: int
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad: Any = 0
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: bool = False
    scale: float = 1.0
    extreme: bool = False
    wide: bool = False  # result and residual in 16 bits
    attrs: Any = None
    out: Any = None
    layout: Any = None

    def case(self, seed: int = 0, bits: int = 8) -> Case:
        """bits: that all weights fit into."""
        rng, most = np.random.default_rng(seed), 1 << (bits - 1)
        shape = (self.outputs, *self.kernel, self.image[-1] // self.groups)
        ends = [-127, 127] if bits == 8 else [-most, most - 1]
        w = rng.choice(np.array(ends, np.int8), shape) if self.extreme else rng.integers(-most, most, shape).astype(np.int8)
        x = rng.choice(np.array([-128, 127], np.int8), self.image) if self.extreme else data(seed, *self.image)
        bias = rng.integers(-9000, 9000, self.outputs).astype(np.int32)
        typical = 70 * (most * 74 / 128) * np.sqrt(w[0].size) * (2.0**-11 if self.residual else 1.0)
        multiplier = (self.scale * rng.uniform(20, 90, self.outputs) / typical).astype(np.float32)
        attrs: dict[str, Any] = {"x_zero_point": -7, "zero_point": 5, "low": -128, "high": 127, "out_dtype": "int8"}
        if self.kernel:
            pad = [self.pad] * 4 if isinstance(self.pad, int) else list(self.pad)
            attrs |= {"strides": list(self.stride), "padding": pad, "dilation": list(self.dilation), "groups": self.groups}
        if self.wide:
            attrs |= {"zero_point": 0, "low": -32768, "high": 32767, "out_dtype": "int16"}
        name, operands = "qc.conv2d" if self.kernel else "qc.dense", [x, w, bias, multiplier]
        if self.residual:
            shape = numerics.OPERATORS[name](*operands, **attrs).shape
            operands.append(rng.integers(-32768, 32768, shape).astype(np.int16) if self.wide else data(seed + 1, *shape))
            attrs |= {"residual_zero_point": 0 if self.wide else -3, "residual_multiplier": 1400, "residual_shift": 11}
        layouts = {0: self.layout or {}} | ({4: self.out or {}} if self.residual else {})
        return Case(name, operands, attrs | (self.attrs or {}), layouts, self.out or {}, (1, 2, 3))


CONVS = {
    "pointwise": Conv((1, 8, 8, 32), 32),
    "pointwise_batch": Conv((3, 5, 7, 16), 48),
    "one_pixel": Conv((1, 1, 1, 64), 100),
    "three_channels": Conv((1, 15, 13, 3), 17, (7, 7), (2, 2), 3),
    "one_channel": Conv((2, 9, 9, 1), 8, (3, 3), pad=1),
    "eight_channels": Conv((1, 7, 5, 7), 24, (3, 3), pad=1),
    "ragged": Conv((2, 9, 11, 21), 70, (3, 3), pad=1),
    "one_output": Conv((1, 6, 5, 24), 1, (3, 3), pad=1),
    "strided": Conv((1, 14, 14, 32), 40, (3, 3), (2, 2), 1),
    "strided_pointwise": Conv((1, 14, 13, 16), 33, stride=(2, 2)),
    "asymmetric": Conv((1, 12, 11, 8), 16, (2, 5), (1, 2), (0, 3, 1, 1)),
    "padded_behind": Conv((1, 6, 6, 16), 16, (3, 3), pad=(0, 0, 2, 2)),
    "dilated": Conv((1, 13, 12, 16), 20, (3, 3), pad=2, dilation=(2, 2)),
    "deep": Conv((1, 3, 3, 256), 40, (3, 3), pad=1),
    "halos": Conv((2, 6, 9, 16), 20, (3, 3), pad=1, layout={"halo": HALO}, out={"halo": (1, 2, 1, 3), "pitch": 36}),
    "pitch": Conv((1, 5, 6, 16), 3, out={"pitch": 16}),
    "residual": Conv((1, 9, 9, 24), 64, residual=True),
    "residual_ragged": Conv((2, 7, 6, 12), 37, (3, 3), pad=1, residual=True, out={"halo": (0, 1, 1, 0), "pitch": 40}),
    "residual_clamped": Conv((1, 7, 7, 16), 16, residual=True, attrs={"low": 5, "high": 90}),
    "residual_overflow": Conv((1, 4, 7, 16), 32, residual=True, scale=1e10),
    "clamped": Conv((1, 7, 9, 16), 48, attrs={"low": -20, "high": 33}),
    "overflow": Conv((1, 4, 7, 16), 32, scale=1e9),
    "extreme": Conv((1, 8, 8, 128), 48, (3, 3), pad=1, extreme=True, attrs={"x_zero_point": -128}),
    "extreme_zero": Conv((1, 6, 8, 64), 17, extreme=True, attrs={"x_zero_point": 127, "zero_point": -128}),
    "float_out": Conv((1, 5, 9, 20), 27, (3, 3), pad=1, attrs={"out_dtype": "float32"}),
    "float_out_clamped": Conv((1, 5, 9, 20), 27, attrs={"out_dtype": "float32", "float_low": -3.0, "float_high": 11.5}),
    "grouped": Conv((1, 9, 8, 64), 96, (3, 3), pad=1, groups=2, residual=True),
    "grouped_narrow": Conv((1, 9, 8, 24), 36, (3, 3), (2, 2), 1, groups=6),
    "grouped_many": Conv((1, 5, 6, 128), 128, (3, 3), pad=1, groups=32),
    "wide": Conv((1, 7, 9, 16), 36, scale=200, wide=True),
    "wide_residual": Conv((1, 7, 6, 12), 37, (3, 3), pad=1, residual=True, scale=200, wide=True),
    "dense": Conv((1, 64), 40, ()),
    "dense_rows": Conv((13, 128), 96, (), residual=True),
    "dense_rank3": Conv((2, 3, 20), 65, ()),
    "dense_float": Conv((6, 300), 33, (), attrs={"out_dtype": "float32"}),
}


def split(tile: plan.Tile, g: plan.Geometry, rng: random.Random) -> plan.Tile:
    """The tiling with its tiles shared by as many blocks as can be chosen at random."""
    return rng.choice([t for t in (replace(tile, split_k=n) for n in plan.SPLITS) if t.refuse_layer(g) is None])


def kernels(unit: plan.Unit) -> dict[str, tuple[Case, Any]]:
    """Each case as the heuristic builds it, at a random tiling, and at a random one whose tiles several blocks share where the reduction is long enough."""
    rng, found = random.Random(tag(unit)), {}
    for name, conv in CONVS.items():
        case = conv.case(bits=unit.bits)
        row = row_of(unit, case.name)
        found[f"{name}_0"] = (case, case.prepare(TARGETS[unit], row=row))
        g = plan.Geometry.of(case.op)
        possible = [t for t in plan.tiles(unit) if t.refuse_layer(g) is None]
        tilings, short = [rng.choice(possible)], [t for t in possible if t.bk < g.depth]
        if short:
            tilings.append(split(rng.choice(short), g, rng))
        for i, tile in enumerate(tilings, 1):
            mine = copy.copy(case)
            found[f"{name}_{i}"] = (mine, mine.prepare(TARGETS[unit], tile.params(), row))
    return found


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = {}
    for unit in UNITS:
        built = kernels(unit)
        result[tag(unit)] = built, Emulated({n: k for n, (_, k) in built.items()}, TARGETS[unit], tmp_path_factory.mktemp(tag(unit)))
    return result


@pytest.mark.parametrize("unit", UNITS, ids=tag)
@pytest.mark.parametrize("name", CONVS)
def test_exact(name: str, unit: plan.Unit, emulated: dict[str, Any]) -> None:
    built, library = emulated[tag(unit)]
    for symbol in (f"{name}_{i}" for i in range(3) if f"{name}_{i}" in built):
        case, kernel = built[symbol]
        assert kernel.row == row_of(unit, case.name).name
        assert kernel.macs == case.expected.size * np.prod(case.operands[1].shape[1:])
        case.check(library.run(symbol, case.inputs, case.output))


def test_exact_by_smaller_products(tmp_path: Path) -> None:
    """Compute capability 7.5 has products of 8 x 8 x 16 alone."""
    target, names = find_target("cuda-sm75"), ("pointwise", "three_channels", "ragged", "deep", "residual_ragged", "extreme", "grouped", "wide", "dense_rows")
    cases = {f"k{bits}_{name}": CONVS[name].case(bits=bits) for bits in (8, 4) for name in names}
    kernels = {name: case.prepare(target) for name, case in cases.items()}
    assert {k.row for k in kernels.values()} == {f"cuda-mma/{operator}{bits}" for operator in ("conv2d", "dense") for bits in ("", "-int4")}
    assert "qc_multiply_8(c" in cuda_source(kernels, target)
    emulated = Emulated(kernels, target, tmp_path)
    for name, case in cases.items():
        case.check(emulated.run(name, case.inputs, case.output))


@pytest.mark.parametrize("unit", UNITS, ids=tag)
def test_blocks_share_tiles(unit: plan.Unit, emulated: dict[str, Any]) -> None:
    """The cases above include many whose tiles are shared, with equal shares and with unequal ones."""
    shared = [(plan.Tile(**k.params), plan.Geometry.of(c.op)) for c, k in emulated[tag(unit)][0].values() if k.counters]
    ragged = [t for t, g in shared if -(-g.depth // t.bk) % t.share(g)]
    assert len(shared) >= 8 and 2 <= len(ragged) < len(shared), [t.split_k for t, _ in shared]
    assert any(g.outputs % t.bn and g.outputs % 4 for t, g in shared) and any(g.pixels % t.bm for t, g in shared), "no ragged channels or pixels among them"
    assert any(g.x.shape[0] > 1 for _, g in shared) and any(g.groups > 1 for _, g in shared), "no batch or groups among them"
    assert any(t.wk > 1 for t, _ in shared) or unit.warps > 1, "no warps that share a tile among them"
    assert any(t.stages > 2 for t, _ in shared), "no deep prologues among them"
    assert any(k.counters and len(c.op.tensors) == 2 for c, k in emulated[tag(unit)][0].values()), "no residual among them"


@pytest.mark.parametrize("unit", UNITS, ids=tag)
def test_channel_order_is_a_permutation_and_swizzling_avoids_conflicts(unit: plan.Unit) -> None:
    for span in (plan.PIECE, plan.SPAN):
        assert sorted(plan.channel_order(span, unit)) == list(range(span))
    for tile in plan.tiles(unit)[::37]:
        chunks = tile.bk // plan.CHUNK
        for chunk in range(chunks):  # 8 rows, one chunk: all 8 groups of 16 bytes that the banks hold
            places = {(row * chunks + (chunk ^ plan.swizzle(row, chunks))) % 8 for row in range(8)}
            assert len(places) == min(8, 8 if chunks > 1 else 1)


@pytest.mark.parametrize("unit", UNITS, ids=tag)
def test_the_choice_fills_the_machine(unit: plan.Unit) -> None:
    """Large layers get large tiles; small ones are cut until most multiprocessors have work."""
    arch = str(TARGETS[unit].tvm["arch"])

    def choice(batch: int, size: int, inputs: int, outputs: int) -> tuple[plan.Tile, int]:
        layouts = Layout((batch, size, size, inputs), "int8"), Layout((batch, size, size, outputs), "int8")
        g = plan.Geometry(*layouts, inputs, outputs, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1))
        tile = plan.best_tile(g, unit, arch)
        return tile, -(-g.pixels // tile.bm) * -(-g.outputs // tile.bn)

    large, blocks = choice(32, 28, 128, 128)
    assert (large.bm * large.bn >= 64 * 64 or unit is plan.DP4A_FOUR) and blocks >= 0.7 * card_of(arch).processors  # half the bytes: dp4a needs no large tiles
    small, blocks = choice(1, 7, 512, 512)
    assert small.wk > 1 or blocks * small.split_k >= card_of(arch).processors // 2
    if unit is plan.MMA:
        assert small.split_k > 1 and blocks * small.split_k >= 2 * card_of(arch).processors
    assert large.split_k == 1


def test_a_tiling_that_cannot_be_is_refused() -> None:
    x = Layout((1, 4, 4, 32), "int8")
    op = OpCall("qc.conv2d", [x, np.full((32, 1, 1, 32), 8, np.int8), np.zeros(32, np.int32), np.ones(32, np.float32)], Conv(x.shape, 32).case().attrs, x)
    row = select(op, TARGETS[plan.MMA])
    base = row.default(op, TARGETS[plan.MMA]) | {"wm": 16, "wn": 32, "bm": 64, "bn": 64, "bk": 64, "wk": 1}
    row.build(op, base, TARGETS[plan.MMA])
    for change, reason in (
        ({"bm": 40}, "whole number"),
        ({"stages": 4, "bm": 256, "bn": 256, "bk": 128}, "registers|memory|threads"),
        ({"wk": 4, "bm": 16, "bn": 32}, "share"),
        ({"split_k": 2}, "1 steps leave some of 2 blocks without work"),
    ):
        with pytest.raises(ValueError, match=reason):
            row.build(op, base | change, TARGETS[plan.MMA])
    case, narrow = CONVS["three_channels"].case(), plan.Tile(16, 32, 256, 16, 32, 1, 2)
    with pytest.raises(ValueError, match="32 threads copy no row of 256 bytes, 4 at a time"):
        case.prepare(TARGETS[plan.MMA], narrow.params())
    x = Layout((32, 112, 112, 64), "int8")
    tile = plan.Tile(64, 64, 32, 32, 32, 1, 2)
    g = plan.Geometry(x, x, 64, 64, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1))
    assert tile.refuse_layer(g) is None and replace(tile, split_k=2).refuse_layer(g) == "2 blocks would leave 196 MB of sums for each other"


def test_what_the_tiled_rows_leave() -> None:
    """Groups of channels that no aligned word holds."""
    x = Layout((1, 4, 4, 6), "int8")
    op = OpCall("qc.conv2d", [x, np.ones((9, 3, 3, 2), np.int8), np.zeros(9, np.int32), np.ones(9, np.float32)], {"groups": 3}, Layout((1, 2, 2, 9), "int8"))
    op.attrs |= {"strides": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1]}
    for unit, target in TARGETS.items():
        assert "multiple of 4" in str(row_of(unit, "qc.conv2d").refuse(op, target))
        assert select(op, target).name == "cuda/conv2d"


def dense(rows: int, inputs: int, outputs: int, weight: int, dtype: str = "int8") -> OpCall:
    operands = [Layout((rows, inputs), dtype), np.full((outputs, inputs), weight, np.int8), np.zeros(outputs, np.int32), np.ones(outputs, np.float32)]
    return OpCall("qc.dense", operands, {"x_zero_point": -128, "zero_point": 0}, Layout((rows, outputs), "int8"))


@pytest.mark.parametrize(
    ("name", "op", "row"),
    [
        ("cuda-sm75-dp4a", dense(1, 4096, 4096, -8), "cuda-dp4a/dense-int4"),
        ("cuda-sm75-dp4a", dense(1, 4096, 4096, -9), "cuda-dp4a/dense"),
        ("cuda-sm75", dense(1, 4096, 4096, -8), "cuda-mma/dense-int4"),
        ("cuda-sm75", dense(1, 4096, 4096, -9), "cuda-mma/dense"),
        ("cuda-sm80", dense(1, 4096, 4096, 7), "cuda-mma/dense-int4"),
        ("cuda-sm80", dense(1, 4096, 4096, 8), "cuda-mma/dense"),
        ("cuda-sm80", dense(8192, 4096, 4096, 7), "cuda-mma/dense-int4"),
        ("cuda-sm90a", dense(1, 4096, 4096, 7), "cuda-mma/dense-int4"),
        ("cuda-sm90a", dense(8192, 4096, 4096, 7), "cuda-wgmma/dense-int4"),  # computes rather than waits: half the memory in as much time
        ("cuda-sm90a", dense(8192, 4096, 4096, 8), "cuda-wgmma/dense"),
        ("cuda-sm80", dense(1, (1 << 17) - 4, 2, 7), "cuda-mma/dense-int4"),
        ("cuda-sm80", dense(1, 1 << 17, 2, 7), "cuda-mma/dense"),  # 16 times its sums leave int32
        ("cuda-sm80", dense(1, 4095, 4096, 7), "cuda/dense"),
        ("cuda-sm80", dense(1, 4096, 4096, 7, "int16"), "cuda/dense"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_that_fit_into_four_bits(name: str, op: OpCall, row: str) -> None:
    """They are kept in as many where that is no slower, and never where a weight or a sum does not fit."""
    target = find_target(name)
    schedules.load(target)
    chosen = select(op, target)
    assert chosen.name == row
    if isinstance(chosen, GemmRow):
        padded = math.prod(-(-n // 256) * 256 for n in np.shape(op.operands[1]))
        assert chosen.build(op, chosen.default(op, target), target).constants[0].nbytes <= padded * chosen.unit.bits // 8


LAUNCH = """
import ctypes, sys
import numpy as np
library, arrays = ctypes.CDLL(sys.argv[1]), list(np.load(sys.argv[2]).values())
pointers = (ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])
library.qc_emulate(library.k, len(arrays), int(sys.argv[3]), int(sys.argv[4]), pointers)
np.save(sys.argv[5], arrays[-1])
"""


@pytest.mark.parametrize(
    ("code", "instead", "message"),
    [
        ("", "", ""),
        ("qc_show_shared();", "", "not shown to the tensor cores"),
        ("qc_begin_products();", "", "products without qc_begin_products"),
        ("qc_finish_products<32>", "(void)", "never waited for"),
        ("qc_wait_products<1>();", "", "another result"),
        (" + 32)])), (&(_ptr", " + 16)])), (&(_ptr", "not aligned to its swizzling"),
    ],
    ids=["right", "not-shown", "not-begun", "not-finished", "overwritten", "misplaced"],
)
def test_what_orders_asynchronous_products(code: str, instead: str, message: str, tmp_path: Path) -> None:
    """The emulation finds each step of the protocol that is left out."""
    case, target = Conv((1, 9, 9, 64), 64, (3, 3), pad=1).case(), TARGETS[plan.WGMMA]
    kernel = case.prepare(target, plan.Tile(64, 64, 64, 16, 64, 1, 3).params())
    source = cuda_source({"k": kernel}, target)
    assert code in source and kernel.launch is not None
    library = compile_emulated(source.replace(code, instead) if code else source, tmp_path / "k.so")
    np.savez(tmp_path / "arrays.npz", *case.inputs, *[c.reshape(-1) for c in kernel.constants], np.zeros(case.output.bytes, np.int8))
    command = [sys.executable, "-c", LAUNCH, library, tmp_path / "arrays.npz", *map(str, kernel.launch), tmp_path / "out.npy"]
    done = subprocess.run(command, capture_output=True, text=True)
    if message in ("", "another result"):
        assert done.returncode == 0, done.stderr
        same = (fetch(np.load(tmp_path / "out.npy"), case.output) == case.expected).all()
        assert same == (not message)
    else:
        assert done.returncode < 0 and message in done.stderr, done.stderr
