"""A stored calibration in the place of data: the same library, fewer passes, and nothing for another model."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_nets import OnnxNet

import qcompiler
from qcompiler.base.errors import DataError, PlanError
from qcompiler.calibration.stored import StoredSamples, _digest, open_source
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.pipeline.explain import Explanation

COUNT = 20
LOOKING = ("measure channels", "calibrate", "judge ranges", "correct biases", "round weights")  # stages that pass over samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, np.stack([s["image"] for s in demo_data()[0][:COUNT]]))
    return path


@pytest.fixture(scope="module")
def stored(data: Path) -> Path:
    path = data.with_name("table.qcal")
    made = qcompiler.calibrate(MODEL, path, data)
    assert made.samples == COUNT and made.warnings == [] and len(made.table.values) > 10
    return path


@pytest.fixture(scope="module")
def accurate(data: Path) -> Path:
    path = data.with_name("accurate.qcal")
    assert qcompiler.calibrate(MODEL, path, data, preset="accurate").table.samples == COUNT
    return path


@pytest.fixture(scope="module")
def accurate_of_data(data: Path) -> tuple[bytes, list[str]]:
    return bytes_and_stages(data, preset="accurate")


def bytes_of(calibration: Any, **options: Any) -> tuple[bytes, list[str]]:
    """The library, and the passes over samples that were made."""
    made, stages = bytes_and_stages(calibration, **options)
    return made, [s for s in stages if s in LOOKING]


def bytes_and_stages(calibration: Any, **options: Any) -> tuple[bytes, list[str]]:
    """The library, and the stages that said how far they were."""
    stages: list[str] = []
    artifact = qcompiler.compile(MODEL, calibration=calibration, progress=lambda stage, done, total: stages.append(stage), **options)
    return _saved(artifact), list(dict.fromkeys(stages))


def _saved(artifact: Any) -> bytes:
    from qcompiler.base.files import temporary_folder

    with temporary_folder() as folder:
        return Path(artifact.save(folder / "m.so")).read_bytes()


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, []),
        ({"target": "x86-avx2"}, []),
        ({"keep_float": ["conv1"]}, list(LOOKING[2:])),
        ({"preset": "fast"}, ["calibrate"]),
        ({"disable": ["round-narrow"]}, list(LOOKING[2:4])),
    ],
)
def test_the_library_is_the_same_bytes(options: dict[str, Any], passes: list[str], stored: Path, data: Path) -> None:
    expected, made = bytes_of(data, **options)
    assert made
    assert bytes_of(stored, **options) == (expected, passes)


def test_accurate_repeats_nothing(accurate: Path, accurate_of_data: tuple[bytes, list[str]]) -> None:
    """Samples are held out, two plans are made and one is chosen: what each of these looks at is stored under the samples that it looks at, and only the
    network that is better gets code."""
    expected, stages = accurate_of_data
    assert {*LOOKING, "judge the plan of accurate", "judge the plan of default", "judge the outputs", "generate float code"} <= set(stages)
    assert bytes_and_stages(accurate, preset="accurate") == (expected, ["generate int8 code"])


def test_what_was_stored_for_other_samples_is_not_used(accurate: Path, data: Path) -> None:
    """`default` looks at all samples, and so do fewer samples and another choice of steps: verdicts of `accurate` are not theirs."""
    cases: list[tuple[dict[str, Any], list[str]]] = [({}, list(LOOKING[1:])), ({"preset": "accurate", "max_samples": 12}, list(LOOKING))]
    for options, passes in cases:
        assert bytes_of(accurate, **options) == (bytes_of(data, **options)[0], passes)


def test_accurate_of_what_default_stored(stored: Path, accurate_of_data: tuple[bytes, list[str]]) -> None:
    expected, stages = accurate_of_data
    assert bytes_and_stages(stored, preset="accurate") == (expected, stages)


def test_storing_twice_gives_the_same_bytes(stored: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "again.qcal"
    assert main(["calibrate", str(MODEL), "--data", str(data), "-o", str(again), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == COUNT
    assert again.read_bytes() == stored.read_bytes()


def test_storing_what_was_stored_keeps_all_of_it(stored: Path, tmp_path: Path) -> None:
    qcompiler.calibrate(MODEL, tmp_path / "again.qcal", stored)
    assert (tmp_path / "again.qcal").read_bytes() == stored.read_bytes()


def test_other_functions_take_it(stored: Path, data: Path, tmp_path: Path) -> None:
    plans = [qcompiler.explain(MODEL, calibration=c, preset="fast") for c in (data, stored)]
    assert all(isinstance(p, Explanation) for p in plans) and plans[0].to_json() == plans[1].to_json()
    library = qcompiler.compile(MODEL, calibration=stored, preset="fast", max_samples=8)
    assert library.manifest["calibration_samples"] == 8
    report = qcompiler.verify(library, MODEL, stored, max_samples=4)
    assert report.samples == 4 and report.passed


def test_it_is_for_its_model_alone(stored: Path, tmp_path: Path) -> None:
    net = OnnxNet()
    x = net.input("image", 1, 1, 16, 16)
    other = net.save(tmp_path / "other.onnx", [net.op("Relu", net.op("Conv", x, net.weight(4, 1, 3, 3)))])
    with pytest.raises(DataError, match="made for another model"):
        qcompiler.compile(other, calibration=stored)
    with pytest.raises(DataError, match="its samples are for the inputs"):
        StoredSamples(stored, [])
    library = qcompiler.compile(other, calibration=demo_data()[0][:4], preset="fast")
    with pytest.raises(DataError, match="made for another model"):
        qcompiler.verify(library, other, stored)


def test_what_cannot_be_stored_or_read(stored: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for output, options, error, said in (
        ("t.npz", {}, DataError, "name a file that ends so"),
        ("t.qcal", {"min_sqnr": 20.0}, PlanError, "calibration has no part in min_sqnr"),
    ):
        with pytest.raises(error, match=said):
            qcompiler.calibrate(MODEL, tmp_path / output, data, **options)  # type: ignore[arg-type]
    monkeypatch.setattr("qcompiler.calibration.stored.LARGEST", 1000)
    with pytest.raises(DataError, match=r"use fewer \(--samples N\)"):
        qcompiler.calibrate(MODEL, tmp_path / "t.qcal", data, preset="fast")
    assert list(tmp_path.iterdir()) == []
    assert open_source(data, _inputs()).count == COUNT
    damaged = tmp_path / "d.qcal"
    for content, said in ((b"hello", r"can't be read as \.qcal"), (stored.read_bytes()[:-200], r"can't be read as \.qcal")):
        damaged.write_bytes(content)
        with pytest.raises(DataError, match=said):
            StoredSamples(damaged, _inputs())
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(damaged, "w") as new:
        for member in old.namelist():
            new.writestr(member, old.read("sample/1/0.npy" if member == "sample/0/0.npy" else member))
    with pytest.raises(DataError, match="not those that were stored"):
        list(StoredSamples(damaged, _inputs()))


def test_findings_that_are_none(stored: Path, tmp_path: Path) -> None:
    """A file whose arrays are whole, and one of whose findings says nothing that its reader knows, with a digest that fits."""
    (table,) = (n for n in _members(stored) if n.startswith("pass/import ") and "/table" in n)
    other = _array(b"[]")

    def meant(member: bytes) -> bytes:
        meta = json.loads(np.load(io.BytesIO(member)).tobytes())
        (name,) = (n for n in meta["passes"] if n.startswith("import "))
        (key,) = meta["passes"][name]["watchers"][0]
        content = np.load(io.BytesIO(zipfile.ZipFile(stored).read(table))).tobytes()
        meta["passes"][name]["digest"] = _digest(name, content, [{key: np.load(io.BytesIO(other))}])
        return _array(json.dumps(meta).encode())

    _edit(stored, tmp_path / "d.qcal", {table.replace("/table", "/0/0"): lambda _: other, "meta.npy": meant})
    with pytest.raises(DataError, match=r"d\.qcal: pass 'import [0-9a-f]{16}': can't be read as \.qcal"):
        qcompiler.compile(MODEL, calibration=tmp_path / "d.qcal")


@pytest.mark.parametrize("edited", ["calibrate [0-9a-f]+/table", "calibrate [0-9a-f]+/0", "import", "judge", "measure channels [0-9a-f]+/0"])
def test_a_pass_that_is_not_what_was_stored_is_refused(edited: str, stored: Path, tmp_path: Path) -> None:
    """What a pass saw is not computed again, so it has a digest of its own; the table of an edited pass still reads as one."""
    _refused_where_edited(edited, stored, tmp_path / "e.qcal")


@pytest.mark.parametrize("edited", ["rivals [0-9a-f]+/0", "estimate [0-9a-f]+/0", "work [0-9a-f]+/0", "weight_rounding [0-9a-f]+/0"])
def test_verdicts_that_are_not_what_was_stored_are_refused(edited: str, accurate: Path, tmp_path: Path) -> None:
    _refused_where_edited(edited, accurate, tmp_path / "e.qcal", preset="accurate")


def test_passes_of_a_file_without_their_digests_are_made_again(stored: Path, data: Path, tmp_path: Path) -> None:
    def older(member: bytes) -> bytes:
        meta = json.loads(np.load(io.BytesIO(member)).tobytes())
        return _array(json.dumps({**meta, "passes": {n: {k: v for k, v in p.items() if k != "digest"} for n, p in meta["passes"].items()}}).encode())

    _edit(stored, tmp_path / "o.qcal", {"meta.npy": older})
    assert bytes_of(tmp_path / "o.qcal", preset="fast") == bytes_of(data, preset="fast")


def test_samples_that_are_numbers_are_stored(tmp_path: Path) -> None:
    net = OnnxNet()
    y = net.op("Mul", net.op("Relu", net.op("MatMul", net.input("x", 1, 16), net.weight(16, 16))), net.input("gain"))
    model = net.save(tmp_path / "n.onnx", [net.op("MatMul", y, net.weight(16, 8))])
    samples = [{"x": net.rng.standard_normal((1, 16)).astype(np.float32), "gain": np.float32(1 + i)} for i in range(4)]
    qcompiler.calibrate(model, tmp_path / "n.qcal", samples)
    made = [_saved(qcompiler.compile(model, calibration=c)) for c in (samples, tmp_path / "n.qcal")]
    assert made[0] == made[1]


def _refused_where_edited(edited: str, stored: Path, into: Path, **options: Any) -> None:
    """All passes of that name are edited: the file may hold some of all samples and some of a part."""
    found = [n for n in _members(stored) if re.match(f"pass/{edited}", n)]
    assert found
    _edit(stored, into, dict.fromkeys(found, _digits_swapped))
    with pytest.raises(DataError, match=r"e\.qcal: pass '.*' is not what was stored"):
        qcompiler.compile(MODEL, calibration=into, **options)


def _members(stored: Path) -> list[str]:
    with zipfile.ZipFile(stored) as file:
        return file.namelist()


def _edit(stored: Path, into: Path, edits: Mapping[str, Callable[[bytes], bytes]]) -> None:
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(into, "w") as new:
        for member in old.namelist():
            new.writestr(member, edits.get(member, bytes)(old.read(member)))


def _digits_swapped(member: bytes) -> bytes:
    """Another array of the same type and shape, and JSON where it was JSON."""
    array = np.load(io.BytesIO(member))
    plain = array.reshape(-1).view(np.uint8)
    return _array(np.where((plain >= 48) & (plain < 57), plain + 1, np.where(plain == 57, 49, plain)) if array.dtype == np.uint8 else array + 1)


def _array(content: bytes | np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content)
    return stream.getvalue()


def _inputs() -> Any:
    from qcompiler.base.tensor import TensorInfo

    return [TensorInfo("image", (1, 1, 16, 16), "float32")]
