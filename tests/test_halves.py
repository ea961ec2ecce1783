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
from qcompiler.passes.groups import STREAMS
from qcompiler.passes.halves import HALVES, divisible
from qcompiler.passes.sequence import HALVED, WIDE, run
from qcompiler.pipeline.compile import compile_stages
from qcompiler.pipeline.stages import Compilation
from qcompiler.runtime.session import Session
from qcompiler.verification import interpreter
from qcompiler.verification.bits import bit_parity


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit(tmp_path_factory.mktemp("net") / "vit.onnx")


@pytest.fixture(scope="module")
def halved(path: Path) -> Compilation:
    return compile_stages(path, calibration=pictures(12), enable=["halves"])


def test_the_float_network_stays_the_same(path: Path) -> None:
    wide, sample = run(WIDE, load(path).module), pictures(1)[0]
    values = divisible(wide)
    assert len(values) == 9, "in each of two blocks two normalizations, the result of attention and the copy behind GELU; and the mean"
    module = run(HALVED, wide, sorted(values))
    got, wanted = execute(module, sample), execute(wide, sample)
    for output in wanted:
        np.testing.assert_allclose(got[output], wanted[output], atol=1e-5)
    attrs = Graph.of(module).attrs
    assert attrs[HALVES].keys() == {d.read for d in values.values()} and {v for d in values.values() for v in d.chain} <= set(attrs[STREAMS])
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
    plain = compile_stages(path, calibration=pictures(12))
    reference, found = onnxruntime.InferenceSession(str(path)), []
    wanted = np.concatenate([reference.run(None, s)[0] for s in pictures(16, 77)])
    for name, compilation in (("plain", plain), ("halved", halved)):
        session = Session(compilation.artifact.save(tmp_path / f"{name}.so"))
        found.append(sqnr_db(np.concatenate([next(iter(session.run(s).values())) for s in pictures(16, 77)]), wanted))
    assert found[1] > found[0]


def test_networks_without_streams_have_nothing_to_divide(tmp_path: Path) -> None:
    net = OnnxNet()
    x = net.op("Relu", net.op("MatMul", net.input("x", 1, 8), net.weight(8, 8)))
    model = load(net.save(tmp_path / "net.onnx", [net.op("MatMul", x, net.weight(8, 4))]))
    assert divisible(run(WIDE, model.module)) == {}
