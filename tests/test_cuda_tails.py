"""What a GPU kernel goes on with in registers equals the operators one after the other, bit for bit: by every row that can, and in networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_emulated import Emulated, EmulatedProgram
from kernel_cases import data
from test_kernels_cuda import QUANT, weights
from transformer_nets import LAYERS, bert, sentences

from qcompiler import schedules
from qcompiler.backend.lowering import lower
from qcompiler.base.targets import Target, find_target
from qcompiler.numerics import operators as numerics
from qcompiler.numerics.constants import lut16
from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import Graph, GraphBuilder, const, make_op, match_op
from qcompiler.pipeline.compile import quantize
from qcompiler.schedules.cuda.gemm_plan import Tile
from qcompiler.schedules.harness import fetch, store
from qcompiler.schedules.table import Kernel, Layout, OpCall, Row, select
from qcompiler.verification.interpreter import run as interpret

WIDE = QUANT | {"zero_point": 0, "low": -30000, "high": 32767, "out_dtype": "int16"}
STREAM, BYTES = QParams(2.0**-12, 0, "int16"), QParams(0.05, -3, "int8")
Call = tuple[str, np.ndarray, dict[str, Any]]  # an operator of a tail: name, its constant, attributes


def rescaling(channels: int, source: str, to: str) -> Call:
    """A number for each channel, or one."""
    factors = np.random.default_rng(channels).uniform(1e-3, 3e-2, channels).astype(np.float32) * (20 if source == "int8" else 1)
    zeros = {"x_zero_point": 7 if source == "int8" else 0, "zero_point": 5 if to == "int8" else 0}
    return "qc.requantize", factors, zeros | ({} if to == "int8" else {"out_dtype": to})


def table(to: QParams) -> Call:
    return "qc.lut16", *lut16(np.tanh, STREAM.scale, to)


TAILS: dict[str, Callable[[int], tuple[str, list[Call]]]] = {  # of a layer with so many channels: the type of its own result, and the tail
    "copy": lambda c: ("int16", [rescaling(c, "int16", "int8")]),
    "one number": lambda c: ("int16", [rescaling(1, "int16", "int8")]),
    "table": lambda c: ("int8", [("qc.lut", data(3, 256), {})]),
    "wide table": lambda c: ("int8", [("qc.lut", np.random.default_rng(4).integers(-32768, 32768, 256).astype(np.int16), {})]),
    "function, copy": lambda c: ("int16", [table(STREAM), rescaling(c, "int16", "int8")]),
    "function, widened": lambda c: ("int16", [table(BYTES), rescaling(c, "int8", "int16")]),
}


def convolution(shape: tuple[int, ...], outputs: int, kernel: tuple[int, ...], groups: int = 1, pad: int = 1) -> tuple[str, list[Any], dict[str, Any]]:
    geometry = {"strides": [1, 1], "padding": [pad] * 4, "dilation": [1, 1], "groups": groups} if kernel else {}
    return "qc.conv2d" if kernel else "qc.dense", weights(shape, outputs, kernel, groups), geometry


def normalization(name: str, channels: int) -> tuple[str, list[Any], dict[str, Any]]:
    rng = np.random.default_rng(5)
    x = rng.integers(-32768, 32768, (2, 3, channels)).astype(np.int16)
    gain, shift = rng.uniform(-3000, 3000, channels).astype(np.float32), rng.integers(-200_000, 200_000, channels).astype(np.int32)
    return f"qc.{name}", [x, gain * np.float32(40), shift], {"epsilon": 1e-3, **({} if name == "layer_norm" else {"x_zero_point": 0})}


# What is computed, and a row that takes it on some target.
OPERATORS: dict[str, tuple[str, str, tuple[str, list[Any], dict[str, Any]]]] = {
    "wgmma": ("cuda-sm90a", "cuda-wgmma/conv2d", convolution((1, 9, 8, 32), 40, (3, 3))),
    "mma": ("cuda-sm80", "cuda-mma/conv2d", convolution((1, 6, 5, 16), 48, (3, 3))),
    "mma, ragged": ("cuda-sm80", "cuda-mma/conv2d", convolution((1, 5, 5, 8), 13, (1, 1), pad=0)),
    "mma, groups": ("cuda-sm80", "cuda-mma/conv2d", convolution((1, 5, 5, 80), 72, (1, 1), groups=2, pad=0)),
    "mma, dense": ("cuda-sm80", "cuda-mma/dense", convolution((2, 7, 64), 96, ())),
    "mma, dense, ragged": ("cuda-sm80", "cuda-mma/dense", convolution((7, 64), 37, ())),
    "dp4a": ("cuda-sm75-dp4a", "cuda-dp4a/conv2d", convolution((1, 6, 5, 16), 48, (3, 3))),
    "depthwise": ("cuda-sm80", "cuda-dp4a/depthwise", convolution((1, 6, 7, 22), 22, (3, 3), groups=22)),
    "direct": ("cuda-sm80", "cuda/conv2d", convolution((1, 6, 5, 6), 9, (3, 3), groups=3)),
    "layer norm": ("cuda-sm80", "cuda/layer_norm", normalization("layer_norm", 150)),
    "RMS norm": ("cuda-sm80", "cuda/rms_norm", normalization("rms_norm", 64)),
}


def residual_of(operator: str, output: np.ndarray) -> tuple[list[Any], dict[str, Any]]:
    """A 16-bit stream that some layers add."""
    if operator not in ("mma", "mma, dense"):
        return [], {}
    stream = np.random.default_rng(6).integers(-32768, 32768, output.shape).astype(np.int16)
    return [stream], {"residual_zero_point": 0, "residual_multiplier": 100, "residual_shift": 8}


def with_tail(operator: str, tail: str, inner: bool, on: Target | None = None) -> tuple[OpCall, Row, Target, list[np.ndarray], list[np.ndarray]]:
    """(the call, its row, target, stored inputs, what is written). on: another target, whose best row it gets."""
    name, row, (kind, operands, attrs) = OPERATORS[operator]
    target = on or find_target(name)
    schedules.load(target)
    normal = kind.endswith("norm")
    channels = operands[1].shape[0]
    own, calls = TAILS[tail](channels)
    attrs = attrs | ({"zero_point": 0, "out_dtype": own} if normal else WIDE if own == "int16" else QUANT)
    value = numerics.OPERATORS[kind](*operands, **attrs)
    extra, more = residual_of(operator, value)
    if extra:
        attrs, operands = attrs | more, [*operands[:3], operands[3] * np.float32(2.0**8), *extra]
        value = numerics.OPERATORS[kind](*operands, **attrs)
    values, tailed = [value], list[OpCall]()
    output = Layout(value.shape, str(value.dtype), pitch=24 if operator == "depthwise" else 0)
    for called, constant, given in calls:
        values.append(numerics.OPERATORS[called](values[-1], constant, **given))
        tailed.append(OpCall(called, [tailed[-1].output if tailed else output, constant], given, Layout(value.shape, str(values[-1].dtype))))
    x = operands[0]
    layouts = [Layout(x.shape, str(x.dtype), pitch=16 if operator.startswith("mma, ragged") else 0), *(Layout(e.shape, "int16") for e in extra)]
    if operator == "depthwise":
        layouts[0] = replace(layouts[0], pitch=24)
    stored = [layouts[0], *operands[1 : 3 if normal else 4], *layouts[1:]]
    call = OpCall(kind, stored, attrs, output, "node", tuple(tailed), inner)
    chosen = select(call, target)
    assert on or chosen.name == row
    written = values[-1:] if inner else [values[0], values[-1]]
    return call, chosen, target, [store(a, layout) for a, layout in zip([x, *extra], layouts, strict=True)], written


CASES = [
    (operator, tail, inner)
    for operator in OPERATORS
    for tail, made in TAILS.items()
    for inner in (True, False)
    if operator != "depthwise" or made(1)[0] == "int8"  # that row makes no 16 bits
]


@dataclass
class Ended:
    """A layer and its tail as one case, of which the last value is written."""

    op: OpCall
    inputs: list[np.ndarray]
    output: Layout
    expected: np.ndarray
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        return self.op.name


def ended(target: Target) -> dict[str, tuple[Ended, Kernel]]:
    """For whoever runs all cases of all kernels, with kernels for `target`."""
    found = {}
    for operator, tail in ((o, t) for o, t, inner in CASES if inner):
        call, row, _, inputs, (expected,) = with_tail(operator, tail, True, target)
        found[f"tail/{operator}, {tail}"] = Ended(call, inputs, call.written[0], expected), row.build(call, row.default(call, target), target)
    return found


@pytest.mark.parametrize("target", sorted({name for name, _, _ in OPERATORS.values()}))
def test_rows(target: str, tmp_path: Path) -> None:
    cases = {f"case{i}": with_tail(*case) for i, case in enumerate(CASES) if OPERATORS[case[0]][0] == target}
    kernels = {name: row.build(call, row.default(call, to), to) for name, (call, row, to, _, _) in cases.items()}
    emulated = Emulated(kernels, find_target(target), tmp_path)
    for name, (call, _, _, inputs, wanted) in cases.items():
        found = emulated.run_all(name, inputs, call.written)
        for stored, layout, want in zip(found, call.written, wanted, strict=True):
            assert np.unique(want).size > 3, "a test that shows nothing"
            np.testing.assert_array_equal(fetch(stored, layout), want, str(CASES[int(name[4:])]))


def test_blocks_that_share_a_tile(tmp_path: Path) -> None:
    """The block that arrives last goes on."""
    call, row, target, inputs, wanted = with_tail("mma", "function, copy", inner=False)
    kernel = row.build(call, Tile(32, 32, 32, 16, 32, 1, 3, split_k=3).params(), target)
    assert kernel.counters
    found = Emulated({"k": kernel}, target, tmp_path).run_all("k", inputs, call.written)
    for stored, layout, want in zip(found, call.written, wanted, strict=True):
        np.testing.assert_array_equal(fetch(stored, layout), want)


def chained(uses: str) -> Any:
    """x -> dense (16 bits) -> function -> copy -> dense; `uses`: who else reads what."""
    builder, rng = GraphBuilder(), np.random.default_rng(0)
    x = builder.input("x", (3, 32), "int8")

    def dense(name: str, source: Any, attrs: dict[str, Any]) -> Any:
        _, w, bias, multiplier = weights((3, 32), 32, (), 1)
        return builder.emit(name, make_op("qc.dense", [source, const(w), const(bias), const(multiplier)], attrs, (3, 32), attrs["out_dtype"]))

    def call(name: str, source: Any, made: Call, dtype: str) -> Any:
        return builder.emit(name, make_op(made[0], [source, const(made[1])], made[2], (3, 32), dtype))

    wide = dense("wide", x, WIDE)
    bent = call("bent", wide, table(STREAM), "int16")
    copy = call("copy", bent, rescaling(32, "int16", "int8"), "int8")
    outputs = [("y", dense("last", copy, QUANT))]
    if uses == "wide":
        other = rng.uniform(1e-3, 3e-2, 32).astype(np.float32)
        outputs.append(("z", call("other", wide, ("qc.requantize", other, {"x_zero_point": 0, "zero_point": 1}), "int8")))
    if uses in ("bent", "copy"):
        outputs.append(("z", {"bent": bent, "copy": copy}[uses]))
    return builder.finish(outputs)


@pytest.mark.parametrize(
    ("uses", "written"),
    [("", [["copy"], ["last"]]), ("wide", [["wide", "copy"], ["other"], ["last"]]), ("bent", [["bent"], ["copy"], ["last"]]), ("copy", [["copy"], ["last"]])],
)
def test_what_others_read_is_written(uses: str, written: list[list[str]], tmp_path: Path) -> None:
    module, target = chained(uses), find_target("cuda-sm80")
    program = lower(module, target)
    assert sorted([s.writes, *s.more] for s in program.steps) == sorted(written)
    inputs = {"x": data(1, 3, 32)}
    wanted = interpret(module, inputs, keep="all")
    seen = {step.writes: value for step, value in EmulatedProgram(program, tmp_path).run(inputs)}
    assert set(seen) == {first for first, *_ in written}
    for name, value in seen.items():
        np.testing.assert_array_equal(value, wanted[name], name)
    # constants of what lies inside of a chain are packed again by the id of its operator
    step = program.step_of("wide")
    assert step.writes in ("wide", "copy", "bent") and step.op is not None
    before = program.constants.copy()
    program.replace_operand("wide", 2, np.asarray(step.op.operands[2]) + 1)
    assert (program.constants != before).any()


def test_on_a_cpu_nothing_is_joined() -> None:
    assert [s.writes for s in lower(chained(""), find_target("x86-avx2")).steps] == ["wide", "bent", "copy", "last"]


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, np.ndarray]]:
    samples = sentences(4)
    return quantize(bert(tmp_path_factory.mktemp("bert") / "net.onnx"), "cuda-sm80", samples, preset="fast").integer, samples[0]


@pytest.mark.parametrize("target", ["cuda-sm75", "cuda-sm80", "cuda-sm90a"])
def test_a_transformer(target: str, transformer: tuple[Any, dict[str, np.ndarray]], tmp_path: Path) -> None:
    """No function of a stream and no copy of one is a step of its own, and what is written is the reference's."""
    module, inputs = transformer
    program = lower(module, find_target(target))
    assert not {"qc.lut16", "qc.requantize"} & {step.name for step in program.steps}
    assert sum(bool(step.op and step.op.tail) for step in program.steps) == 3 * LAYERS
    wanted = interpret(module, inputs, keep="all")
    exact = 0
    for step, value in EmulatedProgram(program, tmp_path).run(inputs):
        if step.writes in wanted and value.dtype in (np.int8, np.int16):
            np.testing.assert_array_equal(value, wanted[step.writes], step.writes)
            exact += 1
    assert exact >= 10 * LAYERS


def test_masks_are_those_of_all_layers(transformer: tuple[Any, dict[str, np.ndarray]]) -> None:
    module, _ = transformer
    calls = [call for _, expr in Graph.of(module).bindings if (call := match_op(expr)) and call[0] == "qc.attention"]
    assert len(calls) == LAYERS
    masks = {str(call[1][5 + call[2]["extra"].index("mask")].name) for call in calls}
    assert len(masks) == 1, masks
