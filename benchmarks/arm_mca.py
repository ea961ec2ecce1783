"""What the inner loops of the ARM convolution kernels reach on cores that this machine has not: static analysis by llvm-mca.

    python benchmarks/arm_mca.py [--check]

Per row of the kernel table and per core: multiply-accumulates per cycle of the emitted innermost loop (operands in the first-level cache), beside
the core's peak, which is what llvm-mca gives for a stream of independent multiplying instructions of the row's kind. A depthwise loop contains its
epilogue, and only the taps of the kernel count. LLVM describes Cortex-A76 by the model of Cortex-A57; Neoverse N1 has its pipeline, so N1 stands
for both. `--check` exits with 1 when a dense int8 row is below 80 % of the peak on a core that executes out of order. Needs llvm-mca 17 or newer
(Neoverse models); the newest one on PATH is used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from mca import Estimate, Layer, analyse, assembly_of, loops, mnemonic, report

from qcompiler import schedules
from qcompiler.base.targets import find_target
from qcompiler.schedules.table import select

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

LAYERS = (
    Layer("1x1 28x28 128->128", 28, 128, 128),
    Layer("1x1 7x7 320->1280", 7, 320, 1280),
    Layer("3x3 14x14 256->256", 14, 256, 256, 3),
    Layer("3x3/2 28x28 64->96", 28, 64, 96, 3, stride=2),
    Layer("float 1x1 28x28 128->128", 28, 128, 128, is_float=True),
    Layer("depthwise 3x3 28x28 192", 28, 192, 192, 3, 192),
    Layer("depthwise 5x5 28x28 240", 28, 240, 240, 5, 240),
)


def macs_of(lines: list[str]) -> int:
    return sum(MACS.get(mnemonic(line), 0) for line in lines)


def inner_loop(assembly: str) -> list[str]:
    """The loop of one basic block that multiplies most."""
    return max(loops(assembly, r"b\.?\w+", r"(b|bx|ret|tbn?z|cbn?z)\b", "//|@"), key=macs_of, default=[])


def measure(mca: str) -> Iterator[Estimate]:
    for name, cores in CORES.items():
        target = find_target(name)
        schedules.load(target)
        for layer in LAYERS:
            op = layer.op(target.storage)
            row = select(op, target)
            if row.isa != name or (layer.is_float and target.architecture != "aarch64"):
                continue  # another target's row; float kernels matter where networks are calibrated
            params = row.default(op, target)
            loop = inner_loop(assembly_of(row.build(op, params, target), 1, target))
            if not macs_of(loop):
                sys.exit(f"{row.name}, {layer.name}: the code has no loop of one basic block that multiplies")
            macs = macs_of(loop) if layer.dense else params["rows"] * params["columns"] * 8 * layer.kernel**2  # 8 channels
            pattern = PEAKS["f32" if layer.is_float and target.architecture == "aarch64" else row.isa]
            stream = [pattern.format(i) for i in range(24 if target.architecture == "aarch64" else 12)]
            for core in cores:
                rate, peak = macs / analyse(mca, loop, target, core), macs_of(stream) / analyse(mca, stream, target, core)
                yield Estimate(row.name, layer.name, core, rate, peak, layer.dense and not layer.is_float and core not in IN_ORDER)


if __name__ == "__main__":
    sys.exit(report(__doc__, measure, 0.8))
