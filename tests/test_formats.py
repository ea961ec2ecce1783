"""What is given where a model is expected: recognized by what is inside it, and refused with the way in. And networks that are in memory already."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.base.errors import ModelError
from qcompiler.cli.main import main
from qcompiler.importers import formats
from qcompiler.importers.model import load


def zipped(*names: str) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return whole.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


FOREIGN: dict[str, tuple[bytes, str]] = {
    "weights.safetensors": (safetensors(), r"a safetensors file: weights without the network's graph\. .*optimum-cli export onnx"),
    "llama.gguf": (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file.*export the network that it was made from to ONNX"),
    "net.xml": (b'<?xml version="1.0"?>\n<net name="n" version="11"><layers/></net>', "OpenVINO's IR"),
    "old.pt": (pickle.dumps({"w": [1.0]}, 2), r"a pickle \(nothing is unpickled here.*torch\.export\.export"),
    "state.pt": (zipped("state/data.pkl", "state/data/0", "state/version"), r"a pickle of PyTorch.*torch\.export\.export\(network\.eval\(\), \(x,\)"),
    "scripted.pt": (zipped("s/data.pkl", "s/code/__torch__.py", "s/constants.pkl"), "a TorchScript program"),
    "net.keras": (zipped("config.json", "metadata.json", "model.weights.h5"), "a Keras model"),
    "net.h5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file"),
    "data.npz": (zipped("x.npy"), r"an \.npz of arrays.*--calibration"),
    "models.zip": (zipped("a/net.onnx"), "a zip archive.*unpack it"),
    "broken.zip": (zipped("a/net.onnx")[:40], "a damaged zip archive"),
    "net.onnx.gz": (gzip.compress(b"x" * 100), "compressed with gzip"),
    "net.ort": (b"\x18\0\0\0ORTM" + bytes(64), "ONNX Runtime's own format"),
    "net.pte": (b"\x18\0\0\0ET12" + bytes(64), "an ExecuTorch program"),
    "net.so": (b"\x7fELF" + bytes(64), "a shared library"),
    "net.param": (b"7767517\n10 11\n", "an ncnn network"),
    "lfs.onnx": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer.*git lfs pull"),
    "page.onnx": (b"<!DOCTYPE html>\n<html>404</html>", "a web page"),
    "frozen.pb": (b"\x0a\x03abc\x12\x07", "not an ONNX model.*By its name it is a TensorFlow graph"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files(tmp_path: Path, name: str) -> None:
    content, message = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / name))
    assert name == "frozen.pb" or formats.READ in str(caught.value)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (["saved_model.pb", "fingerprint.pb"], "a TensorFlow SavedModel.*tf2onnx.convert --saved-model"),
        (["config.json", "model.safetensors"], "as Hugging Face keeps them.*optimum-cli export onnx --model"),
        (["model.onnx", "vocab.txt"], "a folder, with model.onnx inside.*give one file"),
        ([], "a folder. Supported"),
    ],
)
def test_folders(tmp_path: Path, inside: list[str], message: str) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    for name in inside:
        (folder / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_the_command_says_it_before_anything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.safetensors").write_bytes(safetensors())
    assert main(["compile", str(tmp_path / "w.safetensors"), "--output", str(tmp_path / "w.so")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "this is a safetensors file" in lines[0] and not (tmp_path / "w.so").exists()


# -- in memory --------------------------------------------------------------------------------------------------------------------------------


def network() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32), "w")
    ports = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, s])] for n, s in (("x", 8), ("y", 4))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])], "net", *ports, [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_model_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = network(), [{"x": x} for x in np.random.default_rng(1).standard_normal((16, 1, 8)).astype(np.float32)]
    before = model.SerializeToString(deterministic=True)
    artifact = qcompiler.compile(model, calibration=samples, preset="fast")
    assert artifact.imported is not None and artifact.imported.status == "equal" and artifact.manifest["model"] == "net"
    assert model.SerializeToString(deterministic=True) == before
    report = qcompiler.verify(artifact.save(tmp_path / "m.so"), model, samples)
    assert report.passed and report.imported is not None and report.imported.status == "equal"
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.eye(8, 4, dtype=np.float32), "w"))
    with pytest.raises(qcompiler.base.errors.ArtifactError, match="was not compiled from the model 'net'"):
        qcompiler.verify(tmp_path / "m.so", model, samples)


def test_objects_that_are_no_network(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a model is a path, an onnx\.ModelProto, a torch.*; builtins\.dict given"):
        load({"w": 1})
    with pytest.raises(ModelError, match="not an ONNX model: it has no graph"):
        load(onnx.ModelProto())
    onnx.save(network(), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    with pytest.raises(ModelError, match="stored in other files; load it with onnx.load"):
        load(onnx.load(tmp_path / "m.onnx", load_external_data=False))
    assert load(onnx.load(tmp_path / "m.onnx")).digest


def test_damaged_models_in_memory() -> None:
    model = network()
    model.graph.initializer[0].raw_data = b"xx"
    with pytest.raises(ModelError, match="the model 'net': the data of tensor 'w' is damaged"):
        load(model)
