"""How each Relax operator works on values held in another order of axes (see `layout.py`): one rule per family.

A rule returns True after binding the operator, False to leave it to the file's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.passes import layout_volumes
from qcompiler.passes.axes import N1WC, NHWC, Held, Order, complete, matched, renamed, together, transposed
from qcompiler.passes.graph import const, const_value, is_const, plain, relax_op, shape_of
from qcompiler.passes.held_values import HeldValues

Rule = Callable[[HeldValues, str, Any], bool]


# -- images -----------------------------------------------------------------------------------------------------------------------------


def _spatial(held_rank: int) -> tuple[Order, Callable[[Any, int], list[int]]]:
    """(the order images of this rank are held in, a function that brings attributes per spatial axis to two axes)."""
    if held_rank == 4:
        return NHWC, lambda values, _: list(values)
    return N1WC, lambda values, unit: [unit, values[0]] if len(values) == 1 else [unit, values[0], unit, values[1]]


def _weight(layout: HeldValues, weight: Any, rank: int) -> Any:
    """[O, I, H, W] as [O, H, W, I], or [I, O, H, W] as [I, H, W, O]; [O, I, W] gets a height of 1."""
    if not is_const(weight):
        return layout.ordered(layout.of(weight), NHWC if rank == 4 else N1WC)
    value = const_value(weight)
    value = value if rank == 4 else value[:, :, None, :]
    return const(np.ascontiguousarray(value.transpose(0, 2, 3, 1)))


def _conv(layout: HeldValues, name: str, expr: Any) -> bool:
    a, rank = expr.attrs, len(shape_of(expr))
    order, two = _spatial(rank)
    x = expr.args[0]
    if is_const(x):
        return False
    common = {"strides": two(plain(a.strides), 1), "padding": two(plain(a.padding), 0), "dilation": two(plain(a.dilation), 1), "groups": int(a.groups)}
    operands = layout.ordered(layout.of(x), order), _weight(layout, expr.args[1], rank)
    if "transpose" in str(relax_op(expr)):
        extra = two(plain(a.output_padding), 0)
        call = relax.op.nn.conv2d_transpose(*operands, **common, output_padding=extra, data_layout="NHWC", kernel_layout="IHWO", out_layout="NHWC")
    else:
        call = relax.op.nn.conv2d(*operands, **common, data_layout="NHWC", kernel_layout="OHWI", out_layout="NHWC")
    return layout.bind(name, call, order, shape_of(expr))


def _pool(layout: HeldValues, name: str, expr: Any) -> bool:
    a, rank = expr.attrs, len(shape_of(expr))
    order, two = _spatial(rank)
    op = relax.op.nn.max_pool2d if "max" in str(relax_op(expr)) else relax.op.nn.avg_pool2d
    call = op(
        layout.ordered(layout.of(expr.args[0]), order), two(plain(a.pool_size), 1), two(plain(a.strides), 1), two(plain(a.padding), 0),
        two(plain(a.dilation), 1), bool(a.ceil_mode), bool(a.count_include_pad), layout="NHWC", out_layout="NHWC",
    )  # fmt: skip
    return layout.bind(name, call, order, shape_of(expr))


def _resize(layout: HeldValues, name: str, expr: Any) -> bool:
    a = expr.attrs
    call = relax.op.image.resize2d(
        layout.ordered(layout.of(expr.args[0]), NHWC), expr.args[1], layout="NHWC", method=str(a.method),
        coordinate_transformation_mode=str(a.coordinate_transformation_mode), rounding_method=str(a.rounding_method),
        cubic_alpha=float(a.cubic_alpha), cubic_exclude=int(a.cubic_exclude), extrapolation_value=float(a.extrapolation_value),
    )  # fmt: skip
    return layout.bind(name, call, NHWC, shape_of(expr))


# -- elementwise ------------------------------------------------------------------------------------------------------------------------


def _elementwise(layout: HeldValues, name: str, expr: Any) -> bool:
    """Works in the order that moves the fewest elements; of two, the one that isn't the file's."""
    shape = shape_of(expr)
    rank = len(shape)
    tensors = [a for a in expr.args if isinstance(a, relax.Var)]
    constants = [a for a in expr.args if is_const(a)]
    if not tensors:
        return False
    operands = {str(v.name): _lifted(layout.of(v), rank) for v in tensors}
    if len(operands) == 1 and all(const_value(c).size == 1 for c in constants) and next(iter(operands.values())).shape == shape:
        order = next(iter(operands.values())).order  # whatever it is
    else:
        full = [h for h in operands.values() if h.shape == shape] or [max(operands.values(), key=lambda h: int(np.prod(h.shape)))]
        candidates = _orders(operands.values(), shape) or list(dict.fromkeys(complete(h.order, h.shape) for h in full))
        order = min(candidates, key=lambda o: (_moved(operands.values(), o), o == tuple(range(rank))))
    args = []
    for arg in expr.args:
        if isinstance(arg, relax.Var):
            args.append(layout.ordered(operands[str(arg.name)], order))
        else:
            args.append(layout.constant(arg, order, rank) if is_const(arg) else arg)
    return layout.bind(name, _call(expr, args), order, shape)


def _orders(tensors: Iterable[Held], shape: tuple[int, ...]) -> list[Order]:
    """The order that all of them are held in, where it has every axis of a result of this shape; it may lack axes of size 1."""
    orders = list({h.order for h in tensors})
    return orders if len(orders) == 1 and all(d == 1 or a in orders[0] for a, d in enumerate(shape)) else []


def _lifted(held: Held, rank: int) -> Held:
    """A value as broadcasting sees it: axes of size 1 in front, up to `rank`."""

    extra = rank - len(held.shape)
    if extra == 0:
        return held
    return Held(held.id, held.var, tuple(None if a is None else a + extra for a in held.order), (1,) * extra + held.shape)


def _moved(operands: Any, order: Order) -> int:
    """Elements of operands whose data isn't in `order` already."""
    return sum(int(np.prod(h.shape)) for h in operands if h.moving != [a for a in order if a is not None and h.shape[a] != 1])


def _call(expr: Any, args: Sequence[Any]) -> Any:
    from tvm.ir import Call

    return Call(expr.op, list(args), expr.attrs, expr.ty_args)


def _prelu(layout: HeldValues, name: str, expr: Any) -> bool:
    x = layout.full(layout.of(expr.args[0]))
    axis = int(expr.attrs.axis) % len(x.shape)
    return is_const(expr.args[1]) and layout.bind(name, relax.op.nn.prelu(x.var, expr.args[1], x.order.index(axis)), x.order, x.shape)


# -- operators that name axes -----------------------------------------------------------------------------------------------------------


def _reduce(layout: HeldValues, name: str, expr: Any) -> bool:
    x = layout.of(expr.args[0])
    rank, keep = len(x.shape), bool(expr.attrs.keepdims)
    axes = [a % rank for a in (plain(expr.attrs.axis) if expr.attrs.axis is not None else range(rank))]
    x = layout.full(x)
    stored = sorted(x.order.index(a) for a in axes)
    op = getattr(relax.op, str(relax_op(expr)).rsplit(".", 1)[-1])
    order = x.order if keep else tuple(None if a is None else a - sum(r < a for r in axes) for a in x.order if a not in axes)
    return layout.bind(name, op(x.var, stored, keep), order, shape_of(expr))


def _concat(layout: HeldValues, name: str, expr: Any) -> bool:

    fields = list(expr.args[0].fields) if isinstance(expr.args[0], relax.Tuple) else []
    shape = shape_of(expr)
    held = [layout.of(f) for f in fields if isinstance(f, relax.Var)]
    if not held:
        return False
    axis = int(expr.attrs.axis) % len(shape)
    candidates = _orders(held, shape) or list(dict.fromkeys(complete(h.order, h.shape) for h in held))
    order = min(candidates, key=lambda o: (_moved(held, o), o == tuple(range(len(shape)))))

    parts = [layout.ordered(layout.of(f), order) if isinstance(f, relax.Var) else const(transposed(const_value(f), order)) for f in fields]
    return layout.bind(name, relax.op.concat(parts, order.index(axis)), order, shape)


def _split(layout: HeldValues, name: str, expr: Any) -> bool:
    x = layout.full(layout.of(expr.args[0]))
    axis = int(expr.attrs.axis) % len(x.shape)
    sections = plain(expr.attrs.indices_or_sections)
    return layout.bind(name, relax.op.split(x.var, sections, x.order.index(axis)), x.order, ())


def _slice(layout: HeldValues, name: str, expr: Any) -> bool:
    axes, begin, end, *rest = ([int(plain(v)) for v in a.fields] for a in expr.args[1:])
    strides = rest[0] if rest else [1] * len(axes)
    x = layout.full(layout.of(expr.args[0]))
    stored = [x.order.index(a % len(x.shape)) for a in axes]
    return layout.bind(name, relax.op.strided_slice(x.var, stored, begin, end, strides), x.order, shape_of(expr))


def _pad(layout: HeldValues, name: str, expr: Any) -> bool:
    a = expr.attrs
    x = layout.full(layout.of(expr.args[0]))
    widths = plain(a.pad_width)
    moved = [w for k in x.order for w in ([0, 0] if k is None else widths[2 * k : 2 * k + 2])]
    return layout.bind(name, relax.op.nn.pad(x.var, moved, str(a.pad_mode), float(a.pad_value)), x.order, shape_of(expr))


def _along_axis(make: Callable[[Any, Any, int], Any]) -> Rule:
    """Operators with one axis and one data operand, whose result has the operand's rank."""

    def rule(layout: HeldValues, name: str, expr: Any) -> bool:
        x = layout.full(layout.of(expr.args[0]))
        return layout.bind(name, make(expr, x.var, x.order.index(int(expr.attrs.axis) % len(x.shape))), x.order, shape_of(expr))

    return rule


def _take(layout: HeldValues, name: str, expr: Any) -> bool:
    """Constant indices of rank 1 only: the result has the operand's rank."""
    if not (is_const(expr.args[1]) and const_value(expr.args[1]).ndim == 1 and isinstance(expr.args[0], relax.Var) and expr.attrs.axis is not None):
        return False
    return _along_axis(lambda e, x, axis: relax.op.take(x, e.args[1], axis, str(e.attrs.mode)))(layout, name, expr)


def _layer_norm(layout: HeldValues, name: str, expr: Any) -> bool:
    """Over one axis; the scale and shift are vectors, whatever the order."""
    x, a = layout.of(expr.args[0]), expr.attrs
    axes = [v % len(x.shape) for v in plain(a.axes)]
    if len(axes) != 1 or not all(is_const(v) for v in expr.args[1:]):
        return False
    x = _with_last(layout, expr.args[0], axes[0])
    call = relax.op.nn.layer_norm(x.var, *expr.args[1:], [len(x.order) - 1], float(a.epsilon), bool(a.center), bool(a.scale))
    return layout.bind(name, call, x.order, x.shape)


def _softmax(layout: HeldValues, name: str, expr: Any) -> bool:
    x = _with_last(layout, expr.args[0], int(expr.attrs.axis) % len(shape_of(expr)))
    return layout.bind(name, relax.op.nn.softmax(x.var, len(x.order) - 1), x.order, x.shape)


def _with_last(layout: HeldValues, operand: Any, axis: int) -> Held:
    """The operand with `axis` innermost, where kernels that go along one axis read it, and where alone they have integer forms: as it is held, or else in
    the file's order, or else with that axis alone moved. What reads it later finds it so: a residual beside a normalization stays in its order."""
    x = layout.of(operand)
    ours, file = complete(x.order, x.shape), tuple(range(len(x.shape)))
    order: Order = next((o for o in (ours, file) if o[-1] == axis), (*(a for a in ours if a != axis), axis))
    return layout.full(x) if order == ours else layout.moved(str(operand.name), order)


def _instance_norm(layout: HeldValues, name: str, expr: Any) -> bool:
    x, a = layout.of(expr.args[0]), expr.attrs
    if not all(is_const(v) for v in expr.args[1:]):
        return False
    x = layout.full(x)
    rank = len(x.shape)
    axes = sorted(x.order.index(v % rank) for v in plain(a.axes))
    call = relax.op.nn.instance_norm(x.var, *expr.args[1:], x.order.index(int(a.channel_axis) % rank), axes, float(a.epsilon), bool(a.center), bool(a.scale))
    return layout.bind(name, call, x.order, x.shape)


def _group_norm(layout: HeldValues, name: str, expr: Any) -> bool:
    """Groups are of channels that follow each other, innermost; the scale and shift are vectors."""
    a, rank = expr.attrs, len(shape_of(expr))
    if not all(is_const(v) for v in expr.args[1:]):
        return False
    x = _with_last(layout, expr.args[0], int(a.channel_axis) % rank)
    axes = sorted(x.order.index(v % rank) for v in plain(a.axes))
    call = relax.op.nn.group_norm(x.var, *expr.args[1:], int(a.num_groups), len(x.order) - 1, axes, float(a.epsilon), bool(a.center), bool(a.scale))
    return layout.bind(name, call, x.order, x.shape)


# -- moving data ------------------------------------------------------------------------------------------------------------------------


def _permute(layout: HeldValues, name: str, expr: Any) -> bool:

    if not isinstance(expr.args[0], relax.Var):
        return False
    x = layout.of(expr.args[0])
    rank = len(x.shape)
    axes = [a % rank for a in plain(expr.attrs.axes)] if expr.attrs.axes is not None else list(range(rank - 1, -1, -1))
    order = tuple(None if a is None else axes.index(a) for a in x.order)
    layout.held[name] = Held(name, x.var, order, shape_of(expr))
    return True


def _reshape(layout: HeldValues, name: str, expr: Any) -> bool:
    """Splits axes wherever they lie; joins axes that lie side by side in the held order, after moving them together when they don't."""
    if not isinstance(expr.args[0], relax.Var):
        return False
    x, shape = layout.of(expr.args[0]), shape_of(expr)
    groups = matched(x.shape, shape)
    if groups is None:
        return False
    first, last = together(x.moving, [old for old, _ in groups])
    wanted = layout.wanted(name, len(shape))
    sequence = first if wanted is not None and renamed(first, groups) == [a for a in wanted if a is not None and shape[a] != 1] else last
    if sequence != x.moving and layout.only_feeds_matrices(name) and _flatten_permuted(layout, name, x, shape, groups):
        return True
    if sequence != x.moving:
        order: Order = tuple(sequence)
        x = Held(x.id, layout.ordered(x, complete(order, x.shape)), order, x.shape)
    moving = renamed(x.moving, groups)
    if all(len(old) == len(new) == 1 for old, new in groups):  # axes of size 1 come or go: nothing to do
        became = {old[0]: new[0] for old, new in groups}
        held_shape = shape_of(x.var)
        kept = [a for a in x.order if a is not None and x.shape[a] != 1]
        order = tuple(None if d == 1 else became[kept.pop(0)] for d in held_shape)
        layout.held[name] = Held(name, x.var, order, shape)
        return True
    order = complete(tuple(moving), shape)
    return layout.bind(name, relax.op.reshape(x.var, [shape[a] for a in order if a is not None]), order, shape)


def _flatten_permuted(layout: HeldValues, name: str, x: Held, shape: tuple[int, ...], groups: list[tuple[list[int], list[int]]]) -> bool:
    """Flatten an image to [batch, features] as it lies; the matrices that read it get their rows in that order instead (see `_matmul`)."""
    old, new = groups[-1]
    if len(shape) != 2 or new != [1] or sorted(x.moving[-len(old) :]) != old or x.moving[: -len(old)] != [a for o, _ in groups[:-1] for a in o]:
        return False
    features = np.arange(shape[1]).reshape([x.shape[a] for a in old])
    layout.features[name] = features.transpose([old.index(a) for a in x.moving[-len(old) :]]).reshape(-1)
    flat = layout.builder.emit(layout.builder.made(name, "nhwc"), relax.op.reshape(x.var, shape))
    layout.hold(name, flat, (0, 1), shape)
    return True


def _matmul(layout: HeldValues, name: str, expr: Any) -> bool:
    """A product with a constant matrix works on the last axis, whatever the order of the others."""
    x, w = expr.args
    if not (isinstance(x, relax.Var) and is_const(w) and len(shape_of(w)) == 2):
        return False
    held = layout.of(x)
    if str(x.name) in layout.features:
        rows = const(np.ascontiguousarray(const_value(w)[layout.features[str(x.name)]]))
        return layout.bind(name, relax.op.matmul(held.var, rows), (0, 1), shape_of(expr))
    last = len(held.shape) - 1
    if None in held.order or held.order[-1:] != (last,) or len(held.order) != len(held.shape) or len(held.shape) < 2:
        return False
    return layout.bind(name, relax.op.matmul(held.var, w), held.order, shape_of(expr))


_UNARY = (
    "abs acos acosh asin asinh astype atan atanh ceil clip cos cosh erf exp floor isfinite isinf isnan log logical_not negative round rsqrt sigmoid "
    "sign sin sinh sqrt square tan tanh trunc bitwise_not nn.relu nn.relu6 nn.leakyrelu nn.gelu nn.gelu_tanh nn.selu nn.silu nn.softplus "
)
_BINARY = (
    "add subtract multiply divide floor_divide floor_mod mod power maximum minimum equal not_equal less less_equal greater greater_equal logical_and "
    "logical_or logical_xor bitwise_and bitwise_or bitwise_xor where left_shift right_shift"
)
AGNOSTIC = {f"relax.{op}" for op in (_UNARY + _BINARY).split()}
KEEPS_AXES = AGNOSTIC | {f"relax.{op}" for op in "concat strided_slice flip nn.pad nn.prelu nn.softmax nn.instance_norm nn.group_norm".split()}
IMAGE: dict[str, Rule] = {
    "relax.nn.conv1d": _conv,
    "relax.nn.conv2d": _conv,
    "relax.nn.conv1d_transpose": _conv,
    "relax.nn.conv2d_transpose": _conv,
    "relax.nn.max_pool1d": _pool,
    "relax.nn.max_pool2d": _pool,
    "relax.nn.avg_pool1d": _pool,
    "relax.nn.avg_pool2d": _pool,
    "relax.image.resize2d": _resize,
    "relax.nn.conv3d": layout_volumes.conv,
    "relax.nn.conv3d_transpose": layout_volumes.conv_transpose,
    "relax.nn.max_pool3d": layout_volumes.pool,
    "relax.nn.avg_pool3d": layout_volumes.pool,
}
RULES: dict[str, Rule] = {
    **dict.fromkeys(sorted(AGNOSTIC), _elementwise),
    **IMAGE,
    **dict.fromkeys([f"relax.{op}" for op in ("mean", "sum", "max", "min", "prod")], _reduce),
    "relax.concat": _concat,
    "relax.split": _split,
    "relax.strided_slice": _slice,
    "relax.nn.pad": _pad,
    "relax.nn.prelu": _prelu,
    "relax.nn.softmax": _softmax,
    "relax.nn.log_softmax": _along_axis(lambda e, x, axis: relax.op.nn.log_softmax(x, axis)),
    "relax.flip": _along_axis(lambda e, x, axis: relax.op.flip(x, axis)),
    "relax.take": _take,
    "relax.nn.layer_norm": _layer_norm,
    "relax.nn.instance_norm": _instance_norm,
    "relax.nn.group_norm": _group_norm,
    "relax.permute_dims": _permute,
    "relax.reshape": _reshape,
    "relax.matmul": _matmul,
}
