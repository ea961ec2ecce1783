"""What a quantized file states beyond what int8 kernels say as it stands: weights of 9 bits, integers that are moved, masks as far as float32 goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from quantized_cases import SHAPE, Graph

import qcompiler
from qcompiler.pipeline.compile import compile_stages

RNG = np.random.default_rng(8)


def checked(g: Graph, outputs: list[str], folder: Path, unequal: float = 0.0) -> Any:
    """Compile without data; all elements but a fraction are what the file computes."""
    ports = [[helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)], [helper.make_empty_tensor_value_info(o) for o in outputs]]
    model = helper.make_model(helper.make_graph(g.nodes, "g", *ports, g.tensors), opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(folder / "m.onnx"))
    artifact = compile_stages(folder / "m.onnx").artifact
    session = qcompiler.load(artifact.save(folder / "m.so"))
    reference = ReferenceEvaluator(model)
    for seed in range(2):
        sample = {"x": np.random.default_rng(seed).uniform(-3, 3, SHAPE).astype(np.float32)}
        got = session.run(sample)
        for name, want in zip(outputs, reference.run(None, sample), strict=True):
            assert np.ptp(want) > 0
            assert (np.abs(got[name] - want) > 1e-5 * np.ptp(want)).mean() <= unequal, name
    return artifact


def test_weights_of_nine_bits(tmp_path: Path) -> None:
    """uint8 whose zero points are anywhere: from the first to the last channel or some in between, and 255 steps away, which takes three parts."""
    g = Graph("g")
    x, outputs = g.pair("x", 0.025, 120), []

    def weight(shape: tuple[int, ...], zeros: Any, axis: int = 0, far: slice = slice(None)) -> str:
        zeros = np.broadcast_to(np.asarray(zeros), shape[axis : axis + 1])
        along = [-1 if i == axis else 1 for i in range(len(shape))]
        q = np.clip(zeros.reshape(along) + RNG.integers(-90, 91, shape), 0, 255)  # near, but for some
        q[:, far] = RNG.integers(0, 256, shape)[:, far]
        names = [g.tensor(q, "uint8"), g.tensor(RNG.uniform(0.001, 0.002, zeros.shape).astype(np.float32)), g.tensor(zeros, "uint8")]
        return g.op("DequantizeLinear", *names, axis=axis)

    outputs.append(g.pair(g.op("Conv", x, weight((6, 8, 3, 3), 60), pads=[1, 1, 1, 1]), 0.04, 128))
    outputs.append(g.pair(g.op("Conv", x, weight((5, 8, 1, 1), [0, 255, 128, 100, 10], far=slice(3, 5))), 0.02, 128))
    outputs.append(g.pair(g.op("ConvTranspose", x, weight((8, 4, 2, 2), [40, 250, 90, 128], axis=1), strides=[2, 2]), 0.03, 120))
    flat = g.op("Flatten", x, axis=1)
    outputs.append(g.pair(g.op("Gemm", flat, weight((5, 192), [0, 255, 128, 90, 180]), transB=1), 0.5, 127))
    outputs.append(g.pair(g.op("MatMul", flat, weight((192, 4), [30, 90, 128, 128], axis=1)), 0.3, 127))
    artifact = checked(g, outputs, tmp_path)
    assert not artifact.manifest["notes"] and not artifact.manifest["float_ops"]
    assert [s["op"] for s in artifact.manifest["steps"]].count("qc.slice") >= 1


def test_integers_are_moved_as_integers(tmp_path: Path) -> None:
    """Between convolutions of integers: padded (with the zero point, 0, another number; by repetition), split and joined, gathered, enlarged."""
    g = Graph("g")
    scales, zeros = [g.tensor(np.float32(s)) for s in (0.025, 0.04)], [g.tensor(z, "uint8") for z in (120, 100)]
    kernel = [g.tensor(RNG.integers(-100, 101, (8, 8, 1, 1)), "int8"), g.tensor(np.float32(0.003)), g.tensor(0, "int8")]
    convolved = g.op("QLinearConv", g.op("QuantizeLinear", "x", scales[0], zeros[0]), scales[0], zeros[0], *kernel, scales[1], zeros[1])
    ends = g.tensor([0, 0, 1, 1, 0, 0, 1, 1], "int64")
    moved = [g.op("Pad", convolved, ends, *value) for value in ([zeros[1]], [], [g.tensor(200, "uint8")])]
    moved.append(g.op("Pad", convolved, ends, mode="edge"))
    moved.append(g.op("Gather", convolved, g.tensor([5, 0, 3], "int64"), axis=1))
    moved.append(g.op("Resize", convolved, "", g.tensor([1.0, 1.0, 2.0, 2.0]), mode="nearest"))
    parts = [g.name(), g.name()]
    g.nodes.append(helper.make_node("Split", [convolved], parts, axis=1, num_outputs=2))
    outputs = [g.op("DequantizeLinear", m, scales[1], zeros[1]) for m in (*moved, *parts)]
    outputs.append(g.op("DequantizeLinear", g.op("QLinearConv", moved[0], scales[1], zeros[1], *kernel, *reversed([zeros[0], scales[0]])), scales[0], zeros[0]))
    artifact = checked(g, outputs, tmp_path)
    assert not artifact.manifest["notes"] and len(artifact.manifest["float_ops"]) <= 1  # the look-up among channels


def test_masks_as_far_as_float32_goes(tmp_path: Path) -> None:
    """Quantizers take the least number of float32 in a mask for a range: its steps are beyond those of int8 kernels, and what the file says is defined."""
    g = Graph("g")
    least = float(np.finfo(np.float32).min)
    x = g.pair("x", 0.025, 120)
    logits = g.op("Where", g.op("Greater", "x", g.tensor(-1.0)), x, g.tensor(least))
    logits = g.pair(logits, np.float32(-least) / 255, 255)
    y = g.op("Mul", g.op("Softmax", logits), x)
    artifact = checked(g, [g.pair(y, 0.0103, 120)], tmp_path, 0.01)
    assert any("is beyond 2^119, the largest of int8 kernels; rounded in float32, as the file says" in n for n in artifact.manifest["notes"])
