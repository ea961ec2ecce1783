"""Samples a second through a pool of sessions, side by side with OpenVINO and its THROUGHPUT hint on NNCF's int8 network.

    python benchmarks/throughput.py --data ../shared/data [--network resnet50]... [--batch 1 8] [--streams 2] [--rounds 5] [--seconds 3]

Each network is compiled as one library for all batches; requests of each batch go through a pool of their own, whose queue is always full. Candidates take
turns in one process: read the ratios, medians over the rounds. "of peak" counts the network's multiply-accumulates against dot instructions on registers
alone, on as many threads; "at peak" is the ratio that a library would have whose every multiply-accumulate came at that rate. Needs openvino and nncf. About
three minutes a network; the table goes to --results too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

import networks
import numpy as np
import roofline
from soak import machine, markdown

import qcompiler
from qcompiler.base.targets import find_target
from qcompiler.calibration.data import open_samples
from qcompiler.importers.model import load
from qcompiler.runtime import peers
from qcompiler.runtime.bench import random_inputs
from qcompiler.runtime.pool import SessionPool
from qcompiler.runtime.session import Session

CALIBRATION = 30  # samples: times do not depend on the ranges


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


def pool_queue(pool: SessionPool, inputs: Mapping[str, np.ndarray]) -> Callable[[float], float]:
    """The same of a pool of ours: no more is asked of a request than that it is done."""
    newest: deque[Future[Any]] = deque(maxlen=100)  # more than may wait and run

    def run(seconds: float) -> float:
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            newest.append(pool.submit(inputs))
            done += 1
        wait(newest)
        return done / (time.perf_counter() - begin)

    return run


def compared(network: networks.Network, folder: Path, options: argparse.Namespace) -> list[list[str]]:
    """A row of the table per batch."""
    single = load(network.model).inputs[0]
    rows = [{single.name: (batch, *single.shape[1:])} for batch in sorted({1, *options.batch})]
    samples = list(itertools.islice(open_samples(network.calibration(), [single], network.preprocess), CALIBRATION))
    path = qcompiler.compile(network.model, calibration=samples, input_shapes=rows, preset="fast").save(folder / f"{network.name}.so")
    peer = openvino_queue(peers.nncf_model(network.model, samples), samples[0], options.streams * options.threads)
    session = Session(path)
    inputs = {at.inputs[0].shape[0]: random_inputs(at.inputs) for at in session.specializations}
    found = []
    with contextlib.ExitStack() as stack:
        ours_at = {batch: pool_queue(stack.enter_context(SessionPool(path, options.streams, options.threads)), inputs[batch]) for batch in options.batch}
        for warm in (peer, *ours_at.values()):
            warm(options.seconds / 2)
        target = find_target(session.manifest["target"])
        peak, counted = roofline.peak_call(roofline.unit_of(target), target, options.streams * options.threads)
        macs = sum(step["macs"] for step in session.manifest["steps"])
        peaks: list[float] = []  # samples a second
        figures: dict[int, list[float]] = {batch: [] for batch in options.batch}
        theirs: list[float] = []
        for _ in range(options.rounds):
            for batch, requests in ours_at.items():
                figures[batch].append(batch * requests(options.seconds))
            theirs.append(peer(options.seconds))
            peaks.append(counted / roofline.seconds_of(peak) / macs)
        for batch, ours in figures.items():
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            cells = [
                f"{statistics.median(ours):.1f}",
                f"{statistics.median(theirs):.1f}",
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f} to {max(ratios):.3f}",
                *(f"{100 * statistics.median(rates) / max(peaks):.0f} %" for rates in (ours, theirs)),
                f"{max(peaks) / statistics.median(theirs):.2f}",
            ]
            found.append([network.name, str(batch), *cells])
            print(" ".join(found[-1]), file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks.add_arguments(parser, (*networks.NAMES, "efficientnet_lite4"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--results", type=Path, default=networks.HERE / "results" / "throughput.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for network in networks.chosen(options) for row in compared(network, Path(folder), options)]
    title = f"Samples a second, {options.streams} streams of {options.threads} threads, {options.rounds} rounds of {options.seconds:g} s each"
    head = ("network", "batch", "ours", "OpenVINO", "ratio", "ratios of the rounds", "of peak", "OpenVINO's", "at peak")
    text = f"{title}\n\n{markdown(head, rows)}\n\n{machine()}; openvino {version('openvino')}, nncf {version('nncf')}\n"
    print(text)
    options.results.write_text(f"    python benchmarks/throughput.py {' '.join(sys.argv[1:])}\n\n{text}")


if __name__ == "__main__":
    main()
