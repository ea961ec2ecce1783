"""Requests a second of a library through its pool of sessions, side by side with OpenVINO and its THROUGHPUT hint on NNCF's int8 network.

    python benchmarks/throughput.py mobilenet.so --model mobilenet_v2.onnx --calibration images/ --preprocess mobilenet_v2.yaml --streams 2

Both take turns in one process; read the ratio. Needs openvino and nncf.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.calibration.data import open_samples
from qcompiler.calibration.ports import library_inputs
from qcompiler.runtime import peers
from qcompiler.runtime.bench import random_inputs
from qcompiler.runtime.library import read_manifest
from qcompiler.runtime.pool import SessionPool, measure

CALIBRATION = 100


def openvino_queue(model: Any, inputs: Mapping[str, np.ndarray], threads: int) -> Callable[[float], float]:
    """Requests a second of OpenVINO's own queue over so many seconds, always full."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    queue = openvino.AsyncInferQueue(compiled)
    feed = dict(inputs)

    def run(seconds: float) -> float:
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            queue.start_async(feed, share_inputs=True)
            done += 1
        queue.wait_all()
        return done / (time.perf_counter() - begin)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--preprocess", type=Path)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    with SessionPool(options.library, options.streams, options.threads) as pool:
        ports = library_inputs(read_manifest(options.library))
        infos = [ports[i.name].model if i.name in ports else i for i in pool.inputs]
        samples = list(itertools.islice(open_samples(options.calibration, infos, options.preprocess), CALIBRATION))
        network, inputs = peers.nncf_model(options.model, samples), random_inputs(pool.inputs)
        peer = openvino_queue(network, samples[0], options.streams * options.threads)
        peer(options.seconds / 2)
        figures: list[tuple[float, float]] = []
        for _ in range(options.rounds):
            figures.append((measure(pool, inputs, options.seconds).per_second, peer(options.seconds)))
            print(f"ours {figures[-1][0]:9.1f}   OpenVINO {figures[-1][1]:9.1f}   ratio {figures[-1][0] / figures[-1][1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(a / b for a, b in figures):.3f}")


if __name__ == "__main__":
    main()
