"""TFLite networks: what they compute in LiteRT, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tflite_cases import BOTH, FLOAT, IMAGE, Case, ints, rng, weights
from tflite_nets import TfliteNet, schema
from tools import require_module

import qcompiler
from qcompiler.base.errors import ModelError
from qcompiler.cli.main import main
from qcompiler.importers.model import load
from qcompiler.importers.origin import origin_of
from qcompiler.pipeline.float_library import compile_float
from qcompiler.runtime.reference import check_import
from qcompiler.runtime.session import Session

QUANTIZATIONS = {"int8": (0.05, -3), "uint8": (0.05, 125), "int16": (0.0002, 0)}
SOME = "conv same, depthwise, transposed same, dense flattened, average pool, add, mul, leaky, mean, pieces, padded".split(", ")
"""What stands for all operators of the types beside int8."""


def together(cases: Mapping[str, Case], dtype: str = "float32") -> tuple[TfliteNet, dict[int, str]]:
    """One network of all cases, and the case of every result."""
    quantization = QUANTIZATIONS.get(dtype)
    net, results = TfliteNet(quantization, dtype), dict[int, str]()
    x = net.input(IMAGE, dtype, quantization, name="x")
    for name, case in cases.items():
        made = case(net, x)
        results |= dict.fromkeys(made if isinstance(made, list) else [made], name)
    return net, results


def inputs(dtype: str) -> dict[str, np.ndarray]:
    if dtype == "float32":
        return {"x": rng(0).standard_normal(IMAGE).astype(np.float32)}
    limits = np.iinfo(dtype)
    return {"x": rng(0).integers(limits.min, limits.max + 1, IMAGE).astype(dtype)}


def litert(path: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    require_module("ai_edge_litert", "ai-edge-litert")
    return origin_of(path).elsewhere().open()[1](feeds)


@pytest.mark.parametrize("cases", [BOTH, FLOAT], ids=["both", "float"])
def test_float_operators(tmp_path: Path, cases: dict[str, Case]) -> None:
    """All of them in one network, against LiteRT."""
    net, results = together(cases)
    path = net.save(tmp_path / "net.tflite", list(results))
    session = Session(compile_float(path).save(tmp_path / "net.so"))
    checked = check_import(origin_of(path).elsewhere(), session, [inputs("float32")], 100)
    wrong = {o.name: (results[int(o.name[1:])], o.sqnr_db, o.max_error) for o in checked.outputs if not o.equal}
    assert checked.status == "equal" and not wrong, (checked, wrong)
    assert {results[int(o.name[1:])] for o in checked.outputs} == set(cases)


@pytest.mark.parametrize(("same", "stride", "kernel", "size"), [(1, (2, 2), 2, (12, 12)), (1, (2, 1), 3, (12, 6)), (2, (1, 2), 3, (8, 13))])
def test_the_transposed_convolution_of_mediapipe(same: int, stride: tuple[int, int], kernel: int, size: tuple[int, int], tmp_path: Path) -> None:
    """Its struct has the stride along the width first. Against LiteRT's delegate, the only one that has it."""
    net = TfliteNet()
    x, filters = net.input(IMAGE, name="x"), net.const(rng(1).standard_normal((5, kernel, kernel, 4)).astype(np.float32))
    shift = net.const(rng(2).standard_normal(5).astype(np.float32))
    stored = np.array([same, *stride[::-1]], "<i4").tobytes()
    path = net.save(tmp_path / "net.tflite", [net.op("CUSTOM", [x, filters, shift], (1, *size, 5), custom="Convolution2DTransposeBias", stored=stored)])
    session = Session(compile_float(path).save(tmp_path / "net.so"))
    checked = check_import(origin_of(path).elsewhere(), session, [inputs("float32")], 100)
    assert checked.status == "equal" and [o.equal for o in checked.outputs] == [True], checked


@pytest.mark.parametrize(
    ("stored", "message"),
    [(b"", "its options are 0 bytes"), (np.array([1, 2], "<i4").tobytes(), "8 bytes"), (np.array([0, 2, 2], "<i4").tobytes(), "its padding is number 0")],
)
def test_options_of_a_custom_operator_are_checked(stored: bytes, message: str, tmp_path: Path) -> None:
    net = TfliteNet()
    operands = [net.input(IMAGE, name="x"), net.const(np.ones((5, 2, 2, 4), np.float32)), net.const(np.ones(5, np.float32))]
    assert message in refused(tmp_path, net, net.op("CUSTOM", operands, (1, 12, 12, 5), custom="Convolution2DTransposeBias", stored=stored))


@pytest.mark.parametrize("dtype", list(QUANTIZATIONS))
def test_quantized_operators(tmp_path: Path, dtype: str) -> None:
    """No result differs from LiteRT's reference kernels by more than one step, and no calibration data is needed."""
    cases = BOTH if dtype == "int8" else {name: BOTH[name] for name in SOME}
    net, results = together(cases, dtype)
    path, feeds = net.save(tmp_path / "net.tflite", list(results)), inputs(dtype)
    wanted = litert(path, feeds)
    got = Session(qcompiler.compile(path, target="x86-avx2").save(tmp_path / "net.so")).run(feeds)
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        apart = np.abs(got[name].astype(np.int64) - array)
        assert apart.max() <= 1, (results[int(name[1:])], apart.max(), float((apart > 0).mean()))
        assert len(np.unique(array)) > 1


# -- what a file states ---------------------------------------------------------------------------------------------------------------------------


def small(dtype: str = "int8") -> tuple[TfliteNet, int]:
    """conv -> add of its own input's channels, quantized with a scale of its own each."""
    net = TfliteNet(None if dtype == "float32" else (0.05, -3))
    x = net.input(IMAGE, dtype, net.quantized, name="x")
    return net, BOTH["conv same"](net, x)  # type: ignore[return-value]


def test_scales_and_names_are_the_files(tmp_path: Path) -> None:
    net, y = small()
    net.tensors[y].name, net.tensors[1].name = "serving/conv:0", "conv/kernel"
    artifact = qcompiler.compile(net.save(tmp_path / "net.tflite", [net.op("RELU", [y], (1, 3, 3, 16), version=2)]), target="x86-avx2")
    values = artifact.manifest["values"]
    assert (np.float32(values["serving/conv:0"]["scale"]), values["serving/conv:0"]["zero_point"]) == (np.float32(0.05), -3)
    model, _ = origin_of(tmp_path / "net.tflite").read()
    stored = {t.name: t for t in model.graph.initializer}
    _, scales = weights(TfliteNet((0.05, -3)), 16, 3, 3, 4)
    assert np.array_equal(np.frombuffer(stored["conv/kernel/scale"].raw_data, np.float32), scales)


def test_a_batch_that_is_left_open(tmp_path: Path) -> None:
    net = TfliteNet()
    x = net.input(IMAGE, name="x")
    net.tensors[x].shapeSignature = np.array([-1, 6, -1, 4], np.int32)
    path = net.save(tmp_path / "net.tflite", [net.op("RELU", [x], IMAGE)])
    with pytest.raises(ModelError, match=r"dimension 2 of input 'x' \[\?, 6, \?, 4\] is symbolic. Give it with --input-shape"):
        load(path)
    model = load(path, {"x": (2, 6, 5, 4)})
    assert [o.shape for o in model.outputs] == [(2, 6, 5, 4)]
    feeds = {"x": rng(0).standard_normal((2, 6, 5, 4)).astype(np.float32)}
    session = Session(compile_float(path, input_shapes={"x": (2, 6, 5, 4)}).save(tmp_path / "net.so"))
    assert check_import(origin_of(path).elsewhere(), session, [feeds], 100).status == "equal"


def test_weights_in_halves_and_sparse(tmp_path: Path) -> None:
    """float16 weights behind DEQUANTIZE; and a matrix of which only what is not zero is stored, by rows."""
    net = TfliteNet()
    x = net.input((1, 6), name="x")
    dense = rng(0).standard_normal((5, 6)).astype(np.float32) * (rng(1).random((5, 6)) < 0.4)
    halves = net.op("DEQUANTIZE", [net.const(dense.astype(np.float16))], (5, 6), kind="DequantizeOptions", version=3)
    first = net.op("FULLY_CONNECTED", [x, halves], (1, 5), kind="FullyConnectedOptions", version=4)
    stored = net.const(dense[dense != 0])
    net.tensors[stored].shape, sparsity = np.array([5, 6], np.int32), schema.SparsityParametersT()
    rows, columns = schema.DimensionMetadataT(), schema.DimensionMetadataT()
    rows.format, rows.denseSize, columns.format = schema.DimensionType.DENSE, 5, schema.DimensionType.SPARSE_CSR
    counts = np.concatenate([[0], np.cumsum((dense != 0).sum(axis=1))])
    for field, numbers in (("arraySegments", counts), ("arrayIndices", np.nonzero(dense)[1])):
        vector = schema.Uint8VectorT()
        vector.values = numbers.astype(np.uint8)
        setattr(columns, field, vector)
        setattr(columns, f"{field}Type", schema.SparseIndexVector.Uint8Vector)
    sparsity.traversalOrder, sparsity.dimMetadata = [0, 1], [rows, columns]
    net.tensors[stored].sparsity = sparsity
    whole = net.op("DENSIFY", [stored], (5, 6), kind="DensifyOptions")
    path = net.save(tmp_path / "net.tflite", [first, net.op("FULLY_CONNECTED", [x, whole], (1, 5), kind="FullyConnectedOptions")])
    feeds = {"x": rng(2).standard_normal((1, 6)).astype(np.float32)}
    session = Session(compile_float(path).save(tmp_path / "net.so"))
    checked = check_import(origin_of(path).elsewhere(), session, [feeds], 100)
    assert checked.status == "equal", checked


def test_int8_weights_beside_float_activations(tmp_path: Path) -> None:
    """What is called dynamic range: back to the float network, weights kept, activations calibrated, and said so."""
    net = TfliteNet()
    x = net.input(IMAGE, name="x")
    scales = rng(0).uniform(0.002, 0.01, 16).astype(np.float32)
    w = net.const(rng(0).integers(-127, 128, (16, 3, 3, 4)).astype(np.int8), (scales, 0))
    b = net.const(rng(1).standard_normal(16).astype(np.float32))
    y = net.op("CONV_2D", [x, w, b], (1, 6, 6, 16), kind="Conv2DOptions", version=5, fusedActivationFunction=1, strideH=1, strideW=1)
    flat = net.const(rng(2).integers(-127, 128, (5, 576)).astype(np.int8), (0.003, 0))
    path = net.save(tmp_path / "net.tflite", [net.op("FULLY_CONNECTED", [y, flat], (1, 5), kind="FullyConnectedOptions", version=3)])
    samples = [{"x": rng(n).standard_normal(IMAGE).astype(np.float32)} for n in range(8)]
    artifact = qcompiler.compile(path, target="x86-avx2", calibration=samples)
    assert artifact.imported is not None and artifact.imported.status == "equal" and min(o.sqnr_db for o in artifact.imported.outputs) > 25
    assert any("the range of its activations, looked up in every run, is calibrated" in n for n in artifact.manifest["notes"])
    assert {f["op"] for f in artifact.manifest["float_ops"]} <= {"Reshape"}
    report = qcompiler.verify(artifact.save(tmp_path / "net.so"), path, samples)
    assert report.passed and "what LiteRT" in str(report)


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64"])
def test_quotients_of_integers_are_rounded_down(dtype: str, tmp_path: Path) -> None:
    """Also where the next multiple is no number of the type."""
    ends = np.iinfo(dtype)
    x = np.array([ends.min, ends.min + 1, -7, -6, -1, 0, 1, 6, 7, ends.max - 1, ends.max], dtype)
    net = TfliteNet()
    held = net.input(x.shape, dtype, name="x")
    divisors = [3, -3, 1, ends.max]
    outputs = [net.op("FLOOR_DIV", [held, net.const(np.array([d], dtype))], x.shape, dtype=dtype, kind="FloorDivOptions") for d in divisors]
    session = Session(compile_float(net.save(tmp_path / "m.tflite", outputs)).save(tmp_path / "m.so"))
    for divisor, got in zip(divisors, session.run({"x": x}).values(), strict=True):
        np.testing.assert_array_equal(got, x // np.array(divisor, dtype))


# -- what is refused --------------------------------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, net: TfliteNet, outputs: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(net.save(tmp_path / "bad.tflite", outputs if isinstance(outputs, list) else [outputs]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_complex_numbers_beyond_a_spectrum(tmp_path: Path) -> None:
    def spectrum(dtype: str = "float32") -> tuple[TfliteNet, int]:
        net = TfliteNet()
        x = net.input((1, 8), dtype, name="x")
        return net, net.op("RFFT2D", [x, net.const(ints(1, 8))], (1, 5), dtype="complex64", kind="Rfft2dOptions")

    net, found = spectrum()
    message = refused(tmp_path, net, net.op("REAL", [net.op("MUL", [found, found], (1, 5), dtype="complex64", kind="MulOptions")], (1, 5)))
    assert "operator 1 (MUL, of 't3'): it computes with complex numbers; supported for these: REAL, IMAG, COMPLEX_ABS, CAST, RESHAPE" in message
    net, found = spectrum()
    assert "output 't2' holds complex numbers; hand out their real and imaginary parts" in refused(tmp_path, net, found)
    net, _ = spectrum("complex64")
    assert "input 'x' holds complex numbers; take in their real and imaginary parts" in refused(tmp_path, net, net.op("REAL", [0], (1, 8)))
    net, _ = spectrum()
    assert "it takes a part of 'x', which holds no complex numbers" in refused(tmp_path, net, net.op("IMAG", [0], (1, 8)))
    net = TfliteNet()
    line = net.op("RFFT2D", [net.input((8,), name="x"), net.const(ints(1, 8))], (5,), dtype="complex64", kind="Rfft2dOptions")
    assert "it transforms a tensor of 1 axis; supported: from 2 on" in refused(tmp_path, net, net.op("REAL", [line], (5,)))
    net, _ = spectrum()
    constant = net.const(np.ones((1, 8), np.complex64))
    assert "is a constant of complex numbers" in refused(tmp_path, net, net.op("REAL", [constant], (1, 8)))


def test_unknown_operators_are_named_together(tmp_path: Path) -> None:
    net = TfliteNet()
    x = net.input(IMAGE, name="x")
    for custom in ("FlexErf", "MaxUnpooling2D", "MaxUnpooling2D"):
        x = net.op("CUSTOM", [x], IMAGE, custom=custom)
    message = refused(tmp_path, net, net.op("WHILE", [x], IMAGE))
    assert "no conversion exists for TensorFlow's Erf (a Flex operator), WHILE, the custom operator MaxUnpooling2D (2 times)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net, y: setattr(net.operators[0], "inputs", [0, 99, 2]), "not a TFLite model, or damaged"),
        (lambda net, y: setattr(net.operators[0], "inputs", [0]), "its operand 1 is missing"),
        (lambda net, y: setattr(net.operators[0], "inputs", [y, 1, 2]), "is computed by no operator before it"),
        (lambda net, y: setattr(net.operators[0], "outputs", [0]), "its results are missing, or computed by another operator too"),
        (lambda net, y: setattr(net.operators[0].builtinOptions, "strideW", 0), r"its strides are \[2, 0\]"),
        (lambda net, y: setattr(net.operators[0].builtinOptions, "padding", 7), "its padding is number 7"),
        (lambda net, y: setattr(net.operators[0].builtinOptions, "fusedActivationFunction", 4), "its fused activation TANH has no kernel"),
        (lambda net, y: setattr(net.tensors[1], "shape", np.array([16, 3, 3, 9], np.int32)), "not a TFLite model, or damaged .* bytes"),
        (lambda net, y: setattr(net.tensors[0], "isVariable", True), "a variable is an input or output of the network itself"),
        (lambda net, y: setattr(net.tensors[0], "type", schema.TensorType.RESOURCE), "a variable is an input or output of the network itself"),
        (lambda net, y: setattr(net.tensors[0], "type", schema.TensorType.STRING), "is of type STRING; supported: float32"),
        (lambda net, y: setattr(net.tensors[0], "shape", np.array([1, 6, 24], np.int32)), r"has 3 axes; supported: images"),
        (lambda net, y: setattr(net.tensors[1].quantization, "scale", np.ones(3, np.float32)), "has 3 scales along axis 0"),
        (lambda net, y: setattr(net.tensors[y].quantization, "scale", np.zeros(1, np.float32)), "the scale .* is 0; supported: finite numbers from 2"),
        (lambda net, y: net.tensors[y].quantization.__setattr__("zeroPoint", np.array([999])), "a zero point of tensor .* is no int8"),
        (lambda net, y: net.operators.clear(), "is computed by no operator"),
        (lambda net, y: net.inputs.clear(), "is computed by no operator before it"),
    ],
)
def test_what_contradicts_itself(tmp_path: Path, change: Any, message: str) -> None:
    net, y = small()
    load(net.save(tmp_path / "right.tflite", [y]))
    change(net, y)
    with pytest.raises(ModelError, match=message):
        load(net.save(tmp_path / "bad.tflite", [y]))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, y = small()
    path = net.save(tmp_path / "net.tflite", [y])
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(ModelError, match=r"read with the package ai-edge-litert, which is not installed: pip install 'qcompiler\[tflite\]'"):
        load(path)


def test_cut_before_an_operator_that_is_not_known(tmp_path: Path) -> None:
    """The refusal offers the tensor that the operator reads; cut there, it need not be known."""
    net, y = small("float32")
    assert "--outputs boxes (in" in refused(tmp_path, net, net.op("CUSTOM", [renamed(net, y)], (1, 4), custom="MyBoxes"))
    path = tmp_path / "bad.tflite"
    assert [o.name for o in load(origin_of(path, ["boxes"])).outputs] == ["boxes"]
    with pytest.raises(ModelError, match="no operator computes 'box'. Did you mean 'boxes'"):
        load(origin_of(path, ["box"]))


def test_cut_networks_are_compared_with_litert(tmp_path: Path) -> None:
    net, y = small("float32")
    path = net.save(tmp_path / "net.tflite", [net.op("TANH", [renamed(net, y)], (1, 3, 3, 16))])
    whole, cut = origin_of(path), origin_of(path, ["boxes"])
    session = Session(compile_float(cut, target="x86-avx2").save(tmp_path / "net.so"))
    feeds = {"x": np.random.default_rng(0).standard_normal(IMAGE).astype(np.float32)}
    found = check_import(cut.elsewhere(), session, [feeds], 90.0)
    assert found.status == "equal" and [o.name for o in found.outputs] == ["boxes"]
    assert load(cut).digest != load(whole).digest and session.manifest["cut"] == ["boxes"]


def renamed(net: TfliteNet, index: int) -> int:
    net.tensors[index].name = "boxes"
    return index


def test_bench_against_its_own_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LiteRT runs the file itself, integers as they are; what reads ONNX alone gets the network as that."""
    require_module("ai_edge_litert", "ai-edge-litert")
    for dtype, peers, names in (("int8", "litert", {"litert net.tflite"}), ("float32", "litert,onnxruntime", {"litert net.tflite", "onnxruntime float"})):
        net, results = together({name: BOTH[name] for name in SOME[:1]}, dtype)
        path = net.save(tmp_path / "net.tflite", list(results))
        qcompiler.compile(path, "x86-avx2", [inputs(dtype)], preset="fast").save(tmp_path / "net.so")
        words = ["bench", str(tmp_path / "net.so"), "--model", str(path), "--seconds", "0.05", "--json"]
        assert main([*words, "--against", peers]) == 0
        assert {"int8", "float", *names} == set(json.loads(capsys.readouterr().out)["seconds"])
    assert main([*words, "--against", "torch"]) == 2
    assert "PyTorch runs exported programs (.pt2), and" in capsys.readouterr().err
