"""Files that are no plain files, are damaged, or say more than is true: one clear error each, in a moment. And outputs that are inputs."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qcompiler.base.errors import DataError, ModelError, OutputError, QCompilerError
from qcompiler.base.files import check_writable, new_folder, replacing, temporary_folder
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.arrays import read_array
from qcompiler.calibration.data import load_labels, open_samples
from qcompiler.calibration.preprocess import Preprocess, load_preprocess
from qcompiler.cli.main import main
from qcompiler.importers.onnx_file import read
from qcompiler.runtime.session import Session

INPUTS = [TensorInfo("x", (1, 4), "float32")]


def samples_of(path: Path) -> list[dict[str, np.ndarray]]:
    return list(open_samples(path, INPUTS))


# -- pipes and devices ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("x.npz", samples_of),
        ("x.npy", samples_of),
        ("x.npy", read_array),
        ("x.npy", lambda path: load_labels(path, open_samples([{"x": np.zeros((1, 4), np.float32)}], INPUTS))),
        ("x.tsv", lambda path: load_labels(path, open_samples([{"x": np.zeros((1, 4), np.float32)}], INPUTS))),
        ("x.png", Preprocess()),
        ("x.yaml", load_preprocess),
        ("x.onnx", read),
        ("x.so", Session),
    ],
)  # fmt: skip
def test_pipes_are_refused(tmp_path: Path, name: str, reader: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(QCompilerError, match="is a pipe or a device"):
        reader(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(QCompilerError, match="is a pipe or a device"):
        reader(tmp_path / name)


@pytest.mark.parametrize(
    "reader",
    [samples_of, load_preprocess, read, Session, lambda path: check_writable(path), lambda path: new_folder(path).__enter__()],
)  # fmt: skip
def test_names_that_are_too_long(tmp_path: Path, reader: Callable[[Path], object]) -> None:
    with pytest.raises(QCompilerError, match="File name too long"):
        reader(tmp_path / ("n" * 300))


# -- arrays ------------------------------------------------------------------------------------------------------------------------------------


def npz(path: Path, compressed: bool = True) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, x=np.arange(80, dtype=np.float32).reshape(20, 4))
    return path


def patched(path: Path, at: int, data: bytes) -> Path:
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)
    return path


def test_damaged_npz(tmp_path: Path) -> None:
    stored = npz(tmp_path / "stored.npz", compressed=False)
    with pytest.raises(DataError, match="can't be read as .npz: Bad CRC-32"):
        samples_of(patched(stored, 300, b"\xff\xff"))
    with pytest.raises(DataError, match="can't be read as .npz"):  # zlib
        samples_of(patched(npz(tmp_path / "packed.npz"), 60, b"\xff" * 20))
    flags = npz(tmp_path / "secret.npz").read_bytes()
    central = flags.index(b"PK\x01\x02")
    patched(tmp_path / "secret.npz", 6, b"\x01\x00")
    with pytest.raises(DataError, match="encrypted"):
        samples_of(patched(tmp_path / "secret.npz", central + 8, b"\x01\x00"))
    patched(npz(tmp_path / "method.npz"), 8, b"\x63\x00")
    with pytest.raises(DataError, match="compression"):
        samples_of(patched(tmp_path / "method.npz", central + 10, b"\x63\x00"))


def test_odd_names_in_an_npz(tmp_path: Path) -> None:
    data = (npz(tmp_path / "plain.npz"), zipfile.ZipFile(tmp_path / "plain.npz"))[1].read("x.npy")

    def made(*names: str) -> Path:
        with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
            for name in names:
                archive.writestr(name, data)
        return tmp_path / "odd.npz"

    assert len(samples_of(made("x"))) == 20  # without .npy, as some writers have it
    with pytest.raises(DataError, match="two arrays called 'x'"):
        samples_of(made("x", "x.npy"))
    with pytest.raises(DataError, match=r"unknown input '\.\./x'"):
        samples_of(made("../x.npy"))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }", "the file is truncated"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 4), }", "header is damaged"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 4), }", "header is damaged"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (3, 4), }", "Python objects"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4), }", "."),
        ("{'descr': 'what', 'fortran_order': False, 'shape': (3, 4), }", "."),
        ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3, 4), }", "dtype"),
        ("((((((", "."),
        ("[" * 5000, "."),
        ("{", "."),
        ("", "."),
    ],
)
def test_headers_of_npy(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64))
    with pytest.raises(DataError, match=message):
        samples_of(path)
    if "dtype" not in message:
        with pytest.raises(DataError):
            read_array(path)


def test_labels(tmp_path: Path) -> None:
    samples = open_samples([{"x": np.zeros((1, 4), np.float32)}], INPUTS)
    np.save(tmp_path / "large.npy", np.array([2**63], np.uint64))
    np.save(tmp_path / "negative.npy", np.array([-1]))
    for name in ("large", "negative"):
        with pytest.raises(DataError, match="class indices count from 0"):
            load_labels(tmp_path / f"{name}.npy", samples)
    for given in (["a"], [1.5], [[1, 2]], [[1], [2, 3]], [10**30], 5):
        with pytest.raises(DataError, match="a vector of integers"):
            load_labels(given, samples)  # type: ignore[arg-type]


# -- images -------------------------------------------------------------------------------------------------------------------------------------


def test_sixteen_bit_grey(tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 32896], [65535, 65000, 40000, 12345]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    wanted = np.rint(values / 257)
    assert (Preprocess(color="GRAY")(tmp_path / "x.png")[0, 0] == wanted).all()
    assert (Preprocess()(tmp_path / "x.png")[0] == wanted).all()


def test_an_image_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    assert (Preprocess(layout="NHWC")(tmp_path / "x.png")[0] == np.rot90(pixels, -1)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_background(tmp_path: Path, mode: str) -> None:
    pixels = np.full((2, 2, 4), 40, np.uint8)
    pixels[..., 3] = [[255, 0], [255, 0]]
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.new("P", (2, 2), 1)
        image.putpalette([0, 0, 0, 40, 40, 40])
        image.putpixel((1, 0), 0)
        image.putpixel((1, 1), 0)
        image.info["transparency"] = 0
    image = image if mode == "P" else image.convert(mode)
    image.save(tmp_path / "x.png")
    assert Preprocess(layout="NHWC")(tmp_path / "x.png")[0, 0].tolist() == [[40, 40, 40], [255, 255, 255]]
    assert Preprocess(color="GRAY", background=7.0)(tmp_path / "x.png")[0, 0, 0].tolist() == [40, 7]
    assert Preprocess(color="BGR", background=(1.0, 2.0, 3.0))(tmp_path / "x.png")[0, :, 0, 1].tolist() == [1, 2, 3]


def test_half_transparent_pixels_are_mixed(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (100, 0, 200, 128)).save(tmp_path / "x.png")
    found = Preprocess(background=0.0)(tmp_path / "x.png")[0, :, 0, 0]
    assert np.abs(found - np.array([50.2, 0, 100.4])).max() <= 1


def test_images_beyond_reason(tmp_path: Path) -> None:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(bomb + struct.pack(">I", 4) + b"IDAT" + bytes(4))
    with pytest.raises(DataError, match="an image of more than"):
        Preprocess()(tmp_path / "bomb.png")
    Image.new("L", (1, 20000)).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match="1 x 20000 would become 60000 x 1200000000"):
        Preprocess(resize=60000)(tmp_path / "thin.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    for at in range(8, len(good)):
        (tmp_path / "bad.png").write_bytes(good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :])
        with contextlib.suppress(DataError):
            Preprocess()(tmp_path / "bad.png")
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "good.png")
    with pytest.raises(DataError, match="makes NaN or Inf"):
        Preprocess(scale=3e38)(tmp_path / "good.png")


def test_unreadable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system answers anybody but its administrator, who may be the one that runs this."""
    closed = tmp_path / "a" / "b"
    closed.mkdir(parents=True)
    stat, scandir = os.stat, os.scandir

    def refuse(real: Callable[..., object], path: object, *rest: object, **more: object) -> object:
        if str(path).startswith(str(closed)) and (real is scandir or str(path) != str(closed)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "scandir", lambda path, *rest: refuse(scandir, path, *rest))
    monkeypatch.setattr(os, "stat", lambda path, *rest, **more: refuse(stat, path, *rest, **more))
    for path in (tmp_path / "a", closed / "x.npz"):
        with pytest.raises(DataError, match="can't be read: Permission denied"):
            open_samples(path, INPUTS, Preprocess())
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(closed / "x.so")


# -- outputs --------------------------------------------------------------------------------------------------------------------------------------


def test_an_output_that_is_an_input(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(b"precious")
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "deep" / "x.png").write_bytes(b"precious")
    (tmp_path / "soft").symlink_to(model)
    (tmp_path / "hard").hardlink_to(model)
    (tmp_path / "image").hardlink_to(data / "deep" / "x.png")
    for name in ("m.onnx", "soft", "hard", "image", "data/deep/x.png", "data/../m.onnx"):
        with pytest.raises(OutputError, match="is an input of this command"):
            check_writable(tmp_path / name, [None, model, data, tmp_path / "absent"])
    check_writable(tmp_path / "new", [model, data])


def test_every_command_that_writes_spares_its_inputs(tmp_path: Path, digits: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    from qcompiler.cli.demo import MODEL

    library, model, data = tmp_path / "m.so", tmp_path / "m.onnx", tmp_path / "x.npz"
    library.write_bytes(digits("native").read_bytes())
    model.write_bytes(MODEL.read_bytes())
    session = Session(library)
    np.savez(data, **{session.inputs[0].name: np.zeros((2, *session.inputs[0].shape[1:]), np.float32)})
    np.save(tmp_path / "x.npy", np.zeros(session.inputs[0].shape, np.float32))
    (tmp_path / "x.npy").rename(tmp_path / "one.npz")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for words in (
        f"compile {model} --calibration {data} --output {model}",
        f"compile {model} --calibration {data} --output {data}",
        f"run {library} --input {session.inputs[0].name}={tmp_path}/one.npz --output {tmp_path}/one.npz",
        f"verify {library} --model {model} --data {data} --report {data}",
        f"verify {library} --model {model} --data {data} --report {library}",
        f"export-onnx {model} --calibration {data} --output {model}",
    ):
        assert main(words.split()) == 2, words
        assert "is an input of this command" in capsys.readouterr().err, words
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_external_data_are_inputs_too(tmp_path: Path) -> None:
    import onnx

    from qcompiler.importers.onnx_file import files_of

    weight = onnx.numpy_helper.from_array(np.zeros((64, 64), np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 64])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 64])],
        [weight],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert files_of(tmp_path / "m.onnx") == [tmp_path / "m.onnx", tmp_path / "weights.bin"]
    (tmp_path / "weights.bin").unlink()
    os.mkfifo(tmp_path / "weights.bin")
    with pytest.raises(ModelError, match="is a pipe or a device"):
        read(tmp_path / "m.onnx")


def test_long_names_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 252 + ".so", "ü" * 120 + ".npz", "x." + "y" * 253):
        with replacing(tmp_path / name) as temporary:
            temporary.write_text("x")
        assert (tmp_path / name).read_text() == "x"
    assert len(list(tmp_path.iterdir())) == 3


# -- what killed processes leave --------------------------------------------------------------------------------------------------------------


def killed(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import os, signal, pathlib\nfrom qcompiler.base.files import *\n{code}\n    os.kill(os.getpid(), 9)"])
    assert done.returncode == -9


def aged(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (0, 0), follow_symlinks=False)


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    killed("with temporary_folder() as f, replacing(f.parent / 'r.so') as t, new_folder(f.parent / 'n') as n:\n    (f / 'a').write_text('x')")
    mine = {"qcompiler-notes": tmp_path / "qcompiler-notes", "hidden": tmp_path / ".qcompiler-somebody"}
    for folder in mine.values():
        folder.mkdir()
        (folder / "thesis").write_text("x")
    assert len(list(tmp_path.iterdir())) == 5
    script = "with temporary_folder() as f, replacing(f.parent / 'r.so') as t:\n    pass\n"

    def run() -> None:
        subprocess.run([sys.executable, "-c", f"from qcompiler.base.files import *\n{script}"], check=True)

    run()
    assert len(list(tmp_path.iterdir())) == 6  # they are new: their process may be about to lock them
    aged(tmp_path)
    with temporary_folder() as alive:
        if alive.parent == tmp_path:
            aged(alive)
        run()
        assert alive.is_dir()
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".qcompiler-somebody", "qcompiler-notes", "r.so"], left


def test_no_room_for_intermediate_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*args: object, **more: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OutputError, match="no room for intermediate files.*TMPDIR"), temporary_folder():
        pass
    monkeypatch.undo()
    with pytest.raises(OutputError, match="no room for intermediate files"), temporary_folder():
        raise OSError(errno.ENOSPC, "No space left on device")
