"""Bias correction: quantization shifts the mean of every channel a little; the int32 bias takes the shift back, layer after layer.

    bias[o] += rint(steady(E[float pre-activation][o] - E[int8 pre-activation][o]) / unit[o])

where E is the mean over one sample, and `steady` the part that all samples share (Nagel et al. 2019, arXiv:1906.04721, section 4.2, in its
sequential, data-driven form). A convolution is linear, so the mean of its output follows from the means of its inputs alone, one per kernel
tap and channel: E[y][o] = b[o] + sum over taps and channels of w[o, tap, c] * E[x at that tap][c]. The means differ between taps only at the
image's border and by stride. All samples advance through the integer network side by side, so that each layer is corrected knowing the
corrections before it; float and integer means are over the same samples, so that sampling noise cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import tvm

from qcompiler.base.errors import DataError
from qcompiler.base.progress import Progress
from qcompiler.numerics.spec import conv_accumulator_bound
from qcompiler.passes.graph import Graph, GraphBuilder, arguments, const, const_value, dtype_of, is_const, make_op, match_op, relax_op, shape_of, substitute
from qcompiler.passes.groups import Group, find_groups
from qcompiler.passes.kinds import KINDS
from qcompiler.passes.realize import ACCUMULATED

MEMORY = 512 << 20  # bytes that the samples' contexts may take together
_INT32 = 2**31 - 1
_LAYERS = {kind.operator for kind in KINDS.values() if kind.weighted}


# -- means of a tensor under each kernel tap ------------------------------------------------------------------------------------------------


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
    x = means.reshape(samples, kh * kw, groups, channels // groups).transpose(2, 0, 1, 3).reshape(groups, samples, -1).astype(np.float64)
    w = weight.reshape(groups, outputs // groups, -1).astype(np.float64)
    result: np.ndarray = (x @ w.transpose(0, 2, 1)).transpose(1, 0, 2).reshape(samples, outputs)
    return result


def _kernel(weight: np.ndarray) -> tuple[int, int]:
    return (int(weight.shape[1]), int(weight.shape[2])) if weight.ndim == 4 else (1, 1)


# -- the float side: collected while calibrating --------------------------------------------------------------------------------------------


class FloatMeans:
    """A calibration watcher: of each of the first `limit` samples the input means of every convolution and dense group, and the outputs.

    Memory per sample: one float32 per tap and input channel of every such group, and the network's outputs.
    """

    def __init__(self, module: tvm.IRModule, limit: int) -> None:
        groups = find_groups(module)
        self.groups: dict[str, Group] = {g.id: g for g in groups if g.traits.weighted}
        self.limit = limit
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

    def visit(self, value_id: str, array: np.ndarray) -> None:
        if len(self.outputs) >= self.limit:
            return
        for group, means, shape in self._readers.get(value_id, ()):
            x = array if shape is None else array.reshape(shape)
            assert group.weight is not None
            if means is self._means:
                found = tap_means(x, group.kind, group.attrs, _kernel(group.weight), group.shape)
            else:
                found = tap_means(x, "dense", {}, (1, 1), group.shape)
            means[group.id].append(found.astype(np.float32))

    def end_sample(self, outputs: Mapping[str, np.ndarray]) -> None:
        if len(self.outputs) < self.limit:
            self.outputs.append({k: np.array(v) for k, v in outputs.items()})

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


# -- the integer side -----------------------------------------------------------------------------------------------------------------------


class Context(Protocol):
    """One sample on its way through the integer network."""

    def run(self, begin: int, end: int) -> None: ...
    def view(self, value_id: str) -> np.ndarray: ...
    def outputs(self) -> dict[str, np.ndarray]: ...


class IntegerExecutor(Protocol):
    """steps: the value id that each step writes, in order. context_bytes: memory of one context.

    `view` of a context is a value in canonical int8, valid when the step that reads it is next. `set_bias` and `set_weight` act on all contexts.
    """

    @property
    def steps(self) -> Sequence[str]: ...
    @property
    def context_bytes(self) -> int: ...
    def new_context(self, inputs: Mapping[str, np.ndarray]) -> Context: ...
    def set_bias(self, value_id: str, bias: np.ndarray) -> None: ...
    def set_weight(self, value_id: str, weight: np.ndarray) -> None: ...


class SessionExecutor:
    """A `Session` on the library that was built from `program`: biases are packed again into the program's constants, code stays as it
    is."""

    def __init__(self, session: Any, program: Any) -> None:
        self.steps = [str(step["id"]) for step in session.manifest["steps"]]
        self.context_bytes = int(session.manifest["workspace"])
        self._session, self._program = session, program

    def new_context(self, inputs: Mapping[str, np.ndarray]) -> Context:
        context: Context = self._session.new_context(inputs)
        return context

    def set_bias(self, value_id: str, bias: np.ndarray) -> None:
        self._replace(value_id, 2, bias)

    def set_weight(self, value_id: str, weight: np.ndarray) -> None:
        self._replace(value_id, 1, weight)

    def _replace(self, value_id: str, operand: int, array: np.ndarray) -> None:
        self._program.replace_operand(value_id, operand, array)
        self._session.set_constants(self._program.constants)


@dataclass
class Layer:
    """A convolution or dense call of the integer module. unit: real value of one accumulator step, float64[O].

    group: of the float module, to which it belongs; the call "<id>~accumulated" is the part of one before a float activation.
    residual: (value id, zero point, real value of one step), where the call has one. x_scale: real value of one step of the input.
    is_last: no other layer is behind it.
    """

    id: str
    group: str
    kind: str
    x: str
    x_scale: float
    weight: np.ndarray
    bias: np.ndarray
    unit: np.ndarray
    attrs: dict[str, Any]
    shape: tuple[int, ...]
    is_last: bool
    residual: tuple[str, int, float] | None = None


def integer_layers(module: tvm.IRModule) -> list[Layer]:
    """The calls of an integer module that have a bias, in order, with the real meaning of their numbers."""
    graph = Graph.of(module)
    scales: dict[str, Any] = graph.attrs.get("qc.params", {})
    fronts = _before_layers(graph)
    layers = []
    for name, expr in graph.bindings:
        op = match_op(expr)
        if op is None or op[0] not in _LAYERS:
            continue
        kind, tensors, attrs = op[0].removeprefix("qc."), op[1], op[2]
        weight, bias, multiplier = (const_value(t) for t in tensors[1:4])
        step = 1.0 if attrs.get("out_dtype") == "float32" else float(scales[name][0])
        residual = None
        if len(tensors) > 4:
            step /= 2.0 ** attrs["residual_shift"]
            residual = (str(tensors[4].name), int(attrs["residual_zero_point"]), attrs["residual_multiplier"] * step)
        unit = multiplier.astype(np.float64) * step
        x = str(tensors[0].name)
        source, what = graph.naming.split(name)
        group = source if what == ACCUMULATED else name
        layers.append(Layer(name, group, kind, x, float(scales[x][0]), weight, bias, unit, attrs, shape_of(expr), name not in fronts, residual))
    return layers


def _before_layers(graph: Graph) -> set[str]:
    """The values that some convolution or matrix product is computed from."""
    found: set[str] = set()
    for name, expr in reversed(graph.bindings):
        op = match_op(expr)
        called = op[0] if op else relax_op(expr) or ""
        if name in found or any(kind in called for kind in ("conv", "dense", "matmul")):
            found |= {str(getattr(v, "tuple_value", v).name) for v in arguments(expr) if not is_const(v)}
    return found


@dataclass
class Correction:
    """What correction did. before, after: mean SQNR of the network's outputs in dB, over `samples` samples, without and with it.

    kept: whether the corrected biases (int32[O] by value id) are in force. shift: value id -> the largest correction in output steps, and
    skipped: value id -> why a layer was left alone. weights: int8 by value id, of layers that a rounder rounded anew; `before` and `after` are then over
    `held_out` samples that neither weights nor biases were fitted to.
    """

    samples: int
    before: float = math.nan
    after: float = math.nan
    kept: bool = False
    biases: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    held_out: int = 0

    def operands(self) -> list[tuple[int, dict[str, np.ndarray]]]:
        """(operand index, arrays by value id) of everything that changed."""
        return [(1, self.weights), (2, self.biases)]

    def summary(self) -> str:
        """One line for people."""
        verdict = "kept" if self.kept else "dropped"
        what = f"weight rounding of {len(self.weights)} layers" if self.weights else f"bias correction of {len(self.biases)} layers"
        judged = f", judged on {self.held_out} others" if self.held_out else ""
        return f"{what} on {self.samples} samples{judged}: {self.before:.2f} dB -> {self.after:.2f} dB, {verdict}"


class Rounder(Protocol):
    """Chooses int8 weights (`rounding.py`), layer by layer in order of execution, when all samples are about to run the layer: new weights like
    `layer.weight`, or why they stay. Biases are corrected on the samples `fitted`; `judges` are others."""

    def weight(self, layer: Layer, group: Group, fitted: Sequence[Context], judges: Sequence[Context]) -> np.ndarray | str: ...


def correct(
    module: tvm.IRModule,
    executor: IntegerExecutor,
    means: FloatMeans,
    samples: Iterable[Mapping[str, np.ndarray]],
    memory: int = MEMORY,
    rounder: Rounder | None = None,
    progress: Progress | None = None,
) -> Correction:
    """Correct the biases of `executor`'s network; the better of the two networks, judged by the SQNR of its outputs, stays in force.

    module: the integer module that the executor runs; `with_operands` writes the result back into it. means: collected from the first of
    these `samples`, in the same order. Contexts of all samples live together and take at most `memory` bytes (one is always allowed).
    With a `rounder`, weights change too, each before its layer's bias; the last third of the samples then only judges.
    Raises DataError when there are no samples.
    """
    count = max(1, min(len(means.outputs), memory // max(executor.context_bytes, 1)))
    taken = [sample for sample, _ in zip(samples, range(count), strict=False)]
    if not taken or not means.outputs:
        raise DataError("bias correction needs at least one calibration sample")
    everyone = [executor.new_context(sample) for sample in taken]
    fitted = len(taken) - len(taken) // 3 if rounder else len(taken)
    contexts, judge = everyone[:fitted], (everyone[fitted:] or everyone, means.outputs[fitted if len(taken) > fitted else 0 :])
    result = Correction(fitted, held_out=len(taken) - fitted)
    steps = list(executor.steps)
    for context in judge[0]:
        context.run(0, len(steps))
    result.before = _score(*judge)
    layers = [layer for layer in integer_layers(module) if layer.id in steps and layer.group in means.groups]
    originals = {layer.id: layer.weight for layer in layers}
    done = 0
    walking = everyone if rounder else contexts
    for number, layer in enumerate(layers):
        at = steps.index(layer.id)
        for context in walking:
            context.run(done, at)
        done = at
        weight: np.ndarray | str = layer.weight
        if rounder:
            weight = rounder.weight(layer, means.groups[layer.group], contexts, judge[0])
        if isinstance(weight, str):
            result.skipped[layer.id] = weight
        elif (weight != layer.weight).any():
            layer.weight = weight
        bias = _corrected(layer, originals[layer.id], contexts, means)
        if isinstance(bias, str):
            result.skipped[layer.id] = bias
            layer.weight = originals[layer.id]
            continue
        if layer.weight is not originals[layer.id]:
            result.weights[layer.id] = layer.weight
            executor.set_weight(layer.id, layer.weight)
        if (bias != layer.bias).any():
            result.biases[layer.id] = bias
            executor.set_bias(layer.id, bias)
        if progress is not None:
            progress("round weights" if rounder else "correct biases", number + 1, len(layers))
    for context in walking:
        context.run(done, len(steps))
    result.after = _score(*judge)
    result.kept = result.after > result.before
    if not result.kept:
        for layer in layers:
            if layer.id in result.biases:
                executor.set_bias(layer.id, layer.bias)
            if layer.id in result.weights:
                executor.set_weight(layer.id, originals[layer.id])
    return result


def _corrected(layer: Layer, before: np.ndarray, contexts: Sequence[Context], means: FloatMeans) -> np.ndarray | str:
    """The layer's new bias, or why it keeps its own. Its inputs must be there and its step be next. before: the weights that its bias is for;
    new ones first keep the mean that those gave."""
    zero = layer.attrs["x_zero_point"]
    kernel, shape = _kernel(layer.weight), layer.shape
    taps = [tap_means(c.view(layer.x).astype(np.float32) - zero, layer.kind, layer.attrs, kernel, shape) for c in contexts]
    groups, start = int(layer.attrs.get("groups", 1)), layer.bias.astype(np.float64)
    if before is not layer.weight:
        start = start + np.rint(pre_activation(before.astype(np.float32) - layer.weight, np.stack(taps), groups).mean(axis=0))
    actual = (start + pre_activation(layer.weight, np.stack(taps), groups)) * layer.unit
    if layer.residual is not None:
        source, zero, step = layer.residual
        values = [tap_means(c.view(source).astype(np.float32) - zero, "dense", {}, (1, 1), shape) for c in contexts]
        actual = actual + np.stack(values).reshape(actual.shape) * step
    wanted = means.expected(layer.group, len(contexts), layer.residual is not None)
    shift = wanted - actual
    bias = start + np.rint((shift.mean(axis=0) if layer.is_last else steady(shift)) / layer.unit)
    if not (np.abs(bias) <= _INT32).all():
        return "a corrected bias leaves int32"
    corrected: np.ndarray = bias.astype(np.int32)
    if conv_accumulator_bound(layer.weight, corrected, layer.attrs["x_zero_point"]) > _INT32:
        return "with a corrected bias the accumulator could leave int32"
    return corrected


def steady(shift: np.ndarray) -> np.ndarray:
    """float64[O]: the part of `shift` [S, O] that all samples have in common, mean * mean^2 / (mean^2 + variance over samples).

    A shift that changes from sample to sample comes from clipping and from what earlier layers did to single images. Undoing its mean moves
    all the other samples away from where an activation bends: with full means ResNet-50's output falls from 27.7 to 23.0 dB, with this it rises to 30.2.
    """
    mean, variance = shift.mean(axis=0), shift.var(axis=0)
    result: np.ndarray = mean * np.square(mean) / np.maximum(np.square(mean) + variance, np.finfo(np.float64).tiny)
    return result


def _score(contexts: Sequence[Context], outputs: Sequence[Mapping[str, np.ndarray]]) -> float:
    """Mean over the network's float outputs of 10 log10(sum reference^2 / sum error^2), in dB."""
    power: dict[str, float] = {}
    noise: dict[str, float] = {}
    for context, wanted in zip(contexts, outputs, strict=False):
        for name, actual in context.outputs().items():
            if wanted[name].dtype == np.float32:
                reference = wanted[name].astype(np.float64)
                power[name] = power.get(name, 0.0) + float(np.square(reference).sum())
                noise[name] = noise.get(name, 0.0) + float(np.square(actual - reference).sum())
    tiny = np.finfo(np.float64).tiny
    return float(np.mean([10 * (math.log10(max(power[k], tiny)) - math.log10(max(noise[k], tiny))) for k in power])) if power else 0.0


def with_operands(module: tvm.IRModule, correction: Correction) -> tvm.IRModule:
    """The integer module with the corrected weights and biases in the calls they belong to; everything else stays."""
    graph = Graph.of(module)
    builder = GraphBuilder(graph.attrs)
    env = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    for name, expr in graph.bindings:
        changed = {i: arrays[name] for i, arrays in correction.operands() if name in arrays}
        op = match_op(expr) if changed else None
        if op is not None:
            tensors = [const(changed[i]) if i in changed else t for i, t in enumerate(op[1])]
            expr = make_op(op[0], tensors, op[2], shape_of(expr), dtype_of(expr))
        env[name] = builder.emit(name, substitute(expr, lambda v: env[str(v.name)]))
    return builder.finish([(name, env[str(v.name)]) for name, v in graph.outputs])


def with_biases(module: tvm.IRModule, biases: Mapping[str, np.ndarray]) -> tvm.IRModule:
    """`with_operands` for biases alone (int32[O] by value id)."""
    return with_operands(module, Correction(0, biases=dict(biases)))
