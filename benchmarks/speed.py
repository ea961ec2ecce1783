"""Latency on real networks, side by side in one process: ours in int8 and in float, ONNX Runtime and OpenVINO where installed.

    python benchmarks/speed.py --data ../shared/data [--network resnet50]... [--threads 1 2] [--seconds 10] [--peers-int8]

Candidates take turns, so read the ratios: absolute times drift by 10 % and more between runs. --peers-int8 also quantizes the network
with the peers' own tools (ONNX Runtime's static quantization, NNCF) on the same calibration images.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import networks
import numpy as np

Call = Callable[[], object]


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(m) is not None for m in modules)


def onnxruntime_int8(network: networks.Network, samples: Any, folder: Path) -> Path:
    """The network quantized by ONNX Runtime: QDQ, per-channel weights, min-max ranges, uint8 activations and int8 weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._samples = iter(samples)

        def get_next(self) -> Any:
            return next(self._samples, None)

    prepared, quantized = folder / "prepared.onnx", folder / "ort_int8.onnx"
    quant_pre_process(str(network.model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(quantized),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return quantized


def openvino_call(model: Any, inputs: Mapping[str, np.ndarray], threads: int) -> Call:
    """A call of OpenVINO on an ONNX file or an OpenVINO model, one latency-tuned stream."""
    import openvino

    core = openvino.Core()
    if isinstance(model, (str, Path)):
        model = core.read_model(str(model))
    model.reshape({name: list(x.shape) for name, x in inputs.items()})
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    feed = dict(inputs)
    return lambda: request.infer(feed)


def nncf_model(network: networks.Network, samples: Any) -> Any:
    """The network as an OpenVINO model, quantized by NNCF's defaults."""
    import nncf
    import openvino

    model = openvino.Core().read_model(str(network.model))
    return nncf.quantize(model, nncf.Dataset(list(samples)), subset_size=len(samples.names))


def measure(
    network: networks.Network, threads: list[int], seconds: float, peers_int8: bool, tuning_log: Path | None
) -> list[dict[str, Any]]:
    """One result per thread count: {network, threads, base, candidates: {name: {minimum, median, rounds, ratio}}}, times in seconds."""
    import qcompiler
    from qcompiler.bench import interleave, onnxruntime_call, ratios
    from qcompiler.data import open_samples
    from qcompiler.parity import float_session
    from qcompiler.progress import terminal_progress

    results = []
    with tempfile.TemporaryDirectory() as name, terminal_progress() as progress:
        folder = Path(name)
        calibration, preprocess = network.images / "calibration", network.preprocess
        artifact = qcompiler.compile(
            network.model, calibration=calibration, preprocess=preprocess, tuning_log=tuning_log, progress=progress
        )
        library = artifact.save(folder / "int8.so")
        first = qcompiler.load(library)
        float_library = float_session(network.model, first, folder).path
        samples = open_samples(calibration, first.inputs, preprocess)
        inputs = next(iter(samples))
        onnx_int8 = onnxruntime_int8(network, samples, folder) if peers_int8 and installed("onnxruntime") else None
        openvino_int8 = nncf_model(network, samples) if peers_int8 and installed("openvino", "nncf") else None
        for count in threads:
            session = qcompiler.load(library, threads=count)
            twin = qcompiler.load(float_library, threads=count)
            candidates: dict[str, Call] = {"int8": lambda s=session: s.run(inputs), "float": lambda s=twin: s.run(inputs)}  # type: ignore[misc]
            if installed("onnxruntime"):
                candidates["onnxruntime float"] = onnxruntime_call(str(network.model), inputs, count)
                if onnx_int8 is not None:
                    candidates["onnxruntime int8"] = onnxruntime_call(str(onnx_int8), inputs, count)
            if installed("openvino"):
                candidates["openvino float"] = openvino_call(network.model, inputs, count)
                if openvino_int8 is not None:
                    candidates["openvino int8"] = openvino_call(openvino_int8, inputs, count)
            timings = interleave(candidates, seconds=seconds, progress=progress)
            base = "onnxruntime float" if "onnxruntime float" in candidates else "float"
            factors = ratios(timings, base)
            rows = {t.name: {"minimum": t.minimum, "median": t.median, "rounds": t.rounds, "ratio": factors[t.name]} for t in timings}
            results.append({"network": network.name, "threads": count, "base": base, "candidates": rows})
    return results


def table(results: list[dict[str, Any]]) -> str:
    from qcompiler.tables import milliseconds
    from qcompiler.tables import table as text

    rows = [
        [
            r["network"],
            str(r["threads"]),
            name,
            milliseconds(t["minimum"]),
            milliseconds(t["median"]),
            f"{t['ratio']:.3f}",
            str(t["rounds"]),
        ]
        for r in results
        for name, t in r["candidates"].items()
    ]
    return text(
        "Latency, batch 1", ("network", "threads|", "what", "minimum ms|", "median ms|", f"x {results[0]['base']}|", "rounds|"), rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=networks.default_data(), help="directory with models/ and imagenet/")
    parser.add_argument("--cache", type=Path, default=networks.default_cache(), help="where networks that have to be made are kept")
    parser.add_argument("--network", action="append", choices=networks.NAMES, help="default: all three")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="per network and thread count")
    parser.add_argument("--peers-int8", action="store_true", help="quantize with the installed peers' tools, and measure those too")
    parser.add_argument("--tuning-log", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    chosen = [networks.find(name, options.data, options.cache) for name in options.network or networks.NAMES]
    found = [network for network in chosen if network is not None]
    if not found:
        print("no network to measure: give --data", file=sys.stderr)
        return 2
    results = [r for n in found for r in measure(n, options.threads, options.seconds, options.peers_int8, options.tuning_log)]
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
