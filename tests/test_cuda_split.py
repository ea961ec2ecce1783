"""Layers whose tiles several blocks share, through the runtime: their counters are 0 whenever a kernel starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeGpu, require_nvcc

from qcompiler import numerics
from qcompiler.passes.graph import GraphBuilder, const, make_op
from qcompiler.pipeline import build
from qcompiler.targets import find_target

SHARED = """
import sys, numpy as np
from qcompiler.runtime.session import Session
library, file = sys.argv[1:]
pairs = np.load(file)
sessions = [Session(library), Session(library)]
for turn in range(6):
    x, want = pairs[f"x{turn % 3}"], pairs[f"y{turn % 3}"]
    assert sessions[turn % 2].run({"x": x})["second"].tobytes() == want.tobytes(), turn
    values = {}
    sessions[turn % 2].trace({"x": x}, lambda name, array: values.update({name: array.copy()}))
    assert values["second"].tobytes() == want.tobytes(), turn
assert len(sessions[0].profile({"x": x}, 2)) == 2
"""


@pytest.mark.parametrize("switches", ["", "no-graphs"])
def test_blocks_that_share_tiles(switches: str, tmp_path: Path) -> None:
    """Two layers, each with tiles that several blocks share: counters are 0 for the next layer, the next run, another session and single steps."""
    require_nvcc()
    rng, builder = np.random.default_rng(0), GraphBuilder()
    attrs = {"x_zero_point": -4, "zero_point": 3, "low": -128, "high": 127, "out_dtype": "int8"}
    value, layers = builder.input("x", (3, 200), "int8"), []
    for name, inputs, outputs in (("first", 200, 100), ("second", 100, 40)):
        layer = [rng.integers(-128, 128, (outputs, inputs)), rng.integers(-9000, 9000, outputs), np.full(outputs, 60 / (70 * 74 * inputs**0.5))]
        layers.append([a.astype(t) for a, t in zip(layer, (np.int8, np.int32, np.float32), strict=True)])
        value = builder.emit(name, make_op("qc.dense", [value, *map(const, layers[-1])], attrs, (3, outputs), "int8"))
    tile = {"bm": 16, "bn": 32, "bk": 32, "wm": 16, "wn": 32, "wk": 1, "stages": 2, "split_k": 2}
    built = build(builder.finish([("second", value)]), find_target("cuda-sm80"), "code", lambda row, op: tile)
    assert [step.kernel.counters for step in built.program.steps] == [4, 2]
    pairs = {}
    for i in range(3):
        pairs[f"x{i}"] = result = rng.integers(-128, 128, (3, 200)).astype(np.int8)
        for layer in layers:
            result = numerics.OPERATORS["qc.dense"](result, *layer, **attrs)
        pairs[f"y{i}"] = result
    np.savez(tmp_path / "pairs.npz", **pairs)
    gpu = FakeGpu.build(tmp_path, built.program)
    done = gpu.python(SHARED, built.link().save(tmp_path / "net.so"), tmp_path / "pairs.npz", switches=switches)
    assert done.returncode == 0, done.stderr[-3000:]
    assert gpu.log()["left"] == 0
