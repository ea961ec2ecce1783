"""Signs that calibration data is not what the network will see. They are warnings: what is strange for one network is right for another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from qcompiler.calibration.table import CalibrationTable, Statistics
from qcompiler.numerics.metrics import Parts
from qcompiler.passes.groups import Group

SAMPLES = 8
"""On so many samples, at least, outputs are compared with each other."""

LEAST_CHANGE = 0.04
"""Of an output's mean square, the part that differs between samples. Photographs give classifiers 0.8 to 0.9, noise gives them 0.01 to 0.03."""

LEAST_BIAS = 0.03
"""Of the first layer's biases over what its inputs make of its weights, both root mean squares: 0.15 to 1.4 in networks trained on inputs scaled as these are,
0.001 to 0.011 where the same networks get pixels from 0 to 255."""


MOST_CONSTANT = 4.0
"""|mean| over standard deviation of the first layer's channels, the median: 0.1 to 2 in eight networks on images scaled as in their training; 8 in
MobileNetV2 on pixels from 0 to 1 in the place of normalized ones."""

FAR_TOO_SMALL = 20.0
"""The same: 77 to 350 in networks for pixels from 0 to 255, or around 0, that get numbers near 1."""


def doubts(
    table: CalibrationTable,
    inputs: Iterable[str],
    outputs: Sequence[Mapping[str, np.ndarray]],
    groups: Sequence[Group] = (),
    constancy: Mapping[tuple[str, str], tuple[float, float]] | None = None,
) -> list[str]:
    """Sentences for people, none if all is well. outputs: of the float network for several samples (possibly none). groups: of that network. constancy:
    {(input, first layer): how constant the layer's channels are, how constant the input is}, as |mean| over standard deviation."""
    found = []
    for name in inputs:
        seen = table.values.get(name)
        if seen is not None and seen.count and seen.low == seen.high:
            found.append(
                f"input '{name}' is {seen.low:g} everywhere in all {table.samples} calibration samples; "
                "give data that looks like what the network will see, and check the preprocessing"
            )
    return [*_alone(table), *(found or [*_raw_pixels(table, groups), *_small_pixels(table, constancy or {}), *_steady(outputs)])]


def _alone(table: CalibrationTable) -> list[str]:
    if table.samples != 1:
        return []
    return ["1 calibration sample: whether others fit into its ranges can't be judged; give 50 to 500 samples that look like what the network will see"]


def _steady(outputs: Sequence[Mapping[str, np.ndarray]]) -> list[str]:
    """Of each finite output, how little it depends on the sample; nothing where a quantity in one of them does: of a detector only the scores do, beside boxes
    that lie where its anchors are."""
    changes = {}
    for name, first in outputs[0].items() if len(outputs) > 1 else ():
        if first.dtype != np.float32 or first.size < 2:
            continue
        every = np.stack([o[name] for o in outputs]).astype(np.float64)
        if not np.isfinite(every).all():
            continue
        parts = Parts.of(np.sqrt(np.square(every).mean(axis=0)))
        power, change = parts.sums(np.square(every).mean(axis=0)), parts.sums(every.var(axis=0))
        if power.any():
            changes[name] = float((change[power > 0] / power[power > 0]).max())
    if any(change >= LEAST_CHANGE for change in changes.values()):
        return []
    return [
        f"output '{name}' hardly depends on the calibration sample: only {100 * change:.2g} % of its power differs between {len(outputs)} of "
        "them, as with noise or with images that are scaled wrongly; check the data and the preprocessing"
        for name, change in changes.items()
    ]


def _raw_pixels(table: CalibrationTable, groups: Sequence[Group]) -> list[str]:
    """Inputs in 0..255 whose first layer has biases that are nothing beside them, so that it was trained on numbers near 1."""
    carried = {g.id: g.inputs[0] for g in groups if g.traits.moves and len(g.inputs) == 1}
    found = {}
    for group in groups:
        if not group.traits.weighted or group.weight is None or group.bias is None or not np.any(group.bias):
            continue
        source = group.inputs[0]
        while source in carried:
            source = carried[source]
        seen = table.values.get(source)
        if source in {g.id for g in groups} or seen is None or not (seen.low >= 0 and 64 < seen.high <= 255):
            continue
        gain = np.sqrt(np.square(group.weight.reshape(len(group.weight), -1).astype(np.float64)).sum(axis=1).mean())
        part = float(np.sqrt(np.square(group.bias.astype(np.float64)).mean()) / max(gain * _magnitude(seen), np.finfo(np.float64).tiny))
        if part < LEAST_BIAS:
            found[source] = (
                f"input '{source}' lies in [{seen.low:g}, {seen.high:g}], like pixels from 0 to 255, but the biases of the first layer, '{group.id}', are only "
                f"{100 * part:.2g} % of what it makes of them: it seems to want normalized inputs; check scale, mean and deviation in the preprocessing"
            )
    return list(found.values())


def _small_pixels(table: CalibrationTable, constancy: Mapping[tuple[str, str], tuple[float, float]]) -> list[str]:
    """Inputs so small that the first layer's biases decide what it says: pixels from 0 to 1 in the place of normalized ones, or numbers near 1 in the place of
    pixels from 0 to 255."""
    found = {}
    for (source, layer), (layers, inputs) in constancy.items():
        seen = table.values.get(source)
        if seen is None:
            continue
        said = f"input '{source}' lies in [{seen.low:.4g}, {seen.high:.4g}]"
        of = f"the first layer, '{layer}', hardly depends on it (of its channels' values the mean is typically {layers:.3g} times the standard deviation)"
        if layers > FAR_TOO_SMALL and max(abs(seen.low), seen.high) < 16:
            found[source] = (
                f"{said}, and {of}: it seems to want much larger numbers, such as pixels from 0 to 255; check scale, mean and std in the preprocessing"
            )
        elif layers > max(MOST_CONSTANT, 2 * inputs) and seen.low >= 0 and 0.5 < seen.high <= 1:
            found[source] = f"{said}, like pixels from 0 to 1, and {of}: it seems to want normalized inputs; check scale, mean and std in the preprocessing"
    return list(found.values())


def _magnitude(seen: Statistics) -> float:
    """Root mean square."""
    return float(np.sqrt(seen.channel_square.sum() / max(seen.count, 1)))
