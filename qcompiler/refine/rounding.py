"""Weight rounding: each weight goes up or down so that the layer's output, on calibration data, moves least.

Rounding to the nearest int8 minimises the error of single weights. What counts is the error of their sum with the layer's inputs,

    sum over positions of ((t - q) x)^2 = positions * (t - q) H (t - q)^T,    t: float weights in int8 steps, q: int8 weights,
                                                                             x: the int8 network's own inputs, H = E[x x^T]

(Nagel et al. 2020, arXiv:2004.10568). It is minimised column by column as in GPTQ (Frantar et al. 2022, arXiv:2210.17323): with H = T T^T,
T upper triangular,

    q[j] = rint(t[j] + sum over i < j of (t[i] - q[i]) T[i, j] / T[j, j])

and then by a sweep of coordinate descent, which can only lower the error:

    q[j] = rint(t[j] + sum over i != j of (t[i] - q[i]) H[i, j] / H[j, j])

with H about the origin and about the mean as two candidates: biases are corrected afterwards, but not wholly. Which one an output channel takes, or whether it
keeps its weights, is decided by its clamped result on samples that none was fitted to.

Weights fitted to what the float layer makes of the float network's inputs (asymmetric calibration) have less error layer by layer, and more at the
output: least squares shrinks what is noisy, and 53 layers that shrink add up (MobileNetV2: 23.8 dB before, 21.0 dB after).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.base.parallel import cores, in_order
from qcompiler.numerics.spec import WEIGHT_HIGH
from qcompiler.passes.groups import Group
from qcompiler.passes.kinds import KINDS
from qcompiler.refine.integer_layers import IntegerLayer
from qcompiler.refine.means import kernel_size
from qcompiler.refine.trial import Context, Result

DAMPING = 0.05  # of H's mean diagonal, added to its diagonal: keeps what the data does not determine near the float weights
SWEEPS = 1  # of coordinate descent
WIDEST = 2304  # inputs of one Gram matrix; layers with more are cut into equal blocks that know nothing of each other
NARROW = 64  # inputs per output, depthwise kernels among them: so few don't average out what rounding does, and their Gram matrices cost next to nothing
_ROWS = 512  # patches, at least, that one product of a Gram matrix takes in: adding a matrix up takes longer than a product of few
_BLOCK, _PART = 128, 16  # columns between products with all of a layer's, and with those of a block


def patches(
    x: np.ndarray, kind: str, attrs: Mapping[str, Any], kernel: tuple[int, int], out: tuple[int, ...], at: np.ndarray, zero_point: float = 0
) -> np.ndarray:
    """float32[G, P, KH*KW*C/G]: what the kernel meets at the output positions `at` (int64[P], flat over N, OH, OW), per convolution group.

    x: NHWC (dense: [..., K], G = 1), from which `zero_point` is subtracted; padding is 0. The last axis is ordered as a weight [O, KH, KW, C/G].
    """
    if not KINDS[kind].window:
        return (np.ascontiguousarray(x.reshape(-1, x.shape[-1])[at], np.float32) - np.float32(zero_point))[None]
    n, y, z = np.unravel_index(at, out[:3])
    rows, columns = (p[:, None] * attrs["strides"][a] - attrs["padding"][a] + np.arange(kernel[a])[None] * attrs["dilation"][a] for a, p in ((0, y), (1, z)))
    inside = ((rows >= 0) & (rows < x.shape[1]))[:, :, None] & ((columns >= 0) & (columns < x.shape[2]))[:, None, :]
    rows, columns = np.clip(rows, 0, x.shape[1] - 1), np.clip(columns, 0, x.shape[2] - 1)
    found = (x[n[:, None, None], rows[:, :, None], columns[:, None, :]].astype(np.float32) - np.float32(zero_point)) * inside[..., None]
    groups = int(attrs.get("groups", 1))
    split = found.reshape(len(at), kernel[0] * kernel[1], groups, -1).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(split.reshape(groups, len(at), -1))


class Gram:
    """H = E[x x^T] of a layer's inputs and their mean, gathered patch by patch: per group, and per block of a wide layer; [G*B, K/B, K/B]."""

    def __init__(self, groups: int, width: int) -> None:
        self.blocks = next(b for b in range(1, width + 1) if width % b == 0 and width // b <= WIDEST)
        shape = groups * self.blocks, width // self.blocks
        self.sums, self.means = np.zeros((*shape, shape[1])), np.zeros(shape)
        self.count = 0

    def add(self, x: np.ndarray) -> None:
        """More patches, float32[G, P, K]."""
        self.take(*self.of(x))

    def of(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """What `take` adds of patches."""
        groups, rows, width = x.shape
        x = x.reshape(groups, rows, self.blocks, width // self.blocks).transpose(0, 2, 1, 3).reshape(groups * self.blocks, rows, -1)
        return x.transpose(0, 2, 1) @ x, x.sum(axis=1), rows  # float32 holds sums of a few hundred squared int8 steps exactly, and of thousands nearly

    def take(self, sums: np.ndarray, means: np.ndarray, rows: int) -> None:
        self.sums += sums
        self.means += means
        self.count += rows

    def moments(self, centered: bool = False) -> np.ndarray:
        """float64[G*B, K/B]: the diagonal of H, about the mean if `centered`."""
        own: np.ndarray = np.einsum("gkk->gk", self.sums) / max(self.count, 1)
        return own - np.square(self.means / max(self.count, 1)) if centered else own

    def damped(self, block: slice, centered: bool = False) -> np.ndarray:
        """float64[N, K/B, K/B] of the N matrices of `block`: H, about the mean if `centered`, with `DAMPING`: positive definite whatever was seen."""
        own = self.sums[block] / max(self.count, 1)
        if centered:
            mean = self.means[block] / max(self.count, 1)
            own -= mean[:, :, None] * mean[:, None, :]
        diagonal = np.einsum("gkk->gk", own)  # a view
        mean = np.maximum(diagonal.mean(axis=1), 0)
        diagonal += (DAMPING * mean + (mean <= 0))[:, None]  # inputs that never change decide nothing
        return own


def round_weight(steps: np.ndarray, gram: Gram, centered: bool = False) -> np.ndarray:
    """int8, like `steps`: float weights [O, ...] in units of their scale, rounded for the inputs that `gram` has seen. centered: the mean of the error does
    not count."""
    outputs, blocks = len(steps), gram.blocks
    groups, width = len(gram.sums) // blocks, gram.sums.shape[1]
    target = steps.reshape(groups, outputs // groups, blocks, -1).transpose(0, 2, 1, 3).reshape(groups * blocks, outputs // groups, -1).astype(np.float64)
    order = np.argsort(-gram.moments(centered).sum(axis=0), kind="stable")  # inputs that matter most first
    rounded, most = np.empty_like(target), max(1, WIDEST**2 // width**2)
    for start in range(0, len(target), most):  # as many matrices at a time as take the memory of a wide one
        part = slice(start, start + most)
        some = target[part][:, :, order]
        rounded[part, :, order] = np.rint(some - least_error(some, gram.damped(part, centered)[:, order[:, None], order]))
    result: np.ndarray = rounded.reshape(groups, blocks, outputs // groups, -1).transpose(0, 2, 1, 3).reshape(steps.shape).astype(np.int8)
    return result


def least_error(target: np.ndarray, own: np.ndarray) -> np.ndarray:
    """float32[G, O, K]: target - q of rounded targets [G, O, K] for positive definite H = `own` [G, K, K], float64.

    The factor of H is float64, as H may be ill-conditioned; what it moves a weight by, before that is rounded to a whole number, is float32.
    """
    target = np.ascontiguousarray(target.transpose(0, 2, 1), np.float32)
    error = np.zeros_like(target)
    factor = np.linalg.cholesky(own[:, ::-1, ::-1])[:, ::-1, ::-1]  # upper triangular
    _sweep(target, error, _coupling(factor), triangular=True)
    del factor
    coupling = _coupling(own)
    for _ in range(SWEEPS):
        _sweep(target, error, coupling)
    return error.transpose(0, 2, 1).copy()


def _coupling(matrix: np.ndarray) -> np.ndarray:
    """float32[G, K, K]: [j, i] is what the error of column i moves column j by."""
    diagonal = np.arange(matrix.shape[1])
    result = np.empty(matrix.shape, np.float32)
    np.divide(matrix.transpose(0, 2, 1), matrix[:, diagonal, diagonal][:, :, None], out=result, casting="same_kind")
    result[:, diagonal, diagonal] = 0
    return result


def _sweep(target: np.ndarray, error: np.ndarray, coupling: np.ndarray, triangular: bool = False) -> None:
    """Round column after column in place: q[j] = rint(t[j] + sum over i of coupling[j, i] error[i]), error[j] = t[j] - q[j]; target, error: [G, K, O].
    triangular: nothing comes from columns behind j, whose errors are 0.

    Between blocks, and between parts of a block, what errors move is a matrix product; only within a part it is column by column.
    """
    width = target.shape[1]
    for start in range(0, width, _BLOCK):
        block = slice(start, min(start + _BLOCK, width))
        known = slice(0, start if triangular else width)
        wanted = target[:, block] + coupling[:, block, known] @ error[:, known]
        before = error[:, block].copy()
        for inner in range(0, block.stop - start, _PART):
            part, done = slice(inner, min(inner + _PART, block.stop - start)), slice(0, inner)
            own = slice(start + part.start, start + part.stop)
            if inner:
                wanted[:, part] += coupling[:, own, start : start + inner] @ (error[:, start : start + inner] - before[:, done])
            _columns(target[:, own], wanted[:, part], error[:, own], coupling[:, own, own])


def _columns(target: np.ndarray, wanted: np.ndarray, error: np.ndarray, coupling: np.ndarray) -> None:
    """The columns of a part of `_sweep`, of which `wanted` is known but for what they move each other by."""
    target, wanted, left = (np.array(a.transpose(1, 0, 2), order="C") for a in (target, wanted, error))  # a column after the other in memory
    pull = coupling.transpose(2, 1, 0)[..., None]  # [from, to, G, 1]
    for j in range(len(wanted)):
        column = target[j] - np.clip(np.rint(wanted[j]), -WEIGHT_HIGH, WEIGHT_HIGH)
        wanted[j + 1 :] += (column - left[j]) * pull[j, j + 1 :]
        left[j] = column
    error[...] = left.transpose(1, 0, 2)


class DataRounder:
    """Rounds layers for `weight_rounding.round_weights`. positions: how many output positions of each sample a Gram matrix takes in, chosen at random with
    a fixed seed. narrow: leave layers with more inputs per output alone."""

    def __init__(self, positions: int, narrow: int | None = None) -> None:
        self._positions, self._narrow = positions, narrow

    def weight(self, layer: IntegerLayer, group: Group, fitted: Sequence[Context], judges: Sequence[Context]) -> np.ndarray | str:
        """int8 weights for a layer that is about to run in all contexts, or why it keeps its own. Moments are of `fitted`; the choice is by `judges`."""
        if KINDS[layer.kind].scatters:
            return "weights of transposed convolutions are rounded to nearest"
        weight = group.weight
        assert weight is not None
        if self._narrow is not None and weight[0].size > self._narrow:
            return f"it has more than {self._narrow} inputs per output"
        groups = int(layer.attrs.get("groups", 1))
        steps = weight / (layer.unit / layer.x_scale).reshape(-1, *[1] * (weight.ndim - 1))
        gram = Gram(groups, weight[0].size)
        random = np.random.default_rng(0)
        for moments in self._patches(layer, weight, fitted, random, gram.of):
            gram.take(*moments)
        candidates = [layer.weight, *in_order(lambda _, centered: round_weight(steps, gram, centered), range(min(cores(), 2)), (False, True))]
        x = np.concatenate([*self._patches(layer, weight, judges, random, lambda x: x)], axis=1)
        return choose(candidates, steps, x, ending(group, layer.unit))

    def _patches(
        self, layer: IntegerLayer, weight: np.ndarray, contexts: Sequence[Context], random: np.random.Generator, then: Callable[[np.ndarray], Result]
    ) -> Iterator[Result]:
        """`then` of float32[G, P, K], of some samples at a time: what the layer meets at some positions, in int8 steps."""
        window = KINDS[layer.kind].window

        def drawn() -> Iterator[list[tuple[Context, np.ndarray]]]:
            some, rows = list[tuple[Context, np.ndarray]](), 0
            for context in contexts:
                total = int(np.prod(layer.shape[:-1] if window else context.view(layer.x).shape[:-1]))
                some.append((context, np.sort(random.choice(total, min(total, self._positions), replace=False))))
                rows += len(some[-1][1])
                if rows >= _ROWS or context is contexts[-1]:
                    yield some
                    some, rows = [], 0

        def met(_: int, drawn: Sequence[tuple[Context, np.ndarray]]) -> Result:
            kernel, zero = kernel_size(weight), layer.attrs["x_zero_point"]
            found = [patches(context.view(layer.x), layer.kind, layer.attrs, kernel, layer.shape, at, zero) for context, at in drawn]
            return then(found[0] if len(found) == 1 else np.concatenate(found, axis=1))

        return in_order(met, range(cores()), drawn())


def choose(candidates: Sequence[np.ndarray], steps: np.ndarray, x: np.ndarray, end: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Per output channel the first of the int8 candidates whose result on patches x [G, P, K], behind `end`, is nearest to that of the weights `steps`, with
    its mean shift taken back as the bias will. end: what follows sums [..., O] in accumulator steps, without the bias."""

    def product(_: int, w: np.ndarray) -> np.ndarray:
        result = x @ w.reshape(len(x), len(w) // len(x), -1).astype(np.float32).transpose(0, 2, 1)
        return result.transpose(1, 0, 2).reshape(result.shape[1], len(w))

    def error(_: int, actual: np.ndarray) -> np.ndarray:
        actual += (wanted - actual).mean(axis=0, dtype=np.float64).astype(np.float32)
        lost = end(actual)
        lost -= ended
        return np.asarray(np.square(lost, out=lost).mean(axis=0, dtype=np.float64))

    wanted, *made = in_order(product, range(cores()), [steps, *candidates])
    ended = end(wanted)
    best = np.argmin(np.stack(list(in_order(error, range(cores()), made))), axis=0)
    chosen: np.ndarray = np.stack(candidates)[best, np.arange(len(steps))]
    return chosen


def ending(group: Group, unit: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Slopes and clamp of a layer for sums float32[..., O] in steps of its accumulator, without the bias; what stands behind a residual is left out."""
    slopes = None if group.bends_sum or group.slopes is None else group.slopes.astype(np.float32)
    with np.errstate(over="ignore"):  # what bounds nothing is infinite
        bias = np.asarray((0.0 if group.bias is None else group.bias) / unit, np.float32)
        low, high = (None if bound is None or group.residual else np.asarray(bound / unit, np.float32) for bound in (group.low, group.high))

    def end(sums: np.ndarray) -> np.ndarray:
        y = sums + bias
        y = y if slopes is None else np.where(y < 0, slopes * y, y)
        return y if low is None and high is None else np.clip(y, low, high, out=y)

    return end
