"""Operators of ai.onnx.ml around a network, against ONNX Runtime on the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.base.errors import ModelError
from qcompiler.importers.model import load
from qcompiler.importers.origin import origin_of
from qcompiler.pipeline.float_library import compile_float
from qcompiler.runtime.reference import check_import
from qcompiler.runtime.session import Session

FEATURES = 4
KINDS = {"x": TensorProto.FLOAT, "n": TensorProto.INT64}


def ml(op: str, *inputs: str, result: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [result], domain="ai.onnx.ml", **attributes)


def saved(path: Path, nodes: list[onnx.NodeProto], outputs: dict[str, int], inputs: str = "x", **constants: Any) -> Path:
    """x: float32 [3, 4], n: int64 [3, 4], as far as they are among the inputs."""
    ports = [helper.make_tensor_value_info(name, KINDS[name], [3, FEATURES]) for name in inputs]
    results = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", ports, results, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)], ir_version=8), path)
    return path


def test_every_operator(tmp_path: Path) -> None:
    nan, real, whole = float("nan"), TensorProto.FLOAT, TensorProto.INT64
    nodes = [
        ml("Scaler", "x", result="each", offset=[1.0, 100.0, -2.0, 0.5], scale=[2.0, 0.01, 1.0, 3.0]),
        ml("Scaler", "x", result="all", offset=[1.5], scale=[0.25]),
        ml("Scaler", "n", result="whole", offset=[1.0], scale=[0.5]),
        ml("Imputer", "x", result="filled", imputed_value_floats=[1.0, 2.0, 3.0, 4.0], replaced_value_float=nan),
        ml("Imputer", "x", result="replaced", imputed_value_floats=[9.0], replaced_value_float=0.0),
        ml("Binarizer", "filled", result="above", threshold=0.25),
        ml("Normalizer", "replaced", result="first", norm="L1"),
        ml("Normalizer", "n", result="second", norm="L2"),
        ml("ArrayFeatureExtractor", "x", "places", result="columns"),
        helper.make_node("ArgMax", ["replaced"], ["best"], axis=1, keepdims=0),
        ml("ArrayFeatureExtractor", "labels", "best", result="classes"),
        ml("LinearRegressor", "x", result="line", coefficients=[0.5, -1.0, 2.0, 0.25], intercepts=[0.75]),
        ml("LinearRegressor", "replaced", result="lines", coefficients=[0.5, -1.0, 2.0, 0.25, 1.0, 2.0, 3.0, 4.0], targets=2),
        helper.make_node("ReduceMax", ["filled"], ["vector"], axes=[0], keepdims=0),
        ml("LinearRegressor", "vector", result="row", coefficients=[0.5, -1.0, 2.0, 0.25]),
    ]
    floats = "each all whole filled replaced above first second columns line lines row".split()
    outputs = {**dict.fromkeys(floats, real), "classes": whole}
    constants = {"places": np.array([3, 0, 3], np.int64), "labels": np.array([10, 20, 30, 40], np.int64)}
    path = saved(tmp_path / "net.onnx", nodes, outputs, "xn", **constants)
    rng = np.random.default_rng(0)
    x, n = rng.standard_normal((3, FEATURES)).astype(np.float32), rng.integers(-5, 5, (3, FEATURES))
    x[0, 1], x[1, 2], n[1] = np.nan, 0.0, 0
    session = Session(compile_float(path).save(tmp_path / "net.so"))
    checked = check_import(origin_of(path).elsewhere(), session, [{"x": x, "n": n}], 100)
    assert checked.status == "equal" and {o.name for o in checked.outputs} == set(outputs), checked


def test_a_pipeline_in_integers(tmp_path: Path) -> None:
    """A scaler, two layers, the labels of the classes; features of unlike sizes."""
    rng = np.random.default_rng(1)
    sizes = np.array([1.0, 1000.0, 0.01, 30.0], np.float32)
    constants = {"w1": rng.standard_normal((FEATURES, 32)).astype(np.float32), "w2": rng.standard_normal((32, 5)).astype(np.float32)}
    nodes = [
        ml("Scaler", "x", result="s", offset=[2.0, 500.0, 0.0, -30.0], scale=(1 / sizes).tolist()),
        helper.make_node("MatMul", ["s", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
        ml("ArrayFeatureExtractor", "labels", "best", result="label"),
    ]
    outputs = {"scores": TensorProto.FLOAT, "label": TensorProto.INT64}
    path = saved(tmp_path / "net.onnx", nodes, outputs, labels=np.arange(5) * 7, **constants)
    data = [{"x": (rng.standard_normal((3, FEATURES)) * sizes).astype(np.float32)} for _ in range(16)]
    artifact = qcompiler.compile(path, calibration=data, target="x86-avx2")
    assert sum(step["op"] == "qc.dense" for step in artifact.manifest["steps"]) == 2
    assert qcompiler.verify(artifact.save(tmp_path / "net.so"), path, data, min_sqnr=28).passed


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (ml("Scaler", "x", result="y", offset=[0.0, 0.0, 0.0], scale=[1.0]), "its offset holds 3 numbers, for 4 features"),
        (ml("Normalizer", "x", result="y", norm="MAX"), "its norm is MAX; supported: L1 and L2"),
        (ml("LinearRegressor", "x", result="y", coefficients=[1.0] * 3), "it has 3 coefficients and 0 intercepts, for 1 targets of 4 features"),
        (ml("LinearRegressor", "x", result="y", coefficients=[1.0] * 4, post_transform="SOFTMAX"), "its post_transform is SOFTMAX; supported: NONE"),
        (ml("LinearRegressor", "one", result="y", coefficients=[1.0]), "its operand is a number; supported: tensors whose last axis holds features"),
        (ml("ArrayFeatureExtractor", "x", "far", result="y"), "it takes column 4 of 4; columns are counted from 0"),
        (ml("Imputer", "x", result="y", replaced_value_float=0.0), "it has no imputed_value_floats"),
        (ml("Imputer", "n", result="y", imputed_value_int64s=[3], replaced_value_int64=0), "it replaces numbers of int64; supported: floats"),
        (ml("SVMRegressor", "x", result="y"), r"\(SVMRegressor\): no conversion exists for this operator"),
    ],
)
def test_what_is_refused(node: onnx.NodeProto, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        number = helper.make_node("ReduceMax", ["x"], ["one"], keepdims=0)
        load(saved(tmp_path / "net.onnx", [number, node], {"y": TensorProto.FLOAT}, "xn", far=np.array([0, 4])))
