"""A binding of a module on its way to a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompiler.base.errors import ModelError
from qcompiler.schedules.table import LARGEST, Layout, OpCall, Row

Taps = tuple[slice, ...]  # of axes [outputs, rows, columns] of the weights of a convolution


@dataclass
class Node:
    """An operator, or what stayed float ("legalized"). tail, inner: see `OpCall`; inner is the layout of its own value, where that is not written.
    parts: operators that one kernel computes element by element (`qcompiler/backend/fused.py`), which reads `operands` and constants, and writes `outputs`.
    inside: layouts of what they make."""

    id: str
    name: str
    operands: list[str | np.ndarray]  # value ids and constants
    attrs: dict[str, Any]
    outputs: list[str]
    function: Any = None  # PrimFunc of a legalized operator
    row: Row | None = None
    auxiliary: bool = False
    images: int = 1  # see `Step`
    tail: list[Node] = field(default_factory=list)
    inner: Layout | None = None
    parts: list[Node] = field(default_factory=list)
    inside: dict[str, Layout] = field(default_factory=dict)
    taps: Taps | None = None  # of its weights in the module, those that it was lowered with

    @property
    def written(self) -> list[str]:
        """The values that its kernel writes."""
        return ([] if self.inner else self.outputs) + [node.id for node in self.tail[-1:]]

    def call(self, layout: Callable[[str], Layout]) -> OpCall:
        """The operator as rows see it. layout: of a value."""
        operands = [layout(o) if isinstance(o, str) else o for o in self.operands]
        output, tail = self.inner or layout(self.outputs[0]), list[OpCall]()
        for each in self.tail:
            constants = map(np.asarray, each.operands[1:])
            tail.append(OpCall(each.name, [tail[-1].output if tail else output, *constants], each.attrs, each.inner or layout(each.id), each.id))
        return OpCall(self.name, operands, self.attrs, output, self.id, tuple(tail), self.inner is not None)


def indexable(op: OpCall) -> OpCall:
    """The same. Raises ModelError where kernels, which index in 32 bits, can't reach all of a tensor."""
    for layout in [*op.tensors, *op.written]:
        if layout.elements > LARGEST:
            raise ModelError(
                f"'{op.value_id}': {layout.elements} elements of a tensor ({' x '.join(map(str, layout.shape))}); kernels index at most {LARGEST}; "
                "compile for a smaller batch or a smaller input"
            )
    return op
