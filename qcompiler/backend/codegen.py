"""Code generation: a Program becomes one object file with the entry point `qc_run`; further programs of the same network, at other shapes, get `qc_run_1`,
`qc_run_2`, ... in the same file.

`qc_run(workspace, constants, inputs..., outputs..., begin: int32, end: int32)`, all pointers raw, runs steps [begin, end). Each step is a loop over
its kernel's tasks, parallel when there are several. Every distinct kernel is compiled by itself, on all cores, or taken from the cache (`kernel_cache.py`),
as a C function that the entry point calls; joined, they are one object file.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompiler.backend.artifact import entry_name
from qcompiler.backend.cuda import gpu_object_code
from qcompiler.backend.kernel_cache import cached
from qcompiler.backend.lowering import Program, kernels_of
from qcompiler.backend.shared import Places, share
from qcompiler.backend.toolchain import compiler_words
from qcompiler.base.errors import TargetError, bugs_named
from qcompiler.base.files import temporary_folder
from qcompiler.base.targets import Target
from qcompiler.runtime.elf import symbol_sizes
from qcompiler.schedules.table import Kernel

_IDLE = [
    *("s_tir.LiftThreadBinding", "s_tir.UnifyThreadBinding", "s_tir.ManifestSharedMemoryLocalStage", "s_tir.TransformMmaBufferLayout"),  # of GPUs
    *("s_tir.InjectPermutedLayout", "s_tir.InjectSoftwarePipeline", "s_tir.InjectVirtualThread", "s_tir.InjectDoubleBuffer", "s_tir.LowerAutoCopy"),
    "tirx.RemoveNoOp",  # LLVM drops as much
    "s_tir.CompactBufferAllocation",  # no kernel holds a buffer that is larger than what is used of it
]
"""Passes of TVM that do nothing for what we emit, but go through all of it: a sixth of the time that code generation takes."""


def _entry_symbol(index: int) -> str:
    """The entry point of shape number `index`, as TVM exports it."""
    return f"__tvm_ffi_{entry_name(index)}"


def _at(base: Any, offset: int) -> Any:
    return tirx.handle_add_byte_offset(base, offset) if offset else base


class _Memory:
    """Where an entry point with these arguments finds values."""

    def __init__(self, program: Program, workspace: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._program, self._workspace, self._ports = program, workspace, {"input": inputs, "output": outputs}
        self._inner = inner_roots(program)

    def pointer(self, value: str, image: Any, images: int, whole: bool) -> Any:
        """Of an image of a value, in a run of all steps (`whole`) or of some."""
        found = self._program.values[value]
        assert found.place is not None, value
        stride = 0 if image is None else found.layout.bytes // images
        if found.place.space != "workspace":
            base, offset = self._ports[found.place.space][found.place.offset], 0
        elif whole:
            base, offset = self._workspace, self._program.near[found.root] + found.shift
            stride = 0 if found.root in self._inner else stride
        else:
            base, offset = self._workspace, found.place.offset
        return _at(base, offset) if not stride else tirx.handle_add_byte_offset(base, T.Cast("int64", image) * stride + offset)


def _entry(name: str, program: Program, offsets: Sequence[Sequence[int]], symbols: Mapping[str, str]) -> Any:
    """An entry point. offsets: where the constants of each step lie. symbols: kernel key -> name of its function, in another object."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"global_symbol": name})
            workspace, constants = T.arg("workspace", T.handle()), T.arg("constants", T.handle())
            inputs = [T.arg(f"input{i}", T.handle()) for i in range(len(program.inputs))]
            outputs = [T.arg(f"output{i}", T.handle()) for i in range(len(program.outputs))]
            begin, end = T.arg("begin", T.int32()), T.arg("end", T.int32())

            memory = _Memory(program, workspace, inputs, outputs)

            def call(index: int, image: Any = None, whole: bool = False) -> None:
                step, symbol = program.steps[index], symbols[program.steps[index].kernel.key]
                args = [memory.pointer(v, image, step.images, whole) for v in step.reads] + [_at(constants, o) for o in offsets[index]]
                args += [memory.pointer(v, image, step.images, whole) for v in [step.writes, *step.more]]
                if step.kernel.scratch:
                    args.append(_at(workspace, program.near[f"scratch {index}"] if whole else step.scratch))
                if step.kernel.tasks == 1:
                    T.evaluate(tirx.call_extern("int32", symbol, tirx.const(0, "int32"), *args))
                else:
                    with T.parallel(0, step.kernel.tasks) as task:
                        T.evaluate(tirx.call_extern("int32", symbol, task, *args))

            def each_image(first: int, last: int, images: int, whole: bool) -> None:
                if images == 1:
                    for index in range(first, last):
                        call(index, None, whole)
                    return
                with T.serial(0, images) as image:
                    for index in range(first, last):
                        call(index, image, whole)

            def some() -> None:
                for index, step in enumerate(program.steps):
                    with T.If(tirx.all(begin <= index, end > index)), T.Then():
                        each_image(index, index + 1, step.images, False)

            if not program.near:
                some()
            else:
                with T.If(tirx.all(begin <= 0, end >= len(program.steps))):
                    with T.Then():
                        for run in program.runs:
                            each_image(*run, True)
                    with T.Else():
                        some()
    return builder.get()


def inner_roots(program: Program) -> set[str]:
    """The values that never leave a run of images, by the name of their memory."""
    where: dict[str, set[int]] = {}
    for number, (begin, end, _) in enumerate(program.runs):
        for step in program.steps[begin:end]:
            for value in [*step.reads, step.writes, *step.more]:
                where.setdefault(program.values[value].root, set()).add(number)
    apart = {number for number, (_, _, images) in enumerate(program.runs) if images > 1}
    return {root for root, numbers in where.items() if len(numbers) == 1 and numbers <= apart}


def object_code(program: Program, others: Sequence[Program] = (), places: Places | None = None) -> bytes:
    """The object file of a program, and of `others` with it. places: of their constants, those of `share` where None. Raises TargetError when the target's
    linker or its compiler for a GPU is missing or fails, InternalError when TVM refuses what we wrote."""
    programs = (program, *others)
    if program.target.gpu:
        return gpu_object_code(programs, places or share(programs))
    with bugs_named(f"code generation for {program.target.name}"), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        kernels = {kernel.key: kernel for kernel in kernels_of(s for p in programs for s in p.steps).values()}
        symbols = {key: _symbol(kernel) for key, kernel in kernels.items()}

        def made(key: str) -> bytes:  # kept by name too: rows may share a kernel
            return cached(f"{symbols[key]} {key}", program.target, lambda: _kernel_object(symbols[key], kernels[key], program.target))

        objects = list(pool.map(made, kernels))
        offsets = (places or share(programs)).offsets
        entries = tvm.IRModule({entry_name(i): _entry(entry_name(i), p, offsets[i], symbols) for i, p in enumerate(programs)})
        objects.append(cached(f"entries {tvm_ffi.structural_hash(entries)}", program.target, lambda: _built(entries, program.target)))
    return _joined(objects, map(_entry_symbol, range(len(programs))), program.target)


def code_added(code: bytes, programs: Sequence[Program]) -> list[int]:
    """Of `object_code`: bytes of the entry point of each program, and of the kernels that none before it has. Device code is one image, the first one's."""
    if programs[0].target.gpu:
        return [len(code), *[0] * (len(programs) - 1)]
    sizes, seen, added = symbol_sizes(code, Path("code.o")), set[str](), []
    for index, program in enumerate(programs):
        own = {_symbol(kernel) for kernel in program.kernels().values()} - seen
        seen |= own
        added.append(sum(sizes.get(symbol, 0) for symbol in [_entry_symbol(index), *own]))
    return added


def _symbol(kernel: Kernel) -> str:
    """A name that says what it is, and is no other kernel's."""
    return f"{re.sub(r'[^a-zA-Z0-9]', '_', kernel.row)}_{hashlib.sha256(kernel.key.encode()).hexdigest()[:20]}"


def _kernel_object(symbol: str, kernel: Kernel, target: Target) -> bytes:
    """One kernel, as a plain C function. The empty function beside it keeps TVM from emitting a lone one twice, once more as the module's entry point."""
    plain = {"calling_conv": 1}  # neither wrapped in a packed function, nor private
    module = tvm.IRModule({symbol: kernel.func.with_attr({"global_symbol": symbol, **plain})})
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"global_symbol": f"{symbol}_", **plain})
            T.evaluate(0)
    module[f"{symbol}_"] = builder.get()
    return _built(module, target)


def _built(module: tvm.IRModule, target: Target) -> bytes:
    with temporary_folder() as folder, tvm.transform.PassContext(disabled_pass=_IDLE):
        path = folder / "code.o"
        tvm.tirx.build(module, target=tvm.target.Target(target.tvm)).write_to_file(str(path), "o")
        return path.read_bytes()


def _joined(objects: Sequence[bytes], entries: Iterable[str], target: Target) -> bytes:
    """Object files as one, without what the entry points do not reach. Raises TargetError when the linker is missing or fails."""
    compiler = compiler_words(target)
    with temporary_folder() as folder:
        names = [f"{i}.o" for i in range(len(objects))]
        for name, content in zip(names, objects, strict=True):
            (folder / name).write_bytes(content)
        reached = [] if target.android else ["-Wl,--gc-sections", *(f"-Wl,-u,{entry}" for entry in entries)]  # lld does that for a whole library only
        command = [*compiler, "-r", "-nostdlib", "-Wl,--build-id=none", *reached, *names, "-o", "code.o"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"linking for '{target.name}' with {compiler[0]} failed: {done.stderr.strip()[:600]}")
        return (folder / "code.o").read_bytes()
