"""`bench --throughput`: a library under load, in several streams."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qcompiler.base.errors import DataError
from qcompiler.base.text import milliseconds, table
from qcompiler.cli.arguments import positive


def add(p: argparse.ArgumentParser) -> None:
    """The options of `bench` for it."""
    g = p.add_argument_group("throughput", "Sessions in several threads share the library and take requests from one queue.")
    g.add_argument("--throughput", action="store_true", help="measure requests a second instead of the latency of one session")
    g.add_argument("--streams", type=positive, metavar="N", help="sessions that run at the same time (default: as many as the CPUs allow, with --threads each)")
    g.add_argument("--rate", type=float, metavar="R", help="requests a second that come whatever happens; otherwise the queue is always full")
    g.add_argument("--deadline", type=float, metavar="S", help="of a library for several batches: seconds that a request waits for others to run with")
    g.add_argument("--pin", action="store_true", help="keep each stream on CPUs of its own")


def check(options: argparse.Namespace) -> None:
    """Raises DataError for options that don't go together."""
    for name in ("streams", "rate", "deadline", "pin"):
        if getattr(options, name) not in (None, False) and not options.throughput:
            raise DataError(f"--{name} describes --throughput, which is not given")
    for name in ("model", "against", "layers", "csv", "trace", "footprint"):
        if options.throughput and getattr(options, name):
            raise DataError(f"--throughput measures the library alone; leave out --{name}")
    if options.rate is not None and not 0 < options.rate <= 1e6:
        raise DataError(f"--rate {options.rate:g}: expected a number above 0, at most a million a second")
    if options.throughput and not 0 < options.seconds < 1e6:
        raise DataError(f"--duration {options.seconds:g}: expected more than 0 seconds")


def throughput(options: argparse.Namespace, manifest: Mapping[str, Any], inputs: Mapping[str, np.ndarray], show: Callable[..., None]) -> int:
    """Measure, and print. manifest: of the library at the shape of `inputs`."""
    import os

    from qcompiler.runtime.pool import SessionPool, measure

    streams = options.streams or max(1, len(os.sched_getaffinity(0)) // options.threads)
    waiting = None if options.deadline is None else 64 * streams  # as many as fill batches
    with SessionPool(options.library, streams, options.threads, waiting, options.pin, options.deadline) as pool:
        load = measure(pool, inputs, options.seconds, options.rate)
    rows = rows_of(manifest)
    document: dict[str, Any] = {
        "streams": streams,
        "threads": options.threads,
        "pinned": options.pin,
        **load.to_json(),
        "samples_per_second": rows * load.per_second,
    }
    cells = [f"{rows * load.per_second:.1f}", f"{load.per_second:.1f}", *(milliseconds(load.quantile(q)) for q in (0.5, 0.9, 0.99)), str(len(load.latencies))]
    demand = "the queue always full" if options.rate is None else f"{options.rate:g} requests a second due"
    title = f"Throughput, {streams} streams of {options.threads} threads, {demand}"
    show(options, document, lambda: table(title, ("samples/s|", "requests/s|", "p50 ms|", "p90 ms|", "p99 ms|", "requests|"), [cells]))
    return 0


def rows_of(manifest: Mapping[str, Any]) -> int:
    """Samples of one request: the batch that all inputs and outputs have, else 1."""
    first = {port["shape"][0] if port["shape"] else 1 for kind in ("inputs", "outputs") for port in manifest[kind]}
    return int(first.pop()) if len(first) == 1 else 1
