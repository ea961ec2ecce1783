"""Networks of one recurrent ONNX node, and a dense layer behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
INPUTS = 6


def network(
    op: str,
    *,
    steps: int = 4,
    batch: int = 2,
    hidden: int = 5,
    states: bool = False,
    lengths: bool = False,
    replaced: dict[str, np.ndarray] | None = None,
    layers: int = 3,
    **attrs: Any,
) -> onnx.ModelProto:
    """x [T, B, I] (and h, c, lengths) -> y, a dense layer of all states; with `states` also the last ones, h_out and c_out.

    replaced: operands of the node by name (W, R, B, P, ...) in place of random ones. layers: outputs of the dense layer.
    """
    rng, count = np.random.default_rng(5), 2 if attrs.get("direction") == "bidirectional" else 1
    rows = GATES[op] * hidden
    constants = {
        "W": rng.standard_normal((count, rows, INPUTS)) / 2,
        "R": rng.standard_normal((count, rows, hidden)) / 2,
        "B": rng.standard_normal((count, 2 * rows)) / 3,
        "dense": rng.standard_normal((count * hidden, layers)),
        **(replaced or {}),
    }
    names = ["x", "W", "R", "B", "lengths" if lengths or "lengths" in constants else "", "h" if states else ""]
    names += ["c" if states else "", "P" if "P" in constants else ""] if op == "LSTM" else []
    outputs = ["Y", "h_out", "c_out"][: 3 if op == "LSTM" else 2] if states else ["Y"]
    nodes = [
        helper.make_node(op, names, outputs, name="layer", hidden_size=hidden, **attrs),
        helper.make_node("Transpose", ["Y"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "shape"], ["rows"]),
        helper.make_node("MatMul", ["rows", "dense"], ["y"]),
    ]
    state = {n: [count, batch, hidden] for n in ("h", "c") if n in names}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in {"x": [steps, batch, INPUTS], **state}.items()]
    if lengths:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, [batch]))
    tensors = [numpy_helper.from_array(a.astype(np.float32) if a.dtype.kind == "f" else a, n) for n, a in constants.items()]
    tensors.append(numpy_helper.from_array(np.array([steps, batch, count * hidden]), "shape"))
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ["y", *outputs[1:]]]
    return helper.make_model(helper.make_graph(nodes, op, inputs, results, tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds(model: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    """Inputs that wander slowly, states within [-1, 1], lengths up to the number of steps."""
    rng, found = np.random.default_rng(seed), dict[str, np.ndarray]()
    for info in model.graph.input:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        if info.type.tensor_type.elem_type == TensorProto.INT32:
            found[info.name] = rng.integers(1, found["x"].shape[0] + 1, shape).astype(np.int32)
        else:
            noise = rng.standard_normal(shape)
            found[info.name] = (np.cumsum(noise, 0) / 2 if info.name == "x" else np.tanh(noise)).astype(np.float32)
    return found


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path
