"""What the first convolutions of a network make of its inputs: that tells whether these are scaled as they were when it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qcompiler.passes.groups import Group
from qcompiler.refine.means import kernel_size
from qcompiler.refine.rounding import patches

_POSITIONS = 512  # of an output, evenly spread
_CHANNELS = 4  # of an image, at most


def first_layers(groups: Sequence[Group], inputs: Sequence[str]) -> dict[str, tuple[str, Group]]:
    """{value that it reads: (network input behind that, group)} of convolutions with a bias on an input of up to four channels."""
    behind = {name: name for name in inputs}
    found = {}
    for group in groups:
        source = behind.get(group.inputs[0]) if group.inputs else None
        if source is None:
            continue
        if group.traits.moves and len(group.inputs) == 1:
            behind[group.id] = source
        elif group.kind == "conv2d" and group.weight is not None and group.bias is not None and group.weight.shape[3] <= _CHANNELS and np.any(group.bias):
            found[group.inputs[0]] = (source, group)
    return found


class FirstLayers:
    """A calibration watcher: mean and standard deviation of every channel in front of the activation of the first layers, and of what they read, in the first
    `limit` samples. layers: as `first_layers` finds them. Memory: a few numbers per channel."""

    def __init__(self, layers: Mapping[str, tuple[str, Group]], limit: int) -> None:
        self.layers = layers
        self._limit = limit
        self._sums: dict[str, np.ndarray] = {}

    def look(self, sample: int, value_id: str, array: np.ndarray, seen: object) -> np.ndarray | None:
        if value_id not in self.layers or sample >= self._limit:
            return None
        group = self.layers[value_id][1]
        assert group.weight is not None and group.bias is not None
        count = int(np.prod(group.shape[:3]))
        at = np.unique(np.linspace(0, count - 1, min(count, _POSITIONS)).astype(np.int64))
        met = patches(array, group.kind, group.attrs, kernel_size(group.weight), group.shape, at).astype(np.float64)
        weights = group.weight.reshape(len(met), -1, met.shape[2]).astype(np.float64)
        made = np.einsum("gpk,gok->pgo", met, weights).reshape(len(at), -1) + group.bias
        x = array.astype(np.float64)
        return np.concatenate([made.sum(0), np.square(made).sum(0), [len(at), x.sum(), np.square(x).sum(), x.size]])

    def take(self, value_id: str, seen: np.ndarray) -> None:
        self._sums[value_id] = self._sums.get(value_id, np.zeros_like(seen)) + seen

    def end_sample(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Outputs are of no interest here."""

    def state(self) -> dict[str, np.ndarray]:
        return dict(self._sums)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self._sums = {name: array.copy() for name, array in state.items() if name in self.layers}

    def constancy(self) -> dict[tuple[str, str], tuple[float, float]]:
        """{(network input, layer): (of the layer's channels the median, of the input)} of |mean| over standard deviation: how much of it never changes. Layers
        are trained to have about 1, whatever their inputs are; beyond 4 they hardly look at what is there."""
        found = {}
        for value, sums in self._sums.items():
            source, group = self.layers[value]
            *channels, positions, total, square, count = sums.tolist()
            half = len(channels) // 2
            mean = np.array(channels[:half]) / positions
            ratios = _ratio(mean, np.array(channels[half:]) / positions)
            found[source, group.id] = float(np.median(ratios)), float(_ratio(np.array(total / count), np.array(square / count)))
        return found


def _ratio(mean: np.ndarray, square: np.ndarray) -> np.ndarray:
    spread = np.sqrt(np.maximum(square - np.square(mean), 0.0))
    result: np.ndarray = np.abs(mean) / np.maximum(spread, 1e-12 * np.maximum(np.abs(mean), 1e-300))
    return result
