"""Runs kernels of x86 rows whose instructions this machine lacks.

A kernel names its instructions as LLVM intrinsics. While one is built here, those beyond AVX2 become vector arithmetic that does what Intel's manual says of
the instruction, and LLVM compiles 512-bit arithmetic for 256-bit registers. What is emulated is thus the instruction, and all else of the kernel is what ships.
An instruction that has no model here fails the test with its name.

QCOMPILER_EMULATE=1 emulates every row beyond AVX2 whatever the machine has. `pytest -m switched` runs the tests that then differ on this machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.backend.build import Built
from qcompiler.backend.codegen import object_code
from qcompiler.backend.lowering import lower
from qcompiler.base.targets import Target, find_target, load_targets, missing_features
from qcompiler.schedules import table
from qcompiler.schedules.isa import scalar, shuffle
from qcompiler.schedules.table import Kernel, OpCall, Row

ALL = [t for t in load_targets().values() if t.architecture == "x86_64"]
AMX = find_target("x86-amx")
TARGETS = [t for t in ALL if t != AMX]  # its convolutions have tests of their own, its other kernels are those of x86-avx512vnni
HOST = find_target("x86-avx2")
AVXVNNI, AVX512VNNI = find_target("x86-avxvnni"), find_target("x86-avx512vnni")
OF_HOST = re.compile(r"llvm\.(?!x86\.)|llvm\.x86\.(s?sse\d*|avx2?|fma)\.(?!vpdp)")  # names of what HOST has; LLVM calls AVX-VNNI-INT8 avx2.vpdp*
runs_here = pytest.mark.skipif(bool(missing_features(HOST)), reason="this machine runs no x86 row, not even emulated")


def code_target(target: Target) -> Target:
    """The target to generate code for when kernels of `target` shall run here: itself, its instructions in an encoding that this machine has, or `HOST`."""
    if os.environ.get("QCOMPILER_EMULATE") == "1":
        return HOST
    return encoding(target, missing_features)


def encoding(target: Target, missing: Callable[[Target], Collection[str]]) -> Target:
    """`code_target` of a machine that misses the features which `missing` says of a target."""
    if not missing(target):
        return target
    if target == AVXVNNI and not missing(AVX512VNNI):  # the 256-bit instruction has both a VEX and an EVEX encoding
        return dataclasses.replace(target, tvm=AVX512VNNI.tvm, features=AVX512VNNI.features)
    return HOST


def is_emulated(target: Target) -> bool:
    return code_target(target) == HOST != target


def marks(target: Target) -> list[pytest.MarkDecorator]:
    """Of a test of `target`: `switched` where QCOMPILER_EMULATE=1 changes what runs on this machine."""
    return [pytest.mark.switched] if HOST not in (target, encoding(target, missing_features)) else []


def each(targets: Iterable[Target]) -> list[Any]:
    """Parameters of a test or a fixture: one for a target."""
    return [pytest.param(t, id=t.name, marks=marks(t)) for t in targets]


def build(row: Row, op: OpCall, params: Mapping[str, Any], target: Target) -> tuple[Kernel, Target]:
    """The kernel of a row for `target`, such that this machine runs it when it is compiled for the target returned."""
    if not is_emulated(target):
        return row.build(op, params, target), code_target(target)
    with emulating():
        kernel = row.build(op, params, target)
        written(kernel)
    return kernel, HOST


def sampled(name: str, values: Iterable[Any], sample: Container[Any]) -> pytest.MarkDecorator:
    """Parametrizes `name` and `target`: by all `values` where the machine has the target's instructions, by those in `sample` where they are emulated."""
    pairs = [(value, target) for target in TARGETS for value in values if not is_emulated(target) or value in sample]
    return pytest.mark.parametrize((name, "target"), [pytest.param(v, t, id=f"{t.name}-{v}", marks=marks(t)) for v, t in pairs])


class UnknownInstruction(Exception):
    """A kernel has an instruction that is neither AVX2's nor emulated. LLVM would end the process for it, or for a symbol that nobody defines."""


@contextlib.contextmanager
def emulating() -> Iterator[None]:
    """While this is active, kernels are built from what AVX2 has. They raise UnknownInstruction for what has no model here."""

    def emulated(real: Callable[..., Any]) -> Callable[..., Any]:
        def instruction(dtype: str, name: str, *args: Any) -> Any:
            symbol = "qc_emulated_" + name.removeprefix("llvm.x86.")
            if name in MODELS:
                return MODELS[name](dtype, *args)
            if OF_HOST.match(name):
                return real(dtype, name, *args)
            if not hasattr(tiles(), symbol):
                raise UnknownInstruction(
                    f"{name} is not emulated: it needs a model in tests/x86_emulation.py or, for tiles, {symbol} in tests/emulated_tiles.c"
                )
            plain = [tirx.const(int(a), "int32") if isinstance(a, tirx.IntImm) and str(a.ty) == "int8" else a for a in args]
            return T.call_extern("int32", symbol, *plain)

        return instruction

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(table, "_CODE", {}))  # what is written once is written with other instructions here
        for name in ("call_llvm_pure_intrin", "call_llvm_intrin"):
            stack.enter_context(mock.patch.object(T, name, emulated(getattr(T, name))))
        yield


@functools.cache
def tiles() -> ctypes.CDLL:
    """The instructions of `emulated_tiles.c`, visible to all code that is loaded later."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "tiles.so"
        source = Path(__file__).with_name("emulated_tiles.c")
        subprocess.run([HOST.compiler[0], "-x", "c", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def written(*kernels: Kernel) -> None:
    """A kernel's code is made when it is wanted: now, while instructions are emulated."""
    for kernel in kernels:
        assert kernel.func


def runnable(target: Target) -> Target:
    """`target`, with code that this machine runs."""
    code = code_target(target)
    return dataclasses.replace(target, tvm=code.tvm, features=code.features)


def build_network(integer: tvm.IRModule, target: Target) -> Built:
    """The program of a network for `target`, such that this machine runs it."""
    with emulating() if is_emulated(target) else contextlib.nullcontext():
        program = lower(integer, target)
        written(*(step.kernel for step in program.steps))
    program.target = runnable(target)
    return Built(program, object_code(program))


# -- instructions: each returns the vector that the instruction does -----------------------------------------------------------------------


def part(value: Any, lanes: int, shift: int, bits: int, signed: bool) -> Any:
    """Bits [shift, shift + bits) of int32 lanes, extended to int32."""
    kind = "int32" if signed else "uint32"
    moved = T.shift_left(T.reinterpret(f"uint32x{lanes}", value), scalar(32 - shift - bits, "uint32", lanes))
    moved = T.shift_right(T.reinterpret(f"{kind}x{lanes}", moved), scalar(32 - bits, kind, lanes))
    return T.reinterpret(f"int32x{lanes}", moved)


def products(dtype: str, a: Any, b: Any, bits: int, signed: bool) -> list[Any]:
    """Of each dword, the products of its elements of `bits` bits: those of `a` signed or not, those of `b` signed."""
    lanes = int(dtype.removeprefix("int32x"))
    a, b = (T.bind(T.reinterpret(dtype, v)) for v in (a, b))
    return [part(a, lanes, shift, bits, signed) * part(b, lanes, shift, bits, True) for shift in range(0, 32, bits)]


def vpdpbusd(dtype: str, acc: Any, a: Any, b: Any) -> Any:
    """acc + the four products of an unsigned byte of `a` and a signed byte of `b`; no saturation."""
    return sum(products(dtype, a, b, 8, False), acc)


def vpmaddwd(dtype: str, a: Any, b: Any) -> Any:
    """The sum of the two products of signed words; 2^31 wraps."""
    low, high = (T.reinterpret(f"u{dtype}", p) for p in products(dtype, a, b, 16, True))
    return T.reinterpret(dtype, low + high)


def vpmaddubsw(dtype: str, a: Any, b: Any) -> Any:
    """Per word: the sum of the two products of an unsigned byte of `a` and a signed byte of `b`, saturated to int16."""
    lanes = int(dtype.removeprefix("int16x")) // 2
    first, second, third, fourth = products(f"int32x{lanes}", a, b, 8, False)
    low, high = (T.max(T.min(v, scalar(2**15 - 1, "int32", lanes)), scalar(-(2**15), "int32", lanes)) for v in (first + second, third + fourth))
    return shuffle([T.bind(T.Cast(f"int16x{lanes}", v)) for v in (low, high)], [i + side * lanes for i in range(lanes) for side in (0, 1)])


def vpack(signed: bool) -> Callable[..., Any]:
    """The elements of `a` and `b`, saturated to half their size; those of `a` before those of `b` within each 128 bits."""

    def packed(dtype: str, a: Any, b: Any) -> Any:
        bits, lanes = (int(n) for n in dtype.removeprefix("int").split("x"))
        half, wide, each = lanes // 2, f"int{2 * bits}", 64 // bits  # elements of a vector; their type; elements in 128 bits
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        fits = [T.max(T.min(v, scalar(high, wide, half)), scalar(low, wide, half)) for v in (a, b)]
        order = [side * half + start + i for start in range(0, half, each) for side in (0, 1) for i in range(each)]
        narrow = "int" if signed else "uint"
        return T.reinterpret(dtype, shuffle([T.bind(T.Cast(f"{narrow}{bits}x{half}", v)) for v in fits], order))

    return packed


def vcvtps2dq(dtype: str, value: Any, otherwise: Any, mask: Any, rounding: Any) -> Any:
    """Two halves by the 256-bit instruction, which rounds alike: to nearest even, and what doesn't fit to INT32_MIN."""
    assert (int(mask), int(rounding)) == (-1, 4), "all lanes, current rounding mode"
    halves = [T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx.cvt.ps2dq.256", shuffle([value], range(i, i + 8))) for i in (0, 8)]
    return shuffle([T.bind(h) for h in halves], range(16))


def vpermw(dtype: str, table: Any, index: Any) -> Any:
    """The elements of a table of 32 words at `index` modulo 32."""
    entries, places = (T.alloc_buffer((32,), "int16") for _ in range(2))
    for buffer, value in ((entries, table), (places, T.bitwise_and(index, scalar(31, "int16", 32)))):
        T.buffer_store(buffer, value, [T.ramp(T.int32(0), 1, 32)])
    return T.bind(shuffle([entries[T.Cast("int32", places[i])] for i in range(32)], range(32)))


def vpmulhrsw(dtype: str, a: Any, b: Any) -> Any:
    """(a * b + 2^14) >> 15 of signed words."""
    lanes = int(dtype.removeprefix("int16x"))
    product = T.Cast(f"int32x{lanes}", a) * T.Cast(f"int32x{lanes}", b) + scalar(1 << 14, "int32", lanes)
    return T.Cast(dtype, T.shift_right(product, scalar(15, "int32", lanes)))


def vpternlogd(dtype: str, a: Any, b: Any, c: Any, table: Any) -> Any:
    """Of each bit, the bit of `table` that those of `a`, `b` and `c` name."""
    ones = scalar(-1, "int32", int(dtype.removeprefix("int32x")))
    a, b, c = (T.bind(v) for v in (a, b, c))
    found = T.bitwise_xor(ones, ones)
    for case in range(8):
        if int(table) >> case & 1:
            picked = [v if case >> bit & 1 else T.bitwise_xor(v, ones) for v, bit in ((a, 2), (b, 1), (c, 0))]
            found = T.bitwise_or(found, T.bitwise_and(T.bitwise_and(picked[0], picked[1]), picked[2]))
    return T.bind(found)


def vpgatherdd(dtype: str, otherwise: Any, first: Any, index: Any, mask: Any, scale: Any) -> Any:
    """Two halves by the 256-bit instruction."""
    assert dtype == "int32x16" and bool(mask.value), "all lanes"
    every, byte = scalar(-1, "int32", 8), tirx.const(int(scale), "int8")
    halves = [[shuffle([v], range(i, i + 8)) for v in (otherwise, index)] for i in (0, 8)]
    return shuffle([T.bind(T.call_llvm_intrin("int32x8", "llvm.x86.avx2.gather.d.d.256", o, first, i, every, byte)) for o, i in halves], range(16))


MODELS: dict[str, Callable[..., Any]] = {
    **{f"llvm.x86.avx512.vpdpbusd.{bits}": vpdpbusd for bits in (128, 256, 512)},
    "llvm.x86.avx512.pmaddw.d.512": vpmaddwd,
    "llvm.x86.avx512.pmaddubs.w.512": vpmaddubsw,
    "llvm.x86.avx512.permvar.hi.512": vpermw,
    "llvm.x86.avx512.pmul.hr.sw.512": vpmulhrsw,
    "llvm.x86.avx512.packssdw.512": vpack(signed=True),
    "llvm.x86.avx512.packsswb.512": vpack(signed=True),
    "llvm.x86.avx512.packuswb.512": vpack(signed=False),
    "llvm.x86.avx512.mask.cvtps2dq.512": vcvtps2dq,
    "llvm.x86.avx512.pternlog.d.512": vpternlogd,
    "llvm.x86.avx512.mask.gather.dpi.512": vpgatherdd,
}
