"""Pools of sessions, in Python, C and C++: answers, back-pressure, closing under load, and figures under load."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_nets import OnnxNet
from tools import require_programs

import qcompiler
from qcompiler import DataError, PoolClosed, SessionBusy, SessionPool
from qcompiler.base.host import host_architecture
from qcompiler.base.targets import find_target
from qcompiler.cli.demo import demo_data
from qcompiler.cli.main import main
from qcompiler.runtime.pool import Load, measure
from qcompiler.runtime.session import Session

CPP = Path(__file__).resolve().parent.parent / "qcompiler" / "runtime" / "cpp"


@pytest.fixture(scope="module")
def library(digits: Callable[[str], Path]) -> Path:
    return digits(find_target("native").name)


@pytest.fixture
def pool(library: Path) -> Iterator[SessionPool]:
    with SessionPool(library, streams=2, waiting=2) as made:
        yield made


def test_answers_are_those_of_a_session(library: Path, pool: SessionPool) -> None:
    session = qcompiler.load(library)
    samples = demo_data()[1][:20]
    futures = [pool.submit(sample) for sample in samples]
    for future, sample in zip(futures, samples, strict=True):
        np.testing.assert_array_equal(future.result()["logits"], session.run(sample)["logits"])
    assert pool.inputs == session.inputs and pool.outputs == session.outputs


def test_wrong_requests_are_refused_where_they_are_made(pool: SessionPool) -> None:
    for inputs, text in (({"imago": 0}, "unknown input 'imago'"), ({}, "is missing"), ({"image": np.zeros(3, np.float32)}, "has shape")):
        with pytest.raises(DataError, match=text):
            pool.submit(inputs)  # type: ignore[arg-type]
    for seconds in (-1, float("nan"), "1", True):
        with pytest.raises(DataError, match=f"timeout is {seconds!r}; expected 0"):
            pool.submit(demo_data()[1][0], timeout=seconds)  # type: ignore[arg-type]


def test_a_full_queue_makes_askers_wait(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, begun, go_on = demo_data()[1][0], threading.Event(), threading.Event()
    with SessionPool(library, streams=1, waiting=1) as pool:
        run = pool._crew.sessions[0].run_bound

        def held(inputs: Any) -> Any:
            begun.set()
            go_on.wait()
            return run(inputs)

        monkeypatch.setattr(pool._crew.sessions[0], "run_bound", held)
        pool.submit(sample)
        begun.wait()  # the one stream stands still now
        pool.submit(sample)
        for seconds in (0, 0.01):
            with pytest.raises(SessionBusy, match="as many requests wait as may"):
                pool.submit(sample, timeout=seconds)
        go_on.set()
        assert "logits" in pool.submit(sample, timeout=60).result()


def test_closing_under_load_answers_what_was_accepted(library: Path) -> None:
    sample, accepted, refused = demo_data()[1][0], [], []
    pool = SessionPool(library, streams=2, waiting=1)

    def ask() -> None:
        try:
            while True:
                accepted.append(pool.submit(sample))
        except PoolClosed:
            refused.append(True)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    while len(accepted) < 50:
        time.sleep(0.001)
    pool.close()
    for asker in askers:
        asker.join()
    assert len(refused) == 4 and all(f.done() and "logits" in f.result() for f in accepted)
    with pytest.raises(PoolClosed):
        pool.submit(sample)
    pool.close()


def test_requests_can_be_cancelled_while_they_wait(pool: SessionPool) -> None:
    futures = [pool.submit(demo_data()[1][0]) for _ in range(200)]
    cancelled = [f for f in reversed(futures) if f.cancel()]
    pool.submit(demo_data()[1][0]).result()
    assert all(f.cancelled() for f in cancelled) and all(f.done() for f in futures)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_callbacks_raise_ends_no_stream(library: Path) -> None:
    sample = demo_data()[1][0]
    refused: list[BaseException] = []

    def callback(error: BaseException | None) -> Callable[[Any], None]:
        def called(future: Any) -> None:
            try:
                pool.close()
            except SessionBusy as busy:
                refused.append(busy)
            if error is not None:
                raise error

        return called

    with SessionPool(library, waiting=np.int64(4)) as pool:
        for error in (SystemExit(3), KeyboardInterrupt(), ValueError("from a callback"), None):
            pool.submit(sample, timeout=np.float32(60)).add_done_callback(callback(error))
        pool.submit(sample, timeout=float("inf")).cancel()
        assert "logits" in pool.submit(sample, timeout=1e12).result(60)
        assert "1 stream of <Session" in repr(pool) and len(refused) == 4
        with pytest.raises(TypeError, match="can't be copied or pickled"):
            pickle.dumps(pool)
    assert "closed" in repr(pool)


def test_a_pool_that_can_not_be(library: Path, tmp_path: Path) -> None:
    for numbers in ({"streams": 0}, {"threads": 0}, {"waiting": 0}, {"streams": True}):
        with pytest.raises(DataError, match="at least 1 is needed"):
            SessionPool(library, **numbers)
    with pytest.raises(qcompiler.ArtifactError):
        SessionPool(tmp_path / "none.so", streams=2)


def test_a_child_of_a_fork_and_the_end_of_a_program(library: Path) -> None:
    code = f"""
import os, sys
from qcompiler import PoolClosed, SessionPool
from qcompiler.cli.demo import demo_data
pool, sample = SessionPool({str(library)!r}, 2, pin=True), demo_data()[1][0]
pool.submit(sample).result()
if os.fork() == 0:
    try:
        pool.submit(sample)
    except PoolClosed:
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
pool.submit(sample).add_done_callback(lambda f: print("answered", len(f.result())))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "answered 1\n"), done.stderr


@pytest.mark.parametrize("deadline", [None, 0.01])
def test_a_pool_that_is_dropped_answers_and_ends(batched: Path, deadline: float | None) -> None:
    before = set(threading.enumerate())
    pool = SessionPool(batched, 2, deadline=deadline)
    streams = set(threading.enumerate()) - before
    futures = [pool.submit(sample) for sample in rows(4)]
    for future in futures:
        future.add_done_callback(lambda _, held=pool: repr(held))
    ended = weakref.ref(pool)
    del pool
    assert len(streams) == 2 and all(len(future.result(30)) == 2 for future in futures)
    del futures, future
    for stream in streams:
        stream.join(30)
    assert ended() is None and not any(stream.is_alive() for stream in streams)


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [{1, 2, 4}, 6], two outputs."""
    net, folder = OnnxNet(), tmp_path_factory.mktemp("batched")
    hidden = net.op("Relu", net.op("Gemm", net.input("x", "n", 6), net.weight(6, 8), net.weight(8)))
    model = net.save(folder / "m.onnx", [net.op("Gemm", hidden, net.weight(8, 3), net.weight(3)), hidden])
    return qcompiler.compile(model, calibration=rows(11), input_shapes={"x": [(1, 6), (2, 6), (4, 6)]}, preset="fast").save(folder / "m.so")


def rows(count: int) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(i).standard_normal((1, 6)).astype(np.float32)} for i in range(count)]


def test_a_deadline_gathers_requests_into_batches(library: Path, batched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path, samples = batched, rows(11)
    session, ran = qcompiler.load(path), list[int]()
    expected = [session.run(s) for s in samples]
    hidden = session.outputs[1].name
    plain = Session._run
    monkeypatch.setattr(Session, "_run", lambda self, inputs: ran.append(len(inputs[0][0])) or plain(self, inputs))
    with SessionPool(path, waiting=20, deadline=0.2) as pool:
        futures = [pool.submit(s) for s in samples]
        whole = pool.submit({"x": np.concatenate([s["x"] for s in samples[:4]])})
        for future, wanted in zip(futures, expected, strict=True):
            assert all(np.array_equal(future.result()[name], wanted[name]) for name in wanted)
        assert np.array_equal(whole.result()[hidden], np.concatenate([e[hidden] for e in expected[:4]]))
        assert sum(ran) == 15 and ran[:2] == [4, 4] and len(ran) == 5  # then 2, 1, and the request of four
        cancelled = [pool.submit(samples[0]) for _ in range(3)]
        assert "x" not in cancelled[0].result() and all(f.done() or f.result() for f in cancelled)
    ran.clear()
    with SessionPool(path, streams=3, waiting=20, deadline=0.2) as pool:
        assert all("x" not in f.result() for f in [pool.submit(s) for s in samples[:8]])
    assert ran == [4, 4]  # idle streams don't take a request each
    with SessionPool(path, streams=2, deadline=3600) as pool:
        last = [pool.submit(s) for s in samples[:3]]
    assert all(f.done() for f in last)  # closing does not wait for deadlines
    assert main(["bench", str(path), "--throughput", "--input-shape", "x=1,6", "--deadline", "0.002", "--duration", "0.05", "--json"]) == 0
    assert main(["bench", str(path), "--throughput", "--input-shape", "x=4,6", "--duration", "0.05", "--json"]) == 0
    each, four = (json.loads(part) for part in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0"))
    assert each["samples_per_second"] == each["per_second"] and four["samples_per_second"] == pytest.approx(4 * four["per_second"])
    for seconds in (0, -1):
        with pytest.raises(DataError, match=f"deadline is {seconds}; expected a number of seconds above 0"):
            SessionPool(path, deadline=seconds)
    with pytest.raises(DataError, match="a deadline is for a library without states for several batches"):
        SessionPool(library, deadline=0.01)


def test_figures_under_load(pool: SessionPool) -> None:
    load = measure(pool, demo_data()[1][0], 0.05)
    assert load.rate is None and len(load.latencies) > 1 and load.quantile(0.5) <= load.quantile(0.99)
    load = measure(pool, demo_data()[1][0], 0.1, rate=100)
    assert len(load.latencies) == 10
    assert [Load(1, [4.0, 1.0, 2.0, 3.0], None).quantile(q) for q in (0.25, 0.5, 0.9, 0.99)] == [1.0, 2.0, 4.0, 4.0]


def test_throughput_on_the_command_line(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(library), "--throughput", "--streams", "2", "--seconds", "0.05", "--pin", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["streams"] == 2 and document["per_second"] == document["samples_per_second"] > 0 and set(document["seconds"]) == {"p50", "p90", "p99"}
    assert main(["bench", str(library), "--throughput", "--rate", "200", "--seconds", "0.05"]) == 0
    assert "200 requests a second due" in " ".join(capsys.readouterr().out.split())
    for words, text in (
        (["--streams", "2"], "--streams describes --throughput"),
        (["--throughput", "--layers"], "leave out --layers"),
        (["--deadline", "0.1"], "--deadline describes --throughput"),
        (["--throughput", "--deadline", "0"], "deadline is 0; expected"),
        (["--throughput", "--rate", "0"], "--rate 0: expected"),
        (["--throughput", "--duration", "0"], "--duration 0: expected"),
    ):
        assert main(["bench", str(library), *words]) == 2
        assert text in capsys.readouterr().err


# -- C and C++ ------------------------------------------------------------------------------------------------------------------------------

x86 = pytest.mark.skipif(host_architecture() != "x86_64", reason="the C++ tests compile for x86-64 hosts")


@x86
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_cpp_pool_under_sanitizers(library: Path, batched: Path, tmp_path: Path, sanitizer: str) -> None:
    require_programs("g++")
    flags = ["-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", f"-fsanitize={sanitizer}", f"-I{CPP / 'include'}"]
    # libstdc++ counts who holds an exception in code that is not instrumented, so its last holder's release looks unordered.
    (tmp_path / "known.txt").write_text("race:std::__exception_ptr::exception_ptr::_M_release\nrace:std::__future_base::_Result<void>::_M_destroy\n")
    options = {**os.environ, "TSAN_OPTIONS": f"exitcode=66 suppressions={tmp_path / 'known.txt'}"}
    for name, words in (("sessions", [library]), ("batches", [batched, library])):
        program = tmp_path / name
        subprocess.run(["g++", *flags, str(Path(__file__).resolve().parent / "cpp" / f"{name}.cc"), "-o", program, "-lpthread", "-ldl"], check=True)
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=300, env=options)
        assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout + done.stderr[-4000:]


@x86
def test_the_pool_is_plain_c_too(library: Path, tmp_path: Path) -> None:
    require_programs("gcc")
    (tmp_path / "p.c").write_text("""
#include "qcompiler/pool.h"
static void done(void* user, qc_status status, const char* message) { *(int*)user = status == QC_OK && !*message; }
int main(int count, char** words) {
  qc_library model;
  qc_pool* pool;
  char message[256];
  (void)count;
  if (qc_library_open(words[1], &model, message, sizeof message) != QC_OK) return 1;
  if (qc_pool_create(&model, 0, &pool, message, sizeof message) != QC_OK) return 2;
  void* in = calloc(1, model.input_info(0)->bytes);
  void* out = calloc(1, model.output_info(0)->bytes);
  const void* inputs[] = {in};
  int fine = 0;
  if (qc_pool_submit(pool, inputs, &out, done, &fine) != QC_OK) return 3;
  qc_pool_close(pool);
  if (!fine) return 4;
  if (qc_pool_submit(pool, inputs, &out, done, &fine) != QC_ERROR_STATE || qc_pool_try_submit(pool, inputs, &out, 0, 0) != QC_ERROR_STATE) return 5;
  qc_pool_destroy(pool);
  qc_library_close(&model);
  free(in);
  free(out);
  return 0;
}
""")
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-fsanitize=address", f"-I{CPP / 'include'}"]
    subprocess.run(["gcc", *flags, str(tmp_path / "p.c"), "-o", str(tmp_path / "p"), "-lpthread", "-ldl"], check=True)
    assert subprocess.run([str(tmp_path / "p"), str(library)], timeout=60).returncode == 0


@x86
def test_qc_run_under_load(library: Path, batched: Path, tmp_path: Path) -> None:
    require_programs("g++")
    program = tmp_path / "qc_run"
    subprocess.run(["g++", "-std=c++17", "-O1", f"-I{CPP / 'include'}", str(CPP / "qc_run.cc"), "-o", str(program), "-lpthread", "-ldl"], check=True)
    np.save(tmp_path / "four.npy", np.concatenate([row["x"] for row in rows(4)]))
    for path, words in (
        (library, ["--streams", "2", "--pin"]),
        (library, ["--rate", "200"]),
        (batched, ["--deadline", "0.001"]),
        (batched, ["--input", f"x={tmp_path / 'four.npy'}"]),
    ):
        done = subprocess.run([program, path, "--throughput", "0.05", *words], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        assert found["requests"] > 1 and found["per_second"] > 0 and found["seconds"]["p50"] <= found["seconds"]["p99"]
    for words, text in (
        (["--throughput", "0"], "--throughput 0: expected"),
        (["--throughput", "1", "--rate", "x"], "--rate x: expected"),
        (["--throughput", "1", "--bench", "3"], "measures only"),
        (["--bench", "3", "--streams", "2"], "go with --throughput"),
        (["--throughput", "1", "--deadline", "0"], "--deadline 0: expected"),
        (["--throughput", "1", "--deadline", "1"], "a deadline is for a library without states for several batches"),
    ):
        done = subprocess.run([program, library, *words], capture_output=True, text=True)
        assert done.returncode == 2 and text in done.stderr
