"""What a compilation shall reach, and whether it did, on samples that it was fitted to and on others. Numbers only.

The SQNR is a mean over samples: that it holds for other data is judged by the lower end of a one-sided 95 % confidence interval on samples
held out from calibration. A fraction (agreement, accuracy) needs thousands of samples for that; it is judged as measured on all samples, and
its interval is stated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qcompiler.base.arguments import check
from qcompiler.base.errors import DataError
from qcompiler.base.tensor import TensorInfo
from qcompiler.numerics.metrics import student95, wilson
from qcompiler.pipeline.metric import Scored

HELD_OUT = 4  # every fourth sample is held out ...
FEWEST = 8  # ... when there are at least as many as this
CONFIDENCE = 0.95


_LIMITS = {
    "min_sqnr": (-math.inf, math.inf, "a finite number of dB is"),
    "min_agreement": (0.0, 1.0, "a fraction from 0 to 1 is"),
    "max_accuracy_drop": (0.0, 100.0, "percentage points from 0 to 100 are"),
    "max_channel_bias": (0.0, math.inf, "a number of quantization steps is"),
    "max_metric_drop": (-math.inf, math.inf, "a finite number is"),
}
"""What may be asked of a network, by the name of the limit: least, most, and what it is."""


def check_limits(**limits: float | None) -> None:
    """Raises DataError for a limit out of its range, TypeError for one that is no number. None is not asked for."""
    for name, value in limits.items():
        check("a limit of quality", name, value, float | None)
        least, most, what = _LIMITS[name]
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            raise DataError(f"{name} is {value:g}; {what} needed")


@dataclass(frozen=True)
class Goal:
    """min_sqnr: dB, of every output. min_agreement: fraction of samples with the float network's top-1 class. max_accuracy_drop: points of
    top-1 accuracy. max_metric_drop: of a metric of the user's own, in its unit. None is not asked for."""

    min_sqnr: float | None = None
    min_agreement: float | None = None
    max_accuracy_drop: float | None = None
    max_metric_drop: float | None = None

    def __post_init__(self) -> None:
        """Raises DataError for numbers that no network could reach or miss."""
        check_limits(**vars(self))

    def __bool__(self) -> bool:
        return self != Goal()

    def __str__(self) -> str:
        """As the command line spells it."""
        parts = {f"--{name.replace('_', '-')}": value for name, value in vars(self).items()}
        return " ".join(f"{name} {value:g}" for name, value in parts.items() if value is not None)


@dataclass(frozen=True)
class Scores:
    """A network against its float twin, sample by sample. power, noise: float64[S, outputs], sums of squares of the float outputs and of the errors.

    metric: of all samples, where one is asked for.

    agree, float_right, int8_right: bool[S, rows of the batch], of the first output with classes; None without one, or without labels.
    """

    power: np.ndarray
    noise: np.ndarray
    agree: np.ndarray | None = None
    float_right: np.ndarray | None = None
    int8_right: np.ndarray | None = None
    metric: Scored | None = None

    def __len__(self) -> int:
        return len(self.power)

    def of(self, samples: Sequence[int]) -> Scores:
        """The scores of some of the samples."""
        at = list(samples)
        votes = {name: None if (a := getattr(self, name)) is None else a[at] for name in ("agree", "float_right", "int8_right")}
        return replace(self, power=self.power[at], noise=self.noise[at], **votes)

    def relative_noise(self) -> float:
        """Noise over power of the output where that is greatest."""
        return float(_ratio(self.power, self.noise).max())

    def noise_bound(self) -> float:
        """What `relative_noise` of unseen samples does not exceed, with 95 % confidence (delta method for a ratio of means; Student's t)."""
        count = len(self)
        ratio = _ratio(self.power, self.noise)
        if count < 2:
            return math.inf
        residual = self.noise - ratio * self.power
        error = np.sqrt(np.square(residual).sum(axis=0) / (count - 1) / count) / np.maximum(self.power.mean(axis=0), np.finfo(float).tiny)
        return float((ratio + student95(count - 1) * error).max())

    def agreement(self) -> float | None:
        return None if self.agree is None else float(self.agree.mean())

    def accuracy_drop(self) -> tuple[float, float] | None:
        """(points of top-1 accuracy lost, half of its 95 % interval): the difference of paired proportions."""
        if self.float_right is None or self.int8_right is None:
            return None
        lost = self.float_right.astype(float) - self.int8_right.astype(float)
        return 100 * float(lost.mean()), 100 * 1.96 * float(lost.std()) / math.sqrt(lost.size)


def _ratio(power: np.ndarray, noise: np.ndarray) -> np.ndarray:
    tiny = np.finfo(np.float64).tiny
    with np.errstate(over="ignore"):  # noise on an output that is always zero
        result: np.ndarray = noise.sum(axis=0) / np.maximum(power.sum(axis=0), tiny)
    return result


def decibel(relative_noise: float) -> float:
    """SQNR in dB of a relative noise power."""
    return math.inf if relative_noise <= 0 else -10 * math.log10(relative_noise)


def held_out(count: int) -> list[int]:
    """The samples that calibration shall not see: evenly spread; none where there are fewer than `FEWEST`."""
    return list(range(HELD_OUT - 1, count, HELD_OUT)) if count >= FEWEST else []


def classifying(outputs: Iterable[TensorInfo]) -> list[TensorInfo]:
    """The outputs of shape [batch, classes]."""
    return [o for o in outputs if len(o.shape) == 2 and o.shape[1] > 1]


def check_labels(labels: np.ndarray, rows: int, output: TensorInfo) -> None:
    """Raises DataError unless there is one label for each of `rows`, all of them classes of `output`."""
    if len(labels) != rows:
        raise DataError(f"{len(labels)} labels for {rows} samples")
    if labels.min() < 0 or labels.max() >= output.shape[1]:
        raise DataError(f"labels lie in [{labels.min()}, {labels.max()}], but output '{output.name}' has {output.shape[1]} classes, counted from 0")


def check_thresholds(thresholds: Any, classified: Sequence[Any], labelled: bool) -> None:
    """Raises DataError for limits that can't be checked: without labels, or without an output that `classifying` finds. thresholds: anything with
    `max_accuracy_drop` and `min_agreement`."""
    if thresholds.max_accuracy_drop is not None and not labelled:
        raise DataError("an accuracy threshold needs labels (--labels)")
    if not classified and (labelled or thresholds.min_agreement is not None):
        raise DataError("labels and agreement need an output of shape [batch, classes], and this model has none; use a threshold on the SQNR")


@dataclass(frozen=True)
class Finding:
    """One part of a goal. found: a sentence. noise: the relative noise that the part wants over what was found, above 1 where it is met; None where
    noise does not decide directly."""

    wanted: str
    found: str
    met: bool
    noise: float | None = None


def judge(goal: Goal, scores: Scores, held: Sequence[int]) -> list[Finding]:
    """One finding per part of the goal. held: the samples of `scores` that nothing was fitted to; without any, the fitted ones must do, and the
    findings say so."""
    findings = []
    if goal.min_sqnr is not None:
        limit = 10 ** (-goal.min_sqnr / 10)
        part = scores.of(held) if held else scores
        found, bound = part.relative_noise(), part.noise_bound() if held else part.relative_noise()
        where = f"{len(held)} held-out samples, at least {decibel(bound):.2f} dB with 95 % confidence" if held else _unconfirmed(scores)
        findings.append(Finding(f"SQNR of at least {goal.min_sqnr:g} dB", f"{decibel(found):.2f} dB on {where}", bound <= limit, limit / max(bound, 1e-300)))
    where = f"all {len(scores)} samples, {len(held)} of them held out" if held else _unconfirmed(scores)
    if goal.min_agreement is not None and scores.agree is not None:
        rows, right = scores.agree.size, int(scores.agree.sum())
        low, high = wilson(right, rows)
        text = f"{100 * right / rows:.2f} % on {where}; 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        findings.append(Finding(f"top-1 agreement of at least {100 * goal.min_agreement:g} %", text, right / rows >= goal.min_agreement - 1e-12))
    if goal.max_accuracy_drop is not None and (drop := scores.accuracy_drop()) is not None:
        text = f"{drop[0]:.2f} points on {where}; 95 % interval +-{drop[1]:.1f} points"
        findings.append(Finding(f"top-1 accuracy at most {goal.max_accuracy_drop:g} points lower", text, drop[0] <= goal.max_accuracy_drop + 1e-9))
    if goal.max_metric_drop is not None and (metric := scores.metric) is not None:
        text = f"{metric.drop:.4f} lower ({metric.float_value:.4f} to {metric.int8_value:.4f}) on {where}"
        findings.append(Finding(f"{metric.name} at most {goal.max_metric_drop:g} lower", text, metric.drop <= goal.max_metric_drop + 1e-9))
    return findings


def _unconfirmed(scores: Scores) -> str:
    plural = "s" if len(scores) > 1 else ""
    return f"the {len(scores)} calibration sample{plural} themselves (fewer than {FEWEST}: none could be held out to confirm it)"
