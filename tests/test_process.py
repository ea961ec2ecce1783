"""What commands owe the process that calls them: statuses, streams, and nothing left behind by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qcompiler.cli.main import main

COMMAND = [sys.executable, "-m", "qcompiler"]


@pytest.fixture
def library(digits: Callable[[str], Path]) -> str:
    return str(digits("native"))


@pytest.mark.parametrize("words", ["inspect LIBRARY", "inspect LIBRARY --json", "targets"])
def test_a_full_standard_output(library: str, words: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *words.replace("LIBRARY", library).split()], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: standard output can't be written: No space left on device\n")


def test_closed_streams(library: str, tmp_path: Path) -> None:
    def run(redirections: str, words: str = f"inspect {library}") -> subprocess.CompletedProcess[str]:
        return subprocess.run(f"{sys.executable} -m qcompiler {words} {redirections}", shell=True, capture_output=True, text=True)

    done = run(">&-")
    assert (done.returncode, done.stderr) == (2, "error: standard output is closed, and results go there; send it to /dev/null if nobody reads them\n")
    assert run("2>&-").returncode == 0
    assert run("2>/dev/full").returncode == 0
    assert run("2>&-", "inspect absent.so").returncode == 2
    assert run("2>/dev/full", "inspect absent.so").returncode == 2
    assert run("<&- >&- 2>&-").returncode == 2
    assert run("| head -c 10", f"inspect {library} --json").stderr == ""


def test_names_that_the_terminal_can_not_show(library: str, tmp_path: Path) -> None:
    named = tmp_path / "größe-模型.so"
    named.write_bytes(b"no library")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run([*COMMAND, "inspect", str(named)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "not a compiled library" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    """While candidates are compiled, that is with a temporary folder, a compiler and a file beside the output under way."""
    import numpy as np

    from qcompiler.cli.demo import MODEL

    results, scratch = tmp_path / "results", tmp_path / "scratch"
    results.mkdir()
    scratch.mkdir()
    (results / "data.npz").write_bytes(b"")
    import onnx

    model = onnx.load(MODEL)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    np.savez(results / "data.npz", **{model.graph.input[0].name: np.random.default_rng(0).random((40, *shape), np.float32)})
    words = f"compile {MODEL} --calibration {results}/data.npz --preset accurate --min-sqnr 60 --output {results}/m.so"
    environment = os.environ | {"TMPDIR": str(scratch)}
    heed = signal.signal(number, signal.SIG_DFL)  # children of a shell's background job or of nohup inherit that a signal is ignored
    try:
        process = subprocess.Popen([*COMMAND, *words.split()], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(number, heed)
    deadline = time.monotonic() + 120
    while not any(scratch.glob("qcompiler-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert errors == ("interrupted\n" if number == signal.SIGINT else "terminated\n")
    assert list(scratch.iterdir()) == []
    assert [p.name for p in results.iterdir()] == ["data.npz"]


def test_what_the_system_refuses_is_no_missed_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import errno

    import qcompiler

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(error: BaseException) -> None:
        def load(*args: object, **more: object) -> object:
            raise error

        monkeypatch.setattr(qcompiler, "load", load)

    fail(OSError(errno.ENOSPC, "No space left on device", "/data/x"))
    assert main(["bench", "m.so"]) == 2
    assert capsys.readouterr().err == "error: /data/x: No space left on device\n"
    fail(MemoryError())
    assert main(["bench", "m.so"]) == 2
    assert capsys.readouterr().err.startswith("error: out of memory; this model, or these data, need more")
    fail(OSError(errno.EBADF, "Bad file descriptor"))  # a fault of the program's own
    assert main(["bench", "m.so"]) == 3
    assert "OSError: [Errno 9] Bad file descriptor. This is a bug of qcompiler" in capsys.readouterr().err
