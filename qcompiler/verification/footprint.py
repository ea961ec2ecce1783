"""What a library takes beside time: memory, and energy where the machine can tell.

Run as a program (`python -m qcompiler.verification.footprint LIBRARY THREADS`) it measures the memory of its own, fresh process: only numpy and the library are
in it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_RUNS = 3


@dataclass(frozen=True)
class Memory:
    """Bytes. constants: weights and tables, shared by all sessions of a process. workspace: of each concurrent run. resident: by how much
    the resident memory of a fresh process grew, at most, while it loaded the library and ran it (code and constants that were touched, workspace,
    inputs and outputs); None where /proc can't tell."""

    constants: int
    workspace: int
    resident: int | None


def memory(library: Path, threads: int = 1) -> Memory:
    """Measure a library for this machine in a process of its own. Raises what loading it raises."""
    from qcompiler.runtime.session import Session

    manifest = Session(library, threads).manifest
    done = subprocess.run([sys.executable, "-m", "qcompiler.verification.footprint", str(library), str(threads)], capture_output=True, text=True, check=True)
    return Memory(int(manifest["constants"]), int(manifest["workspace"]), json.loads(done.stdout))


def _resident(field: str) -> int | None:
    """Bytes of a field of /proc/self/status: VmRSS now, VmHWM at most so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def _growth(library: str, threads: int) -> int | None:
    from qcompiler.base.tensor import TensorInfo
    from qcompiler.runtime.bench import random_inputs
    from qcompiler.runtime.session import Session

    random_inputs([TensorInfo("x", (1,), "float32")])  # what it imports is not the library's
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    session = Session(library, threads)
    inputs = random_inputs(session.inputs)
    for _ in range(_RUNS):
        session.run(inputs)
    peak = _resident("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


# -- energy -----------------------------------------------------------------------------------------------------------------------------------


def energy_counters(root: Path = POWERCAP) -> dict[str, Path]:
    """The processor packages whose energy this process may read (RAPL, Linux powercap): name -> folder. Empty on machines without."""
    found = {}
    for folder in sorted(root.glob("*-rapl:*")) if root.is_dir() else ():
        try:
            name = (folder / "name").read_text().strip()
            int((folder / "energy_uj").read_text())
        except (OSError, ValueError):
            continue
        if name.startswith("package"):
            found[name] = folder
    return found


def joules(call: Callable[[], object], seconds: float, root: Path = POWERCAP, clock: Callable[[], float] = time.perf_counter) -> float | None:
    """Joules per call, of whole processor packages, over about `seconds` of calling; None where no counter can be read.

    Everything else on these packages counts too: compare candidates on an idle machine, one after the other.
    """
    counters = energy_counters(root)
    if not counters:
        return None
    before = {name: int((folder / "energy_uj").read_text()) for name, folder in counters.items()}
    begin, calls = clock(), 0
    while not calls or clock() - begin < seconds:
        call()
        calls += 1
    total = 0
    for name, folder in counters.items():
        spent = int((folder / "energy_uj").read_text()) - before[name]
        total += spent if spent >= 0 else spent + int((folder / "max_energy_range_uj").read_text())  # the counter went round
    return total * 1e-6 / calls


if __name__ == "__main__":
    print(json.dumps(_growth(sys.argv[1], int(sys.argv[2]))))
