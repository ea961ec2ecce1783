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
from qcompiler.schedules.table import Kernel, Layout, OpCall, select


def instructions(kernels: dict[str, Kernel], target: Target, folder: Path) -> dict[str, collections.Counter[str]]:
    """How often each kernel has each instruction."""
    (folder / "kernels.cu").write_text(cuda_source(kernels, target))
    arch = str(target.tvm["arch"])
    subprocess.run([str(find_nvcc(target)), "-std=c++17", "-w", f"-arch={arch}", "-cubin", "kernels.cu", "-o", "kernels.cubin"], cwd=folder, check=True)
    listing = subprocess.run([require_nvdisasm(), "-c", "kernels.cubin"], cwd=folder, check=True, capture_output=True, text=True).stdout
    found: dict[str, collections.Counter[str]] = {}
    for line in listing.splitlines():
        if begin := re.match(r"\.text\.(\w+):", line):
            current = found.setdefault(begin[1], collections.Counter())
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", line):
            current[code[1]] += 1
    assert set(found) == set(kernels)
    return found


def conv(target: Target, size: int, inputs: int, outputs: int, kernel: int, groups: int = 1, batch: int = 8, residual: bool = False) -> Kernel:
    layouts = [Layout((batch, size, size, c), "int8") for c in (inputs, outputs)]
    weight = np.ones((outputs, kernel, kernel, inputs // groups), np.int8)
    attrs: dict[str, Any] = {"strides": [1, 1], "padding": [kernel // 2] * 4, "dilation": [1, 1], "groups": groups, "x_zero_point": -3, "zero_point": 2}
    operands: list[Any] = [layouts[0], weight, np.zeros(outputs, np.int32), np.ones(outputs, np.float32)]
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


@pytest.mark.parametrize("name", ["cuda-sm75", "cuda-sm80", "cuda-sm90", "cuda-sm90a"])
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
    }
    for symbol, counts in instructions(kernels, target, tmp_path).items():
        row = kernels[symbol].row
        assert counts["FFMA"] == 0, f"{symbol}: an addition was contracted with a multiplication"
        assert counts["STL"] == counts["LDL"] == 0, f"{symbol}: registers were spilled"
        assert (counts["IMMA"] > 0) == row.startswith("cuda-mma"), (symbol, row, counts)
        assert (counts["IDP"] > 0) == row.startswith("cuda-dp4a"), (symbol, row, counts)
        assert (counts["IGMMA"] > 0) == row.startswith("cuda-wgmma"), (symbol, row, counts)
        if row.startswith(("cuda-mma", "cuda-wgmma")):
            assert (counts["LDSM"] > 0) == row.startswith("cuda-mma") and counts["LDGSTS"] > 0, f"{symbol}: operands are not staged as the row says"
        shared = kernels[symbol].counters > 0
        assert shared == (symbol == "small"), f"{symbol}: {kernels[symbol].params}"
        fences = counts["MEMBAR"] - counts["FENCE"]  # without those of what tensor cores read by themselves
        assert (counts["ATOMG"], fences > 1) == (int(shared), shared), f"{symbol}: sums of other blocks are read unordered"
