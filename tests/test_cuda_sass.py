"""The machine code of GPU kernels has the instructions that rows claim, contracts nothing, and keeps its registers."""

from __future__ import annotations

import collections
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools import require_nvcc, require_nvdisasm

from qcompiler import schedules
from qcompiler.backend.codegen_cuda import cuda_source
from qcompiler.backend.cuda import find_nvcc
from qcompiler.base.targets import Target, find_target
from qcompiler.numerics import constants
from qcompiler.schedules.table import Kernel, Layout, OpCall, select


def instructions(kernels: dict[str, Kernel], target: Target, folder: Path) -> dict[str, collections.Counter[str]]:
    """How often each kernel has each instruction; "LDG 128": those of so many bits, and "IMMA U8": those of unsigned bytes by signed ones."""
    (folder / "kernels.cu").write_text(cuda_source(kernels, target))
    arch = str(target.tvm["arch"])
    subprocess.run([str(find_nvcc(target)), "-std=c++17", "-w", f"-arch={arch}", "-cubin", "kernels.cu", "-o", "kernels.cubin"], cwd=folder, check=True)
    listing = subprocess.run([require_nvdisasm(), "-c", "kernels.cubin"], cwd=folder, check=True, capture_output=True, text=True).stdout
    found: dict[str, collections.Counter[str]] = {}
    for line in listing.splitlines():
        if begin := re.match(r"\.text\.(\w+):", line):
            current = found.setdefault(begin[1], collections.Counter())
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)([.\w]*)", line):
            current[code[1]] += 1
            for part in ("64", "128", "U8"):
                current[f"{code[1]} {part}"] += part in code[2].split(".")
    assert set(found) == set(kernels)
    return found


def conv(target: Target, size: int, inputs: int, outputs: int, kernel: int, groups: int = 1, batch: int = 8, residual: bool = False, weight: int = 8) -> Kernel:
    layouts = [Layout((batch, size, size, c), "int8") for c in (inputs, outputs)]
    weights = np.full((outputs, kernel, kernel, inputs // groups), weight, np.int8)
    attrs: dict[str, Any] = {"strides": [1, 1], "padding": [kernel // 2] * 4, "dilation": [1, 1], "groups": groups, "x_zero_point": -3, "zero_point": 2}
    operands: list[Any] = [layouts[0], weights, np.zeros(outputs, np.int32), np.ones(outputs, np.float32)]
    if residual:
        operands.append(layouts[1])
        attrs |= {"residual_zero_point": 1, "residual_multiplier": 1000, "residual_shift": 10}
    return build(OpCall("qc.conv2d", operands, attrs, layouts[1]), target)


def build(op: OpCall, target: Target) -> Kernel:
    row = select(op, target)
    return row.build(op, row.default(op, target), target)


def add(target: Target) -> Kernel:
    layout = Layout((8, 28, 28, 128), "int8")
    attrs = {"a_zero_point": -128, "a_multiplier": 51234, "b_zero_point": 127, "b_multiplier": -40321, "shift": 16, "zero_point": 3}
    return build(OpCall("qc.add", [layout, layout], attrs, layout), target)


def attention(target: Target, zero_point: int, value_size: int) -> Kernel:
    q, v = Layout((4, 128, 8 * 64), "int8"), Layout((4, 128, 8 * value_size), "int8")
    m, c = constants.attention_multipliers(1.0, np.full(8, 1e-5), 1.0, 1.0, 1.0, 8)
    attrs = {"heads": 8, "kv_heads": 8, "size": 64, "value_size": value_size, "columns": [0, 0, 0], "zero_points": [zero_point] * 3}
    return build(OpCall("qc.attention", [q, q, v, m, c], attrs, v), target)


def matmul(target: Target, zero_point: int) -> Kernel:
    a, b, out = (Layout((48, *s), "int8") for s in ((128, 64), (64, 128), (128, 128)))
    return build(OpCall("qc.matmul", [a, b], {"a_zero_point": zero_point, "b_zero_point": zero_point, "multiplier": 0.01}, out), target)


def weight_only(target: Target, rows: int, bits: int, zero_point: int) -> Kernel:
    x, out, groups = Layout((rows, 4096), "float32"), Layout((rows, 1000), "float32"), (1000, 64)
    operands = [x, np.ones((1000, 4096), np.int8), np.full(groups, zero_point, np.int8), np.ones(groups, np.float32), np.ones(1000, np.float32)]
    largest = float(np.finfo(np.float32).max)
    return build(OpCall("qc.f32.dense_weight_only", operands, {"bits": bits, "group_size": 64, "low": -largest, "high": largest}, out), target)


@pytest.mark.parametrize("name", ["cuda-sm75", "cuda-sm80", "cuda-sm90a"])
def test_products(name: str, tmp_path: Path) -> None:
    """Attention: q . k of signed bytes, p . v of unsigned by signed ones; nothing is spilled, and operands come in words."""
    require_nvcc()
    target = find_target(name)
    schedules.load(target)
    kernels = {
        "attention": attention(target, 0, 64),
        "attention_zeros": attention(target, -5, 128),
        "matmul": matmul(target, 0),
        "matmul_zeros": matmul(target, 3),
        "four": weight_only(target, 1, 4, 0),
        "four_zeros": weight_only(target, 1, 4, 3),
        "four_rows": weight_only(target, 64, 4, 0),
        "four_many": weight_only(target, 4096, 4, 3),
        "eight_many": weight_only(target, 4096, 8, -3),
        "eight": weight_only(target, 1, 8, 0),
    }
    for symbol, counts in instructions(kernels, target, tmp_path).items():
        row = kernels[symbol].row
        few = 16 * (row == "cuda-mma/f32.dense_weight_only")  # of some 600: a few words of which the compiler thinks that they buy one more warp
        assert counts["STL"] + counts["LDL"] <= few, f"{symbol}: registers were spilled"
        assert ("IMMA" in counts) == (row in ("cuda-mma/attention", "cuda-mma/matmul")), (symbol, row, counts)
        assert ("HMMA" in counts) == (row == "cuda-mma/f32.dense_weight_only"), (symbol, row, counts)
        assert (counts["IMMA U8"] > 0) == (row == "cuda-mma/attention"), (symbol, row, counts)
        if row == "cuda-mma/f32.dense_weight_only":
            assert counts["HMMA"] == 6 * 8 * kernels[symbol].params["rows"] // 16 and counts["I2F"] == counts["F2F"] == 0, (symbol, counts)
            assert min(counts["LDG 128"], counts["STG 128"]) > 4, (symbol, counts)
        elif row == "cuda/f32.dense_weight_only":
            assert counts["I2F"] == 0 and counts["LDG 128"] > 1 and counts["FFMA"] > 16, f"{symbol}: weights are converted, or not read in whole words"
        else:
            assert counts["LDG 64"] > 0 and counts["STG 64"] > 0, (symbol, counts)


@pytest.mark.parametrize("name", ["cuda-sm75", "cuda-sm75-dp4a", "cuda-sm80", "cuda-sm90", "cuda-sm90a"])
def test_instructions(name: str, tmp_path: Path) -> None:
    require_nvcc()
    target = find_target(name)
    schedules.load(target)
    kernels = {
        "three": conv(target, 28, 128, 128, 3),
        "wide": conv(target, 14, 256, 1024, 1, residual=True),
        "small": conv(target, 7, 512, 512, 3, batch=1),
        "grouped": conv(target, 14, 128, 128, 3, groups=32),
        "depthwise": conv(target, 14, 96, 96, 3, groups=96),
        "depthwise_five": conv(target, 28, 240, 240, 5, groups=240, batch=1),
        "add": add(target),
        "four_bits": conv(target, 14, 256, 1024, 1, residual=True, weight=7, batch=1),
        "four_bits_small": conv(target, 7, 2048, 512, 1, batch=1, weight=-8),
    }
    if target.rows[0] != "cuda-dp4a":  # which rather unpacks nothing where it computes
        kernels["four_bits_many"] = conv(target, 28, 256, 256, 3, batch=32, weight=-8)
    for symbol, counts in instructions(kernels, target, tmp_path).items():
        row = kernels[symbol].row
        assert counts["FFMA"] == 0, f"{symbol}: an addition was contracted with a multiplication"
        assert counts["STL"] == counts["LDL"] == 0, f"{symbol}: registers were spilled"
        assert (counts["IMMA"] > 0) == row.startswith("cuda-mma"), (symbol, row, counts)
        assert (counts["IDP"] > 0) == row.startswith("cuda-dp4a"), (symbol, row, counts)
        assert (counts["IGMMA"] > 0) == row.startswith("cuda-wgmma"), (symbol, row, counts)
        if row.startswith(("cuda-mma", "cuda-wgmma")):
            assert (counts["LDSM"] > 0) == row.startswith("cuda-mma"), f"{symbol}: operands are not read as the row says"
            assert (counts["LDGSTS"] > 0) == (target.capability >= 80), f"{symbol}: operands are not staged as the row says"
            assert counts["LDG 128"] > 0, f"{symbol}: the end reads single words"
            assert counts["STG 128"] + counts["STG 64"] > 0 or kernels[symbol].params["wn"] == 16, (
                f"{symbol}: the end writes single words"
            )  # or lanes have 4 channels
        assert row.endswith("-int4") == symbol.startswith("four_bits"), row
        if row.endswith("-int4"):  # packed weights come from shared memory in long words
            assert counts["LDS 128"] + counts["LDS 64"] > 0, (symbol, counts)
        shared = kernels[symbol].counters > 0
        assert shared == (symbol == "small"), f"{symbol}: {kernels[symbol].params}"
        fences = counts["MEMBAR"] - counts["FENCE"]  # without those of what tensor cores read by themselves
        assert (counts["ATOMG"], fences > 1) == (int(shared), shared), f"{symbol}: sums of other blocks are read unordered"
