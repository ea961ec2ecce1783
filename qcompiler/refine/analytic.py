"""Analytic bias correction: what rounding the weights does to a layer's mean, from the float network's means alone.

    bias[o] += sum over taps and channels of (w[o, tap, c] - w8[o, tap, c]) * E[x[c]] * covered[tap]

where covered is the fraction of output positions at which the tap meets the image (Nagel et al. 2019, arXiv:1906.04721, section 4.2, with measured
means in the place of those that batch normalization implies). The int8 network need not run. What activations lose is not seen here; the
sequential correction (`correction.py`) sees it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm

from qcompiler.calibration.table import CalibrationTable
from qcompiler.passes.graph import Graph, shape_of
from qcompiler.passes.groups import Group, find_groups
from qcompiler.plan.quant_plan import QuantPlan
from qcompiler.refine.means import pre_activation, reach


def mean_of_rounding(module: tvm.IRModule, plan: QuantPlan, table: CalibrationTable) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{group id: (its float32 weight, corrected bias float64[O])} of every 8-bit convolution and dense group whose input has statistics."""
    shapes, corrected = shapes_of(module), {}
    for group in find_groups(module):
        if not group.traits.gathers or group.id not in plan.scales or group.weight is None:
            continue
        rounded, scale = plan.weight(group.id)
        bias = bias_for(group, rounded * scale.reshape(-1, *[1] * (group.weight.ndim - 1)), table, shapes)
        if bias is not None:
            corrected[group.id] = group.weight, bias
    return corrected


def shift_of_rounding(module: tvm.IRModule, plan: QuantPlan, table: CalibrationTable) -> dict[str, np.ndarray]:
    """{group id: float64[O]}: what `mean_of_rounding` adds to biases."""
    stated = {g.id: g.bias for g in find_groups(module)}
    return {name: bias if (b := stated[name]) is None else bias - b for name, (_, bias) in mean_of_rounding(module, plan, table).items()}


def shapes_of(module: tvm.IRModule) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a canonical float module, by value id."""
    graph = Graph.of(module)
    return {str(p.name): shape_of(p) for p in graph.inputs} | {n: shape_of(e) for n, e in graph.bindings if hasattr(e.ty, "shape")}


def bias_for(group: Group, weight: np.ndarray, table: CalibrationTable, shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray | None:
    """float64[O]: the bias with which a convolution or dense group keeps its mean when `weight` takes the place of its own; None where the
    statistics of its input don't say."""
    assert group.weight is not None
    x = group.inputs[0]
    if not group.traits.gathers or x not in table.values:
        return None
    mean = table.values[x].channel_mean
    if len(mean) != shapes[x][-1]:
        return None
    covered = _coverage(group, shapes[x])
    shift = pre_activation(group.weight - weight, (covered[:, :, None] * mean)[None], int(group.attrs.get("groups", 1)))[0]
    bias: np.ndarray = shift + (0.0 if group.bias is None else group.bias)
    return bias


def _coverage(group: Group, shape: tuple[int, ...]) -> np.ndarray:
    """float64[KH, KW]: per tap, the fraction of output positions at which it lies inside the image."""
    if not group.traits.window:
        return np.ones((1, 1))
    assert group.weight is not None
    rows, columns = (
        reach(
            shape[1 + a], group.shape[1 + a], group.weight.shape[1 + a], group.attrs["strides"][a], group.attrs["padding"][a], group.attrs["dilation"][a]
        ).sum(axis=1, dtype=np.float64)
        / group.shape[1 + a]
        for a in (0, 1)
    )
    return np.outer(rows, columns)
