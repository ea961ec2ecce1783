"""Transposed convolutions in the only form TVM can legalize: NCHW, undilated.

    conv2d_transpose(x, w) {NHWC, IHWO}   -->   permute_dims(conv2d_transpose(permute_dims(x), permute_dims(w)) {NCHW, IOHW})

For what stays float and has no kernel of ours (weights that are computed, or layers that a quantized file keeps as they are); follows `select_float`,
and `fuse_edges`. A dilated kernel is spread out with zeros, which is the same operator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.graph import Graph, GraphBuilder, const, const_value, is_const, plain, rebuilt, relax_op


def legal_layouts(module: tvm.IRModule) -> tvm.IRModule:
    """The same module with transposed convolutions in NCHW; the module itself when it has none."""
    graph = Graph.of(module)
    found = [name for name, expr in graph.bindings if _applies(expr)]
    return rebuilt(graph, found, lambda builder, name, expr, _: _rewritten(builder, name, expr)) if found else module


def _applies(expr: Any) -> bool:
    return relax_op(expr) == "relax.nn.conv2d_transpose" and str(expr.attrs.data_layout) == "NHWC" and str(expr.attrs.kernel_layout) == "IHWO"


def _rewritten(builder: GraphBuilder, name: str, expr: Any) -> Any:
    (x, weight), attrs = expr.args, expr.attrs
    dilation = plain(attrs.dilation)
    if is_const(weight):
        value = const_value(weight).transpose(0, 3, 1, 2)
        spread = np.zeros((*value.shape[:2], *[(k - 1) * d + 1 for k, d in zip(value.shape[2:], dilation, strict=True)]), value.dtype)
        spread[:, :, :: dilation[0], :: dilation[1]] = value
        weight, dilation = const(spread), [1, 1]
    else:
        weight = builder.emit(builder.made(name, "weight"), relax.op.permute_dims(weight, [0, 3, 1, 2]))
    image = builder.emit(builder.made(name, "nchw"), relax.op.permute_dims(x, [0, 3, 1, 2]))
    geometry = {k: plain(getattr(attrs, k)) for k in ("strides", "padding", "output_padding", "groups")}
    result = builder.emit(builder.made(name, "transposed"), relax.op.nn.conv2d_transpose(image, weight, dilation=dilation, **geometry))
    return builder.emit(name, relax.op.permute_dims(result, [0, 2, 3, 1]))
