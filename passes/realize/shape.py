"""Data movement: bytes move, numbers stay. Operands under other parameters than the output's pass through a table first.

q(concat(dq(a), dq(b)))   -->   qc.concat(a, qc.lut(b))
q(reshape(dq(x)))         -->   qc.reshape(x)                also transpose, slice, pad, select
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.passes.realize.site import Site


def move(site: Site) -> Any:
    attrs = dict(site.group.attrs)
    if site.group.traits.pads:
        attrs["value"] = int(site.quantized.quantize(np.array(attrs["value"])))
    return site.call(f"qc.{site.group.kind}", [site.requantized(x, site.quantized).expr for x in site.inputs], attrs)
