"""Weights rounded anew, layer by layer in order of execution, each before its layer's bias is corrected; a third of the samples only judges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import tvm

from qcompiler.base.progress import Progress, silent
from qcompiler.passes.groups import Group
from qcompiler.refine.correction import corrected_bias
from qcompiler.refine.integer_layers import IntegerLayer
from qcompiler.refine.means import FloatMeans
from qcompiler.refine.trial import MEMORY, Context, Correction, IntegerExecutor, Trial


class Rounder(Protocol):
    """Chooses int8 weights (`rounding.py`) when all samples are about to run the layer: new weights like `layer.weight`, or why they stay. Biases are
    corrected on the samples `fitted`; `judges` are others."""

    def weight(self, layer: IntegerLayer, group: Group, fitted: Sequence[Context], judges: Sequence[Context]) -> np.ndarray | str: ...


def round_weights(
    rounder: Rounder,
    module: tvm.IRModule,
    executor: IntegerExecutor,
    means: FloatMeans,
    samples: Iterable[Mapping[str, np.ndarray]],
    memory: int = MEMORY,
    progress: Progress = silent,
) -> Correction:
    """Round the weights of `executor`'s network, which runs `module`, and correct its biases. Arguments and errors as `Trial`."""
    trial = Trial(module, executor, means, samples, memory, held_out=True)
    for layer in trial.layers("round weights", progress):
        weight = rounder.weight(layer, means.groups[layer.group], trial.fitted, trial.judges)
        if isinstance(weight, str):
            trial.skip(layer, weight)
            weight = layer.weight
        bias = corrected_bias(layer, weight, trial.fitted, means)
        if isinstance(bias, str):
            trial.skip(layer, bias)
        else:
            trial.change(layer, weight, bias)
    return trial.outcome()
