"""Seconds of a compilation beside NNCF's quantization of the same network on the same samples, each time in a fresh process.

    python benchmarks/compile_time.py --data ../shared/data [--network resnet50]... [--preset fast]... [--state warm]... [--rounds 2]

    cold    no object code of kernels is kept from before
    warm    the kernels of an equal compilation are kept
    table   as warm, from a calibration that `qcompiler calibrate` stored; its own time is not counted

fast and default stand beside NNCF's default, accurate beside its full bias correction. Both get the samples as arrays in memory; whole processes are timed,
from the imports to the library (NNCF: the quantized model) in memory, and find the bytecode of their Python sources, as those of an installation do.
Candidates take turns and the least of each counts. CPU seconds are those of all threads and child processes. NNCF compiles no code: its model is compiled
when it is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import networks
import numpy as np

from qcompiler.runtime import peers

WORKER = """
import json, os, resource, sys, time
begin = time.perf_counter()
kind, model, data, table, preset, name = sys.argv[1:7]
import numpy as np
if kind == "nncf":
    from qcompiler.runtime import peers
    samples = [{name: x} for x in np.load(data)]
    peers.nncf_model(model, samples, fast_bias_correction=preset != "accurate")
elif kind == "calibrate":
    import qcompiler
    qcompiler.calibrate(model, table, [{name: x} for x in np.load(data)], preset=preset)
else:
    import qcompiler
    qcompiler.compile(model, calibration=table if kind == "table" else [{name: x} for x in np.load(data)], preset=preset)
wall, (user, system, *children) = time.perf_counter() - begin, os.times()[:4]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"wall": wall, "cpu": user + system + sum(children), "peak": peak / 1024}))
"""
STATES = ("cold", "warm", "table")
PRESETS = ("fast", "default", "accurate")


class Timed:
    """The candidates of one network. folder: for its samples, tables and object code."""

    def __init__(self, network: networks.Network, samples: int, folder: Path) -> None:
        import onnx

        from qcompiler.base.tensor import TensorInfo
        from qcompiler.calibration.data import at_most, open_samples

        port = onnx.load(str(network.model), load_external_data=False).graph.input[0]
        shape = tuple(max(1, d.dim_value) for d in port.type.tensor_type.shape.dim)
        found = at_most(open_samples(network.calibration(), [TensorInfo(port.name, shape, "float32")], network.preprocess), samples)
        self.network, self.folder, self.input = network, folder, port.name
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        self.environment = kept | {"QCOMPILER_CACHE": str(folder / "kernels"), "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
        np.save(folder / "samples.npy", np.stack([sample[port.name] for sample in found]))

    def once(self, kind: str, preset: str, cold: bool = False) -> dict[str, float]:
        """One process of a candidate: "nncf", "calibrate", "compile" or "table"."""
        if cold:
            shutil.rmtree(self.folder / "kernels", ignore_errors=True)
        arguments = [kind, self.network.model, self.folder / "samples.npy", self.folder / f"{preset}.qcal", preset, self.input]
        command = [sys.executable, "-c", WORKER, *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return seconds

    def of(self, preset: str, states: list[str], rounds: int) -> dict[str, dict[str, float]]:
        """Candidate -> the least of each number over the rounds. Without NNCF there is nothing of it."""
        found: dict[str, list[dict[str, float]]] = {}
        nncf = peers.installed("nncf", "openvino")
        for kind in ("compile", *(["nncf"] if nncf else [])):
            self.once(kind, preset)  # leaves bytecode
        if "table" in states:
            self.once("calibrate", preset)
        for _ in range(rounds):
            for state in states:
                found.setdefault(state, []).append(self.once("table" if state == "table" else "compile", preset, state == "cold"))
                if nncf:
                    found.setdefault("nncf", []).append(self.once("nncf", preset))
        return {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}


def lines(name: str, preset: str, measured: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Rows of the table."""
    rival = measured.get("nncf")
    beside = f"{rival['wall']:8.1f}{rival['cpu']:8.1f}{rival['peak']:8.0f}" if rival else f"{'-':>8}{'-':>8}{'-':>8}"
    rows = []
    for state in STATES:
        if state in measured:
            own = measured[state]
            ratio = f"{own['wall'] / rival['wall']:8.2f}{own['cpu'] / rival['cpu']:8.2f}" if rival else f"{'-':>8}{'-':>8}"
            rows.append(f"{name:22}{preset:10}{state:7}{own['wall']:8.1f}{own['cpu']:8.1f}{own['peak']:8.0f}{beside}{ratio}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks.add_arguments(parser, networks.NAMES)
    parser.add_argument("--preset", action="append", choices=PRESETS, help=f"default: all of {', '.join(PRESETS)}")
    parser.add_argument("--state", action="append", choices=STATES, help=f"default: all of {', '.join(STATES)}")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    print(f"{'':39}{'ours':>24}{'NNCF':>24}{'ours / NNCF':>16}")
    print(f"{'network':22}{'preset':10}{'state':7}{'s':>8}{'CPU s':>8}{'MB':>8}{'s':>8}{'CPU s':>8}{'MB':>8}{'s':>8}{'CPU s':>8}")
    for network in networks.chosen(options):
        with tempfile.TemporaryDirectory() as folder:
            timed = Timed(network, options.samples, Path(folder))
            for preset in options.preset or PRESETS:
                print(*lines(network.name, preset, timed.of(preset, options.state or list(STATES), options.rounds)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
