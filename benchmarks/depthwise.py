"""The depthwise kernels, layer by layer: time and multiply-adds per second of one thread, untuned.

    python benchmarks/depthwise.py [--isa x86-avx512vnni] [--float] [--search 20]

Layers are those of MobileNetV2 and EfficientNet-Lite0. `--search N` also times N random points of the design space and reports how much faster the
best of them is than the default.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from typing import Any

import numpy as np
import tvm

from qcompiler import schedules
from qcompiler.schedules.harness import aligned, module_of, store
from qcompiler.schedules.table import KERNELS, Kernel, Layout, OpCall, Row
from qcompiler.targets import Target, find_target, load_targets, missing_features

LAYERS = [  # (image size, channels, kernel, stride)
    (112, 32, 3, 1), (112, 96, 3, 2), (56, 144, 3, 1), (56, 144, 3, 2), (28, 192, 3, 1), (28, 192, 3, 2), (14, 384, 3, 1), (14, 576, 3, 1),
    (14, 576, 3, 2), (7, 960, 3, 1), (56, 144, 5, 2), (28, 240, 5, 1), (14, 480, 5, 1), (14, 672, 5, 1), (14, 672, 5, 2), (7, 1152, 5, 1),
]  # fmt: skip


def layer(size: int, channels: int, kernel: int, stride: int, is_float: bool) -> tuple[OpCall, np.ndarray]:
    """A layer on random data, and its canonical input; its output leaves a ReLU6."""
    rng, pad, out = np.random.default_rng(0), kernel // 2, (size + 2 * (kernel // 2) - kernel) // stride + 1
    attrs: dict[str, Any] = {"strides": [stride] * 2, "padding": [pad] * 4, "dilation": [1, 1], "groups": channels}
    dtype = "float32" if is_float else "uint8"
    x, y = Layout((1, size, size, channels), dtype, (pad,) * 4), Layout((1, out, out, channels), dtype)
    w, bias = rng.integers(-127, 128, (channels, kernel, kernel, 1)), rng.integers(-3000, 3000, channels)
    data = rng.integers(-128, 128, x.shape).astype(np.int8)
    if is_float:
        op = OpCall("qc.f32.conv2d", [x, w.astype(np.float32), bias.astype(np.float32)], attrs | {"low": 0.0, "high": 6.0}, y)
        return op, data.astype(np.float32)
    attrs |= {"x_zero_point": -128, "zero_point": -128, "low": -128, "high": 127, "out_dtype": "int8"}
    return OpCall("qc.conv2d", [x, w.astype(np.int8), bias.astype(np.int32), np.full(channels, 1e-3, np.float32)], attrs, y), data


def measure(kernel: Kernel, op: OpCall, data: np.ndarray, target: Target, runs: int = 200) -> float:
    """Least seconds of one call, of `runs`."""
    module = module_of(kernel, 2 + len(kernel.constants))
    function = tvm.tirx.build(module, target=tvm.target.Target(target.tvm))["run"]
    arrays = [store(data, op.tensors[0], int(op.attrs.get("x_zero_point", 0)))]
    for constant in kernel.constants:
        arrays.append(aligned(constant.size, str(constant.dtype)))
        arrays[-1][:] = constant.reshape(-1)
    arrays.append(aligned(op.output.elements, op.output.dtype))
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function(*pointers)
        times.append(time.perf_counter() - start)
    return min(times)


def search(row: Row, op: OpCall, data: np.ndarray, target: Target, count: int) -> float:
    """Least seconds of `count` random points whose steps are no longer than those the heuristic considers."""
    rng, space, best = np.random.default_rng(1), row.space(op, target), float("inf")
    default = row.default(op, target) | {"row_tasks": 1, "channel_tasks": 1}
    for _ in range(count):
        point = default | {k: v[int(rng.integers(len(v)))] for k, v in space.items() if not k.endswith("tasks")}
        if point["rows"] * point["columns"] <= 16:
            best = min(best, measure(row.build(op, point, target), op, data, target))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default="native", help="target whose rows to use (default: the best this machine has)")
    parser.add_argument("--float", action="store_true", help="the float32 kernels")
    parser.add_argument("--search", type=int, default=0, metavar="N", help="random points to time per layer")
    options = parser.parse_args()
    target = find_target(options.isa)
    if missing_features(target):
        parser.error(f"this machine lacks {', '.join(missing_features(target))}; targets: {', '.join(load_targets())}")
    schedules.load(target)
    tvm.get_global_func("runtime.config_threadpool")(1, 1)
    print(f"{target.name}\n{'layer':>22} {'us':>8} {'GMAC/s':>8} {'build s':>8}" + ("  search" if options.search else ""))
    for size, channels, kernel, stride in LAYERS:
        op, data = layer(size, channels, kernel, stride, options.float)
        row = next(r for isa in target.rows for r in KERNELS[op.name] if r.isa == isa and "depthwise" in r.name)
        start = time.perf_counter()
        point = row.default(op, target) | {"row_tasks": 1, "channel_tasks": 1}
        built = row.build(op, point, target)
        seconds = measure(built, op, data, target)
        spent = time.perf_counter() - start - 200 * seconds
        found = f"{seconds / search(row, op, data, target, options.search):8.2f}" if options.search else ""
        name = f"{size}x{size}x{channels} {kernel}x{kernel} /{stride}"
        print(f"{name:>22} {seconds * 1e6:8.1f} {built.macs / seconds / 1e9:8.0f} {spent:8.2f}{found}", flush=True)


if __name__ == "__main__":
    main()
