"""Pixels and integers at a network's edges: kernels, the pass, and whole libraries."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_emulated import TARGET as GPU
from cuda_emulated import Emulated
from emulated import ARM
from emulated_kernels import Prepared, run_prepared
from onnx_nets import OnnxNet
from tools import require_programs, require_target

import qcompiler
from qcompiler import schedules
from qcompiler.backend.lowering import Step
from qcompiler.base.errors import DataError, ModelError
from qcompiler.base.host import host_architecture
from qcompiler.base.targets import Target, find_target, missing_features
from qcompiler.calibration.preprocess import Preprocess
from qcompiler.cli.main import main
from qcompiler.numerics import operators as numerics
from qcompiler.pipeline.compile import compile_stages
from qcompiler.runtime.session import Session
from qcompiler.schedules.harness import fetch, run_kernel
from qcompiler.schedules.portable.pixels import lines
from qcompiler.schedules.table import KERNELS, Layout, OpCall, select
from qcompiler.verification import interpreter
from qcompiler.verification.bits import bit_parity

TARGETS = list({t.name: t for t in (find_target("x86-avx2"), find_target("native")) if not missing_features(t)}.values())
BASELINE = dataclasses.replace(TARGETS[0], name="baseline", tvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"}, features=())
schedules.load(TARGETS[0])


def straight(channels: int, seed: int = 0, out_dtype: str = "int8") -> np.ndarray:
    """Tables as scale, mean and std make them."""
    rng = np.random.default_rng(seed)
    mean, std = rng.uniform(0.2, 0.8, channels).astype(np.float32), (rng.uniform(0.05, 0.3, channels) * rng.choice([-1, 1], channels)).astype(np.float32)
    values = (np.arange(256, dtype=np.float32)[:, None] * np.float32(1 / 255) - mean) / std
    return numerics.quantize(values.T, scale=0.031, zero_point=-7, out_dtype=out_dtype)


def crooked(channels: int) -> np.ndarray:
    return np.random.default_rng(5).integers(-128, 128, (channels, 256)).astype(np.int8)


def run(target: Target, x: np.ndarray, table: np.ndarray, attrs: dict[str, Any], storage: str, out: dict[str, Any]) -> np.ndarray:
    expected = numerics.pixels(x, table, **attrs)
    output = Layout(expected.shape, storage if expected.dtype == np.int8 else str(expected.dtype), **out)
    op = OpCall("qc.pixels", [Layout(x.shape, "uint8"), table], attrs, output, "node")
    kernel = KERNELS["qc.pixels"][0].build(op, {}, target)
    return fetch(run_kernel(kernel, [x.reshape(-1)], output, target), output)


@pytest.mark.parametrize("storage", ["int8", "uint8"])
@pytest.mark.parametrize("target", [*TARGETS, BASELINE], ids=lambda t: t.name)
def test_pixels_equal_the_reference(target: Target, storage: str) -> None:
    rng = np.random.default_rng(1)
    for shape, channels, out in [
        ((1, 9, 31, 3), [0, 1, 2], {"pitch": 4, "halo": (1, 2, 3, 1)}),
        ((2, 5, 16, 3), [2, 1, 0], {"pitch": 4}),
        ((1, 8, 5, 3), [0, 1, 2], {"pitch": 4}),
        ((1, 7, 23, 3), [0, 1, 2], {}),
        ((1, 6, 40, 1), [0], {}),
        ((2, 6, 40, 1), [0], {"halo": (1, 1, 1, 1)}),
        ((1, 4, 19, 3), [0, 1, 2], {"pitch": 16, "halo": (0, 0, 1, 1)}),
        ((1, 3, 21, 3), [1, 1], {"pitch": 8}),
    ]:
        x = rng.integers(0, 256, shape).astype(np.uint8)
        for table in (straight(len(channels)), crooked(len(channels))):
            got = run(target, x, table, {"channels": channels}, storage, out)
            np.testing.assert_array_equal(got, numerics.pixels(x, table, channels=channels))


@pytest.mark.parametrize("target", [*TARGETS, BASELINE], ids=lambda t: t.name)
def test_pixels_become_floats_and_wide_integers_and_are_transposed(target: Target) -> None:
    x = np.random.default_rng(2).integers(0, 256, (2, 6, 17, 3)).astype(np.uint8)
    floats = np.random.default_rng(3).standard_normal((3, 256)).astype(np.float32)
    for table in (floats, straight(3, out_dtype="int16"), straight(3)):
        for attrs in ({"channels": [2, 0, 1]}, {"channels": [0, 1, 2], "axes": [0, 3, 1, 2]}):
            np.testing.assert_array_equal(run(target, x, table, attrs, "uint8", {}), numerics.pixels(x, table, **attrs))


def test_lines_are_found_for_what_preprocessing_makes_and_for_nothing_crooked() -> None:
    found = [lines(straight(3, seed)) for seed in range(20)]
    assert sum(f is not None for f in found) >= 19
    assert lines(np.full((1, 256), 127, np.int8)) is not None
    assert lines(crooked(1)) is None
    almost = straight(1, 3).copy()
    almost[0, 100] += 1 if almost[0, 100] < 127 else -1
    assert lines(almost) is None


def cases(target: Target) -> dict[str, tuple[OpCall, np.ndarray, np.ndarray]]:
    """Operator, what lies in its input, and what it must give: tables of every type, and integers of the user's in another storage than the target's."""
    rng = np.random.default_rng(8)
    x, q = rng.integers(0, 256, (1, 5, 37, 3)).astype(np.uint8), rng.integers(-128, 128, (1, 3, 4, 9)).astype(np.int8)
    floats = rng.standard_normal((3, 256)).astype(np.float32)
    found = {}
    for name, table, attrs in (
        ("straight", straight(3), {"channels": [2, 1, 0]}),
        ("crooked", crooked(3), {"channels": [0, 1, 2]}),
        ("wide", straight(3, out_dtype="int16"), {"channels": [0, 1, 2]}),
        ("floats", floats, {"channels": [0, 1, 2], "axes": [0, 3, 1, 2]}),
    ):
        want = numerics.pixels(x, table, **attrs)
        out = {"pitch": 4, "halo": (1, 2, 0, 1)} if name == "straight" else {}
        layout = Layout(want.shape, target.storage if want.dtype == np.int8 else str(want.dtype), **out)
        found[name] = OpCall("qc.pixels", [Layout(x.shape, "uint8"), table], attrs, layout, name), x, want
    entered = numerics.enter(q, axes=[0, 2, 3, 1])
    found["enter"] = OpCall("qc.enter", [Layout(q.shape, "int8")], {"axes": [0, 2, 3, 1]}, Layout(entered.shape, target.storage), "enter"), q, entered
    stored = (q.astype(np.int16) + 128).astype(np.uint8) if target.storage == "uint8" else q
    for dtype in ("int8", "uint8"):
        want = numerics.leave(q, dtype=dtype)
        found[dtype] = OpCall("qc.leave", [Layout(q.shape, target.storage)], {"dtype": dtype}, Layout(q.shape, dtype), dtype), stored, want
    return found


def as_stored(want: np.ndarray, layout: Layout) -> np.ndarray:
    """What `fetch` makes of a result: uint8 of the user's is q + 128 there too."""
    return (want ^ 128).view(np.int8) if want.dtype == np.uint8 else want


@pytest.mark.parametrize("name", ARM)
def test_edges_on_arm(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    require_target(target)
    schedules.load(target)
    prepared = []
    for label, (op, x, want) in cases(target).items():
        kernel = select(op, target).build(op, {}, target)
        step, inputs = Step(label, op, op.name, kernel, [f"{label}~0"]), {f"{label}~0": (op.tensors[0], x.reshape(-1))}
        prepared.append(Prepared(step, inputs, op.output, as_stored(want, op.output), None))
    run_prepared(prepared, target, tmp_path)


def test_edges_on_a_gpu(tmp_path: Path) -> None:
    require_programs("g++")
    schedules.load(GPU)
    made = cases(GPU)
    emulated = Emulated({f"k_{label}": select(op, GPU).build(op, {}, GPU) for label, (op, _, _) in made.items()}, GPU, tmp_path)
    for label, (op, x, want) in made.items():
        np.testing.assert_array_equal(fetch(emulated.run(f"k_{label}", [x.reshape(-1)], op.output), op.output), as_stored(want, op.output))


# -- whole libraries ------------------------------------------------------------------------------------------------------------------------


def network(path: Path, batch: int | str = 1, layout: str = "NCHW", tail: bool = True) -> Path:
    """image -> convolutions -> logits, and beside them a sum of the image's own float numbers."""
    net = OnnxNet()
    x = net.input("image", *((batch, 3, 18, 20) if layout == "NCHW" else (batch, 18, 20, 3)))
    planes = x if layout == "NCHW" else net.op("Transpose", x, perm=[0, 3, 1, 2])
    y = net.op("Relu", net.op("Conv", planes, net.weight(8, 3, 3, 3), net.weight(8), strides=[2, 2], pads=[1, 1, 1, 1]))
    y = net.op("Flatten", net.op("GlobalAveragePool", net.op("Conv", y, net.weight(6, 8, 3, 3))))
    outputs = [net.op("Gemm", y, net.weight(6, 5), net.weight(5))]
    if tail:
        outputs.append(net.op("ReduceMean", net.op("Cos", x), axes=[2, 3], keepdims=0))
    return net.save(path, outputs)


SETTINGS = Preprocess(color="BGR", scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def pictures(count: int, batch: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    return [{"image": rng.integers(0, 256, (batch, 18, 20, 3)).astype(np.uint8)} for _ in range(count)]


def real(sample: dict[str, np.ndarray], settings: Preprocess = SETTINGS) -> dict[str, np.ndarray]:
    return {"image": settings.laid_out(settings.normalized(sample["image"]))}


def load(artifact: Any, folder: Path, name: str) -> Session:
    return Session(artifact.save(folder / name))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_pixels_give_what_the_float_input_of_the_same_pixels_gives(tmp_path: Path, layout: str) -> None:
    model, settings = network(tmp_path / "m.onnx", layout=layout), dataclasses.replace(SETTINGS, layout=layout)
    samples = pictures(6)
    floats = [real(s, settings) for s in samples]
    plain = load(qcompiler.compile(model, calibration=floats, preset="fast"), tmp_path, "plain.so")
    made = compile_stages(model, calibration=samples, input_types={"image": "uint8"}, preprocess=settings, preset="fast")
    library = load(made.artifact, tmp_path, "pixels.so")
    assert [(i.shape, i.dtype) for i in library.inputs] == [((1, 18, 20, 3), "uint8")]
    for sample, same in zip(samples, floats, strict=True):
        got, wanted = library.run(sample), plain.run(same)
        for name in wanted:
            np.testing.assert_array_equal(got[name], wanted[name])
        assert not bit_parity(library, interpreter.run(made.integer, sample, keep="all"), sample)
    assert {s["op"] for s in library.manifest["steps"]} >= {"qc.pixels"}
    report = qcompiler.verify(library, model, samples, min_sqnr=15)
    assert report.passed and report.imported is not None and report.imported.failure is None


def test_pixels_are_found_in_every_kind_of_compilation(tmp_path: Path) -> None:
    """An accuracy target judges several plans, `accurate` two: each by float inputs, and the library that is left takes pixels."""
    model, samples = network(tmp_path / "m.onnx", tail=False), pictures(8)
    for options in ({"min_sqnr": 5.0}, {"preset": "accurate"}):
        artifact = qcompiler.compile(model, calibration=samples, input_types={"image": "uint8"}, preprocess=SETTINGS, **options)
        assert artifact.manifest["inputs"][0]["dtype"] == "uint8"
        assert qcompiler.verify(load(artifact, tmp_path, "t.so"), model, samples).passed


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_integers_at_the_edges_are_the_float_numbers_rounded(tmp_path: Path, dtype: str) -> None:
    model = network(tmp_path / "m.onnx")
    floats = [real(s) for s in pictures(6)]
    plain = load(qcompiler.compile(model, calibration=floats, preset="fast"), tmp_path, "plain.so")
    names = [o.name for o in plain.outputs]
    made = compile_stages(model, calibration=floats, input_types={"image": "int8"}, output_types=dict.fromkeys(names, dtype), preset="fast")
    library = load(made.artifact, tmp_path, "integers.so")
    port = library.manifest["inputs"][0]
    scale, zero = port["scale"], port["zero_point"]
    for sample in floats:
        stored = numerics.quantize(sample["image"], scale=scale, zero_point=zero)
        got = library.run({"image": stored})
        wanted = plain.run({"image": numerics.dequantize(stored, scale=scale, zero_point=zero)})
        for out in library.manifest["outputs"]:
            offset = 128 if dtype == "uint8" else 0
            q = numerics.quantize(wanted[out["name"]], scale=out["scale"], zero_point=out["zero_point"] - offset)
            assert got[out["name"]].dtype == dtype
            np.testing.assert_array_equal(got[out["name"]].astype(int), q.astype(int) + offset)
        assert not bit_parity(library, interpreter.run(made.integer, {"image": stored}, keep="all"), {"image": stored})
    assert qcompiler.verify(library, model, floats, min_sqnr=10).passed


def test_an_output_that_only_views_a_float_value_has_its_range(tmp_path: Path) -> None:
    net = OnnxNet(seed=2)
    share = net.op("Softmax", net.op("MatMul", net.input("x", 1, 12), net.weight(12, 8)), axis=1)
    out = net.op("Unsqueeze", net.op("Reshape", share, net.ints(4, 2)), net.ints(0))
    model = net.save(tmp_path / "m.onnx", [out])
    samples = [{"x": np.random.default_rng(s).standard_normal((1, 12)).astype(np.float32)} for s in range(4)]
    library = load(qcompiler.compile(model, calibration=samples, output_types={out: "uint8"}, preset="fast"), tmp_path, "m.so")
    assert (library.outputs[0].shape, library.outputs[0].dtype) == ((1, 4, 2), "uint8")
    assert qcompiler.verify(library, model, samples, min_sqnr=20).passed


def test_pixels_and_integers_at_several_shapes(tmp_path: Path) -> None:
    """At every batch, compiled or padded: what a library with float inputs and outputs makes of the same pixels. Samples may be of any of them."""
    model, rng = network(tmp_path / "m.onnx", batch="n", tail=False), np.random.default_rng(11)
    samples = [s for count in (3, 1, 3, 2) for s in pictures(1, count)]
    for sample in samples:
        sample["image"] = rng.integers(0, 256, sample["image"].shape).astype(np.uint8)
    shapes: dict[str, Any] = {
        "input_shapes": {"image": [(1, 3, 18, 20), (3, 3, 18, 20)]},
        "pad": {"image": "repeat"},
        "preset": "fast",
        "enable": ["correct-bias"],
    }
    options: dict[str, Any] = {"input_types": {"image": "uint8"}, "output_types": {"gemm5": "uint8"}, "preprocess": SETTINGS}
    made = compile_stages(model, calibration=samples, **shapes, **options)
    library = load(made.artifact, tmp_path, "pixels.so")
    assert [[i.shape for i in at.inputs] for at in library.specializations] == [[(3, 18, 20, 3)], [(1, 18, 20, 3)]]
    (out,) = library.manifest["outputs"]
    for sample in samples:
        got = library.run(sample)[out["name"]]
        assert got.dtype == np.uint8 and got.shape == (len(sample["image"]), 5)
        one = [library.run({"image": row[None]})[out["name"]] for row in sample["image"]]
        np.testing.assert_array_equal(got, np.concatenate(one))
    for sample, module in zip(samples[:2], [made.integer, *made.corrected.others], strict=True):
        assert not bit_parity(library, interpreter.run(module, sample, keep="all"), sample)
    floats = [{"image": np.concatenate([s["image"], s["image"][-1:]])} if len(s["image"]) == 2 else s for s in samples]  # as the compiler pads them
    plain = load(qcompiler.compile(model, calibration=[real(s) for s in floats], **shapes), tmp_path, "plain.so")
    for sample in samples:
        wanted = plain.run(real(sample))["gemm5"]
        q = numerics.quantize(wanted, scale=out["scale"], zero_point=out["zero_point"] - 128)
        np.testing.assert_array_equal(library.run(sample)["gemm5"], q.astype(int) + 128)
    (tmp_path / "data").mkdir()
    for number, sample in enumerate(samples):
        np.savez(tmp_path / "data" / f"{number}.npz", **sample)
    report = qcompiler.verify(library, model, tmp_path / "data", min_sqnr=12)
    assert report.passed and report.samples >= len(samples)


def test_images_are_fed_as_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(3)
    for i in range(7):
        image.fromarray(rng.integers(0, 256, (25, 30, 3)).astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "p.yaml").write_text("resize: [20, 24]\ncrop: [18, 20]\ncolor: BGR\nscale: 1/255\nmean: [0.5, 0.4, 0.3]\nstd: 0.25\n")
    (tmp_path / "q.yaml").write_text((tmp_path / "p.yaml").read_text().replace("0.25", "0.5"))
    model, so = network(tmp_path / "m.onnx", batch=2), str(tmp_path / "m.so")
    data = ["--preprocess", str(tmp_path / "p.yaml")]
    assert (
        main(["compile", str(model), "--calibration", str(tmp_path / "images"), *data, "--preset", "fast", "--input-type", "image=uint8", "--output", so]) == 0
    )
    assert "the last 1 images make no whole batch" in capsys.readouterr().err
    assert main(["verify", so, "--model", str(model), "--data", str(tmp_path / "images"), *data, "--min-sqnr", "12"]) == 0
    said = capsys.readouterr().out
    assert "Outputs, 3 samples" in said and "the last 1 images make no whole batch" in said
    assert main(["bench", so, "--model", str(model), "--data", str(tmp_path / "images"), *data, "--seconds", "0.05"]) == 0
    assert main(["verify", so, "--model", str(model), "--data", str(tmp_path / "images"), "--preprocess", str(tmp_path / "q.yaml")]) == 2
    assert "std 0.5, the library has 0.25" in capsys.readouterr().err
    assert main(["verify", so, "--model", str(model), "--data", str(tmp_path / "images"), *data, "--report", str(tmp_path / "r.html")]) == 0
    single = str(tmp_path / "one.so")
    words = [
        "compile",
        str(network(tmp_path / "one.onnx", tail=False)),
        "--calibration",
        str(tmp_path / "images"),
        *data,
        "--preset",
        "fast",
        "--output-type",
        "gemm5=uint8",
    ]
    assert main([*words, "--input-type", "image=uint8", "-o", single]) == 0
    capsys.readouterr()
    assert main(["run", single, str(tmp_path / "images" / "0.png"), *data, "--json"]) == 0
    top = next(iter(json.loads(capsys.readouterr().out)["top"].values()))
    assert [row["value"] for row in top] == sorted((row["value"] for row in top), reverse=True) and min(row["value"] for row in top) < 0
    assert main(["inspect", so]) == 0
    assert "pixels R, G, B; BGR" in capsys.readouterr().out


def test_ports_that_can_not_be_are_refused(tmp_path: Path) -> None:
    model, floats = network(tmp_path / "m.onnx"), [real(s) for s in pictures(2)]
    for options, text in [
        ({"input_types": {"image": "uint8"}}, "without preprocessing"),
        ({"input_types": {"imago": "uint8"}}, "no such input. Did you mean 'image'"),
        ({"input_types": {"image": "int4"}}, "type 'int4' is not supported; supported: uint8, int8"),
        ({"output_types": {"logits": "int8"}}, "no such output"),
        ({"input_types": {"image": "uint8"}, "preprocess": Preprocess(color="GRAY")}, "C = 1"),
        ({"input_types": {"image": "uint8"}, "preprocess": Preprocess(layout="NHWC")}, "C = 3"),
        ({"input_types": {"image": "uint8"}, "preprocess": Preprocess(scale=3e38)}, "NaN or Inf"),
    ]:
        with pytest.raises(DataError, match=re.escape(text)):
            qcompiler.compile(model, calibration=floats, **options)
    net = OnnxNet()
    x, h = net.input("x", 1, 4), net.input("h", 1, 4)
    after = net.op("Tanh", net.op("Add", net.op("MatMul", x, net.weight(4, 4)), h))
    kept, zeros = net.save(tmp_path / "state.onnx", [after, net.op("Neg", after)]), np.zeros((1, 4), np.float32)
    for types in ({"input_types": {"h": "int8"}}, {"output_types": {after: "int8"}}):
        with pytest.raises(DataError, match="is a state, which stays inside of sessions"):
            qcompiler.compile(kept, calibration=[{"x": zeros, "h": zeros}], state={"h": after}, **types)
    wide = OnnxNet()
    many = wide.save(tmp_path / "shapes.onnx", [wide.op("MatMul", wide.input("x", "n", 4), wide.weight(4, 4))])
    shaped: dict[str, Any] = {"input_shapes": [{"x": (1, 4)}, {"x": (2, 4)}], "input_types": {"x": "int8"}}
    with pytest.raises(ModelError, match="input 'x' takes int8 numbers, whose scale calibration finds, and can't be padded with 0; supported: repeat"):
        qcompiler.compile(many, calibration=[{"x": zeros}], pad={"x": 0}, **shaped)
    with pytest.raises(DataError, match="an ONNX model keeps its inputs and outputs in float32"):
        qcompiler.export_onnx(model, tmp_path / "q.onnx", floats, output_types={"gemm5": "int8"})
    with pytest.raises(DataError, match="dtype float32, the model wants uint8"):
        qcompiler.compile(model, calibration=floats, input_types={"image": "uint8"}, preprocess=SETTINGS)


@pytest.mark.skipif(host_architecture() != "x86_64", reason="the runner is compiled for x86-64 hosts")
def test_the_runner_takes_pixels_and_hands_out_integers(tmp_path: Path) -> None:
    require_programs("g++")
    samples = pictures(3)
    model = network(tmp_path / "m.onnx", tail=False)
    options: dict[str, Any] = {"input_types": {"image": "uint8"}, "output_types": {"gemm5": "uint8"}, "preprocess": SETTINGS, "preset": "fast"}
    library = load(qcompiler.compile(model, calibration=samples, **options), tmp_path, "m.so")
    cpp, runner = Path(qcompiler.__file__).parent / "runtime" / "cpp", tmp_path / "qc_run"
    subprocess.run(["g++", "-std=c++17", "-O0", f"-I{cpp / 'include'}", str(cpp / "qc_run.cc"), "-o", str(runner), "-ldl", "-lpthread"], check=True)
    np.save(tmp_path / "x.npy", samples[0]["image"])
    subprocess.run([runner, library.path, "--input", f"image={tmp_path / 'x.npy'}", "--output", tmp_path / "out"], check=True)
    found = np.load(tmp_path / "out" / "gemm5.npy")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, library.run(samples[0])["gemm5"])
