"""Layers whose tiles several blocks share, through the runtime: their counters are 0 whenever a kernel starts."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_emulated import FLAGS, HEADERS
from fake_cuda import FakeGpu
from tools import require_nvcc

from qcompiler.backend.build import build
from qcompiler.backend.codegen_cuda import device_header
from qcompiler.base.targets import find_target
from qcompiler.numerics import operators as numerics
from qcompiler.passes.graph import GraphBuilder, const, make_op

SHARED = """
import sys, numpy as np
from qcompiler.runtime.session import Session
library, file = sys.argv[1:]
pairs = np.load(file)
sessions = [Session(library), Session(library)]
names = [info.name for info in sessions[0].outputs]
for turn in range(6):
    x, session = pairs[f"x{turn % 3}"], sessions[turn % 2]
    values = {}
    session.trace({"x": x}, lambda name, array: values.update({name: array.copy()}))
    for outputs in (session.run({"x": x}), session.run({"x": x}), values):
        for name in names:
            assert outputs[name].tobytes() == pairs[f"{name}{turn % 3}"].tobytes(), (name, turn)
assert len(sessions[0].profile({"x": x}, 2)) == len(sessions[0].manifest["steps"])
"""

COMMON = {"x_zero_point": -4, "zero_point": 3, "low": -128, "high": 127, "out_dtype": "int8"}
CONV = COMMON | {"strides": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1}
RESIDUAL = CONV | {"residual_zero_point": -3, "residual_multiplier": 1400, "residual_shift": 11}
TILE = {"bm": 16, "bn": 32, "bk": 32, "wm": 16, "wn": 32, "wk": 1, "stages": 2}
DENSE = (3, 200), [("first", "qc.dense", 100, COMMON, False), ("second", "qc.dense", 40, COMMON, False)], (2, 2), [4, 2]
# 9 taps of 32 and 48 channels: 9 and 14 steps, which 2 and 5 blocks share unevenly; 2 x 5 x 5 pixels and 37 and 32 channels, ragged in both
CONVS = (2, 5, 5, 32), [("first", "qc.conv2d", 37, CONV, False), ("second", "qc.conv2d", 32, RESIDUAL, True)], (2, 5), [8, 4]


@pytest.mark.parametrize(("network", "switches"), [(DENSE, ""), (CONVS, ""), (CONVS, "no-graphs")], ids=["dense", "convs", "convs-launched"])
def test_blocks_that_share_tiles(network: Any, switches: str, tmp_path: Path) -> None:
    """Layers with tiles that several blocks share: counters are 0 for the next layer, the next run, another session and single steps."""
    require_nvcc()
    shape, specs, splits, counters = network
    rng, builder = np.random.default_rng(0), GraphBuilder()
    images = [rng.integers(-128, 128, shape).astype(np.int8) for _ in range(3)]
    value = x = builder.input("x", shape, "int8")
    results, pairs, outputs = images, {f"x{i}": image for i, image in enumerate(images)}, []
    for name, operator, channels, attrs, residual in specs:
        taps = (3, 3) if operator == "qc.conv2d" else ()
        weight = rng.integers(-128, 128, (channels, *taps, results[0].shape[-1])).astype(np.int8)
        typical = 70 * 74 * weight[0].size ** 0.5 * (2.0**-11 if residual else 1.0)
        layer = [weight, rng.integers(-9000, 9000, channels).astype(np.int32), np.full(channels, 60 / typical, np.float32)]
        results = [numerics.OPERATORS[operator](r, *layer, *([image] if residual else []), **attrs) for r, image in zip(results, images, strict=True)]
        pairs |= {f"{name}{i}": result for i, result in enumerate(results)}
        value = builder.emit(name, make_op(operator, [value, *map(const, layer), *([x] if residual else [])], attrs, results[0].shape, "int8"))
        outputs.append((name, value))
    shares = {name: {**TILE, "split_k": split} for (name, _), split in zip(outputs, splits, strict=True)}
    built = build(builder.finish(outputs), find_target("cuda-sm80"), "code", lambda row, op: shares.get(op.value_id))
    assert [step.kernel.counters for step in built.program.steps if step.kernel.counters] == counters
    np.savez(tmp_path / "pairs.npz", **pairs)
    gpu = FakeGpu.build(tmp_path, built.program)
    done = gpu.python(SHARED, built.link().save(tmp_path / "net.so"), tmp_path / "pairs.npz", switches=switches)
    assert done.returncode == 0, done.stderr[-3000:]
    assert gpu.log()["left"] == 0


# -- the order of what blocks write and read ------------------------------------------------------------------------------------------------

EXCHANGE = """
extern "C" __global__ void exchange(int* scratch, int* counter, int* out) {
  scratch[64 * blockIdx.x + threadIdx.x] = 1 + threadIdx.x;
  if (!qc_last_of(counter, 3)) return;
  for (int i = 0; i < 3; ++i) out[threadIdx.x] += __ldcg(scratch + 64 * i + threadIdx.x);
}
int main() {
  static int scratch[192], counter[1], out[64];
  void* pointers[] = {scratch, counter, out};
  for (int run = 1; run <= 2; ++run) {
    qc_emulate((void*)exchange, 3, 3, 64, pointers);
    for (int i = 0; i < 64; ++i)
      if (out[i] != run * 3 * (1 + i) || *counter) return 1;
  }
}
"""


@pytest.mark.parametrize(
    ("code", "missing", "message"),
    [
        ("", "", ""),
        ("  __syncthreads();\n  if (threadIdx.x == 0) {", "  if (threadIdx.x == 0) {", "a counter without a barrier and then a fence"),
        ("{\n    __threadfence();\n    is_last", "{\n    is_last", "a counter without a barrier and then a fence"),
        ("last;\n    __threadfence();\n", "last;\n", "read without a fence and then a barrier behind the counter"),
    ],
    ids=["right", "no-barrier", "no-release", "no-acquire"],
)
def test_what_orders_blocks(code: str, missing: str, message: str, tmp_path: Path) -> None:
    """The emulation finds each barrier and fence of `qc_last_of` that is left out."""
    header = device_header(find_target("cuda-sm80"))
    assert code in header
    (tmp_path / "exchange.cc").write_text(f'#include "emulation.h"\n{header.replace(code, missing) if code else header}\n{EXCHANGE}')
    flags = [f for f in FLAGS if f != "-shared"]
    subprocess.run(["g++", *flags, f"-I{HEADERS}", "exchange.cc", "-o", "exchange"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "exchange"], capture_output=True, text=True)
    assert (done.returncode == 0) == (not message) and message in done.stderr, done.stderr
