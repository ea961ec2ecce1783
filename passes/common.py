"""What a network computes several times is computed once: exporters write the mask of attention anew in every layer.

    m0 = where(c, x, -inf), m1 = where(c, x, -inf), attention(q0, k0, v0, m0), attention(q1, k1, v1, m1)   -->   both read m0

Not where the sharing would end inside of expressions of one tensor: those are a table each (`groups.py`), and a value between two of them would be rounded
for nothing. Networks that state roundings are left as they are. Follows recognise.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from qcompiler.passes.graph import const_value, is_const, relax_op
from qcompiler.passes.rewrite import Rewrite
from qcompiler.passes.unary import elementwise

_LARGEST = 1 << 16  # elements of a constant that is compared; layers that share larger ones are none


def common(module: tvm.IRModule) -> tvm.IRModule:
    """The same module, each expression of relax operators bound once."""
    rewrite = Rewrite(module)
    if rewrite.trained:
        return module
    alike, leader = _classes(rewrite), dict[str, str]()
    for first in sorted(alike, key=lambda name: -rewrite.order[name]):  # readers before what they read
        members = alike[first]
        readers = [reader for member in members for reader in rewrite.uses[member]]
        if len(members) > 1 and all(reader in leader or (reader != "<output>" and not _of_one_tensor(rewrite.old[reader])) for reader in readers):
            leader |= dict.fromkeys(members, first)
    if not leader:
        return module
    for name, expr in rewrite:
        if leader.get(name, name) == name:
            rewrite.keep(name, expr)
        else:
            rewrite.replace(name, rewrite.env[leader[name]])
    return rewrite.done()


def _classes(rewrite: Rewrite) -> dict[str, list[str]]:
    """The first binding of each value -> all that compute it."""
    found: dict[Any, str] = {}
    number: dict[str, str] = {}
    members: dict[str, list[str]] = {}
    for name, expr in rewrite.graph.bindings:
        key = _key(expr, number)
        number[name] = first = name if key is None else found.setdefault(key, name)
        members.setdefault(first, []).append(name)
    return members


def _key(expr: Any, number: dict[str, str]) -> Any | None:
    """What two expressions of the same value have in common; None for what is not compared."""
    op = relax_op(expr)
    if op is None or op in ("relax.quantize", "relax.dequantize") or not hasattr(expr.ty, "shape"):
        return None
    operands: list[Any] = []
    for operand in [f for arg in expr.args for f in (arg.fields if isinstance(arg, relax.Tuple) else [arg])]:
        if isinstance(operand, relax.Var):
            operands.append(number.get(str(operand.name), str(operand.name)))
        elif is_const(operand):
            value = const_value(operand)
            if value.size > _LARGEST:
                return None
            operands.append((value.shape, str(value.dtype), value.tobytes()))
        else:
            operands.append(str(operand))
    return op, tuple(operands), tvm.ir.save_json(expr.attrs) if expr.attrs is not None else "", str(expr.ty)


def _of_one_tensor(expr: Any) -> bool:
    found = elementwise(expr)
    return found is not None and len({str(o.name) for o in found[1] if isinstance(o, relax.Var)}) == 1
