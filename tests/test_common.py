"""Values that a network computes several times are computed once, where nothing is lost by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from small_nets import Net, op, random_inputs, scalar

from qcompiler.passes.common import common
from qcompiler.passes.graph import Graph, relax_op
from qcompiler.verification import interpreter


def counted(module: tvm.IRModule) -> dict[str, int]:
    found = [str(relax_op(expr)).removeprefix("relax.") for _, expr in Graph.of(module).bindings]
    return {name: found.count(name) for name in found}


def masked_layers() -> tvm.IRModule:
    net = Net()
    x, mask = net.input("x", 1, 5, 2, 4), net.input("mask", 1, 1, 1, 5)
    for i in range(3):
        inverse = net.add(f"inverse{i}", op.subtract(scalar(1.0), mask))
        bias = net.add(f"bias{i}", op.multiply(inverse, scalar(-1e4)))
        x = net.add(f"mixed{i}", op.nn.attention(x, x, x, net.add(f"wide{i}", op.broadcast_to(bias, (1, 1, 5, 5)))))
    return net.done(x)


def test_a_mask_is_computed_once() -> None:
    module = masked_layers()
    shared = common(module)
    assert counted(shared) == {"subtract": 1, "multiply": 1, "broadcast_to": 1, "nn.attention_bias": 3}
    inputs = random_inputs(module)
    np.testing.assert_array_equal(interpreter.run(shared, inputs)["out0"], interpreter.run(module, inputs)["out0"])


def pairs(make: Any, read: Any) -> tvm.IRModule:
    net = Net()
    x = net.input("x", 1, 4, 4, 3)
    return net.done(*(net.add(f"r{i}", read(net, net.add(f"y{i}", make(net, x, i)), x, i)) for i in range(2)))


def softened(net: Net, y: Any, x: Any, i: int) -> Any:
    return op.nn.softmax(y, i)


def test_constants_and_attributes_tell_expressions_apart() -> None:
    assert counted(common(pairs(lambda n, x, i: op.clip(x, 0, 1), softened)))["clip"] == 1
    assert counted(common(pairs(lambda n, x, i: op.clip(x, 0, 1 + i), softened)))["clip"] == 2
    assert counted(common(pairs(lambda n, x, i: op.add(x, scalar(1.0)), softened)))["add"] == 1
    assert counted(common(pairs(lambda n, x, i: op.add(x, scalar(1.0 + i)), softened)))["add"] == 2
    assert counted(common(pairs(lambda n, x, i: op.nn.softmax(x, i), softened)))["nn.softmax"] == 4
    assert counted(common(pairs(lambda n, x, i: op.strided_slice(x, [1], [i], [i + 2]), softened)))["strided_slice"] == 2


def test_expressions_of_one_tensor_keep_their_own_parts() -> None:
    module = pairs(lambda n, x, i: op.multiply(x, scalar(0.5)), lambda n, y, x, i: op.tanh(y) if i else op.sigmoid(y))
    assert common(module) is module
    shared = common(pairs(lambda n, x, i: op.multiply(x, scalar(0.5)), lambda n, y, x, i: op.maximum(y, x) if i else op.add(y, x)))
    assert counted(shared)["multiply"] == 1


def test_outputs_stay_apart() -> None:
    net = Net()
    x = net.input("x", 1, 3)
    module = net.done(net.add("a", op.exp(x)), net.add("b", op.exp(x)))
    assert common(module) is module
