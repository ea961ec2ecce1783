"""LSTM, GRU and RNN from ONNX: in float as ONNX Runtime has them, in integers near that, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_nets import OnnxNet
from recurrent_nets import feeds, network, saved

import qcompiler
from qcompiler.base.errors import ModelError
from qcompiler.importers.model import load
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes.graph import Graph, match_op
from qcompiler.verification import interpreter

NETWORKS: dict[str, dict[str, Any]] = {
    "lstm": {"op": "LSTM"},
    "lstm_both_ways": {"op": "LSTM", "direction": "bidirectional", "states": True, "lengths": True},
    "lstm_clip": {"op": "LSTM", "clip": 0.4, "direction": "reverse"},
    "lstm_functions": {"op": "LSTM", "activations": ["HardSigmoid", "Softsign", "Tanh"], "activation_alpha": [0.3], "activation_beta": [0.4]},
    "lstm_no_peepholes": {"op": "LSTM", "replaced": {"P": np.zeros((1, 15), np.float32)}},
    "gru": {"op": "GRU", "states": True},
    "gru_reset_last": {"op": "GRU", "linear_before_reset": 1, "lengths": True, "direction": "reverse"},
    "gru_both_ways": {"op": "GRU", "direction": "bidirectional", "linear_before_reset": 1, "clip": 0.9, "hidden": 1, "batch": 1},
    "rnn": {"op": "RNN", "states": True, "direction": "bidirectional"},
    "rnn_relu": {"op": "RNN", "activations": ["Relu"], "steps": 1},
    "rnn_leaky": {"op": "RNN", "activations": ["LeakyRelu"], "activation_alpha": [0.2], "clip": 0.5},
}


def by_onnxruntime(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path)
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_as_onnx_runtime_has_it(name: str, tmp_path: Path) -> None:
    model = network(**NETWORKS[name])
    path, inputs = saved(model, tmp_path), feeds(model, 1)
    got = interpreter.run(load(path).module, inputs)
    for output, wanted in by_onnxruntime(path, inputs).items():
        np.testing.assert_allclose(got[output], wanted, atol=3e-6)


@pytest.mark.parametrize("name", ("lstm_both_ways", "gru_reset_last", "rnn_relu"))
def test_in_integers(name: str, tmp_path: Path) -> None:
    """Near the float network, and the same bits as the definition; what nothing bounds stays float."""
    model = network(**NETWORKS[name])
    path = saved(model, tmp_path)
    artifact = qcompiler.compile(path, calibration=[feeds(model, s) for s in range(100, 200)], preset="fast")
    operators = {step["op"] for step in artifact.manifest["steps"]}
    assert ("qc.f32.recurrence" if name == "rnn_relu" else "qc.recurrence") in operators
    session = qcompiler.load(artifact.save(tmp_path / "model.so"))
    tests = [feeds(model, s) for s in range(20, 28)]
    for output, wanted in by_onnxruntime(path, tests[0]).items():
        pairs = [(by_onnxruntime(path, t)[output], session.run(t)[output]) for t in tests]
        assert wanted.shape == pairs[0][1].shape
        assert sqnr_db(np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])) > 25


REFUSED: list[tuple[str, dict[str, Any]]] = [
    (r"weights of its input have shape \[1, 20, 5\]; expected: \[1, 20, 6\]", {"op": "LSTM", "replaced": {"W": np.zeros((1, 20, 5))}}),
    (r"weights of its state have shape \[1, 15, 4\]; expected: \[1, 15, 5\]", {"op": "GRU", "replaced": {"R": np.zeros((1, 15, 4))}}),
    (r"bias have shape \[10\]; expected: \[1, 10\]", {"op": "RNN", "replaced": {"B": np.zeros(10)}}),
    ("weights of its state hold NaN or Inf", {"op": "RNN", "replaced": {"R": np.full((1, 5, 5), np.nan)}}),
    ("LSTMs with peepholes are not supported", {"op": "LSTM", "replaced": {"P": np.ones((1, 15))}}),
    ("gates are coupled", {"op": "LSTM", "input_forget": 1}),
    (r"sequence_lens reach from 2 to 9; supported: 0 to 4", {"op": "GRU", "replaced": {"lengths": np.array([2, 9], np.int32)}}),
    (r"sequence_lens have shape \[3\]; expected: \[2\]", {"op": "GRU", "replaced": {"lengths": np.array([2, 1, 1], np.int32)}}),
    ("activation 'Softplus' is not supported", {"op": "RNN", "activations": ["Softplus"]}),
    ("it has 2 activations; expected: 3", {"op": "LSTM", "activations": ["Sigmoid", "Tanh"]}),
    ("direction 'sideways' is unknown", {"op": "RNN", "direction": "sideways"}),
]


@pytest.mark.parametrize(("reason", "options"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refused(reason: str, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        load(saved(network(**options), tmp_path))


def test_rows_without_steps(tmp_path: Path) -> None:
    """Lengths below 0 and beyond the sequence, which only show when it runs, are taken as its ends; what lies beyond a row's steps is 0."""
    model = network("LSTM", lengths=True, states=True, replaced={"dense": np.eye(5)}, layers=5)
    inputs = {**feeds(model, 3), "lengths": np.array([0, 2], np.int32)}
    module = load(saved(model, tmp_path)).module
    got = interpreter.run(module, inputs)
    assert not got["y"][:, 0].any() and not got["y"][2:, 1].any() and got["y"][:2, 1].all()
    np.testing.assert_array_equal(got["h_out"][0, 0], inputs["h"][0, 0])
    ends = interpreter.run(module, {**inputs, "lengths": np.array([-7, 99], np.int32)})
    np.testing.assert_array_equal(ends["y"], interpreter.run(module, {**inputs, "lengths": np.array([0, 4], np.int32)})["y"])


def test_what_keeps_a_layer_in_float(tmp_path: Path) -> None:
    """The name of its node, for all that it became; an initial state beyond what integers hold."""
    model = network("GRU", states=True, direction="bidirectional")
    path, samples = saved(model, tmp_path), [feeds(model, s) for s in range(6)]
    operators = ("qc.recurrence", "qc.f32.recurrence", "qc.f32.dense")
    made = [qcompiler.compile(path, calibration=samples, preset="fast", keep_float=keep).manifest for keep in ((), ["layer"])]
    assert [[sum(s["op"] == op for s in m["steps"]) for op in operators] for m in made] == [[2, 0, 0], [0, 2, 2]]
    far = [{**s, "h": s["h"] * 5} for s in samples]
    manifest = qcompiler.compile(path, calibration=far, preset="fast").manifest
    assert any("its initial state reaches" in f["reason"] and f["op"] == "GRU" for f in manifest["float_ops"])


@pytest.mark.parametrize(("op", "taken", "finals"), [("GRU", [-1], [0, 1]), ("LSTM", [-1], [0, 1]), ("LSTM", [0, 1], [1, 1]), ("GRU", [0], [1])])
def test_stacked_last_states(op: str, taken: list[int], finals: list[int], tmp_path: Path) -> None:
    """PyTorch stacks the last states of all layers; a layer of which none is taken out again hands out none, and has integers for a result."""
    net = OnnxNet(seed=4)
    y, states = net.input("x", 5, 1, 6), []
    for width in (6, 7):
        rows = {"GRU": 3, "LSTM": 4}[op] * 7
        operands = [net.weight(1, rows, k) for k in (width, 7)]
        y, h, *_ = net.op(op, y, *operands, net.weight(1, 2 * rows), hidden_size=7, outputs=3 if op == "LSTM" else 2)
        states.append(h)
        y = net.op("Reshape", y, net.ints(5, 1, 7))
    parts = [net.op("Gather", net.op("Concat", *states, axis=0), net.ints(at), axis=0) for at in taken]
    path = net.save(tmp_path / "stacked.onnx", [net.op("MatMul", net.op("Concat", *parts, axis=-1), net.weight(7 * len(parts), 3))])
    found = [own for _, expr in Graph.of(load(path).module).bindings if (own := match_op(expr))]
    assert [own[2]["finals"] for own in found if own[0] == "qc.f32.recurrence"] == finals
    inputs = feeds(onnx.load(path), 3)
    got = interpreter.run(load(path).module, inputs)
    for output, wanted in by_onnxruntime(path, inputs).items():
        np.testing.assert_allclose(got[output], wanted, atol=3e-6)
