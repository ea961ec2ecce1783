"""Operators that the kernel before them computes, where its row can: what lies between need not be written and read again.

dense -> lut16 -> requantize      one kernel, which writes the last value
layer_norm -> requantize          one kernel, which writes both values where others read the first one
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, cast

from qcompiler.backend.node import Node
from qcompiler.schedules.table import Ending, OpCall


def with_tails(nodes: Sequence[Node], values: MutableMapping[str, Any], outputs: Iterable[str], call: Callable[[Node], OpCall]) -> list[Node]:
    """The nodes but for those that are in the tail of another one now. A tail goes on as far as nobody else reads what lies inside of it, which is no value of
    the program any more. outputs: values that the network hands out; call: of a node."""
    uses, readers = Counter(outputs), defaultdict[str, list[Node]](list)
    for node in nodes:
        for operand in node.operands:
            if isinstance(operand, str):
                uses[operand] += 1
                readers[operand].append(node)
    joined: set[str] = set()
    for node in nodes:
        last, row = node, cast(object, node.row)
        if node.id in joined or not isinstance(row, Ending):
            continue
        while last is node or uses[last.id] == 1:
            after = next((n for n in readers[last.id] if n.id not in joined and row.goes_on(call(node), call(n))), None)
            if after is None:
                break
            if uses[last.id] == 1:
                last.inner = values.pop(last.id).layout
            node.tail.append(after)
            joined.add(after.id)
            last = after
    return [n for n in nodes if n.id not in joined]
