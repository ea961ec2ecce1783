"""Bias correction: quantization shifts the mean of every channel a little; the int32 bias takes the shift back, layer after layer.

    bias[o] += rint(steady(E[float pre-activation][o] - E[int8 pre-activation][o]) / unit[o])

where E is the mean over one sample, and `steady` the part that all samples share (Nagel et al. 2019, arXiv:1906.04721, section 4.2, in its
sequential, data-driven form). Means are those of `means.py`. All samples advance through the integer network side by side (`trial.py`), so that each layer
is corrected knowing the corrections before it; float and integer means are over the same samples, so that sampling noise cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tvm

from qcompiler.base.progress import Progress, silent
from qcompiler.numerics.spec import conv_accumulator_bound
from qcompiler.refine.integer_layers import IntegerLayer
from qcompiler.refine.means import FloatMeans, kernel_size, pre_activation, tap_means
from qcompiler.refine.trial import MEMORY, Context, Correction, IntegerExecutor, Trial, of_each

MANY = 32  # samples, whose mean is taken as it is
_INT32 = 2**31 - 1


def correct_biases(
    module: tvm.IRModule,
    executor: IntegerExecutor,
    means: FloatMeans,
    samples: Iterable[Mapping[str, np.ndarray]],
    memory: int = MEMORY,
    progress: Progress = silent,
) -> Correction:
    """Correct the biases of `executor`'s network, which runs `module`. Arguments and errors as `Trial`; `replace_operands` writes the result into the
    module."""
    trial = Trial(module, executor, means, samples, memory)
    for layer in trial.layers("correct biases", progress):
        bias = corrected_bias(layer, layer.weight, trial.fitted, means)
        if isinstance(bias, str):
            trial.skip(layer, bias)
        else:
            trial.change(layer, layer.weight, bias)
    return trial.outcome()


def stated_biases(
    shifts: Mapping[str, np.ndarray],
    module: tvm.IRModule,
    executor: IntegerExecutor,
    means: FloatMeans,
    samples: Iterable[Mapping[str, np.ndarray]],
    memory: int = MEMORY,
    progress: Progress = silent,
) -> Correction:
    """Take `shifts` (float64[O] by group id: what the analytic correction added to biases) back. Where a network spends most of its time at values at which
    its functions are flat, what keeps means there moves the others. Arguments and errors otherwise as `correct_biases`."""
    trial = Trial(module, executor, means, samples, memory, what="biases as they were,")
    for layer in trial.layers("try biases as they were", progress):
        if layer.group in shifts:
            bias = np.rint(layer.bias - shifts[layer.group] / layer.unit)
            trial.change(layer, layer.weight, np.clip(bias, -_INT32, _INT32).astype(np.int32))
    return trial.outcome()


def corrected_bias(layer: IntegerLayer, weight: np.ndarray, contexts: Sequence[Context], means: FloatMeans) -> np.ndarray | str:
    """The layer's new bias (int32[O]), or why it keeps its own. Its inputs must be there and its step be next. weight: the layer's, or what takes their
    place; then the bias first keeps the mean that the layer's own gave."""
    zero = layer.attrs["x_zero_point"]
    kernel, shape = kernel_size(weight), layer.shape
    taps = of_each(lambda c: tap_means(c.view(layer.x).astype(np.float32) - zero, layer.kind, layer.attrs, kernel, shape), contexts)
    groups, start = int(layer.attrs.get("groups", 1)), layer.bias.astype(np.float64)
    if weight is not layer.weight:
        start = start + np.rint(pre_activation(layer.weight.astype(np.float32) - weight, np.stack(taps), groups).mean(axis=0))
    actual = (start + pre_activation(weight, np.stack(taps), groups)) * layer.unit
    if layer.residual is not None:
        source, other, step = layer.residual
        values = of_each(lambda c: tap_means(c.view(source).astype(np.float32) - other, "dense", {}, (1, 1), shape), contexts)
        actual = actual + np.stack(values).reshape(actual.shape) * step
    wanted = means.expected(layer.group, len(contexts), layer.residual is not None)
    shift = wanted - actual
    bias = start + np.rint(steady(shift, layer.is_last) / layer.unit)
    if not (np.abs(bias) <= _INT32).all():
        return "a corrected bias leaves int32"
    corrected: np.ndarray = bias.astype(np.int32)
    if conv_accumulator_bound(weight, corrected, layer.attrs["x_zero_point"]) > _INT32:
        return "with a corrected bias the accumulator could leave int32"
    return corrected


def steady(shift: np.ndarray, one_mean: bool = False) -> np.ndarray:
    """float64[O]: the part of `shift` [S, O] that all samples have in common, mean * true^2 / (true^2 + variance over samples).

    true^2 is mean^2 without what it is by chance, variance / S (beyond that which `MANY` samples leave): of few samples the mean is mostly that, and one tells
    nothing. A shift that changes from sample to sample comes from clipping and from what earlier layers did to single images. Undoing its mean moves all the
    other samples away from where an activation bends: with full means ResNet-50's output falls from 27.7 to 23.0 dB, with this it rises to 30.2. one_mean:
    nothing bends behind it, so only chance is left out.
    """
    count = len(shift)
    if count < 2:
        return np.zeros(shift.shape[1])
    mean, variance = shift.mean(axis=0), shift.var(axis=0)
    chance = variance * (max(1 / count - 1 / MANY, 0.0) * count / (count - 1))
    true = np.maximum(np.square(mean) - chance, 0.0)
    result: np.ndarray = mean * true / np.maximum(true + (chance if one_mean else variance), np.finfo(np.float64).tiny)
    return result
