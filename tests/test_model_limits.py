"""Models that are endless or huge: one clear error each, without expanding, computing or allocating what they ask for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qcompiler.base.errors import ModelError
from qcompiler.importers.model import load
from qcompiler.passes.groups import find_groups

F = onnx.TensorProto.FLOAT
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < 60


def saved(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray] | None = None,
    functions: tuple[onnx.FunctionProto, ...] = (),
    shape: tuple[int, ...] = (1, 8),
) -> Path:
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], F, None)]
    tensors = [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", F, shape)], outputs, tensors)
    onnx.save(helper.make_model(graph, functions=list(functions), opset_imports=OPSETS, ir_version=8), path)
    return path


def function(name: str, *calls: str) -> onnx.FunctionProto:
    values = ["a", *(f"t{i}" for i in range(len(calls) - 1)), "b"]
    nodes = [helper.make_node(c, [values[i]], [values[i + 1]], domain="local" if c[0] == "F" else "") for i, c in enumerate(calls)]
    return helper.make_function("local", name, ["a"], ["b"], nodes, OPSETS)


def calling(path: Path, name: str, functions: list[onnx.FunctionProto]) -> Path:
    return saved(path, [helper.make_node(name, ["x"], ["y"], domain="local")], functions=tuple(functions))


def test_nested_functions(tmp_path: Path) -> None:
    few = [function("F0", "Relu", "Neg"), *(function(f"F{i}", f"F{i - 1}", f"F{i - 1}") for i in range(1, 4))]
    assert len(load(calling(tmp_path / "few.onnx", "F3", few)).sources) == 16
    for count in (24, 90):
        many = [few[0], *(function(f"F{i}", f"F{i - 1}", f"F{i - 1}") for i in range(1, count))]
        with pytest.raises(ModelError, match="more than 100000 nodes"):
            load(calling(tmp_path / "m.onnx", f"F{count - 1}", many))
    deep = [few[0], *(function(f"F{i}", f"F{i - 1}") for i in range(1, 1000))]
    with pytest.raises(ModelError, match="more than 100 that call each other"):
        load(calling(tmp_path / "m.onnx", "F999", deep))
    with pytest.raises(ModelError, match="'F1' calls itself"):
        load(calling(tmp_path / "m.onnx", "F1", [function("F1", "Relu", "F2"), function("F2", "F1")]))


def test_a_long_chain_of_scalar_functions(tmp_path: Path) -> None:
    """x + c + c + ...: no recursion, and an expression that reads a value twice, again and again, is no tree of 2^n."""
    chain = [helper.make_node("Add", [f"v{i}" if i else "x", "c"], [f"v{i + 1}"]) for i in range(2000)]
    model = load(saved(tmp_path / "m.onnx", chain, {"c": np.full(1, 0.01, np.float32)}))
    groups = find_groups(model.module)
    assert sum(len(g.members) for g in groups) >= 2000 and max(len(g.members) for g in groups) <= 48
    square = [helper.make_node("Mul", [f"v{i}" if i else "x"] * 2, [f"v{i + 1}"]) for i in range(60)]
    assert find_groups(load(saved(tmp_path / "m.onnx", square)).module)


HUGE = np.array([1_000_000, 1_000_000], np.int64)


@pytest.mark.parametrize(
    ("node", "constants"),
    [
        (helper.make_node("Expand", ["x", "s"], ["y"]), {"s": np.array([10**9, 8])}),
        (helper.make_node("Tile", ["x", "s"], ["y"]), {"s": np.array([10**9, 1])}),
        (helper.make_node("Pad", ["x", "s"], ["y"]), {"s": np.array([0, 0, 0, 10**10])}),
        (helper.make_node("Resize", ["x", "", "", "s"], ["y"]), {"s": np.array([1, 10**10])}),
    ],
    ids=lambda p: p.op_type if isinstance(p, onnx.NodeProto) else "",
)  # fmt: skip
def test_results_of_terabytes(tmp_path: Path, node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> None:
    with pytest.raises(ModelError, match=r"GB \(shape .*\); at most 2.1 GB are supported|out of range|too large"):
        load(saved(tmp_path / "m.onnx", [node], constants))


@pytest.mark.parametrize(
    ("node", "constants"),
    [
        (helper.make_node("ConstantOfShape", ["s"], ["c"]), {"s": HUGE}),
        (helper.make_node("Expand", ["o", "s"], ["c"]), {"o": np.ones(1, np.float32), "s": HUGE}),
        (helper.make_node("Tile", ["o", "s"], ["c"]), {"o": np.ones((1, 1), np.float32), "s": HUGE}),
        (helper.make_node("Range", ["a", "b", "d"], ["c"]), {"a": np.array(0, np.float32), "b": np.array(1e12, np.float32), "d": np.array(1, np.float32)}),
        (helper.make_node("OneHot", ["i", "n", "o"], ["c"]), {"i": np.zeros(10**6, np.int64), "n": np.array(10**6), "o": np.ones(2, np.float32)}),
        (helper.make_node("Mul", ["a", "b"], ["c"]), {"a": np.ones((200_000, 1), np.float32), "b": np.ones((1, 200_000), np.float32)}),
        (helper.make_node("MatMul", ["a", "b"], ["c"]), {"a": np.ones((200_000, 1), np.float32), "b": np.ones((1, 200_000), np.float32)}),
        (helper.make_node("Pad", ["a", "b"], ["c"]), {"a": np.ones(2, np.float32), "b": np.array([10**12, 0])}),
    ],
    ids=lambda p: p.op_type if isinstance(p, onnx.NodeProto) else "",
)  # fmt: skip
def test_constants_of_terabytes(tmp_path: Path, node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> None:
    path = saved(tmp_path / "m.onnx", [node, helper.make_node("ReduceMax", ["c"], ["r"], keepdims=0), helper.make_node("Add", ["x", "r"], ["y"])], constants)
    with pytest.raises(ModelError, match=rf"\({node.op_type}\): its result would take .* GB"):
        load(path)


def test_a_sum_of_gigabytes(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", [helper.make_node("Add", ["x", "s"], ["y"])], {"s": np.zeros((30_000, 1), np.float32)}, shape=(1, 30_000))
    with pytest.raises(ModelError, match=r"\(Add\): its result would take 3.6 GB"):
        load(path)


def test_an_input_of_terabytes(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], shape=(1_000_000, 1_000_000))
    with pytest.raises(ModelError, match="input 'x' would take 4000.0 GB"):
        load(path)


def test_a_loop_without_end(tmp_path: Path) -> None:
    one, other = (helper.make_tensor_value_info(n, onnx.TensorProto.BOOL, []) for n in ("on", "still"))
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []), one, helper.make_tensor_value_info("v", F, [])],
        [other, helper.make_tensor_value_info("w", F, [])],
    )
    loop = helper.make_node("Loop", ["", "true", "zero"], ["l"], body=body)
    constants = {"true": np.array(True), "zero": np.zeros((), np.float32)}
    with pytest.raises(ModelError, match="Loop"):
        load(saved(tmp_path / "m.onnx", [loop, helper.make_node("Add", ["x", "l"], ["y"])], constants))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("Mul", ["x"], ["y"]), r"node 'y' \(Mul\): its operand 1 \(B\) is missing"),
        (helper.make_node("DequantizeLinear", ["", "x"], ["y"]), r"node 'y' \(DequantizeLinear\): its operand 0 \(x\) is missing"),
        (helper.make_node("Relu", ["x"], [""]), r"\(Relu\): has no result"),
    ],
)
def test_nodes_that_lack_something(tmp_path: Path, node: onnx.NodeProto, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(saved(tmp_path / "m.onnx", [node]))


def test_operator_sets_that_can_not_be(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    for version in (-1, 0, 2**40):
        model = onnx.load(path)
        model.opset_import[0].version = version
        onnx.save(model, tmp_path / "bad.onnx")
        with pytest.raises(ModelError, match=f"asks for version {version} of the operator set 'ai.onnx'"):
            load(tmp_path / "bad.onnx")


def test_a_tensor_in_place_of_a_sequence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\(ConcatFromSequence\): operand 0 is of float32, which contradicts the operator's definition"):
        load(saved(tmp_path / "m.onnx", [helper.make_node("ConcatFromSequence", ["x"], ["y"], axis=0)]))


def test_an_axis_far_out(tmp_path: Path) -> None:
    node = helper.make_node("LayerNormalization", ["x", "g"], ["y"], axis=-(2**31))
    with pytest.raises(ModelError, match=r"axis -2147483648 is out of range for a tensor of rank 2"):
        load(saved(tmp_path / "m.onnx", [node], {"g": np.ones(8, np.float32)}))
