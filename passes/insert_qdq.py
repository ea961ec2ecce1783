"""The plan, written into the module: still float semantics, with every rounding to 8 bits made explicit.

    y = relu(conv2d(x, w) + b)      -->      w8 = dequantize(int8 constant, axis=0)
                                             y  = relu(conv2d(dequantize(quantize(x)), w8) + b)
    z = softmax(y)                  -->      z  = softmax(dequantize(quantize(y)))              (softmax has no int8 kernel)

Works on the canonical float module; `realize` must follow. A value `v` that is stored in 8 bits gains the values `v~q` (int8) and `v~dq`
(float32 again), and everything that read `v` reads `v~dq`. Which groups stayed float, and why, is the attribute `qc.float_ops` of the
result.

Refused here, on the actual weights: accumulators that could exceed int32 (the group stays float, with that reason).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tvm
from tvm import relax

from qcompiler.base.errors import PlanError
from qcompiler.numerics.spec import QParams, add_parameters, conv_accumulator_bound, magnitude, residual_parameters
from qcompiler.passes.constants import dequantized, relax_form
from qcompiler.passes.graph import Graph, GraphBuilder, const, dtype_of, relax_op, shape_of, substitute
from qcompiler.passes.groups import Group, find_groups
from qcompiler.passes.trained import Trained

BIAS_LIMIT = 2**29  # int32 biases beyond it leave too little room for the products
INT32 = 2**31 - 1


class Plan(Protocol):
    """What this pass asks of a `qcompiler.plan.planner.QuantPlan`."""

    def params(self, value_id: str) -> QParams | None:
        """How a value is stored in 8 bits; None when it stays float32."""

    def weight(self, group_id: str) -> tuple[np.ndarray, np.ndarray]:
        """int8 weights as `Group.weight` has them, and their float64 scales [O]."""

    def constant(self, group_id: str) -> QParams | None:
        """How the constant operand of an elementwise group is stored; None: by its own range."""

    def reason(self, group_id: str) -> str | None:
        """Why a group stays float; None when it shall be int8."""


def insert_qdq(module: tvm.IRModule, plan: Plan) -> tvm.IRModule:
    """The QDQ module of a canonical float module.

    Raises PlanError where the plan wants a group in int8 but leaves one of its values without parameters.
    """
    return _Inserter(module, plan).run()


@dataclass
class _Weight:
    value: np.ndarray  # int8, or int16 beside 16-bit numbers, in the kernel's form
    scale: np.ndarray  # float64 [O]
    zero_point: int = 0


class _Inserter:
    def __init__(self, module: tvm.IRModule, plan: Plan) -> None:
        self.graph, self.plan = Graph.of(module), plan
        self.groups = find_groups(module)
        self.weights: dict[str, _Weight] = {}
        self.float_ops: dict[str, str] = {}
        self.quantized: set[str] = set()  # groups computed in int8
        trained = Trained.of(self.graph.attrs)
        self.int8 = set(trained.values)  # values that everybody reads in int8: the file rounds them, or the group that makes them does
        for group in self.groups:
            reason = self.refusal(group)
            if reason is not None:
                self.float_ops[group.id] = reason
                continue
            self.quantized.add(group.id)
            if plan.params(group.id) is not None and not (trained.keeps_float and group.traits.accumulates):
                self.int8.add(group.id)
        self.builder = GraphBuilder({**self.graph.attrs, "qc.float_ops": self.float_ops})
        self.raw: dict[str, Any] = {}
        self.rounded: dict[str, Any] = {}  # value id -> its dequantized variable

    # -- which groups are int8 ----------------------------------------------------------------------------------------------------------

    def refusal(self, group: Group) -> str | None:
        """Why `group` stays float; decides and stores the weights of one that doesn't."""
        reason = group.reason or self.plan.reason(group.id)
        if reason is not None:
            return reason
        output = self.plan.params(group.id)
        if output is None and group.traits.moves:
            return "it moves float32 data"
        if output is None and not group.traits.accumulates:
            raise PlanError(f"{group.kind} '{group.id}': the plan has no 8-bit parameters for its output; give them, or a reason to keep it in float")
        operands = [self.params(v, group) for v in group.operands]
        reason = self.overflow(group)
        if reason is None and output is not None and (group.residual or group.traits.sums):
            if group.id in self.weights and group.traits.sums:
                operands.append(QParams(float(self.weights[group.id].scale[0]), 0, str(self.weights[group.id].value.dtype)))
            reason = _unsummable(group, operands, output)
        return reason

    def params(self, value: str, group: Group) -> QParams:
        found = self.plan.params(value)
        if found is None:
            raise PlanError(
                f"{group.kind} '{group.id}' is planned in 8 bits, but its input '{value}' has no 8-bit parameters; give them, or a reason to keep it in float"
            )
        return found

    def overflow(self, group: Group) -> str | None:
        """The sentence for accumulators that can leave int32, or None."""
        if group.traits.weighted:
            weight = self.weight(group)
            x = self.params(group.inputs[0], group)
            bound = conv_accumulator_bound(weight.value, quantized_bias(group.bias, x.scale, weight.scale), x.zero_point)
        elif group.traits.elementwise and group.weight is not None:
            output = self.plan.params(group.id)
            assert output is not None
            self.weights[group.id] = _elementwise_constant(group.weight, self.plan.constant(group.id), output.dtype)
            return None
        elif group.traits.bound is not None:
            bound = group.traits.bound(self.shape(group.inputs[0]), group.shape)
            if self.params(group.inputs[0], group).dtype == "int16":
                bound = bound // magnitude("int8") * magnitude("int16")
        else:
            return None
        return f"its accumulator can reach {bound}, beyond int32" if bound > INT32 else None

    def shape(self, value: str) -> tuple[int, ...]:
        return next((shape_of(v) for v in self.graph.inputs if str(v.name) == value), None) or shape_of(self.graph.values()[value])

    def weight(self, group: Group) -> _Weight:
        value, scale = self.plan.weight(group.id)
        assert group.weight is not None
        if value.shape != group.weight.shape or value.dtype != np.int8 or scale.shape != value.shape[:1]:
            raise PlanError(
                f"{group.kind} '{group.id}': the plan's weights are {value.dtype} {list(value.shape)} with {list(scale.shape)} scales; "
                f"wanted: int8 {list(group.weight.shape)} with one scale per output channel"
            )
        value, scale = fit_bias(value, scale, group.bias, self.params(group.inputs[0], group).scale)
        self.weights[group.id] = _Weight(value, scale)
        return self.weights[group.id]

    # -- rewriting ----------------------------------------------------------------------------------------------------------------------

    def run(self) -> tvm.IRModule:
        owner = {m: g for g in self.groups for m in g.members}
        for p in self.graph.inputs:
            self.raw[str(p.name)] = self.builder.input(str(p.name), shape_of(p), dtype_of(p))
        for name, expr in self.graph.bindings:
            group = owner[name]
            quantized = group.id in self.quantized
            if quantized and group.id in self.weights and relax_op(expr) in group.traits.relax:
                expr = self.with_weight(group, expr)
            self.raw[name] = self.builder.emit(name, substitute(expr, functools.partial(self.operand, group, quantized)))
        return self.builder.finish([(name, self.seen(str(v.name))) for name, v in self.graph.outputs])

    def operand(self, group: Group, quantized: bool, variable: Any) -> Any:
        name = str(variable.name)
        if name in group.members:
            return self.raw[name]
        if name not in self.raw:  # a weight that `with_weight` has put there
            return variable
        if isinstance(variable.ty, relax.TupleType):  # a split that another group holds; its input is what was quantized
            return self.raw[name]
        return self.dequantized(name) if quantized and name in group.operands else self.seen(name)

    def seen(self, name: str) -> Any:
        """A value as float operators and network outputs see it."""
        return self.dequantized(name) if name in self.int8 else self.raw[name]

    def dequantized(self, name: str) -> Any:
        if name not in self.rounded:
            params = self.plan.params(name)
            assert params is not None
            scale, zero = const(np.float32(params.scale)), const(np.asarray(params.zero_point, params.dtype))
            q = self.builder.emit(self.builder.made(name, "q"), relax.op.quantize(self.raw[name], scale, zero, out_dtype=params.dtype))
            self.rounded[name] = self.builder.emit(self.builder.made(name, "dq"), relax.op.dequantize(q, scale, zero))
        return self.rounded[name]

    def with_weight(self, group: Group, expr: Any) -> Any:
        """The group's operator with its constant operand replaced by dequantized int8."""
        position = int(group.attrs.get("constant", 1))
        weight = self.weights[group.id]
        variable = self.builder.emit(self.builder.made(group.id, "weight"), dequantized(weight.value, weight.scale, weight.zero_point))
        for step in relax_form(variable, group.kind, int(group.attrs.get("groups", 1)), shape_of(expr.args[position])):
            variable = self.builder.emit(self.builder.made(group.id, "weight"), step(variable))
        args = list(expr.args)
        args[position] = variable
        return tvm.ir.Call(expr.op, args, expr.attrs, expr.ty_args)


def _unsummable(group: Group, operands: list[QParams], output: QParams) -> str | None:
    """The sentence for a sum whose operands are so much coarser than its output that no int32 unit serves both, or None."""
    try:
        if group.residual:
            residual_parameters(operands[-1].scale, output.scale, operands[-1].dtype, output.dtype)
        else:
            add_parameters(operands[0].scale, operands[1].scale, output.scale, operands[0].dtype, operands[1].dtype)
    except ValueError as error:
        return str(error)
    return None


def _elementwise_constant(value: np.ndarray, params: QParams | None, dtype: str) -> _Weight:
    """In as many bits as the result has, unless its parameters are stated."""
    params = params or QParams.from_range(float(value.min()), float(value.max()), dtype=dtype)
    return _Weight(params.quantize(value), np.array([params.scale]), params.zero_point)


def quantized_bias(bias: np.ndarray | None, x_scale: float, weight_scale: np.ndarray) -> np.ndarray:
    """int32 [O]: `rint(bias / (x_scale * weight_scale))` (Jacob et al. 2018, arXiv:1712.05877, section 2.4), zeros for None.

    Raises OverflowError for what int32 can't hold; `fit_bias` makes it fit.
    """
    if bias is None:
        return np.zeros(weight_scale.shape, np.int32)
    units = np.rint(bias / (x_scale * weight_scale))
    if not (np.abs(units) <= INT32).all():
        raise OverflowError(f"a bias is {np.abs(units).max():g} units of x_scale * weight_scale, beyond int32")
    return units.astype(np.int32)


def fit_bias(value: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, x_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Coarser scales for channels whose bias would exceed 2^29 units: there the weights are next to nothing beside the bias.

    value: int8 [O, ...]; scale: float64 [O]. The error it adds is below 2^-30 of the bias per product.
    """
    if bias is None:
        return value, scale
    wanted = np.maximum(scale, np.abs(bias) / (x_scale * BIAS_LIMIT))
    if (wanted == scale).all():
        return value, scale
    factor = (scale / wanted).reshape(-1, *[1] * (value.ndim - 1))
    return np.rint(value * factor).astype(np.int8), wanted
