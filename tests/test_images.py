"""Networks with a batch: which operators go image by image, and that nobody can tell from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_nets import OnnxNet

import qcompiler
from qcompiler.backend import images
from qcompiler.backend.images import choose_images, one_at_a_time, runs_of
from qcompiler.backend.lowering import Step, Value
from qcompiler.backend.node import Node
from qcompiler.base.memory import Request
from qcompiler.pipeline.compile import compile_stages
from qcompiler.runtime.session import Session
from qcompiler.schedules.table import Layout
from qcompiler.verification import interpreter
from qcompiler.verification.bits import bit_parity


def network(path: Path) -> Path:
    """image [n, 3, 14, 13]: borders, a residual sum, branches joined in place, a pool, a tail that mixes the batch, and a dense head."""
    net = OnnxNet(seed=2)
    x = net.op("Relu", net.op("Conv", net.input("image", "n", 3, 14, 13), net.weight(8, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]))
    x = net.op("Relu", net.op("Add", x, net.op("Conv", x, net.weight(8, 8, 3, 3), pads=[1, 1, 1, 1])))
    branches = [net.op("Relu", net.op("Conv", x, net.weight(16, 8, k, k), pads=[k // 2] * 4)) for k in (1, 3)]
    x = net.op("Conv", net.op("Concat", *branches, axis=1), net.weight(32, 1, 3, 3), pads=[1, 1, 1, 1], group=32)
    x = net.op("Flatten", net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]))
    y = net.op("Gemm", x, net.weight(32 * 3 * 3, 5, spread=0.1), net.weight(5))
    return net.save(path, [y, net.op("ReduceMax", y, axes=[0], keepdims=0)])


def batch(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(seed).standard_normal((count, 3, 14, 13)).astype(np.float32)}


@pytest.mark.parametrize("threads", [1, 2])
def test_image_by_image_gives_the_bits_of_all_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    model = network(tmp_path / "m.onnx")
    options: dict[str, Any] = {"input_shapes": {"image": [(1, 3, 14, 13), (4, 3, 14, 13)]}, "preset": "fast"}
    together = compile_stages(model, calibration=[batch(1, s) for s in range(5)], **options)
    monkeypatch.setattr(images, "CALL", -(10**9))  # as if that were far cheaper
    apart = compile_stages(model, calibration=[batch(1, s) for s in range(5)], **options)
    assert [p.runs[0][2] for p in together.built.programs] == [1, 1] and not together.built.programs[1].near
    one, four = apart.built.programs
    assert four.runs[0][2] == 4 and sum(end - begin for begin, end, n in four.runs if n == 4) > len(four.steps) / 2 and four.runs[-1][2] == 1
    shared = set(one.kernels()) & set(four.kernels())
    assert len(shared) >= 5  # the code of one image
    a, b = (Session(made.artifact.save(tmp_path / name), threads) for made, name in ((together, "a.so"), (apart, "b.so")))
    assert [s.get("images", 1) for s in b.specializations[1].manifest["steps"]] == [s.images for s in four.steps]
    assert [s["macs"] for s in b.specializations[1].manifest["steps"]] == [s["macs"] for s in a.specializations[1].manifest["steps"]]
    for seed in range(3):
        sample = batch(4, 20 + seed)
        got, wanted, traced = b.run(sample), a.run(sample), b.trace(sample, lambda name, array: None)
        for name in wanted:
            assert got[name].tobytes() == wanted[name].tobytes() == traced[name].tobytes()
        assert not bit_parity(b, interpreter.run(apart.corrected.others[0], sample, keep="all"), sample)


def test_floats_go_image_by_image_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "CALL", -(10**9))
    shape = {"image": (3, 3, 14, 13)}
    library = Session(qcompiler.compile(network(tmp_path / "m.onnx"), weights="int8", input_shapes=shape).save(tmp_path / "m.so"))
    steps, sample = library.manifest["steps"], batch(3)
    assert sum(s.get("images") == 3 for s in steps) >= 3
    run, traced = library.run(sample), library.trace(sample, lambda name, array: None)
    assert all(run[name].tobytes() == traced[name].tobytes() for name in run)


def chain(sizes: list[tuple[int, int]], operator: str = "qc.conv2d") -> tuple[list[Node], dict[str, Value]]:
    """Operators after another: (bytes of an image of what each makes, bytes of its weights), for 8 images."""
    values = {"v0": Value("v0", Layout((8, sizes[0][0]), "uint8"), "v0")}
    nodes = []
    for i, (size, weights) in enumerate(sizes, 1):
        values[f"v{i}"] = Value(f"v{i}", Layout((8, size), "uint8"), f"v{i}")
        nodes.append(Node(f"v{i}", operator, [f"v{i - 1}", np.zeros((1, weights), np.int8)], {}, [f"v{i}"]))
    return nodes, values


def test_images_are_kept_near_and_large_weights_read_once() -> None:
    for sizes, wanted in [
        ([(1 << 20, 1000)] * 6, [8] * 6),  # large images
        ([(1000, 1000)] * 6, [1] * 6),  # all of it is near anyway
        ([(2000, 1 << 20)] * 6, [1] * 6),  # large weights
        ([(1 << 20, 1000)] * 3 + [(2000, 2 << 20)] * 3, [8, 8, 8, 8, 1, 1]),  # they part where little is handed on
        ([(1 << 20, 1000), (1000, 40 << 20), (1 << 20, 1000)], [8, 1, 8]),
    ]:
        nodes, values = chain(sizes)
        choose_images(nodes, values, 8)
        assert [n.images for n in nodes] == wanted, sizes
    for nodes, values in (chain([(1 << 20, 1000)] * 3, "qc.cumulative"), chain([(1 << 20, 1000)] * 3)):
        choose_images(nodes, values, 1 if nodes[0].name == "qc.conv2d" else 8)
        assert [n.images for n in nodes] == [1, 1, 1]
    nodes, values = chain([(1 << 20, 1000)] * 3)
    values["v2"].layout = Layout((4, 2 << 20), "uint8")  # no longer the batch
    choose_images(nodes, values, 8)
    assert [n.images for n in nodes] == [8, 1, 1]


def test_memory_of_values_that_never_leave_a_run_of_images() -> None:
    values = {name: Value(name, Layout((4, 100), "uint8"), name) for name in "abc"}
    steps = [Step(name, None, "", None, [], images=n) for name, n in zip("abcd", (4, 4, 4, 1), strict=True)]  # type: ignore[arg-type]
    assert runs_of(steps) == [(0, 3, 4), (3, 4, 1)]
    found = one_at_a_time(steps, values, [Request("a", 400, 0, 1), Request("b", 400, 1, 3), Request("scratch 1", 64, 1, 1)])
    assert found == [Request("a", 100, 0, 1), Request("b", 400, 0, 3), Request("scratch 1", 64, 1, 1)]
