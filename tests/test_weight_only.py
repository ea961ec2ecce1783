"""Weights in 8 and 4 bits beside float activations: exact dequantization, kernels against numerics, the whole path, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cuda_emulated import TARGET as CUDA
from cuda_emulated import Emulated
from fake_cuda import FakeGpu
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case
from onnx import TensorProto, helper, numpy_helper
from tools import require_nvcc

import qcompiler
from qcompiler import schedules
from qcompiler.base.errors import ModelError, PlanError
from qcompiler.base.targets import Target, find_target, missing_features
from qcompiler.cli.main import main
from qcompiler.numerics import operators as numerics
from qcompiler.numerics.weight_only import WeightScheme, quantize_weight
from qcompiler.runtime.library import read_manifest
from qcompiler.runtime.session import Session
from qcompiler.schedules.cuda import weight_only as gpu
from qcompiler.schedules.harness import fetch, run_kernel, store
from qcompiler.schedules.portable.weight_only import pack_weights
from qcompiler.schedules.table import Kernel, Layout, OpCall, select

BIG = 3.4028234663852886e38
PLAIN_CUDA = find_target("cuda-sm75")  # whose tensor cores know no bfloat16
TARGETS = [t for t in map(find_target, ("x86-avx512vnni", "x86-avx2")) if not missing_features(t)]


# -- quantization ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_dequantization_is_one_product(bits: int, symmetric: bool) -> None:
    """w = f32(f32(q - z) * s), over groups that K is no multiple of; q and z fit their bits; the error is at most half a scale where nothing is clipped."""
    rng = np.random.default_rng(bits)
    weight = (rng.standard_normal((7, 70)) * 10.0 ** rng.integers(-6, 6, (7, 1))).astype(np.float32)
    got = quantize_weight(weight, WeightScheme(bits, 32, symmetric))
    assert got.q.dtype == got.zero_point.dtype == np.int8 and got.scale.dtype == np.float32
    assert got.scale.shape == got.zero_point.shape == (7, 3) and (got.scale > 0).all()
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    assert low <= got.q.min() and got.q.max() <= high and low <= got.zero_point.min() and got.zero_point.max() <= high
    assert symmetric == (not got.zero_point.any())
    for n, k in np.ndindex(weight.shape):
        one = np.float32(np.float32(int(got.q[n, k]) - int(got.zero_point[n, k // 32])) * got.scale[n, k // 32])
        assert one == got.real()[n, k]
    inside = (got.q > low) & (got.q < high)
    assert inside.mean() > 0.5
    assert (np.abs(got.real() - weight) <= 0.5001 * np.repeat(got.scale, 32, axis=1)[:, :70])[inside].all()


def test_a_group_may_be_longer_than_any_row() -> None:
    weight = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
    endless, one = (quantize_weight(weight, WeightScheme(4, size, False)) for size in (1 << 40, 24))
    np.testing.assert_array_equal(endless.real(), one.real())
    x, limits = np.ones((1, 20), np.float32), {"low": -BIG, "high": BIG}
    operands = (x, one.q, one.zero_point, one.scale, np.zeros(3, np.float32))
    got, wanted = (numerics.OPERATORS["qc.f32.dense_weight_only"](*operands, bits=4, group_size=size, **limits) for size in (1 << 40, 24))
    np.testing.assert_array_equal(got, wanted)


def test_more_bits_and_zero_points_and_smaller_groups_lose_less() -> None:
    weight = (np.random.default_rng(0).standard_normal((64, 256)) + 0.7).astype(np.float32)

    def error(bits: int, size: int, symmetric: bool) -> float:
        return float(np.square(quantize_weight(weight, WeightScheme(bits, size, symmetric)).real() - weight).sum())

    assert error(8, 64, True) < error(4, 64, False) < error(4, 64, True) < error(4, 256, True)
    rough = WeightScheme(4, 64, True)
    plain = weight.reshape(64, 4, 64)
    scale = np.abs(plain).max(axis=-1, keepdims=True) / 7
    assert error(4, 64, True) < np.square(np.rint(plain / scale) * scale - plain).sum()  # scales that clip a little win
    assert rough.size(64, 256) == 64 * 128 + 64 * 4 * 4


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_extreme_weights(bits: int, symmetric: bool) -> None:
    """Groups of zeros, of one value, of the largest and the smallest floats stay finite, and what can be exact is."""
    weight = np.zeros((5, 16), np.float32)
    weight[1], weight[2, 3], weight[3], weight[4] = 2.5, -BIG, 1e-45, np.linspace(0, BIG, 16)
    got = quantize_weight(weight, WeightScheme(bits, 8, symmetric)).real()
    assert np.isfinite(got).all() and (got[0] == 0).all() and (got[2] != 0).sum() == 1
    assert np.allclose(got[1], 2.5, rtol=0.08) and np.abs(got[2, 3] / BIG + 1) < 0.3
    with pytest.raises(ModelError, match="dense 'layer': its weights are not finite"):
        quantize_weight(np.array([[1, np.inf]], np.float32), WeightScheme(bits), "layer")


@pytest.mark.parametrize(("weights", "size", "message"), [
    ("int5", None, "can't be stored as 'int5'; supported: int8, int4"),
    ("float", 64, "supported: int8, int4"),
    ("int4", 0, "a group of 0 weights"),
    ("int4", -8, "a group of -8 weights"),
    ("int8", 12, "a multiple of 8"),
    ("int8", 7.5, "a multiple of 8"),
    ("int8", True, "a multiple of 8"),
])  # fmt: skip
def test_schemes_that_do_not_exist(weights: str, size: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        WeightScheme.of(weights, size)


def test_packing_keeps_every_weight() -> None:
    q = np.random.default_rng(0).integers(-8, 8, (5, 7)).astype(np.int8)
    packed = pack_weights(q, 4, 4).reshape(2, 4, 4)  # [tile][pair][output]
    for n, k in np.ndindex(q.shape):
        assert (int(packed[n // 4, k // 2, n % 4]) >> 4 * (k % 2) & 15) - 8 == q[n, k]
    assert np.array_equal(pack_weights(q, 8, 4).reshape(2, 7, 4).transpose(0, 2, 1).reshape(8, 7)[:5], q)


# -- kernels --------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """A dense layer on random data, with what its kernels read and write."""

    lead: tuple[int, ...]
    outputs: int
    inputs: int
    scheme: WeightScheme
    residual: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        weight = (rng.standard_normal((self.outputs, self.inputs)) + 0.2).astype(np.float32)
        self.grouped = quantize_weight(weight, self.scheme)
        self.x = rng.standard_normal((*self.lead, self.inputs)).astype(np.float32)
        self.bias = rng.standard_normal(self.outputs).astype(np.float32)
        self.more = [rng.standard_normal((*self.lead, self.outputs)).astype(np.float32)] if self.residual else []
        self.attrs = {"bits": self.scheme.bits, "group_size": self.scheme.group_size, "low": -0.5 if self.residual else -BIG, "high": BIG}
        layouts = [Layout(a.shape, "float32") for a in (self.x, *self.more)]
        self.output = Layout((*self.lead, self.outputs), "float32")
        self.inputs_stored = [store(a, layout) for a, layout in zip((self.x, *self.more), layouts, strict=True)]
        self.constants = self.grouped.q, self.grouped.zero_point, self.grouped.scale, self.bias
        self.op = OpCall("qc.f32.dense_weight_only", [layouts[0], *self.constants, *layouts[1:]], self.attrs, self.output)

    def case(self) -> Case:
        """For whoever runs all cases of all kernels."""
        return Case(self.op.name, [self.x, *self.constants, *self.more], self.attrs, constants=(1, 2, 3, 4), tolerance=1e-4)

    def kernel(self, target: Target, **params: int) -> Kernel:
        schedules.load(target)
        row = select(self.op, target)
        return row.build(self.op, row.default(self.op, target) | params, target)

    def check(self, stored: np.ndarray) -> None:
        """The sums lie within the rounding of any order of summation: (K + 8) * 2^-24 of the sum of magnitudes."""
        got, g = fetch(stored, self.output), self.grouped
        want = numerics.f32_dense_weight_only(self.x, *self.constants, *self.more, **self.attrs)
        size = min(self.scheme.group_size, self.inputs)
        offset, scale = (np.repeat(a, size, axis=1)[:, : self.inputs] for a in (np.abs(g.zero_point.astype(np.float64)) + 8, g.scale))
        largest = (np.abs(g.q.astype(np.float64)) + offset) * scale
        magnitude = np.abs(self.x).astype(np.float64) @ largest.T + np.abs(self.bias) + sum(np.abs(m) for m in self.more)
        assert (np.abs(got - want) <= (self.inputs + 8) * 2.0**-24 * magnitude).all()


LAYERS = [
    Layer((1,), 64, 128, WeightScheme(8, 64, True)),
    Layer((1,), 70, 131, WeightScheme(4, 64, True)),
    Layer((5,), 33, 131, WeightScheme(4, 32, False), residual=True),
    Layer((3,), 5, 7, WeightScheme(8, 8, False)),
    Layer((2, 3), 130, 200, WeightScheme(8, 128, False), residual=True),
    Layer((1, 2, 2), 17, 9, WeightScheme(4, 8, False)),
    Layer((2,), 8, 1, WeightScheme(4, 64, True)),
    Layer((1,), 1, 4096, WeightScheme(4, 4096, True)),
    Layer((1,), 2048, 512, WeightScheme(4, 64, False)),  # more than one task
    Layer((19,), 12, 1000, WeightScheme(4, 1 << 40, False)),
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_kernel(target: Target, number: int) -> None:
    layer = LAYERS[number]
    layer.check(run_kernel(layer.kernel(target), layer.inputs_stored, layer.output, target))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 90), st.sampled_from([8, 4]), st.sampled_from([8, 16, 64]), st.booleans(), st.integers(0, 99))
def test_kernel_of_any_shape(rows: int, outputs: int, inputs: int, bits: int, size: int, symmetric: bool, seed: int) -> None:
    layer, target = Layer((rows,), outputs, inputs, WeightScheme(bits, size, symmetric), seed=seed), find_target("x86-avx2")
    layer.check(run_kernel(layer.kernel(target), layer.inputs_stored, layer.output, target))


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """Each layer by the heuristic and with every number of warps."""
    kernels = {f"k{i}_{w}": layer.kernel(PLAIN_CUDA, **({"warps": w} if w else {})) for i, layer in enumerate(LAYERS) for w in (0, 1, 2, 4, 8)}
    assert {k.row for k in kernels.values()} == {"cuda/f32.dense_weight_only"}
    return Emulated(kernels, PLAIN_CUDA, tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_cuda(number: int, on_gpu: Emulated) -> None:
    layer = LAYERS[number]
    for warps in (0, 1, 2, 4, 8):
        layer.check(on_gpu.run(f"k{number}_{warps}", layer.inputs_stored, layer.output))


MANY = {  # rows for tensor cores: (layer, points of the design space)
    "eight": (Layer((40,), 64, 128, WeightScheme(8, 64, True)), ({}, {"rows": 32, "warps": 4})),
    "eight_zeros": (Layer((2, 17), 132, 100, WeightScheme(8, 32, False), residual=True), ({}, {"rows": 32, "warps": 2})),
    "four": (Layer((9,), 12, 1000, WeightScheme(4, 1 << 40, True)), ({}, {"warps": 1})),
    "four_zeros": (Layer((3, 11), 68, 260, WeightScheme(4, 64, False), residual=True), ({}, {"rows": 32, "warps": 8})),
    "least": (Layer((70,), 4, 32, WeightScheme(4, 32, False)), ({}, {"rows": 32})),
}


def test_cuda_of_many_rows(tmp_path: Path) -> None:
    """Activations as three bfloat16 each: sums keep the bound, though tensor cores cut them off, and what is infinite or no number goes where it belongs."""
    kernels = {f"{name}_{i}": layer.kernel(CUDA, **point) for name, (layer, points) in MANY.items() for i, point in enumerate(points)}
    assert {k.row for k in kernels.values()} == {"cuda-mma/f32.dense_weight_only"}
    emulated = Emulated(kernels, CUDA, tmp_path)
    for name, (layer, points) in MANY.items():
        for i in range(len(points)):
            layer.check(emulated.run(f"{name}_{i}", layer.inputs_stored, layer.output))
    layer = MANY["eight"][0]
    x = layer.x.copy()
    x[3, 7], x[5, 99], x[9], x[11] = np.inf, np.nan, x[9] * np.float32(2.0**100), x[11] * np.float32(2.0**-90)
    with np.errstate(invalid="ignore"):
        want = numerics.f32_dense_weight_only(x, *layer.constants, **layer.attrs)
    got = fetch(emulated.run("eight_1", [store(x, layer.op.tensors[0])], layer.output), layer.output)
    assert np.isnan(got[5]).all() and np.isinf(got[3]).sum() > 50 and np.array_equal(np.clip(got[3], -BIG, BIG), want[3], equal_nan=True)
    np.testing.assert_allclose(np.delete(got, (3, 5), 0), np.delete(want, (3, 5), 0), rtol=1e-4, atol=1e-4)


def test_which_layers_go_to_tensor_cores() -> None:
    """Those with more rows than wait for the weights, of whole words, whose groups no step of the reduction straddles, on GPUs that know bfloat16."""

    def row(layer: Layer, target: str = "cuda-sm80") -> str:
        return layer.kernel(find_target(target)).row

    few, many = "cuda/f32.dense_weight_only", "cuda-mma/f32.dense_weight_only"
    scheme = WeightScheme(4, 64, False)
    assert [row(Layer((rows,), 64, 128, scheme)) for rows in (1, 8, 9, 300)] == [few, few, many, many]
    assert [row(Layer((64,), 64, 128, WeightScheme(4, size, True))) for size in (24, 32, 40, 1 << 40)] == [few, many, few, many]
    assert [row(Layer((64,), 64, inputs, scheme)) for inputs in (28, 32, 130, 132)] == [few, many, few, many]
    assert [row(Layer((64,), outputs, 64, scheme)) for outputs in (66, 68)] == [few, many]
    assert [row(Layer((64,), 64, 64, scheme), target) for target in ("cuda-sm75", "cuda-sm90a")] == [few, many]


@pytest.mark.parametrize("bits", [4, 8])
def test_tensor_cores_read_weights_exactly(bits: int, tmp_path: Path) -> None:
    """One activation, of all 24 bits, and zeros: a result is the float32 of its product with a weight less its zero point."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    rng = np.random.default_rng(bits)
    q, zero = rng.integers(low, high + 1, (68, 64)).astype(np.int8), rng.integers(low, high + 1, (68, 2)).astype(np.int8)
    q[:, :2], zero[:34] = [low, high], high
    x = np.eye(64, dtype=np.float32) * rng.uniform(1, 2, (64, 1)).astype(np.float32)
    layer = Layer((64,), 68, 64, WeightScheme(bits, 32, False))
    layer.op.operands[1:5] = [q, zero, np.ones((68, 2), np.float32), np.zeros(68, np.float32)]
    got = fetch(Emulated({"k": layer.kernel(CUDA)}, CUDA, tmp_path).run("k", [store(x, layer.op.tensors[0])], layer.output), layer.output)
    exact = np.diag(x).astype(np.float64)[:, None] * (q.astype(int) - np.repeat(zero.astype(int), 32, axis=1)).T
    assert np.abs(got - exact).max() <= 2.0**-24 * 27 * 512 and (np.abs(got - exact) <= 2.0**-23 * 3 * np.abs(exact)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_cuda_reads_weights_exactly(bits: int, tmp_path: Path) -> None:
    """One activation of 1, all others 0: a result is its weight, to the bit, whatever the weight's place in its word."""
    everything = np.arange(-(1 << (bits - 1)), 1 << (bits - 1))
    q = np.resize(everything, (1, 32 * len(everything))).astype(np.int8)[:, ::-1]
    x = np.eye(q.shape[1], dtype=np.float32)[:256]
    s = gpu.Sizes(len(x), 1, q.shape[1], bits, 64, 8)
    words = gpu.pack_weights(np.ascontiguousarray(q), s).view(np.uint32).reshape(s.words, 4)[:, 0]
    fields = (words[:, None] >> (np.arange(s.per_word, dtype=np.uint32) * bits) & ((1 << bits) - 1)).astype(int) - (1 << (bits - 1))
    assert np.array_equal(fields.reshape(-1), q[0])
    layer = Layer((len(x),), 1, q.shape[1], WeightScheme(bits, 64))
    layer.op.operands[1:5] = [q, np.zeros((1, s.groups), np.int8), np.ones((1, s.groups), np.float32), np.zeros(1, np.float32)]
    got = Emulated({"k": layer.kernel(PLAIN_CUDA)}, PLAIN_CUDA, tmp_path).run("k", [store(x, layer.op.tensors[0])], layer.output)
    assert np.array_equal(fetch(got, layer.output)[:, 0], q[0, :256])


# -- the whole path -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [3, 48] -> Gemm 100 -> Relu -> MatMul 100 -> + x1 -> Gemm 10."""
    rng = np.random.default_rng(4)
    shapes = {"w1": (100, 48), "b1": (100,), "w2": (100, 100), "w3": (100, 10), "b3": (10,)}
    weights = [numpy_helper.from_array((rng.standard_normal(s) / 7).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["h1"]),
        helper.make_node("MatMul", ["h1", "w2"], ["m"]),
        helper.make_node("Add", ["m", "h1"], ["h2"]),
        helper.make_node("Gemm", ["h2", "w3", "b3"], ["y"], name="last"),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, size]) for name, size in (("x", 48), ("y", 10))]
    graph = helper.make_graph(nodes, "mlp", ports[:1], ports[1:], weights)
    path = tmp_path_factory.mktemp("mlp") / "mlp.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(("weights", "floor"), [("int8", 38), ("int4", 17)])
def test_compile_verify_inspect(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str, floor: float) -> None:
    library = tmp_path / "mlp.so"
    assert main(["compile", str(model), "--weights", weights, "--group-size", "32", "--asymmetric", "--output", str(library)]) == 0
    assert f"weights as {weights}, asymmetric, groups of 32: 3 layers" in capsys.readouterr().out
    account = read_manifest(library)["weights"]
    assert [(r["id"], r["shape"]) for r in account["layers"]] == [("h1", [100, 48]), ("h2", [100, 100]), ("y", [10, 100])]
    assert all(r["bytes"] < r["float_bytes"] / (3 if weights == "int8" else 4.5) and r["sqnr_db"] > floor for r in account["layers"])
    np.save(tmp_path / "x.npy", np.random.default_rng(1).standard_normal((6, 3, 48)).astype(np.float32))
    report = ["verify", str(library), "--model", str(model), "--data", str(tmp_path / "x.npy"), "--min-sqnr", str(floor - 4)]
    assert main(report) == 0, capsys.readouterr().out
    assert "PASSED" in capsys.readouterr().out
    assert main(["inspect", str(library)]) == 0
    printed = capsys.readouterr().out
    assert "qc.f32.dense_weight_only" in printed and "SQNR of weights dB" in printed and "100 x 48" in printed


def test_results_are_those_of_the_dequantized_weights(model: Path, tmp_path: Path) -> None:
    artifact = qcompiler.compile(model, weights="int4", group_size=32, keep_float=["last"])
    assert qcompiler.compile(model, weights="int4", group_size=32, keep_float=["last"]).digest == artifact.digest
    assert [r["id"] for r in artifact.manifest["weights"]["layers"]] == ["h1", "h2"]
    w = {t.name: numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer}
    x = np.random.default_rng(2).standard_normal((3, 48)).astype(np.float32)
    real = {name: quantize_weight(a, WeightScheme(4, 32)).real() for name, a in (("w1", w["w1"]), ("w2", w["w2"].T))}
    h1 = np.maximum(x @ real["w1"].T + w["b1"], 0)
    want = (h1 @ real["w2"].T + h1) @ w["w3"] + w["b3"]
    got = Session(artifact.save(tmp_path / "m.so")).run({"x": x})["y"]
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max() + 1e-5


def test_explain(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(model), "--weights", "int4", "--json"]) == 0
    account = json.loads(capsys.readouterr().out)["weights"]
    assert (account["dtype"], account["group_size"], account["symmetric"], len(account["layers"])) == ("int4", 64, True, 3)
    assert main(["explain", str(model), "--weights", "int4"]) == 0
    assert "weights as int4, symmetric, groups of 64: 3 layers" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "message"), [
    (["--weights", "int5"], "supported: int8, int4"),
    (["--weights", "int4", "--group-size", "0"], "a group of 0 weights is not supported"),
    (["--weights", "int4", "--calibration", "x.npy"], "need no calibration; leave it out"),
    (["--weights", "int4", "--preset", "fast", "--min-sqnr", "20"], "need no min_sqnr, preset; leave them out"),
    (["--group-size", "32", "--calibration", "x.npy"], "group_size describes the option weights, which is not given"),
    (["--asymmetric", "--calibration", "x.npy"], "asymmetric describes the option weights"),
    ([], "calibration data is needed"),
])  # fmt: skip
def test_refusals(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["compile", str(model), "--output", str(tmp_path / "m.so"), *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_dense_layers_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "relu.onnx")
    with pytest.raises(PlanError, match="no Gemm or MatMul with constant weights"):
        qcompiler.compile(tmp_path / "relu.onnx", weights="int8")
    with pytest.raises(PlanError, match="rules for padding are tried on calibration data .* leave pad out"):
        qcompiler.compile(tmp_path / "relu.onnx", weights="int8", pad={"x": 0})


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_network_on_a_gpu(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    """Its results lie as close to the CPU library's as two orders of summation do; the manifests say the same of the weights."""
    require_nvcc()
    options = {"weights": weights, "group_size": 32, "asymmetric": True}
    gpu_ = FakeGpu.record(tmp_path, monkeypatch)
    on_gpu = qcompiler.compile(model, target="cuda-sm80", **options)
    on_cpu = qcompiler.compile(model, **options)
    assert on_gpu.manifest["weights"] == on_cpu.manifest["weights"] and "nvcc" in on_gpu.manifest["compiler"]
    assert {s["kernel"] for s in on_gpu.manifest["steps"]} >= {"cuda/f32.dense_weight_only"}
    gpu_.emulate()
    x = np.random.default_rng(2).standard_normal((3, 48)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    code = "import sys, numpy as np; from qcompiler import load; np.save(sys.argv[3], load(sys.argv[1]).run({'x': np.load(sys.argv[2])})['y'])"
    done = gpu_.python(code, on_gpu.save(tmp_path / "gpu.so"), tmp_path / "x.npy", tmp_path / "y.npy")
    assert done.returncode == 0, done.stderr
    want = Session(on_cpu.save(tmp_path / "cpu.so")).run({"x": x})["y"]
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, rtol=1e-5, atol=1e-5)
