"""Relax operators as loops: TVM's legalization, with an attention, a maximum and a minimum of our own.

TVM's divides 0 by 0 where a mask of -inf leaves a row without keys; ours yields 0 there, as the kernels of `schedules/` do. The last pass.
Its maximum starts from the least finite number, so that nothing but -inf would yield -3.4e38; ours starts from -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax, te, tirx, topi

from qcompiler.passes.alone import attention_scale
from qcompiler.passes.graph import dtype_of, plain, shape_of
from qcompiler.passes.kinds import KINDS


def legalize(module: tvm.IRModule) -> tvm.IRModule:
    """Every Relax operator as a call of a PrimFunc; `qc.*` calls stay."""
    own = {**dict.fromkeys(KINDS["attention"].relax, _attention), "relax.max": _extreme("max"), "relax.min": _extreme("min")}
    return relax.transform.LegalizeOps(customize_legalize_map=own)(module)


def _attention(builder: Any, call: Any) -> Any:
    if call.attrs.causal_mask is not None or call.attrs.window_size is not None:  # which none of our passes writes
        return call.op.get_attr("FLegalize")(builder, call)
    scale = attention_scale(call)
    return builder.call_te(lambda *operands: _computed(scale, *operands), *call.args, primfunc_name_hint="attention")


def _computed(scale: float, q: Any, k: Any, v: Any, bias: Any = None) -> Any:
    batch, rows, heads = (int(d) for d in q.shape[:3])
    columns, out = int(v.shape[1]), int(v.shape[3])
    q, k, v = (topi.reshape(topi.transpose(x, [0, 2, 1, 3]), [batch * heads, int(x.shape[1]), int(x.shape[3])]) for x in (q, k, v))
    logits = topi.multiply(topi.nn.batch_matmul(q, k, oshape=[batch * heads, rows, columns]), tirx.const(scale, "float32"))
    if bias is not None:
        logits = topi.reshape(topi.add(topi.reshape(logits, [batch, heads, rows, columns]), bias), [batch * heads, rows, columns])
    top = topi.max(logits, axis=-1, keepdims=True)
    top = te.compute(top.shape, lambda *i: tirx.Select(top[i] == tirx.const(-math.inf, "float32"), tirx.const(0, "float32"), top[i]))
    powers = topi.exp(topi.subtract(logits, top))
    total = topi.sum(powers, axis=-1, keepdims=True)
    total = te.compute(total.shape, lambda *i: tirx.Select(total[i] == tirx.const(0, "float32"), tirx.const(1, "float32"), total[i]))
    mixed = topi.nn.batch_matmul(topi.divide(powers, total), v, transpose_b=False, oshape=[batch * heads, rows, out])
    return topi.transpose(topi.reshape(mixed, [batch, heads, rows, out]), [0, 2, 1, 3])


def _extreme(name: str) -> Callable[[Any, Any], Any]:
    combine, sign = (tirx.max, -1) if name == "max" else (tirx.min, 1)

    def legalization(builder: Any, call: Any) -> Any:
        x = call.args[0]
        shape, dtype = shape_of(x), dtype_of(x)
        axes, keepdims = plain(call.attrs.axis), bool(call.attrs.keepdims)
        reduced = sorted(range(len(shape)) if axes is None else {int(a) % len(shape) for a in axes})
        start = tirx.const(sign * math.inf, dtype) if dtype.startswith("float") else (tirx.min_value if sign < 0 else tirx.max_value)(dtype)
        reducer = te.comm_reducer(lambda a, b: combine(a, b), lambda _: start, name=name)
        kept = [d for i, d in enumerate(shape) if i not in reduced]
        result = [1 if i in reduced else d for i, d in enumerate(shape)] if keepdims else kept

        def compute(operand: Any) -> Any:
            along = [te.reduce_axis((0, shape[a]), name=f"k{a}") for a in reduced]

            def element(*index: Any) -> Any:
                outer, inner = iter([v for i, v in enumerate(index) if not keepdims or i not in reduced]), iter(along)
                return reducer(operand(*[next(inner) if i in reduced else next(outer) for i in range(len(shape))]), axis=along)

            return te.compute(result, element, name=name)

        return builder.call_te(compute, x, primfunc_name_hint=name)

    return legalization
