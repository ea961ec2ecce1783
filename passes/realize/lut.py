"""Functions of one tensor: 256 answers, computed once.

q(f(dq(x)))   -->   qc.lut(x, table)        exact on every target: a table has no arithmetic
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.numerics.constants import lut16, requantize_multiplier
from qcompiler.numerics.spec import QParams, lut
from qcompiler.passes.graph import const, make_op, shape_of
from qcompiler.passes.realize.site import Site, Tensor, typed


def unary(site: Site) -> Any:
    assert site.group.function is not None
    x = site.inputs[0]
    if x.params.dtype == "int16":
        table, attrs = lut16(site.group.function, x.params.scale, site.quantized)
        return site.call("qc.lut16", [x.expr, const(table)], attrs)
    return site.call("qc.lut", [site.inputs[0].expr, const(lut(site.group.function, site.inputs[0].params, site.quantized))], {})


def rescale(tensor: Tensor, params: QParams) -> Any:
    """The same real values under other parameters: a table for all 8-bit numbers, a product where 16 bits are involved."""
    if "int16" in (tensor.params.dtype, params.dtype):
        multiplier = requantize_multiplier(tensor.params.scale, params.scale)
        attrs = {"x_zero_point": tensor.params.zero_point, "zero_point": params.zero_point, **typed(params)}
        return make_op("qc.requantize", [tensor.expr, const(multiplier)], attrs, shape_of(tensor.expr), params.dtype)
    return make_op("qc.lut", [tensor.expr, const(lut(_identity, tensor.params, params))], {}, shape_of(tensor.expr), "int8")


def _identity(x: np.ndarray) -> np.ndarray:
    return x
