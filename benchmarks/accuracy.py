"""Accuracy of int8 against float on real networks: top-1, agreement, SQNR of the logits, and what compiling cost.

    python benchmarks/accuracy.py --data ../shared/data [--network mobilenet_v2]... [--images 100] [--preset accurate]... [--rivals] [--check]

Calibrates on the data's calibration images and evaluates on the others. Every network is compiled in a process of its own, so that its peak
memory is its own. With --check the exit status is 1 when a network agrees with float on fewer than 95 % of the images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networks

MIN_AGREEMENT = 0.95
THREADS = min(2, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Recipe:
    preset: str
    enable: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.preset, *(f"+{s}" for s in self.enable), *(f"-{s}" for s in self.disable)])


def measure(network: networks.Network, target: str, recipe: Recipe, images: int | None, keep: Path | None) -> dict[str, Any]:
    """Compile one network for `target` and compare it with its float twin on `images` evaluation images (None: all), evenly spread."""
    import qcompiler
    from qcompiler.base.progress import terminal_progress
    from qcompiler.calibration.data import load_labels, open_samples
    from qcompiler.verification.parity import Thresholds, compare
    from qcompiler.verification.twin import float_session

    with terminal_progress() as progress, tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        artifact = qcompiler.compile(
            network.model,
            target=target,
            calibration=network.images / "calibration",
            preprocess=network.preprocess,
            preset=recipe.preset,
            enable=recipe.enable,
            disable=recipe.disable,
            progress=progress,
        )
        seconds = time.perf_counter() - start
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        session = qcompiler.load(artifact.save(keep or Path(folder) / "int8.so"), threads=THREADS)
        twin = float_session(network.model, session, Path(folder), threads=THREADS)
        samples = open_samples(network.images / "evaluation", session.inputs, network.preprocess).spread(images)
        labels = load_labels(network.images / "evaluation.tsv", samples)
        thresholds = Thresholds(min_agreement=MIN_AGREEMENT)
        report = compare(session, twin, samples, labels=labels, thresholds=thresholds, layer_samples=4, progress=progress)
    row = report.outputs[0]
    return {
        "network": network.name,
        "method": str(recipe),
        "target": artifact.manifest["target"],
        "images": report.samples,
        "float_top1": report.float_accuracy,
        "int8_top1": report.int8_accuracy,
        "agreement": row.agreement,
        "sqnr_db": row.metrics.sqnr_db,
        "bytes": artifact.size,
        "compile_seconds": seconds,
        "compile_peak_mb": peak / 1024,
        "float_ops": len(artifact.manifest["float_ops"]),
        "worst_layers": [(r.name, r.metrics.sqnr_db) for r in report.worst_layers(3)],
        "passed": report.passed,
    }


RIVALS = ("ORT MinMax", "ORT Percentile", "ORT Entropy", "NNCF default", "NNCF full bias correction")


def measure_rival(network: networks.Network, method: str, images: int | None) -> dict[str, Any] | None:
    """The same figures for another quantizer, run by its own runtime against ONNX Runtime's float network; None where it isn't installed."""
    import numpy as np

    from qcompiler.runtime import peers

    if not peers.installed("onnxruntime", *(["nncf", "openvino"] if method.startswith("NNCF") else [])):
        print(f"{method}: not installed, left out", file=sys.stderr)
        return None
    import onnxruntime

    from qcompiler.base.tensor import TensorInfo
    from qcompiler.calibration.data import load_labels, open_samples

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = THREADS
    twin = onnxruntime.InferenceSession(str(network.model), settings)
    port = twin.get_inputs()[0]
    inputs = [TensorInfo(port.name, tuple(d if isinstance(d, int) else 1 for d in port.shape), "float32")]
    calibration = list(open_samples(network.images / "calibration", inputs, network.preprocess))
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:  # both tools print
        if method.startswith("ORT"):
            path = peers.onnxruntime_int8(network.model, calibration, Path(folder), method.split()[1])
            session = onnxruntime.InferenceSession(str(path), settings)
            size = path.stat().st_size

            def run(sample: Any) -> Any:
                return session.run(None, sample)[0]
        else:
            import openvino

            quantized = peers.nncf_model(network.model, calibration, fast_bias_correction="full" not in method)
            openvino.save_model(quantized, Path(folder) / "nncf.xml")
            size = sum(f.stat().st_size for f in Path(folder).glob("nncf.*"))
            compiled = openvino.Core().compile_model(quantized, "CPU", peers.openvino_settings(THREADS))

            def run(sample: Any) -> Any:
                return compiled(sample)[0]

        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        samples = open_samples(network.images / "evaluation", inputs, network.preprocess).spread(images)
        labels = load_labels(network.images / "evaluation.tsv", samples)
        pairs = [(twin.run(None, s)[0], np.array(run(s))) for s in samples]
    wanted, got = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    return {
        "network": network.name,
        "method": method,
        "target": "its own runtime",
        "images": len(wanted),
        "float_top1": float((wanted.argmax(1) == labels).mean()),
        "int8_top1": float((got.argmax(1) == labels).mean()),
        "agreement": float((wanted.argmax(1) == got.argmax(1)).mean()),
        "sqnr_db": float(10 * np.log10(np.square(wanted).sum() / np.square(got - wanted).sum())),
        "bytes": size,
        "compile_seconds": seconds,
        "compile_peak_mb": peak / 1024,
        "float_ops": None,
        "passed": True,
    }


def table(results: list[dict[str, Any]]) -> str:
    from qcompiler.base.text import number, percent, size
    from qcompiler.base.text import table as text

    rows = [
        [
            r["network"],
            r["method"],
            str(r["images"]),
            percent(r["float_top1"]),
            percent(r["int8_top1"]),
            percent(r["agreement"]),
            number(r["sqnr_db"]),
            size(r["bytes"]),
            number(r["compile_seconds"], ".1f"),
            number(r["compile_peak_mb"], ".0f"),
            "-" if r["float_ops"] is None else str(r["float_ops"]),
        ]
        for r in results
    ]
    columns = (
        "network",
        "method",
        "images|",
        "float top-1|",
        "int8 top-1|",
        "agreement|",
        "SQNR dB|",
        "library|",
        "compile s|",
        "peak MB|",
        "float ops|",
    )
    return text(f"Accuracy on {results[0]['target']}", columns, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks.add_arguments(parser, networks.NAMES)
    parser.add_argument("--images", type=int, help="evaluation images (default: all)")
    parser.add_argument("--target", default="native")
    parser.add_argument("--preset", action="append", choices=["fast", "default", "accurate"], help="repeat for more (default: default)")
    parser.add_argument("--enable", action="append", default=[], metavar="STEP", help="take this step beside those of the preset")
    parser.add_argument("--disable", action="append", default=[], metavar="STEP", help="leave this step out")
    parser.add_argument("--rivals", action="store_true", help="measure ONNX Runtime's and NNCF's quantization too, where they are installed")
    parser.add_argument("--check", action="store_true", help=f"exit 1 when agreement is below {MIN_AGREEMENT:.0%}%")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too, row by row")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the libraries there")
    options = parser.parse_args()
    chosen = [networks.find(name, options.data, options.cache) for name in options.network or networks.NAMES]
    found = [network for network in chosen if network is not None]
    if not found:
        print("no network to measure: give --data", file=sys.stderr)
        return 2
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    recipes = [Recipe(p, tuple(options.enable), tuple(options.disable)) for p in options.preset or ["default"]]
    results: list[dict[str, Any]] = []
    for network in found:
        jobs = []
        for recipe in recipes:
            name = network.name if len(recipes) == 1 else f"{network.name}-{recipe.preset}"
            keep = options.keep / f"{name}.so" if options.keep else None
            jobs.append((measure, network, options.target, recipe, options.images, keep))
        jobs += [(measure_rival, network, method, options.images) for method in (RIVALS if options.rivals else ())]
        for job in jobs:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(*job).result()
            results += [row] if row is not None else []
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    print(table(results))
    failed = [r["network"] for r in results if not r["passed"]]
    if options.check and failed:
        print(f"FAILED: agreement with float below {MIN_AGREEMENT:.0%}: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
