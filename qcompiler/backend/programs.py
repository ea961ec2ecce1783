"""The programs that a device runs beside a library: `qc_run` and `qc_measure`, built for its target. They need libc only."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from qcompiler.backend.artifact import RUNTIME, find_compiler
from qcompiler.base.errors import TargetError
from qcompiler.base.targets import Target


def build_runner(path: Path, target: Target) -> None:
    """Write qc_run, with the C++ runtime inside. Raises TargetError."""
    sections = ["-ffunction-sections", "-Wl,--gc-sections"]
    _build(path, target, ["-std=c++17", *sections, str(RUNTIME / "qc_run.cc"), "-static-libstdc++", "-static-libgcc"])


def build_measurer(path: Path, target: Target) -> None:
    """Write qc_measure. Raises TargetError."""
    _build(path, target, ["-x", "c", "-std=gnu11", str(RUNTIME / "qc_measure.c")])


def _build(path: Path, target: Target, words: Sequence[str]) -> None:
    compiler = find_compiler(target)
    command = [compiler, "-O2", f"-I{RUNTIME / 'include'}", *words, "-o", str(path), "-Wl,--build-id=none", "-s", "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise TargetError(f"building {path.name} for '{target.name}' with {compiler} failed: {done.stderr.strip()[:600]}")
