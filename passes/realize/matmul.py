"""matmul of two computed tensors: `qc.matmul`, accumulator unit sa * sb. `insert_qdq` has checked that K * 255^2 fits int32."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.passes.realize.site import Site


def matmul(site: Site) -> Any:
    """Float consumers get `acc * sa * sb`; a clamp in front of them is left to float operators."""
    a, b = (t.params for t in site.inputs)
    tensors = [t.expr for t in site.inputs]
    attrs: dict[str, Any] = {"a_zero_point": a.zero_point, "b_zero_point": b.zero_point}
    if site.output is None:
        attrs |= {"multiplier": float(np.float32(a.scale * b.scale)), "zero_point": 0, "low": -128, "high": 127, "out_dtype": "float32"}
        return site.call("qc.matmul", tensors, attrs, "float32")
    attrs |= {
        "multiplier": float(np.float32(a.scale * b.scale / site.output.scale)),
        "zero_point": site.output.zero_point,
        **site.bounds(),
        "out_dtype": site.output.dtype,
    }
    return site.call("qc.matmul", tensors, attrs)
