"""Functions of one tensor: 256 answers, computed once.

q(f(dq(x)))   -->   qc.lut(x, table)        exact on every target: a table has no arithmetic
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.numerics.spec import QParams, lut
from qcompiler.passes.graph import const, make_op, shape_of
from qcompiler.passes.realize.site import Site, Tensor


def unary(site: Site) -> Any:
    assert site.group.function is not None
    return site.call("qc.lut", [site.inputs[0].expr, const(lut(site.group.function, site.inputs[0].params, site.quantized))], {})


def rescale(tensor: Tensor, params: QParams) -> Any:
    """The table that states the same real values under other parameters."""
    return make_op("qc.lut", [tensor.expr, const(lut(_identity, tensor.params, params))], {}, shape_of(tensor.expr), "int8")


def _identity(x: np.ndarray) -> np.ndarray:
    return x
