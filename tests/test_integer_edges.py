"""Integers that a quantized file takes and hands out: no float arithmetic at its edges, and the file's numbers to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_tflite import BOTH, SOME, together

import qcompiler
from qcompiler.passes.graph import Graph, dtype_of, match_op
from qcompiler.pipeline.compile import compile_stages

SHAPE = (4, 64)


def operators(module: object) -> list[str]:
    return [op[0] if (op := match_op(e)) else "float" for _, e in Graph.of(module).bindings]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_no_float_is_left(tmp_path: Path, dtype: str) -> None:
    net, results = together({name: BOTH[name] for name in SOME[:2]}, dtype)
    compilation = compile_stages(net.save(tmp_path / "net.tflite", list(results)), "x86-avx2")
    assert operators(compilation.integer) == ["qc.enter", "qc.conv2d", "qc.leave", "qc.conv2d", "qc.leave"]
    assert all(dtype_of(v) == dtype for _, v in Graph.of(compilation.integer).outputs)
    (x,) = compilation.artifact.manifest["inputs"]
    assert (np.float32(x["scale"]), x["zero_point"]) == (np.float32(0.05), {"int8": -3, "uint8": 125}[dtype])


@pytest.mark.parametrize("scales", [(0.05, 0.05, 0.05), (0.05, 0.03, 0.07)], ids=["one scale", "three scales"])
@pytest.mark.parametrize("kinds", [("uint8", "uint8"), ("int8", "uint8"), ("uint8", "int8")], ids="/".join)
def test_every_number(tmp_path: Path, kinds: tuple[str, str], scales: tuple[float, float, float]) -> None:
    """All 256 inputs through a reshape, against the file's arithmetic in float32: other scales at the edges are tables."""
    zero = {"uint8": 120, "int8": -8}
    numbers = {"zx": np.array(zero[kinds[0]], kinds[0]), "zi": np.array(-8, np.int8), "to": np.array([16, 16]), "zy": np.array(zero[kinds[1]], kinds[1])}
    numbers |= {name: np.float32(s) for name, s in zip(("sx", "si", "sy"), scales, strict=True)}
    nodes = [
        ("DequantizeLinear", ["x", "sx", "zx"], "real"), ("QuantizeLinear", ["real", "si", "zi"], "q"), ("DequantizeLinear", ["q", "si", "zi"], "qr"),
        ("Reshape", ["qr", "to"], "p"), ("QuantizeLinear", ["p", "si", "zi"], "pq"), ("DequantizeLinear", ["pq", "si", "zi"], "pr"),
        ("QuantizeLinear", ["pr", "sy", "zy"], "y"),
    ]  # fmt: skip
    made = [helper.make_node(op, ins, [out]) for op, ins, out in nodes]
    ends = [helper.make_tensor_value_info(n, getattr(TensorProto, k.upper()), s) for n, k, s in zip("xy", kinds, (SHAPE, (16, 16)), strict=True)]
    graph = helper.make_graph(made, "g", [ends[0]], [ends[1]], [numpy_helper.from_array(np.asarray(a), n) for n, a in numbers.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "m.onnx"))
    compilation = compile_stages(tmp_path / "m.onnx", "x86-avx2")
    used = operators(compilation.integer)
    assert "float" not in used and used.count("qc.lut") == (0 if scales[0] == scales[1] else 2), used
    x = np.arange(256).astype(np.uint8).view(kinds[0]).reshape(SHAPE)
    if kinds[0] == "int8":
        x = np.ascontiguousarray(x)
    (y,) = qcompiler.load(compilation.artifact.save(tmp_path / "m.so")).run({"x": x}).values()
    si, sx, sy = np.float32(scales[1]), np.float32(scales[0]), np.float32(scales[2])
    inner = np.clip(np.rint((x.astype(np.float32) - zero[kinds[0]]) * sx / si) - 8, -128, 127)
    limits = np.iinfo(kinds[1])
    wanted = np.clip(np.rint((inner + 8).astype(np.float32) * si / sy) + zero[kinds[1]], limits.min, limits.max)
    np.testing.assert_array_equal(y.reshape(SHAPE), wanted.astype(kinds[1]))
