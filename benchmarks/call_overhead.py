"""What a run call costs above the kernels themselves, and what the thread pool costs, measured from C.

    python benchmarks/call_overhead.py [MODEL.so] [--threads N] [--rounds N] [--check]

Without a library the embedded example network is compiled for this machine. Two views of the same cost, each from the least of many rounds:

    call     a call that runs no step: checks, lock, argument passing, entry and exit of the generated code with its test for every step
    above    run - (sum of single-step calls - steps * call): what one run takes beyond its kernels as they are when called alone. Kernels called
             alone find their data and code in cache, so this view holds cache effects between kernels too; it is meant for small networks.

With several threads also the pool (pool.c): the system call that wakes it (median), the time from there until a worker helps (median; the caller works
meanwhile), and an empty parallel loop while it is awake (median).

--check exits 1 when `call` is above 2 microseconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import qcompiler
from qcompiler.backend.artifact import RUNTIME
from qcompiler.backend.toolchain import find_compiler
from qcompiler.base.targets import find_target
from qcompiler.cli.demo import MODEL, demo_data

LIMIT_NS = 2000.0


def build(source: Path, folder: Path, *options: str) -> Path:
    """A C program of this folder, compiled."""
    program = folder / source.stem
    compiler = find_compiler(find_target("native"))
    command = [compiler, "-x", "c", "-std=gnu11", "-O2", f"-I{RUNTIME / 'include'}", f"-I{RUNTIME}", *options, str(source), "-o", str(program)]
    subprocess.run([*command, "-ldl", "-lpthread"], check=True)
    return program


def run(program: Path, *words: object) -> dict[str, float]:
    """What the program prints."""
    done = subprocess.run([str(program), *map(str, words)], check=True, stdout=subprocess.PIPE, text=True)
    printed: dict[str, float] = json.loads(done.stdout)
    return printed


def pool(threads: int, rounds: int, folder: Path) -> dict[str, float]:
    """Nanoseconds: wake, help (-1: no worker ever came within a millisecond), launch; and in how many rounds a worker came."""
    return run(build(Path(__file__).with_name("pool.c"), folder), threads, rounds)


def measure(library: Path, threads: int, rounds: int, folder: Path) -> dict[str, float]:
    """Nanoseconds: call, run, step_calls (sum), kernels (steps alone, without their calls), above; and the number of steps."""
    times = run(build(Path(__file__).with_suffix(".c"), folder), library.resolve(), threads, rounds)
    times["kernels"] = times["step_calls"] - times["steps"] * times["call"]
    times["above"] = times["run"] - times["kernels"]
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, metavar="MODEL.so")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as name:
        folder = Path(name)
        library = options.library
        if library is None:
            library = qcompiler.compile(MODEL, target="native", calibration=demo_data()[0], preset="fast").save(folder / "digits.so")
        times = measure(library, options.threads, options.rounds, folder)
        waking = pool(options.threads, min(options.rounds, 500), folder) if options.threads > 1 else None
    for key in ("call", "run", "kernels", "above"):
        print(f"{key:8} {times[key] / 1e3:9.3f} us")
    print(f"{int(times['steps'])} steps, {options.threads} thread(s); limit for call: {LIMIT_NS / 1e3:.0f} us")
    if waking is not None:
        help_ = f"helps after {waking['help'] / 1e3:.1f} us" if waking["rounds_helped"] else "never helped within 1 ms"
        print(f"pool: waking takes the caller {waking['wake'] / 1e3:.1f} us, a worker {help_}, an empty parallel loop takes {waking['launch'] / 1e3:.2f} us")
    return int(options.check and times["call"] > LIMIT_NS)


if __name__ == "__main__":
    sys.exit(main())
