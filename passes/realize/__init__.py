"""The QDQ module becomes integer code.

    conv2d(dq(x8), dq(w8)) -> + b -> relu -> q     -->     qc.conv2d(x8, w8, bias32, multiplier)
    conv2d(dq(x8), w) -> + b       (skipped)       -->     qc.f32.conv2d(qc.dequantize(x8), w, b)
    softmax(dq(x8)) -> q                           -->     qc.quantize(softmax(qc.dequantize(x8)))       (no int8 kernel)
    dq(q) with the same parameters                 -->     nothing;  with others: qc.lut

Must follow `insert_qdq`. Groups are found by the same matcher as in the float module, so an integer value has the id of the float value
it stands for. One rule per group kind, in the files beside this one.

Attributes of the result: `qc.float_ops` {value id: why it stayed float}, `qc.params` {value id: [scale, zero_point]} for every int8 value.
`fuse_edges`, `legal_layouts` and `settle_account` follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.numerics.spec import LIMITS, QParams
from qcompiler.passes.constants import constant_of
from qcompiler.passes.graph import Graph, GraphBuilder, const, const_value, dtype_of, is_const, make_op, match_op, relax_op, shape_of, substitute
from qcompiler.passes.groups import Group, find_groups
from qcompiler.passes.realize import conv, elementwise, lut, matmul, pool, recurrence, resize, shape, transformers
from qcompiler.passes.realize.site import Site, Tensor, typed
from qcompiler.passes.select_float import scheduled, sliced
from qcompiler.passes.trained import ATTRIBUTE
from qcompiler.passes.unary import clamp

ACCUMULATED = "accumulated"  # what the integer part of a group is called whose rest is float: `<id>~accumulated`
RULES: dict[str, Callable[[Site], Any]] = {
    **dict.fromkeys(("conv2d", "conv2d_transpose", "dense"), conv.weighted),
    "matmul": matmul.matmul,
    **dict.fromkeys(("add", "sub"), elementwise.add),
    "mul": elementwise.mul,
    "unary": lut.unary,
    "rescale": transformers.rescale,
    "attention": transformers.attention,
    "layer_norm": transformers.normalization,
    "rms_norm": transformers.normalization,
    "softmax": transformers.softmax,
    "take": transformers.gather,
    "recurrence": recurrence.recurrence,
    "prelu": elementwise.prelu,
    "max_pool2d": pool.max_pool2d,
    **dict.fromkeys(("avg_pool2d", "mean"), pool.average),
    **dict.fromkeys(("concat", "reshape", "transpose", "slice", "pad", "select"), shape.move),
    "resize2d": resize.resize2d,
}


def realize(module: tvm.IRModule) -> tvm.IRModule:
    """The integer module of a QDQ module. Raises ModelError for an accumulator that int32 can't hold."""
    realizer = _Realizer(module)
    main = realizer.run()["main"]
    return tvm.IRModule({"main": main.with_attr("qc.float_ops", realizer.float_ops).with_attr("qc.params", realizer.params)})


@dataclass
class _Value:
    """A value of the QDQ module in the integer module: as integers, as float32, or both."""

    stored: Tensor | None = None
    real: Any = None


class _Realizer:
    def __init__(self, module: tvm.IRModule) -> None:
        self.graph = Graph.of(module)
        self.exprs = self.graph.values()
        self.groups = find_groups(module)
        self.uses = self.graph.consumers()
        self.float_ops: dict[str, str] = dict(self.graph.attrs.get("qc.float_ops", {}))
        self.params: dict[str, list[float | int]] = {}
        self.integers: dict[str, Any] = {}  # the calls that make integer values
        self.builder = GraphBuilder({k: v for k, v in self.graph.attrs.items() if k not in ("qc.float_ops", ATTRIBUTE)})
        self.values: dict[str, _Value] = {}
        self.made: dict[Any, Any] = {}  # see `once`

    def run(self) -> tvm.IRModule:
        for p in self.graph.inputs:
            self.values[str(p.name)] = _Value(real=self.builder.input(str(p.name), shape_of(p), dtype_of(p)))
        for group in self.groups:
            if group.kind == "quantize":
                self.values[group.id] = _Value(stored=self.quantized(group))
            elif group.kind == "dequantize":
                self.values[group.id] = self.dequantized(group)
            elif (site := self.site(group)) is not None:
                self.integer(group, site)
            else:
                self.stay_float(group)
        return self.builder.finish([(name, self.real(str(v.name))) for name, v in self.graph.outputs])

    # -- edges --------------------------------------------------------------------------------------------------------------------------

    def quantized(self, group: Group) -> Tensor:
        """The integers of a `relax.quantize`: what its producer made already, else a table or a qc.quantize."""
        source, params = group.inputs[0], self.quantize_params(group.id)
        have = self.values[source].stored
        if have is not None:
            return self.requantized(have, params, group.id)
        source, low, high = self.unclamped(source, params)
        attrs = {"scale": params.scale, "zero_point": params.zero_point, "low": low, "high": high, **typed(params)}
        return self.stored(group.id, make_op("qc.quantize", [self.real(source)], attrs, group.shape, params.dtype), params)

    def unclamped(self, source: str, params: QParams) -> tuple[str, int, int]:
        """(value, low, high): a clamp of a float value is one of its integers, for rounding is monotone."""
        limits = LIMITS[params.dtype]
        found = clamp(self.exprs.get(source))
        name = str(found[0].name) if found is not None and isinstance(found[0], relax.Var) else ""
        if found is None or name not in self.values or self.values[name].stored is not None:
            return source, *limits
        low, high = (bound if b is None else int(params.quantize(np.array(b))) for b, bound in zip(found[1:], limits, strict=True))
        return name, low, high

    def dequantized(self, group: Group) -> _Value:
        """A `relax.dequantize` of stored integers costs nothing until a float operator reads it."""
        value = self.values.get(group.inputs[0]) if group.inputs else None
        if value is None or value.stored is None:
            return _Value(real=self.builder.emit(group.id, self.relax(group.id)))
        params = self.quantize_params(group.id)
        return _Value(stored=value.stored if params == value.stored.params else Tensor(value.stored.expr, params))

    def quantize_params(self, name: str) -> QParams:
        scale, zero_point = (const_value(a) for a in self.exprs[name].args[1:3])
        return QParams(float(scale.reshape(())), int(zero_point.reshape(())), str(zero_point.dtype))

    def requantized(self, tensor: Tensor, params: QParams, name: str) -> Tensor:
        if tensor.params == params:
            return tensor
        return self.stored(self.builder.fresh(name), lut.rescale(tensor, params), params)

    def stored(self, name: str, call: Any, params: QParams) -> Tensor:
        self.params[name] = [params.scale, params.zero_point]
        self.integers[name] = call
        return Tensor(self.builder.emit(name, call), params)

    def real(self, name: str) -> Any:
        """The float32 variable of a value, dequantized on first use."""
        value = self.values[name]
        if value.real is None:
            assert value.stored is not None
            params = value.stored.params
            call = make_op(
                "qc.dequantize",
                [value.stored.expr],
                {"scale": params.scale, "zero_point": params.zero_point},
                shape_of(value.stored.expr),
                "float32",
            )
            value.real = self.builder.emit(self.builder.fresh(name), call)
        return value.real

    # -- groups -------------------------------------------------------------------------------------------------------------------------

    def site(self, group: Group) -> Site | None:
        """What a rule needs, or None for a group that stays float."""
        if group.reason is not None or group.id in self.float_ops:
            return None
        operands = [self.values[v].stored for v in group.operands]
        found = [t for t in operands if t is not None]
        output = self.output_params(group)
        constant_missing = (group.traits.weighted or group.traits.elementwise) and group.weight is not None and group.weight_scale is None
        if len(found) < len(operands) or constant_missing:
            return None
        residual = found.pop() if group.residual else None
        if output is None and not group.traits.accumulates:
            return None
        plain = [self.real(v) for v in group.plain]
        return Site(
            group,
            found,
            residual,
            plain,
            output,
            lambda t, p: self.requantized(t, p, self.builder.naming.made(group.id, "requantized")),
            self.interior,
            self.once,
            self.packed,
            self.exprs,
        )

    def interior(self, group: Group, what: str, call: Any) -> Any:
        """The variable `<group>~<what>` of a call inside a group's integer form."""
        return self.builder.emit(self.builder.made(group.id, what), call)

    def once(self, group: Group, what: str, call: Any) -> Any:
        """`interior`, but what a call of the same relax operator on the same operands has made already: masks are those of all layers."""
        constants = [const_value(a) if is_const(a) else None for a in call.args]
        operands = tuple(str(a) if c is None else (c.shape, str(c.dtype), c.tobytes()) for a, c in zip(call.args, constants, strict=True))
        key = what, relax_op(call), operands, tvm.ir.save_json(call.attrs) if call.attrs is not None else ""
        if key not in self.made:
            self.made[key] = self.interior(group, what, call)
        return self.made[key]

    def packed(self, tensor: Tensor, shape: Sequence[int]) -> Any:
        """The numbers of a tensor in row-major order under another shape: what was reshaped to it where that has the shape."""
        expr = tensor.expr
        while (found := match_op(self.integers.get(str(expr.name)))) is not None and found[0] == "qc.reshape":
            expr = found[1][0]
        if list(shape_of(expr)) == list(shape):
            return expr
        return self.builder.emit(
            self.builder.fresh(str(tensor.expr.name)), make_op("qc.reshape", [tensor.expr], {"shape": list(shape)}, tuple(shape), dtype_of(expr))
        )

    def output_params(self, group: Group) -> QParams | None:
        """Parameters under which every consumer wants the output; None when one wants float32."""
        uses = self.uses[group.id]
        return self.quantize_params(uses[0]) if uses and all(self.is_quantize(u) for u in uses) else None

    def is_quantize(self, name: str) -> bool:
        return name in self.exprs and getattr(self.exprs[name], "op", None) == _QUANTIZE

    def integer(self, group: Group, site: Site) -> None:
        call = RULES[group.kind](site)
        if site.output is not None:
            self.values[group.id] = _Value(stored=self.stored(group.id, call, site.output))
            return
        clamps = [m for m in group.members if group.kind == "matmul" and m != group.members[0]]
        rest = [group.residual] if group.residual else []
        if not clamps and not rest:
            self.values[group.id] = _Value(real=self.builder.emit(group.id, call))
            return
        variable = self.builder.emit(self.builder.made(group.id, ACCUMULATED), call)  # float32 from here on, as float operators
        if group.residual:
            variable = self.builder.emit(self.builder.made(group.id, "added"), relax.op.add(variable, self.real(group.residual)))
        if group.slopes is not None and group.bends_sum:
            slopes = const(group.slopes.astype(np.float32))
            variable = self.builder.emit(self.builder.made(group.id, "bent"), relax.op.nn.prelu(variable, slopes, len(group.shape) - 1))
        low, high = (-math.inf if group.low is None else group.low), (math.inf if group.high is None else group.high)
        if not math.isinf(low):
            variable = self.builder.emit(self.builder.made(group.id, "low"), relax.op.maximum(variable, const(np.float32(low))))
        if not math.isinf(high):
            variable = self.builder.emit(self.builder.made(group.id, "high"), relax.op.minimum(variable, const(np.float32(high))))
        self.values[group.id] = _Value(real=variable)

    def stay_float(self, group: Group) -> None:
        self.float_ops.setdefault(group.id, group.reason or "its operands or its output are float32")
        members = group.members
        if group.traits.float_kernel:
            front = group.front
            self.values[front.id] = _Value(real=self.builder.emit(front.id, scheduled(front, self.real)))
            members = members[len(front.members) :]
        if group.kind == "slice" and isinstance(self.exprs[group.id], relax.TupleGetItem):
            self.values[group.id] = _Value(real=self.builder.emit(group.id, sliced(group, self.real(group.inputs[0]))))
            return
        for name in members:
            if constant_of(self.exprs[name], self.exprs, evaluate=False) is None:
                self.values[name] = _Value(real=self.builder.emit(name, self.relax(name)))
        if group.id not in self.values:  # a constant handed out as it is
            self.values[group.id] = _Value(real=self.builder.emit(group.id, self.constant(self.exprs[group.id])))

    def relax(self, name: str) -> Any:
        """The expression of a float operator over the integer module's variables."""
        return substitute(self.exprs[name], lambda v: self.constant(v) if str(v.name) not in self.values else self.real(str(v.name)))

    def constant(self, expr: Any) -> Any:
        found = constant_of(expr, self.exprs)
        assert found is not None, f"{expr} is read before it is computed"
        return const(found.real().astype(np.float32) if found.scale is not None else found.value)


_QUANTIZE = tvm.ir.Op.get("relax.quantize")
