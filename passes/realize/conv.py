"""conv2d, conv2d_transpose and dense: everything in int32, one requantization, no other rounding.

    relu(conv2d(dq(x), dq(w)) + b + dq(r)) -> q    -->    qc.conv2d(x, w, bias, multiplier, r)

Real accumulator unit: sx * sw[o]. The bias is stated in it, so that it starts the sum; the multiplier brings it to the output's unit sy
(Jacob et al. 2018, arXiv:1712.05877, eq. 5), or to a 2^shift times finer one when a residual is added before the last rounding. Float
consumers get `acc * sx * sw`. Slopes make the multiplier two rows, the second for what is negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.base.errors import ModelError
from qcompiler.numerics.spec import conv_accumulator_bound, conv_multiplier, residual_parameters
from qcompiler.passes.graph import const
from qcompiler.passes.insert_qdq import INT32, quantized_bias
from qcompiler.passes.realize.site import Site

FLOAT_MAX = float(np.finfo(np.float32).max)


def weighted(site: Site) -> Any:
    """The integer call of a conv2d, conv2d_transpose or dense group.

    Raises ModelError when int32 can't hold the accumulator for every int8 input.
    """
    group, x = site.group, site.inputs[0]
    assert group.weight is not None and group.weight_scale is not None
    try:
        bias = quantized_bias(group.bias, x.params.scale, group.weight_scale)
    except OverflowError as error:
        raise ModelError(f"{group.kind} '{group.id}': {error}; keep this operator in float, or give its weights coarser scales") from error
    bound = conv_accumulator_bound(group.weight, bias, x.params.zero_point)
    if bound > INT32:
        raise ModelError(f"{group.kind} '{group.id}': its accumulator can reach {bound}, beyond int32; keep this operator in float")
    attrs: dict[str, Any] = {**group.attrs, "x_zero_point": x.params.zero_point}
    tensors = [x.expr, const(group.weight), const(bias)]
    if site.output is None:
        limits = {"float_low": group.low, "float_high": group.high} if site.residual is None else {}
        attrs |= {k: float(np.float32(v)) for k, v in limits.items() if v is not None}
        return site.call(
            f"qc.{group.kind}",
            [*tensors, const(conv_multiplier(x.params.scale, group.weight_scale, None, slopes=None if group.bends_sum else group.slopes))],
            {**attrs, "out_dtype": "float32"},
            "float32",
        )
    attrs |= {"zero_point": site.output.zero_point, **site.bounds(), "out_dtype": site.output.dtype}
    if site.residual is None:
        multiplier = conv_multiplier(x.params.scale, group.weight_scale, site.output.scale, slopes=group.slopes)
        return site.call(f"qc.{group.kind}", [*tensors, const(multiplier)], attrs)
    factor, shift = residual_parameters(site.residual.params.scale, site.output.scale, site.residual.params.dtype, site.output.dtype)
    multiplier = conv_multiplier(x.params.scale, group.weight_scale, site.output.scale, shift, group.slopes, group.bends_sum)
    attrs |= {"residual_zero_point": site.residual.params.zero_point, "residual_multiplier": factor, "residual_shift": shift}
    attrs |= {"bends_sum": True} if group.bends_sum else {}
    return site.call(f"qc.{group.kind}", [*tensors, const(multiplier), site.residual.expr], attrs)
