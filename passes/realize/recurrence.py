"""Recurrent layers: docs/numerics.md, section 12.

q(qc.f32.recurrence(dq(p), w, bias, initial state, initial cell, lengths))   -->   qc.recurrence(p, int8 w, bias, multiplier, tables, ...)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.numerics.recurrence import recurrence_parameters, table
from qcompiler.passes.graph import const
from qcompiler.passes.realize.site import Site

KEPT = ("cell", "reverse", "linear_before_reset", "sequence", "finals")


def recurrence(site: Site) -> Any:
    group, attrs = site.group, site.group.attrs
    assert group.weight is not None and group.bias is not None
    wide = bool(attrs["wide"]) or (site.output is not None and site.output.dtype == "int16")  # what hands on all bits of the states goes on with them
    weight, bias, multiplier, made = recurrence_parameters(group.weight, group.bias, site.inputs[0].params.scale, attrs.get("clip"), site.output, wide)
    functions = zip(attrs["activations"], attrs["alpha"], attrs["beta"], strict=True)
    tables = np.stack([table(*f) for f in functions])
    computed = iter(site.plain)
    rest = [const(v) if isinstance(v, np.ndarray) else next(computed) for v in attrs["rest"]]
    operands = [site.inputs[0].expr, *(const(a) for a in (weight, bias, multiplier, tables)), *rest]
    return site.call("qc.recurrence", operands, {**{k: attrs[k] for k in KEPT}, **made}, made["out_dtype"])
