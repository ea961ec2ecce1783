"""Convolutions over three axes, as sums of those over two, compute what they did."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_nets import Net, op

from qcompiler.backend.build import build, session_of
from qcompiler.base.targets import find_target
from qcompiler.passes.graph import Graph, match_op, relax_op
from qcompiler.passes.sequence import FLOAT, run
from qcompiler.passes.volumes import volumes
from qcompiler.verification import interpreter

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


def test_weights_that_are_computed_stay() -> None:
    net = Net()
    module = net.done(net.add("y", op.nn.conv3d(net.input("x", 1, 2, 3, 3, 3), net.input("w", 2, 2, 1, 1, 1))))
    assert volumes(module) is module
