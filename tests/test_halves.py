"""Operands of dense layers in 16 bits, as two halves of 8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx_nets import OnnxNet, execute
from transformer_nets import pictures, vit

from qcompiler.importers.model import load
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import SIXTEEN
from qcompiler.passes.halves import HALVES, divisible
from qcompiler.passes.sequence import HALVED, WIDE, run
from qcompiler.pipeline import halves
from qcompiler.pipeline.compile import compile_stages, quantize
from qcompiler.pipeline.float_layers import ENOUGH
from qcompiler.pipeline.library import Compilation
from qcompiler.plan import recipes
from qcompiler.runtime.session import Session
from qcompiler.verification import interpreter
from qcompiler.verification.bits import bit_parity


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit(tmp_path_factory.mktemp("net") / "vit.onnx")


@pytest.fixture(scope="module")
def halved(path: Path) -> Compilation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes._HALVES, "default", recipes._HALVES["accurate"])
        return compile_stages(path, calibration=pictures(12))


def test_the_float_network_stays_the_same(path: Path) -> None:
    wide, sample = run(WIDE, load(path).module), pictures(1)[0]
    values = divisible(wide)
    assert len(values) == 10, "the picture; in each of two blocks two normalizations, the result of attention and the copy behind GELU; and the mean"
    module = run(HALVED, wide, dict.fromkeys(sorted(values), "a test"))
    got, wanted = execute(module, sample), execute(wide, sample)
    for output in wanted:
        np.testing.assert_allclose(got[output], wanted[output], atol=1e-5)
    attrs = Graph.of(module).attrs
    assert attrs[HALVES].keys() == {d.read for d in values.values()} and {v for d in values.values() for v in d.chain} <= set(attrs[SIXTEEN])
    assert not set(divisible(module)) & values.keys(), "nothing is divided twice"


def test_both_products_are_exact_together(halved: Compilation, tmp_path: Path) -> None:
    """Upper and lower half make the very 16-bit number, and the library computes what the interpreter does."""
    session, sample = Session(halved.artifact.save(tmp_path / "net.so"), threads=2), pictures(1, 3)[0]
    values = interpreter.run(halved.integer, sample, keep="all")
    assert bit_parity(session, values, sample) == []
    pairs = Graph.of(halved.quantized.model.module).attrs[HALVES]
    assert pairs and "read in 16 bits" in halved.artifact.manifest["quantization"]["halves"]
    for whole, (upper, lower) in pairs.items():
        assert values[whole].dtype == np.int16 and values[upper].dtype == values[lower].dtype == np.int8
        difference = 256 * values[upper].astype(int) + values[lower] - values[whole]
        assert np.abs(difference).max() <= 1, "127.5 steps are no 8-bit number"


def test_the_outputs_gain(path: Path, halved: Compilation, tmp_path: Path) -> None:
    plain = compile_stages(path, calibration=pictures(12), disable=["halves"])
    reference, found = onnxruntime.InferenceSession(str(path)), []
    wanted = np.concatenate([reference.run(None, s)[0] for s in pictures(16, 77)])
    for name, compilation in (("plain", plain), ("halved", halved)):
        session = Session(compilation.artifact.save(tmp_path / f"{name}.so"))
        found.append(sqnr_db(np.concatenate([next(iter(session.run(s).values())) for s in pictures(16, 77)]), wanted))
    assert found[1] > found[0]


def test_other_networks_are_divided_by_accurate_alone(tmp_path: Path) -> None:
    net = OnnxNet()
    x = net.op("Relu", net.op("MatMul", net.input("x", 1, 32), net.weight(32, 256)))
    y = net.op("Relu", net.op("MatMul", x, net.weight(256, 256)))
    path = net.save(tmp_path / "net.onnx", [net.op("MatMul", y, net.weight(256, 8))])
    assert divisible(run(WIDE, load(path).module)).keys() == {"x", x, y}
    samples = [{"x": np.random.default_rng(i).standard_normal((1, 32)).astype(np.float32) ** 3} for i in range(8)]
    assert quantize(path, "native", samples, disable=["rescue"]).account == {}
    assert "read in 16 bits" in quantize(path, "native", samples, preset="accurate", disable=["mixed"]).account["halves"]


def loud_and_quiet(folder: Path) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """Tokens of very different loudness through a feed-forward block, alike again behind it: 8 bits leave nothing of the quiet ones."""
    net = OnnxNet(seed=4)
    x, gain = net.input("x", 1, 16, 32), net.input("gain", 1, 16, 1)
    ones, zeros = net.const(np.ones(32)), net.const(np.zeros(32))
    loud = net.op("Mul", net.op("LayerNormalization", x, ones, zeros, axis=-1), gain)
    hidden = net.op("Add", net.op("MatMul", loud, net.weight(32, 32)), net.const(0.1 * net.rng.standard_normal(32)))
    gelu = net.op("Mul", hidden, net.op("Sigmoid", hidden))
    y = net.op("LayerNormalization", net.op("MatMul", gelu, net.weight(32, 32)), ones, zeros, axis=-1, epsilon=1e-12)
    for _ in range(4):  # work beside which two small products are little
        y = net.op("Add", net.op("MatMul", net.op("Relu", net.op("MatMul", y, net.weight(32, 256))), net.weight(256, 32, spread=0.02)), y)
    rng, levels = np.random.default_rng(6), np.logspace(-1.5, 1, 16).astype(np.float32).reshape(1, 16, 1)
    samples = [{"x": rng.standard_normal((1, 16, 32)).astype(np.float32), "gain": rng.permuted(levels, axis=1)} for _ in range(12)]
    return net.save(folder / "loud.onnx", [y]), samples


def test_a_rescue_reads_in_halves_before_it_keeps_layers_in_float(tmp_path: Path) -> None:
    path, samples = loud_and_quiet(tmp_path)
    network = quantize(path, "native", samples)
    assert network.plan.reasons == {}
    before, after = network.account["rescue"].split(" more work: ")[1].split(" dB, estimated")[0].split(" dB -> ")
    assert float(before) < ENOUGH <= float(after)
    assert quantize(path, "native", samples, disable=["halves"]).plan.reasons


def test_default_takes_what_stands_out_for_little_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`default`: one operand that holds most of the noise, for at most a sixteenth of the work; none where the outputs are good enough."""
    path, samples = loud_and_quiet(tmp_path)
    said = quantize(path, "native", samples, disable=["rescue"]).account["halves"]
    assert said.startswith("1 operand ") and float(said.split(" for ")[1].split(" %")[0]) <= 100 / 16
    monkeypatch.setattr(halves, "BEYOND_NOTICE", 10.0)
    assert "halves" not in quantize(path, "native", samples, disable=["rescue"]).account
