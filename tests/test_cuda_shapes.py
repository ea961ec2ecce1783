"""A library for a GPU at several shapes: a graph for each, one copy of the weights, and the bytes of the CPU's library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeGpu
from test_kernels_cuda_gemm import Conv, row_of
from test_shapes import batch, pictures
from tools import require_nvcc

from qcompiler.base.targets import find_target
from qcompiler.pipeline.compile import compile_stages
from qcompiler.runtime.session import Session
from qcompiler.schedules.cuda import gemm_plan as plan

RUN = """
import sys, numpy as np
from qcompiler.runtime.session import Session
from qcompiler.schedules.cuda import gemm_plan as plan
library, inputs, outputs = sys.argv[1:]
session, arrays = Session(library), dict(np.load(inputs))
found = {name: next(iter(session.run({"image": image}).values())) for name, image in [*arrays.items(), *arrays.items()]}
for image in arrays.values():  # each step by itself, at each shape
    seen = {}
    session.trace({"image": image}, lambda name, array: seen.update({name: array.copy()}))
    assert len(seen) > 4
    assert all(0 < row[3] < 100 for row in session.profile({"image": image}, 1))
np.savez(outputs, **found)
"""


def test_the_bytes_of_the_library_for_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_nvcc()
    model, shapes = pictures(tmp_path / "net.onnx"), {"image": [(n, 3, 12, 12) for n in (1, 3, 4)]}
    data = [batch(n, n) for n in (1, 3, 4)]
    gpu = FakeGpu.record(tmp_path, monkeypatch)
    made = {t: compile_stages(model, t, data, preset="fast", input_shapes=shapes, pad={"image": "repeat"}) for t in ("native", "cuda-sm80")}
    libraries = {t: m.artifact.save(tmp_path / f"{t}.so") for t, m in made.items()}
    gpu.emulate()
    images = {f"n{n}": batch(n, 7)["image"] for n in (4, 1, 3, 2)}  # 2 is padded to 3
    np.savez(tmp_path / "in.npz", **images)
    done = gpu.python(RUN, libraries["cuda-sm80"], tmp_path / "in.npz", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr[-2000:]
    on_cpu, on_gpu = Session(libraries["native"]), np.load(tmp_path / "out.npz")
    for name, image in images.items():
        assert on_gpu[name].tobytes() == next(iter(on_cpu.run({"image": image}).values())).tobytes(), name
    log = gpu.log()
    assert (log["replays"], log["left"], log["contexts"]) == (8, 0, 0), log
    manifest, alone = made["cuda-sm80"].artifact.manifest, made["cuda-sm80"].program.constants.size
    assert [shape["constants_added"] for shape in manifest["shapes"]] == [0, 0] and manifest["constants"] == alone


@pytest.mark.parametrize("target", ["cuda-sm75-dp4a", "cuda-sm80", "cuda-sm90a"])
def test_batches_share_weights_whatever_their_tilings(target: str) -> None:
    """A layer's tiling differs between 1 image and 64; its constants have one form."""

    def packed(batch: int, bits: int) -> Any:
        case = Conv((batch, 8, 8, 72), 136, (3, 3), pad=1).case(bits=bits)
        return case.prepare(find_target(target))

    for bits in (8, 4):
        few, many = (packed(batch, bits) for batch in (1, 64))
        assert few.params != many.params and few.row == many.row
        assert [c.tobytes() for c in few.constants] == [c.tobytes() for c in many.constants]
    if target == "cuda-sm90a":  # by one warp and by four
        rows = [row_of(unit, "qc.dense") for unit in (plan.MMA_FOUR, plan.WGMMA_FOUR)]
        few, many = (Conv((80, 256), 96, ()).case(bits=4).prepare(find_target(target), row=row) for row in rows)
        assert (few.row, many.row) == ("cuda-mma/dense-int4", "cuda-wgmma/dense-int4")
        assert [c.tobytes() for c in few.constants] == [c.tobytes() for c in many.constants]
    few, many = (Conv((n, 28, 28, 72), 72, (5, 5), pad=2, groups=72).case().prepare(find_target(target)) for n in (1, 64))
    assert few.params != many.params and few.row == many.row == "cuda-dp4a/depthwise"
    assert [c.tobytes() for c in few.constants] == [c.tobytes() for c in many.constants] and few.constants[0].nbytes == 72 * 5 * 8
