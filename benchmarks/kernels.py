"""How near the convolution and dense kernels come to the peak of the machine: layer by layer, one thread, untuned.

    python benchmarks/kernels.py [--isa x86-avx512vnni] [--network resnet50|mobilenet_v2|all] [--float] [--match 3x3]

The peak is that of a loop of dot instructions over registers, measured in turns with each kernel, because clocks and neighbours vary; a
column is kernel over peak. Kernels run back to back on the same data, as warm in cache as their size allows.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompiler import schedules
from qcompiler.schedules.conv import ConvRow
from qcompiler.schedules.harness import aligned, store
from qcompiler.schedules.isa import Isa, load, save
from qcompiler.schedules.table import KERNELS, Kernel, Layout, OpCall
from qcompiler.targets import Target, find_target, missing_features

# (image size, input channels, output channels, kernel, stride, residual, how often the network has it)
LAYERS: dict[str, list[tuple[int, int, int, int, int, bool, int]]] = {
    "resnet50": [
        (224, 3, 64, 7, 2, False, 1), (56, 64, 64, 1, 1, False, 1), (56, 64, 64, 3, 1, False, 3), (56, 64, 256, 1, 1, False, 1),
        (56, 64, 256, 1, 1, True, 3), (56, 256, 64, 1, 1, False, 2), (56, 256, 128, 1, 1, False, 1), (56, 128, 128, 3, 2, False, 1),
        (28, 128, 512, 1, 1, True, 4), (56, 256, 512, 1, 2, False, 1), (28, 512, 128, 1, 1, False, 3), (28, 128, 128, 3, 1, False, 3),
        (28, 512, 256, 1, 1, False, 1), (28, 256, 256, 3, 2, False, 1), (14, 256, 1024, 1, 1, True, 6), (28, 512, 1024, 1, 2, False, 1),
        (14, 1024, 256, 1, 1, False, 5), (14, 256, 256, 3, 1, False, 5), (14, 1024, 512, 1, 1, False, 1), (14, 512, 512, 3, 2, False, 1),
        (7, 512, 2048, 1, 1, True, 3), (14, 1024, 2048, 1, 2, False, 1), (7, 2048, 512, 1, 1, False, 2), (7, 512, 512, 3, 1, False, 2),
        (1, 2048, 1000, 1, 1, False, 1),
    ],
    "mobilenet_v2": [
        (224, 3, 32, 3, 2, False, 1), (112, 32, 16, 1, 1, False, 1), (112, 16, 96, 1, 1, False, 1), (56, 96, 24, 1, 1, False, 1),
        (56, 24, 144, 1, 1, False, 2), (56, 144, 24, 1, 1, True, 1), (28, 144, 32, 1, 1, False, 1), (28, 32, 192, 1, 1, False, 3),
        (28, 192, 32, 1, 1, True, 2), (14, 192, 64, 1, 1, False, 1), (14, 64, 384, 1, 1, False, 4), (14, 384, 64, 1, 1, True, 3),
        (14, 384, 96, 1, 1, False, 1), (14, 96, 576, 1, 1, False, 3), (14, 576, 96, 1, 1, True, 2), (7, 576, 160, 1, 1, False, 1),
        (7, 160, 960, 1, 1, False, 3), (7, 960, 160, 1, 1, True, 2), (7, 960, 320, 1, 1, False, 1), (7, 320, 1280, 1, 1, False, 1),
        (1, 1280, 1000, 1, 1, False, 1),
    ],
}  # fmt: skip
Run = Callable[[], float]  # seconds of one call


def timed(module: tvm.IRModule, target: Target, arrays: list[np.ndarray], microseconds: float = 1500) -> Run:
    """A measurement of `run`: the mean of as many calls as take `microseconds`."""
    function = tvm.tirx.build(module, target=tvm.target.Target(target.tvm))["run"]
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]

    def measure(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            function(*pointers)
        return (time.perf_counter() - start) / count

    measure(2)
    count = max(1, int(microseconds * 1e-6 / measure(2)))
    return lambda: measure(count)


def serial_module(kernel: Kernel, arity: int) -> tvm.IRModule:
    """All tasks one after the other: a parallel loop costs microseconds even with one thread."""
    module = tvm.IRModule({"kernel": kernel.func})
    callee = module.get_global_var("kernel")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"global_symbol": "run"})
        pointers = [T.arg(f"p{i}", T.handle()) for i in range(arity)]
        with T.serial(0, kernel.tasks) as task:
            T.evaluate(tvm.ir.Call(callee, [task, *pointers]))
    module["run"] = builder.get()
    return module


def peak_run(isa: Isa, target: Target) -> tuple[Run, int]:
    """A loop of dot steps, 2 activations that stay by 6 weights, and its multiply-accumulates.

    Every product is of other operands and weights change from step to step, lest LLVM compute one product for all.
    """
    steps, pixels, blocks, vectors = 20_000, 2, 6, 32
    size, chains = isa.lanes * isa.group, pixels * blocks
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"global_symbol": "run", "tirx.noalias": True})
        pointers = [T.arg(n, T.handle()) for n in ("x", "w", "out")]
        x = T.decl_buffer((pixels * isa.group,), isa.input_dtype, data=pointers[0])
        w = T.decl_buffer(((vectors + blocks) * size,), isa.weight_dtype, data=pointers[1])
        out = T.decl_buffer((chains * isa.lanes,), isa.accumulator, data=pointers[2])
        accs = [T.alloc_buffer((isa.lanes,), isa.accumulator) for _ in range(chains)]
        for i, acc in enumerate(accs):
            save(acc, 0, load(out, i * isa.lanes, isa.lanes), isa.lanes)
        activations = [isa.activation(x, p * isa.group, isa.group) for p in range(pixels)]
        with T.serial(0, steps) as i:
            for block in range(blocks):
                b = isa.weights(w, (i % vectors + block) * size)
                for a, acc in zip(activations, accs[block * pixels :], strict=False):
                    save(acc, 0, isa.dot(load(acc, 0, isa.lanes), a, b), isa.lanes)
        for i, acc in enumerate(accs):
            save(out, i * isa.lanes, load(acc, 0, isa.lanes), isa.lanes)
    sizes = [(pixels * isa.group, isa.input_dtype), ((vectors + blocks) * size, isa.weight_dtype), (chains * isa.lanes, isa.accumulator)]
    arrays = [aligned(n, dtype) for n, dtype in sizes]
    for array in arrays:
        array[:] = 0
    return timed(tvm.IRModule({"run": builder.get()}), target, arrays), steps * chains * size


def layer_op(layer: tuple[int, int, int, int, int, bool, int], dtype: str) -> tuple[OpCall, np.ndarray]:
    """A layer on random data; the input's layout is left to the row."""
    size, inputs, outputs, kernel, stride, residual, _ = layer
    rng, pad, is_float = np.random.default_rng(0), kernel // 2, dtype == "float32"
    out_size = (size + 2 * pad - kernel) // stride + 1
    attrs: dict[str, Any] = {"strides": [stride] * 2, "padding": [pad] * 4, "dilation": [1, 1], "groups": 1}
    output = Layout((1, out_size, out_size, outputs), dtype)
    shape, image = (outputs, kernel, kernel, inputs), (1, size, size, inputs)
    bias = rng.integers(-5000, 5000, outputs).astype(np.float32 if is_float else np.int32)
    if is_float:
        attrs |= {"low": 0.0, "high": 3.4028234663852886e38}
        x, operands = rng.standard_normal(image).astype(np.float32), [rng.standard_normal(shape).astype(np.float32), bias]
    else:
        attrs |= {"x_zero_point": -128, "zero_point": -128, "low": -128, "high": 127, "out_dtype": "int8"}
        x = rng.integers(-128, 128, image).astype(np.int8)
        weight = np.clip(np.rint(rng.normal(0, 32, shape)), -127, 127).astype(np.int8)  # about as wide as trained layers
        operands = [weight, bias, np.full(outputs, 0.5 / (74 * np.sqrt(weight[0].size)), np.float32)]
        if residual:
            attrs |= {"residual_zero_point": 0, "residual_multiplier": 1000, "residual_shift": 11}
    tensors = [Layout(image, dtype), *operands, *([output] if residual else [])]
    return OpCall(f"qc.{'f32.' * is_float}conv2d", tensors, attrs, output), x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=find_target("native").rows[0], help="kernel row; default: the best of this machine")
    parser.add_argument("--network", default="all", choices=[*LAYERS, "all"])
    parser.add_argument("--float", action="store_true", help="the float32 kernels")
    parser.add_argument("--match", default="", help="only layers whose line contains this")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    target = find_target(args.isa)
    if args.isa == "x86-avxvnni" and missing_features(target):
        print("no AVX-VNNI here: its kernels run in their AVX512VL encoding, with twice the registers")
        target = dataclasses.replace(target, tvm=find_target("x86-avx512vnni").tvm)
    schedules.load(target)
    operator = "qc.f32.conv2d" if args.float else "qc.conv2d"
    row = next(r for isa in target.rows for r in KERNELS[operator] if r.isa == isa and isinstance(r, ConvRow))
    best_peak, peak_macs = peak_run(row.unit, target)
    for network in LAYERS if args.network == "all" else [args.network]:
        print(f"{network}, {row.name}, one thread\n{'layer':34} {'us':>8} {'GMAC/s':>7} {'of peak':>8}   tiling")
        total = total_macs = total_ideal = 0.0
        for layer in LAYERS[network]:
            size, inputs, outputs, kernel, stride, residual, times = layer
            name = f"{size}x{size} {inputs}->{outputs} {kernel}x{kernel}/{stride}{' + residual' * residual}"
            if args.match not in name:
                continue
            op, x = layer_op(layer, row.unit.input_dtype)
            need = row.needs(op, target)[0]
            op.operands[0] = Layout(x.shape, row.unit.input_dtype, need.halo, -(-inputs // need.pitch) * need.pitch)
            built = row.build(op, row.default(op, target), target)
            arrays = [store(x, op.tensors[0])] + [store(np.zeros(t.shape, np.int8), t) for t in op.tensors[1:]]
            for constant in built.constants:
                arrays.append(aligned(constant.size, str(constant.dtype)))
                arrays[-1][:] = constant.reshape(-1)
            arrays.append(aligned(op.output.elements, op.output.dtype))
            run = timed(serial_module(built, len(arrays)), target, arrays)
            turns = [(best_peak(), run()) for _ in range(args.rounds)]
            peak, seconds = peak_macs / min(t[0] for t in turns), min(t[1] for t in turns)
            total, total_macs = total + times * seconds, total_macs + times * built.macs
            total_ideal += times * built.macs / peak
            tile = "x".join(str(built.params[k]) for k in ("rows", "cols", "blocks"))
            print(f"{name:34} {seconds * 1e6:8.1f} {built.macs / seconds / 1e9:7.1f} {built.macs / seconds / peak:8.1%}   {tile}, {built.tasks} tasks")
        if total:
            print(f"{'all, as often as they occur':34} {total * 1e6:8.1f} {total_macs / total / 1e9:7.1f} {total_ideal / total:8.1%}\n")


if __name__ == "__main__":
    main()
