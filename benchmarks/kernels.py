"""The KERNELS table against the roofline: how near each kernel comes to what the machine can do at most. One thread, untuned.

    python benchmarks/kernels.py [--isa x86-avx512vnni] [--family resnet50 mobilenet_v2 depthwise others] [--float] [--match 3x3] [--search 20]

A kernel can't be faster than its multiply-accumulates at the int8 peak, nor than its inputs and constants read, or its output written, at the bandwidth
of the cache that holds them all (see roofline.py). "of roof" is the greatest of these three over its time, "bound by" says which it is. Peak and kernel
are measured in turns, because clocks and neighbours vary. Kernels run back to back on the same data, as warm in cache as their size allows.
--search times N random points of each design space too, and says how much faster the best of them is than the default.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import roofline
import timed_operators
import tvm
from timed_operators import Case
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompiler import schedules
from qcompiler.base.host import request_tiles
from qcompiler.base.targets import Target, find_target, missing_features
from qcompiler.schedules.harness import aligned, store
from qcompiler.schedules.table import Kernel, Layout, OpCall, Row, select

FAMILIES = ("resnet50", "mobilenet_v2", "depthwise", "others")


@dataclass
class Ready:
    """A case with its row, its layouts decided and its inputs stored."""

    case: Case
    row: Row
    op: OpCall
    inputs: list[np.ndarray]


def ready(case: Case, target: Target) -> Ready:
    """Layouts as a network would have them: the halos and pitches that the row asks of its inputs."""
    row = select(case.op, target)
    needs = iter(row.needs(case.op, target))
    operands: list[Any] = []
    for operand in case.op.operands:
        if isinstance(operand, Layout):
            need = next(needs)
            channels = operand.shape[-1]
            operand = dataclasses.replace(operand, halo=need.halo, pitch=-(-channels // need.pitch) * need.pitch if need.pitch > 1 else 0)
        operands.append(operand)
    op = dataclasses.replace(case.op, operands=operands)
    zeros = [int(op.attrs.get("x_zero_point", 0))] + [0] * len(case.inputs)
    inputs = [store(x, t, z) if x.dtype == np.int8 else flat(x) for x, t, z in zip(case.inputs, op.tensors, zeros, strict=False)]
    return Ready(case, row, op, inputs)


def flat(array: np.ndarray) -> np.ndarray:
    copy = aligned(array.size, str(array.dtype))
    copy[:] = array.reshape(-1)
    return copy


def serial_module(kernel: Kernel, arity: int, repeats: int) -> tvm.IRModule:
    """All tasks one after the other, several times: a parallel loop costs microseconds even with one thread, and a call half of one."""
    module = tvm.IRModule({"kernel": kernel.func})
    callee = module.get_global_var("kernel")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"global_symbol": "run"})
        pointers = [T.arg(f"p{i}", T.handle()) for i in range(arity)]
        with T.serial(0, repeats), T.serial(0, kernel.tasks) as task:
            T.evaluate(tvm.ir.Call(callee, [task, *pointers]))
    module["run"] = builder.get()
    return module


def call_of(item: Ready, kernel: Kernel, target: Target) -> tuple[roofline.Call, int]:
    """A call that runs the kernel for about a millisecond, and how many times that is."""
    arrays = [*item.inputs, *(flat(c) for c in kernel.constants), aligned(item.op.output.elements, item.op.output.dtype)]
    if kernel.scratch:
        arrays.append(aligned(kernel.scratch, "uint8"))
    once = roofline.seconds_of(roofline.bound(serial_module(kernel, len(arrays), 1), target, arrays), 3)
    repeats = max(1, int(1e-3 / once))
    return roofline.bound(serial_module(kernel, len(arrays), repeats), target, arrays), repeats


def roof(op: OpCall, kernel: Kernel, peak: float, target: Target) -> tuple[float, str]:
    """The least seconds that the machine allows, and what sets them."""
    read = sum(t.bytes for t in op.tensors) + sum(c.nbytes for c in kernel.constants)
    held = read + op.output.bytes
    limits = {
        "peak": kernel.macs / peak,
        "reading": read / roofline.bandwidth(target.name, held),
        "writing": op.output.bytes / roofline.bandwidth(target.name, held, True),
    }
    name = max(limits, key=limits.__getitem__)
    return limits[name], name


def measure(item: Ready, params: dict[str, Any], target: Target, peak: tuple[roofline.Call, int], rounds: int) -> dict[str, Any]:
    """{seconds, macs, peak (multiply-accumulates per second), roof (seconds), bound, params}."""
    kernel = item.row.build(item.op, params, target)
    call, repeats = call_of(item, kernel, target)
    turns = [(roofline.seconds_of(peak[0], 1), roofline.seconds_of(call, 1)) for _ in range(rounds)]
    rate, seconds = peak[1] / min(p for p, _ in turns), min(s for _, s in turns) / repeats
    limit, name = roof(item.op, kernel, rate, target)
    return {"seconds": seconds, "macs": kernel.macs, "peak": rate, "roof": limit, "bound": name, "params": kernel.params or params}


def search(item: Ready, target: Target, count: int, peak: tuple[roofline.Call, int]) -> float:
    """Least seconds of `count` random points of the row's space (of those that can be built); infinity where there are none."""
    rng, space, best = np.random.default_rng(1), item.row.space(item.op, target), float("inf")
    for _ in range(count if space else 0):
        point = {k: v[int(rng.integers(len(v)))] for k, v in space.items()}
        try:
            best = min(best, measure(item, point, target, peak, 3)["seconds"])
        except ValueError:
            continue
    return best


def table(title: str, rows: list[tuple[Ready, dict[str, Any], float | None]]) -> str:
    """One line per kernel (with the gain of a search where one was made), and their sum, each as often as its network has it."""
    from qcompiler.base.text import table as text

    lines = []
    for item, m, gain in rows:
        rate = f"{m['macs'] / m['seconds'] / 1e9:.1f}" if m["macs"] else ""
        of_peak = f"{100 * m['macs'] / m['seconds'] / m['peak']:.0f} %" if m["macs"] else ""
        point = " ".join(f"{k}={v}" for k, v in m["params"].items())
        cells = [item.case.label, item.row.name, f"{m['seconds'] * 1e6:.1f}", rate, of_peak, f"{100 * m['roof'] / m['seconds']:.0f} %", m["bound"]]
        lines.append([*cells, "" if gain is None else f"{gain:.2f}", point])
    total = sum(item.case.times * m["seconds"] for item, m, _ in rows)
    macs = sum(item.case.times * m["macs"] for item, m, _ in rows)
    ideal = sum(item.case.times * m["macs"] / m["peak"] for item, m, _ in rows)
    least = sum(item.case.times * m["roof"] for item, m, _ in rows)
    sums = [f"{total * 1e6:.1f}", f"{macs / total / 1e9:.1f}", f"{100 * ideal / total:.0f} %", f"{100 * least / total:.0f} %"]
    lines.append(["all, as often as they occur", "", *sums, "", "", ""])
    columns = ("shape", "kernel", "us|", "GMAC/s|", "of peak|", "of roof|", "bound by", "search x|", "parameters")
    return text(title, columns, lines, width=200)


def cases(family: str, storage: str) -> list[Case]:
    if family == "others":
        return timed_operators.others(storage) if storage != "float32" else []
    return timed_operators.depthwise(storage) if family == "depthwise" else timed_operators.convolutions(family, storage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    roofline.add_isa(parser)
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--float", action="store_true", help="the float32 kernels")
    parser.add_argument("--match", default="", help="only lines whose shape or kernel contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--search", type=int, default=0, metavar="N", help="random points to time per kernel")
    args = parser.parse_args()
    target = find_target(args.isa)
    if args.isa == "x86-avxvnni" and missing_features(target):
        print("no AVX-VNNI here: its kernels run in their AVX512VL encoding, with twice the registers")
        target = dataclasses.replace(target, tvm=find_target("x86-avx512vnni").tvm)
    if "amx_tile" in target.features and (refused := request_tiles()):
        parser.error(f"Linux gives this process no AMX tiles (error {refused})")
    schedules.load(target)
    peak = roofline.peak_call(roofline.unit_of(target, "qc.f32.conv2d" if args.float else "qc.conv2d"), target)
    for family in args.family:
        rows = []
        for case in cases(family, "float32" if args.float else target.storage):
            item = ready(case, target)
            if args.match not in f"{case.label} {item.row.name}":
                continue
            found = measure(item, dict(item.row.default(item.op, target)), target, peak, args.rounds)
            best = search(item, target, args.search, peak)
            rows.append((item, found, found["seconds"] / best if np.isfinite(best) else None))
        if rows:
            print(table(f"{family}, {target.name}, one thread, peak {max(m['peak'] for _, m, _ in rows) / 1e9:.0f} GMAC/s", rows), end="\n\n")


if __name__ == "__main__":
    main()
