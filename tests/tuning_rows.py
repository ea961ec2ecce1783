"""A row whose candidates misbehave in every way a tuner must survive; the worker process imports it by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, make_kernel
from qcompiler.schedules.table import Kernel, Layout, Need, OpCall

KINDS = ["copy", "backwards", "wrong", "outside", "crash at build", "hang at build", "hang at run", "impossible", "error"]


@dataclass
class FaultyRow:
    """`qc.concat` of one tensor: a copy, unless the tunable `kind` says otherwise. `default`: the kind of the default."""

    default_kind: str = "copy"
    name: str = "test/copy"
    isa: str = "test"
    own_channels = True

    def refuse(self, op: OpCall, target: Target) -> str | None:
        return None

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        return [Need()]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return {"kind": KINDS, "tasks": [1, 2]}

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        return {"kind": self.default_kind, "tasks": 1}

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        kind, size = params["kind"], op.output.elements
        if kind == "impossible":
            raise ValueError("can't be built")
        if kind == "error":
            raise RuntimeError("LLVM says no")
        if kind == "crash at build":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "hang at build":
            time.sleep(3600)

        def emit(k: Emitter) -> None:
            half = size // params["tasks"]
            first = T.bind(k.task * half)
            x, y = k.inputs[0], k.output
            with T.serial(0, half) as i:
                at = T.bind(first + (half - 1 - i if kind == "backwards" else i))
                T.buffer_store(y, x[at] + T.Cast("uint8", at == 5) if kind == "wrong" else x[at], [at])
            if kind == "outside":
                T.buffer_store(y, x[0], [size + 3])
            if kind == "hang at run":
                with T.serial(0, 1 << 30) as i, T.serial(0, 1 << 30) as j:
                    T.buffer_store(y, T.Cast("uint8", i * j), [(i * j) % size])

        return make_kernel(self.name, op, target, emit, tasks=params["tasks"])


def copy_op(*shape: int) -> OpCall:
    layout = Layout(shape, "uint8")
    return OpCall("qc.concat", [layout], {"axis": 0}, layout, "copied")
