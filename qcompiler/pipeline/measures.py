"""Measures of quality that need no code of the user's: by well-kept libraries, which the extra `metrics` installs. Each is a metric (`MetricFunction`).

top5, f1    classifiers: one output [samples, classes], labels are class indices; f1 is the mean over classes (scikit-learn)
miou        segmentation: one output [samples, classes, height, width], or classes last; labels are class indices [samples, height, width], 255 is left out
            (scikit-learn)
map         detection: one output [samples, boxes, 6] of x1, y1, x2, y2, score, class, or three: boxes [samples, boxes, 4], scores, classes; labels are COCO's
            JSON, images in the order of the samples. Mean average precision over IoU 0.5 to 0.95 (pycocotools)
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qcompiler.base.errors import DataError

IGNORED = 255  # the label of pixels that belong to no class
TOP = 5


def top5(outputs: Mapping[str, np.ndarray], labels: Any) -> float:
    """The fraction of samples whose class is among the five best."""
    scores, truth = _classified(outputs, labels)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    return float((best == truth[:, None]).any(axis=1).mean())


def f1(outputs: Mapping[str, np.ndarray], labels: Any) -> float:
    """The harmonic mean of precision and recall, averaged over the classes that occur."""
    scores, truth = _classified(outputs, labels)
    return float(_library("sklearn.metrics").f1_score(truth, scores.argmax(1), average="macro", zero_division=0.0))


def miou(outputs: Mapping[str, np.ndarray], labels: Any) -> float:
    """Intersection over union, averaged over the classes that occur in the labels."""
    truth = np.asarray(labels)
    scores = _only(outputs, "miou", 4)
    if truth.ndim != 3 or truth.dtype.kind not in "iu":
        raise DataError(f"miou takes class indices [samples, height, width] as labels; given are {truth.dtype}{list(truth.shape)}")
    axis = next((a for a in (1, 3) if np.delete(scores.shape, a).tolist() == list(truth.shape)), None)
    if axis is None:
        raise DataError(f"miou: scores {list(scores.shape)} are not those of labels {list(truth.shape)}, with the classes as axis 1 or last")
    counts = truth != IGNORED
    known, found = truth[counts], scores.argmax(axis)[counts]
    return float(_library("sklearn.metrics").jaccard_score(known, found, labels=np.unique(known), average="macro", zero_division=0.0))


def mean_average_precision(outputs: Mapping[str, np.ndarray], labels: Any) -> float:
    """COCO's mean average precision. An image without detections has scores of 0 or below, which count as none."""
    if not isinstance(labels, Mapping) or not {"images", "annotations", "categories"} <= labels.keys():
        raise DataError('map takes COCO\'s JSON as labels, a mapping with "images", "annotations" and "categories"')
    boxes, scores, classes = _detections(outputs)
    ids = [image["id"] for image in labels["images"]]
    if len(ids) != len(boxes):
        raise DataError(f"map: the labels are of {len(ids)} images, and the data has {len(boxes)} samples")
    found = []
    for image, b, s, c in zip(ids, boxes, scores, classes, strict=True):
        for (x1, y1, x2, y2), score, kind in zip(b.tolist(), s.tolist(), c.tolist(), strict=True):
            if score > 0:
                found.append({"image_id": image, "category_id": round(kind), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
    if not found:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its progress
        truth = _library("pycocotools.coco").COCO()
        truth.dataset = {"info": {}, **labels}
        truth.createIndex()
        judged = _library("pycocotools.cocoeval").COCOeval(truth, truth.loadRes(found), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return float(max(judged.stats[0], 0.0))


MEASURES: dict[str, Callable[[Mapping[str, np.ndarray], Any], float]] = {"top5": top5, "f1": f1, "miou": miou, "map": mean_average_precision}
"""By the name that --metric takes."""


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"this metric needs {name.split('.')[0]}: pip install 'qcompiler[metrics]'") from error


def _only(outputs: Mapping[str, np.ndarray], what: str, rank: int) -> np.ndarray:
    found = [a for a in outputs.values() if a.ndim == rank]
    if len(found) != 1:
        shapes = ", ".join(f"'{name}' {list(a.shape)}" for name, a in outputs.items())
        raise DataError(f"{what} takes one output of {rank} axes, samples first; this network has {shapes}. Write a function of your own: FILE.py:FUNCTION")
    return found[0]


def _classified(outputs: Mapping[str, np.ndarray], labels: Any) -> tuple[np.ndarray, np.ndarray]:
    truth, scores = np.asarray(labels), _only(outputs, "a classifier's metric", 2)
    if truth.ndim != 1 or truth.dtype.kind not in "iu" or len(truth) != len(scores):
        raise DataError(f"a classifier's metric takes a class index per sample, {len(scores)} of them; the labels are {truth.dtype}{list(truth.shape)}")
    return scores, truth


def _detections(outputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(boxes [N, M, 4] as corners, scores [N, M], classes [N, M]). Of three outputs the classes are the one of whole numbers."""
    together = [a for a in outputs.values() if a.ndim == 3 and a.shape[2] == 6]
    boxes = [a for a in outputs.values() if a.ndim == 3 and a.shape[2] == 4]
    flat = {name: a for name, a in outputs.items() if a.ndim == 2}
    if len(together) == 1:
        return together[0][..., :4], together[0][..., 4], together[0][..., 5]
    if len(boxes) == 1 and len(flat) == 2:
        (first, second), whole = flat.values(), {name: bool((np.rint(a) == a).all()) for name, a in flat.items()}
        classes_last = [whole[name] for name in flat] != [True, False]
        return (boxes[0], first, second) if classes_last else (boxes[0], second, first)
    shapes = ", ".join(f"'{name}' {list(a.shape)}" for name, a in outputs.items())
    raise DataError(
        f"map takes one output [samples, boxes, 6], or boxes [samples, boxes, 4] with scores and classes; this network has {shapes}. "
        "Write a function of your own: FILE.py:FUNCTION"
    )
