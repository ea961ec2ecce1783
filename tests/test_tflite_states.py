"""What a TFLite network keeps from call to call, beside LiteRT over several calls."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_state import CPP, compiled
from tflite_cases import rng
from tflite_nets import TfliteNet, schema
from tflite_states import CASES, COLUMNS, RELU, RELU6, TANH, B, H, Made, T, bidirectional_lstm, bidirectional_rnn, lstm, rnn, stream, svdf
from tools import require_module

import qcompiler
from qcompiler.base.errors import ModelError
from qcompiler.importers.model import load
from qcompiler.importers.origin import origin_of
from qcompiler.pipeline.float_library import compile_float
from qcompiler.runtime.reference import check_import
from qcompiler.runtime.session import Session

CALLS = 4
LONG = np.array([B, 2000, COLUMNS], np.int32)


def interpreter(path: Path) -> Any:
    """LiteRT with its reference kernels, or its usual ones where those lack an operator."""
    require_module("ai_edge_litert", "ai-edge-litert")
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    try:
        found = Interpreter(str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    except ValueError:
        found = Interpreter(str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
    found.allocate_tensors()
    return found


def streamed(path: Path, frames: list[np.ndarray]) -> list[list[np.ndarray]]:
    """The outputs of each call of one interpreter."""
    runs, results = interpreter(path), []
    for frame in frames:
        runs.set_tensor(runs.get_input_details()[0]["index"], frame)
        runs.invoke()
        results.append([runs.get_tensor(o["index"]) for o in runs.get_output_details()])
    return results


def frames_of(path: Path, count: int = CALLS) -> list[np.ndarray]:
    shape = interpreter(path).get_input_details()[0]["shape"]
    return [rng(s).standard_normal(shape).astype(np.float32) for s in range(count)]


@pytest.mark.parametrize("name", CASES)
def test_float_states(name: str, tmp_path: Path) -> None:
    """The session keeps what LiteRT keeps; a call that is handed the states is LiteRT's as well."""
    net, outputs = CASES[name]()
    path = net.save(tmp_path / "net.tflite", outputs)
    session, frames = Session(compile_float(path).save(tmp_path / "net.so")), frames_of(path)
    wanted = streamed(path, frames)
    for _ in range(2):
        for frame, row in zip(frames, wanted, strict=True):
            got = session.run({"x": frame})
            assert len(got) == len(row)
            for array, right in zip(got.values(), row, strict=True):
                np.testing.assert_allclose(array, right, rtol=1e-5, atol=2e-6)
        session.reset()
    assert name == "svdf one column" or any(not np.allclose(wanted[0][k], streamed(path, frames[:1] * 2)[1][k]) for k in range(len(outputs))), (
        "a call that depends on no other"
    )


def test_a_call_with_states_is_compared_with_litert(tmp_path: Path) -> None:
    """LiteRT takes the states too: variable tensors as they are, other variables as inputs of the file."""
    for name in ("stream from elsewhere", "lstm", "svdf rank 2", "lstm basic"):
        net, outputs = CASES[name]()
        path = net.save(tmp_path / "net.tflite", outputs)
        session = Session(compile_float(path).save(tmp_path / "net.so"))
        feeds = {i.name: rng(len(i.name)).standard_normal(i.shape).astype(np.float32) for i in session.inputs}
        checked = check_import(origin_of(path).elsewhere(), session, [feeds, {n: -a for n, a in feeds.items()}], 100)
        assert checked.status == "equal" and len(checked.outputs) == len(session.outputs), checked


def kept(path: Path) -> dict[str, Any]:
    model = load(path)
    return {"state": model.state, "initial": model.initial}


def test_what_is_a_state(tmp_path: Path) -> None:
    """Names are the variables'; what is never written is none; what begins with zeros needs no saying."""
    net, outputs = stream(0.7)
    states = {name: f"{name}/next" for name in ("ring", "sum", "last")}
    assert kept(net.save(tmp_path / "net.tflite", outputs)) == {"state": states, "initial": {"ring": pytest.approx(0.7), "last": 1.0}}
    net, outputs = lstm()
    assert kept(net.save(tmp_path / "net.tflite", outputs)) == {"state": {"h": "h/next", "c": "c/next"}, "initial": {}}


def test_states_can_be_constants(tmp_path: Path) -> None:
    """With values for them every call is one by itself, as a layer that is no stream is meant."""
    net, outputs = lstm()
    path = net.save(tmp_path / "net.tflite", outputs)
    zeros = {"h": np.zeros((B, H), np.float32), "c": np.zeros((B, H), np.float32)}
    artifact = compile_float(path, input_values=zeros)
    assert "state" not in artifact.manifest and len(artifact.manifest["outputs"]) == 1
    session, frames = Session(artifact.save(tmp_path / "net.so")), frames_of(path, 2)
    for frame in frames:
        np.testing.assert_allclose(next(iter(session.run({"x": frame}).values())), streamed(path, [frame])[0][0], rtol=1e-5, atol=2e-6)


def test_cut_networks_keep_the_states_they_need(tmp_path: Path) -> None:
    net, (y, z, before) = stream()
    path = net.save(tmp_path / "net.tflite", [y, z, before])
    for tensor, states in ((y, ["ring"]), (z, ["sum"]), (before, ["last"])):
        assert list(load(origin_of(path, [net.tensors[tensor].name])).state) == states


def test_a_first_value_of_many_numbers_in_c(tmp_path: Path) -> None:
    """C sessions begin, and begin again, with the bytes that the file has."""
    net = TfliteNet()
    x, variable, first = net.input((1, 4), name="x"), net.handle("v"), rng(0).standard_normal((1, 4)).astype(np.float32)
    net.first(v=first)
    total = net.op("ADD", [net.op("READ_VARIABLE", [variable], (1, 4), kind="ReadVariableOptions"), x], (1, 4), kind="AddOptions")
    net.op("ASSIGN_VARIABLE", [variable, total], kind="AssignVariableOptions")
    library = compile_float(net.save(tmp_path / "net.tflite", [total])).save(tmp_path / "net.so")
    program = compiled(CPP / "first_state.cc", tmp_path / "first_state")
    lines = subprocess.run([program, library], capture_output=True, text=True, check=True).stdout.splitlines()
    for line, wanted in zip(lines, (first + 1, first + 1 + 1, first + 1), strict=True):
        np.testing.assert_array_equal([float.fromhex(v) for v in line.split()], wanted[0])


# -- integers -----------------------------------------------------------------------------------------------------------------------------------


def int8_svdf(zero_point: int) -> Made:
    """int8 frames, features int8, weights in time and the memory int16. The kernel has Relu, and applies none: that is the zero point's."""
    net, units, memory = TfliteNet((0.02, zero_point)), 6, 8
    x = net.input((B, COLUMNS), "int8", (0.03, 7), name="x")
    features = net.const(rng(1).integers(-127, 128, (units, COLUMNS)).astype(np.int8), (0.01, 0))
    time = net.const(rng(2).integers(-8000, 8000, (units, memory)).astype(np.int16), (2.0**-14, 0))
    shift = net.const(rng(3).integers(-9000, 9000, units).astype(np.int32), (2.0**-12 * 2.0**-14, 0))
    operands = [x, features, time, shift, net.variable((B, units * memory), "int16", (2.0**-12, 0), name="s")]
    return net, [net.op("SVDF", operands, (B, units), kind="SVDFOptions", version=3, rank=1, fusedActivationFunction=RELU)]


def int8_lstm(*, coupled: bool = False, steps: int = T) -> Made:
    """int8 frames, weights and states, the cell int16 and biases int32, as the converter writes it."""
    net = TfliteNet((1 / 128, 0))
    x = net.input((B, steps, COLUMNS), "int8", (0.03, 7), name="x")
    first = [-1] if coupled else []
    scales = {"w": 0.006, "r": 0.007}

    def gates(kind: str, columns: int) -> list[int]:
        count = range(len(first), 4)
        return [*first, *(net.const(rng(9 * k + columns).integers(-127, 128, (H, columns)).astype(np.int8), (scales[kind], 0)) for k in count)]

    biases = [*first, *(net.const(rng(90 + k).integers(-4000, 4000, H).astype(np.int32), (0.03 * 0.006, 0)) for k in range(len(first), 4))]
    states = [net.variable((B, H), "int8", (1 / 128, 0), name="h"), net.variable((B, H), "int16", (2.0**-11, 0), name="c")]
    between = [net.tensor((), "int16", (2.0**-12, 0)) for _ in range(4)] + [net.tensor((), "int8", (1 / 128, 0))]
    operands = [x, *gates("w", COLUMNS), *gates("r", H), -1, -1, -1, *biases, -1, -1, *states, -1, -1, -1, -1]
    options = {"kind": "UnidirectionalSequenceLSTMOptions", "fusedActivationFunction": TANH, "version": 3}
    return net, [net.op("UNIDIRECTIONAL_SEQUENCE_LSTM", operands, (B, steps, H), intermediates=between, **options)]


def int8_stream() -> Made:
    """What a streaming keyword network has: a variable of integers that begins with its zero point."""
    quantization = (0.05, -90)
    net, length = TfliteNet(quantization), 4
    x, handle = net.input((1, 1, 1, COLUMNS), "int8", quantization, name="x"), net.handle("ring")
    net.first(ring=(np.full((1, length, 1, COLUMNS), -90, np.int8), quantization))
    whole = net.op(
        "CONCATENATION", [net.op("READ_VARIABLE", [handle], (1, length, 1, COLUMNS), kind="ReadVariableOptions"), x], (1, length + 1, 1, COLUMNS),
        kind="ConcatenationOptions", version=2, axis=1,
    )  # fmt: skip
    numbers = [net.const(np.array(n, np.int32)) for n in ((0, 1, 0, 0), (1, length, 1, COLUMNS))]
    ring = net.op("SLICE", [whole, *numbers], (1, length, 1, COLUMNS), kind="SliceOptions", version=2)
    net.op("ASSIGN_VARIABLE", [handle, ring], kind="AssignVariableOptions")
    filters = net.const(rng(1).integers(-127, 128, (8, length + 1, 1, COLUMNS)).astype(np.int8), (rng(2).uniform(0.002, 0.01, 8), 0))
    shift = net.const(rng(3).integers(-500, 500, 8).astype(np.int32))
    options = {"kind": "Conv2DOptions", "version": 3, "padding": 1, "strideH": 1, "strideW": 1}
    return net, [net.op("CONV_2D", [whole, filters, shift], (1, 1, 1, 8), quantization=(0.1, 3), **options)]


INTEGERS = {
    "svdf": (lambda: int8_svdf(-5), 1), "svdf relu": (lambda: int8_svdf(-128), 1), "stream": (int8_stream, 1), "lstm": (int8_lstm, 2),
    "lstm coupled": (lambda: int8_lstm(coupled=True), 2), "lstm long": (lambda: int8_lstm(steps=20), 3),
}  # fmt: skip
"""Networks, and how many steps of the result they may be apart: LiteRT rounds an LSTM's state to 8 bits at every step."""


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_states(name: str, tmp_path: Path) -> None:
    make, most = INTEGERS[name]
    net, outputs = make()
    path = net.save(tmp_path / "net.tflite", outputs)
    shape = interpreter(path).get_input_details()[0]["shape"]
    frames = [rng(s).integers(-128, 128, shape).astype(np.int8) for s in range(12)]
    session = Session(qcompiler.compile(path, target="x86-avx2").save(tmp_path / "net.so"))
    apart = []
    for frame, (wanted,) in zip(frames, streamed(path, frames), strict=True):
        (got,) = session.run({"x": frame}).values()
        assert got.dtype == wanted.dtype and len(np.unique(wanted)) > 2
        apart.append(np.abs(got.astype(int) - wanted))
    assert np.max(apart) <= most, (np.max(apart), np.mean(np.array(apart) > 0))


@pytest.mark.parametrize(("name", "make"), [("lstm", lambda: lstm(scale=0.01)), ("svdf", lambda: svdf(1, scale=0.01))])
def test_int8_weights_beside_float_activations(name: str, make: Any, tmp_path: Path) -> None:
    """Dynamic range: taken back to the float network of those weights, and said so."""
    net, outputs = make()
    path = net.save(tmp_path / "net.tflite", outputs)
    frames = frames_of(path, 40)
    wanted = np.array([row[0] for row in streamed(path, frames)])
    artifact = qcompiler.compile(path, target="x86-avx2", calibration=[{"x": f} for f in frames])
    assert artifact.imported is not None and artifact.imported.status == "equal", artifact.imported
    assert artifact.manifest["notes"]
    session = Session(compile_float(path).save(tmp_path / "net.so"))
    got = np.array([next(iter(session.run({"x": f}).values())) for f in frames])
    assert 10 * np.log10((wanted**2).sum() / ((got - wanted) ** 2).sum()) > 25


# -- what is refused ----------------------------------------------------------------------------------------------------------------------------


def first_operator(net: TfliteNet, name: str) -> Any:
    return next(o for o in net.operators if net.codes[o.opcodeIndex].builtinCode == getattr(schema.BuiltinOperator, name))


def first_read(net: TfliteNet) -> Any:
    """The tensor that the first READ_VARIABLE reads into."""
    return net.tensors[first_operator(net, "READ_VARIABLE").outputs[0]]


def other_shape(place: int, *shape: int) -> Any:
    """The change of a constant operand: as many numbers as another shape has."""

    def change(net: TfliteNet) -> None:
        tensor = net.operators[0].inputs[place]
        net.tensors[tensor].shape = np.array(shape, np.int32)
        net.buffers[net.tensors[tensor].buffer].data = np.frombuffer(np.ones(shape, np.float32).tobytes(), np.uint8)

    return change


REFUSED = [
    (lstm, other_shape(1, H, COLUMNS + 1), r"its weights of its input .* have shape \[4, 6\]; expected: \[4, 5\]"),
    (lstm, other_shape(5, H + 1, H), r"its weights of its state .* have shape \[5, 4\]; expected: \[4, 4\]"),
    (lstm, other_shape(13, H + 1), r"its biases .* have shape \[5\]; expected: \[4\]"),
    (lambda: lstm(peepholes=True), other_shape(10, H + 2), r"its peepholes .* have shape \[6\]; expected: \[4\]"),
    (lambda: lstm(projection=True), other_shape(16, 3, H + 1), r"its projection .* have shape \[3, 5\]; expected: \[3, 4\]"),
    (lstm, lambda net: setattr(net.tensors[13], "isVariable", False), "its operand 'h' is computed by no operator|is no variable"),
    (lstm, lambda net: setattr(net.tensors[13], "shape", np.array([B, H + 1], np.int32)), "initial_h has shape|contradict"),
    (lstm, lambda net: setattr(net.operators[0], "inputs", net.operators[0].inputs[:6]), "its operand .* is missing"),
    (lstm, lambda net: setattr(net.operators[0].builtinOptions, "fusedActivationFunction", 9), "contradict its definition"),
    (lambda: rnn(TANH), other_shape(2, H, H + 1), "the weights of its state have shape|have shape"),
    (lambda: svdf(2), lambda net: setattr(net.operators[0].builtinOptions, "rank", 4), "at rank 4; expected"),
    (lambda: svdf(2), lambda net: setattr(net.operators[0].builtinOptions, "rank", 0), "at rank 0; expected"),
    (lambda: svdf(1), lambda net: setattr(net.tensors[4], "shape", np.array([B, 7], np.int32)), "reshape|Reshape|contradict"),
    (lambda: bidirectional_lstm(merge=True, aux="weights"), lambda net: None, "has a second input, and batches first"),
    (lambda: bidirectional_rnn(TANH, aux="alone"), lambda net: None, "has a second input, and batches first"),
    (stream, lambda net: setattr(first_operator(net, "VAR_HANDLE").builtinOptions, "sharedName", "other"), "variable 'other' is read before anything is"),
    (stream, lambda net: net.called[0].operators.clear(), "is read before anything is written to it, and CALL_ONCE gives it no first value"),
    (stream, lambda net: setattr(first_operator(net, "CALL_ONCE").builtinOptions, "initSubgraphIndex", 7), "subgraph 7 of 2"),
    (stream, lambda net: setattr(first_operator(net, "READ_VARIABLE"), "inputs", [0]), "the variable of READ_VARIABLE is made by no VAR_HANDLE"),
    (stream, lambda net: setattr(first_operator(net, "READ_VARIABLE"), "inputs", []), "what it says of its variables contradicts itself"),
    (stream, lambda net: net.inputs.append(1), "a variable is an input or output of the network itself"),
    (stream, lambda net: setattr(first_read(net), "shape", np.array([1, 5, 1, 5], np.int32)), "variable 'ring'"),
    (int8_stream, lambda net: setattr(first_read(net).quantization, "scale", np.ones(1, np.float32)), "with another scale"),
    (lambda: lstm(fusedActivationFunction=RELU6), lambda net: setattr(net.tensors[net.inputs[0]], "shape", LONG), "and 2000 steps; supported: 1 to 833"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "change", "message"), REFUSED)
def test_what_contradicts_itself(make: Any, change: Any, message: str, tmp_path: Path) -> None:
    net, outputs = make()
    change(net)
    with pytest.raises(ModelError, match=message) as caught:
        load(net.save(tmp_path / "bad.tflite", outputs))
    assert "\n" not in str(caught.value)


def test_states_and_options_that_do_not_fit(tmp_path: Path) -> None:
    net, outputs = stream()
    path = net.save(tmp_path / "net.tflite", outputs)
    with pytest.raises(ModelError, match="state 'ring=sum/next': the input is float32"):
        load(path, state={"ring": "sum/next"})
    with pytest.raises(ModelError, match="'ring'"):
        load(path, input_values={"ring": np.zeros((1, 2), np.float32)})
