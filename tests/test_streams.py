"""Residual streams in 16 bits, and whole transformers from a file to a library in integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from emulated import ARM
from onnx_nets import OnnxNet, execute
from traced import on_arm, on_cuda, on_x86
from transformer_nets import WIDTH, Transformer, bert, pictures, sentences, vit
from x86_emulation import ALL, each, runs_here

import qcompiler
from qcompiler.base.targets import Target
from qcompiler.importers.model import load
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import STREAMS, find_groups
from qcompiler.passes.sequence import WIDE, run
from qcompiler.pipeline.compile import compile_stages
from qcompiler.pipeline.library import Compilation
from qcompiler.runtime.session import Session
from qcompiler.verification import interpreter
from qcompiler.verification.bits import bit_parity

Make = Callable[[Path], Path]
NETS: dict[str, tuple[Make, Callable[[int, int], list[dict[str, np.ndarray]]]]] = {"bert": (bert, sentences), "vit": (vit, pictures)}


@pytest.fixture(scope="module", params=list(NETS))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Compilation]:
    make, samples = NETS[request.param]
    path = make(tmp_path_factory.mktemp("net") / f"{request.param}.onnx")
    return request.param, path, compile_stages(path, "native", samples(16, 5))


def test_the_copies_change_nothing(tmp_path: Path) -> None:
    model = load(bert(tmp_path / "bert.onnx"))
    wide = run(WIDE, model.module)
    feeds = sentences(1)[0]
    got, wanted = execute(wide, feeds), execute(model.module, feeds)
    for output in wanted:
        np.testing.assert_array_equal(got[output], wanted[output])
    groups = {g.id: g for g in find_groups(wide)}
    streams = set(Graph.of(wide).attrs[STREAMS])
    for group in groups.values():
        wide_read = streams & set(group.operands)
        assert not wide_read or group.traits.reads_wide or wide_read == {group.residual}, group
    assert sum(g.kind == "rescale" for g in groups.values()) == 6, (
        "one copy for the projections of a block, one in front of each feed-forward layer, one inside"
    )


def test_a_convolutional_network_has_no_streams(tmp_path: Path) -> None:
    net = OnnxNet()
    x = net.op("Conv", net.input("x", 1, 4, 8, 8), net.weight(4, 4, 3, 3), pads=[1, 1, 1, 1])
    model = load(net.save(tmp_path / "net.onnx", [net.op("Add", x, net.op("Conv", x, net.weight(4, 4, 1, 1)))]))
    assert run(WIDE, model.module).same_as(model.module)


def test_everything_that_computes_is_in_integers(compiled: tuple[str, Path, Compilation]) -> None:
    compilation = compiled[2]
    operators = [s["op"] for s in compilation.artifact.manifest["steps"]]
    assert operators.count("qc.attention") == 2 and operators.count("qc.layer_norm") == 5
    heavy = {"Conv", "MatMul", "LayerNormalization", "Softmax", "Erf", "Add", "Transpose", "Reshape"}
    in_float = [(f["op"], f["reason"]) for f in compilation.artifact.manifest["float_ops"] if f["op"] in heavy]
    assert not in_float
    layouts = compilation.artifact.manifest["layouts"]
    normalized = [s for s in compilation.artifact.manifest["steps"] if s["op"] == "qc.layer_norm"]
    assert {layouts[s["id"]]["storage"] for s in normalized} <= {"int16", "uint8", "int8"}
    assert sum(v["storage"] == "int16" for v in layouts.values()) >= 5


def test_close_to_onnxruntime(compiled: tuple[str, Path, Compilation], tmp_path: Path) -> None:
    name, path, compilation = compiled
    session, reference = Session(compilation.artifact.save(tmp_path / "net.so")), onnxruntime.InferenceSession(str(path))
    got, wanted = [], []
    for sample in NETS[name][1](12, 77):
        rows = slice(0, int(sample["mask"].sum())) if name == "bert" else slice(None)
        wanted.append(reference.run(None, sample)[0][:, rows].ravel())
        got.append(next(iter(session.run(sample).values()))[:, rows].ravel())
    assert sqnr_db(np.concatenate(got), np.concatenate(wanted)) > 27


def test_native_is_the_interpreter(compiled: tuple[str, Path, Compilation], tmp_path: Path) -> None:
    name, _, compilation = compiled
    session = Session(compilation.artifact.save(tmp_path / "net.so"), threads=2)
    for sample in NETS[name][1](2, 3):
        assert bit_parity(session, interpreter.run(compilation.integer, sample, keep="all"), sample) == []


def sample_of(compiled: tuple[str, Path, Compilation]) -> dict[str, np.ndarray]:
    return NETS[compiled[0]][1](1, 11)[0]


def integers(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: v for name, v in values.items() if v.dtype in (np.int8, np.int16)}


def same(got: dict[str, np.ndarray], outputs: dict[str, np.ndarray], compilation: Compilation, sample: dict[str, np.ndarray]) -> None:
    """Every integer value, and the outputs, which are integers times a scale."""
    wanted = integers(interpreter.run(compilation.integer, sample, keep="all"))
    common = integers(got).keys() & wanted.keys()
    for name in common:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)
    assert len(common) >= 20
    for name, real in interpreter.run(compilation.integer, sample).items() if outputs else ():
        np.testing.assert_array_equal(outputs[name], real)


@pytest.mark.parametrize("target", each(ALL))
@runs_here
def test_x86(target: Target, compiled: tuple[str, Path, Compilation], tmp_path: Path) -> None:
    sample = sample_of(compiled)
    outputs, got = on_x86(compiled[2], sample, target, tmp_path)
    same(got, outputs, compiled[2], sample)


@pytest.mark.parametrize("name", ARM)
def test_arm(name: str, compiled: tuple[str, Path, Compilation], tmp_path: Path) -> None:
    sample = sample_of(compiled)
    outputs, got = on_arm(compiled[2], sample, name, tmp_path)
    same(got, outputs, compiled[2], sample)


def test_cuda(compiled: tuple[str, Path, Compilation], tmp_path: Path) -> None:
    sample = sample_of(compiled)
    same(on_cuda(compiled[2], sample, tmp_path), {}, compiled[2], sample)


@pytest.mark.parametrize("tokens", [1, 3])
def test_short_sequences(tokens: int, tmp_path: Path) -> None:
    """One key, and fewer keys than a vector has lanes."""
    net = OnnxNet(seed=tokens)
    x = net.input("x", 1, tokens, WIDTH)
    q, k, v = (net.op("MatMul", x, net.weight(WIDTH, WIDTH, spread=WIDTH**-0.5)) for _ in range(3))
    logits = net.op("Mul", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1])), net.const(WIDTH**-0.5))
    summed = net.op("MatMul", net.op("Softmax", logits, axis=-1), v)
    y = net.op("LayerNormalization", net.op("Add", x, summed), net.const(np.ones(WIDTH)), net.const(np.zeros(WIDTH)), axis=-1)
    path = net.save(tmp_path / "net.onnx", [y])
    rng = np.random.default_rng(1)
    samples = [{"x": rng.standard_normal((1, tokens, WIDTH)).astype(np.float32)} for _ in range(8)]
    session = Session(compile_stages(path, "native", samples).artifact.save(tmp_path / "net.so"))
    wanted = onnxruntime.InferenceSession(str(path)).run(None, samples[0])[0]
    assert sqnr_db(next(iter(session.run(samples[0]).values())), wanted) > 30


@pytest.mark.parametrize("between", ["MaxPool", "AveragePool", "Sigmoid"])
def test_what_computes_in_8_bits_ends_a_stream(between: str, tmp_path: Path) -> None:
    """A normalization, an operator that reads and writes 8 bits, and its numbers moved into the sums of a transformer's block."""
    net = Transformer(4)
    x = net.op("Conv", net.input("image", 1, 3, 8, 8), net.weight(WIDTH, 3, 3, 3), pads=[1, 1, 1, 1])
    x = net.op("Transpose", net.norm(net.op("Transpose", x, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2])
    x = net.op(between, x) if between == "Sigmoid" else net.op(between, x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 3, 1]), net.ints(1, -1, WIDTH))
    x = net.op("Add", net.attention(net.norm(net.op("Add", x, net.const(net.rng.standard_normal(WIDTH)))), None), x)
    path = net.save(tmp_path / "net.onnx", [net.norm(x)])
    rng = np.random.default_rng(0)
    samples = [{"image": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(4)]
    session = qcompiler.load(qcompiler.compile(path, calibration=samples, preset="fast").save(tmp_path / "net.so"))
    (wanted,) = onnxruntime.InferenceSession(str(path)).run(None, samples[0])
    (got,) = session.run(samples[0]).values()
    assert sqnr_db(got, wanted) > 20
