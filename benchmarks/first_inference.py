"""From nothing to the first result: our library against OpenVINO's compiled model from its own cache, each time in a fresh process.

    python benchmarks/first_inference.py --data ../shared/data [--network resnet50]... [--rounds 15] [--threads 1]

    load + run      open the library (or let OpenVINO compile the int8 network out of its cache directory, or import the blob it exported), then one run
    whole process   the same with the interpreter's start and all imports

Candidates take turns; files are warm in the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import networks
import numpy as np

from qcompiler.runtime import peers

WORKER = """
import json, sys, time
import numpy as np
kind, path, data, threads, cache = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
with np.load(data) as file:
    inputs = {name: file[name] for name in file.files}
start = time.perf_counter()
if kind == "ours":
    from qcompiler import load
else:
    import openvino
imported = time.perf_counter()
if kind == "ours":
    session = load(path, threads=threads)
    loaded = time.perf_counter()
    outputs = session.run(inputs)
else:
    settings = json.loads(sys.argv[6])
    core = openvino.Core()
    if kind == "cache":
        core.set_property({"CACHE_DIR": cache})
        model = core.compile_model(path, "CPU", settings)
    else:
        with open(path, "rb") as blob:
            model = core.import_model(blob.read(), "CPU", settings)
    request = model.create_infer_request()
    loaded = time.perf_counter()
    outputs = request.infer(inputs)
done = time.perf_counter()
first = next(iter(outputs.values()))
print(json.dumps({"import": imported - start, "load": loaded - imported, "run": done - loaded, "finite": bool(np.isfinite(first).all())}))
"""


def once(arguments: list[str]) -> dict[str, float]:
    """Seconds of one fresh process: {import, load, run, "load + run", "whole process"}."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", WORKER, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    whole = time.perf_counter() - start
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    assert times.pop("finite"), arguments
    return times | {"load + run": times["load"] + times["run"], "whole process": whole}


def prepare(network: networks.Network, folder: Path, threads: int) -> dict[str, list[str]]:
    """{candidate: arguments of its process}: compiles, quantizes, and lets OpenVINO fill its cache and export its blob."""
    from qcompiler.backend.build import build
    from qcompiler.base.targets import find_target
    from qcompiler.pipeline.compile import quantize

    target = find_target("native")
    quantized = quantize(network.model, target, network.calibration(), preprocess=network.preprocess, preset="fast")
    library = build(quantized.integer, target, "int8").link().save(folder / "int8.so")
    samples = [sample for sample, _ in zip(quantized.job.samples, range(8), strict=False)]
    np.savez(folder / "inputs.npz", **samples[0])
    data, cache = str(folder / "inputs.npz"), str(folder / "cache")
    found = {"ours": ["ours", str(library), data, str(threads), cache]}
    if peers.installed("openvino", "nncf"):
        import openvino

        settings = peers.openvino_settings(threads)
        model, blob = peers.nncf_model(network.model, samples), folder / "int8.blob"
        openvino.save_model(model, str(folder / "int8.xml"), compress_to_fp16=False)
        blob.write_bytes(openvino.Core().compile_model(model, "CPU", settings).export_model().getvalue())
        found["openvino, cache directory"] = ["cache", str(folder / "int8.xml"), data, str(threads), cache, json.dumps(settings)]
        found["openvino, imported blob"] = ["blob", str(blob), data, str(threads), cache, json.dumps(settings)]
    return found


def measure(candidates: dict[str, list[str]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """{candidate: {phase: seconds of each round}}; a first round, which fills caches, doesn't count."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in candidates}
    for turn in range(rounds + 1):
        for name in list(candidates)[:: 1 if turn % 2 else -1]:
            for phase, seconds in once(candidates[name]).items():
                times[name].setdefault(phase, []).extend([seconds] if turn else [])
    return times


def table(network: str, times: dict[str, dict[str, list[float]]]) -> str:
    """Minimum and median of each phase, and the ratio of "load + run" to ours."""
    from qcompiler.base.text import milliseconds
    from qcompiler.base.text import table as text

    ours = min(times["ours"]["load + run"])
    rows = []
    for name, phases in times.items():
        cells = [f"{milliseconds(min(t))} / {milliseconds(float(np.median(t)))}" for t in phases.values()]
        rows.append([name, *cells, f"{min(phases['load + run']) / ours:.2f}"])
    phases = [f"{phase}|" for phase in times["ours"]]
    return text(f"{network}, first inference in a fresh process, minimum / median ms", ("what", *phases, "load + run x ours|"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks.add_arguments(parser)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    found: list[Any] = networks.chosen(options)
    for network in found:
        with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
            print(table(network.name, measure(prepare(network, Path(folder), options.threads), options.rounds)), end="\n\n")
    if not found:
        print("no network to measure: give --data", file=sys.stderr)
    return 0 if found else 2


if __name__ == "__main__":
    sys.exit(main())
