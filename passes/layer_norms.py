"""Layer normalizations with other scales and offsets: how channel equalization (`qcompiler/refine/equalization.py`) changes what matrix products read.

    layer_norm(x, gamma, beta)      -->      layer_norm(x, gamma', beta')

Works on the canonical float module. `replace_weights` does the rewrite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm

from qcompiler.passes.graph import Graph, const_value, dtype_of, is_const, plain, relax_op, shape_of

LAYER_NORM = "relax.nn.layer_norm"


def layer_norms(module: tvm.IRModule) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{value id: (gamma, beta)}, both float32[C], of every float32 normalization over the last axis alone whose parameters are constants."""
    return {name: found for name, expr in Graph.of(module).bindings if (found := _affine(expr)) is not None}


def _affine(expr: Any) -> tuple[np.ndarray, np.ndarray] | None:
    if relax_op(expr) != LAYER_NORM or dtype_of(expr) != "float32" or not all(map(is_const, expr.args[1:])):
        return None
    shape, a = shape_of(expr), expr.attrs
    if [axis % len(shape) for axis in plain(a.axes)] != [len(shape) - 1] or not (a.center and a.scale):
        return None
    gamma, beta = map(const_value, expr.args[1:])
    return gamma, beta
