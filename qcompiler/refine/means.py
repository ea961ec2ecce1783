"""Means of a layer's inputs under each kernel tap, and the mean of its output that follows from them.

A convolution is linear, so the mean of its output follows from the means of its inputs alone, one per kernel tap and channel:
E[y][o] = b[o] + sum over taps and channels of w[o, tap, c] * E[x at that tap][c]. The means differ between taps only at the image's border and by stride.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm

from qcompiler.passes.graph import Graph, shape_of
from qcompiler.passes.groups import Group, find_groups
from qcompiler.passes.kinds import KINDS


def reach(size: int, out: int, kernel: int, stride: int, before: int, dilation: int, transposed: bool = False) -> np.ndarray:
    """float32[kernel, size], 1 where a tap meets an input position at some output position, else 0, along one axis of a convolution."""
    tap, position = np.arange(kernel)[:, None] * dilation, np.arange(size)[None, :]
    if transposed:  # output = position * stride + tap - before
        inside = (position * stride + tap >= before) & (position * stride + tap < before + out)
    else:  # position = output * stride + tap - before
        at = position + before - tap
        inside = (at >= 0) & (at < out * stride) & (at % stride == 0)
    return inside.astype(np.float32)


def tap_means(x: np.ndarray, kind: str, attrs: Mapping[str, Any], kernel: tuple[int, int], out: tuple[int, ...]) -> np.ndarray:
    """float64[KH, KW, C]: per tap and input channel the mean, over output positions, of the element that the tap multiplies; 0 in padding.

    x: float32 NHWC (dense: [..., K]). attrs: geometry as in the operator table. out: the operator's output shape.
    """
    if not KINDS[kind].window:
        x = x.reshape(1, -1, 1, x.shape[-1])
        rows, columns = np.ones((1, x.shape[1]), np.float32), np.ones((1, 1), np.float32)
        positions = x.shape[1]
    else:
        rows, columns = (
            reach(x.shape[1 + a], out[1 + a], kernel[a], attrs["strides"][a], attrs["padding"][a], attrs["dilation"][a], KINDS[kind].scatters) for a in (0, 1)
        )
        positions = x.shape[0] * out[1] * out[2]
    w, c = x.shape[2:]
    total = np.zeros((len(rows), len(columns), c))
    for image in np.ascontiguousarray(x, np.float32):  # rows in float32 (exact for int8 values), then columns in float64
        lines = np.stack([image[_progression(row)].reshape(-1, w * c).sum(axis=0) for row in rows]).reshape(len(rows), w, c)
        with np.errstate(invalid="ignore"):  # infinities; calibration refuses their sample by name
            total += columns.astype(np.float64) @ lines.astype(np.float64)
    return total / positions


def _progression(row: np.ndarray) -> slice:
    """The positions of the ones in a row of `reach`, which are equally spaced."""
    ones = np.flatnonzero(row).tolist()
    return slice(ones[0], ones[-1] + 1, ones[1] - ones[0] if len(ones) > 1 else 1) if ones else slice(0, 0)


def pre_activation(weight: np.ndarray, means: np.ndarray, groups: int = 1) -> np.ndarray:
    """float64[S, O]: per sample the sum over taps and channels of weight [O, KH, KW, C/groups] (dense: [N, K]) times `means` [S, KH, KW, C]."""
    samples, kh, kw, channels = means.shape
    outputs = weight.shape[0]
    if groups == outputs == channels:  # as many products of one row each take ten times as long
        taps = means.reshape(samples, kh * kw, channels).astype(np.float64)
        return np.asarray(np.einsum("sto,ot->so", taps, weight.reshape(outputs, -1).astype(np.float64)))
    x = means.reshape(samples, kh * kw, groups, channels // groups).transpose(2, 0, 1, 3).reshape(groups, samples, -1).astype(np.float64)
    w = weight.reshape(groups, outputs // groups, -1).astype(np.float64)
    result: np.ndarray = (x @ w.transpose(0, 2, 1)).transpose(1, 0, 2).reshape(samples, outputs)
    return result


def kernel_size(weight: np.ndarray) -> tuple[int, int]:
    """(KH, KW) of a weight; (1, 1) of a dense layer's."""
    return (int(weight.shape[1]), int(weight.shape[2])) if weight.ndim == 4 else (1, 1)


class FloatMeans:
    """A calibration watcher: of each of the first `limit` samples the input means of every convolution and dense group, and the outputs; these of the first
    `outputs` samples in any case.

    Memory per sample: one float32 per tap and input channel of every such group, and the network's outputs.
    """

    def __init__(self, module: tvm.IRModule, limit: int, outputs: int = 0) -> None:
        groups = find_groups(module)
        self.groups: dict[str, Group] = {g.id: g for g in groups if g.traits.weighted}
        self.limit, self._kept = limit, max(limit, outputs)
        self.outputs: list[dict[str, np.ndarray]] = []
        self._means: dict[str, list[np.ndarray]] = {k: [] for k in self.groups}
        self._residuals: dict[str, list[np.ndarray]] = {k: [] for k, g in self.groups.items() if g.residual}
        self._readers: dict[str, list[tuple[Group, dict[str, list[np.ndarray]], tuple[int, ...] | None]]] = {}
        made_by = {g.id: g for g in groups}
        shapes = {n: shape_of(e) for n, e in Graph.of(module).bindings if hasattr(e.ty, "shape")}
        for group in self.groups.values():
            for value, means in ((group.inputs[0], self._means), (group.residual, self._residuals)):
                if value is not None:
                    source = value
                    while source in made_by and made_by[source].traits.views:  # may be a view, which no step computes
                        source = made_by[source].inputs[0]
                    self._readers.setdefault(source, []).append((group, means, shapes.get(value)))

    def know(self, before: FloatMeans, sources: Mapping[str, str]) -> None:
        """Take what is known of groups that read the same: it is not looked at again. before: of a network that computes the same. sources: value -> the one
        with its numbers there."""
        known = set[str]()
        for name, group in self.groups.items():
            own, (x, residual) = before.groups.get(name), (v and sources.get(v) for v in (group.inputs[0], group.residual))
            same = own is not None and (x, residual) == (own.inputs[0], own.residual) and bool(residual) == bool(group.residual)
            if own is not None and same and (group.kind, group.shape) == (own.kind, own.shape):
                known.add(name)
                self._means[name] = before._means[name][: self.limit]
                if residual:
                    self._residuals[name] = before._residuals[name][: self.limit]
        readers = {value: [r for r in reading if r[0].id not in known] for value, reading in self._readers.items()}
        self._readers = {value: reading for value, reading in readers.items() if reading}
        self.outputs = before.outputs[: self._kept]
        self._kept = len(self.outputs)

    @property
    def wanted(self) -> bool:
        """Is there a group of which means are to be collected?"""
        return bool(self._readers)

    def look(self, sample: int, value_id: str, array: np.ndarray, seen: object) -> list[np.ndarray] | None:
        if sample >= self.limit:
            return None
        found = []
        for group, means, shape in self._readers.get(value_id, ()):
            x = array if shape is None else array.reshape(shape if group.traits.window and means is self._means else (-1, shape[-1]))
            assert group.weight is not None
            if means is self._means:
                found.append(tap_means(x, group.kind, group.attrs, kernel_size(group.weight), group.shape).astype(np.float32))
            else:
                found.append(tap_means(x, "dense", {}, (1, 1), group.shape).astype(np.float32))
        return found

    def take(self, value_id: str, seen: list[np.ndarray]) -> None:
        for (group, means, _), found in zip(self._readers.get(value_id, ()), seen, strict=True):
            means[group.id].append(found)

    def end_sample(self, outputs: Mapping[str, np.ndarray]) -> None:
        if len(self.outputs) < self._kept:
            self.outputs.append({k: np.array(v) for k, v in outputs.items()})

    def state(self) -> dict[str, np.ndarray]:
        kept = {f"means/{k}": v for k, v in self._means.items()} | {f"residual/{k}": v for k, v in self._residuals.items()}
        outputs = {f"output/{name}": np.stack([o[name] for o in self.outputs]) for name in (self.outputs[0] if self.outputs else ())}
        return {k: np.stack(v) for k, v in kept.items() if v} | outputs

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        places = {"means": self._means, "residual": self._residuals}
        self.outputs = []
        for key, array in state.items():
            kind, _, name = key.partition("/")
            if kind in places:
                places[kind][name] = list(array.copy())
                continue
            self.outputs = self.outputs or [{} for _ in array]
            for output, value in zip(self.outputs, array, strict=True):
                output[name] = value.copy()

    def expected(self, group_id: str, count: int, residual: bool) -> np.ndarray:
        """float64[S, O]: the mean pre-activation of a group in each of the first `count` samples, bias and (if asked for) residual included."""
        group = self.groups[group_id]
        assert group.weight is not None
        result = pre_activation(group.weight, np.stack(self._means[group_id][:count]), int(group.attrs.get("groups", 1)))
        if group.bias is not None:
            result = result + group.bias
        if residual:
            result = result + np.stack(self._residuals[group_id][:count]).reshape(len(result), -1)
        return result
