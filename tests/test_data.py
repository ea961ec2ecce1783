"""Samples from arrays, archives, images and iterables, and every way in which they can be wrong."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.base.errors import DataError
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration import data
from qcompiler.calibration.data import at_most, check_sample, load_labels, open_samples, take
from qcompiler.calibration.preprocess import Preprocess, load_preprocess

IMAGE = [TensorInfo("image", (1, 3, 4, 5), "float32")]
TWO = [TensorInfo("a", (1, 2), "float32"), TensorInfo("b", (1, 3), "int64")]
Image = pytest.importorskip("PIL.Image")


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 4, 5)).astype(np.float32)


# -- arrays ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_yields_one_row_per_sample_and_can_be_read_again(tmp_path: Path, save: Any) -> None:
    a, b = np.arange(8, dtype=np.float32).reshape(4, 2), np.arange(12).reshape(4, 3)
    save(tmp_path / "x.npz", a=a, b=b)
    samples = open_samples(tmp_path / "x.npz", TWO)
    assert samples.count == 4
    for _ in range(2):
        got = list(samples)
        assert [list(s) for s in got] == [["a", "b"]] * 4
        np.testing.assert_array_equal(np.concatenate([s["a"] for s in got]), a)
        np.testing.assert_array_equal(np.concatenate([s["b"] for s in got]), b)


def test_two_iterations_may_be_interleaved(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images(3))
    samples = open_samples(tmp_path / "x.npy", IMAGE)
    for first, second in zip(samples, samples, strict=True):
        np.testing.assert_array_equal(first["image"], second["image"])


@pytest.mark.parametrize(
    ("shape", "stored", "samples"),
    [((1, 2), (6, 2), 6), ((3, 2), (6, 2), 2), ((3, 2), (6, 3, 2), 6), ((2,), (6, 2), 6), ((), (6,), 6), ((1, 2), (6, 1, 2), 6)],
)
def test_first_axis_counts_samples(tmp_path: Path, shape: tuple[int, ...], stored: tuple[int, ...], samples: int) -> None:
    x = np.arange(np.prod(stored), dtype=np.float32).reshape(stored)
    np.save(tmp_path / "x.npy", x)
    got = list(open_samples(tmp_path / "x.npy", [TensorInfo("x", shape, "float32")]))
    assert [s["x"].shape for s in got] == [shape] * samples
    np.testing.assert_array_equal(np.concatenate([s["x"].ravel() for s in got]), x.ravel())


def bad_arrays() -> list[Any]:
    nan, inf = images(3), images(3)
    nan[1, 0, 2, 2], inf[2, 1, 0, 0] = np.nan, -np.inf
    return [
        pytest.param({"imago": images(2)}, "unknown input 'imago'.* Did you mean 'image'", id="unknown name"),
        pytest.param({}, "missing input 'image'", id="no array"),
        pytest.param({"image": images(0)}, "input 'image' is empty", id="empty"),
        pytest.param({"image": images(2).astype(np.float64)}, "dtype float64, the model wants float32", id="dtype"),
        pytest.param({"image": images(2)[:, :, :3]}, r"shape \[2, 3, 3, 5\], expected \[samples, 3, 4, 5\]", id="shape"),
        pytest.param({"image": np.float32(3)}, "is empty", id="scalar"),
        pytest.param({"image": nan}, "sample 1: input 'image' holds NaN", id="nan"),
        pytest.param({"image": inf}, "sample 2: input 'image' holds -Inf beside other numbers than 0", id="inf"),
        pytest.param({"image": np.array([{}], object)}, "Python objects", id="pickled"),
        pytest.param({"image": np.asfortranarray(images(2))}, "Fortran order", id="fortran"),
    ]


def test_an_additive_mask_may_hold_minus_infinity() -> None:
    """Nothing but 0 and -Inf is a mask, a row of -Inf alone too; +Inf, or -Inf among other numbers, is a fault."""
    info = [TensorInfo("mask", (2, 3), "float32")]
    mask = np.array([[0, 0, -np.inf], [-np.inf] * 3], np.float32)
    np.testing.assert_array_equal(check_sample({"mask": mask}, info, "sample 0")["mask"], mask)
    for value in (0.5, np.inf, np.nan):
        broken = mask.copy()
        broken[0, 1] = value
        with pytest.raises(DataError, match="sample 0: input 'mask' holds"):
            check_sample({"mask": broken}, info, "sample 0")


@pytest.mark.parametrize(("arrays", "message"), bad_arrays())
def test_bad_npz_is_one_clear_error(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        list(open_samples(tmp_path / "x.npz", IMAGE))
    assert "x.npz" in str(caught.value)


def test_inputs_of_different_lengths(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros((3, 2), np.float32), b=np.zeros((4, 3), np.int64))
    with pytest.raises(DataError, match="different numbers of samples.*'a': 3.*'b': 4"):
        open_samples(tmp_path / "x.npz", TWO)


def test_npy_for_two_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(DataError, match="one input, this one has 2: use an .npz"):
        open_samples(tmp_path / "x.npy", TWO)


def test_files_that_are_not_what_their_name_says(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(DataError, match="can't be read as .npz"):
        open_samples(tmp_path / "text.npz", IMAGE)
    with pytest.raises(DataError, match="can't be read as .npy"):
        open_samples(tmp_path / "text.npy", IMAGE)
    with pytest.raises(DataError, match="unknown kind of data '.csv'"):
        open_samples(tmp_path / "x.csv", IMAGE)
    with pytest.raises(DataError, match="no such file or folder"):
        open_samples(tmp_path / "none.npz", IMAGE)


def test_truncated_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images(3))
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(data[:-100])
    with pytest.raises(DataError, match="the file is truncated: float32.* takes 720 bytes, and 620 are there"):
        list(open_samples(tmp_path / "x.npy", IMAGE))


def test_npz_with_a_damaged_member(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("image.npy", b"\x93NUMPY\x01\x00")
    with pytest.raises(DataError, match="can't be read as .npz"):
        open_samples(tmp_path / "x.npz", IMAGE)


# -- iterables ---------------------------------------------------------------------------------------------------------------------


def test_lists_and_generators_of_samples() -> None:
    listed = [{"image": x[None]} for x in images(3)]
    assert open_samples(listed, IMAGE).count == 3
    generated = open_samples((s for s in listed), IMAGE)
    for _ in range(2):
        assert [s["image"] is t["image"] for s, t in zip(generated, listed, strict=True)] == [True] * 3
    assert open_samples(generated, IMAGE) is generated


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "the data is empty"),
        (iter([]), "the data is empty"),
        (3, "samples are an iterable of .*batches, or a path; got int"),
        (["a"], "batch 0: a sample is a mapping of input names to arrays, a tuple of arrays, or an array, not str"),
        ([{"image": images(1)}, "a"], "sample 1: a sample is a mapping of input names to arrays, not str"),
        ([images(1)[0]], r"sample 0: input 'image' has shape \[3, 4, 5\]"),
        ([()], "batch 0: 0 arrays, and the model has 1 inputs: 'image'"),
        ({"picture": images(1)}, "unknown input 'picture'"),
        ([{"image": images(1)[0]}], r"sample 0: .*shape \[3, 4, 5\].*add the batch axis"),
        ([{"image": images(1)}, {"image": images(1).tolist()}], "sample 1: input 'image' is a list"),
        ([{"image": images(1).astype(np.float64)}], "dtype float64"),
        ([{"image": images(1) * np.inf}], "holds"),
        ([{}], "sample 0: missing input 'image'. The model has: 'image' float32"),
    ],
)
def test_bad_samples_are_one_clear_error(samples: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(open_samples(samples, IMAGE))


# -- images ------------------------------------------------------------------------------------------------------------------------


def photo(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)


def save_photo(path: Path, width: int, height: int) -> np.ndarray:
    pixels = photo(width, height)
    Image.fromarray(pixels).save(path)
    return pixels


def test_formula_order_and_layout(tmp_path: Path) -> None:
    pixels = save_photo(tmp_path / "a.png", 5, 4).astype(np.float64)
    mean, std, scale = (1.0, 2.0, 3.0), (2.0, 4.0, 8.0), 0.5
    expected = (pixels[..., ::-1] * scale - mean) / std  # mean and std are in the order of `color`
    got = Preprocess(color="BGR", scale=scale, mean=mean, std=std)(tmp_path / "a.png")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.transpose(2, 0, 1)[None], rtol=1e-6)
    nhwc = Preprocess(color="BGR", scale=scale, mean=mean, std=std, layout="NHWC")(tmp_path / "a.png")
    np.testing.assert_array_equal(nhwc, got.transpose(0, 2, 3, 1))


def test_resize_scales_the_short_side_and_crop_takes_the_centre(tmp_path: Path) -> None:
    save_photo(tmp_path / "wide.png", 40, 20)
    assert Preprocess(resize=10)(tmp_path / "wide.png").shape == (1, 3, 10, 20)
    assert Preprocess(resize=(8, 6))(tmp_path / "wide.png").shape == (1, 3, 8, 6)
    whole = Preprocess(resize=10)(tmp_path / "wide.png")
    np.testing.assert_array_equal(Preprocess(resize=10, crop=(4, 6))(tmp_path / "wide.png"), whole[:, :, 3:7, 7:13])
    with pytest.raises(DataError, match="20 x 10 pixels after resizing, smaller than the crop 12 x 12"):
        Preprocess(resize=10, crop=12)(tmp_path / "wide.png")


def test_gray(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 5), 100, np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(Preprocess(color="GRAY", mean=99)(tmp_path / "a.png"), np.ones((1, 1, 4, 5), np.float32))


def test_folder_in_order_of_names_with_labels(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name, value in (("b.png", 20), ("a.png", 10), ("sub/c.png", 30)):
        Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    samples = open_samples(folder, IMAGE, Preprocess())
    assert list(samples.names) == ["a.png", "b.png", "sub/c.png"]
    assert samples.count == 3
    for _ in range(2):
        assert [float(s["image"][0, 0, 0, 0]) for s in samples] == [10, 20, 30]
    headed = "wnid\tclass_index\tfile\nn1\t7\tb.png\nn2\t5\ta.png\nn3\t9\tc.png\nn4\t1\tother.png\n"
    (tmp_path / "labels.tsv").write_text(headed)
    assert load_labels(tmp_path / "labels.tsv", samples).tolist() == [5, 7, 9]
    (tmp_path / "bare.tsv").write_text("sub/c.png\t1\nb.png\t2\na.png\t3\n")
    assert load_labels(tmp_path / "bare.tsv", samples).tolist() == [3, 2, 1]
    assert list(samples.spread(2).names) == ["a.png", "b.png"]  # type: ignore[attr-defined]
    assert samples.spread(9).count == 3  # type: ignore[attr-defined]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        open_samples(tmp_path, IMAGE, Preprocess())
    save_photo(tmp_path / "a.png", 5, 4)
    with pytest.raises(DataError, match="needs a preprocessing file"):
        open_samples(tmp_path, IMAGE)
    with pytest.raises(DataError, match=r"preprocessing makes float32\[1, 3, 2, 2\], but input 'image' is float32\[1, 3, 4, 5\]"):
        open_samples(tmp_path, IMAGE, Preprocess(crop=2))
    with pytest.raises(DataError, match="serves a model with one input"):
        open_samples(tmp_path, TWO, Preprocess())
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    with pytest.raises(DataError, match=r"b\.png: can't be read as an image"):
        list(open_samples(tmp_path, IMAGE, Preprocess()))


def test_preprocessing_of_arrays_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images(1))
    with pytest.raises(DataError, match="applies to a folder of images only"):
        open_samples(tmp_path / "x.npy", IMAGE, Preprocess())
    with pytest.raises(DataError, match="applies to a folder of images only"):
        open_samples([{"image": images(1)}], IMAGE, Preprocess())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resise: 3", "unknown key 'resise'. Did you mean 'resize'"),
        ("interpolation: cubic", "interpolation is 'cubic'; supported: nearest, bilinear, bicubic"),
        ("color: rgb", "color is 'rgb'; supported: RGB, BGR, GRAY"),
        ("resize: 0", "resize is 0; expected a number of pixels"),
        ("crop: [1, 2, 3]", "crop is"),
        ("mean: [1, 2]", "mean has 2 values; expected one, or 3"),
        ("std: 0", "std is 0"),
        ("std: [1, 0, 1]", "std is 0"),
        ("scale: 1/0", "expected a number or a fraction"),
        ("scale: wide", "expected a number or a fraction"),
        ("mean: .inf", "expected a finite number"),
        ("mean: [[1], 2, 3]", "expected a number"),
        ("[1, 2]", "expected a mapping"),
        ("a: [", "as YAML"),
        ("crop: [8]", "crop is"),
        ("crop: 100000", "crop is 100000; expected a number of pixels"),
        ("scale: 1e999999999", "expected a finite number"),
        ("scale: 1e400", "expected a finite number"),
        ("mean: 1.0e+300", "beyond the range of float32"),
        ("std: 1.0e-300", "std is 0"),
        ("scale: 1/2/3", "expected a number or a fraction"),
        ("scale: " + "9" * 5000, "expected a number or a fraction|as YAML|finite"),
        ("background: 300", "from 0 to 255"),
        ("[" * 20000, "nested too deeply"),
        ("a: &a [1]\nmean: *a", "uses an alias"),
        ("scale: 2001-99-99", "as YAML"),
    ],
)
def test_bad_preprocessing_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_preprocess(tmp_path / "p.yaml")
    assert "\n" not in str(caught.value)
    assert "p.yaml" in str(caught.value)


def test_missing_preprocessing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml: the preprocessing file can't be read: No such file"):
        load_preprocess(tmp_path / "none.yaml")


def test_shipped_preprocessing_files(root: Path) -> None:
    files = {p.stem: load_preprocess(p) for p in (root / "benchmarks" / "preprocess").glob("*.yaml")}
    assert sorted(files) == ["efficientnet_lite0", "mobilenet_v2", "resnet50"]
    assert files["mobilenet_v2"].scale == pytest.approx(1 / 255)
    assert (files["resnet50"].color, files["resnet50"].mean) == ("BGR", (103.939, 116.779, 123.68))


# -- labels ------------------------------------------------------------------------------------------------------------------------


def test_labels_of_arrays(tmp_path: Path) -> None:
    samples = open_samples([{"image": images(1)}], IMAGE)
    np.save(tmp_path / "y.npy", np.array([4], np.int32))
    assert load_labels(tmp_path / "y.npy", samples).tolist() == [4]
    np.save(tmp_path / "z.npy", np.array([0.5]))
    with pytest.raises(DataError, match="a vector of integers"):
        load_labels(tmp_path / "z.npy", samples)
    (tmp_path / "y.tsv").write_text("a.png\t1\n")
    with pytest.raises(DataError, match="goes with a folder of images or a calibration stored of one; for array data"):
        load_labels(tmp_path / "y.tsv", samples)
    with pytest.raises(DataError, match="can't be read as text: No such file"):
        load_labels(tmp_path / "none.tsv", samples)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no labels"),
        ("b.png\t1\n", "no label for 1 of 1 images, 'a.png' the first"),
        ("a.png\tcat\n", "line 1: expected a file name"),
    ],
)
def test_bad_label_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "images").mkdir()
    save_photo(tmp_path / "images" / "a.png", 5, 4)
    (tmp_path / "y.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_labels(tmp_path / "y.tsv", open_samples(tmp_path / "images", IMAGE, Preprocess()))


def test_at_most_so_many_samples_and_their_labels(tmp_path: Path) -> None:
    inputs = [TensorInfo("x", (1, 2), "float32")]
    np.save(tmp_path / "x.npy", np.arange(20, dtype=np.float32).reshape(10, 2))
    whole = open_samples(tmp_path / "x.npy", inputs)
    few = at_most(whole, 3)
    assert [s["x"][0, 0] for s in few] == [0, 2, 4] and few.count == 3 and at_most(whole, 10) is whole and at_most(whole, None) is whole
    np.testing.assert_array_equal(load_labels(range(10), few), [0, 1, 2])
    endless = open_samples(({"x": np.full((1, 2), i, np.float32)} for i in range(10)), inputs)
    assert len(list(at_most(endless, 4))) == 4
    with pytest.raises(DataError, match="at least 1 is needed"):
        at_most(whole, 0)
    for i in range(6):
        Image.fromarray(np.full((1, 2), i, np.uint8)).save(tmp_path / f"{i}.png")
    spread = at_most(open_samples(tmp_path, [TensorInfo("x", (1, 1, 1, 2), "float32")], {"color": "GRAY"}), 3)
    assert list(spread.names) == ["0.png", "2.png", "4.png"]
    np.testing.assert_array_equal(load_labels(np.arange(6) + 10, spread), [10, 12, 14])


def test_images_fill_batches_and_none_counts_twice(tmp_path: Path) -> None:
    shades = [10 * i for i in range(8)]
    for i, shade in enumerate(shades):
        Image.new("L", (5, 4), shade).save(tmp_path / f"{i}.png")
    settings, info = Preprocess(color="GRAY", scale=1.0), [TensorInfo("image", (3, 1, 4, 5), "float32")]
    samples = open_samples(tmp_path, info, settings)
    assert samples.count == 2 and list(samples.names) == [f"{i}.png" for i in range(6)] and getattr(samples, "left_out") == 2  # noqa: B009
    got = [s["image"] for s in samples]
    assert [x.shape for x in got] == [(3, 1, 4, 5)] * 2
    assert [int(row[0, 0, 0]) for x in got for row in x] == shades[:6]
    pixels = [s["image"] for s in open_samples(tmp_path, [TensorInfo("image", (3, 4, 5, 1), "uint8")], settings, pixels=True)]
    assert [int(row[0, 0, 0]) for x in pixels for row in x] == shades[:6]
    second = take(samples, [1])
    assert [int(row[0, 0, 0]) for s in second for row in s["image"]] == shades[3:6] and list(second.names) == ["3.png", "4.png", "5.png"]
    (tmp_path / "labels.tsv").write_text("".join(f"{i}.png\t{i}\n" for i in range(8)))
    assert load_labels(tmp_path / "labels.tsv", samples).tolist() == load_labels(range(8), samples).tolist() == [0, 1, 2, 3, 4, 5]
    assert load_labels(range(8), second).tolist() == [3, 4, 5]
    with pytest.raises(DataError, match="8 images, and input 'image' takes 9 at a time"):
        open_samples(tmp_path, [TensorInfo("image", (9, 1, 4, 5), "float32")], settings)
    with pytest.raises(DataError, match=r"makes float32\[1, 1, 4, 5\], but input 'image' is float32\[1, 1, 4, 6\], 2 of them at a time"):
        open_samples(tmp_path, [TensorInfo("image", (2, 1, 4, 6), "float32")], settings)


def test_images_are_decoded_once_and_handed_out_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done to an array of one pass is not seen in the next; of more than fits, the first images are kept."""
    for i in range(4):
        Image.new("L", (5, 4), 10 * i).save(tmp_path / f"{i}.png")
    decoded: list[str] = []
    original = Preprocess.pixels
    monkeypatch.setattr(Preprocess, "pixels", lambda self, path: (decoded.append(path.name), original(self, path))[1])
    monkeypatch.setattr(data, "KEPT", 3 * 20)
    for pixels, shape, dtype in ((False, (1, 1, 4, 5), "float32"), (True, (1, 4, 5, 1), "uint8")):
        samples = open_samples(tmp_path, [TensorInfo("image", shape, dtype)], Preprocess(color="GRAY", scale=1.0), pixels=pixels)
        decoded.clear()
        for _ in range(2):
            for number, sample in enumerate(samples):
                assert (sample["image"] == 10 * number).all()
                sample["image"][...] = 99
        list(take(samples, [1, 3]))
        assert sorted(decoded) == ["1.png", "2.png", "3.png", "3.png", "3.png"], "the first was decoded when the folder was opened"
