"""Constant operands: arrays that a module states directly, or as int8 values behind `dequantize`, `permute_dims` and `reshape`.

A QDQ module holds a weight as int8 with one scale per output channel (`dequantize(axis=0)`), then brings it into the form its Relax
operator wants. Reading a weight undoes that: values in the operator table's form, output channel first, and their scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.base.memory import aligned
from qcompiler.passes.graph import const, const_value, is_const, plain, relax_op, shape_of


@dataclass(frozen=True, eq=False)
class Constant:
    """`real = value` for a float array; `real = scale * (value - zero_point)` for an int8 or int16 one (scale broadcasts against value).

    members: bindings that compute it.
    """

    value: np.ndarray
    scale: np.ndarray | None = None
    zero_point: int = 0
    members: tuple[str, ...] = ()

    def real(self) -> np.ndarray:
        """float32 for a float array, float64 for a quantized one."""
        return self.value if self.scale is None else (self.value.astype(np.float64) - self.zero_point) * self.scale


def constant_of(expr: Any, values: Mapping[str, Any], evaluate: bool = True) -> Constant | None:
    """The constant that `expr` is, or None. With `evaluate=False` only `members` of the result are meaningful (and it is cheap)."""
    if is_const(expr):
        return Constant(const_value(expr) if evaluate else np.zeros(0))
    if isinstance(expr, relax.Var):
        name = str(expr.name)
        found = constant_of(values[name], values, evaluate) if name in values else None
        return found and replace(found, members=(*found.members, name))
    op = relax_op(expr)
    if op == "relax.dequantize" and all(is_const(a) for a in expr.args):
        if not evaluate:
            return Constant(np.zeros(0))
        value, scale, zero = (const_value(a) for a in expr.args)
        if scale.ndim:
            along = [-1 if i == int(expr.attrs.axis) % value.ndim else 1 for i in range(value.ndim)]
            scale, zero = scale.reshape(along), np.broadcast_to(zero, scale.shape).reshape(along)
        stored = value.dtype == np.int8 or (value.dtype == np.int16 and not zero.any())
        if not stored or (zero != zero.reshape(-1)[0]).any():
            return Constant(((value.astype(np.float64) - zero) * scale).astype(np.float32))
        return Constant(value, scale.astype(np.float64), int(zero.reshape(-1)[0]))
    if op in ("relax.permute_dims", "relax.reshape"):
        found = constant_of(expr.args[0], values, evaluate)
        if found is None or not evaluate:
            return found
        if op == "relax.reshape":
            shape = shape_of(expr)
            return _mapped(found, lambda a: a.reshape(shape))
        axes = plain(expr.attrs.axes)
        return _mapped(found, lambda a: a.transpose(axes))
    return None


def _mapped(constant: Constant, move: Any) -> Constant:
    """Apply a rearrangement to the values and, elementwise, to their scales."""
    scale = constant.scale
    if scale is not None and scale.ndim:
        scale = move(np.broadcast_to(scale, constant.value.shape))
    return replace(constant, value=move(constant.value), scale=scale)


def kernel_form(constant: Constant, kind: str, groups: int = 1) -> Constant | str:
    """A weight with output channels first ([O, KH, KW, I/groups] or [N, K]) and one scale per channel; else why it can't be one."""
    value = constant.value
    if kind == "dense":
        if value.ndim < 2 or any(d != 1 for d in value.shape[:-2]):
            return f"a constant matrix of shape {list(value.shape)} has no int8 kernel; supported: [K, N]"
        constant = _mapped(constant, lambda a: a.reshape(a.shape[-2:]).T)
    elif kind == "conv2d_transpose":
        i, kh, kw, o = value.shape
        constant = _mapped(constant, lambda a: a.reshape(groups, i // groups, kh, kw, o).transpose(0, 4, 2, 3, 1).reshape(groups * o, kh, kw, i // groups))
    if constant.value.dtype not in (np.float32, np.int8):
        return f"weights of dtype {constant.value.dtype} have no int8 kernel; supported: float32"
    constant = replace(constant, value=aligned(constant.value))  # which `const` shares
    if constant.scale is None:
        return constant
    channels = constant.value.shape[0]
    scale = np.broadcast_to(constant.scale, constant.value.shape).reshape(channels, -1)
    if constant.zero_point != 0:
        return "weights with a zero point have no int8 kernel"
    if (scale != scale[:, :1]).any():
        return "weights whose scale varies within an output channel have no int8 kernel"
    return replace(constant, scale=scale[:, 0].copy())


def relax_form(variable: Any, kind: str, groups: int, shape: tuple[int, ...]) -> list[Any]:
    """Relax expressions that bring a weight from the kernel's form to the operator's `shape`: each takes the one before, the first
    `variable`.

    Returns functions of one variable. The inverse of `kernel_form`.
    """
    if kind == "dense":
        steps = [lambda w: relax.op.permute_dims(w, [1, 0])]
        return steps if len(shape) == 2 else [*steps, lambda w: relax.op.reshape(w, shape)]
    if kind == "conv2d_transpose":
        o, kh, kw, i = shape_of(variable)
        if groups == 1:
            return [lambda w: relax.op.permute_dims(w, [3, 1, 2, 0])]
        return [
            lambda w: relax.op.reshape(w, (groups, o // groups, kh, kw, i)),
            lambda w: relax.op.permute_dims(w, [0, 4, 2, 3, 1]),
            lambda w: relax.op.reshape(w, shape),
        ]
    return []


def dequantized(value: np.ndarray, scale: np.ndarray, zero_point: int = 0) -> Any:
    """`relax.dequantize` of an int8 or int16 array: per tensor for one scale, along axis 0 for several."""
    if scale.size == 1 and (value.ndim == 0 or value.shape[0] != 1):
        return relax.op.dequantize(const(value), const(np.float32(scale.reshape(-1)[0])), const(np.asarray(zero_point, value.dtype)))
    return relax.op.dequantize(const(value), const(scale.astype(np.float32)), const(np.full(scale.shape, zero_point, value.dtype)), axis=0)
