"""Groups: the units of quantization.

Everything inside a group is computed in int32 and registers; only a group's output is stored, calibrated, planned and quantized. Which
operators form a group is decided here only, so that the float network, the plan, the QDQ module and the integer module speak of the same
values:

    conv2d, conv2d_transpose, dense:  anchor -> bias add -> leaky relu / prelu, one residual add, in either order -> relu / clip
    add, sub, mul, matmul, mean, avg_pool2d:  operator -> relu / clip
    unary:  any expression of one tensor and scalars (hard-swish, x * sigmoid(x), ...)
    data movement and max_pool2d:  the operator alone
    attention, layer_norm, rms_norm, softmax, take, recurrence:  the operator alone
    rescale:  a product with a constant per channel, and nothing else, in networks with 16-bit streams
    quantize, dequantize:  in QDQ modules; group boundaries

Edges inside a group have one use, are not network outputs, and are not rounded to 8 bits by the model file (`trained.py`). Every binding belongs to
exactly one group; `float` groups hold what has no int8 form.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.alone import counted_from_the_end, describe_alone
from qcompiler.passes.constants import Constant, constant_of, kernel_form
from qcompiler.passes.graph import Graph, arguments, dtype_of, match_op, plain, relax_op, shape_of
from qcompiler.passes.kinds import KINDS, Kind
from qcompiler.passes.recognise.miss import NEAR_MISSES
from qcompiler.passes.single_ops import BENDS, Described, describe, slice_of_split, slopes_of
from qcompiler.passes.trained import Trained, in_eight_bits
from qcompiler.passes.unary import Unary, clamp, elementwise, expression_of, join_clamps

STREAMS = "qc.streams"
"""Attribute of a transformer (`streams.py`): the values of its streams. Normalizations, attention and the like are integers where it is there."""
SIXTEEN = "qc.sixteen"
"""Attribute of any network: {value id: why} of further values in 16 bits (`halves.py`, `streams.py`); "" for products with upper halves."""


def values_in_sixteen(attrs: Mapping[str, Any]) -> frozenset[str] | None:
    """The values that a module's attributes give 16 bits; None where they say nothing of such."""
    return frozenset((*attrs.get(STREAMS, ()), *attrs.get(SIXTEEN, ()))) if STREAMS in attrs or SIXTEEN in attrs else None


@dataclass(frozen=True, eq=False)
class Group:
    """One unit of quantization.

    kind: a name of the table in `kinds.py`, whose row is `traits`; an output of a split is a "slice".
    id: value id of the output. members: bindings inside, in order. shape: of the output; () for a tuple.
    inputs: value ids of the tensor operands, in order. residual: one more, added after the bias.
    inputs of attention: q [B, S, H, D], k [B, T, H, D], v [B, T, H, Dv], and a bias that broadcasts to [B, H, S, T] where it is computed; of take: the indices;
        of recurrence: the projection, and which of initial state, initial cell and lengths are computed.
    weight: conv2d, conv2d_transpose: [O, KH, KW, I/groups]; dense: [N, K]; add, sub, mul with one constant operand: that operand
        (`attrs["constant"]` is its position, 0 or 1). float32; in a QDQ module int8 (the operand of a 16-bit sum or product: int16),
        `real = weight_scale * (weight - weight_zero_point)` with one scale per output channel, or a single one for a constant operand. Always float32:
        rescale: the factors [C]; layer_norm, rms_norm: gamma [C]; take: the table; attention: a constant bias [B or 1, H or 1, S or 1, T]; recurrence: those
        of the state [G * H, H].
    bias: float64 [O]; layer_norm: beta [C]; recurrence: that of the state [G * H]. low, high: the activation as bounds of the real output, None for none.
    slopes: float64 [O], factors of negative sums of products and bias, and of the residual too where `bends_sum`; None for none. straight: the id of that sum.
    attrs: geometry by the names of the operator table. function: of a unary group.
    reason: why it has no int8 form, as a sentence without full stop; None for groups that have one.
    """

    kind: str
    id: str
    members: tuple[str, ...]
    inputs: tuple[str, ...]
    shape: tuple[int, ...] = ()
    weight: np.ndarray | None = None
    weight_scale: np.ndarray | None = None
    weight_zero_point: int = 0
    bias: np.ndarray | None = None
    residual: str | None = None
    slopes: np.ndarray | None = None
    straight: str | None = None
    bends_sum: bool = False
    low: float | None = None
    high: float | None = None
    attrs: dict[str, Any] = field(default_factory=dict)
    function: Unary | None = None
    reason: str | None = None

    @property
    def traits(self) -> Kind:
        """What is true of its kind."""
        return KINDS[self.kind]

    @property
    def front(self) -> Group:
        """What of it comes before its slopes; all of it where it has none."""
        if self.straight is None:
            return self
        residual = self.residual if self.bends_sum else None
        members = self.members[: self.members.index(self.straight) + 1]
        return replace(self, id=self.straight, members=members, residual=residual, slopes=None, straight=None, bends_sum=False, low=None, high=None)

    @property
    def plain(self) -> tuple[str, ...]:
        """The inputs that its integer form reads as they are: indices, the bias of attention, initial states."""
        return self.inputs[{"take": 0, "recurrence": 1, "attention": 3}.get(self.kind, len(self.inputs)) :]

    @property
    def operands(self) -> tuple[str, ...]:
        """The values whose 8-bit or 16-bit numbers its integer form computes with."""
        return (*self.inputs[: len(self.inputs) - len(self.plain)], *([self.residual] if self.residual else []))


def find_groups(module: tvm.IRModule) -> list[Group]:
    """The groups of a canonical float module or of a QDQ module, in execution order. They are found once for every module, and shared: their arrays are
    read-only."""
    if module not in _FOUND:
        groups = _Finder(Graph.of(module)).run()
        for array in [a for g in groups for a in (g.weight, g.weight_scale, g.bias, g.slopes) if a is not None]:
            array.flags.writeable = False
        _FOUND[module] = tuple(groups)
    return list(_FOUND[module])


_FOUND: weakref.WeakKeyDictionary[tvm.IRModule, tuple[Group, ...]] = weakref.WeakKeyDictionary()


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values = graph.values()
        self.order = {name: i for i, (name, _) in enumerate(graph.bindings)}
        self.uses = graph.consumers()
        self.trained = Trained.of(graph.attrs)
        self.misses: dict[str, str] = graph.attrs.get(NEAR_MISSES, {})
        self.stated = in_eight_bits(graph) if self.trained.keeps_float else None
        self.sixteen = values_in_sixteen(graph.attrs)
        self.claimed: set[str] = set()
        self.groups: list[Group] = []

    def run(self) -> list[Group]:
        for name, expr in self.graph.bindings:
            if name in self.trained.exact:
                self.claim(self.float_group(name, expr, self.trained.exact[name]))
        backwards = [(n, e) for n, e in reversed(self.graph.bindings) if n not in self.claimed]
        for name, expr in backwards:  # of two convolutions that meet in an add, the later takes it
            if relax_op(expr) in _ANCHORS:
                self.claim(self.anchor(name, expr))
        for name, expr in backwards:  # the largest expression that ends here
            if name not in self.claimed:
                self.claim(self.scalar_function(name, expr))
        for name, expr in self.graph.bindings:
            if relax_op(expr) in KINDS["take"].relax:
                self.claim(self.lookup(name, expr))
        for name, expr in self.graph.bindings:
            if name not in self.claimed and (not self.is_constant(expr) or not self.uses[name]):
                self.claim(self.single(name, expr))
        for name, expr in self.graph.bindings:  # constants that only float operators read
            if name not in self.claimed:
                self.claim(Group("float", name, (name,), (), shape_of(expr), reason="a constant"))
        return [self.exact_bias(g) for g in sorted(self.groups, key=lambda g: self.order[g.id])]

    def exact_bias(self, group: Group) -> Group:
        """The bias that the model file states as integers: float32 constants hold 24 bits of them."""
        stated = next((self.trained.biases[m] for m in group.members if m in self.trained.biases), None)
        fits = stated is not None and group.bias is not None and np.allclose(stated, group.bias, rtol=1e-6, atol=0)
        return replace(group, bias=stated) if fits else group

    def claim(self, group: Group | None) -> None:
        if group is not None:
            self.claimed |= set(group.members)
            self.groups.append(group)

    def constant(self, expr: Any) -> Constant | None:
        return constant_of(expr, self.values)

    def is_constant(self, expr: Any) -> bool:
        return constant_of(expr, self.values, evaluate=False) is not None

    def members(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted({n for n in names if n not in self.claimed}, key=lambda n: self.order[n]))

    def only_consumer(self, name: str) -> str | None:
        """The one binding that reads `name`, once; None for values read more often or rounded, network outputs, and claimed consumers."""
        uses = self.uses[name]
        return uses[0] if len(uses) == 1 and uses[0] != "<output>" and uses[0] not in self.claimed and name not in self.trained.values else None

    # -- convolutions, dense ------------------------------------------------------------------------------------------------------------

    def anchor(self, name: str, expr: Any) -> Group:
        x, right = expr.args[:2]
        found = _ANCHORS[str(relax_op(expr))](expr)
        weight = self.constant(right)
        if isinstance(found, str) or dtype_of(expr) != "float32":
            return self.float_group(name, expr, found if isinstance(found, str) else f"there are int8 kernels for float32 tensors only, not {dtype_of(expr)}")
        kind, attrs = found
        if self.is_constant(x):
            return self.float_group(name, expr, "the left operand is a constant")
        if weight is None and kind == "dense":
            if len(x.ty.shape) < 2 or len(right.ty.shape) < 2:
                return self.float_group(name, expr, "a product with a vector has no int8 kernel")
            return self.extend(Group("matmul", name, (name,), _names([x, right]), shape_of(expr)))
        if weight is None:
            return self.float_group(name, expr, "the weights are computed at run time")
        formed = kernel_form(weight, kind, attrs.get("groups", 1))
        if isinstance(formed, str):
            return self.float_group(name, expr, formed)
        if kind == "dense" and len(x.ty.shape) != len(expr.ty.shape):
            return self.float_group(name, expr, "a product that adds dimensions has no int8 kernel")
        start = Group(kind, name, (name, *weight.members), _names([x]), shape_of(expr), formed.value, formed.scale, formed.zero_point, attrs=attrs)
        return self.extend(start)

    def extend(self, group: Group) -> Group:
        """Take in what follows: bias, slopes and residual (operators with weights), then clamps."""
        weighted, clamped = group.traits.weighted, False
        members = list(group.members)
        while (name := self.only_consumer(group.id)) is not None:
            expr = self.values[name]
            bounds = clamp(expr)
            if bounds is not None and shape_of(expr) == group.shape:
                low, high = join_clamps((group.low, group.high), bounds[1:])
                group, clamped = replace(group, id=name, low=low, high=high), True
            elif clamped or not weighted or relax_op(expr) not in (*_SUMS, *BENDS) or shape_of(expr) != group.shape:
                break
            elif (slopes := slopes_of(expr)) is not None and group.slopes is None:
                group = replace(group, id=name, slopes=slopes, straight=group.id, bends_sum=group.residual is not None)
            elif relax_op(expr) not in _SUMS:
                break
            elif (bias := self.bias(expr, group)) is not None and group.residual is None and group.slopes is None:
                group = replace(group, id=name, bias=bias if group.bias is None else group.bias + bias)
            elif group.residual is None and (residual := self.residual(expr, group)) is not None:
                group = replace(group, id=name, residual=residual)
            else:
                break
            members.append(name)
        return replace(group, members=self.members(members))

    def bias(self, expr: Any, group: Group) -> np.ndarray | None:
        """The constant that an add or subtract adds per output channel."""
        left, right = expr.args
        if relax_op(expr) == "relax.subtract" and _is(right, group.id):
            return None
        constant = self.constant(right if _is(left, group.id) else left)
        channels = group.shape[-1]
        if constant is None or constant.value.size not in (1, channels) or (constant.value.size > 1 and constant.value.shape[-1] != channels):
            return None
        value = np.broadcast_to(constant.real().astype(np.float64).reshape(-1), (channels,))
        return -value if relax_op(expr) == "relax.subtract" else value.copy()

    def residual(self, expr: Any, group: Group) -> str | None:
        left, right = expr.args
        other = right if _is(left, group.id) else left
        allowed = group.traits.residual and relax_op(expr) == "relax.add" and not self.is_constant(other)
        allowed = allowed and (self.stated is None or self.stated.get(str(other.name)) is not None)  # a float one stays what it is, and the sum with it
        return str(other.name) if allowed and shape_of(other) == group.shape else None

    def lookup(self, name: str, expr: Any) -> Group | None:
        """A look-up with what makes its negative indices count from the end, where nothing else reads that."""
        found = describe_alone(expr)
        if found is None or found["reason"] or (inner := counted_from_the_end(self.values, expr.args[1], len(found["weight"]))) is None:
            return None
        index, between = inner
        if any(self.only_consumer(b) not in (*between, name) for b in between):
            return None
        return replace(self.float_group(name, expr, ""), **found, members=(*between, name), inputs=_names([index]))

    # -- elementwise --------------------------------------------------------------------------------------------------------------------

    def scalar_function(self, root: str, expr: Any) -> Group | None:
        """The largest expression of one tensor that ends in `root`, or None. A lone clamp behind add, sub, mul, ... is left to them."""
        if elementwise(expr) is None or dtype_of(expr) != "float32":
            return None
        shape, inside, best = shape_of(expr), {root}, None
        while True:
            frontier = {str(o.name) for n in inside for o in self.operands(n) if str(o.name) not in inside}
            if len(frontier) == 1:
                best = (frontier.copy(), inside.copy())
            grow = [n for n in frontier if self.expandable(n, inside, shape)]
            if not grow or len(inside) == _LONGEST:
                break
            inside.add(max(grow, key=lambda n: self.order[n]))
        if best is None:
            return None
        (source,), inside = best
        if inside == {root} and clamp(expr) is not None and source in self.values and self.only_consumer(source) == root:
            op = relax_op(self.values[source])
            if op in _CLAMPED or (op in _BINARY and self.scalar_function(source, self.values[source]) is None):
                return None
        operands = [o for n in inside for o in self.operands(n)]
        if any(shape_of(o) != shape or (str(o.name) == source and dtype_of(o) != "float32") for o in operands):
            return None
        function = Unary(expression_of(self.values, root, inside))
        members = self.members(inside)
        kind = "unary" if function.refusal is None else "float"
        return Group(kind, root, members, (source,), shape, function=function, reason=function.refusal)

    def operands(self, name: str) -> list[Any]:
        found = elementwise(self.values[name])
        return [o for o in found[1] if isinstance(o, relax.Var)] if found else []

    def expandable(self, name: str, inside: set[str], shape: tuple[int, ...]) -> bool:
        """May `name` join the expression: elementwise with scalar constants, read inside only?"""
        if (
            name not in self.values
            or name in self.claimed
            or name in self.trained.values
            or name in self.trained.calibrated
            or elementwise(self.values[name]) is None
            or shape_of(self.values[name]) != shape
        ):
            return False
        return not any(self.is_constant(o) for o in self.operands(name)) and all(u in inside for u in self.uses[name])

    def binary(self, name: str, expr: Any, kind: str) -> Group:
        constants = [self.constant(a) for a in expr.args]
        tensors = [a for a, c in zip(expr.args, constants, strict=True) if c is None]
        if dtype_of(expr) != "float32":
            return self.float_group(name, expr, f"there are int8 kernels for float32 tensors only, not {dtype_of(expr)}")
        if len(tensors) == 2:
            return self.extend(Group(kind, name, (name,), _names(tensors), shape_of(expr)))
        if not tensors:
            return self.float_group(name, expr, "both operands are constants")
        position = 1 if constants[0] is None else 0
        constant = constants[position]
        assert constant is not None
        if not np.isfinite(constant.value).all():
            return self.float_group(name, expr, "its constant operand holds infinities, as a mask does")
        if (
            kind == "mul"
            and self.sixteen is not None
            and constant.scale is None
            and shape_of(tensors[0]) == shape_of(expr)
            and constant.value.shape[-1:] == (constant.value.size,) == shape_of(expr)[-1:]
        ):
            return Group("rescale", name, (name, *constant.members), _names(tensors), shape_of(expr), constant.value.reshape(-1))
        return self.extend(
            Group(
                kind,
                name,
                (name, *constant.members),
                _names(tensors),
                shape_of(expr),
                constant.value,
                constant.scale,
                constant.zero_point,
                attrs={"constant": position},
            )
        )

    # -- everything else ----------------------------------------------------------------------------------------------------------------

    def single(self, name: str, expr: Any) -> Group:
        op = relax_op(expr)
        if op in ("relax.quantize", "relax.dequantize"):
            return Group(op.removeprefix("relax."), name, (name,), _names(expr.args[:1]), shape_of(expr))
        if op in _BINARY:
            return self.binary(name, expr, _BINARY[op])
        if isinstance(expr, relax.TupleGetItem):
            split = self.values.get(str(expr.tuple_value.name))
            if relax_op(split) == "relax.split" and dtype_of(expr) == "float32":
                described: Described | str | None = slice_of_split(split, int(expr.index))
                return self.described(name, expr, described, self.members([str(expr.tuple_value.name), name]))
        if (
            op == "relax.split"
            and (first := next((u for u in self.uses[name] if u not in self.claimed), None)) is not None
            and dtype_of(expr.args[0]) == "float32"
        ):
            return self.single(first, self.values[first])
        if (found := describe_alone(expr)) is not None:
            if found["kind"] == "recurrence":
                found["attrs"]["wide"] = name in (self.sixteen or ())
            missed = f"operator '{found['kind']}' has no int8 kernel ({self.misses[name]})" if name in self.misses else None
            return replace(self.float_group(name, expr, ""), **found | ({"reason": missed} if missed else {}))
        return self.described(name, expr, describe(expr), (name,))

    def described(self, name: str, expr: Any, found: Described | str | None, members: tuple[str, ...]) -> Group:
        if found is None:
            return self.float_group(name, expr, f"{_spelled(expr)} has no int8 kernel")
        if isinstance(found, str):
            return self.float_group(name, expr, found)
        if any(self.is_constant(o) for o in found.operands):
            return self.float_group(name, expr, "an operand is a constant")
        if dtype_of(expr) != "float32":
            return self.float_group(name, expr, f"there are int8 kernels for float32 tensors only, not {dtype_of(expr)}")
        group = Group(found.kind, name, members, _names(found.operands), shape_of(expr), attrs=found.attrs)
        return self.extend(group) if group.traits.clamped else group

    def float_group(self, name: str, expr: Any, reason: str) -> Group:
        tensors = [a for a in arguments(expr) if isinstance(a, relax.Var)]
        constants = [m for a in tensors if (c := constant_of(a, self.values, evaluate=False)) is not None for m in c.members]
        inputs = [a for a in tensors if str(a.name) not in constants]
        shape = shape_of(expr) if hasattr(expr.ty, "shape") else ()
        reason = f"{reason} ({self.misses[name]})" if name in self.misses else reason
        return Group("float", name, self.members([*constants, name]), _names(inputs), shape, reason=reason)


_SUMS = ("relax.add", "relax.subtract")
_BINARY = {op: kind.name for kind in KINDS.values() if kind.elementwise for op in kind.relax}
_LONGEST = 24  # operators of one expression; what is longer becomes several tables
_CLAMPED = {op for kind in KINDS.values() if kind.clamped and not (kind.accumulates or kind.elementwise) for op in kind.relax}


def _names(variables: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(v.name) for v in variables if isinstance(v, relax.Var))


def _is(expr: Any, name: str) -> bool:
    return isinstance(expr, relax.Var) and str(expr.name) == name


def _spelled(expr: Any) -> str:
    own, op = match_op(expr), relax_op(expr)
    name = own[0].removeprefix("qc.") if own else op.removeprefix("relax.").removeprefix("nn.") if op else None
    return f"operator '{name}'" if name else "this operator"


def _convolution(expr: Any) -> tuple[str, dict[str, Any]] | str:
    a, op = expr.attrs, str(relax_op(expr)).rsplit(".", 1)[-1]
    wanted = ("NHWC", "OHWI" if op == "conv2d" else "IHWO")
    if (str(a.data_layout), str(a.kernel_layout)) != wanted:
        return f"{op} has an int8 kernel for layouts {wanted[0]} and {wanted[1]} only, not {a.data_layout} and {a.kernel_layout}"
    names = ["strides", "padding", "dilation", "groups"] + (["output_padding"] if op == "conv2d_transpose" else [])
    return op, {n: plain(getattr(a, n)) for n in names}


_ANCHORS: dict[str | None, Callable[[Any], tuple[str, dict[str, Any]] | str]] = {
    "relax.nn.conv2d": _convolution,
    "relax.nn.conv2d_transpose": _convolution,
    "relax.matmul": lambda expr: ("dense", {}),
}
