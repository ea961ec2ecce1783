"""add, sub, mul of two tensors, or of a tensor and an int8 constant; prelu.

q(relu(dq(a) + dq(b)))   -->   qc.add: integer factors A, B bring both operands to a unit 2^shift finer than the output's
q(dq(a) - dq(b))         -->   qc.add with -B
q(dq(a) * dq(b))         -->   qc.mul: the product of the centred integers, exact in int32
q(prelu(dq(x), slopes))  -->   qc.prelu: one requantization, whose multiplier is the channel's own below zero
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.numerics.spec import QParams, add_parameters
from qcompiler.passes.graph import const
from qcompiler.passes.realize.site import Site, Tensor, typed


def _operands(site: Site) -> tuple[Tensor, Tensor]:
    """Both operands in order; a constant one is a `Tensor` too."""
    group = site.group
    if group.weight is None:
        return site.inputs[0], site.inputs[1]
    assert group.weight_scale is not None
    constant = Tensor(const(group.weight), QParams(float(group.weight_scale.reshape(-1)[0]), group.weight_zero_point, str(group.weight.dtype)))
    return (site.inputs[0], constant) if group.attrs["constant"] == 1 else (constant, site.inputs[0])


def add(site: Site) -> Any:
    a, b = _operands(site)
    y = site.quantized
    factor_a, factor_b, shift = add_parameters(a.params.scale, b.params.scale, y.scale, a.params.dtype, b.params.dtype)
    attrs: dict[str, Any] = {"a_zero_point": a.params.zero_point, "a_multiplier": factor_a, "b_zero_point": b.params.zero_point, "shift": shift}
    attrs |= {"b_multiplier": -factor_b if site.group.kind == "sub" else factor_b, "zero_point": y.zero_point, **site.bounds(), **typed(y)}
    return site.call("qc.add", [a.expr, b.expr], attrs)


def mul(site: Site) -> Any:
    a, b = _operands(site)
    y = site.quantized
    attrs = {"a_zero_point": a.params.zero_point, "b_zero_point": b.params.zero_point, "zero_point": y.zero_point, **site.bounds(), **typed(y)}
    return site.call("qc.mul", [a.expr, b.expr], {**attrs, "multiplier": float(np.float32(a.params.scale * b.params.scale / y.scale))})


def prelu(site: Site) -> Any:
    x, y = site.inputs[0], site.quantized
    ratio = x.params.scale / y.scale
    negative = np.array(site.group.attrs["slopes"], np.float64) * ratio
    attrs = {"multiplier": float(np.float32(ratio)), "x_zero_point": x.params.zero_point, "zero_point": y.zero_point, **site.bounds()}
    return site.call("qc.prelu", [x.expr, const(negative.astype(np.float32))], attrs)
