"""The runtimes that a library is measured against. Each is optional, and imported when it is asked for.

A call takes float32 inputs `{name: array}` of the ONNX model and runs the network once, on so many threads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.base.errors import DataError
from qcompiler.runtime.reference import Outputs

Call = Callable[[], object]
Inputs = Mapping[str, np.ndarray]
AnyPath = str | os.PathLike[str]
PEERS = {"onnxruntime": ("onnxruntime",), "openvino": ("openvino", "nncf"), "litert": ("ai_edge_litert", "ai_edge_quantizer"), "torch": ("torch",)}
"""Runtimes by name, and the modules of each: of the runtime, and of its quantizer where that is a package of its own."""


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(m) is not None for m in modules)


def peer_calls(
    name: str, model: AnyPath, inputs: Inputs, threads: int, samples: list[dict[str, np.ndarray]], folder: Path, file: AnyPath | None = None
) -> dict[str, Call]:
    """{"NAME float", "NAME int8": call}: the runtime on the model, and on what its own quantizer makes of it with `samples` (none: float only).

    file: a .tflite of the same network, which LiteRT needs, as it reads no ONNX; it is measured as it is, and where it is in float, quantized too. folder: for
    intermediate files.
    Raises DataError where the runtime or its quantizer is not installed, or can't take the model.
    """
    if name not in PEERS:
        raise DataError(f"--against {name}: unknown runtime. Known: {', '.join(PEERS)}")
    if name == "torch":
        raise DataError(f"--against torch: PyTorch runs exported programs (.pt2), and {model} is none; measure onnxruntime instead")
    quantizes = bool(samples) and (name != "litert" or (file is not None and litert_is_float(Path(file))))
    for module in PEERS[name][: 2 if quantizes else 1]:
        if not installed(module):
            raise DataError(f"--against {name}: {module} is not installed; pip install 'qcompiler[peers]'")
    try:
        if name == "litert":
            if file is None:
                raise DataError("--against litert: LiteRT reads no ONNX; give the same network as a file, litert=FILE.tflite")
            calls: dict[str, Call] = {f"litert {Path(file).name}": litert_call(Path(file), inputs, threads)}
            return calls | ({"litert int8": litert_call(litert_int8(Path(file), samples, folder), inputs, threads)} if quantizes else {})
        if name == "onnxruntime":
            calls = {"onnxruntime float": onnxruntime_call(model, inputs, threads)}
            return calls | ({"onnxruntime int8": onnxruntime_call(onnxruntime_int8(Path(model), samples, folder), inputs, threads)} if samples else {})
        calls = {"openvino float": openvino_call(Path(model), inputs, threads)}
        return calls | ({"openvino int8": openvino_call(nncf_model(Path(model), samples), inputs, threads)} if samples else {})
    except DataError:
        raise
    except Exception as error:  # the exceptions of these packages have no common class
        raise DataError(f"--against {name}: it can't take {model}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def torch_call(run: Outputs, inputs: Inputs, threads: int) -> dict[str, Call]:
    """A call of PyTorch on a program, uncompiled. run: the program (`reference.Torch`)."""
    import torch

    torch.set_num_threads(threads)
    return {"torch float": lambda: run(inputs)}


def onnxruntime_call(model: AnyPath, inputs: Inputs, threads: int) -> Call:
    """A call of ONNX Runtime (CPU) on a model file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(os.fspath(model), options, providers=["CPUExecutionProvider"])
    feed = dict(inputs)
    return lambda: session.run(None, feed)


def onnxruntime_int8(model: Path, samples: Iterable[Any], folder: Path, ranges: str = "MinMax") -> Path:
    """The network quantized by ONNX Runtime: QDQ, per-channel weights, which ONNX has from operator set 13 on, uint8 activations and int8 weights. ranges:
    "MinMax", "Percentile" or "Entropy"."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._samples = iter(samples)

        def get_next(self) -> Any:
            return next(self._samples, None)

    prepared, quantized = folder / "prepared.onnx", folder / "ort_int8.onnx"
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    opset = next(o.version for o in onnx.load(str(prepared), load_external_data=False).opset_import if o.domain in ("", "ai.onnx"))
    quantize_static(
        str(prepared),
        str(quantized),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=opset >= 13,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[ranges],
    )
    return quantized


def openvino_settings(threads: int) -> dict[str, Any]:
    """One latency-tuned stream, float operators in float32."""
    return {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}


def openvino_call(model: Any, inputs: Inputs, threads: int) -> Call:
    """A call of OpenVINO on a model file or an OpenVINO model."""
    import openvino

    core = openvino.Core()
    if isinstance(model, (str, Path)):
        model = core.read_model(str(model))
    model.reshape({name: list(x.shape) for name, x in inputs.items()})
    request = core.compile_model(model, "CPU", openvino_settings(threads)).create_infer_request()
    feed = dict(inputs)
    return lambda: request.infer(feed)


def onnxruntime_dynamic(model: Path, folder: Path) -> Path:
    """The network with ranges of activations measured in every call, as ONNX Runtime advises for text."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = folder / "ort_dynamic.onnx"
    quantize_dynamic(str(model), str(quantized), per_channel=True, weight_type=QuantType.QInt8)
    return quantized


def nncf_model(model: Path, samples: list[Any], fast_bias_correction: bool = True, transformer: bool = False) -> Any:
    """The network as an OpenVINO model, quantized by NNCF's defaults, or with its sequential bias correction in the place of the fast one; as a
    transformer where asked for."""
    import nncf
    import openvino

    network = openvino.convert_model(str(model))  # `read_model` leaves the ONNX biases in a form in which NNCF doesn't see them
    network.reshape({name: list(x.shape) for name, x in samples[0].items()})
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    return nncf.quantize(network, nncf.Dataset(samples), subset_size=len(samples), fast_bias_correction=fast_bias_correction, model_type=kind)


def litert_call(model: Path, inputs: Inputs, threads: int) -> Call:
    """A call of LiteRT (XNNPACK) on a TFLite twin with the same inputs, NCHW or NHWC, in float32 or quantized."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(model), num_threads=threads)
    interpreter.allocate_tensors()
    details, given = interpreter.get_input_details(), list(inputs.values())
    if len(details) != len(given):
        raise DataError(f"{model}: has {len(details)} inputs, the ONNX model {len(given)}")
    feed = [(d["index"], litert_input(x, d, str(model))) for d, x in zip(details, given, strict=True)]
    outputs = [d["index"] for d in interpreter.get_output_details()]

    def call() -> list[np.ndarray]:
        for index, x in feed:
            interpreter.set_tensor(index, x)
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in outputs]

    return call


def litert_is_float(model: Path) -> bool:
    """Whether no tensor of a TFLite file is quantized. False where LiteRT is not installed, or can't read it, which is told elsewhere."""
    try:
        from ai_edge_litert.interpreter import Interpreter

        tensors = Interpreter(model_path=str(model)).get_tensor_details()
    except (ImportError, ValueError, RuntimeError):
        return False
    return not any(len(t["quantization_parameters"]["scales"]) for t in tensors)


def litert_int8(model: Path, samples: Iterable[Inputs], folder: Path) -> Path:
    """A TFLite network in float, quantized by LiteRT's own quantizer: int8 weights per channel, int8 activations in the ranges that the samples have."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    prepared, quantized = folder / "prepared.tflite", folder / "litert_int8.tflite"
    prepared.write_bytes(_with_signature(model.read_bytes()))
    runner = Interpreter(model_path=str(prepared))
    (key, ports), *_ = runner.get_signature_list().items()
    details = runner.get_signature_runner(key).get_input_details()
    fed = [{name: litert_input(x, details[name], str(model)) for name, x in zip(ports["inputs"], s.values(), strict=True)} for s in samples]
    said = io.StringIO()  # the package has a progress bar, prints sizes, and warns of what it does itself
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = quantizer.Quantizer(str(prepared))
        made.load_quantization_recipe(recipe.static_wi8_ai8())
        made.quantize(made.calibrate({key: fed})).export_model(str(quantized), overwrite=True)
    return quantized


def _with_signature(data: bytes) -> bytes:
    """A TFLite file with names for its inputs and outputs, which the quantizer asks for, in their order; as it is where it has some."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    if model.signatureDefs:
        return data

    def named(tensors: Iterable[int], what: str) -> list[Any]:
        found = []
        for number, index in enumerate(tensors):
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = f"{what}{number:03}", int(index)
            found.append(entry)
        return found

    signature, graph = schema.SignatureDefT(), model.subgraphs[0]
    signature.signatureKey, signature.subgraphIndex = "serving_default", 0
    signature.inputs, signature.outputs = named(graph.inputs, "input"), named(graph.outputs, "output")
    model.signatureDefs = [signature]
    builder = flatbuffers.Builder(len(data))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def litert_input(x: np.ndarray, detail: Mapping[str, Any], where: str) -> np.ndarray:
    """An input as a TFLite model wants it: images NHWC, quantized where the model's input is."""
    wanted = tuple(int(d) for d in detail["shape"])
    if x.ndim == 4 and x.shape != wanted:
        x = x.transpose(0, 2, 3, 1)
    if x.shape != wanted:
        raise DataError(f"{where}: wants an input {list(wanted)}, the ONNX model's is {list(x.shape)}")
    dtype = np.dtype(detail["dtype"])
    if dtype.kind not in "iu" or x.dtype == dtype:
        return np.ascontiguousarray(x, dtype)
    scale, zero = detail["quantization"]
    quantized: np.ndarray = np.clip(np.rint(x / scale) + zero, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)
    return quantized
