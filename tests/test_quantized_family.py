"""Every way to state a quantization times what is done with it, against ONNX Runtime: integers are equal, reals at most one step apart."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from quantized_cases import BITS, SHAPE, Case, cases, model

import qcompiler
from qcompiler.pipeline.compile import compile_stages

onnxruntime = pytest.importorskip("onnxruntime")
STEP = {"conv": 0.1, "moved_weights": 0.1, "gemm": 0.1, "matmul": 0.05}  # of a result that is rounded once more
TAKEN = {13: 1, 19: 3, 21: 2, 23: 5}  # operator set -> one case in so many, drawn


def expected(case: Case, opset: int, x: np.ndarray) -> np.ndarray:
    """By ONNX Runtime, or by ONNX's reference implementation for types that it doesn't know."""
    alone = model([case], opset)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    with contextlib.suppress(Exception):  # it raises classes of its own
        session = onnxruntime.InferenceSession(alone.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"x": x})[0])
    return np.asarray(ReferenceEvaluator(alone).run(None, {"x": x})[0])


def steps(case: Case) -> float:
    """How far a result may be off: a step of the last rounding."""
    if case.form in STEP:
        return STEP[case.form]
    scales = next(t for t in case.graph.tensors if t.data_type == onnx.TensorProto.FLOAT)
    return float(np.max(onnx.numpy_helper.to_array(scales))) if case.form == "relu" and case.stated.dtype in ("int8", "uint8", "int4", "uint4") else 1e-5


@pytest.mark.parametrize("opset", TAKEN)
def test_family(opset: int, tmp_path: Path) -> None:
    every = list(cases(opset))
    chosen = [every[i] for i in sorted(np.random.default_rng(opset).permutation(len(every))[: len(every) // TAKEN[opset]])]
    assert {c.form for c in chosen} == {c.form for c in every}
    assert {c.stated.dtype for c in chosen} == {c.stated.dtype for c in every} == (set(BITS) if opset >= 21 else {"int8", "uint8"})
    onnx.save(model(chosen, opset), str(tmp_path / "cases.onnx"))
    compilation = compile_stages(tmp_path / "cases.onnx")
    session = qcompiler.load(compilation.artifact.save(tmp_path / "cases.so"))
    int8 = {group for group in compilation.quantized.plan.scales if group not in compilation.quantized.plan.reasons}
    assert len(int8) >= sum(c.form in STEP for c in chosen) - 2, "products on integers are computed on integers"
    wrong = []
    for seed in range(2):
        x = np.random.default_rng(seed).uniform(-3.5, 3.5, SHAPE).astype(np.float32)
        got = session.run({"x": x})
        for case in chosen:
            want, have = expected(case, opset, x), got[case.output]
            off = np.abs(have.astype(np.float64) - want.astype(np.float64)).max() if have.shape == want.shape else np.inf
            integers = case.form == "integers"
            if not off <= (0 if integers else 1.01 * steps(case)) or (have.dtype.kind in "iu") != integers:
                wrong.append(f"{case}: {off:g}")
    assert not wrong, wrong


def test_integers_have_the_types_of_the_file(tmp_path: Path) -> None:
    chosen = [c for c in cases(21) if c.form == "integers" and c.stated.grain == "tensor" and not c.stated.runtime]
    onnx.save(model(chosen, 21), str(tmp_path / "cases.onnx"))
    samples = [{"x": np.random.default_rng(0).uniform(-3.5, 3.5, SHAPE).astype(np.float32)}]
    session = qcompiler.load(compile_stages(tmp_path / "cases.onnx", calibration=samples).artifact.save(tmp_path / "cases.so"))
    held = {c.stated.dtype: str(o.dtype) for c, o in zip(chosen, session.outputs, strict=True)}
    assert held == {"int8": "int8", "uint8": "uint8", "int16": "int16", "uint16": "uint16", "int4": "int8", "uint4": "uint8"}
