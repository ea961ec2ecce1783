"""Code generation: a Program becomes one object file with the entry point `qc_run`.

`qc_run(workspace, constants, inputs..., outputs..., begin: int32, end: int32)`, all pointers raw, runs steps [begin, end). Each step is a loop over
its kernel's tasks, parallel when there are several; kernels are private functions of the same module, called directly.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompiler.backend.cuda import gpu_object_code
from qcompiler.backend.lowering import Program, Step
from qcompiler.base.errors import bugs_named
from qcompiler.base.files import temporary_folder

ENTRY = "qc_run"


def program_module(program: Program) -> tvm.IRModule:
    """All distinct kernels and the entry point as one TIR module."""
    module = tvm.IRModule({})
    callees: dict[str, Any] = {}
    for symbol, kernel in program.kernels().items():
        module[symbol] = kernel.func
        callees[kernel.key] = module.get_global_var(symbol)
    module[ENTRY] = _entry(program, callees)
    return module


def _entry(program: Program, callees: dict[str, Any]) -> Any:
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
                    callee = callees[step.kernel.key]
                    if step.kernel.tasks == 1:
                        T.evaluate(tvm.ir.Call(callee, [tirx.const(0, "int32"), *arguments(step)]))
                    else:
                        with T.parallel(0, step.kernel.tasks) as task:
                            T.evaluate(tvm.ir.Call(callee, [task, *arguments(step)]))
    return builder.get()


def object_code(program: Program) -> bytes:
    """The object file of a program. Raises TargetError when a compiler for a GPU is missing or fails, InternalError when TVM refuses what we wrote."""
    if program.target.gpu:
        return gpu_object_code(program)
    with bugs_named(f"code generation for {program.target.name}"), temporary_folder() as folder:
        library = tvm.tirx.build(program_module(program), target=tvm.target.Target(program.target.tvm))
        path = folder / "code.o"
        library.write_to_file(str(path), "o")
        return path.read_bytes()
