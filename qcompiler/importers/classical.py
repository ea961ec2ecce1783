"""Operators of ai.onnx.ml between the layers of a network, as exporters of scikit-learn write them: features made ready, classes looked up.

Trees, support vectors, text and maps are no tensor arithmetic: they are refused, and the network is cut before them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from qcompiler.importers.nodes import Node, Refused, Value
from qcompiler.passes.graph import const

DOMAIN = "ai.onnx.ml"


def _count(node: Node) -> int:
    """Features of operand 0, which lie along its last axis."""
    if not node.shape():
        raise Refused("its operand is a number; supported: tensors whose last axis holds features")
    return node.shape()[-1]


def _features(node: Node) -> Any:
    """Operand 0 in float32, which these operators compute in whatever they are given."""
    return node.tensor(0) if node.dtype() == "float32" else node.emit("features", relax.op.astype(node.tensor(0), "float32"))


def _along(node: Node, name: str, default: float) -> Any:
    """Numbers of an attribute, one for all features or one for each."""
    given, count = np.asarray(node.attrs.get(name, [default]), np.float32), _count(node)
    if given.size not in (1, count):
        raise Refused(f"its {name} holds {given.size} numbers, for {count} features")
    return const(given.reshape(()) if given.size == 1 else given)


def scaler(node: Node) -> list[Value]:
    """`(x - offset) * scale`."""
    moved = node.emit("moved", relax.op.subtract(_features(node), _along(node, "offset", 0.0)))
    return [relax.op.multiply(moved, _along(node, "scale", 1.0))]


def imputer(node: Node) -> list[Value]:
    """Another number where one is missing: where `x` is NaN, or `replaced_value_float`."""
    if node.dtype() != "float32":
        raise Refused(f"it replaces numbers of {node.dtype()}; supported: floats")
    if "imputed_value_floats" not in node.attrs:
        raise Refused("it has no imputed_value_floats, which stand in for missing numbers")
    missing, x = float(node.attrs.get("replaced_value_float", 0.0)), node.tensor(0)
    found = node.emit("missing", relax.op.isnan(x) if np.isnan(missing) else relax.op.equal(x, const(np.float32(missing))))
    return [relax.op.where(found, _along(node, "imputed_value_floats", 0.0), x)]


def binarizer(node: Node) -> list[Value]:
    """1 above the threshold, else 0."""
    above = node.emit("above", relax.op.greater(_features(node), const(np.float32(node.attrs.get("threshold", 0.0)))))
    return [relax.op.astype(above, node.dtype())]


def normalizer(node: Node) -> list[Value]:
    """Rows over their norm; rows of zeros stay."""
    kind = node.text("norm", "MAX")
    if kind not in ("L1", "L2"):
        raise Refused(f"its norm is {kind}; supported: L1 and L2")
    x, last = _features(node), len(node.shape()) - 1
    power = node.emit("power", relax.op.abs(x) if kind == "L1" else relax.op.multiply(x, x))
    norm = node.emit("sum", relax.op.sum(power, [last], True))
    norm = norm if kind == "L1" else node.emit("norm", relax.op.sqrt(norm))
    return [relax.op.divide(x, node.emit("divisor", relax.op.where(node.emit("none", relax.op.equal(norm, const(np.float32(0)))), const(np.float32(1)), norm)))]


def array_feature_extractor(node: Node) -> list[Value]:
    """The columns of operand 0 that operand 1 lists; a vector is one row."""
    x, shape, count, listed = node.tensor(0), node.shape(), _count(node), node.present(1)
    if isinstance(listed, np.ndarray) and (outside := listed[(listed < 0) | (listed >= count)]).size:
        raise Refused(f"it takes column {outside[0]} of {count}; columns are counted from 0")
    places = node.emit("places", relax.op.reshape(node.tensor(1), (int(np.prod(node.shape(1))),)))
    if len(shape) == 1:
        x, shape = node.emit("row", relax.op.reshape(x, (1, *shape))), (1, *shape)
    return [relax.op.take(x, places, axis=len(shape) - 1, mode="clip")]


def linear_regressor(node: Node) -> list[Value]:
    """`x @ coefficients' + intercepts`; a vector is one row."""
    x, targets, features = _features(node), int(node.attrs.get("targets", 1)), _count(node)
    weights, shift = (np.asarray(node.attrs.get(name, []), np.float32) for name in ("coefficients", "intercepts"))
    after = node.text("post_transform", "NONE")
    if after != "NONE":
        raise Refused(f"its post_transform is {after}; supported: NONE")
    if weights.size != targets * features or shift.size not in (0, targets):
        raise Refused(f"it has {weights.size} coefficients and {shift.size} intercepts, for {targets} targets of {features} features")
    if len(node.shape()) == 1:
        x = node.emit("row", relax.op.reshape(x, (1, features)))
    product = relax.op.matmul(x, const(np.ascontiguousarray(weights.reshape(targets, features).T)))
    return [relax.op.add(node.emit("product", product), const(shift)) if shift.size else product]


CLASSICAL = {
    "ArrayFeatureExtractor": array_feature_extractor,
    "Binarizer": binarizer,
    "Imputer": imputer,
    "LinearRegressor": linear_regressor,
    "Normalizer": normalizer,
    "Scaler": scaler,
}
