"""Convolution and dense layers on AMX tiles equal numerics.py bit for bit; where the machine has no tiles, `emulated_tiles.c` has, and checks their use."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal

import numpy as np
import pytest
import tvm
from conv_cases import CASES, Case
from x86_emulation import AMX, build, is_emulated, marks, runs_here, tiles

from qcompiler import schedules
from qcompiler.base.errors import TargetError
from qcompiler.base.targets import find_target, missing_features, permit
from qcompiler.numerics import operators as numerics
from qcompiler.schedules.harness import fetch, module_of, run_kernel, store
from qcompiler.schedules.table import KERNELS, Layout, OpCall, select
from qcompiler.schedules.x86 import amx
from qcompiler.schedules.x86.amx import AmxRow, Chunks

pytestmark = [runs_here, *marks(AMX)]
schedules.load(AMX)
CONV, DENSE = (next(r for r in KERNELS[f"qc.{kind}"] if isinstance(r, AmxRow)) for kind in ("conv2d", "dense"))


def multiplications() -> int:
    return ctypes.c_int.in_dll(tiles(), "qc_emulated_multiplications").value if is_emulated(AMX) else 0


MORE = {
    "several-chunks": Case((1, 9, 20, 72), 40, (3, 3), pad=1, residual=True),
    "merged-taps": Case((1, 12, 17, 6), 33, (3, 5), pad=2),
    "merged-rows-in-chunks": Case((1, 9, 9, 20), 16, (5, 5), pad=2),
    "odd-chunks": Case((1, 4, 9, 67), 24, (1, 1)),
    "wide": Case((1, 2, 50, 16), 64, (3, 3), pad=1),
    "tail-of-three": Case((1, 5, 8, 35), 16, extreme=True),
    "stored-among-chunks": Case((1, 2, 32, 1700), 32),
    "stored-among-columns": Case((1, 4, 28, 330), 32, (3, 3), pad=1),
    "stored-among-rows": Case((1, 9, 16, 64), 40, (5, 5), pad=2),
}
TAKEN = {name: case for name, case in (CASES | MORE).items() if case.groups == 1 and name != "one-pixel"}


@pytest.fixture
def all_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles take reductions too, however short, that pay on vectors."""
    monkeypatch.setattr(amx, "LEAST_STEPS", 1)


@pytest.mark.usefixtures("all_depths")
@pytest.mark.parametrize("name", TAKEN)
def test_conv2d(name: str) -> None:
    before = multiplications()
    TAKEN[name].run(AMX, row=CONV)
    assert multiplications() > before or not is_emulated(AMX)


@pytest.mark.parametrize("seed", range(3))
def test_points_of_the_space_are_exact(seed: int) -> None:
    """Several tasks among them; points whose products don't fit the registers are refused."""
    rng = np.random.default_rng(seed)
    case = [Case((1, 6, 33, 40), 53, (3, 3), pad=1, residual=True), Case((2, 7, 9, 100), 83), Case((1, 9, 12, 24), 64, (3, 3), (2, 1), 1)][seed % 3]
    weight = np.zeros((case.outputs, *case.kernel, case.image[3]), np.int8)
    op = OpCall("qc.conv2d", [Layout(case.image, "uint8"), weight], case.attributes(), Layout(case.shape(weight), "uint8"))
    space, tasks = CONV.space(op, AMX), []
    while len(tasks) < 4:
        point = {k: v[rng.integers(len(v))] for k, v in space.items()}
        try:
            kernel = case.run(AMX, point, seed=len(tasks), row=CONV)
        except ValueError:
            continue
        assert kernel.params == point
        tasks.append(kernel.tasks)
    assert max(tasks) > 1


@pytest.mark.usefixtures("all_depths")
@pytest.mark.parametrize(("m", "k", "n"), [(4, 64, 16), (6, 20, 33), (64, 67, 10), (13, 128, 96), (40, 300, 17)])
def test_dense(m: int, k: int, n: int) -> None:
    rng = np.random.default_rng(m + k)
    x, w = rng.integers(-128, 128, (m, k)).astype(np.int8), rng.integers(-127, 128, (n, k)).astype(np.int8)
    bias, multiplier = rng.integers(-9000, 9000, n).astype(np.int32), (rng.uniform(20, 90, n) / (5200 * np.sqrt(k))).astype(np.float32)
    attrs = {"x_zero_point": 9, "zero_point": -11, "low": -128, "high": 127, "out_dtype": "int8"}
    op = OpCall("qc.dense", [Layout((m, k), "uint8"), w, bias, multiplier], attrs, Layout((m, n), "uint8"))
    assert select(op, AMX) is DENSE
    kernel, host = build(DENSE, op, DENSE.default(op, AMX), AMX)
    got = fetch(run_kernel(kernel, [store(x, op.tensors[0])], op.output, host), op.output)
    np.testing.assert_array_equal(got, numerics.dense(x, w, bias, multiplier, **attrs))


def test_each_weight_meets_its_input_once() -> None:
    """`Chunks`: the bytes that the chunks read, with the weights that they hold, are the window and the kernel, and nothing else."""
    for inputs, kernel, dilation in [(3, (7, 7), 1), (20, (5, 5), 1), (67, (1, 1), 1), (130, (3, 3), 1), (24, (3, 3), 2), (4, (1, 9), 1)]:
        pitch = -(-inputs // 4) * 4
        op = OpCall(
            "qc.conv2d",
            [Layout((1, 20, 20, inputs), "uint8", pitch=pitch), np.zeros((1, *kernel, inputs), np.int8)],
            Case((1, 20, 20, inputs), 1, kernel, dilation=(dilation,) * 2).attributes(),
            Layout((1, 4, 4, 1), "uint8"),
        )
        chunks = Chunks.of(CONV.geometry(op)[0])
        weight = np.arange(1, np.prod(kernel) * inputs + 1).reshape(1, *kernel, inputs)
        cut = chunks.cut(weight, pitch)[0].reshape(chunks.spans, chunks.count, chunks.size)
        places: dict[int, int] = {}
        starts = np.zeros(1, int)
        for extent, step in chunks.loops:
            starts = (starts[:, None] + np.arange(extent) * step).reshape(-1)
        for start, run in zip(starts, cut, strict=True):
            for c, chunk in enumerate(run):
                begin = start + min(c * chunks.size, max(chunks.length - chunks.size, 0))
                assert begin + chunks.size <= start + (kernel[1] if chunks.merged else 1) * pitch, "reads beyond a pixel"
                for i in np.flatnonzero(chunk):
                    assert int(chunk[i]) not in places
                    places[int(chunk[i])] = int(begin + i)
        row, column = 20 * pitch * dilation, pitch * dilation
        want = {int(weight[0, r, s, c]): r * row + s * column + c for r in range(kernel[0]) for s in range(kernel[1]) for c in range(inputs)}
        assert places == want, (inputs, kernel)


# -- what is not arithmetic -----------------------------------------------------------------------------------------------------------------


def op_of(image: tuple[int, int, int, int], outputs: int, kernel: int = 1, groups: int = 1) -> OpCall:
    case = Case(image, outputs, (kernel, kernel), pad=kernel // 2, groups=groups)
    weight = np.ones((outputs, kernel, kernel, image[3] // groups), np.int8)
    tables = [np.ones(outputs, np.int32), np.full(outputs, 1e-3, np.float32)]
    return OpCall("qc.conv2d", [Layout(image, "uint8", (kernel // 2,) * 4), weight, *tables], case.attributes(), Layout((*image[:3], outputs), "uint8"))


@pytest.mark.parametrize(("inputs", "kernel", "between"), [(64, 1, False), (1024, 1, False), (1100, 1, True), (200, 3, True)])
def test_the_code_has_the_instructions(inputs: int, kernel: int, between: bool) -> None:
    """2 x 2 tiles of sums; where there are more than 64 products, LLVM having unrolled them or not, one is stored in their midst."""
    op = op_of((1, 16, 32, inputs), 64, kernel)
    row = select(op, AMX)
    made = row.build(op, row.default(op, AMX) | {"rows": 1, "cols": 32, "blocks": 2}, AMX)
    assembly = tvm.tirx.build(module_of(made, len(made.constants) + 3), target=tvm.target.Target(AMX.tvm)).inspect_source("asm")
    lines = [line.split()[0] for line in assembly.splitlines() if line.startswith("\t")]
    zeros, loads, products, stores = (lines.count(name) for name in ("tilezero", "tileloadd", "tdpbusd", "tilestored"))
    assert (lines.count("ldtilecfg"), lines.count("tilerelease"), zeros) == (1, 1, 4)
    assert loads == products > 0 == products % 4 and (stores > 4) == between and stores >= 4
    assert row.name == "x86-amx/conv2d" and made.row == row.name and "zmm" in assembly


@pytest.mark.parametrize(
    ("op", "row", "reason"),
    [
        (op_of((1, 8, 8, 64), 64), "x86-amx/conv2d", None),
        (op_of((1, 8, 3, 64), 64, 3), "x86-avx512vnni/conv2d", "3 output pixels lie in a row; tiles pay from 4 on"),
        (op_of((1, 8, 8, 24), 64), "x86-avx512vnni/conv2d", "an output sums 24 products; tiles pay from 28 on"),
        (op_of((1, 8, 8, 64), 64, 3, 2), "x86-avx512vnni/conv2d", "the convolution has 2 groups"),
        (op_of((1, 8, 8, 64), 64, 3, 64), "x86-avx512vnni/depthwise", "the convolution has 64 groups"),
    ],
    ids=["taken", "narrow", "shallow", "grouped", "depthwise"],
)
def test_other_operators_fall_to_vectors(op: OpCall, row: str, reason: str | None) -> None:
    assert select(op, AMX).name == row
    assert (CONV.refuse(op, AMX) or "").startswith(reason or "") and (CONV.refuse(op, AMX) is None) == (reason is None)


def test_impossible_points_are_refused() -> None:
    op = op_of((1, 8, 40, 64), 64, 3)
    for change, message in [({"rows": 1, "cols": 17}, "17 pixels are not 2 equal tiles"), ({"rows": 3, "cols": 8, "blocks": 2}, "don't fit 8 tile registers")]:
        with pytest.raises(ValueError, match=message):
            CONV.build(op, CONV.default(op, AMX) | change, AMX)
    op.operands[0] = Layout((1, 8, 40, 5), "uint8")
    op.operands[1] = np.ones((64, 1, 1, 5), np.int8)
    with pytest.raises(ValueError, match="a pitch of 5 channels; supported: multiples of 4"):
        CONV.build(op, CONV.default(op, AMX), AMX)


def test_constants_hold_the_weights_once() -> None:
    op = op_of((1, 8, 8, 64), 96, 3)
    assert CONV.build(op, CONV.default(op, AMX), AMX).constants[0].nbytes == 9 * 64 * 96


def test_code_is_shared_between_layers_that_differ_in_constants() -> None:
    first, second = op_of((1, 8, 8, 64), 64), op_of((1, 8, 8, 64), 64)
    second.operands[1] = -second.operands[1]
    second.attrs = second.attrs | {"zero_point": -40, "x_zero_point": 3}
    kernels = [CONV.build(op, CONV.default(op, AMX), AMX) for op in (first, second)]
    assert kernels[0].key == kernels[1].key
    tvm.ir.assert_structural_equal(kernels[0].func, kernels[1].func, map_free_vars=True)


def test_the_emulation_faults_where_the_hardware_would(capfd: pytest.CaptureFixture[str]) -> None:
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        tiles().qc_emulated_tdpbusd(0, 1, 2)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGABRT
    assert "a tile that is not configured" in capfd.readouterr().err


def test_permission_for_tiles_is_asked_for() -> None:
    permit(find_target("x86-avx2"))
    if missing_features(AMX):
        with pytest.raises(TargetError, match="Linux refuses AMX tiles to this process .*kernels of 'x86-amx' can't run here"):
            permit(AMX)
    else:
        permit(AMX)
