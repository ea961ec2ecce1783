"""Pooling and means.

q(max_pool2d(dq(x)))             -->   qc.max_pool2d(x)            (monotone: no arithmetic; other output parameters cost a table first)
q(avg_pool2d(dq(x))), q(mean(..))  -->   qc.avg_pool2d / qc.mean     sums of centred integers, then one requantization by (sx / sy) / count
"""

from __future__ import annotations

from typing import Any

from qcompiler.passes.realize.site import Site, typed


def max_pool2d(site: Site) -> Any:
    return site.call("qc.max_pool2d", [site.requantized(site.inputs[0], site.quantized).expr], dict(site.group.attrs))


def average(site: Site) -> Any:
    """avg_pool2d and mean; `ratio` is a float64, the kernel divides it by its count before rounding to float32."""
    x, y = site.inputs[0].params, site.quantized
    attrs = {**site.group.attrs, "x_zero_point": x.zero_point, "ratio": x.scale / y.scale, "zero_point": y.zero_point, **site.bounds(), **typed(y)}
    return site.call(f"qc.{site.group.kind}", [site.inputs[0].expr], attrs)
