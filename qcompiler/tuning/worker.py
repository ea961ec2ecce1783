"""The process that builds, checks and times candidates, and the handle by which the tuner drives it.

A candidate may keep LLVM busy for minutes, crash, or never return. So all of that (`bench.py`) happens in a process of its own, which is
killed when a phase exceeds its limit, and started again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from qcompiler.base.errors import QCompilerError
from qcompiler.base.targets import Target
from qcompiler.schedules.table import OpCall, Row
from qcompiler.tuning.bench import Bench, Duplicate, WrongResult, speedup
from qcompiler.tuning.candidates import CASES, candidate_library, output_sums

CACHE = 512 << 20  # bytes of tasks kept ready


# -- in the tuner's process -----------------------------------------------------------------------------------------------------------------


class WorkerLost(Exception):
    """The worker crashed or exceeded a limit; `str()` says which. It will be started again by the next question."""


@dataclass
class Limits:
    """Seconds a phase may take. Starting the process imports the compiler. Preparing a task computes references, and builds and times the default."""

    start: float = 120.0
    prepare: float = 120.0
    build: float = 15.0
    run: float = 15.0


class Worker:
    """Handle of the worker process. Use as a context manager; questions are asked one at a time."""

    def __init__(self, threads: int, limits: Limits | None = None) -> None:
        self.threads, self.limits = threads, limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._abandoned = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def prepare(self, key: str, row: Row, op: OpCall, target: Target, best: Mapping[str, Any] | None) -> dict[str, Any]:
        """Make `op` the task; `key` names it, and one that the worker knows already is ready at once.

        Returns {"error": text} when its default fails, else {"seconds": [one thread, all threads], "ratio": of the best, which starts as `best`}.
        """
        return self._ask(("prepare", key, row, op, target, best), [("ready", self.limits.prepare, "be prepared")])

    def speedup(self) -> float:
        """See `tuning_bench.speedup`, for all threads."""
        if self.threads == 1:
            return 1.0
        return float(self._ask(("speedup",), [("done", self.limits.run, "measure the cores")])["speedup"])

    def trial(self, params: Mapping[str, Any], threads: int) -> dict[str, Any]:
        """Try a candidate, judged on one thread and on `threads`.

        Returns {"status": "ok", "ratio", "seconds", "best": bool} or {"status": "impossible" | "same" | "wrong" | "error", "reason"}.
        """
        return self._ask(("trial", dict(params), threads), [("built", self.limits.build, "build"), ("done", self.limits.run, "run")])

    def library(self, row: Row, op: OpCall, target: Target, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A library with one step per point, for another machine: see `tuning_candidates.candidate_library`. {"library": bytes} or {"error": text}."""
        limit = self.limits.prepare + len(points) * self.limits.build
        return self._ask(("library", row, op, target, [dict(p) for p in points]), [("done", limit, "build")])

    def sums(self, op: OpCall) -> list[tuple[int, int]]:
        """Of the operator's right output, of every case: see `tuning_candidates.output_sums`."""
        return list(self._ask(("sums", op), [("done", self.limits.prepare, "compute references")])["sums"])

    def abandon(self) -> None:
        """From another thread: let the question under way, and all that follow, end in `WorkerLost`."""
        self._abandoned = True
        if (process := self._process) is not None:
            process.kill()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> None:
        ours, theirs = Pipe()
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *(p for p in sys.path if p)]  # rows arrive pickled: whatever module they are of must be found
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TVM_NUM_THREADS": str(self.threads), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "qcompiler.tuning.worker", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command,
            env=environment | {"OPENBLAS_NUM_THREADS": "1", "TVM_BIND_THREADS": "0"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the tuner's to handle
        )
        theirs.close()
        self._pipe = ours
        if self._abandoned:  # since this question was asked
            self._process.kill()
        self._receive("hello", self.limits.start, "start")

    def _ask(self, question: tuple[Any, ...], phases: Sequence[tuple[str, float, str]]) -> dict[str, Any]:
        """Send a question and wait for the reports of its phases (a final "done" may come early). The last one's content."""
        if self._abandoned:
            raise WorkerLost("the worker was stopped")
        if not self.alive:
            self.stop()
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send(question)
        except OSError as error:
            self.stop()
            raise WorkerLost("the worker crashed") from error
        for name, limit, what in phases:
            kind, content = self._receive(name, limit, what)
            if kind == "done":
                break
        return content

    def _receive(self, name: str, limit: float, what: str) -> tuple[str, dict[str, Any]]:
        assert self._pipe is not None and self._process is not None
        try:
            if not self._pipe.poll(limit):
                self.stop()
                raise WorkerLost(f"took longer than {limit:g} s to {what}")
            kind, content = self._pipe.recv()
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it has closed the pipe and is about to end, by what the message names
                self._process.wait(5)
            self._process.kill()
            code = self._process.wait()
            self.stop()
            cause = f"{signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            raise WorkerLost(f"the worker crashed ({cause}) while it should {what}") from error
        assert kind in (name, "done"), (kind, name)
        return kind, content


# -- in the worker's process ------------------------------------------------------------------------------------------------------------------


def serve(pipe: Connection, threads: int) -> None:
    """Answer questions until the tuner goes away."""
    benches: dict[str, Bench] = {}
    bench: Bench | None = None
    pipe.send(("hello", {}))
    while True:
        question = pipe.recv()
        if question[0] == "prepare":
            _, key, row, op, target, best = question
            try:
                if key not in benches:
                    if sum(b.bytes for b in benches.values()) > CACHE:
                        benches.clear()
                    benches[key] = _new_bench(row, op, target, best, threads)
                bench = benches[key]
                pipe.send(("ready", {"seconds": bench.seconds, "ratio": bench.ratio_of_best}))
            except (ValueError, RuntimeError, TypeError, WrongResult) as error:
                pipe.send(("ready", {"error": str(error)[:500]}))
            continue
        if question[0] == "speedup":
            pipe.send(("done", {"speedup": speedup(threads)}))
            continue
        if question[0] == "library":
            try:
                pipe.send(("done", {"library": candidate_library(*question[1:])}))
            except (ValueError, RuntimeError, TypeError, OSError, QCompilerError) as error:  # OSError: a full disk, say
                pipe.send(("done", {"error": str(error)[:500]}))
            continue
        if question[0] == "sums":
            pipe.send(("done", {"sums": [output_sums(question[1], case) for case in range(CASES)]}))
            continue
        assert bench is not None
        _, params, judged = question
        try:
            made = bench.build(params)
            pipe.send(("built", {}))
            bench.check(made, params)
            answer = bench.judge(made, judged)
        except Duplicate as error:
            answer = {"status": "same", "reason": str(error)}
        except WrongResult as error:
            answer = {"status": "wrong", "reason": str(error)}
        except ValueError as error:
            answer = {"status": "impossible", "reason": str(error)[:500]}
        except (RuntimeError, TypeError) as error:
            answer = {"status": "error", "reason": str(error)[:500]}
        pipe.send(("done", answer))


def _new_bench(row: Row, op: OpCall, target: Target, best: Mapping[str, Any] | None, threads: int) -> Bench:
    bench = Bench(row, op, target, threads)
    if best is not None:
        try:
            made = bench.build(best)
            bench.check(made, best)
            bench.judge(made, threads)
        except (Duplicate, ValueError, RuntimeError, WrongResult):  # the default itself, or a record of another version: start without it
            pass
    return bench


def main() -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux: don't outlive the tuner, not even inside LLVM
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    with contextlib.suppress(EOFError, BrokenPipeError):
        serve(Connection(int(sys.argv[1])), int(os.environ["TVM_NUM_THREADS"]))


if __name__ == "__main__":
    main()
