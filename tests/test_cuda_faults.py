"""A driver that fails: every call in turn, once or for good. One clear line each, nothing left behind, and the next session works."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeGpu
from test_shapes import batch, pictures
from test_weight_only import Layer
from tools import require_nvcc
from tvm import relax

from qcompiler.backend.build import build
from qcompiler.base.targets import find_target
from qcompiler.numerics.weight_only import WeightScheme
from qcompiler.passes.graph import GraphBuilder, const, make_op
from qcompiler.pipeline.compile import compile_stages
from qcompiler.runtime.library import session_bytes

TABLE = ((np.arange(256) * 37 + 11) % 256 - 128).astype(np.int8)

# Each round: a session, a run, a profile of its steps, a buffer, a second session; the N-th call of the driver fails, until no call is the N-th. Behind it, a
# round without a fault. A lost GPU's objects go with the context that held them.
ROUNDS = """
import ctypes, json, sys
import numpy as np
from qcompiler.base.errors import QCompilerError
from qcompiler.runtime.session import Session

library, code, stays, given, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), dict(np.load(sys.argv[4])), sys.argv[5]
steps = len(Session(library).manifest["steps"])
driver = ctypes.CDLL("libcuda.so.1")
driver.qc_fake_fail.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
driver.qc_fake_left.restype = driver.qc_fake_calls.restype = driver.qc_fake_contexts.restype = ctypes.c_long
want = Session(library).run(given)[output].tobytes()

def work():
    sessions = [Session(library)]
    assert sessions[0].run(given)[output].tobytes() == want
    if steps == 1:  # 17 launches of each
        sessions[0].profile(given, 1)
    buffer = ctypes.c_void_p()
    sessions[0]._check(sessions[0]._library.qc_session_input_buffer(sessions[0]._handle, b"x", ctypes.byref(buffer)))
    sessions.append(Session(library))
    assert sessions[1].run(given)[output].tobytes() == want
    return sessions

driver.qc_fake_failed.restype = ctypes.c_char_p
rounds = []
for nth in range(1, 1000):
    driver.qc_fake_fail(nth, code, stays)
    sessions, message = [], None
    try:
        sessions = work()
    except QCompilerError as error:
        message = f"{type(error).__name__}: {error}"
    if driver.qc_fake_calls() < nth:
        break
    if not stays:
        driver.qc_fake_fail(0, 0, 0)
    sessions.clear()
    driver.qc_fake_fail(0, 0, 0)
    rounds.append({"call": driver.qc_fake_failed().decode(), "message": message, "left": driver.qc_fake_left(), "contexts": driver.qc_fake_contexts()})
    work()
print(json.dumps(rounds))
"""


def a_table(builder: GraphBuilder) -> Any:
    return make_op("qc.lut", [builder.input("x", (128,), "int8"), const(TABLE)], {}, (128,), "int8")


def newer_kernels(builder: GraphBuilder) -> Any:
    """Weights in 4 bits beside floats and beside integers, attention, a product of two computed tensors, operators that go element by
    element, and a normalization that goes on."""
    rng, (tokens, width) = np.random.default_rng(0), (12, 96)
    layer = Layer((1, tokens), width, 64, WeightScheme(4, 32, True))
    x = builder.input("x", (1, tokens, 64), "float32")
    real = builder.emit("real", make_op(layer.op.name, [x, *map(const, layer.constants)], layer.attrs, (1, tokens, width), "float32"))
    bent = builder.emit("bent", relax.op.multiply(real, builder.emit("gate", relax.op.sigmoid(real))))
    packed = builder.emit("packed", make_op("qc.quantize", [bent], {"scale": 0.2, "zero_point": 0}, (1, tokens, width), "int8"))
    multiplier, factor = (const(np.full(4, f, np.float32)) for f in (2e-4, 1.0))
    attrs = {"heads": 4, "kv_heads": 4, "size": 8, "value_size": 8, "columns": [0, 32, 64], "zero_points": [0, 0, 0], "zero_point": 0}
    mixed = builder.emit("mixed", make_op("qc.attention", [packed, packed, packed, multiplier, factor], attrs, (1, tokens, 32), "int8"))
    turned = builder.emit("turned", make_op("qc.transpose", [mixed], {"axes": [0, 2, 1]}, (1, 32, tokens), "int8"))
    attrs = {"a_zero_point": 3, "b_zero_point": -2, "multiplier": 1e-3, "zero_point": 0, "low": -128, "high": 127, "out_dtype": "int8"}
    squared = builder.emit("squared", make_op("qc.matmul", [mixed, turned], attrs, (1, tokens, tokens), "int8"))
    wide = {"x_zero_point": 0, "zero_point": 0, "out_dtype": "int16"}
    w, factors = rng.integers(-8, 8, (32, tokens)).astype(np.int8), np.full(32, 2.0, np.float32)
    stream = builder.emit("stream", make_op("qc.dense", [squared, const(w), const(np.zeros(32, np.int32)), const(factors)], wide, (1, tokens, 32), "int16"))
    gain, shift = const(np.full(32, 4096.0, np.float32)), const(np.zeros(32, np.int32))
    normal = builder.emit(
        "normal", make_op("qc.layer_norm", [stream, gain, shift], {"epsilon": 1.0, "zero_point": 0, "out_dtype": "int16"}, (1, tokens, 32), "int16")
    )
    copied = {"x_zero_point": 0, "zero_point": 1}
    return make_op("qc.requantize", [normal, const(np.full(32, 4.0, np.float32))], copied, (1, tokens, 32), "int8")


@dataclass
class Model:
    """A library, the GPU that has its kernels, and inputs."""

    library: Path
    gpu: FakeGpu
    inputs: Path
    manifest: dict[str, Any]


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    require_nvcc()
    builder, folder = GraphBuilder(), tmp_path_factory.mktemp("faults")
    module = builder.finish([("y", builder.emit("y", request.param(builder)))])
    built = build(module, find_target("cuda-sm80"), "code")
    x = np.arange(-64, 64, dtype=np.int8) if request.param is a_table else np.random.default_rng(1).standard_normal((1, 12, 64)).astype(np.float32)
    np.savez(folder / "x.npz", x=x)
    rows = {step.kernel.row for step in built.program.steps}
    on_tensor_cores = {f"cuda-mma/{name}" for name in ("f32.dense_weight_only", "attention", "matmul", "dense-int4")}
    assert request.param is a_table or {*on_tensor_cores, "cuda/layer_norm", "cuda/fused"} <= rows
    artifact = built.link()
    return Model(artifact.save(folder / "net.so"), FakeGpu.build(folder, built.program), folder / "x.npz", artifact.manifest)


# Calls without which a session does: it launches step by step.
DISPENSABLE = {"cuStreamBeginCapture_v2", "cuLaunchKernel", "cuGraphInstantiateWithFlags"}


ONE_KERNEL = [pytest.param(a_table, *fault, switches) for fault in [(2, 0), (2, 1), (999, 0), (719, 1), (702, 1)] for switches in ("", "no-graphs")]
SEVERAL = [pytest.param(newer_kernels, *fault, "") for fault in [(2, 0), (719, 1), (702, 1)]]


# Out of memory once and for good, something unknown, a lost GPU, a time limit.
@pytest.mark.parametrize(("model", "code", "stays", "switches"), [*ONE_KERNEL, *SEVERAL], indirect=["model"])
def test_every_call_fails_in_turn(model: Model, code: int, stays: int, switches: str) -> None:
    library = model.library
    done = model.gpu.python(ROUNDS, library, str(code), str(stays), model.inputs, "y", switches=f"skip-repeats,{switches}")
    assert done.returncode == 0, done.stderr[-3000:]
    rounds = json.loads(done.stdout)
    called = {"cuInit", "cuMemAlloc_v2", "cuMemHostAlloc", "cuLaunchKernel", "cuStreamSynchronize"} | (
        {"cuEventRecord"} if len(model.manifest["steps"]) == 1 else set()
    )
    assert called <= {r["call"] for r in rounds}
    for r in rounds:
        assert r["contexts"] == 0 and (stays or r["left"] == 0), r
        if r["message"] is None:
            assert not stays and r["call"] in DISPENSABLE, r
        else:
            assert f"{library}: " in r["message"] and "\n" not in r["message"] and "0.0 of 0.0" not in r["message"], r
            # A stream whose recording never ended refuses the next call (900).
            assert f"CUDA error {900 if r['call'] == 'cuStreamEndCapture' and not stays else code})" in r["message"] or (
                code == 2 and "out of memory" in r["message"]
            ), r


MEMORY = """
import ctypes, gc, json, sys
import numpy as np
from qcompiler.runtime.session import Session

driver = ctypes.CDLL("libcuda.so.1")
driver.qc_fake_bytes.restype = ctypes.c_long
given, sessions, taken = dict(np.load(sys.argv[2])), [], []
for _ in range(3):
    sessions.append(Session(sys.argv[1]))
    taken.append(driver.qc_fake_bytes())
for session in sessions:
    for name, x in given.items():
        session.run({name.partition(" ")[0]: x})
        session.profile({name.partition(" ")[0]: x}, 1)
taken.append(driver.qc_fake_bytes())
del session
sessions.clear()
gc.collect()
print(json.dumps([*taken, driver.qc_fake_bytes()]))
"""


def check_memory(gpu: FakeGpu, library: Path, inputs: Path, manifest: dict[str, Any]) -> None:
    """A session takes what the manifest says and some padding, the first one the constants too; runs take nothing, and nothing stays."""
    done = gpu.python(MEMORY, library, inputs, switches="skip-repeats")
    assert done.returncode == 0, done.stderr[-2000:]
    first, second, third, later, left = json.loads(done.stdout)
    planned, ports = session_bytes(manifest), len(manifest["inputs"]) + len(manifest["outputs"])
    assert second - first == third - second and later == third and left == 0
    # each buffer has 256 bytes behind it, and is rounded up to as many; counters are a buffer too
    assert 0 < (second - first) - planned <= 512 * (ports + 2) + 4 * manifest_counters(manifest), (second - first, planned)
    assert first - (second - first) == manifest["constants"]


def manifest_counters(manifest: dict[str, Any]) -> int:
    """At most a counter for each block of a layer."""
    return max(step["launch"][0] for step in manifest["steps"])


@pytest.mark.parametrize("model", [a_table, newer_kernels], indirect=True)
def test_a_session_takes_what_the_plan_says(model: Model) -> None:
    check_memory(model.gpu, model.library, model.inputs, model.manifest)


def test_a_session_at_several_batches_takes_what_the_largest_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_nvcc()
    source, shapes = pictures(tmp_path / "net.onnx"), {"image": [(n, 3, 12, 12) for n in (1, 3, 8)]}
    gpu = FakeGpu.record(tmp_path, monkeypatch)
    made = compile_stages(source, "cuda-sm80", [batch(n, n) for n in (1, 3, 8)], preset="fast", input_shapes=shapes).artifact
    gpu.emulate()
    np.savez(tmp_path / "in.npz", **{f"image {n}": batch(n, 7)["image"] for n in (3, 1, 8)})
    check_memory(gpu, made.save(tmp_path / "net.so"), tmp_path / "in.npz", made.manifest)
    alone = compile_stages(source, "cuda-sm80", [batch(8, 8)], preset="fast", input_shapes={"image": (8, 3, 12, 12)}).artifact
    assert session_bytes(made.manifest) == session_bytes(alone.manifest)
