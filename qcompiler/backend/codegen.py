"""Code generation: a Program becomes one object file with the entry point `qc_run`.

`qc_run(workspace, constants, inputs..., outputs..., begin: int32, end: int32)`, all pointers raw, runs steps [begin, end). Each step is a loop over
its kernel's tasks, parallel when there are several. Every distinct kernel is compiled by itself, on all cores, or taken from the cache (`kernel_cache.py`),
as a C function that the entry point calls; joined, they are one object file.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompiler.backend.artifact import find_compiler
from qcompiler.backend.cuda import gpu_object_code
from qcompiler.backend.kernel_cache import cached, trim
from qcompiler.backend.lowering import Program, Step
from qcompiler.base.errors import TargetError, bugs_named
from qcompiler.base.files import temporary_folder
from qcompiler.base.targets import Target
from qcompiler.schedules.table import Kernel

ENTRY = "qc_run"
ENTRY_SYMBOL = f"__tvm_ffi_{ENTRY}"  # as TVM exports it


def _entry(program: Program, symbols: Mapping[str, str]) -> Any:
    """The entry point. symbols: kernel key -> name of its function, in another object."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"global_symbol": ENTRY})
            workspace, constants = T.arg("workspace", T.handle()), T.arg("constants", T.handle())
            inputs = [T.arg(f"input{i}", T.handle()) for i in range(len(program.inputs))]
            outputs = [T.arg(f"output{i}", T.handle()) for i in range(len(program.outputs))]
            begin, end = T.arg("begin", T.int32()), T.arg("end", T.int32())

            def at(base: Any, offset: int) -> Any:
                return tirx.handle_add_byte_offset(base, offset) if offset else base

            def pointer(value: str) -> Any:
                place = program.values[value].place
                assert place is not None, value
                if place.space == "workspace":
                    return at(workspace, place.offset)
                return (inputs if place.space == "input" else outputs)[place.offset]

            def arguments(step: Step) -> list[Any]:
                args = [pointer(v) for v in step.reads] + [at(constants, o) for o in step.constants]
                args += [pointer(v) for v in [step.writes, *step.more]]
                return args + ([at(workspace, step.scratch)] if step.kernel.scratch else [])

            for index, step in enumerate(program.steps):
                with T.If(tirx.all(begin <= index, end > index)), T.Then():
                    symbol = symbols[step.kernel.key]
                    if step.kernel.tasks == 1:
                        T.evaluate(tirx.call_extern("int32", symbol, tirx.const(0, "int32"), *arguments(step)))
                    else:
                        with T.parallel(0, step.kernel.tasks) as task:
                            T.evaluate(tirx.call_extern("int32", symbol, task, *arguments(step)))
    return builder.get()


def object_code(program: Program) -> bytes:
    """The object file of a program. Raises TargetError when the target's linker or its compiler for a GPU is missing or fails, InternalError when TVM refuses
    what we wrote."""
    if program.target.gpu:
        return gpu_object_code(program)
    with bugs_named(f"code generation for {program.target.name}"), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        kernels = {kernel.key: kernel for kernel in program.kernels().values()}
        symbols = {key: _symbol(kernel) for key, kernel in kernels.items()}
        objects = list(pool.map(lambda key: cached(key, program.target, lambda: _kernel_object(symbols[key], kernels[key], program.target)), kernels))
        objects.append(_built(tvm.IRModule({ENTRY: _entry(program, symbols)}), program.target))
    trim()
    return _joined(objects, program.target)


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
    with temporary_folder() as folder:
        path = folder / "code.o"
        tvm.tirx.build(module, target=tvm.target.Target(target.tvm)).write_to_file(str(path), "o")
        return path.read_bytes()


def _joined(objects: Sequence[bytes], target: Target) -> bytes:
    """Object files as one, without what the entry point does not reach. Raises TargetError when the linker is missing or fails."""
    compiler = find_compiler(target)
    with temporary_folder() as folder:
        names = [f"{i}.o" for i in range(len(objects))]
        for name, content in zip(names, objects, strict=True):
            (folder / name).write_bytes(content)
        command = [compiler, "-r", "-nostdlib", "-Wl,--build-id=none", "-Wl,--gc-sections", f"-Wl,-u,{ENTRY_SYMBOL}", *names, "-o", "code.o"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"linking for '{target.name}' with {compiler} failed: {done.stderr.strip()[:600]}")
        return (folder / "code.o").read_bytes()
