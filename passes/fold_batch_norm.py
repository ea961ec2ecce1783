"""Folds per-channel multiplies and adds with constants into the convolution or matrix product before them.

    add(multiply(add(conv(x, w), b), s), t)            -->  add(conv(x, w * s), b * s + t)         (BatchNorm, scalings, hard-sigmoid's slope)
    add(multiply(x, s), t), x an image with channels    -->  add(depthwise 1x1 conv(x, s), t)      (BatchNorm that follows no convolution)

The second form turns two elementwise operators into one with per-channel scales, which quantizes with no loss of range between channels.
Scales are combined in float64 and rounded to float32 once. Works on ONNX's layout, channels on axis 1 (last for a matrix product). Follows simplify.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.graph import const, const_value, dtype_of, is_const, relax_op, shape_of, substitute
from qcompiler.passes.rewrite import Rewrite, channel_vector

_AFFINE = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide")


@dataclass
class _Chain:
    """`scale * start + shift` per channel, in float64; `start` is an anchor's product, or any image when `anchor` is None."""

    start: Any
    anchor: Any
    axis: int
    shape: tuple[int, ...]
    scale: np.ndarray
    shift: np.ndarray
    links: int = 0
    scalings: int = 0
    members: list[str] = field(default_factory=list)

    def add(self, expr: Any, left: bool) -> bool:
        """Take in one operator whose operand on the `left` (or right) is the chain; False when it isn't per-channel."""
        vector = channel_vector(expr.args[1 if left else 0], self.axis, self.shape)
        op = relax_op(expr)
        if vector is None or shape_of(expr) != self.shape or (op == "relax.divide" and (not left or not vector.all())):
            return False
        if op == "relax.add":
            self.shift = self.shift + vector
        elif op == "relax.subtract":
            self.scale, self.shift = (self.scale, self.shift - vector) if left else (-self.scale, vector - self.shift)
        else:
            factor = vector if op == "relax.multiply" else 1 / vector
            self.scale, self.shift = self.scale * factor, self.shift * factor
        self.links += 1
        self.scalings += op in ("relax.multiply", "relax.divide") or not left
        return True


def fold_batch_norm(module: tvm.IRModule) -> tvm.IRModule:
    rewrite = Rewrite(module)
    ends, inside = _chains(rewrite, rewrite.old)
    for name, expr in rewrite:
        if name in inside:
            continue
        if name not in ends:
            rewrite.keep(name, expr)
            continue
        chain = ends[name]
        rewrite.trained = rewrite.trained.folded(chain.members, np.broadcast_to(chain.scale, (chain.shape[chain.axis],)))
        start = substitute(chain.start, lambda v: rewrite.env.get(str(v.name), v))
        product = _scaled(start, chain) if chain.anchor is not None else _depthwise(start, chain)
        shift = np.broadcast_to(chain.shift, (chain.shape[chain.axis],))
        if not shift.any():
            rewrite.keep(name, product)
            continue
        along = [1] * (len(chain.shape) - chain.axis)
        along[0] = -1
        bias = shift.astype(np.float32).reshape(along if relax_op(chain.anchor) == "relax.matmul" else [1] * chain.axis + along)
        rewrite.keep(name, relax.op.add(rewrite.interior(name, "conv" if len(along) > 1 else "matmul", product), const(bias)))
    return rewrite.done()


def _chains(rewrite: Rewrite, old: dict[str, Any]) -> tuple[dict[str, _Chain], set[str]]:
    """Last value of each chain worth folding -> the chain; and the values that vanish in chains."""
    ends: dict[str, _Chain] = {}
    inside: set[str] = set()
    taken: set[str] = set()
    for name, expr in rewrite.graph.bindings:
        if name in taken or name in rewrite.trained.exact:
            continue
        chain, members = _start(name, expr)
        if chain is None:
            continue
        while (uses := rewrite.uses[members[-1]]) and len(uses) == 1 and uses[0] != "<output>":
            reader = old[uses[0]]
            left = isinstance(reader.args[0], relax.Var) and str(reader.args[0].name) == members[-1]
            stated = rewrite.is_stated(members[-1]) or rewrite.is_stated(uses[0])
            if stated or relax_op(reader) not in _AFFINE or not chain.add(reader, left):
                break
            members.append(uses[0])
        worth = chain.scalings or chain.links > 1 if chain.anchor is not None else chain.links > 1 and chain.scalings and chain.scale.size > 1
        if worth:
            ends[members[-1]] = chain
            chain.members = members
            inside |= set(members[:-1])
            taken |= set(members)
    return ends, inside


def _start(name: str, expr: Any) -> tuple[_Chain | None, list[str]]:
    op = relax_op(expr)
    one, zero = np.ones(1), np.zeros(1)
    if op in _WEIGHT_AXIS and is_const(expr.args[1]) and dtype_of(expr) == "float32":
        shape = shape_of(expr)
        if op == "relax.matmul" and len(shape_of(expr.args[1])) != 2:
            return None, []
        return _Chain(expr, expr, len(shape) - 1 if op == "relax.matmul" else 1, shape, one, zero), [name]
    if op in ("relax.multiply", "relax.add", "relax.subtract") and dtype_of(expr) == "float32" and len(shape_of(expr)) == 4:
        left = isinstance(expr.args[0], relax.Var)
        x = expr.args[0 if left else 1]
        shape = shape_of(expr)
        if not isinstance(x, relax.Var) or shape_of(x) != shape or shape[1] == 1 or shape[2] * shape[3] == 1:
            return None, []
        chain = _Chain(x, None, 1, shape, one, zero)
        return (chain, [name]) if chain.add(expr, left) else (None, [])
    return None, []


# output channels: (axis of the weight, are they [O/groups] on that axis)
_WEIGHT_AXIS = {
    "relax.nn.conv1d": 0,
    "relax.nn.conv2d": 0,
    "relax.nn.conv3d": 0,
    "relax.nn.conv1d_transpose": 1,
    "relax.nn.conv2d_transpose": 1,
    "relax.matmul": 1,
}


def _scaled(expr: Any, chain: _Chain) -> Any:
    """The anchor with its weight multiplied by the chain's scale, per output channel."""
    op, weight = str(relax_op(expr)), const_value(expr.args[1]).astype(np.float64)
    channels = np.broadcast_to(chain.scale, (chain.shape[chain.axis],))
    if op.endswith("_transpose"):  # [I, O/groups, ...]: input channel i belongs to group i // (I/groups)
        groups = int(expr.attrs.groups)
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        scaled = (split * channels.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)
    else:
        along = [1] * weight.ndim
        along[_WEIGHT_AXIS[op]] = -1
        scaled = weight * channels.reshape(along)
    return tvm.ir.Call(expr.op, [expr.args[0], const(scaled.astype(np.float32))], expr.attrs, expr.ty_args)


def _depthwise(x: Any, chain: _Chain) -> Any:
    channels = chain.shape[1]
    weight = np.broadcast_to(chain.scale, (channels,)).astype(np.float32).reshape(channels, 1, 1, 1)
    return relax.op.nn.conv2d(x, const(weight), groups=channels, data_layout="NCHW", kernel_layout="OIHW")
