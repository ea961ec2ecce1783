"""A user's own measure of quality (mAP, F1, word error rate, ...): a Python function of a network's outputs and the labels."""

from __future__ import annotations

import json
import math
import os
import runpy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.base.errors import DataError, closest
from qcompiler.base.files import read_regular
from qcompiler.calibration.arrays import read_array
from qcompiler.calibration.data import Samples, load_labels
from qcompiler.pipeline.measures import MEASURES

Outputs = dict[str, np.ndarray]
MetricFunction = Callable[[Outputs, Any], float]
"""`metric(outputs, labels)`: a number, the higher the better. outputs: {output name: array, all samples along the first axis}; labels: as they were given."""


@dataclass(frozen=True)
class Metric:
    """A metric and what it compares with. labels: anything."""

    name: str
    function: MetricFunction
    labels: Any

    def of(self, outputs: Iterable[Mapping[str, np.ndarray]]) -> float:
        """The metric over the outputs of every sample, in order. Raises DataError for an error inside of it, and for what is no number."""
        rows = list(outputs)
        whole = {name: np.concatenate([np.atleast_1d(row[name]) for row in rows]) for name in rows[0]}
        try:
            with np.errstate(over="warn", invalid="warn"):  # numpy's warnings about it are the user's own
                value = float(self.function(whole, self.labels))
        except DataError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(f"the metric '{self.name}' failed: {type(error).__name__}: {error}. It is called with ({{output: array}}, labels)") from error
        if not math.isfinite(value):
            raise DataError(f"the metric '{self.name}' is {'not a number (NaN)' if math.isnan(value) else value} on these outputs; a finite number is needed")
        return value


@dataclass(frozen=True)
class Scored:
    """A metric of both networks; the higher the better."""

    name: str
    float_value: float
    int8_value: float

    @property
    def drop(self) -> float:
        return self.float_value - self.int8_value

    def __str__(self) -> str:
        return f"{self.name}: float {self.float_value:.4f}, int8 {self.int8_value:.4f}, drop {self.drop:.4f}"


def load_metric(metric: str | MetricFunction, labels: Any, samples: Samples) -> Metric:
    """A metric given as a function, by the name of a ready-made one (`MEASURES`), or as "FILE.py:function", whose file is run for it. labels: what the
    function gets; a path is read: an .npy of any shape, JSON, else a table of class indices. Raises DataError."""
    truth = _labels(labels, samples)
    if truth is None and metric in MEASURES:
        raise DataError(f"the metric '{metric}' compares outputs with labels, and there are none; give them with --labels (labels=...)")
    if callable(metric):
        return Metric(getattr(metric, "__name__", type(metric).__name__), metric, truth)
    if metric in MEASURES:
        return Metric(metric, MEASURES[metric], truth)
    file, colon, name = metric.rpartition(":")
    if not (colon and file.endswith(".py") and name):
        raise DataError(f"metric '{metric}': expected FILE.py:function, or one of {', '.join(MEASURES)}")
    try:
        defined = runpy.run_path(file)
    except (Exception, SystemExit) as error:
        raise DataError(f"{file}: can't be run: {type(error).__name__}: {error}") from error
    if not callable(defined.get(name)):
        functions = [k for k, v in defined.items() if callable(v) and not k.startswith("_")]
        raise DataError(f"{file}: has no function '{name}'.{closest(name, functions)}")
    return Metric(name, defined[name], truth)


def _labels(labels: Any, samples: Samples) -> Any:
    if labels is None or not isinstance(labels, (str, os.PathLike)):
        return labels
    path = Path(labels)
    if path.suffix == ".npy":
        return read_array(path)
    if path.suffix != ".json":
        return load_labels(path, samples)
    try:
        return json.loads(read_regular(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read as JSON: {error}") from error
