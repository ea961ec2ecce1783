"""The canary: a small convolution whose right results are known. A board that computes it wrongly is not worth asking anything else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcompiler.base.errors import BoardError
from qcompiler.base.files import temporary_folder
from qcompiler.base.targets import Target
from qcompiler.boards.device import Device
from qcompiler.boards.session import BoardSession
from qcompiler.pipeline.compile import compile_stages

SIZE, CHANNELS = 28, 32  # 7 million multiply-adds: about a millisecond of a phone's core


@dataclass(frozen=True)
class Canary:
    """A library for one target, an input, and the outputs that every CPU must compute from it."""

    library: bytes
    sample: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]


def make_canary(target: Target) -> Canary:
    """Compile it; the expected outputs are this machine's. Raises TargetError where the target's compiler is missing."""
    rng = np.random.default_rng(16)
    sample = {"x": rng.standard_normal((1, CHANNELS, SIZE, SIZE)).astype(np.float32)}
    with temporary_folder() as folder:
        _write_model(folder / "canary.onnx", rng)
        made = compile_stages(folder / "canary.onnx", target, [sample], preset="fast")
    return Canary(made.artifact.library, sample, made.corrected.host_code().session(1).run(sample))


def _write_model(path: Path, rng: np.random.Generator) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = (rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) / 17).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["c"], ["y"])]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, CHANNELS, SIZE, SIZE]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "canary", ports[:1], ports[1:], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), path)


def digest(outputs: Mapping[str, np.ndarray]) -> str:
    """Of results: equal bits have equal digests."""
    found = hashlib.sha256()
    for name in sorted(outputs):
        array = np.ascontiguousarray(outputs[name])
        found.update(f"{name} {array.dtype} {list(array.shape)}\n".encode() + array.tobytes())
    return found.hexdigest()[:16]


def sing(device: Device, canary: Canary, iterations: int = 20) -> tuple[str, float]:
    """(digest of its results, least seconds of a run) on a board. Raises BoardError when the results are wrong, or the board can't run it."""
    with temporary_folder() as folder:
        (folder / "canary.so").write_bytes(canary.library)
        session = BoardSession(device, folder / "canary.so")
        found, wanted = digest(session.run(canary.sample)), digest(canary.expected)
        if found != wanted:
            raise BoardError(
                f"board '{device.board.name}': computes wrongly: the canary's results have the digest {found}, right is {wanted}; "
                "its memory or its CPU is faulty, or overclocked, or its emulator is"
            )
        return found, session.bench(iterations).minimum
