"""States of recurrent layers in 16 bits: read in halves by what follows, and whole by the layer's own product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx_nets import OnnxNet, execute

from qcompiler.importers.model import load
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes.graph import Graph, match_op
from qcompiler.passes.groups import SIXTEEN, find_groups
from qcompiler.passes.halves import divisible
from qcompiler.passes.sequence import HALVED, run
from qcompiler.pipeline import halves
from qcompiler.pipeline.compile import compile_stages, quantize
from qcompiler.pipeline.library import Compilation
from qcompiler.plan import recipes
from qcompiler.runtime.session import Session
from qcompiler.verification import interpreter
from qcompiler.verification.bits import bit_parity

STEPS, WIDTH, HIDDEN = 16, 10, 12


def recurrent(net: OnnxNet, op: str, x: str, width: int, directions: int, **attrs: object) -> str:
    """[T, B, directions * HIDDEN]"""
    rows = {"GRU": 3, "LSTM": 4}[op] * HIDDEN
    operands = [net.weight(directions, rows, k, spread=1.5 * k**-0.5) for k in (width, HIDDEN)]
    direction = "bidirectional" if directions == 2 else "forward"
    y, _ = net.op(op, x, *operands, net.weight(directions, 2 * rows, spread=0.2), hidden_size=HIDDEN, direction=direction, outputs=2, **attrs)
    return str(net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(STEPS, 1, directions * HIDDEN)))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GRU in both directions, an LSTM, dense layers. Its input and what lies between have few values, which 8 bits hold."""
    net = OnnxNet(seed=6)
    y = recurrent(net, "GRU", net.input("x", STEPS, 1, WIDTH), WIDTH, 2, linear_before_reset=1)
    y = recurrent(net, "LSTM", y, 2 * HIDDEN, 1)
    return net.save(tmp_path_factory.mktemp("net") / "states.onnx", [net.op("MatMul", y, net.weight(HIDDEN, 6))])


def samples(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": (rng.integers(-8, 9, (STEPS, 1, WIDTH)) / 4).astype(np.float32)} for _ in range(count)]


@pytest.fixture(scope="module")
def divided(path: Path) -> Compilation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halves, "BEYOND_NOTICE", 60.0)
        patch.setattr(recipes, "_STATES", (0.05, 2.0))
        return compile_stages(path, calibration=samples(12))


def test_both_directions_are_divided_as_one(path: Path) -> None:
    model = load(path)
    found = divisible(model.module)
    made = {tuple(g.attrs["cell"] for g in d.makers): d for d in found.values() if d.makers}
    assert made.keys() == {("gru", "gru"), ("lstm",)}
    assert {g.id for g in made["gru", "gru"].makers} <= set(made["gru", "gru"].values)
    module, sample = run(HALVED, model.module, dict.fromkeys(sorted(found), "a test")), samples(1)[0]
    got, wanted = execute(module, sample), execute(model.module, sample)
    for output in wanted:
        np.testing.assert_allclose(got[output], wanted[output], atol=1e-5)
    assert {g.id for g in find_groups(module) if g.traits.recurs} <= set(Graph.of(module).attrs[SIXTEEN])


def test_layers_whose_results_have_16_bits_multiply_all_of_them(divided: Compilation) -> None:
    said = divided.artifact.manifest["quantization"]["halves"]
    assert said.startswith("2 operands read in 16 bits")
    layers = [op for _, e in Graph.of(divided.integer).bindings if (op := match_op(e)) is not None and op[0] == "qc.recurrence"]
    assert len(layers) == 3 and all(op[2]["wide"] and op[2]["out_dtype"] == "int16" for op in layers)


def test_default_divides_states_that_are_felt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for beyond, found in ((60.0, True), (10.0, False)):
        monkeypatch.setattr(halves, "BEYOND_NOTICE", beyond)
        assert ("halves" in quantize(path, "native", samples(4)).account) == found


def test_bits_are_the_interpreters(divided: Compilation, tmp_path: Path) -> None:
    session, sample = Session(divided.artifact.save(tmp_path / "net.so"), threads=2), samples(1, 3)[0]
    assert bit_parity(session, interpreter.run(divided.integer, sample, keep="all"), sample) == []


def test_the_outputs_gain(path: Path, divided: Compilation, tmp_path: Path) -> None:
    plain = compile_stages(path, calibration=samples(12), disable=["halves"])
    reference, found = onnxruntime.InferenceSession(str(path)), []
    wanted = np.concatenate([reference.run(None, s)[0] for s in samples(16, 77)])
    for name, compilation in (("plain", plain), ("divided", divided)):
        session = Session(compilation.artifact.save(tmp_path / f"{name}.so"))
        found.append(sqnr_db(np.concatenate([next(iter(session.run(s).values())) for s in samples(16, 77)]), wanted))
    assert found[1] > found[0] + 1, found


def test_asked_for(path: Path, tmp_path: Path) -> None:
    """Recurrent layers write 16 bits, dense ones read them so."""
    network = compile_stages(path, "native", samples(4), preset="fast", keep_16=["op:GRU", "op:LSTM", "op:MatMul"])
    plan = network.quantized.plan
    states = [g.id for g in find_groups(network.quantized.model.module) if g.traits.recurs]
    assert len(states) == 3 and all((p := plan.params(v)) is not None and (p.scale, p.dtype) == (2.0**-14, "int16") for v in states)
    session, sample = Session(network.artifact.save(tmp_path / "net.so")), samples(1, 5)[0]
    assert bit_parity(session, interpreter.run(network.integer, sample, keep="all"), sample) == []


@pytest.mark.parametrize("op", ["GRU", "LSTM"])
@pytest.mark.parametrize("all_steps", [False, True])
def test_last_states_that_are_read(op: str, all_steps: bool, tmp_path: Path) -> None:
    """They go on in float32, which holds their 16 bits; the layer's own product reads all of those."""
    net = OnnxNet(seed=2)
    rows = {"GRU": 3, "LSTM": 4}[op] * HIDDEN
    operands = [net.weight(1, rows, k, spread=1.5 * k**-0.5) for k in (WIDTH, HIDDEN)]
    y, last = net.op(op, net.input("x", STEPS, 1, WIDTH), *operands, net.weight(1, 2 * rows, spread=0.2), hidden_size=HIDDEN, outputs=2)
    outputs = [net.op("MatMul", net.op("Reshape", v, net.ints(-1, HIDDEN)), net.weight(HIDDEN, 4)) for v in ([last, y] if all_steps else [last])]
    path = net.save(tmp_path / "net.onnx", outputs)
    network = compile_stages(path, "native", samples(4), preset="fast", keep_16=[f"op:{op}"])
    (layer,) = (c for _, e in Graph.of(network.integer).bindings if (c := match_op(e)) is not None and c[0] == "qc.recurrence")
    assert layer[2]["wide"] and layer[2]["out_dtype"] == "float32"
    session, sample = Session(network.artifact.save(tmp_path / "net.so")), samples(1, 5)[0]
    assert bit_parity(session, interpreter.run(network.integer, sample, keep="all"), sample) == []
    kept = compile_stages(path, "native", samples(4), preset="fast", keep_float=[f"op:{op}"])
    assert "qc.recurrence" not in [(match_op(e) or ("",))[0] for _, e in Graph.of(kept.integer).bindings]
