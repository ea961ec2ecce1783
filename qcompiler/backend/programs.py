"""The programs that a device runs beside a library: `qc_run` and `qc_measure`, built for its target. They need libc only."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from qcompiler.backend.artifact import RUNTIME
from qcompiler.backend.toolchain import check_cplusplus, compiler_words, link_words
from qcompiler.base.errors import TargetError
from qcompiler.base.targets import Target


def build_runner(path: Path, target: Target) -> None:
    """Write qc_run, with the C++ runtime inside. Raises TargetError."""
    check_cplusplus(target)
    sections = ["-ffunction-sections", "-Wl,--gc-sections"]
    driver = ["--driver-mode=g++"] if target.android else []  # the NDK's clang by the name of the C compiler
    _build(path, target, [*driver, "-std=c++17", *sections, str(RUNTIME / "qc_run.cc"), "-static-libstdc++", "-static-libgcc"])


def build_measurer(path: Path, target: Target) -> None:
    """Write qc_measure. Raises TargetError."""
    arithmetic = ["qc_arm32.c"] if target.android and target.architecture == "armv7a" else []
    _build(path, target, ["-x", "c", "-std=gnu11", *(str(RUNTIME / name) for name in ["qc_measure.c", *arithmetic])])


def _build(path: Path, target: Target, words: Sequence[str]) -> None:
    compiler = compiler_words(target)
    command = [*compiler, "-O2", f"-I{RUNTIME / 'include'}", *words, "-o", str(path), "-Wl,--build-id=none", "-s", *link_words(target, "dl", "pthread")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise TargetError(f"building {path.name} for '{target.name}' with {compiler[0]} failed: {done.stderr.strip()[:600]}")
