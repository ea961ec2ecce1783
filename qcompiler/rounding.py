"""Weight rounding: each weight goes up or down so that the layer's output, on calibration data, moves least.

Rounding to the nearest int8 minimises the error of single weights. What counts is the error of their sum with the layer's inputs,

    sum over positions of (v x - q x')^2,    v: float weights in int8 steps, q: int8 weights,
                                             x: float inputs in int8 steps, x': the int8 network's own inputs

(Nagel et al. 2020, arXiv:2004.10568; with the network's own inputs, errors of earlier layers are taken back too). With the Gram matrices
H = E[x' x'^T] and C = E[(x - x') x'^T] this is, up to a constant, (t - q) H (t - q)^T about the least-squares target t = v + v C H^-1. It is
minimised column by column as in GPTQ (Frantar et al. 2022, arXiv:2210.17323): with H = T T^T, T upper triangular,

    q[j] = rint(t[j] + sum over i < j of (t[i] - q[i]) T[i, j] / T[j, j])

and then by sweeps of coordinate descent, each of which can only lower the error:

    q[j] = rint(t[j] + sum over i != j of (t[i] - q[i]) H[i, j] / H[j, j])

Inputs are taken about their means: what is left of the mean, the bias takes up (`correction.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.correction import Context, IntegerExecutor, Layer
from qcompiler.passes.groups import Group

DAMPING = 0.01  # of H's mean diagonal, added to its diagonal: keeps what the data does not determine near the float weights
SWEEPS = 2  # of coordinate descent
WIDEST = 2304  # inputs of one Gram matrix; layers with more are cut into equal blocks that know nothing of each other
POSITIONS = {"fast": 0, "default": 128, "accurate": 512}
"""Per preset: how many output positions of each sample decide."""
_BLOCK = 64  # columns between updates of everything behind them


def patches(x: np.ndarray, kind: str, attrs: Mapping[str, Any], kernel: tuple[int, int], out: tuple[int, ...], at: np.ndarray) -> np.ndarray:
    """float32[G, P, KH*KW*C/G]: what the kernel meets at the output positions `at` (int64[P], flat over N, OH, OW), per convolution group.

    x: NHWC (dense: [..., K], G = 1), zero point subtracted; padding is 0. The last axis is ordered as a weight [O, KH, KW, C/G].
    """
    if kind == "dense":
        return np.ascontiguousarray(x.reshape(-1, x.shape[-1])[at], np.float32)[None]
    n, y, z = np.unravel_index(at, out[:3])
    rows, columns = (
        p[:, None] * attrs["strides"][a] - attrs["padding"][a] + np.arange(kernel[a])[None] * attrs["dilation"][a] for a, p in ((0, y), (1, z))
    )
    inside = ((rows >= 0) & (rows < x.shape[1]))[:, :, None] & ((columns >= 0) & (columns < x.shape[2]))[:, None, :]
    rows, columns = np.clip(rows, 0, x.shape[1] - 1), np.clip(columns, 0, x.shape[2] - 1)
    found = x[n[:, None, None], rows[:, :, None], columns[:, None, :]].astype(np.float32) * inside[..., None]
    groups = int(attrs.get("groups", 1))
    split = found.reshape(len(at), kernel[0] * kernel[1], groups, -1).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(split.reshape(groups, len(at), -1))


class Gram:
    """Second moments of a layer's inputs about their means, gathered patch by patch: per group, and per block of a wide layer.

    samples of x' and x - x' are float32[G, P, K]; `moments` hands out H and C as float64[G*B, K/B, K/B].
    """

    def __init__(self, groups: int, width: int) -> None:
        self.blocks = next(b for b in range(1, width + 1) if width % b == 0 and width // b <= WIDEST)
        shape = (groups * self.blocks, width // self.blocks)
        self.own, self.cross = np.zeros((*shape, shape[1])), np.zeros((*shape, shape[1]))
        self.mean, self.shift = np.zeros(shape), np.zeros(shape)
        self.count = 0

    def split(self, x: np.ndarray) -> np.ndarray:
        """[G, P, K] as [G*B, P, K/B]."""
        groups, rows, width = x.shape
        return x.reshape(groups, rows, self.blocks, width // self.blocks).transpose(0, 2, 1, 3).reshape(groups * self.blocks, rows, -1)

    def add(self, x: np.ndarray, difference: np.ndarray) -> None:
        x, difference = self.split(x), self.split(difference)
        self.own += x.transpose(0, 2, 1) @ x
        self.cross += difference.transpose(0, 2, 1) @ x
        self.mean += x.sum(axis=1)
        self.shift += difference.sum(axis=1)
        self.count += x.shape[1]

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        mean, shift = CENTRE * self.mean / self.count, CENTRE * self.shift / self.count
        return self.own / self.count - mean[:, :, None] * mean[:, None, :], self.cross / self.count - shift[:, :, None] * mean[:, None, :]


def round_weight(steps: np.ndarray, gram: Gram, correction: float = 1.0) -> np.ndarray:
    """int8, like `steps`: float weights [O, ...] in units of their scale, rounded for the inputs that `gram` has seen.

    correction: how much of the least-squares target's distance from the float weights to follow (0: none, errors of earlier layers stay).
    """
    outputs, blocks = len(steps), gram.blocks
    groups = len(gram.own) // blocks
    v = steps.reshape(groups, outputs // groups, blocks, -1).transpose(0, 2, 1, 3).reshape(groups * blocks, outputs // groups, -1).astype(np.float64)
    own, cross = gram.moments()
    width = own.shape[1]
    diagonal = np.arange(width)
    mean = own[:, diagonal, diagonal].mean(axis=1)
    own[:, diagonal, diagonal] += (DAMPING * mean + (mean <= 0))[:, None]  # inputs that never change decide nothing
    target = v + correction * np.linalg.solve(own, (v @ cross).transpose(0, 2, 1)).transpose(0, 2, 1) if correction else v
    order = np.argsort(-own[:, diagonal, diagonal].mean(axis=0), kind="stable")
    own, target, v = own[:, order][:, :, order], target[:, :, order], v[:, :, order]
    nearest = target - np.clip(np.rint(v), -127, 127)
    best = least_error(target, own)
    worse = cost(best, own) >= cost(nearest, own)
    best[worse] = nearest[worse]
    if DEBUG:
        z = target - v
        c0 = cost(nearest, own).sum(); x0 = np.einsum("gok,gok->", v @ own, v)
        near = np.rint(target) - target
        print(v.shape, gram.count, "sig/near %.1f sig/best %.1f near-about-target %.1f |t-v| %.3f x-x' %.4f" % (10*np.log10(x0/c0), 10*np.log10(x0/cost(best, own).sum()), 10*np.log10(x0/cost(near, own).sum()), np.sqrt((z**2).mean()), np.sqrt((gram.cross**2).sum()/(gram.own**2).sum())), flush=True)
    rounded = np.empty_like(target)
    rounded[:, :, order] = np.rint(target - best)
    result: np.ndarray = rounded.reshape(groups, blocks, outputs // groups, -1).transpose(0, 2, 1, 3).reshape(steps.shape).astype(np.int8)
    return result


def cost(error: np.ndarray, own: np.ndarray) -> np.ndarray:
    """float64[G, O]: error H error^T of each output."""
    result: np.ndarray = np.einsum("gok,gok->go", error @ own, error)
    return result


def least_error(target: np.ndarray, own: np.ndarray) -> np.ndarray:
    """float64[G, O, K]: target - q of rounded targets [G, O, K] for positive definite H = `own` [G, K, K]."""
    factor = np.linalg.cholesky(own[:, ::-1, ::-1])[:, ::-1, ::-1]  # upper triangular
    error = np.zeros_like(target)
    diagonal = np.arange(own.shape[1])
    for matrix, sweeps in ((factor, 1), (own, SWEEPS)):
        coupling = matrix / matrix[:, None, diagonal, diagonal]
        coupling[:, diagonal, diagonal] = 0
        for _ in range(sweeps):
            _sweep(target, error, coupling)
    return error


def _sweep(target: np.ndarray, error: np.ndarray, coupling: np.ndarray) -> None:
    """Round column after column in place: q[j] = rint(t[j] + sum over i of error[i] coupling[i, j]), error[j] = t[j] - q[j]."""
    width = target.shape[2]
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        wanted = target[:, :, start:stop] + error @ coupling[:, :, start:stop]
        for j in range(start, stop):
            column = target[:, :, j] - np.clip(np.rint(wanted[:, :, j - start]), -127, 127)
            change = column - error[:, :, j]
            error[:, :, j] = column
            wanted += change[:, :, None] * coupling[:, None, j, start:stop]


class DataRounder:
    """Rounds layers for `correction.correct`: the float network, in `executor`, advances beside the int8 one.

    positions: how many output positions of each sample a Gram matrix takes in, chosen at random with a fixed seed.
    """

    def __init__(self, executor: IntegerExecutor, positions: int) -> None:
        self.context_bytes = executor.context_bytes
        self._executor, self._positions = executor, positions
        self._steps = list(executor.steps)
        self._contexts: list[Context] = []
        self._done = 0

    def add(self, sample: Mapping[str, np.ndarray]) -> None:
        """One more sample to fit to."""
        self._contexts.append(self._executor.new_context(sample))

    def weight(self, layer: Layer, group: Group, contexts: Sequence[Context]) -> np.ndarray | str:
        """int8 weights for a layer that is about to run in all `contexts`, or why it keeps its own."""
        if layer.kind == "conv2d_transpose":
            return "weights of transposed convolutions are rounded to nearest"
        if group.id not in self._steps or group.weight is None:
            return "the float network has no step of its own for it"
        at = self._steps.index(group.id)
        for context in self._contexts:
            context.run(self._done, at)
        self._done = at
        weight = group.weight
        kernel = (int(weight.shape[1]), int(weight.shape[2])) if weight.ndim == 4 else (1, 1)
        groups = int(layer.attrs.get("groups", 1))
        gram = Gram(groups, weight[0].size)
        total = int(np.prod(layer.shape[:-1]))
        random = np.random.default_rng(0)
        for own, reference in zip(contexts, self._contexts, strict=True):
            at_positions = np.sort(random.choice(total, min(total, self._positions), replace=False))
            x = own.view(layer.x)
            wanted = reference.view(group.inputs[0]).reshape(x.shape)
            x = x.astype(np.float32) - layer.attrs["x_zero_point"]
            difference = wanted * np.float32(1 / layer.x_scale) - x
            parts = [patches(a, layer.kind, layer.attrs, kernel, layer.shape, at_positions) for a in (x, difference)]
            gram.add(parts[0], parts[1])
        scale = (layer.unit / layer.x_scale).reshape(-1, *[1] * (weight.ndim - 1))
        return round_weight(weight / scale, gram, CORRECTION)


CORRECTION = 1.0
CENTRE = 1.0
DEBUG = False
