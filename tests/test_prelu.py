"""PRelu and LeakyRelu, from the file to the library: imported as ONNX Runtime computes them; in int8 every value is the reference's everywhere. Behind a layer
they are part of it; elsewhere PRelu with a slope per channel is an operator of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cuda_emulated import EmulatedProgram
from emulated import ARM
from onnx_nets import OnnxNet, agrees
from small_nets import Net, op
from traced import on_arm

from qcompiler.backend.build import session_of
from qcompiler.backend.lowering import lower
from qcompiler.base.targets import find_target
from qcompiler.exporters.export_onnx import qdq_model
from qcompiler.importers.onnx_file import read
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes.graph import const
from qcompiler.passes.groups import find_groups
from qcompiler.pipeline.compile import compile_stages
from qcompiler.pipeline.library import Compilation
from qcompiler.refine.equalization import find_streams, shiftable
from qcompiler.verification import interpreter
from qcompiler.verification.bits import bit_parity

SLOPES: dict[str, Callable[[OnnxNet], str]] = {
    "channels": lambda n: n.weight(6, 1, 1),
    "channels of rank 4": lambda n: n.weight(1, 6, 1, 1),
    "one": lambda n: n.const([0.3]),
    "one of rank 3": lambda n: n.const([[[0.3]]]),
    "equal": lambda n: n.const(np.full((6, 1, 1), 0.3)),
    "columns": lambda n: n.weight(7),
    "rows": lambda n: n.weight(5, 1),
    "elements": lambda n: n.weight(6, 5, 7),
    "channels and rows": lambda n: n.weight(6, 5, 1),
}


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("image", [True, False])
def test_import_of_any_slope(slope: str, image: bool, tmp_path: Path) -> None:
    """Held channels last behind a convolution, or as in the file."""
    net = OnnxNet(opset=16)
    x = net.input("x", 2, 6, 5, 7)
    y = net.op("PRelu", net.op("Conv", x, net.weight(6, 6, 1, 1)) if image else x, SLOPES[slope](net))
    model = agrees(net.save(tmp_path / "net.onnx", [net.op("Conv", y, net.weight(4, 6, 3, 3)) if image else y]))
    if image:
        joined = [g for g in find_groups(model.module) if g.slopes is not None]
        assert len(joined) == (slope in ("channels", "channels of rank 4", "one", "one of rank 3", "equal"))


def test_import_of_other_ranks(tmp_path: Path) -> None:
    for shape, slope in [((3, 6), (6,)), ((2, 6, 9), (6, 1)), ((1, 6, 3, 4, 5), (6, 1, 1, 1))]:
        net = OnnxNet(opset=16)
        agrees(net.save(tmp_path / "net.onnx", [net.op("PRelu", net.input("x", *shape), net.weight(*slope))]))


def test_slopes_without_an_int8_form_stay_float_and_say_why() -> None:
    for slopes, axis, reason in [(np.ones(5), 1, "constant slopes per channel"), (np.array([1, 2, np.inf, 4, 5, 6, 7]), 3, "not finite")]:
        net = Net()
        module = net.done(net.add("y", op.nn.prelu(net.input("x", 1, 5, 6, 7), const(slopes.astype(np.float32)), axis)))
        (group,) = find_groups(module)
        assert group.kind == "float" and reason in str(group.reason)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Behind layers of every kind, in front of a sum and behind one; behind a pool, with a clamp and without. Slopes below 0 and above 1 among them."""
    net = OnnxNet()

    def conv(x: str, inputs: int, outputs: int, kernel: int = 3, **attrs: int) -> str:
        weight = net.weight(outputs, inputs, kernel, kernel, spread=(inputs * kernel**2) ** -0.5)
        return str(net.op("Conv", x, weight, net.weight(outputs, spread=0.2), pads=[kernel // 2] * 4, **attrs))

    def prelu(x: str, *shape: int) -> str:
        return str(net.op("PRelu", x, net.const(net.rng.uniform(-0.5, 1.4, shape))))

    x = prelu(conv(net.input("x", 1, 3, 12, 12), 3, 13), 13, 1, 1)
    y = net.op("LeakyRelu", conv(x, 1, 13, group=13), alpha=0.1)
    y = net.op("Add", prelu(conv(y, 13, 13, 1), 1, 13, 1, 1), x)
    y = prelu(net.op("Add", conv(y, 13, 13), y), 13, 1, 1)
    y = net.op("Clip", prelu(net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]), 13, 1, 1), net.const(-0.4), net.const(1.5))
    y = net.op("LeakyRelu", net.op("ConvTranspose", y, net.weight(13, 8, 2, 2), strides=[2, 2]), alpha=-0.2)
    y = prelu(net.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]), 8, 1, 1)
    v = prelu(net.op("Gemm", net.op("Flatten", net.op("GlobalAveragePool", y)), net.weight(8, 20)), 20)
    return net.save(tmp_path_factory.mktemp("prelu") / "net.onnx", [net.op("LeakyRelu", net.op("Gemm", v, net.weight(20, 10)), alpha=0.3)])


@pytest.fixture(scope="module")
def compilation(path: Path) -> Compilation:
    return compile_stages(path, "native", samples(), preset="fast")


def samples(count: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(count)]


def reference(compilation: Compilation) -> dict[str, np.ndarray]:
    return interpreter.run(compilation.integer, samples()[0], keep="all")


def test_all_of_the_network_is_int8_and_exact_here(compilation: Compilation) -> None:
    groups = find_groups(compilation.quantized.model.module)
    assert not {g.id for g in groups} & set(compilation.quantized.plan.reasons)
    joined = [g for g in groups if g.slopes is not None]
    assert [(g.kind, g.residual is None, g.bends_sum) for g in joined] == [
        ("conv2d", True, False), ("conv2d", True, False), ("conv2d", False, False), ("conv2d", False, True), ("conv2d_transpose", True, False),
        ("dense", True, False), ("dense", True, False),
    ]  # fmt: skip
    assert [g.low is None for g in groups if g.kind == "prelu"] == [False, True], "the clamp is part of one"
    with session_of(compilation.artifact) as session:
        assert bit_parity(session, reference(compilation), samples()[0]) == []


@pytest.mark.parametrize("name", ARM)
def test_arm(name: str, compilation: Compilation, tmp_path: Path) -> None:
    _, values = on_arm(compilation, samples()[0], name, tmp_path)
    want, compared = reference(compilation), 0
    for id, value in values.items():
        if id in want and value.dtype == np.int8:
            np.testing.assert_array_equal(value, want[id], err_msg=f"{name}: {id}")
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("name", ["cuda-sm80", "cuda-sm75-dp4a"])
def test_cuda(name: str, compilation: Compilation, tmp_path: Path) -> None:
    program, want, compared = lower(compilation.integer, find_target(name)), reference(compilation), 0
    for step, value in EmulatedProgram(program, tmp_path).run(samples()[0]):
        if not step.auxiliary and step.writes in want and value.dtype == np.int8:
            np.testing.assert_array_equal(value, want[step.writes], step.writes)
            compared += 1
    assert compared >= 10


def test_int8_is_near_to_float(path: Path, compilation: Compilation) -> None:
    runtime = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    with session_of(compilation.artifact) as session:
        pairs = [(runtime.run(None, s)[0], next(iter(session.run(s).values()))) for s in samples()]
    assert sqnr_db(*(np.concatenate(p) for p in zip(*pairs, strict=True))) > 25


def test_export(path: Path, compilation: Compilation) -> None:
    """All of them, as PRelu where they end a layer; ONNX Runtime's result is the library's but for rounding near ties."""
    runtime = pytest.importorskip("onnxruntime")
    export = qdq_model(read(path)[0], compilation)
    assert sum(n.op_type == "PRelu" for n in export.model.graph.node) == 9 and not export.kept_float.keys() - compilation.quantized.plan.reasons.keys()
    theirs = runtime.InferenceSession(export.model.SerializeToString())
    with session_of(compilation.artifact) as session:
        for sample in samples():
            np.testing.assert_allclose(theirs.run(None, sample)[0], next(iter(session.run(sample).values())), atol=0.02)


def test_channels_are_equalized_through_it() -> None:
    """Slopes are the same for a channel in whatever unit; nothing is shifted, as they bend at 0."""
    net = Net()
    x = net.add("nhwc", op.permute_dims(net.input("image", 1, 3, 8, 8), [0, 2, 3, 1]))
    y = net.add("bent", op.nn.prelu(net.conv("a", x, 8), const(np.linspace(-0.5, 0.5, 8, dtype=np.float32)), 3))
    pooled = net.add("pooled", op.nn.max_pool2d(y, (2, 2), (2, 2), layout="NHWC"))
    again = net.add("again", op.nn.prelu(pooled, const(np.linspace(-0.5, 0.5, 8, dtype=np.float32)), 3))
    module = net.done(net.add("end", op.permute_dims(net.conv("b", again, 4, padding=(0, 0, 0, 0)), [0, 3, 1, 2])))
    (stream,) = find_streams(module)
    assert stream.values == ("bent", "pooled", "again") and not shiftable(stream, find_groups(module))
