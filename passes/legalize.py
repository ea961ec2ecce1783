"""Relax operators as loops: TVM's legalization, with an attention of our own.

TVM's divides 0 by 0 where a mask of -inf leaves a row without keys; ours yields 0 there, as the kernels of `schedules/` do. Runs last, inside of lowering.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import relax, te, tirx, topi

from qcompiler.passes.kinds import KINDS


def legalize(module: tvm.IRModule) -> tvm.IRModule:
    """Every Relax operator as a call of a PrimFunc; `qc.*` calls stay."""
    return relax.transform.LegalizeOps(customize_legalize_map=dict.fromkeys(KINDS["attention"].relax, _attention))(module)


def _attention(builder: Any, call: Any) -> Any:
    scale = float(call.attrs.scale.value)
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
