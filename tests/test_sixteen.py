"""16 bits in convolutional and audio networks: residual streams, operands in halves, what is chosen and what a user asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from emulated import ARM
from onnx_nets import OnnxNet, execute
from traced import on_arm, on_cuda, on_x86
from transformer_nets import vit
from x86_emulation import ALL, each, runs_here

from qcompiler.base.errors import PlanError
from qcompiler.base.targets import Target, find_target
from qcompiler.calibration.table import CalibrationTable
from qcompiler.importers.model import load
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import SIXTEEN, find_groups
from qcompiler.passes.halves import HALVES, divisible
from qcompiler.passes.sequence import HALVED, RESIDUAL, run
from qcompiler.passes.streams import residual_values
from qcompiler.pipeline import rewritten, stages
from qcompiler.pipeline.compile import compile_stages, quantize
from qcompiler.pipeline.halves import with_halves
from qcompiler.pipeline.job import opened
from qcompiler.pipeline.library import Compilation
from qcompiler.pipeline.residuals import with_wide
from qcompiler.runtime.session import Session
from qcompiler.verification import interpreter
from qcompiler.verification.bits import bit_parity
from qcompiler.verification.parity import verify

Samples = list[dict[str, np.ndarray]]


def residual(folder: Path) -> Path:
    """Two blocks on a stream, a pool in front of it and one beside it, a strided shortcut, a classifier."""
    net = OnnxNet(seed=3)
    x = net.op("Relu", net.op("Conv", net.input("x", 1, 3, 16, 16), net.weight(16, 3, 3, 3), net.const(np.ones(16) * 0.1), pads=[1] * 4))
    x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    for stride in (1, 2):
        y = net.op("Relu", net.op("Conv", x, net.weight(16, 16, 3, 3), pads=[1] * 4, strides=[stride] * 2))
        y = net.op("Conv", y, net.weight(16, 16, 3, 3), pads=[1] * 4)
        shortcut = net.op("Conv", x, net.weight(16, 16, 1, 1), strides=[2, 2]) if stride == 2 else x
        x = net.op("Relu", net.op("Add", y, shortcut))
    pooled = net.op("MaxPool", x, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    mean = net.op("Flatten", net.op("GlobalAveragePool", net.op("Add", x, net.op("Conv", pooled, net.weight(16, 16, 1, 1)))))
    return net.save(folder / "residual.onnx", [net.op("MatMul", mean, net.weight(16, 10))])


def spectrum(folder: Path) -> Path:
    """A short-time Fourier transform as two convolutions, its power, bands, their logarithm, a layer behind it."""
    net = OnnxNet(seed=4)
    t, frequencies = np.arange(64), np.arange(1, 25)[:, None]
    window = np.hanning(64)
    x = net.op("Unsqueeze", net.input("x", 1, 800), net.ints(1))
    parts = [net.op("Conv", x, net.const((f(2 * np.pi * frequencies * t / 64) * window)[:, None]), strides=[32]) for f in (np.cos, np.sin)]
    power = net.op("Add", *(net.op("Mul", p, p) for p in parts))
    bands = net.op("MatMul", net.op("Transpose", power, perm=[0, 2, 1]), net.const(np.abs(net.rng.standard_normal((24, 12)))))
    loud = net.op("Log", net.op("Add", bands, net.const(1e-6)))
    return net.save(folder / "spectrum.onnx", [net.op("MatMul", loud, net.weight(12, 8))])


def pictures(count: int, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]


def sounds(count: int, seed: int = 0) -> Samples:
    """A loud tone and a faint one, which swell and fade."""
    rng, t = np.random.default_rng(seed), np.arange(800)
    found = []
    for _ in range(count):
        tones = [a * np.sin(2 * np.pi * rng.uniform(0.02, 0.4) * t) for a in (1.0, 0.01)]
        found.append({"x": (np.sum(tones, axis=0) * np.logspace(*rng.permuted([0.0, -2.5]), 800) + 1e-4 * rng.standard_normal(800))[None].astype(np.float32)})
    return found


NETS: dict[str, tuple[Callable[[Path], Path], Callable[..., Samples], dict[str, object]]] = {
    "residual": (residual, pictures, {"preset": "fast", "keep_16": ["op:Conv", "op:Add", "op:MatMul"]}),
    "spectrum": (spectrum, sounds, {"preset": "fast", "keep_16": "op:Conv", "keep_float": ["op:Mul", "op:Add", "op:Log", "matmul*"]}),
}


@pytest.fixture(scope="module", params=list(NETS))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Compilation]:
    make, samples, options = NETS[request.param]
    path = make(tmp_path_factory.mktemp("net"))
    return request.param, path, compile_stages(path, "native", samples(8), **options)  # type: ignore[arg-type]


def test_the_float_network_stays_the_same(tmp_path: Path) -> None:
    for name, (make, samples, _) in NETS.items():
        model, sample = load(make(tmp_path)), samples(1)[0]
        streams = residual_values(find_groups(model.module))
        wide = run(RESIDUAL, model.module, dict.fromkeys(streams, "a test"))
        module = run(HALVED, wide, dict.fromkeys(divisible(wide), "a test"))
        assert len(streams) == {"residual": 2, "spectrum": 0}[name] and len(divisible(wide)) == {"residual": 5, "spectrum": 2}[name]
        got, wanted = execute(module, sample), execute(model.module, sample)
        for output in wanted:
            np.testing.assert_allclose(got[output], wanted[output], rtol=1e-5, atol=1e-5)
        assert not set(divisible(module)) & set(Graph.of(module).attrs[SIXTEEN]), "nothing is divided twice"


@pytest.mark.parametrize("halves", [False, True])
def test_only_what_is_new_is_looked_at_again(halves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies have the numbers of what they copy; sums of two products are nothing that was seen before. What is known then is what a pass over the samples
    finds in the network as it is now."""
    job = opened(residual(tmp_path), find_target("native"), pictures(5), {"preset": "accurate"})
    measured, looked, observe = stages.calibrate(stages.equalize(job.counted())), list[str](), stages.observe

    def counted(equalized: stages.Equalized, ids: Sequence[str], *rest: Any, **options: Any) -> CalibrationTable:
        looked.extend(ids)
        return observe(equalized, ids, *rest, **options)

    monkeypatch.setattr(rewritten, "observe", counted)
    streams, operands = residual_values(find_groups(measured.model.module)), divisible(measured.model.module)
    found = with_halves(measured, dict.fromkeys(operands, "a test")) if halves else with_wide(measured, dict.fromkeys(streams, "a test"))
    assert measured.table.values.keys().isdisjoint(looked) and bool(looked) == halves
    again = stages.calibrate(found.equalized)
    assert found.table.values.keys() == again.table.values.keys() > measured.table.values.keys() and found.table.samples == again.table.samples == 5
    for name, seen in again.table.values.items():
        for end in ("low", "high", "count", "channel_count"):
            assert getattr(found.table.values[name], end) == pytest.approx(getattr(seen, end), rel=1e-5, abs=1e-6), name
        np.testing.assert_allclose(found.table.values[name].channel_mean, seen.channel_mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.ends.ends[name], again.ends.ends[name], rtol=1e-5, atol=1e-5)
    assert len(found.means.outputs) == len(again.means.outputs) == 5 and found.means.limit == again.means.limit and found.warnings == again.warnings
    for name, group in found.means.groups.items():
        for add in (True, False) if group.residual else (False,):
            np.testing.assert_allclose(found.means.expected(name, 5, add), again.means.expected(name, 5, add), rtol=1e-4, atol=1e-4)


def test_what_is_asked_for_has_16_bits(compiled: tuple[str, Path, Compilation]) -> None:
    name, _, compilation = compiled
    plan, attrs = compilation.quantized.plan, Graph.of(compilation.quantized.model.module).attrs
    wide = {v for v in plan.edges if (p := plan.params(v)) is not None and p.dtype == "int16"}
    assert set(attrs[SIXTEEN]) <= wide and "x" in wide
    convolutions = [s["id"] for s in compilation.artifact.manifest["steps"] if s["op"] == "qc.conv2d"]
    assert len(convolutions) == {"residual": 12, "spectrum": 4}[name], "each is computed twice, but for two behind a pool"
    assert [e for e in compilation.artifact.manifest["sixteen"] if e["id"] == "x"][0]["reason"] == "asked for (keep_16)"


def test_both_halves_are_the_number(compiled: tuple[str, Path, Compilation]) -> None:
    _, _, compilation = compiled
    values = interpreter.run(compilation.integer, sample_of(compiled), keep="all")
    pairs = Graph.of(compilation.quantized.model.module).attrs[HALVES]
    assert pairs
    for whole, (up, low) in pairs.items():
        if whole in values:  # a transposed input is quantized at once
            assert values[whole].dtype == np.int16 and values[up].dtype == values[low].dtype == np.int8
            assert np.abs(256 * values[up].astype(int) + values[low] - values[whole]).max() <= 1, "127.5 steps are no 8-bit number"


def test_closer_to_onnxruntime_than_8_bits(compiled: tuple[str, Path, Compilation], tmp_path: Path) -> None:
    name, path, compilation = compiled
    samples = NETS[name][1](12, 77)
    reference = onnxruntime.InferenceSession(str(path))
    wanted = np.concatenate([reference.run(None, s)[0] for s in samples])
    options = {k: v for k, v in NETS[name][2].items() if k != "keep_16"}
    plain = compile_stages(path, "native", NETS[name][1](8), **options)  # type: ignore[arg-type]
    found = []
    for made in (plain, compilation):
        session = Session(made.artifact.save(tmp_path / "net.so"))
        found.append(sqnr_db(np.concatenate([next(iter(session.run(s).values())) for s in samples]), wanted))
    assert found[1] > found[0] + 3, found


def sample_of(compiled: tuple[str, Path, Compilation]) -> dict[str, np.ndarray]:
    return NETS[compiled[0]][1](1, 11)[0]


def exact(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The integers, and the real numbers that are products of an accumulator or sums of two such."""
    return {name: v for name, v in values.items() if v.dtype in (np.int8, np.int16) or name.endswith(("~accumulated", "~added"))}


def same(got: dict[str, np.ndarray], compilation: Compilation, sample: dict[str, np.ndarray]) -> None:
    wanted = exact(interpreter.run(compilation.integer, sample, keep="all"))
    common = exact(got).keys() & wanted.keys()
    for name in common:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)
    types = {wanted[n].dtype for n in common}
    assert len(common) >= 7 and {np.dtype(np.int8), np.dtype(np.int16), np.dtype(np.float32)} <= types


def test_native_is_the_interpreter(compiled: tuple[str, Path, Compilation], tmp_path: Path) -> None:
    session, sample = Session(compiled[2].artifact.save(tmp_path / "net.so"), threads=2), sample_of(compiled)
    assert bit_parity(session, interpreter.run(compiled[2].integer, sample, keep="all"), sample) == []


@pytest.mark.parametrize("target", each(ALL))
@runs_here
def test_x86(target: Target, compiled: tuple[str, Path, Compilation], tmp_path: Path) -> None:
    sample = sample_of(compiled)
    same(on_x86(compiled[2], sample, target, tmp_path)[1], compiled[2], sample)


@pytest.mark.parametrize("name", ARM)
def test_arm(name: str, compiled: tuple[str, Path, Compilation], tmp_path: Path) -> None:
    sample = sample_of(compiled)
    same(on_arm(compiled[2], sample, name, tmp_path)[1], compiled[2], sample)


def test_cuda(compiled: tuple[str, Path, Compilation], tmp_path: Path) -> None:
    sample = sample_of(compiled)
    same(on_cuda(compiled[2], sample, tmp_path), compiled[2], sample)


def test_all_that_can_be_has_16_bits(tmp_path: Path) -> None:
    """What moves a number that is written in 16 bits has them too (the heads of attention), and layers behind it read a copy, or halves. In `verify` the range
    of an input is that of its 16 bits."""
    path, samples = vit(tmp_path / "vit.onnx"), [{"image": s["x"][:, :, :16, :16]} for s in pictures(4)]
    compilation = compile_stages(path, "native", samples, preset="fast", keep_16="*")
    plan = compilation.quantized.plan
    wide = {v for v in plan.edges if (p := plan.params(v)) is not None and p.dtype == "int16"}
    assert "image" in wide and [v for v in wide if v.startswith("reshape") and "~" not in v]
    compilation.artifact.save(tmp_path / "wide.so")
    session = Session(tmp_path / "wide.so")
    assert not bit_parity(session, interpreter.run(compilation.integer, samples[0], keep="all"), samples[0])
    report = verify(session, path, samples, min_sqnr=30, layer_samples=0)
    assert report.passed and not [w for w in report.warnings if "calibration" in w]


def test_names_of_what_has_no_16_bits(tmp_path: Path) -> None:
    path = residual(tmp_path)
    with pytest.raises(PlanError, match=r"no layer is named 'head/\*'"):
        quantize(path, "native", pictures(1), preset="fast", keep_16="head/*")
    with pytest.raises(PlanError, match=r"'op:MaxPool' can't be kept in 16 bits: max_pool2d is an operator with 8 bits only; 16 are for convolutions"):
        quantize(path, "native", pictures(1), preset="fast", keep_16=["op:Add", "op:MaxPool"])


def test_a_layer_that_int32_cannot_hold_stays_float(tmp_path: Path) -> None:
    """127 * 127 of 140,000 products exceed int32, in two halves as in one."""
    net, length = OnnxNet(seed=5), 140_000
    path = net.save(tmp_path / "long.onnx", [net.op("MatMul", net.input("x", 1, length), net.const(np.ones((length, 1))))])
    data = [{"x": np.random.default_rng(0).standard_normal((1, length)).astype(np.float32)}]
    network = quantize(path, "native", data, preset="fast", keep_16="op:MatMul")
    said = Graph.of(network.qdq).attrs["qc.float_ops"]
    assert said and all("beyond int32" in reason for reason in said.values())
