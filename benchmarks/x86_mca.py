"""What the inner loops of the x86 convolution kernels reach on cores that this machine is not: static analysis by llvm-mca.

    python benchmarks/x86_mca.py [--check]

Per row and per core: multiply-accumulates per cycle of the emitted innermost loop (operands in the first-level cache), beside the core's peak, which
is what llvm-mca gives for a stream of independent dot steps: VPDPBUSD, or without VNNI the three instructions VPMADDUBSW, VPMADDWD and VPADDD.
`--check` exits with 1 when a row is below 70 % of that. There is nothing of `x86-amx`: LLVM's models put in a placeholder for tile instructions.
LLVM's models give some cores fewer VPDPBUSD a cycle than others of the same width, so read percents of the model's peak, not rates.
Winograd convolutions do fewer multiplications than they count, so they are left out. Needs llvm-mca 17 or newer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from mca import Estimate, Layer, analyse, assembly_of, loops, mnemonic, report

from qcompiler import schedules
from qcompiler.base.targets import find_target
from qcompiler.schedules.table import select

BYTES = ("vpmaddubsw %{0}mm15, %{0}mm14, %{0}mm13", "vpmaddwd %{0}mm12, %{0}mm13, %{0}mm13", "vpaddd %{0}mm13, %{0}mm{1}, %{0}mm{1}")
ROWS = {  # row -> cores, register letter, instructions of a dot step into accumulator {1}
    "x86-avx2": (("haswell", "skylake", "znver3"), "y", BYTES),
    "x86-avxvnni": (("alderlake",), "y", ("{{vex}} vpdpbusd %{0}mm15, %{0}mm14, %{0}mm{1}",)),
    "x86-avx512": (("skylake-avx512",), "z", BYTES),
    "x86-avx512vnni": (("cascadelake", "icelake-server", "sapphirerapids", "znver4"), "z", ("vpdpbusd %{0}mm15, %{0}mm14, %{0}mm{1}",)),
}
LAYERS = (
    Layer("1x1 28x28 128->128", 28, 128, 128),
    Layer("1x1 14x14 512->96", 14, 512, 96),
    Layer("1x1 7x7 320->1280", 7, 320, 1280),
    Layer("3x3 14x14 256->256", 14, 256, 256, 3),
    Layer("3x3/2 28x28 64->96", 28, 64, 96, 3, stride=2),
)


def macs_of(lines: list[str]) -> int:
    """Each byte of the register is a product."""
    steps = [line for line in lines if mnemonic(line.removeprefix("{vex}")) in ("vpdpbusd", "vpmaddubsw")]
    return sum(64 if "zmm" in line else 32 if "ymm" in line else 16 for line in steps)


def measure(mca: str) -> Iterator[Estimate]:
    for name, (cores, letter, step) in ROWS.items():
        target = find_target(name)
        schedules.load(target)
        stream = [line.format(letter, accumulator) for accumulator in range(12) for line in step]
        for layer in LAYERS:
            op = layer.op(target.storage)
            row = select(op, target)
            if "winograd" in row.name:
                continue
            assembly = assembly_of(row.build(op, row.default(op, target), target), 1, target)
            loop = max(loops(assembly, r"j\w+", r"(jmp|ret\w*)\b", "#"), key=macs_of, default=[])
            if row.isa != name or not macs_of(loop):
                sys.exit(f"{row.name}, {layer.name}: the code has no loop of one basic block that multiplies, or it is another row's")
            for core in cores:
                rate, peak = macs_of(loop) / analyse(mca, loop, target, core), macs_of(stream) / analyse(mca, stream, target, core)
                yield Estimate(row.name, layer.name, core, rate, peak, True)


if __name__ == "__main__":
    sys.exit(report(__doc__, measure, 0.7))
