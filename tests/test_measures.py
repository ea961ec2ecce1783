"""Ready-made measures of quality, on cases that can be counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools import require_module

from qcompiler.base.errors import DataError
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.pipeline.measures import MEASURES


def one_hot(classes: list[int], count: int) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


def test_the_five_best() -> None:
    scores = np.tile(np.arange(8, dtype=np.float32), (4, 1))
    assert MEASURES["top5"]({"y": scores}, np.array([7, 3, 2, 0])) == 0.5


def test_f1_of_classes() -> None:
    require_module("sklearn.metrics", "scikit-learn")
    found = MEASURES["f1"]({"y": one_hot([0, 0, 1, 1], 3)}, np.array([0, 1, 1, 1]))
    assert found == pytest.approx((2 / 3 + 4 / 5) / 2)


@pytest.mark.parametrize("last", [False, True])
def test_segmentation_in_either_layout(last: bool) -> None:
    require_module("sklearn.metrics", "scikit-learn")
    truth = np.array([[[0, 0, 1, 255], [0, 1, 1, 255]]])
    scores = np.moveaxis(np.eye(3)[np.array([[[0, 1, 1, 2], [0, 1, 1, 2]]])], 3, 3 if last else 1)
    assert MEASURES["miou"]({"y": scores}, truth) == pytest.approx((2 / 3 + 3 / 4) / 2)
    with pytest.raises(DataError, match="are not those of labels"):
        MEASURES["miou"]({"y": scores}, truth[:, :1])


TRUTH = {
    "images": [{"id": 7}, {"id": 9}],
    "categories": [{"id": 1}, {"id": 2}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0},
        {"id": 2, "image_id": 9, "category_id": 2, "bbox": [0, 0, 40, 40], "area": 1600, "iscrowd": 0},
    ],
}


def test_detection_by_one_output_or_three() -> None:
    require_module("pycocotools.coco", "pycocotools")
    boxes = np.array([[[10, 10, 30, 30], [0, 0, 1, 1]], [[0, 0, 40, 40], [5, 5, 6, 6]]], np.float32)
    scores, classes = np.array([[0.9, 0.0], [0.8, 0.0]], np.float32), np.array([[1, 0], [2, 0]], np.float32)
    whole = np.concatenate([boxes, scores[..., None], classes[..., None]], 2)
    assert MEASURES["map"]({"y": whole}, TRUTH) == pytest.approx(1)
    assert MEASURES["map"]({"c": classes, "b": boxes, "s": scores}, TRUTH) == pytest.approx(1)
    assert MEASURES["map"]({"b": boxes, "s": scores, "c": classes[::-1].copy()}, TRUTH) == 0
    half = boxes.copy()
    half[1, 0] = [0, 0, 40, 30]  # three quarters of the area: right for the IoUs 0.5 to 0.75, six of ten
    assert MEASURES["map"]({"b": half, "s": scores, "c": classes}, TRUTH) == pytest.approx(0.8)
    assert MEASURES["map"]({"b": boxes, "s": scores * 0, "c": classes}, TRUTH) == 0


@pytest.mark.parametrize(
    ("name", "outputs", "labels", "said"),
    [
        ("top5", {"a": (2, 8), "b": (2, 8)}, np.zeros(2, int), r"takes one output of 2 axes.*'a' \[2, 8\], 'b' \[2, 8\].*FILE.py:FUNCTION"),
        ("f1", {"a": (2, 8)}, np.zeros(3, int), r"a class index per sample, 2 of them; the labels are int64\[3\]"),
        ("miou", {"a": (2, 8, 4, 4)}, np.zeros((2, 4)), r"takes class indices \[samples, height, width\]"),
        ("map", {"a": (2, 8)}, TRUTH, r"takes one output \[samples, boxes, 6\]"),
        ("map", {"a": (2, 8, 6)}, [1, 2], "takes COCO's JSON"),
        ("map", {"a": (3, 8, 6)}, TRUTH, "of 2 images, and the data has 3 samples"),
    ],
)
def test_outputs_and_labels_of_another_kind(name: str, outputs: dict[str, tuple[int, ...]], labels: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        MEASURES[name]({key: np.zeros(shape, np.float32) for key, shape in outputs.items()}, labels)


def test_verify_takes_them_by_name(digits: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.stack([s["image"] for s in demo_data()[1][:6]]))
    np.save(tmp_path / "labels.npy", demo_data()[2][:6])
    words = ["verify", str(digits("native")), "--model", str(MODEL), "--data", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "labels.npy"), "--quiet"]
    assert main([*words, "--json", "--layer-samples", "0", "--metric", "top5", "--max-metric-drop", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["metric"] == {"name": "top5", "float_value": 1.0, "int8_value": 1.0}
    without = [w for w in words if w != "--labels" and not w.endswith("labels.npy")]
    for name in ("top5", "f1", "miou", "map"):
        assert main([*without, "--metric", name]) == 2
        assert f"the metric '{name}' compares outputs with labels, and there are none; give them with --labels" in capsys.readouterr().err
    assert main([*words, "--metric", "top6"]) == 2
    assert "expected FILE.py:function, or one of top5, f1, miou, map" in capsys.readouterr().err
