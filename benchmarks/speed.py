"""Latency of whole networks, side by side in one process: ours, OpenVINO, ONNX Runtime and LiteRT, in int8 and in float, where installed.

    python benchmarks/speed.py --data ../shared/data [--network resnet50]... [--text FILE.onnx]... [--tokens 32 128 384] [--threads 1 2] [--seconds 10]
                               [--target T] [--tuning-log DIR] [--tflite NAME=FILE.tflite]... [--without "onnxruntime float"]... [--layers N] [--json FILE]

Candidates take turns, so read the ratios: absolute times drift by 10 % and more between runs. The peers' int8 networks are made by their own tools
(NNCF, ONNX Runtime's static quantization, and its dynamic one for text) from the same samples. "of peak" counts the network's multiply-accumulates against
a loop of the machine's 8-bit dot instructions (of VPDPBUSD for x86-amx too), which takes turns with the candidates; "speed-up" is the time on one thread
over the time on so many. --layers adds our steps on one thread, those that lose most time against the peak first. With --target, our libraries are for
another row that this machine can run; ONEDNN_MAX_CPU_ISA=AVX2 (AVX512_CORE_VNNI, ...) in the environment holds OpenVINO to as much.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import networks
import roofline

from qcompiler.runtime import peers

OURS = "int8"
BASES = ("openvino int8", "onnxruntime int8", "onnxruntime float", "float", OURS)  # what ratios refer to: the first that was measured
CANDIDATES = (OURS, "int8 tuned", "float", "openvino int8", "openvino float", "onnxruntime int8", "onnxruntime dynamic", "onnxruntime float", "litert int8")
CALIBRATION = 20  # samples: times do not depend on the ranges
PEAK = "peak"


class Prepared:
    """A network, compiled and quantized by everyone who takes part. `calls(threads)` are its candidates."""

    def __init__(
        self, network: networks.Network, target: Any, folder: Path, without: set[str], tuning_log: Path | None, tflite: Path | None, progress: Any
    ) -> None:
        from qcompiler.backend.build import build
        from qcompiler.backend.tuning_log import Tuned
        from qcompiler.pipeline.compile import quantize
        from qcompiler.pipeline.float_library import compile_float

        self.network, self.target, self.tflite = network, target, tflite
        wanted = [c for c in CANDIDATES if c not in without]
        options: Any = {"preprocess": network.preprocess, "preset": "fast", "progress": progress}
        quantized = quantize(network.model, self.target, network.calibration(), **options)
        self.samples = list(itertools.islice(quantized.job.samples, CALIBRATION))
        self.libraries: dict[str, Path] = {}
        logs = {OURS: None, "int8 tuned": tuning_log}
        for name in [n for n in logs if n in wanted and (n == OURS or tuning_log is not None)]:
            tuned = Tuned(self.target, logs[name])
            built = build(quantized.integer, self.target, f"generate {name} code", tuned, progress=progress)
            self.libraries[name] = built.link().save(folder / f"{name}.so")
            keys = sum(s.row is not None and bool(s.params) for s in built.program.steps)
            print(f"{network.name}, {name}: {keys} steps with tunables, {len(tuned.used)} of their workloads in a log", file=sys.stderr)
        if "float" in wanted:
            self.libraries["float"] = compile_float(network.model, progress=progress).save(folder / "float.so")
        self.peers: dict[str, Any] = {}
        if peers.installed("openvino"):
            self.peers["openvino float"] = network.model
            if peers.installed("nncf") and "openvino int8" in wanted:
                self.peers["openvino int8"] = peers.nncf_model(network.model, self.samples, transformer=network.tokens is not None)
        if peers.installed("onnxruntime"):
            self.peers["onnxruntime float"] = network.model
            if "onnxruntime int8" in wanted:
                self.peers["onnxruntime int8"] = peers.onnxruntime_int8(network.model, self.samples, folder)
            if "onnxruntime dynamic" in wanted and network.tokens is not None:
                self.peers["onnxruntime dynamic"] = peers.onnxruntime_dynamic(network.model, folder)
        if peers.installed("ai_edge_litert") and tflite is not None:
            self.peers["litert int8"] = tflite
        self.peers = {name: self.peers[name] for name in CANDIDATES if name in self.peers and name in wanted}

    def calls(self, threads: int) -> dict[str, peers.Call]:
        import qcompiler

        inputs = self.samples[0]
        sessions = {name: qcompiler.load(library, threads=threads) for name, library in self.libraries.items()}
        calls: dict[str, peers.Call] = {name: lambda s=s: s.run(inputs) for name, s in sessions.items()}  # type: ignore[misc]
        for name, model in self.peers.items():
            if name.startswith("openvino"):
                calls[name] = peers.openvino_call(model, inputs, threads)
            elif name.startswith("onnxruntime"):
                calls[name] = peers.onnxruntime_call(str(model), inputs, threads)
            else:
                calls[name] = peers.litert_call(model, inputs, threads)
        return calls

    @property
    def macs(self) -> int:
        from qcompiler.runtime.library import read_manifest

        return sum(step["macs"] for step in read_manifest(next(iter(self.libraries.values())))["steps"])


def measure(prepared: Prepared, threads: list[int], seconds: float, progress: Any) -> list[dict[str, Any]]:
    """One result per thread count; times in seconds.

    {network, target, threads, base, macs, peak: multiply-accumulates per second, candidates: {name: {minimum, median, rounds, ratio, of_peak}}}
    """
    from qcompiler.runtime.bench import interleave, ratios

    results = []
    for count in threads:
        calls = prepared.calls(count)
        calls[PEAK], macs = roofline.peak_call(roofline.unit_of(prepared.target), prepared.target, count)
        timings = interleave(calls, seconds=seconds, rehearse=1, progress=progress)
        peak = macs / next(t.minimum for t in timings if t.name == PEAK)
        timings = [t for t in timings if t.name != PEAK]
        base = next(name for name in BASES if name in calls)
        factors = ratios(timings, base)
        rows = {
            t.name: {"minimum": t.minimum, "median": t.median, "rounds": t.rounds, "ratio": factors[t.name], "of_peak": prepared.macs / t.minimum / peak}
            for t in timings
        }
        result = {"network": prepared.network.name, "target": prepared.target.name, "threads": count, "base": base, "macs": prepared.macs, "peak": peak}
        results.append(result | {"candidates": rows})
    return results


def profile(prepared: Prepared) -> dict[str, Any]:
    """Our steps on one thread, the tuned library's when there is one: {network, peak, steps: [{id, op, kernel, seconds, macs}]}."""
    import qcompiler

    session = qcompiler.load(prepared.libraries.get("int8 tuned", prepared.libraries[OURS]))
    peak, macs = roofline.peak_call(roofline.unit_of(prepared.target), prepared.target)
    best, steps = math.inf, [dict(s, seconds=math.inf) for s in session.manifest["steps"]]
    for _ in range(10):
        best = min(best, roofline.seconds_of(peak))
        for step, (*_, seconds) in zip(steps, session.profile(prepared.samples[0], 10), strict=True):
            step["seconds"] = min(step["seconds"], seconds)
    kept = [{k: s[k] for k in ("id", "op", "kernel", "seconds", "macs")} for s in steps]
    return {"network": prepared.network.name, "peak": macs / best, "steps": kept}


def mean_ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means of the ratios over networks: [{threads, base, candidate, networks, ratio}], per thread count, base and candidate."""
    groups: dict[tuple[int, str, str], list[float]] = {}
    for r in results:
        for name, row in r["candidates"].items():
            groups.setdefault((r["threads"], r["base"], name), []).append(row["ratio"])
    return [
        {"threads": threads, "base": base, "candidate": name, "networks": len(values), "ratio": math.exp(sum(map(math.log, values)) / len(values))}
        for (threads, base, name), values in groups.items()
    ]


def table(results: list[dict[str, Any]]) -> str:
    """Every network, thread count and candidate; then the geometric means."""
    from qcompiler.base.text import milliseconds
    from qcompiler.base.text import table as text

    alone = {(r["network"], name): row["minimum"] for r in results if r["threads"] == 1 for name, row in r["candidates"].items()}
    rows = []
    for r in results:
        for name, t in r["candidates"].items():
            single = alone.get((r["network"], name))
            speedup = f"{single / t['minimum']:.2f}" if single is not None and r["threads"] > 1 else ""
            times = [milliseconds(t["minimum"]), milliseconds(t["median"]), f"{t['ratio']:.3f}", f"{100 * t['of_peak']:.0f} %"]
            rows.append([r["network"], str(r["threads"]), name, *times, speedup, str(t["rounds"])])
    bases = " or ".join(sorted({r["base"] for r in results}))
    peaks = {r["threads"]: max(o["peak"] for o in results if o["threads"] == r["threads"]) for r in results}
    peak = ", ".join(f"{v / 1e9:.0f} GMAC/s on {k} thread{'s' * (k > 1)}" for k, v in sorted(peaks.items()))
    columns = ("network", "threads|", "what", "minimum ms|", "median ms|", f"x {bases}|", "of peak|", "speed-up|", "rounds|")
    parts = [text(f"Latency, batch 1, {results[0]['target']}; int8 peak: {peak}", columns, rows)]
    means = [[str(m["threads"]), m["candidate"], f"{m['ratio']:.3f}", str(m["networks"])] for m in mean_ratios(results)]
    parts.append(text(f"Geometric mean of the ratios to {bases}", ("threads|", "what", "ratio|", "networks|"), means))
    return "\n\n".join(parts)


def layer_table(layers: dict[str, Any], count: int) -> str:
    """The `count` steps of a network that lose most time against the peak."""
    from qcompiler.base.text import table as text

    steps, peak = layers["steps"], layers["peak"]
    total = sum(s["seconds"] for s in steps)
    rows = []
    for s in sorted(steps, key=lambda s: s["macs"] / peak - s["seconds"])[:count]:
        rate = s["macs"] / s["seconds"]
        speed = [f"{rate / 1e9:.1f}", f"{100 * rate / peak:.0f} %"] if s["macs"] else ["", ""]
        rows.append([s["id"], s["op"], s["kernel"], f"{s['seconds'] * 1e6:.1f}", f"{100 * s['seconds'] / total:.1f} %", *speed])
    ideal = sum(s["macs"] for s in steps) / peak
    title = f"{layers['network']}, 1 thread, {total * 1e3:.3f} ms, {100 * ideal / total:.0f} % of peak: the steps that lose most time"
    return text(title, ("value", "operator", "kernel", "us|", "share|", "GMAC/s|", "of peak|"), rows)


def host() -> str:
    """This machine and the versions that were measured, in one line."""
    from importlib import metadata

    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "unknown CPU")
    known = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    versions = [f"{name} {known[name]}" for name in ("openvino", "nncf", "onnxruntime", "ai-edge-litert") if name in known]
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores; {', '.join(versions) or 'no peers installed'}"


def pairs(values: Iterable[str]) -> dict[str, Path]:
    found = dict(value.split("=", 1) for value in values)
    return {name: Path(path) for name, path in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks.add_arguments(parser)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="per network and thread count")
    parser.add_argument("--target", default="native", help="of our libraries (default native)")
    parser.add_argument("--without", action="append", default=[], choices=CANDIDATES[1:], help="leave a candidate out; repeat for more")
    parser.add_argument("--tuning-log", type=Path, help="measure our library with these tuned kernels too")
    parser.add_argument("--text", action="append", default=[], type=Path, metavar="FILE", help="a network that reads tokens (ONNX), measured with random ones")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 384], help="of each of --text (default 32 128 384)")
    parser.add_argument("--tflite", action="append", default=[], metavar="NAME=FILE", help="the TFLite twin of a network, for LiteRT")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="print our N steps that lose most time, on one thread")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    from qcompiler.base.progress import terminal_progress
    from qcompiler.base.targets import find_target, missing_features

    target = find_target(options.target)
    if missing := missing_features(target):
        parser.error(f"this machine can't run {target.name}: it lacks {', '.join(missing)}")
    found, twins = networks.chosen(options) if options.network or not options.text else [], pairs(options.tflite)
    found += [networks.text_network(path, length, options.cache) for path in options.text for length in options.tokens]
    results: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as name, terminal_progress() as progress:
        for network in found:
            folder = Path(tempfile.mkdtemp(dir=name))
            prepared = Prepared(network, target, folder, set(options.without), options.tuning_log, twins.get(network.name), progress)
            results += measure(prepared, options.threads, options.seconds, progress)
            layers += [profile(prepared)] if options.layers else []
    if not results:
        print("no network to measure: give --data", file=sys.stderr)
        return 2
    print("\n\n".join([host(), table(results), *(layer_table(each, options.layers) for each in layers)]))
    if options.json:
        options.json.write_text(json.dumps({"host": host(), "results": results, "layers": layers}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
