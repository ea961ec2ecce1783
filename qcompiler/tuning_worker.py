"""The process that builds, checks and times candidates, and the handle by which the tuner drives it.

A candidate may keep LLVM busy for minutes, crash, or never return. So all of that happens in a process of its own, which is killed when a phase
exceeds its limit and started again. It has one *task* (an operator with decided layouts) at a time; each candidate is

    built     the row's kernel and two entry points: all tasks on one thread, and in parallel
    checked   bit for bit against `numerics` on random and on extreme inputs, and with extreme weights; guard bytes around the output
    timed     in turns with the row's default and the best candidate so far; only ratios of least times leave this process

Weights rotate among copies that together exceed a level 2 cache, because in a network other layers' weights have passed since the last run;
activations are warm, as their producer has just written them.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.schedules.table import Kernel, Layout, OpCall, Row
from qcompiler.targets import Target

ROTATED = 4 << 20  # bytes of weights that pass between two uses of the same copy
SAMPLE = 2e-4  # seconds of the default's that one timing takes at least
CLEARLY_SLOWER = 1.15  # than the best so far: not worth a closer look
MARGIN = 0.99  # a candidate must beat the best by 1 %, twice
CACHE = 512 << 20  # bytes of tasks kept ready
GUARD = 4096  # bytes before and behind the output
CANARY = 0xA5
FLOAT_TOLERANCE = 1e-4  # of the largest output: float rows may sum in any order


# -- in the tuner's process -----------------------------------------------------------------------------------------------------------------


class WorkerLost(Exception):
    """The worker crashed or exceeded a limit; `str()` says which. It will be started again by the next question."""


@dataclass
class Limits:
    """Seconds a phase may take. Preparing a task computes references, and builds and times the default."""

    prepare: float = 120.0
    build: float = 15.0
    run: float = 15.0


class Worker:
    """Handle of the worker process. Use as a context manager; questions are asked one at a time."""

    def __init__(self, threads: int, limits: Limits | None = None) -> None:
        self.threads, self.limits = threads, limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

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

    def trial(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Try a candidate: {"status": "ok", "ratio", "seconds", "best": bool} or {"status": "impossible" | "same" | "wrong" | "error", "reason"}."""
        return self._ask(("trial", dict(params)), [("built", self.limits.build, "build"), ("done", self.limits.run, "run")])

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> None:
        ours, theirs = Pipe()
        package = str(Path(__file__).resolve().parent.parent)
        paths = [package, *(p for p in sys.path if p)]  # rows arrive pickled: whatever module they are of must be found
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TVM_NUM_THREADS": str(self.threads), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "qcompiler.tuning_worker", str(theirs.fileno())]
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
        self._receive("hello", self.limits.prepare, "start")

    def _ask(self, question: tuple[Any, ...], phases: Sequence[tuple[str, float, str]]) -> dict[str, Any]:
        """Send a question and wait for the reports of its phases (a final "done" may come early). The last one's content."""
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
            self._process.kill()
            code = self._process.wait()
            self.stop()
            cause = f"{signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            raise WorkerLost(f"the worker crashed ({cause}) while it should {what}") from error
        assert kind in (name, "done"), (kind, name)
        return kind, content


# -- in the worker's process ------------------------------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """A built kernel: its entry points, memory, and how many times the code runs in one timing."""

    kernel: Kernel
    serial: Any
    parallel: Any  # None when the kernel has one task
    constants: np.ndarray  # bytes: `copies` times all constants
    copies: int
    stride: int
    pointers: list[Any] = field(default_factory=list)


@dataclass
class Case:
    """One check: stored inputs, the operator whose constants to use, and the expected output."""

    op: OpCall
    inputs: list[np.ndarray]
    expected: np.ndarray


class Bench:
    """One task: reference outputs, the default, and the best candidate so far."""

    ratio_of_best = 1.0

    def __init__(self, row: Row, op: OpCall, target: Target, threads: int) -> None:
        self.row, self.op, self.target = row, op, target
        self.cases = make_cases(op)
        self.raw = _aligned(op.output.bytes + 2 * GUARD)
        self.seen: set[Any] = set()
        self.scratch = _aligned(64)
        self.default = self.build(row.default(op, target))
        self.check(self.default, row.default(op, target))
        self.best = self.default
        self.repeats = [1, 1]
        for index, call in enumerate(self.calls(self.default)):
            self.time(call, index)  # warm up: threads start, pages are mapped
            once = min(self.time(call, index) for _ in range(5))
            self.repeats[index] = max(1, math.ceil(SAMPLE / once))
        self.seconds = self.race([self.default], 12, threads)[0]

    @property
    def bytes(self) -> int:
        """Memory it holds, roughly."""
        arrays = [a for c in self.cases for a in (*c.inputs, c.expected)] + [c.constants for c in {id(c): c for c in (self.default, self.best)}.values()]
        return sum(a.nbytes for a in arrays) + self.raw.nbytes

    def build(self, params: Mapping[str, Any]) -> Candidate:
        """Raises ValueError for an impossible point, Duplicate for code that was tried already."""
        import tvm
        import tvm_ffi

        kernel = self.row.build(self.op, params, self.target)
        code = (tvm_ffi.structural_hash(kernel.func), kernel.tasks)
        if code in self.seen:
            raise Duplicate("the same code under other parameters")
        self.seen.add(code)
        offsets, size = [], 0
        for array in kernel.constants:
            offsets.append(size)
            size += -(-array.nbytes // 64) * 64
        stride = max(size, 64)
        copies = max(1, min(64, -(-ROTATED // stride)))
        library = tvm.tirx.build(_entries(kernel, len(self.op.tensors), offsets, copies, stride), target=tvm.target.Target(self.target.tvm))
        made = Candidate(kernel, library["serial"], library["parallel"] if kernel.tasks > 1 else None, _aligned(copies * stride + 64), copies, stride)
        if self.scratch.nbytes < kernel.scratch:
            self.scratch = _aligned(kernel.scratch)
        _fill(made, kernel)
        made.pointers = self.pointers(made, self.cases[0].inputs)
        return made

    def pointers(self, candidate: Candidate, inputs: Sequence[np.ndarray]) -> list[Any]:
        arrays = [*inputs, candidate.constants, self.raw[GUARD:], *([self.scratch] if candidate.kernel.scratch else [])]
        return [ctypes.c_void_p(a.ctypes.data) for a in arrays]

    def check(self, candidate: Candidate, params: Mapping[str, Any]) -> None:
        """Raises WrongResult."""
        layout, kernel = self.op.output, candidate.kernel
        for number, case in enumerate(self.cases):
            if case.op is not self.op:
                other = self.row.build(case.op, params, self.target)
                if other.key != kernel.key:
                    continue
                _fill(candidate, other)
            for entry in (candidate.serial, candidate.parallel):
                if entry is None:
                    continue
                self.raw[:] = CANARY
                entry(1, *self.pointers(candidate, case.inputs))
                flat = self.raw[GUARD : GUARD + layout.bytes]
                if (self.raw[:GUARD] != CANARY).any() or (self.raw[GUARD + layout.bytes :] != CANARY).any() or not _halo_kept(flat, layout):
                    raise WrongResult("wrote outside its output")
                _compare(flat.view(layout.dtype), layout, case, number)
        _fill(candidate, kernel)

    def calls(self, candidate: Candidate) -> list[Any]:
        """(one thread, all threads): what to time; a kernel of one task has no second way."""
        return [(candidate.serial, candidate), (candidate.parallel or candidate.serial, candidate)]

    def time(self, call: Any, index: int) -> float:
        """Seconds of one run, averaged over one timing."""
        entry, candidate = call
        repeat, pointers = self.repeats[index], candidate.pointers
        start = time.perf_counter_ns()
        entry(repeat, *pointers)
        return (time.perf_counter_ns() - start) * 1e-9 / repeat

    def race(self, candidates: Sequence[Candidate], rounds: int, threads: int) -> list[list[float]]:
        """Least seconds of each candidate, taking turns: [one thread] or [one thread, all threads]."""
        ways = 2 if threads > 1 and any(c.parallel is not None for c in candidates) else 1
        least = [[math.inf] * ways for _ in candidates]
        for turn in range(rounds):
            for offset in range(len(candidates)):
                i = (turn + offset) % len(candidates)
                for way, call in enumerate(self.calls(candidates[i])[:ways]):
                    least[i][way] = min(least[i][way], self.time(call, way))
        return least

    def judge(self, candidate: Candidate, threads: int) -> dict[str, Any]:
        """Time a candidate; one that beats the best by more than `MARGIN`, and again when measured afresh, becomes the best."""
        default, this = self.race([self.default, candidate], 4, threads)
        best = self.ratio_of_best
        if _ratio(this, default) < CLEARLY_SLOWER * best:
            rivals = [self.default, candidate] if self.best is self.default else [self.default, candidate, self.best]
            for rounds in (12, 24):
                default, this, *rest = self.race(rivals, rounds, threads)
                won = _ratio(this, rest[0] if rest else default) < MARGIN
                if not won:
                    break
            if won:  # ratios to the default keep the order that the races found, whatever the noise of the default's own times
                self.best, self.ratio_of_best = candidate, min(_ratio(this, default), MARGIN * best)
                return {"status": "ok", "ratio": self.ratio_of_best, "seconds": this, "best": True}
        return {"status": "ok", "ratio": max(_ratio(this, default), 1.001 * best), "seconds": this, "best": False}


class Duplicate(Exception):
    pass


class WrongResult(Exception):
    pass


def _ratio(this: Sequence[float], other: Sequence[float]) -> float:
    """Geometric mean, over the ways of running, of the ratios of times."""
    return math.exp(sum(math.log(a / b) for a, b in zip(this, other, strict=True)) / len(this))


def make_cases(op: OpCall) -> list[Case]:
    """Random inputs, extreme ones, and (where weights are int8) extreme inputs with extreme weights; with what `numerics` says of each."""
    from qcompiler.numerics import OPERATORS
    from qcompiler.schedules.harness import store

    rng = np.random.default_rng(0)
    cases = []
    extreme = _extreme_weights(op, rng)
    for variant, kind in ((op, "random"), (op, "extreme"), *([(extreme, "extreme")] if extreme is not None else [])):
        arrays, stored = [], []
        for i, operand in enumerate(variant.operands):
            if not isinstance(operand, Layout):
                arrays.append(operand)
                continue
            if operand.dtype in ("uint8", "int8"):
                ends = rng.choice(np.array([-128, 127], np.int8), operand.shape)
                array = ends if kind == "extreme" else rng.integers(-128, 128, operand.shape).astype(np.int8)
            else:
                array = rng.standard_normal(operand.shape).astype(operand.dtype)
            arrays.append(array)
            zero = int(op.attrs.get("x_zero_point", 0)) if i == 0 and operand.dtype in ("uint8", "int8") else 0
            stored.append(store(array, operand, zero))
        cases.append(Case(variant, stored, OPERATORS[op.name](*arrays, **op.attrs)))
    return cases


def _extreme_weights(op: OpCall, rng: np.random.Generator) -> OpCall | None:
    """The operator with weights -127 and 127, its multipliers scaled so that outputs spread as before; None where weights are not int8."""
    if op.name not in ("qc.conv2d", "qc.dense") or len(op.operands) < 4:
        return None
    weight, _, multiplier = op.operands[1:4]
    assert isinstance(weight, np.ndarray) and isinstance(multiplier, np.ndarray)
    axes = tuple(range(1, weight.ndim))
    factor = np.sqrt((weight.astype(np.float64) ** 2).mean(axes)) / 127
    operands = list(op.operands)
    operands[1] = rng.choice(np.array([-127, 127], np.int8), weight.shape)
    operands[3] = (multiplier * np.maximum(factor, 1e-3)).astype(np.float32)
    return OpCall(op.name, operands, op.attrs, op.output, op.value_id)


def _halo_kept(flat: np.ndarray, layout: Layout) -> bool:
    """Whether every byte of the halo still holds the canary."""
    if not any(layout.halo):
        return True
    (n, h, w, _), (top, left, _, _) = layout.shape, layout.halo
    image = flat.reshape(n, *layout.rows, -1).copy()
    image[:, top : top + h, left : left + w] = CANARY
    return bool((image == CANARY).all())


def _compare(flat: np.ndarray, layout: Layout, case: Case, number: int) -> None:
    from qcompiler.schedules.harness import fetch

    got, want = fetch(flat, layout), case.expected
    if case.op.name.startswith("qc.f32."):
        wrong = ~(np.abs(got - want) <= FLOAT_TOLERANCE * np.abs(want).max())
    else:
        wrong = got != want
    if wrong.any():
        raise WrongResult(f"{int(wrong.sum())} of {wrong.size} outputs differ from the reference (case {number})")


def _entries(kernel: Kernel, inputs: int, offsets: Sequence[int], copies: int, stride: int) -> Any:
    """Module with `serial` and, for several tasks, `parallel`: f(repeat, inputs..., all constants, output[, scratch]) runs the kernel `repeat`
    times, each time with the next of the `copies` of the constants, which lie `stride` bytes apart."""
    import tvm
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    module = tvm.IRModule({"kernel": kernel.func})
    callee = module.get_global_var("kernel")
    for symbol in ("serial", "parallel")[: 1 + (kernel.tasks > 1)]:
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_attr({"global_symbol": symbol})
                repeat = T.arg("repeat", T.int32())
                pointers = [T.arg(f"x{i}", T.handle()) for i in range(inputs)]
                constants = T.arg("constants", T.handle())
                rest = [T.arg(f"y{i}", T.handle()) for i in range(1 + (kernel.scratch > 0))]
                with T.serial(0, repeat) as r:
                    base = T.bind(r % copies * stride)
                    packed = [tirx.handle_add_byte_offset(constants, base + o) for o in offsets]
                    loop = T.serial if symbol == "serial" else T.parallel
                    with loop(0, kernel.tasks) as task:
                        T.evaluate(tvm.ir.Call(callee, [task, *pointers, *packed, *rest]))
        module[symbol] = builder.get()
    return module


def _fill(candidate: Candidate, kernel: Kernel) -> None:
    """Write a kernel's constants into every copy."""
    packed, at = np.zeros(candidate.stride, np.uint8), 0
    for array in kernel.constants:
        packed[at : at + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        at += -(-array.nbytes // 64) * 64
    candidate.constants[: candidate.copies * candidate.stride].reshape(candidate.copies, -1)[:] = packed


def _aligned(size: int) -> np.ndarray:
    raw = np.zeros(size + 128, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


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
        assert bench is not None
        params = question[1]
        try:
            made = bench.build(params)
            pipe.send(("built", {}))
            bench.check(made, params)
            answer = bench.judge(made, threads)
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
    try:  # Linux: don't outlive the tuner, not even inside LLVM
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    except (OSError, AttributeError):
        pass
    try:
        serve(Connection(int(sys.argv[1])), int(os.environ["TVM_NUM_THREADS"]))
    except (EOFError, BrokenPipeError):
        pass


if __name__ == "__main__":
    main()
