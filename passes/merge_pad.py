"""Merges padding with zeros into the operator behind it.

    conv(pad(x, 0), w, padding=p)                                   -->  conv(x, w, padding=p + pad)
    avg_pool(pad(x, 0))                                             -->  avg_pool(x, padding, count_include_pad)
    max_pool(pad(x, 0)), x >= 0, no window inside the padding       -->  max_pool(x, padding)

Each reader merges on its own; the pad goes when nobody reads it any more. Works on ONNX's layout. Follows fold_batch_norm.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from qcompiler.passes.graph import plain, relax_op
from qcompiler.passes.rewrite import Rewrite
from qcompiler.passes.unary import clamp

_CONVOLUTIONS = {"relax.nn.conv1d": relax.op.nn.conv1d, "relax.nn.conv2d": relax.op.nn.conv2d, "relax.nn.conv3d": relax.op.nn.conv3d}
_NOT_NEGATIVE = ("relax.nn.relu", "relax.sigmoid", "relax.abs", "relax.exp", "relax.nn.softmax", "relax.square")
_KEEPS_SIGN = ("relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.mean", "relax.reshape", "relax.permute_dims", "relax.strided_slice")


def merge_pad(module: tvm.IRModule) -> tvm.IRModule:
    rewrite = Rewrite(module)
    for name, expr in rewrite:
        merged = _merged(rewrite, expr)
        rewrite.keep(name, expr if merged is None else merged)
    return rewrite.done()


def _merged(rewrite: Rewrite, expr: Any) -> Any:
    op = str(relax_op(expr))
    pool = op.startswith("relax.nn.") and "_pool" in op
    if op not in _CONVOLUTIONS and not pool:
        return None
    pad = rewrite.value(expr.args[0])
    if relax_op(pad) != "relax.nn.pad" or str(pad.attrs.pad_mode) != "constant" or float(pad.attrs.pad_value) != 0.0:
        return None
    x, widths = pad.args[0], plain(pad.attrs.pad_width)
    if any(widths[:4]):  # batch or channels
        return None
    before, after, a = widths[4::2], widths[5::2], expr.attrs
    padding, rank = plain(a.padding), len(before)
    if op in _CONVOLUTIONS:
        total = [p + q for p, q in zip(padding, [*before, *after], strict=True)]
        return _CONVOLUTIONS[op](
            x, expr.args[1], strides=plain(a.strides), padding=total, dilation=plain(a.dilation), groups=int(a.groups),
            data_layout=str(a.data_layout), kernel_layout=str(a.kernel_layout),
        )  # fmt: skip
    if any(padding) or bool(a.ceil_mode):
        return None
    kernel, dilation = plain(a.pool_size), plain(a.dilation)
    if "avg" in op:
        include = True
    elif "max" in op and all(w < k for w, k in zip([*before, *after], kernel * 2, strict=True)) and set(dilation) == {1} and not_negative(rewrite, x):
        include = False
    else:
        return None
    make = getattr(relax.op.nn, op.rsplit(".", 1)[-1])
    return make(x, kernel, plain(a.strides), [*before, *after], dilation, False, include, layout=("NCW", "NCHW", "NCDHW")[rank - 1])


def not_negative(rewrite: Rewrite, x: Any) -> bool:
    """Is every element of `x` known to be at least 0?"""
    expr = rewrite.value(x)
    op = relax_op(expr)
    if op in _NOT_NEGATIVE:
        return True
    if op in _KEEPS_SIGN:
        return not_negative(rewrite, expr.args[0])
    if op == "relax.concat":
        return all(not_negative(rewrite, f) for f in expr.args[0].fields)
    bounds = clamp(expr) if op is not None else None
    return bounds is not None and bounds[1] is not None and bounds[1] >= 0
