"""Taps of convolutions that meet padding alone: left out when an operator is lowered, and nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tvm
from exact import fixed
from hypothesis import given
from hypothesis import strategies as st
from onnx_nets import OnnxNet

import qcompiler
from qcompiler.backend.unread_taps import read_taps
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.numerics.products import convolve
from qcompiler.passes.graph import Graph, match_op, shape_of
from qcompiler.pipeline.compile import compile_stages
from qcompiler.runtime.session import Session
from qcompiler.verification.interpreter import run

small = st.integers(1, 4)


@fixed(300)
@given(st.tuples(small, small), st.tuples(st.integers(1, 5), st.integers(1, 5)), st.tuples(small, small), st.tuples(small, small), st.data())
def test_the_same_results_from_fewer_taps(image, kernel, strides, dilation, data) -> None:  # type: ignore[no-untyped-def]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    before = [data.draw(st.integers(0, r)) for r in reach]
    after = [data.draw(st.integers(max(0, r - n - b), r + 2)) for r, n, b in zip(reach, image, before, strict=True)]
    attrs = {"strides": strides, "dilation": dilation, "padding": [*before, *after], "groups": 1}
    rng = np.random.default_rng(0)
    x, w = rng.integers(-9, 10, (1, *image, 2)), rng.integers(-9, 10, (3, *kernel, 2))
    found = read_taps(x.shape, w.shape, attrs)
    if found is None:
        return
    taps, padding = found
    assert w[taps].size < w.size and min(padding) >= 0
    assert all(new <= old for new, old in zip(padding, attrs["padding"], strict=True))
    rest = strides, padding, dilation, 1
    np.testing.assert_array_equal(convolve(x, w[taps], *rest), convolve(x, w, strides, attrs["padding"], dilation, 1))


def network(path: Path) -> Path:
    """Any multiple of 4 pixels wide and high: behind the strides a 3x3 on an image of one pixel, one of large dilation, one by channels, and a sum."""
    net = OnnxNet()
    x = net.input("x", "n", 3, "h", "w")
    x = net.op("Relu", net.op("Conv", x, net.weight(16, 3, 3, 3), strides=[4, 4], pads=[1, 1, 1, 1]))
    x = net.op("Relu", net.op("Conv", x, net.weight(16, 16, 3, 3), net.const(np.linspace(-1, 1, 16)), pads=[1, 1, 1, 1]))
    y = net.op("Conv", x, net.weight(16, 16, 3, 3), pads=[6, 6, 6, 6], dilations=[6, 6])
    z = net.op("Conv", x, net.weight(16, 1, 5, 5), pads=[2, 2, 2, 2], group=16)
    return net.save(path, [net.op("Flatten", net.op("GlobalAveragePool", net.op("Add", y, z)))])


@pytest.mark.parametrize("size", [4, 8])
def test_corrected_weights_are_packed_in_part(size: int, tmp_path: Path) -> None:
    """The integer network has whole weights, corrected and rounded on the code that has some of them; what ships equals it bit for bit."""
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 3, size, size)).astype(np.float32)} for _ in range(8)]
    stages = compile_stages(network(tmp_path / "net.onnx"), "native", samples, preset="accurate", disable=["mixed"], input_shapes={"x": (1, 3, size, size)})
    integer, session = stages.integer, Session(stages.artifact.save(tmp_path / "net.so"))
    assert sum(step["macs"] for step in session.manifest["steps"]) < sum(conv_macs(integer))
    for sample in samples:
        for name, wanted in run(integer, sample).items():
            np.testing.assert_array_equal(session.run(sample)[name], wanted)


def conv_macs(module: tvm.IRModule) -> list[int]:
    """Of the convolutions with all their taps."""
    found = []
    for _, expr in Graph.of(module).bindings:
        op = match_op(expr)
        if op is not None and op[0] == "qc.conv2d":
            found.append(math.prod(shape_of(expr)) * math.prod(shape_of(op[1][1])[1:]))
    return found


def test_one_library_for_an_image_and_a_pixel(tmp_path: Path) -> None:
    """The shapes share a plan and the module's weights, though one of them reads fewer."""
    runtime = pytest.importorskip("onnxruntime")
    path, rng = network(tmp_path / "net.onnx"), np.random.default_rng(0)
    rows = [{"x": (1, 3, 32, 32)}, {"x": (1, 3, 4, 4)}]
    samples = [{"x": rng.standard_normal(row["x"]).astype(np.float32)} for row in rows for _ in range(8)]
    session = Session(qcompiler.compile(path, calibration=samples, input_shapes=rows, preset="fast").save(tmp_path / "net.so"))
    for sample in (samples[0], samples[-1]):
        (wanted,) = runtime.InferenceSession(str(path)).run(None, sample)
        (found,) = session.run(sample).values()
        assert sqnr_db(found, wanted) > 25
