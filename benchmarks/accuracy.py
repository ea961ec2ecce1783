"""Accuracy of int8 against float on real networks: top-1, agreement, SQNR of the logits, and what compiling cost.

    python benchmarks/accuracy.py --data ../shared/data [--network mobilenet_v2]... [--images 100] [--check]

Calibrates on the data's calibration images and evaluates on the others. Every network is compiled in a process of its own, so that its peak
memory is its own. With --check the exit status is 1 when a network agrees with float on fewer than 95 % of the images.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import networks

MIN_AGREEMENT = 0.95


def measure(network: networks.Network, target: str, preset: str, images: int | None, keep: Path | None) -> dict[str, Any]:
    """Compile one network for `target` and compare it with its float twin on `images` evaluation images (None: all), evenly spread."""
    import qcompiler
    from qcompiler.data import load_labels, open_samples
    from qcompiler.parity import Thresholds, compare, float_session
    from qcompiler.progress import terminal_progress

    with terminal_progress() as progress, tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        artifact = qcompiler.compile(
            network.model,
            target=target,
            calibration=network.images / "calibration",
            preprocess=network.preprocess,
            preset=preset,
            progress=progress,
        )
        seconds = time.perf_counter() - start
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        session = qcompiler.load(artifact.save(keep or Path(folder) / "int8.so"), threads=2)
        twin = float_session(network.model, session, Path(folder), threads=2)
        samples = open_samples(network.images / "evaluation", session.inputs, network.preprocess).spread(images)
        labels = load_labels(network.images / "evaluation.tsv", samples)
        thresholds = Thresholds(min_agreement=MIN_AGREEMENT)
        report = compare(session, twin, samples, labels=labels, thresholds=thresholds, layer_samples=4, progress=progress)
    row = report.outputs[0]
    return {
        "network": network.name,
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


def table(results: list[dict[str, Any]]) -> str:
    from qcompiler.tables import number, percent, size
    from qcompiler.tables import table as text

    rows = [
        [
            r["network"],
            str(r["images"]),
            percent(r["float_top1"]),
            percent(r["int8_top1"]),
            percent(r["agreement"]),
            number(r["sqnr_db"]),
            size(r["bytes"]),
            number(r["compile_seconds"], ".1f"),
            number(r["compile_peak_mb"], ".0f"),
            str(r["float_ops"]),
        ]
        for r in results
    ]
    columns = (
        "network",
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
    parser.add_argument("--preset", default="default")
    parser.add_argument("--check", action="store_true", help=f"exit 1 when agreement is below {MIN_AGREEMENT:.0%}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the libraries there")
    options = parser.parse_args()
    chosen = [networks.find(name, options.data, options.cache) for name in options.network or networks.NAMES]
    found = [network for network in chosen if network is not None]
    if not found:
        print("no network to measure: give --data", file=sys.stderr)
        return 2
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    results = []
    for network in found:
        keep = options.keep / f"{network.name}.so" if options.keep else None
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            results.append(pool.submit(measure, network, options.target, options.preset, options.images, keep).result())
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    failed = [r["network"] for r in results if not r["passed"]]
    if options.check and failed:
        print(f"FAILED: agreement with float below {MIN_AGREEMENT:.0%}: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
