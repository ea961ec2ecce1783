"""What the estimates by llvm-mca share: layers to compile, their innermost loops, cycles of a loop, a table and the verdict of `--check`."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from qcompiler.base.targets import Target
from qcompiler.base.text import table
from qcompiler.schedules.harness import module_of
from qcompiler.schedules.table import Kernel, Layout, OpCall

ITERATIONS = 200


@dataclass(frozen=True)
class Layer:
    """A convolution to compile. `dense`: counts for `--check`."""

    name: str
    size: int
    inputs: int
    outputs: int
    kernel: int = 1
    groups: int = 1
    stride: int = 1
    is_float: bool = False

    @property
    def dense(self) -> bool:
        return self.groups == 1

    def op(self, storage: str) -> OpCall:
        rng, out = np.random.default_rng(0), self.size // self.stride
        weight = rng.integers(-127, 128, (self.outputs, self.kernel, self.kernel, self.inputs // self.groups))
        attrs: dict[str, Any] = {"strides": [self.stride] * 2, "padding": [self.kernel // 2] * 4, "dilation": [1, 1], "groups": self.groups}
        halo = (self.kernel // 2,) * 4
        dtype = "float32" if self.is_float else storage
        x, y = Layout((1, self.size, self.size, self.inputs), dtype, halo), Layout((1, out, out, self.outputs), dtype)
        if self.is_float:
            return OpCall("qc.f32.conv2d", [x, weight.astype(np.float32), np.zeros(self.outputs, np.float32)], attrs | {"low": 0.0, "high": 6.0}, y)
        constants: list[Any] = [weight.astype(np.int8), np.zeros(self.outputs, np.int32), np.full(self.outputs, 1e-4, np.float32)]
        attrs |= {"x_zero_point": 3, "zero_point": 1, "low": -128, "high": 127, "out_dtype": "int8"}
        return OpCall("qc.conv2d", [x, *constants], attrs, y)


@dataclass(frozen=True)
class Estimate:
    """Multiply-accumulates per cycle of a loop, and of the core's peak. `counts`: `--check` demands a part of the peak."""

    row: str
    layer: str
    core: str
    rate: float
    peak: float
    counts: bool


def find_mca() -> str:
    """The newest llvm-mca on PATH. Exits when there is none of version 17 or newer."""
    for version in range(30, 16, -1):
        if found := shutil.which(f"llvm-mca-{version}"):
            return found
    found = shutil.which("llvm-mca")
    if found and (match := re.search(r"version (\d+)", subprocess.run([found, "--version"], capture_output=True, text=True).stdout)) and int(match[1]) >= 17:
        return found
    sys.exit("llvm-mca 17 or newer is not installed (apt-get install llvm-19)")


def analyse(mca: str, assembly: list[str], target: Target, core: str) -> float:
    """Cycles per pass over `assembly`, run again and again."""
    command = [mca, f"-mtriple={target.triple}", f"-mcpu={core}", f"-iterations={ITERATIONS}", "-instruction-info=0", "-resource-pressure=0"]
    command += [f"-mattr={','.join(target.tvm['mattr'])}"] if "mattr" in target.tvm else []
    done = subprocess.run(command, input="\n".join(assembly) + "\n", capture_output=True, text=True)
    match = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if not match:
        sys.exit(f"llvm-mca failed for {core}: {done.stderr[:600]}")
    return int(match[1]) / ITERATIONS


def assembly_of(kernel: Kernel, inputs: int, target: Target) -> str:
    arity = inputs + len(kernel.constants) + 1 + (kernel.scratch > 0)
    return str(tvm.tirx.build(module_of(kernel, arity), target=tvm.target.Target(target.tvm)).inspect_source("asm"))


def mnemonic(line: str) -> str:
    return line.split()[0] if line.split() else ""


def loops(assembly: str, jump: str, ends: str, comments: str) -> list[list[str]]:
    """The basic blocks that jump back to themselves. Patterns: `jump`, an instruction that may; `ends`, one that ends a block; `comments`, what starts one."""
    found, block, label = [], list[str](), ""
    for line in assembly.splitlines():
        text = re.split(comments, line)[0].strip()
        if match := re.fullmatch(r"(\.\w+):", text):
            label, block = match[1], []
        elif text and not text.startswith("."):
            block.append(text)
            if re.fullmatch(rf"{jump}\s+{re.escape(label)}", text):
                found.append(block[:])
            elif re.match(ends, text):
                block = []
    return found


def report(description: str | None, measure: Callable[[str], Iterable[Estimate]], floor: float, arguments: Sequence[str] | None = None) -> int:
    """The command line of an estimate; the exit status."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help=f"exit with 1 when a dense int8 row is below {floor:.0%}% of the peak")
    options = parser.parse_args(arguments)
    results = list(measure(find_mca()))
    rows = [[e.row, e.layer, e.core, f"{e.rate:.1f}", f"{e.peak:.1f}", f"{e.rate / e.peak:.0%}"] for e in results]
    print(table("Multiply-accumulates per cycle of the emitted inner loop, by llvm-mca", ("row", "layer", "core", "MAC/cycle|", "peak|", "|"), rows))
    low = [e for e in results if e.counts and e.rate < floor * e.peak]
    for e in low if options.check else []:
        print(f"FAILED: {e.row}, {e.layer}, {e.core}: {e.rate / e.peak:.0%} of the peak", file=sys.stderr)
    return 1 if low and options.check else 0
