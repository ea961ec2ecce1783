"""Convolutions over three axes, as sums of those over two, compute what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_nets import Net, op

import qcompiler
from qcompiler.backend.build import build, session_of
from qcompiler.base.targets import find_target
from qcompiler.importers.model import load
from qcompiler.passes.graph import Graph, match_op, relax_op
from qcompiler.passes.sequence import FLOAT, run
from qcompiler.passes.volumes import volumes
from qcompiler.verification import interpreter
from tests.onnx_nets import OnnxNet, agrees, operators

GATHERED: dict[str, tuple[Any, ...]] = {  # input, weight, attributes
    "padded": ((1, 3, 5, 6, 7), (4, 3, 3, 3, 3), {"padding": [1, 1, 1, 1, 1, 1]}),
    "strided": ((2, 4, 7, 6, 5), (6, 2, 2, 3, 1), {"padding": [2, 0, 1, 0, 1, 0], "strides": [2, 1, 2], "dilation": [2, 1, 1], "groups": 2}),
    "one-tap": ((1, 2, 3, 4, 5), (3, 2, 1, 1, 1), {}),
}
SCATTERED: dict[str, tuple[Any, ...]] = {
    "doubled": ((1, 3, 2, 3, 4), (3, 5, 2, 2, 2), {"strides": [2, 2, 2]}),
    "uneven": ((2, 4, 3, 3, 4), (4, 2, 3, 3, 2), {"padding": [1, 0, 1, 1, 1, 0], "strides": [2, 1, 2], "output_padding": [1, 0, 0], "groups": 2}),
    "gaps": ((1, 2, 3, 2, 2), (2, 3, 1, 2, 2), {"strides": [3, 1, 1], "output_padding": [1, 0, 0]}),
}


def layer(name: str) -> Any:
    shape, weight, attrs = (GATHERED | SCATTERED)[name]
    net = Net(3)
    call = op.nn.conv3d if name in GATHERED else op.nn.conv3d_transpose
    return net.done(net.add("y", call(net.input("x", *shape), net.random(*weight), **attrs))), np.random.default_rng(1).standard_normal(shape).astype(
        np.float32
    )


@pytest.mark.parametrize("name", [*GATHERED, *SCATTERED])
def test_a_sum_over_depths_is_the_convolution(name: str) -> None:
    module, x = layer(name)
    flat = run(FLOAT, module)
    names = [match_op(e)[0] if match_op(e) else str(relax_op(e)) for _, e in Graph.of(flat).bindings]  # type: ignore[index]
    assert any(n.startswith("qc.f32.conv2d") for n in names) and not any("conv3d" in n for n in names)
    wanted = interpreter.run(module, {"x": x})["out0"]
    np.testing.assert_allclose(interpreter.run(flat, {"x": x})["out0"], wanted, rtol=1e-4, atol=1e-4)
    if name in ("padded", "uneven"):
        with session_of(build(flat, find_target("native"), "lower").link()) as session:
            np.testing.assert_allclose(session.run({"x": x})["out0"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_networks_of_volumes_are_networks_of_images(batch: int, tmp_path: Path) -> None:
    """Everything but sigmoid and softmax of one volume is an integer; a batch stays float, and right."""
    net = OnnxNet(17)
    x = net.input("x", batch, 2, 6, 6, 8)
    y = net.op("Relu", net.op("Conv", x, net.weight(8, 2, 3, 3, 3), pads=[1] * 6, strides=[1, 2, 1]))
    z = net.op("Conv", y, net.weight(8, 8, 3, 1, 3), net.weight(8, spread=0.3), pads=[2, 0, 1, 2, 0, 1], dilations=[2, 1, 1])
    y = net.op("Relu", net.op("Add", z, y))
    z = net.op("MaxPool", y, kernel_shape=[3, 3, 2], pads=[1, 1, 0, 1, 1, 0], strides=[2, 1, 2])
    up = net.op("ConvTranspose", z, net.weight(8, 4, 3, 2, 2, spread=0.2), net.weight(4, spread=0.3), strides=[2, 1, 2], pads=[1, 0, 0, 0, 1, 0])
    y = net.op("Concat", y, up, axis=1)
    z = net.op("AveragePool", y, kernel_shape=[2, 2, 1], pads=[1, 0, 0, 0, 1, 0])
    s = net.op("Sigmoid", net.op("Conv", net.op("GlobalAveragePool", z), net.weight(12, 12, 1, 1, 1)))
    y = net.op("Conv", net.op("Mul", z, s), net.weight(6, 6, 1, 3, 3), group=2, strides=[2, 1, 1])
    path = net.save(tmp_path / "net.onnx", [y])
    model = agrees(path)
    assert ("conv3d" in operators(model)) == (batch > 1)
    if batch == 1:
        samples = [{"x": np.random.default_rng(i).standard_normal((1, 2, 6, 6, 8)).astype(np.float32)} for i in range(4)]
        artifact = qcompiler.compile(path, calibration=samples, preset="fast")
        assert {s["op"] for s in artifact.manifest["steps"] if s["macs"]} == {"qc.conv2d", "qc.conv2d_transpose"}
        assert qcompiler.verify(artifact, path, samples).outputs[0].metrics.sqnr_db > 30


def test_pytorch_writes_a_bias_of_zeros_where_there_is_none() -> None:
    """Of shape [channels, 2]: its exporter joins the number of channels and the 2 for `Conv3d(..., bias=False)`."""
    net = OnnxNet(18)
    y = net.op("Conv", net.input("x", 1, 2, 3, 3, 3), net.weight(4, 2, 3, 3, 3), net.const(np.zeros((4, 2))))
    assert operators(load(net.proto([y]))).count("add") == 0


def test_weights_that_are_computed_stay() -> None:
    net = Net()
    module = net.done(net.add("y", op.nn.conv3d(net.input("x", 1, 2, 3, 3, 3), net.input("w", 2, 2, 1, 1, 1))))
    assert volumes(module) is module
