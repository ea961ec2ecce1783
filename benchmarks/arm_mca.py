"""What the inner loops of the ARM convolution kernels reach on cores that this machine has not: static analysis by llvm-mca.

    python benchmarks/arm_mca.py [--check]

Per row of the kernel table and per core: multiply-accumulates per cycle of the emitted innermost loop (operands in the first-level cache), beside
the core's peak, which is what llvm-mca gives for a stream of independent multiplying instructions of the row's kind. A depthwise loop contains its
epilogue, and only the taps of the kernel count. LLVM describes Cortex-A76 by the model of Cortex-A57; Neoverse N1 has its pipeline, so N1 stands
for both. `--check` exits with 1 when a dense int8 row is below 80 % of the peak on a core that executes out of order. Needs llvm-mca 17 or newer
(Neoverse models); the newest one on PATH is used.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from qcompiler import schedules
from qcompiler.schedules.harness import module_of
from qcompiler.schedules.table import Layout, OpCall, select
from qcompiler.tables import table
from qcompiler.targets import Target, find_target

ITERATIONS = 200
MACS = {"smmla": 32, "sdot": 16, "smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8, "fmla": 4, "vmull.s8": 8, "vmlal.s8": 8}
PEAKS = {  # row -> independent instructions, {0} to {23} accumulators
    "arm64-i8mm": "smmla v{}.4s, v30.16b, v31.16b",
    "arm64-dotprod": "sdot v{}.4s, v30.16b, v31.4b[1]",
    "arm64-neon": "smull v{}.8h, v30.8b, v31.8b",
    "armv7-neon": "vmull.s8 q{}, d30, d31",
    "f32": "fmla v{}.4s, v30.4s, v31.s[1]",
}
CORES = {
    "arm64-neon": ("cortex-a55", "cortex-a72", "neoverse-n1", "neoverse-v1"),
    "arm64-dotprod": ("cortex-a55", "neoverse-n1", "neoverse-v1", "neoverse-n2"),
    "arm64-i8mm": ("neoverse-v1", "neoverse-n2", "neoverse-v2"),
    "armv7-neon": ("cortex-a57",),
}
IN_ORDER = {"cortex-a55"}  # waits for loads that LLVM does not schedule an iteration ahead


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


LAYERS = (
    Layer("1x1 28x28 128->128", 28, 128, 128),
    Layer("1x1 7x7 320->1280", 7, 320, 1280),
    Layer("3x3 14x14 256->256", 14, 256, 256, 3),
    Layer("3x3/2 28x28 64->96", 28, 64, 96, 3, stride=2),
    Layer("float 1x1 28x28 128->128", 28, 128, 128, is_float=True),
    Layer("depthwise 3x3 28x28 192", 28, 192, 192, 3, 192),
    Layer("depthwise 5x5 28x28 240", 28, 240, 240, 5, 240),
)


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
    triple, features = target.triple, ",".join(target.tvm["mattr"])
    command = [mca, f"-mtriple={triple}", f"-mcpu={core}", f"-mattr={features}", f"-iterations={ITERATIONS}", "-instruction-info=0", "-resource-pressure=0"]
    done = subprocess.run(command, input="\n".join(assembly) + "\n", capture_output=True, text=True)
    match = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if not match:
        sys.exit(f"llvm-mca failed for {core}: {done.stderr[:600]}")
    return int(match[1]) / ITERATIONS


def mnemonic(line: str) -> str:
    return line.split()[0] if line.split() else ""


def macs_of(lines: list[str]) -> int:
    return sum(MACS.get(mnemonic(line), 0) for line in lines)


def inner_loop(assembly: str) -> list[str]:
    """The basic block that branches back to itself and multiplies most."""
    loops, block, label = [], list[str](), ""
    for line in assembly.splitlines():
        text = line.split("//")[0].split("@")[0].strip()
        if match := re.fullmatch(r"(\.\w+):", text):
            label, block = match[1], []
        elif text and not text.startswith("."):
            block.append(text)
            if re.fullmatch(rf"b\.?\w+\s+{re.escape(label)}", text):
                loops.append(block[:])
            elif re.match(r"(b|bx|ret|tbn?z|cbn?z)\b", text):
                block = []
    return max(loops, key=macs_of, default=[])


def measure(mca: str) -> list[tuple[str, str, str, float, float, bool]]:
    """(row, layer, core, MACs per cycle, peak, counts for --check)."""
    results = []
    for name, cores in CORES.items():
        target = find_target(name)
        schedules.load(target)
        for layer in LAYERS:
            op = layer.op(target.storage)
            row = select(op, target)
            if row.isa != name or (layer.is_float and target.architecture != "aarch64"):
                continue  # another target's row; float kernels matter where networks are calibrated
            params = row.default(op, target)
            kernel = row.build(op, params, target)
            arity = 2 + len(kernel.constants)
            loop = inner_loop(tvm.tirx.build(module_of(kernel, arity), target=tvm.target.Target(target.tvm)).inspect_source("asm"))
            if not macs_of(loop):
                sys.exit(f"{row.name}, {layer.name}: the code has no loop of one basic block that multiplies")
            macs = macs_of(loop) if layer.dense else params["rows"] * params["columns"] * 8 * layer.kernel**2  # 8 channels
            pattern = PEAKS["f32" if layer.is_float and target.architecture == "aarch64" else row.isa]
            stream = [pattern.format(i) for i in range(24 if target.architecture == "aarch64" else 12)]
            for core in cores:
                rate, peak = macs / analyse(mca, loop, target, core), macs_of(stream) / analyse(mca, stream, target, core)
                results.append((row.name, layer.name, core, rate, peak, layer.dense and not layer.is_float and core not in IN_ORDER))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a dense int8 row is below 80 %% of the peak")
    options = parser.parse_args()
    results = measure(find_mca())
    rows = [[row, layer, core, f"{rate:.1f}", f"{peak:.1f}", f"{rate / peak:.0%}"] for row, layer, core, rate, peak, _ in results]
    print(table("Multiply-accumulates per cycle of the emitted inner loop, by llvm-mca", ("row", "layer", "core", "MAC/cycle|", "peak|", "|"), rows))
    low = [r for r in results if r[5] and r[3] < 0.8 * r[4]]
    for row, layer, core, rate, peak, _ in low if options.check else []:
        print(f"FAILED: {row}, {layer}, {core}: {rate / peak:.0%} of the peak", file=sys.stderr)
    return 1 if low and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
