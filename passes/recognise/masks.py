"""What is added to an attention's logits: masks and relative positions, as one small bias [B or 1, H or 1, S or 1, T].

    logits + where(expand(m), 0, -3.4e38)          -->      bias = where(m, 0, -3.4e38)
    where(m == 0, -10000, logits)                  -->      bias = where(m == 0, -3.4e38, 0)
    view(view(logits) + one constant) + another    -->      bias = one constant

A mask that repeats along an axis (an `expand` to all rows, or a logical and with a constant that is true everywhere) is computed once: its operators are
written anew on what doesn't repeat. They stay integers, booleans and floats as the file has them, reachable behind the bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import Call

from qcompiler.passes.graph import const, const_value, dtype_of, is_const, relax_op, shape_of
from qcompiler.passes.rewrite import Rewrite

LOWEST = float(np.finfo(np.float32).min)
_FILLED = -1e4  # what masks fill in is at most this: its exponential is 0 beside any logit that isn't
_POINTWISE = frozenset(
    f"relax.{op}"
    for op in "add subtract multiply where equal not_equal less less_equal greater greater_equal logical_and logical_or logical_not astype negative".split()
)


@dataclass(frozen=True)
class Mask:
    """`factor * value`, added to logits of shape `view`; value: a variable or constant of the old module. With `fill`, `value` is a boolean instead, and what
    is added is `fill` where it holds, else 0; or the other way round with `inverted`."""

    value: Any
    view: tuple[int, ...]
    factor: float = 1.0
    fill: float | None = None
    inverted: bool = False

    def times(self, factor: float) -> Mask:
        return self if self.fill is not None else replace(self, factor=self.factor * factor)


def filled(condition: Any, fill: np.ndarray, inverted: bool, view: tuple[int, ...]) -> Mask | str:
    """The mask that puts `fill` in the place of logits where `condition` holds; else why it is none.

    A fill far below all logits acts as float32's lowest number does, which swallows the logit it is added to; -inf stays.
    """
    value = float(fill.max())
    if value > _FILLED or fill.min() != fill.max():
        return f"a mask fills in {value:g}; supported: one value of at most {_FILLED:g}, or -inf"
    return Mask(condition, view, fill=value if value == -math.inf else LOWEST, inverted=inverted)


def joined(rewrite: Rewrite, name: str, masks: tuple[Mask, ...], shape: tuple[int, int, int, int]) -> Any:
    """One operand (a variable of the new module, a constant, or None) that adds all `masks` to logits of `shape`; else, as a sentence, why there is none."""
    constant = np.zeros((1, 1, 1, 1), np.float32)
    variables = []
    for mask in masks:
        if is_const(mask.value):
            value = const_value(mask.value)
            if mask.fill is not None:
                value = np.where(value != mask.inverted, np.float32(mask.fill), np.float32(0))
            constant = constant + _viewed(value.astype(np.float32) * np.float32(mask.factor), mask.view, shape)
        elif mask.fill is None and dtype_of(mask.value) != "float32":
            return f"what is added to its logits is {dtype_of(mask.value)}"
        else:
            variables.append(_variable(rewrite, mask, shape))
    bias: Any = None
    for variable in variables:
        bias = variable if bias is None else rewrite.interior(name, "bias", relax.op.add(bias, variable))
    if constant.any():
        array = np.broadcast_to(constant, (*constant.shape[:3], shape[3]))
        bias = const(np.ascontiguousarray(array)) if bias is None else rewrite.interior(name, "bias", relax.op.add(bias, const(constant)))
    if isinstance(bias, relax.Var) and shape_of(bias)[-1] != shape[3]:
        bias = rewrite.interior(name, "bias", relax.op.broadcast_to(bias, (*shape_of(bias)[:3], shape[3])))
    return bias


def _viewed(value: np.ndarray, view: tuple[int, ...], shape: tuple[int, int, int, int]) -> np.ndarray:
    """A constant that broadcasts to `view` as one that broadcasts to `shape`, each axis along which it is constant of size 1."""
    padded = value.reshape((1,) * (len(view) - value.ndim) + value.shape)
    if view != shape and any(d != 1 for d in padded.shape[:-2]):
        padded = np.broadcast_to(padded, (*view[:-2], *padded.shape[-2:])).reshape(*shape[:2], *padded.shape[-2:])
    padded = padded.reshape((1,) * (4 - padded.ndim) + padded.shape) if padded.ndim < 4 else padded.reshape(*padded.shape[-4:]) if padded.ndim > 4 else padded
    for axis in range(4):
        first = padded.take([0], axis)
        padded = first if padded.shape[axis] > 1 and (padded == first).all() else padded
    return padded


def _variable(rewrite: Rewrite, mask: Mask, shape: tuple[int, int, int, int]) -> Any:
    x = _narrow(rewrite, mask.value)
    if mask.fill is not None:
        x = _select(rewrite, x, mask.fill, mask.inverted)
    elif mask.factor != 1.0:
        x = rewrite.once(str(x.name), "mask", relax.op.multiply(x, const(np.float32(mask.factor))))
    rows = shape_of(x)[-2:] if len(shape_of(x)) > 1 else (1, *shape_of(x)) if shape_of(x) else (1, 1)
    lead = (1,) * (len(mask.view) - len(shape_of(x))) + shape_of(x)
    lead = lead[: len(mask.view) - 2]
    if all(d == 1 for d in lead):
        wanted = (1, 1, *rows)
    else:
        if mask.view != shape and lead != mask.view[:-2]:
            x = rewrite.once(str(x.name), "mask", relax.op.broadcast_to(x, (*mask.view[:-2], *rows)))
        wanted = (*(lead if mask.view == shape else shape[:2]), *rows)
    return x if shape_of(x) == wanted else rewrite.once(str(x.name), "mask", relax.op.reshape(x, wanted))


def _select(rewrite: Rewrite, condition: Any, fill: float, inverted: bool) -> Any:
    low, zero = const(np.float32(fill)), const(np.float32(0))
    return rewrite.once(str(condition.name), "mask", relax.op.where(condition, *((zero, low) if inverted else (low, zero))))


def _narrow(rewrite: Rewrite, variable: Any) -> Any:
    """A variable of the new module that broadcasts as the old `variable` does, and repeats less where that is plain to see."""
    old: Any = rewrite.old.get(str(variable.name))
    op = relax_op(old)
    if op == "relax.broadcast_to" and isinstance(old.args[0], relax.Var):
        return _narrow(rewrite, old.args[0])
    if op not in _POINTWISE or rewrite.is_stated(str(variable.name)):
        return rewrite.env[str(variable.name)]
    tensors = [a for a in old.args if isinstance(a, relax.Var)]
    constants = [const_value(a) for a in old.args if is_const(a)]
    if not tensors or any(c.size == 0 or (c != c.reshape(-1)[0]).any() for c in constants):
        return rewrite.env[str(variable.name)]
    if op in ("relax.logical_and", "relax.logical_or") and constants and bool(constants[0].reshape(-1)[0]) == (op == "relax.logical_and"):
        return _narrow(rewrite, tensors[0])
    small = {str(t.name): _narrow(rewrite, t) for t in tensors}
    shapes = [shape_of(s) for s in small.values()]
    if math.prod(np.broadcast_shapes(*shapes)) == math.prod(shape_of(old)):
        return rewrite.env[str(variable.name)]
    args = [small[str(a.name)] if isinstance(a, relax.Var) else const(const_value(a).reshape(-1)[0]) if is_const(a) else a for a in old.args]
    return rewrite.once(str(variable.name), "narrow", Call(old.op, args, old.attrs, old.ty_args))
