"""The row type of portable kernels: a function per operator, no tunables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qcompiler.base.targets import Target
from qcompiler.schedules.table import FLAT, Kernel, Need, OpCall, register


def _accept(op: OpCall) -> str | None:
    return None


@dataclass
class PortableRow:
    """A row for every target. `make(op, target, row name)` builds the kernel; `check(op)` says why it can't, or None. own_channels: see `Row`."""

    name: str
    make: Callable[[OpCall, Target, str], Kernel]
    check: Callable[[OpCall], str | None] = _accept
    dense: bool = False  # inputs without halo and channel padding
    isa: str = "any"
    own_channels: bool = False

    def refuse(self, op: OpCall, target: Target) -> str | None:
        return self.check(op)

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        return [Need(dense=self.dense) for _ in op.tensors]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return {}

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        return {}

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        return self.make(op, target, self.name)


def portable(
    operator: str,
    make: Callable[[OpCall, Target, str], Kernel],
    *,
    check: Callable[[OpCall], str | None] = _accept,
    dense: bool = False,
    own_channels: bool = False,
    flat: bool = False,
) -> None:
    """Register `make` as the portable row of `operator` ("qc.add" -> "any/add"). flat: see `FLAT`."""
    if flat:
        FLAT.add(operator)
    register(operator, PortableRow(f"any/{operator.removeprefix('qc.')}", make, check, dense, own_channels=own_channels))
