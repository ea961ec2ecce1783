"""Programs of one network at several shapes share one blob of constants.

    program at 1 x 16:  w0 w1 p16            blob: w0 w1 p16 p32      (w0, w1: weights packed alike; p16, p32: places, cut to the length)
    program at 1 x 32:  w0 w1 p32

A constant is shared where the step of the same value id has equal bytes in its place, never between two layers, whose constants may change apart. One
program alone keeps its own blob. How a step's constants are packed is chosen for all shapes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from qcompiler.backend.lowering import Params, Program, Step, lower
from qcompiler.base.debug import Dump, no_dump
from qcompiler.base.memory import aligned_bytes, round_up
from qcompiler.base.targets import Target
from qcompiler.schedules.table import OpCall, Packs, Row


def lower_all(modules: Sequence[tvm.IRModule], target: Target, params: Params | None = None, dump: Dump = no_dump) -> list[Program]:
    """`lower` one network at several shapes. What `params` says of an operator at one of them holds; others pack their constants alike where they can."""
    given: Params = params or (lambda row, op: None)
    programs = [lower(module, target, given, dump) for module in modules]
    chosen = [dict[tuple[str, str], dict[str, Any]]() for _ in programs]
    steps: dict[tuple[str, str], list[tuple[int, Row, OpCall]]] = {}
    for number, program in enumerate(programs):
        for step in program.steps:
            if step.row is not None and step.op is not None and isinstance(step.row, Packs):
                steps.setdefault((step.row.name, step.op.value_id), []).append((number, step.row, step.op))
    for key, found in steps.items():
        row, ops = found[0][1], [op for _, _, op in found]
        if len(ops) > 1 and isinstance(row, Packs) and all(given(row, op) is None for op in ops):
            for (number, _, op), point in zip(found, row.alike(ops, target), strict=True):
                if point != row.default(op, target):
                    chosen[number][key] = point

    def lowered(number: int) -> Program:
        known = chosen[number]
        return lower(modules[number], target, lambda row, op: known.get((row.name, op.value_id)) or given(row, op), dump)

    return [lowered(number) if chosen[number] else program for number, program in enumerate(programs)]


@dataclass(frozen=True)
class Places:
    """Where constants lie in the shared blob. offsets: of each program, of each of its steps. size: of the blob in bytes. own: bytes that each program
    added to those before it."""

    offsets: list[list[list[int]]]
    size: int
    own: list[int]


def share(programs: Sequence[Program]) -> Places:
    """Places for the constants of all programs as they are now, every one 64-byte aligned."""
    if len(programs) == 1:
        return Places([[list(s.constants) for s in programs[0].steps]], int(programs[0].constants.size), [int(programs[0].constants.size)])
    known: dict[tuple[str, int, bytes], int] = {}
    places = Places([], 0, [])
    size = 0
    for program in programs:
        before, found = size, list[list[int]]()
        for step in program.steps:
            found.append([])
            for index, raw in enumerate(_arrays(program, step)):
                key = step.writes, index, raw.tobytes()
                if key not in known:
                    known[key] = size
                    size = round_up(size + raw.size)
                found[-1].append(known[key])
        places.offsets.append(found)
        places.own.append(size - before)
    return Places(places.offsets, size + 64, places.own)  # vector loads may read past the last array


def packed(programs: Sequence[Program], places: Places, blob: np.ndarray | None = None) -> np.ndarray:
    """The blob, uint8: the constants of all programs as they are now, in their places. Those of several are written to `blob` where one is given."""
    if len(programs) == 1:
        return programs[0].constants
    blob = aligned_bytes(places.size) if blob is None else blob
    for program, offsets in zip(programs, places.offsets, strict=True):
        for step, at in zip(program.steps, offsets, strict=True):
            for start, raw in zip(at, _arrays(program, step), strict=True):
                blob[start : start + raw.size] = raw
    return blob


def _arrays(program: Program, step: Step) -> Iterator[np.ndarray]:
    for start, array in zip(step.constants, step.kernel.constants, strict=True):
        yield program.constants[start : start + array.nbytes]
