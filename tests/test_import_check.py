"""The imported float network against ONNX Runtime on the file: what parity alone can't see."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.base.errors import ArtifactError
from qcompiler.importers import operators
from qcompiler.importers.onnx_file import exactness
from qcompiler.pipeline.float_library import compile_float
from qcompiler.runtime.reference import ImportCheck, OnnxRuntime, check_import
from qcompiler.runtime.session import Session


def saved(path: Path, *nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT, dtype: Any = np.float32) -> Path:
    rng = np.random.default_rng(0)
    constants = [numpy_helper.from_array(rng.standard_normal((8, 8)).astype(dtype), "w")]
    ports = [[helper.make_tensor_value_info(n, kind, [1, 8])] for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["m"]), *nodes], "g", *ports, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


RELU = helper.make_node("Relu", ["m"], ["y"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32))
    return tmp_path / "x.npz"


def test_a_right_import(tmp_path: Path, data: Path) -> None:
    model = saved(tmp_path / "m.onnx", RELU)
    artifact = qcompiler.compile(model, calibration=data, preset="fast")
    assert artifact.imported is not None and (artifact.imported.status, artifact.imported.samples) == ("equal", 1)
    report = qcompiler.verify(artifact.save(tmp_path / "m.so"), model, data)
    assert report.passed and report.imported is not None and report.imported.status == "equal" and report.imported.samples == 4
    assert report.to_json()["imported"]["outputs"][0]["equal"] is True
    assert "import: the float network is what onnxruntime" in str(report)


def test_a_wrong_import_fails_verify_and_warns(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that is read as another is wrong in the library and in the float network alike: parity is perfect."""
    model = saved(tmp_path / "m.onnx", helper.make_node("HardSigmoid", ["m"], ["h"]), helper.make_node("Mul", ["h", "m"], ["y"]))
    monkeypatch.setitem(operators.CONVERTERS, "HardSigmoid", operators.CONVERTERS["Relu"] if "Relu" in operators.CONVERTERS else lambda node: [node.inputs[0]])
    artifact = qcompiler.compile(model, calibration=data, preset="fast")
    assert any("is not what onnxruntime" in warning for warning in artifact.manifest["warnings"])
    report = qcompiler.verify(artifact.save(tmp_path / "m.so"), model, data)
    assert not report.passed
    (failure,) = report.failures
    assert "the imported float network is not what onnxruntime" in failure and "'y'" in failure and "at least 60 dB" in failure
    assert report.imported is not None and report.imported.status == "different"


def test_where_onnxruntime_is_missing_or_refuses(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path / "m.onnx", RELU)
    library = qcompiler.compile(model, calibration=data, preset="fast").save(tmp_path / "m.so")
    strange = onnx.load(model)
    strange.ir_version = 99
    onnx.save(strange, tmp_path / "strange.onnx")
    checked = check_import(OnnxRuntime(str(tmp_path / "strange.onnx")), Session(library), [{"x": np.zeros((1, 8), np.float32)}], 60)
    assert checked.status == "not run" and checked.failure is None and "can't run the model: " in str(checked)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = qcompiler.verify(library, model, data)
    assert report.passed and report.imported == ImportCheck("not installed", "onnxruntime")
    assert "onnxruntime is not installed" in str(report)


class Fixed:
    def __init__(self, y: np.ndarray) -> None:
        self.y = y

    def run(self, inputs: Any) -> dict[str, np.ndarray]:
        return {"y": self.y}


def check(tmp_path: Path, ours: np.ndarray, theirs: np.ndarray, least_db: float = 60) -> ImportCheck:
    model = tmp_path / "c.onnx"
    constant = numpy_helper.from_array(theirs, "c")
    node = helper.make_node("Identity", ["c"], ["y"])
    kind = helper.np_dtype_to_tensor_dtype(theirs.dtype)
    ports = [[helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])], [helper.make_tensor_value_info("y", kind, list(theirs.shape))]]
    onnx.save(helper.make_model(helper.make_graph([node], "g", *ports, [constant]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8), model)
    return check_import(OnnxRuntime(str(model)), Fixed(ours), [{"x": np.zeros(1, np.float32)}], least_db)


@pytest.mark.parametrize(
    ("ours", "theirs", "status"),
    [
        ([1.0, 2.0], [1.0, 2.0], "equal"),
        ([1.0005, 2.0], [1.0, 2.0], "equal"),
        ([1.01, 2.0], [1.0, 2.0], "different"),
        ([1e-8, 0.0], [0.0, 0.0], "equal"),
        ([1.0, np.nan], [1.0, np.nan], "equal"),
        ([1.0, 2.0], [1.0, np.nan], "different"),
        ([1.0, np.inf], [1.0, -np.inf], "different"),
        ([1.0, np.finfo(np.float32).min], [1.0, -np.inf], "equal"),
        ([1.0, 0.0], [1.0, np.inf], "different"),
        ([1.0], [1.0, 1.0], "different"),
    ],
)
def test_what_counts_as_equal(tmp_path: Path, ours: list[float], theirs: list[float], status: str) -> None:
    assert check(tmp_path, np.array(ours, np.float32), np.array(theirs, np.float32)).status == status


@pytest.mark.parametrize(
    ("ours", "theirs", "overflow"),
    [
        ([1.0, np.nan, np.inf], [1.0, np.inf, np.inf], True),
        ([np.nan, 2.0], [-np.inf, 2.0], True),
        ([1.0, np.inf], [1.0, 2.0], False),  # here alone
        ([5.0, np.nan], [1.0, np.inf], False),  # finite elements tell of another fault
    ],
)
def test_what_overflows_in_both_is_no_wrong_operator(tmp_path: Path, ours: list[float], theirs: list[float], overflow: bool) -> None:
    checked = check(tmp_path, np.array(ours, np.float32), np.array(theirs, np.float32))
    assert checked.status == "different" and checked.failure is not None and checked.outputs[0].overflow == overflow
    assert ("'y' grow beyond float32, here and in onnxruntime" in checked.failure, "An operator is read wrongly" in checked.failure) == (overflow, not overflow)


def test_integers_may_differ_where_ties_flip(tmp_path: Path) -> None:
    theirs = np.arange(300, dtype=np.int64)
    ours = theirs.copy()
    ours[:3] += 1
    assert check(tmp_path, ours, theirs).status == "equal"
    ours[3] += 1
    assert check(tmp_path, ours, theirs).status == "different"


def test_halves_and_quantized_files_are_less_exact(tmp_path: Path) -> None:
    assert exactness(onnx.load(saved(tmp_path / "m.onnx", RELU))) == 60
    assert exactness(onnx.load(saved(tmp_path / "h.onnx", RELU, kind=TensorProto.FLOAT16, dtype=np.float16))) == 30
    assert exactness(onnx.load(saved(tmp_path / "q.onnx", helper.make_node("QuantizeLinear", ["m", "s"], ["y"])))) == 10
    session = Session(compile_float(tmp_path / "h.onnx").save(tmp_path / "h.so"))
    sample = {"x": np.random.default_rng(0).standard_normal((1, 8)).astype(np.float32)}
    checked = check_import(OnnxRuntime(str(tmp_path / "h.onnx")), session, [sample], 30)
    assert checked.status == "equal" and checked.outputs[0].sqnr_db < 120


def rounding(path: Path) -> Path:
    """A quantized network whose first range cuts off most of its input, and whose HardSigmoid comes behind that."""
    rng = np.random.default_rng(0)
    weights = numpy_helper.from_array(rng.integers(-127, 128, (8, 8)).astype(np.int8), "w")
    constants = [weights, *(numpy_helper.from_array(np.float32(v), n) for n, v in (("s", 0.002), ("sw", 0.01), ("sy", 0.01)))]
    constants.append(numpy_helper.from_array(np.int8(0), "z"))
    steps = [
        ("QuantizeLinear", "x", "s"),
        ("DequantizeLinear", "q", "s"),
        ("DequantizeLinear", "w", "sw"),
        ("QuantizeLinear", "h", "sy"),
        ("DequantizeLinear", "r", "sy"),
    ]
    results = ["q", "d", "wd", "r", "y"]
    nodes = [helper.make_node(op, [x, scale, "z"], [y]) for (op, x, scale), y in zip(steps, results, strict=True)]
    nodes[3:3] = [helper.make_node("MatMul", ["d", "wd"], ["m"]), helper.make_node("HardSigmoid", ["m"], ["h"])]
    ports = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 8])] for n in ("x", "y")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", *ports, constants), opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_roundings_of_a_quantized_file_are_no_wrong_operator(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its float network is far from what it computes; the library isn't, and that of an operator that is read wrongly is."""
    model = rounding(tmp_path / "q.onnx")
    artifact = qcompiler.compile(model, calibration=data)
    assert artifact.imported is not None and (artifact.imported.status, artifact.imported.library) == ("equal", True)
    assert not any("read wrongly" in warning for warning in artifact.manifest["warnings"])
    report = qcompiler.verify(artifact.save(tmp_path / "q.so"), model, data)
    assert report.imported is not None and report.imported.library and "import: the library is what onnxruntime" in str(report)
    assert not report.passed and all("SQNR" in failure for failure in report.failures)  # the float network is another all the same

    bare = qcompiler.compile(model)
    (doubt,) = qcompiler.verify(bare.save(tmp_path / "b.so"), model, data).warnings
    assert "and the model file has the range [-0.258, 0.256]: " in doubt and doubt.endswith("Are these samples preprocessed as the model wants it?")

    monkeypatch.setitem(operators.CONVERTERS, "HardSigmoid", lambda node: [node.inputs[0]])
    wrong = qcompiler.compile(model, calibration=data)
    assert wrong.imported is not None and (wrong.imported.status, wrong.imported.library) == ("different", False)
    assert any("An operator is read wrongly" in warning for warning in wrong.manifest["warnings"])
    assert any("An operator is read wrongly" in failure for failure in qcompiler.verify(wrong.save(tmp_path / "w.so"), model, data).failures)


def test_a_library_of_another_model_is_refused(tmp_path: Path, data: Path, digits: Callable[[str], Path]) -> None:
    """Same inputs, same outputs, other weights: the digest tells."""
    model = saved(tmp_path / "m.onnx", RELU)
    library = qcompiler.compile(model, calibration=data, preset="fast").save(tmp_path / "m.so")
    other = onnx.load(model)
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.eye(8, dtype=np.float32), "w"))
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ArtifactError, match=r"was not compiled from .*other\.onnx: its manifest says that its model has the digest"):
        qcompiler.verify(library, tmp_path / "other.onnx", data)
    qcompiler.verify(library, model, data)
