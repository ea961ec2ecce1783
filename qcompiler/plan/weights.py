"""Weight quantization: symmetric int8 per output channel, with the clipping that costs least."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qcompiler.numerics.spec import MIN_SCALE, WEIGHT_HIGH

RATIOS = {
    "fast": (1.0,),
    "default": (1.0, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8, 0.75, 0.7),
    "accurate": tuple(float(r) for r in np.linspace(1.0, 0.6, 33)),
}
"""Per preset: the candidate scales of a channel, as fractions of max|w| / 127. The first is min-max; of equal errors the first wins."""

_BLOCK = 1 << 16  # elements worked on at a time: a block and its temporaries stay in the second-level cache


@dataclass(frozen=True, eq=False)
class WeightScales:
    """scale: float64[O]. clipped: fraction of channels for which clipping beats min-max. sqnr: 10 log10(sum w^2 / sum error^2) in dB. silent: bool[O], the
    channels of zeros, whose scale says nothing."""

    scale: np.ndarray
    clipped: float
    sqnr: float
    silent: np.ndarray

    def with_bias(self, bias: np.ndarray | None, x_scale: float | None) -> WeightScales:
        """A channel of zeros gets a scale that states its bias exactly to 23 bits in units of x_scale * scale."""
        if bias is None or x_scale is None or not (stated := self.silent & (bias != 0)).any():
            return self
        least = np.maximum(np.abs(bias) / (x_scale * 2**23), MIN_SCALE)
        return replace(self, scale=np.where(stated, _storable(least), self.scale))


def choose_scales(weight: np.ndarray, ratios: tuple[float, ...]) -> WeightScales:
    """Scales for float32 `weight` [O, ...], per channel the one of `ratios` with the least sum of squared errors. No scale is below spec.MIN_SCALE, so weights
    of a dead channel (1e-40, say) become 0.
    """
    flat = np.ascontiguousarray(weight.reshape(weight.shape[0], -1), np.float32)
    channels = len(flat)
    peak = np.abs(flat).max(axis=1, initial=0.0).astype(np.float64)
    full = np.where(peak > 0, np.maximum(peak / WEIGHT_HIGH, 2 * MIN_SCALE), 1.0)  # 2: room for the ratios
    least, chosen = np.full(channels, np.inf), np.ones(channels)
    for ratio in ratios:
        error = squared_errors(flat, full * ratio)
        better = error < least
        least[better], chosen[better] = error[better], ratio
    power, noise = float(np.square(flat, dtype=np.float64).sum()), float(least.sum())
    sqnr = 10 * np.log10(power / noise) if power and noise else np.inf
    return WeightScales(_storable(full * chosen), float(np.mean(chosen < 1)) if channels else 0.0, float(sqnr), peak == 0)


def _storable(scale: np.ndarray) -> np.ndarray:
    """What a QDQ module can state of scales, float64."""
    return scale.astype(np.float32).astype(np.float64)


def quantize_weight(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int8 `clip(rint(w / scale[o]), -127, 127)`, in the shape of `weight` [O, ...]."""
    inverse = (1 / scale).astype(np.float32).reshape(-1, *[1] * (weight.ndim - 1))
    quantized: np.ndarray = np.clip(np.rint(weight * inverse), -WEIGHT_HIGH, WEIGHT_HIGH).astype(np.int8)
    return quantized


def squared_errors(flat: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Per row of float32 `flat` [O, K]: the sum over k of (w - scale * quantized w)^2, float64[O]."""
    errors = np.empty(len(flat))
    rows = max(1, _BLOCK // max(flat.shape[1], 1))
    inverse = (1 / scale).astype(np.float32)[:, None]
    for start in range(0, len(flat), rows):
        part = flat[start : start + rows] * inverse[start : start + rows]
        whole = np.rint(part)
        np.clip(whole, -WEIGHT_HIGH, WEIGHT_HIGH, out=whole)
        part -= whole
        errors[start : start + rows] = np.einsum("ok,ok->o", part, part)
    errors *= scale**2
    return errors
