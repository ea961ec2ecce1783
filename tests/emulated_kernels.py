"""Many kernels as one library for a CPU, run once, emulated or here: every step works on operands of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from emulated import Host
from kernel_cases import Case
from x86_emulation import emulating, is_emulated, runnable, written

from qcompiler.backend.build import Built
from qcompiler.backend.codegen import object_code
from qcompiler.backend.lowering import Place, Program, Step, Value, pack_constants
from qcompiler.base.targets import Target
from qcompiler.schedules.harness import check_padding, fetch
from qcompiler.schedules.table import Layout

GUARD = 256  # bytes around every buffer that nothing may write
CANARY = 0xA5


@dataclass
class Prepared:
    """A case in place: its step, its operands, what it must give, and how far off a float may be."""

    step: Step
    inputs: dict[str, tuple[Layout, np.ndarray]]  # value id -> layout, stored bytes
    output: Layout
    want: np.ndarray
    bound: np.ndarray | None

    @staticmethod
    def of(name: str, case: Case, target: Target) -> Prepared:
        """Of a case with exact results."""
        kernel = case.prepare(target)
        inputs = {f"{name}~{i}": pair for i, pair in enumerate(zip(case.op.tensors, case.inputs, strict=True))}
        return Prepared(Step(name, case.op, case.op.name, kernel, list(inputs)), inputs, case.output, case.expected, None)


def run_on_x86(make: Callable[[], Sequence[Prepared]], target: Target, folder: Path) -> None:
    """`run_prepared` of what `make` prepares for an x86 row, whose instructions are emulated where this machine lacks them."""
    with emulating() if is_emulated(target) else contextlib.nullcontext():
        prepared = make()
        written(*(p.step.kernel for p in prepared))
    run_prepared(prepared, runnable(target), folder)


def run_prepared(prepared: Sequence[Prepared], target: Target, folder: Path) -> None:
    """Compile all cases into one library, run it once, compare all outputs and the bytes around them."""
    values, at = {}, GUARD
    for p in prepared:
        for name, layout in [*((n, layout) for n, (layout, _) in p.inputs.items()), (p.step.writes, p.output)]:
            values[name] = Value(name, layout, name, Place("workspace", at))
            at += -(-layout.bytes // 64) * 64 + GUARD
    steps = [p.step for p in prepared]
    compared = at
    for step in steps:
        step.scratch = at
        at += -(-step.kernel.scratch // 64) * 64
    program = Program(target, steps, values, [], [], at, pack_constants(steps))
    library = Built(program, object_code(program)).link().save(folder / "kernels.so")
    workspace = np.full(at, CANARY, np.uint8)
    for p in prepared:
        for name, (layout, stored) in p.inputs.items():
            place = values[name].place
            assert place is not None
            workspace[place.offset : place.offset + layout.bytes] = stored[: layout.elements].view(np.uint8)
    after = Host.build(target, folder).run_workspace(library, workspace, folder)
    for p in prepared:
        place = values[p.step.writes].place
        assert place is not None
        end = place.offset + p.output.bytes
        stored = after[place.offset : end].copy().view(p.output.dtype)
        check_padding(stored, p.output, p.step.kernel, CANARY)
        got = fetch(stored, p.output)
        if p.bound is None:
            assert got.dtype == p.want.dtype
            np.testing.assert_array_equal(got, p.want, err_msg=f"{target.name}: {p.step.kernel.row}: {p.step.writes} {p.step.params}")
        else:
            assert (np.abs(got - p.want) <= p.bound).all(), f"{target.name}: {p.step.writes}"
        workspace[place.offset : end] = after[place.offset : end]
    np.testing.assert_array_equal(after[:compared], workspace[:compared], err_msg=f"{target.name}: a kernel wrote outside its output")
