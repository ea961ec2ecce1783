"""One task in the worker's process: its reference outputs, its default and best candidates, and how a candidate is built, checked and timed.

    built     the row's kernel and two entry points: all tasks on one thread, and in parallel
    checked   bit for bit against `numerics` on random and on extreme inputs, and with extreme weights; guard bytes around the output
    timed     in turns with the row's default and the best candidate so far; only ratios of least times are compared

Weights rotate among copies that together exceed a level 2 cache, because in a network other layers' weights have passed since the last run;
activations are warm, as their producer has just written them.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from qcompiler.base.targets import Target, permit
from qcompiler.schedules.table import Kernel, Layout, OpCall, Row

ROTATED = 4 << 20  # bytes of weights that pass between two uses of the same copy
SAMPLE = 2e-4  # seconds of the default's that one timing takes at least
CLEARLY_SLOWER = 1.15  # than the best so far: not worth a closer look
FREE = 0.75  # of the threads must be worth their number (`speedup`), else the cores are busy
MARGIN = 0.99  # a candidate must beat the best by 1 %, twice
GUARD = 4096  # bytes before and behind the output
CANARY = 0xA5
FLOAT_TOLERANCE = 1e-4  # of the largest output: float rows may sum in any order


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
    scratch: np.ndarray | None = None  # what `pointers` hold: the bench's, until a later candidate needs a larger one


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
        permit(self.target)
        library = tvm.tirx.build(_entries(kernel, len(self.op.tensors), offsets, copies, stride), target=tvm.target.Target(self.target.tvm))
        made = Candidate(kernel, library["serial"], library["parallel"] if kernel.tasks > 1 else None, _aligned(copies * stride + 64), copies, stride)
        if self.scratch.nbytes < kernel.scratch:
            self.scratch = _aligned(kernel.scratch)
        made.scratch = self.scratch
        _fill(made, kernel)
        made.pointers = self.pointers(made, self.cases[0].inputs)
        return made

    def pointers(self, candidate: Candidate, inputs: Sequence[np.ndarray]) -> list[Any]:
        arrays = [*inputs, candidate.constants, self.raw[GUARD:], *([candidate.scratch] if candidate.kernel.scratch else [])]
        return [ctypes.c_void_p(a.ctypes.data) for a in arrays if a is not None]

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

    def free(self, threads: int) -> bool:
        return speedup(threads) >= FREE * threads

    def judge(self, candidate: Candidate, threads: int) -> dict[str, Any]:
        """Time a candidate; one that beats the best by more than `MARGIN`, and again when measured afresh, becomes the best.

        On several threads it must do so while the cores are free: a busy core makes any division of work look bad.
        """
        default, this = self.race([self.default, candidate], 4, threads)
        best = self.ratio_of_best
        if ratio_of(this, default) < CLEARLY_SLOWER * best:
            rivals = [self.default, candidate] if self.best is self.default else [self.default, candidate, self.best]
            for rounds in (12, 24):
                default, this, *rest = self.race(rivals, rounds, threads)
                won = ratio_of(this, rest[0] if rest else default) < MARGIN and (threads == 1 or self.free(threads))
                if not won:
                    break
            if won:  # ratios to the default keep the order that the races found, whatever the noise of the default's own times
                self.best, self.ratio_of_best = candidate, min(ratio_of(this, default), MARGIN * best)
                return {"status": "ok", "ratio": self.ratio_of_best, "seconds": this, "best": True}
        return {"status": "ok", "ratio": max(ratio_of(this, default), 1.001 * best), "seconds": this, "best": False}


class Duplicate(Exception):
    pass


class WrongResult(Exception):
    pass


def ratio_of(this: Sequence[float], other: Sequence[float]) -> float:
    """Geometric mean, over the ways of running, of the ratios of times."""
    return math.exp(sum(math.log(a / b) for a, b in zip(this, other, strict=True)) / len(this))


def make_cases(op: OpCall) -> list[Case]:
    """Random inputs, extreme ones, and (where weights are int8) extreme inputs with extreme weights; with what `numerics` says of each."""
    from qcompiler.numerics.operators import OPERATORS
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
    """The operator with weights -127 and 127, or -8 and 7 where its own fit into 4 bits, its multipliers scaled so that outputs spread as before; None where
    weights are not int8."""
    from qcompiler.schedules.cuda.gemm_plan import in_four_bits

    if op.name not in ("qc.conv2d", "qc.dense") or len(op.operands) < 4:
        return None
    weight, _, multiplier = op.operands[1:4]
    assert isinstance(weight, np.ndarray) and isinstance(multiplier, np.ndarray)
    axes = tuple(range(1, weight.ndim))
    low, high = (-8, 7) if in_four_bits(weight) else (-127, 127)
    factor = np.sqrt((weight.astype(np.float64) ** 2).mean(axes)) / high
    operands = list(op.operands)
    operands[1] = rng.choice(np.array([low, high], np.int8), weight.shape)
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
    is_float = case.op.name.startswith("qc.f32.")
    wrong = ~(np.abs(got - want) <= FLOAT_TOLERANCE * np.abs(want).max()) if is_float else got != want
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


def speedup(threads: int) -> float:
    """How many times as fast `threads` threads do independent work now: the median of 15 measurements of about half a millisecond each.

    Less than `threads` when other processes use the cores: kernels can't be compared on several threads then.
    """
    serial, parallel, out = _independent_work(threads)

    def seconds(entry: Any, steps: int) -> float:
        start = time.perf_counter_ns()
        entry(steps, ctypes.c_void_p(out.ctypes.data))
        return (time.perf_counter_ns() - start) * 1e-9

    seconds(parallel, 1000)
    steps = max(1, int(100_000 * threads * 2.5e-4 / seconds(serial, 100_000)))
    return statistics.median(seconds(serial, steps) / seconds(parallel, steps) for _ in range(15))


@cache
def _independent_work(threads: int) -> tuple[Any, Any, np.ndarray]:
    """Entry points f(steps, output) that do `steps` dependent integer operations per task, `threads` tasks, one after the other and in parallel."""
    import tvm
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    module = tvm.IRModule({})
    for symbol in ("serial", "parallel"):
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_attr({"global_symbol": symbol})
                steps = T.arg("steps", T.int32())
                out = T.decl_buffer((16 * threads,), "int32", data=T.arg("out", T.handle()))
                with (T.serial if symbol == "serial" else T.parallel)(0, threads) as task:
                    chain = T.alloc_buffer((1,), "int32")
                    T.buffer_store(chain, task, [0])
                    with T.serial(0, steps):
                        mixed = T.bitwise_xor(chain[0], T.shift_right(chain[0], tirx.const(7, "int32")))
                        T.buffer_store(chain, mixed * 1664525 + 1013904223, [0])
                    T.buffer_store(out, chain[0], [16 * task])
        module[symbol] = builder.get()
    library = tvm.tirx.build(module, target=tvm.target.Target("llvm"))
    return library["serial"], library["parallel"], np.zeros(16 * threads, np.int32)
