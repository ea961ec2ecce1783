"""One library for several shapes: equal to a library for each alone, one copy of the weights, and refusals in words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_nets import OnnxNet
from PIL import Image
from test_cpp import CPP, SOURCES, STRICT
from test_cpp import run as call
from transformer_nets import bert, sentences

import qcompiler
from qcompiler import schedules
from qcompiler.backend import bundle as bundles
from qcompiler.backend.build import Built, build
from qcompiler.backend.shared import packed, share
from qcompiler.base.errors import DataError, ModelError, PlanError
from qcompiler.base.shape_table import parse_shape, shape_rows
from qcompiler.base.targets import find_target
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.data import load_labels, take
from qcompiler.calibration.shaped import ShapedSamples
from qcompiler.calibration.stored import open_source
from qcompiler.cli.main import main
from qcompiler.importers.model import FloatModel
from qcompiler.passes.sequence import INTEGER, REPLACE_WEIGHTS, WIDE, run
from qcompiler.pipeline.compile import compile_stages
from qcompiler.pipeline.library import Compilation
from qcompiler.pipeline.shapes import load_all
from qcompiler.pipeline.stages import Measured, quantize
from qcompiler.refine.equalization import equalized_layers
from qcompiler.runtime.session import Session
from qcompiler.runtime.shapes import Fitting
from qcompiler.schedules.conv import ConvRow
from qcompiler.schedules.table import Layout, OpCall, select

LENGTHS = (8, 16, 24)
BATCHES = (1, 3, 4)


def pictures(path: Path) -> Path:
    """image float32 [n, 3, 12, 12] -> logits [n, 5]: padding, a residual sum, pooling with uneven counts, a flattened head."""
    net = OnnxNet(seed=4)
    x = net.op("Relu", net.op("Conv", net.input("image", "n", 3, 12, 12), net.weight(8, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]))
    x = net.op("Relu", net.op("Add", x, net.op("Conv", x, net.weight(8, 8, 3, 3), pads=[1, 1, 1, 1])))
    x = net.op("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    flat = net.op("Reshape", x, net.op("Concat", net.op("Slice", net.op("Shape", x), net.ints(0), net.ints(1)), net.ints(-1), axis=0))
    return net.save(path, [net.op("Add", net.op("MatMul", flat, net.weight(72, 5, spread=0.1)), net.const(np.arange(5)))])


def batch(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(seed).standard_normal((count, 3, 12, 12)).astype(np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="module")
def text(folder: Path) -> tuple[Compilation, Path]:
    """A sentence encoder at three lengths, calibrated at the first, its weights corrected there; the library."""
    model = bert(folder / "bert.onnx", tokens="s")
    made = compile_stages(model, "native", sentences(8, tokens=8), input_shapes={"ids": [(1, n) for n in LENGTHS]}, pad={"ids": 0, "mask": 0})
    return made, made.artifact.save(folder / "bert.so")


@pytest.fixture(scope="module")
def images(folder: Path) -> tuple[Compilation, Path]:
    """A convolutional network at three batches, weights rounded anew."""
    model, shapes = pictures(folder / "pictures.onnx"), {"image": [(n, 3, 12, 12) for n in BATCHES]}
    steps: Any = {"preset": "fast", "enable": ["round-all", "correct-bias"]}
    made = compile_stages(model, "native", [batch(1, s) for s in range(5)], input_shapes=shapes, pad={"image": "repeat"}, **steps)
    return made, made.artifact.save(folder / "pictures.so")


def built_with(made: Compilation, module: Any) -> Built:
    """Code of an integer module of the same network, with the corrections of its weights."""
    built = build(module, made.program.target, "one shape")
    for correction in made.corrected.corrections.values():
        for operand, arrays in correction.operands().items() if correction.kept else ():
            for value_id, array in arrays.items():
                built.replace_operand(value_id, operand, array)
    return built


def equalized(measured: Measured, model: FloatModel) -> FloatModel:
    """The network at a shape that the compilation did not have, with its channels scaled as there."""
    layers = equalized_layers(model.module, measured.equalized.equalization.channels)
    return dataclasses.replace(model, module=run(REPLACE_WEIGHTS, model.module, layers))


def alone(made: Compilation, folder: Path) -> Iterator[Session]:
    """Libraries for each shape, with the same plan and corrections."""
    for number, module in enumerate([made.quantized.integer, *made.quantized.others]):
        yield Session(built_with(made, module).link().save(folder / f"alone{number}.so"))


def test_a_sentence_encoder_equals_libraries_for_each_length(text: tuple[Compilation, Path], tmp_path: Path) -> None:
    made, library = text
    session = Session(library, threads=2)
    for length, single in zip(LENGTHS, alone(made, tmp_path), strict=True):
        for sample in sentences(3, seed=length, tokens=length):
            mine, its = session.run(sample), single.run(sample)
            assert all(mine[name].tobytes() == its[name].tobytes() and mine[name].shape[1] == length for name in its)
        assert single.manifest["constants"] < made.artifact.manifest["constants"]


def test_a_convolutional_network_equals_libraries_for_each_batch(images: tuple[Compilation, Path], tmp_path: Path) -> None:
    made, library = images
    session = Session(library)
    assert any(c.kept for c in made.corrected.corrections.values())
    for count, single in zip(BATCHES, alone(made, tmp_path), strict=True):
        mine, its = session.run(batch(count, 9)), single.run(batch(count, 9))
        assert {k: v.tobytes() for k, v in mine.items()} == {k: v.tobytes() for k, v in its.items()}
        one = np.concatenate([next(iter(session.run({"image": row[None]}).values())) for row in batch(count, 9)["image"]])
        np.testing.assert_array_equal(next(iter(mine.values())), one)  # rows of a batch don't see each other


def test_weights_are_there_once(text: tuple[Compilation, Path]) -> None:
    made, library = text
    manifest = made.artifact.manifest
    programs = made.built.programs
    assert manifest["constants"] < 1.2 * programs[0].constants.size
    added = [entry["constants_added"] for entry in manifest["shapes"]]
    assert all(0 < a < 0.1 * programs[0].constants.size for a in added)  # places, and what else depends on the length
    assert len(made.built.constants) == manifest["constants"] and library.stat().st_size < 2 * manifest["constants"] + 2**20
    assert "steps" in manifest["shapes"][0] and "triple" not in manifest["shapes"][0]
    assert all(m["code_added"] > 1000 for m in (manifest, *manifest["shapes"]))


@pytest.mark.parametrize("name", ["x86-avx512vnni", "x86-avx2", "x86-amx", "arm64-dotprod"])
def test_weights_are_packed_alike_where_that_costs_little(name: str) -> None:
    target, rng, changed = find_target(name), np.random.default_rng(0), 0
    schedules.load(target)
    for size, inputs, outputs in ((7, 160, 960), (14, 64, 384), (14, 96, 160), (28, 192, 64), (3, 64, 80)):
        weight, ones = rng.integers(-127, 128, (outputs, 1, 1, inputs)).astype(np.int8), np.ones(outputs, np.float32)
        attrs = {"strides": [1, 1], "padding": [0] * 4, "dilation": [1, 1], "groups": 1, "x_zero_point": 3, "zero_point": 0, "low": -128, "high": 127}
        ops = []
        for count in (1, 8, 32):
            x, out = (Layout((count, size, size, channels), target.storage) for channels in (inputs, outputs))
            ops.append(OpCall("qc.conv2d", [x, weight, np.zeros(outputs, np.int32), ones], attrs, out, "y"))
        row = select(ops[-1], target)
        if not isinstance(row, ConvRow) or any(select(op, target) is not row for op in ops):
            continue
        own, points = [row.default(op, target) for op in ops], row.alike(ops, target)
        least, costs = ([row.within(op, target, p["blocks"])[0] for op, p in zip(ops, ps, strict=True)] for ps in (own, points))
        assert all(cost <= 1.02 * best for cost, best in zip(costs, least, strict=True))
        if len({p["blocks"] for p in points}) > 1:
            assert points == own
            continue
        changed += points != own
        first, *others = (row.build(op, p, target).constants for op, p in zip(ops, points, strict=True))
        assert all(a.tobytes() == b.tobytes() for other in others for a, b in zip(first, other, strict=True))
    assert changed or name != "x86-avx512vnni"


def test_a_library_for_one_shape_is_as_before(tmp_path: Path) -> None:
    model = pictures(tmp_path / "n.onnx")
    plain = qcompiler.compile(model, calibration=[batch(1)], preset="fast")
    listed = qcompiler.compile(model, calibration=[batch(1)], preset="fast", input_shapes=[{"image": (1, 3, 12, 12)}])
    assert plain.library == listed.library
    assert "shapes" not in plain.manifest


def test_other_shapes_are_refused_with_those_there_are(text: tuple[Compilation, Path]) -> None:
    session = Session(text[1])
    with pytest.raises(DataError, match=r"ids \[1, 25\], mask \[1, 25\] is no shape .*: ids \[1, 8\], mask \[1, 8\]; ids \[1, 16\]"):
        session.run(sentences(1, tokens=25)[0])
    with pytest.raises(DataError, match=r"ids \[1, 8\], mask \[1, 16\] is no shape"):
        session.run({"ids": sentences(1, tokens=8)[0]["ids"], "mask": sentences(1, tokens=16)[0]["mask"]})
    at = session.specializations[1]
    assert [i.shape for i in at.inputs] == [(1, 16), (1, 16)] and [o.shape[1] for o in at.outputs] == [16]
    session.run(sentences(1, tokens=8)[0])  # and goes on


def test_constants_that_part_get_places_of_their_own(text: tuple[Compilation, Path]) -> None:
    """Two shapes share what is equal; when one changes, the other must not."""
    module, other = text[0].quantized.integer, text[0].quantized.others[0]
    built = build(module, text[0].program.target, "two shapes", others=[other])
    step = next(s for s in built.program.steps if s.name == "qc.dense")
    bias = np.asarray(step.op.operands[2])  # type: ignore[union-attr]
    before = built.places.offsets
    built.program.replace_operand(step.writes, 2, bias + 100)  # at one shape alone
    sample = sentences(1, tokens=16)[0]
    after = built.session(1)
    assert built.places.offsets != before and built.places == share(built.programs)
    np.testing.assert_array_equal(packed(built.programs, built.places), built.constants)
    alone = build(other, text[0].program.target, "one shape").session(1)
    assert {k: v.tobytes() for k, v in after.run(sample).items()} == {k: v.tobytes() for k, v in alone.run(sample).items()}


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("ids=1,{16,32}", ("ids", [(1, 16), (1, 32)])),
        ("x={1,8},3,{4,5}", ("x", [(1, 3, 4), (8, 3, 5)])),
        ("a=b=2,", ("a=b", [(2,)])),
        ("s=", ("s", [()])),
    ],
)
def test_shapes_as_words(given: str, wanted: Any) -> None:
    assert parse_shape(given) == wanted


@pytest.mark.parametrize("given", ["ids", "=1", "ids=1,x", "ids={1,2},{1,2,3}", "ids={1,2", "ids=0", "ids={}", "ids=1{2,3}", "ids={1,-2}", "ids=1,,2"])
def test_words_that_are_no_shapes(given: str) -> None:
    with pytest.raises(ValueError, match="expected|invalid literal"):
        parse_shape(given)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"ids": [(1, 8), (1, 16)], "mask": [(1, 8), (1, 16), (1, 24)]}, "vary together.*'ids' has 2, 'mask' has 3"),
        ({"ids": [(1, 8), (1, 8)]}, "given twice"),
        ({"ids": [(1, 8), (8,)]}, "the number of dimensions can't vary"),
        ([{"ids": (1, 8)}, {"mask": (1, 8)}], "every row of input shapes names the same inputs"),
        ({"ids": (1, 2.5)}, "can't be"),
        ({"ids": "1,8"}, "can't be"),
        ([], "input shapes are"),
        (8, "input shapes are"),
    ],
)
def test_tables_that_contradict_themselves(given: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        shape_rows(given)


def test_shapes_that_the_network_can_not_have(folder: Path, text: tuple[Compilation, Path]) -> None:
    model = folder / "bert.onnx"
    cases: list[tuple[Any, str]] = [
        ({"ids": [(1, 8), (1, 100)]}, "node '.*'"),  # more tokens than places
        ({"ids": [(1, 8), (1, 16)], "mask": (1, 8)}, "dimension 1 must be"),
        ({"ids": [(1, 8), (2, 8)]}, "dimension 0 must be 1"),
        ({"words": [(1, 8), (1, 16)]}, "there is no input 'words'"),
        ([{"ids": (1, 8)}, {"ids": (1, 16)}, {"ids": (1, 8)}], "given twice"),
    ]
    for shapes, said in cases:
        with pytest.raises(ModelError, match=said):
            qcompiler.compile(model, calibration=sentences(1, tokens=8), input_shapes=shapes)


def test_a_network_that_is_another_at_another_shape_is_refused(tmp_path: Path) -> None:
    net = OnnxNet(seed=1)
    x = net.input("x", 1, "n")
    length = net.op("Cast", net.op("Shape", x), to=1)  # float32
    weight = net.op("Mul", net.op("Expand", net.op("Slice", length, net.ints(1), net.ints(2)), net.ints(4, 4)), net.weight(4, 4))
    model = net.save(tmp_path / "n.onnx", [net.op("MatMul", net.op("Slice", x, net.ints(0), net.ints(4), net.ints(1)), weight)])
    with pytest.raises(ModelError, match=r"at x \[1, 8\] it is another network than at x \[1, 6\]: the weights of dense '.*' differ"):
        qcompiler.compile(model, calibration=[{"x": np.ones((1, 6), np.float32)}], input_shapes={"x": [(1, 6), (1, 8)]})


def test_a_transpose_is_a_reshape_where_the_batch_is_one(tmp_path: Path) -> None:
    """As before recurrent layers and attention, whichever of the batches is the first."""
    net = OnnxNet(seed=5)
    x = net.op("Transpose", net.input("x", "n", 6, 8), perm=[1, 0, 2])
    states, _ = net.op("GRU", x, net.weight(1, 12, 8), net.weight(1, 12, 4), outputs=2, hidden_size=4)  # [6, 1, n, 4]
    model = net.save(tmp_path / "turned.onnx", [net.op("Transpose", net.op("Squeeze", states, net.ints(1)), perm=[1, 0, 2])])
    samples = [{"x": np.random.default_rng(s).standard_normal((3, 6, 8)).astype(np.float32)} for s in range(3)]
    for batches in ((1, 3), (3, 1)):
        made = compile_stages(model, "native", samples, input_shapes={"x": [(n, 6, 8) for n in batches]}, preset="fast")
        session = Session(made.artifact.save(tmp_path / "turned.so"))
        whole, row = session.run(samples[0]), session.run({"x": samples[0]["x"][:1]})
        for name in whole:
            np.testing.assert_array_equal(whole[name][:1], row[name])


def test_weights_alone_at_several_shapes(folder: Path, text: tuple[Compilation, Path], tmp_path: Path) -> None:
    shapes = {"ids": [(1, n) for n in LENGTHS[:2]]}
    session = Session(qcompiler.compile(folder / "bert.onnx", weights="int8", input_shapes=shapes).save(tmp_path / "w.so"))
    single = Session(qcompiler.compile(folder / "bert.onnx", weights="int8", input_shapes={"ids": (1, 16)}).save(tmp_path / "s.so"))
    sample = sentences(1, tokens=16)[0]
    assert {k: v.tobytes() for k, v in session.run(sample).items()} == {k: v.tobytes() for k, v in single.run(sample).items()}


def test_the_command_line(folder: Path, text: tuple[Compilation, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "c.npz", **{k: np.concatenate([s[k] for s in sentences(3, tokens=8)]) for k in ("ids", "mask")})
    (tmp_path / "t.yaml").write_text("- {ids: [1, 8]}\n- {ids: [1, 16]}\n")
    words = ["compile", str(folder / "bert.onnx"), "--calibration", str(tmp_path / "c.npz"), "--preset", "fast", "--output", str(tmp_path / "b.so")]
    assert main([*words, "--shapes", str(tmp_path / "t.yaml")]) == 0
    assert "16]" in capsys.readouterr().out
    first = (tmp_path / "b.so").read_bytes()
    assert main([*words, "--input-shape", "ids=1,{8,16}"]) == 0
    assert (tmp_path / "b.so").read_bytes() == first  # the same shapes, said in another way
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "b.so")]) == 0
    assert "Shapes: 2" in capsys.readouterr().out
    assert main(["bench", "--json", "--seconds", "0.01", str(tmp_path / "b.so")]) == 0
    assert [d["shape"] for d in json.loads(capsys.readouterr().out)["shapes"]] == ["ids [1, 8], mask [1, 8]", "ids [1, 16], mask [1, 16]"]
    assert main(["bench", "--seconds", "0.01", "--input-shape", "ids=1,16", "--model", str(folder / "bert.onnx"), str(tmp_path / "b.so")]) == 0
    assert "ids [1, 16]" in (out := capsys.readouterr().out) and "ids [1, 8]" not in out
    assert main(["bench", "--input-shape", "ids=1,9", str(tmp_path / "b.so")]) == 2
    assert "ids [1, 9]: the library was compiled for ids [1, 8]" in capsys.readouterr().err
    assert main(["bench", "--json", "--seconds", "0.01", "--batch", "1", str(tmp_path / "b.so")]) == 0
    assert "shapes" in json.loads(capsys.readouterr().out), "every length has the batch 1"
    assert main(["bench", "--batch", "4", str(tmp_path / "b.so")]) == 2
    assert "was not compiled for a batch of 4; it has 1. Compile it for several: --input-shape 'NAME={1,4},...'" in capsys.readouterr().err
    for more, said in (
        (["--input-shape", "ids=1,8", "--input-shape", "ids=1,16"], "--input-shape ids is given twice"),
        (["--state", "ids=a", "--state", "ids=b"], "--state ids is given twice"),
        (["--input-shape", "ids=1,8", "--shapes", str(tmp_path / "t.yaml")], "say it in one of them"),
        (["--shapes", str(tmp_path / "none.yaml")], "can't be read"),
    ):
        (tmp_path / "b.so").unlink(missing_ok=True)
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "b.so").exists()


def test_padding_never_changes_what_belongs_to_the_input(text: tuple[Compilation, Path], tmp_path: Path) -> None:
    """Equal to a library for the very length, with the same plan: bit for bit."""
    made, library = text
    session, job = Session(library), made.quantized.job
    assert made.artifact.manifest["padding"] == {"ids": 0, "mask": 0}
    for length in (3, 8, 9, 17, 23):
        exact = load_all(job.model.origin, [{"ids": (1, length)}])[0]
        exact = dataclasses.replace(exact, module=run(WIDE, exact.module))
        measured = made.quantized.measured
        module = run(INTEGER, quantize(measured, made.quantized.plan, equalized(measured, exact)))
        single = built_with(made, module).session(1)
        for sample in sentences(2, seed=length, tokens=length):
            sample["mask"][0, : length // 2] = 1
            mine, its = session.run(sample), single.run(sample)
            assert {k: (v.shape, v.tobytes()) for k, v in mine.items()} == {k: (v.shape, v.tobytes()) for k, v in its.items()}, length


def test_a_batch_is_padded_with_repeated_rows(images: tuple[Compilation, Path]) -> None:
    session = Session(images[1])
    whole = session.run(batch(4, 7))
    for count in (1, 2, 3, 4):
        part = session.run({"image": batch(4, 7)["image"][:count]})
        assert all(part[name].tobytes() == whole[name][:count].tobytes() for name in whole)


def test_pad_rules_that_do_not_fit(folder: Path, text: tuple[Compilation, Path], images: tuple[Compilation, Path]) -> None:
    lengths: dict[str, Any] = {"ids": [(1, 8), (1, 16)]}
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"ids": 0}, lengths, "input 'mask' varies too, and has no rule"),
        ({"ids": 0, "mask": 0, "words": 1}, lengths, "there is no input 'words'"),
        ({"ids": 0, "mask": 0}, {"ids": (1, 8)}, "at the one shape that is compiled, so nothing of it can be padded"),
        ({"ids": 0.5, "mask": 0}, lengths, "can't be padded with 0.5"),
        ({"ids": "zeros", "mask": 0}, lengths, "can't be padded with 'zeros'; supported: a finite number of that type, or repeat"),
        ({"ids": float("nan"), "mask": 0}, lengths, "can't be padded with nan"),
    ]
    for pad, shapes, said in cases:
        with pytest.raises(ModelError, match=said):
            qcompiler.compile(folder / "bert.onnx", calibration=sentences(1, tokens=8), input_shapes=shapes, pad=pad)
    for tokens in (8, 16):  # whichever shape the samples have
        with pytest.raises(PlanError, match=r"changes what belongs to the input in output .* does not look away from what it is padded with \(ids=0, mask=1\)"):
            qcompiler.compile(folder / "bert.onnx", calibration=sentences(2, tokens=tokens), input_shapes=lengths, pad={"ids": 0, "mask": 1}, preset="fast")


def test_pad_rules_that_nothing_can_be_tried_on(tmp_path: Path) -> None:
    """A network that is quantized already needs no samples, but for its rules."""
    net = OnnxNet(seed=3)
    scale, zero = net.const(np.float32(0.1)), net.const(np.int8(0), "int8")
    x = net.op("DequantizeLinear", net.op("QuantizeLinear", net.input("x", 1, "n"), scale, zero), scale, zero)
    model = net.save(tmp_path / "n.onnx", [net.op("ReduceSum", x, keepdims=1)])
    with pytest.raises(DataError, match="tried on a sample before they are trusted: give calibration data"):
        qcompiler.compile(model, input_shapes={"x": [(1, 4), (1, 8)]}, pad={"x": 0})


def test_an_output_that_can_not_be_cut_back(tmp_path: Path) -> None:
    net = OnnxNet(seed=2)
    model = net.save(tmp_path / "n.onnx", [net.op("Conv", net.input("x", 1, 2, "h", 8), net.weight(3, 2, 3, 3), strides=[2, 2])])
    samples = [{"x": np.ones((1, 2, 9, 8), np.float32)}]
    with pytest.raises(ModelError, match=r"axis 2 of output '.*' has the lengths \[4, 7\], those of no input"):
        qcompiler.compile(model, calibration=samples, input_shapes={"x": [(1, 2, 9, 8), (1, 2, 15, 8)]}, pad={"x": 0})


def test_samples_of_their_own_lengths(folder: Path, text: tuple[Compilation, Path], tmp_path: Path) -> None:
    """Calibration and verification with sentences of several lengths, padded between the shapes; the plan is made where most are."""
    lengths = (16, 8, 11, 16, 13, 16, 5)
    data = [sentences(1, seed=n, tokens=n)[0] for n in lengths]
    (tmp_path / "data").mkdir()
    for number, sample in enumerate(data):
        np.savez(tmp_path / "data" / f"{number}.npz", **sample)
    shapes: dict[str, Any] = {"ids": [(1, n) for n in LENGTHS[:2]]}
    options: dict[str, Any] = {"input_shapes": shapes, "pad": {"ids": 0, "mask": 0}, "preset": "fast"}
    again = qcompiler.compile(folder / "bert.onnx", calibration=tmp_path / "data", **options)
    manifest = again.manifest
    assert manifest["calibration_samples"] == len(lengths) and [p["shape"] for p in manifest["inputs"]] == [[1, 16], [1, 16]]
    report = qcompiler.verify(again, folder / "bert.onnx", data)
    assert report.passed and report.samples == len(lengths) and report.outputs[0].metrics.sqnr_db > 15
    session = Session(again.save(tmp_path / "b.so"))
    assert qcompiler.calibrate(folder / "bert.onnx", tmp_path / "t.qcal", tmp_path / "data", **options).samples == len(lengths)
    passes: list[str] = []
    stored = qcompiler.compile(folder / "bert.onnx", calibration=tmp_path / "t.qcal", progress=lambda stage, *_: passes.append(stage), **options)
    assert stored.library == again.library and "calibrate" not in passes
    kept = open_source(tmp_path / "t.qcal", session.inputs, None, session.fitting)
    assert isinstance(kept, ShapedSamples) and kept.shapes == {0: 5, 1: 2}
    with pytest.raises(DataError, match=r"its samples are for the inputs .*8.*, the model has .*16"):
        qcompiler.compile(folder / "bert.onnx", calibration=tmp_path / "t.qcal", input_shapes={"ids": (1, 16)}, preset="fast")
    given = [open_source(source, session.inputs, None, session.fitting) for source in (data, iter(data), tmp_path / "data")]
    assert [g.count for g in given] == [len(lengths)] * 3 and all(isinstance(g, ShapedSamples) for g in given)
    for one, *others in zip(*given, strict=True):
        assert all(o[n].tobytes() == one[n].tobytes() and o[n].shape == one[n].shape for o in others for n in ("ids", "mask"))
    for wrong, said in (
        ([{"ids": data[0]["ids"], "mask": data[1]["mask"]}], r"sample 0: ids \[1, 16\], mask \[1, 8\] is no shape"),
        (sentences(1, tokens=30), r"sample 0: ids \[1, 30\], mask \[1, 30\] is no shape that this library was compiled for, nor can it be padded"),
        ([{"ids": data[0]["ids"]}], "missing input 'mask'"),
        ([{**data[0], "more": data[0]["ids"]}], "unknown input 'more'"),
        ([data[0]["ids"]], r"sample 0: 1 arrays, and the model has 2 inputs: 'ids', 'mask'"),
        (["a"], "a sample is a mapping"),
        ([{"ids": data[0]["ids"].astype(np.float32), "mask": data[0]["mask"]}], "has dtype float32"),
        ([], "the data is empty"),
    ):
        with pytest.raises(DataError, match=said):
            qcompiler.verify(again, folder / "bert.onnx", wrong)
    np.savez(tmp_path / "data" / "long.npz", **sentences(1, tokens=30)[0])
    with pytest.raises(DataError, match=r"long.npz: ids \[1, 30\], mask \[1, 30\] is no shape"):
        qcompiler.verify(again, folder / "bert.onnx", tmp_path / "data")
    (tmp_path / "data" / "long.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"long.npz: can't be read as .npz"):
        qcompiler.verify(again, folder / "bert.onnx", tmp_path / "data")


def test_a_folder_of_arrays_for_one_shape(tmp_path: Path) -> None:
    inputs = [TensorInfo("image", (1, 3, 12, 12), "float32")]
    for seed in range(3):
        np.savez(tmp_path / f"{seed}.npz", **batch(2, seed))
    rows = [row[None] for seed in range(3) for row in batch(2, seed)["image"]]
    given = open_source(tmp_path, inputs)
    assert given.count == 6 and all(s["image"].tobytes() == row.tobytes() for s, row in zip(given, rows, strict=True))
    assert [s["image"].tobytes() for s in take(given, [4, 1])] == [rows[i].tobytes() for i in (1, 4)]
    np.savez(tmp_path / "x.npz", image=np.zeros((2, 3, 9, 9), np.float32))
    with pytest.raises(DataError, match=r"x.npz: image \[1, 3, 9, 9\] is no shape that this library was compiled for: image \[1, 3, 12, 12\]"):
        open_source(tmp_path, inputs)


def test_images_of_several_sizes(tmp_path: Path) -> None:
    """Statistics from all, corrections from those of the plan's shape; channels per layer are kept apart."""
    net = OnnxNet(seed=6)
    x = net.op("Relu", net.op("Conv", net.input("x", 1, 3, "h", "w"), net.weight(8, 3, 3, 3), pads=[1, 1, 1, 1]))
    x = net.op("Softmax", net.op("Conv", x, net.weight(4, 8, 1, 1)), axis=3)  # a float layer over an axis that varies
    model = net.save(tmp_path / "n.onnx", [net.op("Conv", x, net.weight(4, 4, 3, 3), pads=[1, 1, 1, 1])])
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((1, 3, s, s + 2)).astype(np.float32)} for s in (6, 8, 8, 6, 8)]
    artifact = qcompiler.compile(model, calibration=data, input_shapes={"x": [(1, 3, 6, 8), (1, 3, 8, 10)]}, preset="fast")
    assert artifact.manifest["inputs"][0]["shape"] == [1, 3, 8, 10] and artifact.manifest["calibration_samples"] == 5
    assert qcompiler.verify(artifact, model, data).passed


def test_a_pool_takes_any_shape(text: tuple[Compilation, Path]) -> None:
    session, samples = Session(text[1]), [sentences(1, seed=n, tokens=n)[0] for n in (8, 24, 11, 16, 3)]
    with qcompiler.SessionPool(text[1], streams=2) as pool:
        for sample, future in [(s, pool.submit(s)) for s in samples]:
            mine, its = future.result(), session.run(sample)
            assert {k: (v.shape, v.tobytes()) for k, v in mine.items()} == {k: (v.shape, v.tobytes()) for k, v in its.items()}
        with pytest.raises(DataError, match="is no shape that this library was compiled for"):
            pool.submit(sentences(1, tokens=25)[0])


def test_cpp(text: tuple[Compilation, Path], tmp_path: Path) -> None:
    """C and C++ with sanitizers: every length, compiled or padded, equals Python's answer byte for byte; qc_run too."""
    library, lengths = text[1], (24, 8, 3, 16, 11)
    session = Session(library)
    for length in lengths:
        sample = sentences(1, seed=length, tokens=length)[0]
        for name, array in {**sample, "out": next(iter(session.run(sample).values()))}.items():
            array.tofile(tmp_path / f"{length}.{name}")
    sanitized = ("-std=c++17", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    call("g++", *sanitized, *STRICT, SOURCES / "shapes.cc", "-o", tmp_path / "shapes", "-ldl")
    call(tmp_path / "shapes", library, tmp_path, *map(str, lengths))
    call("g++", "-std=c++17", *STRICT, CPP / "qc_run.cc", "-o", tmp_path / "qc_run", "-ldl")
    for length in (16, 11):
        for name in ("ids", "mask"):
            np.save(tmp_path / f"{name}.npy", np.fromfile(tmp_path / f"{length}.{name}", np.int64)[None])
        call(tmp_path / "qc_run", library, *(w for n in ("ids", "mask") for w in ("--input", f"{n}={tmp_path / n}.npy")), "--output", tmp_path / "out")
        (result,) = (np.load(p) for p in (tmp_path / "out").iterdir())
        assert result.shape[1] == length and result.tobytes() == (tmp_path / f"{length}.out").read_bytes()
    np.save(tmp_path / "ids.npy", np.zeros((1, 99), np.int64))
    refused = call(tmp_path / "qc_run", library, "--input", f"ids={tmp_path / 'ids.npy'}", "--output", tmp_path / "out", ok=2)
    assert "ids [1, 99] is no shape that this library was compiled for, nor can it be padded to one: ids [1, 8], mask [1, 8]" in refused.stderr


def test_a_static_archive_of_several_shapes(text: tuple[Compilation, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions are those of the library, and the bundle's README lists the shapes."""
    monkeypatch.setattr(bundles, "build_runner", lambda path, target: path.write_bytes(b"a runner"))
    bundle = bundles.make_bundle(text[1], tmp_path / "device", static=True)
    assert "[1, 24]" in (bundle.folder / "README.md").read_text()
    (tmp_path / "main.cc").write_text(
        '#include <cstdio>\n#include "qcompiler/model/bert.h"\n#include "qcompiler/qcompiler.hpp"\n'
        'int main() { auto s = qcompiler::Session::linked(qc_library_bert()); s.fit({{"ids", {1, 16}}});\n'
        '  std::printf("%zu %d\\n", s.shapes().size(), static_cast<int>(s.input("mask").shape()[1])); }\n'
    )
    archive = bundle.folder / "lib" / "libbert.a"
    call("g++", "-std=c++17", tmp_path / "main.cc", f"-I{bundle.folder / 'include'}", archive, "-o", tmp_path / "main", "-lpthread", "-ldl")
    assert call(tmp_path / "main").stdout == "3 16\n"


def test_fitting_takes_the_least_padding() -> None:
    def entry(length: int, count: int) -> dict[str, Any]:
        return {"inputs": [{"name": "x", "shape": [count, length], "dtype": "float32"}], "outputs": [{"name": "y", "shape": [count], "dtype": "float32"}]}

    fitting = Fitting({**entry(8, 1), "shapes": [entry(16, 1), entry(16, 4), entry(32, 4)], "padding": {"x": 0}})
    assert fitting.exact({"x": (4, 16)}) == 2 and fitting.exact({"x": (4, 8)}) is None
    assert [fitting.padded({"x": s}) for s in ((1, 3), (1, 9), (2, 9), (1, 17), (4, 33), (5, 1), (0, 4), (1, 2, 3))] == [0, 1, 2, 3, None, None, None, None]
    np.testing.assert_array_equal(fitting.pad("x", np.ones((1, 7), np.float32), 0), [[1] * 7 + [0]])


def test_pictures_keep_their_names_in_batches_and_where_they_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data, stored, table = pictures(tmp_path / "pictures.onnx"), tmp_path / "data", tmp_path / "pictures.qcal", tmp_path / "labels.tsv"
    data.mkdir()
    (settings := tmp_path / "settings.yaml").write_text("scale: 1/255")
    for i in range(7):
        Image.new("RGB", (12, 12), (30 * i, 90, 200 - 20 * i)).save(data / f"{i}.png")
    table.write_text("".join(f"{i}.png\t{i}\n" for i in range(7)))
    shapes = ["--input-shape", "image={2,1},3,12,12"]
    arguments = ["calibrate", str(model), "--data", str(data), "--preprocess", str(settings), "-o", str(stored), "--preset", "fast"]
    assert main([*arguments, *shapes]) == 0
    assert "-o FILE.so (and --input-shape, --preset as here)" in capsys.readouterr().out
    two, one = ({"inputs": [{"name": "image", "shape": (n, 3, 12, 12), "dtype": "float32"}], "outputs": []} for n in (2, 1))
    fitting, info = Fitting({**two, "shapes": [one]}), [TensorInfo("image", (2, 3, 12, 12), "float32")]
    for samples in (open_source(data, info, settings, fitting), open_source(stored, info, fitting=fitting)):
        assert samples.count == 3 and load_labels(table, samples).tolist() == [0, 1, 2, 3, 4, 5]
        assert load_labels(table, take(samples, [0, 2])).tolist() == [0, 1, 4, 5]
