"""Resizing and cropping inside a library: weights, the reference against Pillow, kernels, and whole libraries."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_emulated import Emulated
from test_pixels import BASELINE, TARGETS, load, network
from tools import require_programs

import qcompiler
from qcompiler import schedules
from qcompiler.base.errors import DataError
from qcompiler.base.targets import Target, find_target
from qcompiler.calibration.preprocess import Preprocess
from qcompiler.calibration.resize import Resize, parse_size
from qcompiler.cli.main import main
from qcompiler.numerics.resample import resample, resample_weights
from qcompiler.pipeline.compile import compile_stages
from qcompiler.schedules.harness import fetch, run_kernel
from qcompiler.schedules.table import Kernel, Layout, OpCall, select
from qcompiler.verification import interpreter
from qcompiler.verification.bits import bit_parity

SETTINGS = Preprocess(resize=22, crop=(18, 20), color="BGR", scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SOURCE = (40, 61)


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("source", "resize", "crop"), [((40, 61), 22, (18, 20)), ((120, 160), 64, 56), ((33, 50), (70, 20), (64, 20)), ((7, 9), (7, 30), None)]
)
def test_resizing_inside_is_that_of_pillow(tmp_path: Path, source: tuple[int, int], resize: Any, crop: Any, method: str) -> None:
    image = pytest.importorskip("PIL.Image")
    settings, x = Preprocess(resize=resize, crop=crop, interpolation=method), pixels(1, *source, 3)
    image.fromarray(x[0]).save(tmp_path / "x.png")
    got, made = Resize(settings, source)(x), Resize(settings, source)
    np.testing.assert_array_equal(got[0], settings.pixels(tmp_path / "x.png"))
    assert got.shape[1:3] == made.size and made.back(got).shape == x.shape


def test_weights_keep_what_is_even_and_reach_the_edges() -> None:
    for old, new in ((1, 5), (5, 1), (2, 2), (640, 224), (7, 6), (3, 300)):
        for method in ("bilinear", "bicubic"):
            first, weights = resample_weights(old, new, method)
            assert np.abs(weights.sum(1) - (1 << 22)).max() <= weights.shape[1] and np.abs(weights).sum(1).max() * 255 < 2**31 - 2**21
            assert min(first) >= 0 and max(first) + weights.shape[1] <= old
            flat = resample(np.full((1, old), 201, np.uint8), axis=1, first=first, weights=weights.reshape(-1))
            assert (flat == 201).all()
    with pytest.raises(ValueError, match="'nearest' is not supported; supported: bilinear, bicubic"):
        resample_weights(4, 2, "nearest")


def cases(target: Target) -> list[tuple[np.ndarray, np.ndarray, Layout, Kernel]]:
    """(pixels, what the reference makes of them, how that lies in memory, a kernel)."""
    schedules.load(target)
    found = []
    for shape, axis, new, method in [
        ((2, 9, 31, 3), 1, 4, "bilinear"),
        ((1, 9, 31, 3), 2, 50, "bicubic"),
        ((1, 8, 70, 1), 2, 9, "bilinear"),
        ((1, 5, 23, 1), 1, 7, "bicubic"),
        ((3, 6, 5, 4), 1, 11, "bicubic"),
    ]:
        x = pixels(*shape)
        x[0, :4, :5] = [0, 255][axis % 2]  # overshoot of a bicubic edge is clipped
        first, weights = resample_weights(shape[axis], new, method)
        attrs = {"axis": axis, "first": first, "weights": weights.reshape(-1).tolist()}
        wanted = resample(x, **attrs)
        output = Layout(wanted.shape, "uint8")
        call = OpCall("qc.resample", [Layout(shape, "uint8")], attrs, output, "node")
        found.append((x, wanted, output, select(call, target).build(call, {}, target)))
    return found


def raw(stored: np.ndarray, output: Layout) -> np.ndarray:
    """Pixels, which no storage shifts."""
    return fetch(stored, output).view(np.uint8) ^ 128


@pytest.mark.parametrize("target", [*TARGETS, BASELINE], ids=lambda t: t.name)
def test_kernels_equal_the_reference(target: Target) -> None:
    for x, wanted, output, kernel in cases(target):
        np.testing.assert_array_equal(raw(run_kernel(kernel, [x.reshape(-1)], output, target), output), wanted)


@pytest.mark.parametrize("name", ["cuda-sm75", "cuda-sm90"])
def test_kernels_on_a_gpu(name: str, tmp_path: Path) -> None:
    require_programs("g++")
    target = find_target(name)
    made = cases(target)
    emulated = Emulated({f"k{i}": kernel for i, (*_, kernel) in enumerate(made)}, target, tmp_path)
    for i, (x, wanted, output, _) in enumerate(made):
        np.testing.assert_array_equal(raw(emulated.run(f"k{i}", [x.reshape(-1)], output), output), wanted)


def test_a_library_that_resizes_gives_what_the_float_input_of_the_same_pixels_gives(tmp_path: Path) -> None:
    model, resize = network(tmp_path / "m.onnx", batch="n"), Resize(SETTINGS, SOURCE)
    samples = [{"image": pixels(1, *SOURCE, 3, seed=i)} for i in range(6)]
    floats = [{"image": SETTINGS.laid_out(SETTINGS.normalized(resize(s["image"])))} for s in samples]
    shapes: dict[str, Any] = {"input_shapes": {"image": [(1, 3, 18, 20), (2, 3, 18, 20)]}, "preset": "fast"}
    plain = load(qcompiler.compile(model, calibration=floats, **shapes), tmp_path, "plain.so")
    options: dict[str, Any] = {"input_types": {"image": "uint8"}, "preprocess": SETTINGS, "resize_inside": "40x61", "pad": {"image": "repeat"}, "selftest": 1}
    made = compile_stages(model, calibration=samples, **shapes, **options)
    library = load(made.artifact, tmp_path, "resized.so")
    library.selftest()
    assert [i.shape for at in library.specializations for i in at.inputs] == [(1, *SOURCE, 3), (2, *SOURCE, 3)]
    for sample, same in zip(samples, floats, strict=True):
        got, wanted = library.run(sample), plain.run(same)
        for name in wanted:
            np.testing.assert_array_equal(got[name], wanted[name])
        assert not bit_parity(library, interpreter.run(made.integer, sample, keep="all"), sample)
    seen: set[str] = set()
    library.trace(samples[0], lambda name, array: seen.add(f"{array.dtype} {array.shape[1:3]}"))
    assert {"uint8 (18, 20)", "uint8 (40, 61)"} < seen
    report = qcompiler.verify(library, model, samples, min_sqnr=12)
    assert report.passed and report.imported is not None and report.imported.failure is None


def test_pictures_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    for folder, size in (("cal", (30, 25)), ("same", (64, 48))):
        (tmp_path / folder).mkdir()
        for i in range(3):
            image.fromarray(pixels(size[1], size[0], 3, seed=i)).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "p.yaml").write_text("resize: 22\ncrop: [18, 20]\nscale: 1/255\n")
    model, so, data = str(network(tmp_path / "m.onnx", tail=False)), str(tmp_path / "m.so"), ["--preprocess", str(tmp_path / "p.yaml")]
    words = ["compile", model, "--calibration", str(tmp_path / "cal"), *data, "--preset", "fast", "--input-type", "image=uint8", "-o", so]
    assert main([*words, "--resize-inside", "48x64"]) == 0  # calibrated on pictures of any size
    assert main(["verify", so, "--model", model, "--data", str(tmp_path / "same"), *data, "--min-sqnr", "12"]) == 0
    capsys.readouterr()
    assert main(["run", so, str(tmp_path / "same" / "0.png"), *data]) == 0
    assert main(["run", so, str(tmp_path / "cal" / "0.png"), *data]) == 2
    assert "has 25 x 30 pixels; the library resizes such of 48 x 64 itself" in capsys.readouterr().err
    assert main(["verify", so, "--model", model, "--data", str(tmp_path / "cal"), *data]) == 2
    (tmp_path / "p.yaml").write_text("resize: 30\ncrop: [18, 20]\nscale: 1/255\n")
    assert main(["verify", so, "--model", model, "--data", str(tmp_path / "same"), *data]) == 2
    assert "resize 30, the library has 22" in capsys.readouterr().err


def test_what_can_not_be_resized_inside_is_refused(tmp_path: Path) -> None:
    model, floats = network(tmp_path / "m.onnx"), [{"image": np.zeros((1, 3, 18, 20), np.float32)}]
    uint8 = {"image": "uint8"}
    for options, text in [
        ({"resize_inside": "40x61"}, "it goes with an input type of uint8"),
        ({"resize_inside": "40x61", "input_types": uint8, "preprocess": None}, "without preprocessing"),
        ({"resize_inside": "40", "input_types": uint8}, "resize_inside is '40'; expected the height and width of the pixels that come in, such as 480x640"),
        ({"resize_inside": "0x61", "input_types": uint8}, "each from 1 to 65536"),
        ({"resize_inside": (40, -1), "input_types": uint8}, "each from 1 to 65536"),
        ({"resize_inside": (65536, 65536), "input_types": uint8}, "65536 x 65536 are 4294967296; at most 134217728 are supported"),
        ({"resize_inside": "", "input_types": uint8}, "expected the height and width"),
        ({"resize_inside": "40x61", "input_types": uint8, "preprocess": dataclasses.replace(SETTINGS, resize=None, crop=None)}, "neither resize nor crop"),
        (
            {"resize_inside": "40x61", "input_types": uint8, "preprocess": dataclasses.replace(SETTINGS, interpolation="nearest")},
            "supported: bilinear, bicubic",
        ),
        ({"resize_inside": "40x61", "input_types": uint8, "preprocess": dataclasses.replace(SETTINGS, resize=10)}, "smaller than the crop 18 x 20"),
        ({"resize_inside": "40x61", "input_types": uint8, "preprocess": dataclasses.replace(SETTINGS, crop=12)}, "make 12 x 12 of pixels of 40 x 61"),
    ]:
        with pytest.raises(DataError, match=re.escape(text)):
            qcompiler.compile(model, calibration=floats, **{"preprocess": SETTINGS, **options})
    with pytest.raises(DataError, match="resize_inside is for libraries"):
        qcompiler.export_onnx(model, tmp_path / "q.onnx", floats, resize_inside="40x61")
    assert parse_size(" 480X640 ") == (480, 640)
