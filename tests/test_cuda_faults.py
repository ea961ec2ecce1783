"""A driver that fails: every call in turn, once or for good. One clear line each, nothing left behind, and the next session works."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeGpu
from tools import require_nvcc

from qcompiler.backend.build import Built, build
from qcompiler.base.targets import find_target
from qcompiler.passes.graph import GraphBuilder, const, make_op

TABLE = ((np.arange(256) * 37 + 11) % 256 - 128).astype(np.int8)

# Each round: a session, a run, a profile of its steps, a buffer, a second session; the N-th call of the driver fails, until no call is the N-th. Behind it, a
# round without a fault. A lost GPU's objects go with the context that held them.
ROUNDS = """
import ctypes, json, sys
import numpy as np
from qcompiler.base.errors import QCompilerError
from qcompiler.runtime.session import Session

library, code, stays = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
driver = ctypes.CDLL("libcuda.so.1")
driver.qc_fake_fail.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
driver.qc_fake_left.restype = driver.qc_fake_calls.restype = driver.qc_fake_contexts.restype = ctypes.c_long
x = np.arange(-64, 64, dtype=np.int8)
want = Session(library).run({"x": x})["y"].tobytes()

def work():
    sessions = [Session(library)]
    assert sessions[0].run({"x": x})["y"].tobytes() == want
    sessions[0].profile({"x": x}, 1)
    buffer = ctypes.c_void_p()
    sessions[0]._check(sessions[0]._library.qc_session_input_buffer(sessions[0]._handle, b"x", ctypes.byref(buffer)))
    sessions.append(Session(library))
    assert sessions[1].run({"x": x})["y"].tobytes() == want
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


@pytest.fixture(scope="module")
def built() -> Built:
    require_nvcc()
    builder = GraphBuilder()
    x = builder.input("x", (128,), "int8")
    return build(builder.finish([("y", builder.emit("y", make_op("qc.lut", [x, const(TABLE)], {}, (128,), "int8")))]), find_target("cuda-sm80"), "code")


@pytest.fixture(scope="module")
def library(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built.link().save(tmp_path_factory.mktemp("faults") / "net.so")


@pytest.fixture(scope="module")
def gpu(built: Built, tmp_path_factory: pytest.TempPathFactory) -> FakeGpu:
    return FakeGpu.build(tmp_path_factory.mktemp("gpu"), built.program)


# Calls without which a session does: it launches step by step.
DISPENSABLE = {"cuStreamBeginCapture_v2", "cuLaunchKernel", "cuGraphInstantiateWithFlags"}


@pytest.mark.parametrize("switches", ["", "no-graphs"])
@pytest.mark.parametrize(("code", "stays"), [(2, 0), (2, 1), (999, 0), (719, 1), (702, 1)], ids=["memory-once", "no-memory", "unknown-once", "lost", "timeout"])
def test_every_call_fails_in_turn(gpu: FakeGpu, library: Path, code: int, stays: int, switches: str) -> None:
    done = gpu.python(ROUNDS, library, str(code), str(stays), switches=switches)
    assert done.returncode == 0, done.stderr[-3000:]
    rounds = json.loads(done.stdout)
    assert {"cuInit", "cuMemAlloc_v2", "cuMemHostAlloc", "cuLaunchKernel", "cuEventRecord", "cuStreamSynchronize"} <= {r["call"] for r in rounds}
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
