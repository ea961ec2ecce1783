"""A machine with a GPU, for tests: a stand-in for the CUDA driver that executes a program's kernels on the CPU."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cuda_emulated import HEADERS, compile_emulated

from qcompiler.backend.codegen_cuda import cuda_source
from qcompiler.backend.cuda import find_nvcc
from qcompiler.backend.lowering import Program
from qcompiler.base.files import temporary_folder
from qcompiler.base.targets import find_target


@functools.cache
def driver() -> bytes:
    """The stand-in, compiled once for all tests of this process."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", f"-I{HEADERS}"]
    with temporary_folder() as folder:
        subprocess.run(["g++", *flags, str(HEADERS / "driver.cc"), "-o", str(folder / "libcuda.so.1"), "-ldl"], check=True)
        return (folder / "libcuda.so.1").read_bytes()


def compile_driver(folder: Path) -> None:
    if not (folder / "libcuda.so.1").exists():
        (folder / "libcuda.so.1").write_bytes(driver())


@dataclass(frozen=True)
class FakeGpu:
    """The driver (in `folder`) and the emulated kernels: of one program, or a folder of recorded ones."""

    folder: Path
    emulated: Path

    @staticmethod
    def record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
        """A GPU for all that this process and its children compile from now on: a compiler first on PATH that keeps source and result. See `emulate`."""
        tools, kept = folder / "bin", folder / "recorded"
        tools.mkdir()
        kept.mkdir()
        real = find_nvcc(find_target("cuda-sm80"))
        keep = f'place=$(mktemp -d "{kept}/XXXXXXXX") && cp kernels.cu kernels.fatbin "$place"'
        (tools / "nvcc").write_text(f'#!/bin/sh\n"{real}" "$@" || exit $?\n[ ! -f kernels.fatbin ] || {{ {keep}; }}\n')
        (tools / "nvcc").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
        compile_driver(folder)
        return FakeGpu(folder, kept)

    def emulate(self) -> None:
        """Make the recorded programs executable, those that are not yet."""
        for source in self.emulated.glob("*/kernels.cu"):
            if not (source.parent / "emulated.so").exists():
                compile_emulated(source.read_text(), source.parent / "emulated.so")

    @staticmethod
    def build(folder: Path, program: Program) -> FakeGpu:
        compile_driver(folder)
        return FakeGpu(folder, compile_emulated(cuda_source(program.kernels(), program.target), folder / "emulated.so"))

    def environment(self, switches: str = "") -> dict[str, str]:
        """Variables under which a process sees this GPU."""
        log = self.folder / "log.jsonl"
        log.unlink(missing_ok=True)
        fake = {"QC_FAKE_CUDA_PROGRAM": str(self.emulated), "QC_FAKE_CUDA": switches, "QC_FAKE_CUDA_LOG": str(log)}
        return {**os.environ, "LD_LIBRARY_PATH": str(self.folder), **fake}

    def run(self, *command: str | Path, switches: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=self.environment(switches), timeout=600)

    def python(self, code: str, *arguments: str | Path, switches: str = "") -> subprocess.CompletedProcess[str]:
        """Run Python code under this driver; sys.argv[1:] are `arguments`."""
        return self.run(sys.executable, "-c", code, *arguments, switches=switches)

    def log(self) -> dict[str, Any]:
        """What the last process did with the driver. Fails when it never loaded it."""
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        return dict(json.loads(lines[-1]))


def without_driver() -> dict[str, str]:
    """An environment in which no CUDA driver is found (this machine must have none of its own)."""
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has an NVIDIA driver: its absence can't be tested")
    return {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
