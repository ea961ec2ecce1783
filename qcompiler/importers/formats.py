"""What a file is, by its first bytes, or the names inside of an archive; and for the formats that are not read here, the way from them to one that is.

Nothing is unpickled or unpacked to find out.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from qcompiler.base.errors import ModelError
from qcompiler.base.files import open_regular

ONNX, TFLITE, PT2 = "ONNX", "TFLite", "PT2"
READ = "ONNX models (.onnx), TFLite models (.tflite) and exported PyTorch programs (.pt2)"
_HEAD = 4096  # bytes that tell
_TORCH = "load the network in Python, and give qcompiler.compile an exported program: torch.export.export(network.eval(), (x,))"
_FROM_KERAS = "export it: model.export('network.onnx', format='onnx'), or make a .tflite of it with tf.lite.TFLiteConverter"
_FROM_TF = "convert it: python -m tf2onnx.convert --saved-model FOLDER --output network.onnx, or make a .tflite of it with tf.lite.TFLiteConverter"
_FROM_HUB = "export the network it belongs to: optimum-cli export onnx --model FOLDER out/, or torch.export"
_MAGIC = (  # (first bytes, what the file is, what to do)
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file: git lfs pull"),
    (b"GGUF", "a GGUF file: weights for llama.cpp without the network's graph", "export the network that it was made from to ONNX"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it", f"load it in Keras and {_FROM_KERAS}"),
    (b"\x7fELF", "a shared library or program", "give the model that it was compiled from"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it (gunzip or tar -x), and give the model inside"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and give the model inside"),
    (b"7767517\n", "an ncnn network", "give the ONNX or PyTorch model that it was made from"),
    (b"ftrt", "a TensorRT engine: machine code for one GPU", "give the ONNX model that it was built from"),
    (b"\x89PNG", "an image", "give the model"),
    (b"\xff\xd8\xff", "an image", "give the model"),
)
_AT_4 = (  # (bytes 4 to 8, ...): flatbuffers say there what they hold
    (b"ORTM", "a model in ONNX Runtime's own format", "give the .onnx file that it was made from"),
    (b"ET12", "an ExecuTorch program", f"give the network that it was lowered from: {_TORCH}"),
)
_SUFFIXES = {  # formats without a mark
    ".pb": ("a TensorFlow graph", _FROM_TF),
    ".mlmodel": ("a Core ML model", "give the model that it was converted from"),
    ".caffemodel": ("a Caffe model", "give an ONNX model of the network"),
    ".prototxt": ("a Caffe network", "give an ONNX model of the network"),
    ".pdmodel": ("a PaddlePaddle model", "convert it: paddle2onnx --model_dir FOLDER --save_file network.onnx"),
    ".mnn": ("an MNN model", "give the ONNX model that it was made from"),
    ".engine": ("a TensorRT engine: machine code for one GPU", "give the ONNX model that it was built from"),
    ".weights": ("Darknet weights without the network's graph", "export the network to ONNX"),
}


def recognised(path: Path) -> str:
    """ONNX, TFLITE or PT2; ONNX for whatever is not known, whose reader has the last word. Raises ModelError, with the way in, for a file or
    folder of any other known format, and for one that can't be read."""
    try:
        if path.is_dir():
            raise _refusal(path, *_folder(path))
        with open_regular(path) as file:
            head = file.read(_HEAD)
            size = path.stat().st_size
            if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
                return _zip(path, file)
    except OSError as error:
        raise ModelError(f"{path}: can't read the model: {error.strerror or error}") from error
    if head[4:8] == b"TFL3":
        return TFLITE
    found = next(((what, way) for magic, what, way in _MAGIC if head.startswith(magic)), None)
    found = found or next(((what, way) for magic, what, way in _AT_4 if head[4:8] == magic), None) or _text(head)
    if found is None and head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        found = "a pickle (nothing is unpickled here: that would run code from the file)", f"if PyTorch wrote it, {_TORCH}"
    if found is None and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        found = "a safetensors file: weights without the network's graph", _FROM_HUB
    if found is not None:
        raise _refusal(path, *found)
    return ONNX


def by_name(path: Path) -> str:
    """What a file that is no ONNX model may be by its name, to end a message with; empty where the name doesn't tell."""
    found = _SUFFIXES.get(path.suffix.lower())
    return f". By its name it is {found[0]}: {found[1]}" if found else ""


def _refusal(path: Path, what: str, way: str) -> ModelError:
    return ModelError(f"{path}: this is {what}. Supported: {READ}. What to do: {way}")


def _folder(path: Path) -> tuple[str, str]:
    names = {p.name for p in path.iterdir()}
    if "saved_model.pb" in names or "saved_model.pbtxt" in names:
        return "a TensorFlow SavedModel", _FROM_TF.replace("FOLDER", str(path))
    if path.suffix == ".mlpackage" or "Manifest.json" in names:
        return "a Core ML package", "give the model that it was converted from"
    models = sorted(n for n in names if n.endswith((".onnx", ".tflite", ".pt2")))
    if models:
        return f"a folder, with {', '.join(models[:5])} inside", "give one file"
    if any(n.endswith((".safetensors", ".bin")) for n in names) and "config.json" in names:
        return "a folder of weights, as Hugging Face keeps them", _FROM_HUB.replace("FOLDER", str(path))
    return "a folder", "give one file"


def _zip(path: Path, file: object) -> str:
    try:
        names = zipfile.ZipFile(file).namelist()  # type: ignore[call-overload]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _refusal(path, f"a damaged zip archive ({error})", "download or export it again") from error
    ends = {n.partition("/")[2] or n for n in names} | set(names)
    if any(n.startswith("models/") and n.endswith(".json") for n in ends) or "serialized_exported_program.json" in ends:
        return PT2
    if "data.pkl" in ends and any(n.startswith("code/") for n in ends):
        raise _refusal(path, "a TorchScript program", _TORCH)
    if "data.pkl" in ends:
        raise _refusal(path, "a pickle of PyTorch: weights, or a whole module (nothing is unpickled here: that would run code from the file)", _TORCH)
    if "model.weights.h5" in ends:
        raise _refusal(path, "a Keras model", f"load it in Keras and {_FROM_KERAS}")
    if any(n.endswith(".npy") for n in ends):
        raise _refusal(path, "an .npz of arrays", "give the model; arrays go to --calibration or --data")
    raise _refusal(path, "a zip archive", "unpack it, and give the model inside")


def _text(head: bytes) -> tuple[str, str] | None:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:512].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not a model", "the download went wrong; fetch the file itself"
    if (start.startswith(b"<?xml") and b"<net" in head) or start.startswith(b"<net "):
        return "a network in OpenVINO's IR", "give the ONNX, TFLite or PyTorch model that it was converted from"
    return None
