"""What a user sees of quality: a metric of one's own, images and the best classes, a warning about samples that were preprocessed in another way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler.base.errors import DataError
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.verification.parity import Thresholds
from qcompiler.verification.reach import Reach

COUNT = 12
F1 = """
import numpy as np

def recall(outputs, labels):
    assert outputs["logits"].shape == (12, 10)
    return float(np.mean(outputs["logits"].argmax(1) == np.asarray(labels["classes"])))

def broken(outputs, labels):
    return outputs["nothing"]

def nothing(outputs, labels):
    return float("nan")

def endless(outputs, labels):
    return float("inf")

def leaves(outputs, labels):
    raise SystemExit(0)
"""


@pytest.fixture(scope="module")
def library(digits: Callable[[str], Path]) -> Path:
    return digits("native")


def test_a_metric_from_a_file_is_measured_and_judged(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(F1)
    labels = demo_data()[2][:COUNT].copy()
    labels[0] = (labels[0] + 1) % 10
    (tmp_path / "labels.json").write_text(json.dumps({"classes": labels.tolist()}))
    np.save(tmp_path / "x.npy", np.concatenate([s["image"] for s in demo_data()[1]])[:, None][:40])
    words = ["verify", str(library), "--model", str(MODEL), "--data", str(tmp_path / "x.npy"), "--samples", str(COUNT), "--layer-samples", "1"]
    words += ["--labels", str(tmp_path / "labels.json"), "--metric", f"{tmp_path / 'mine.py'}:recall"]
    assert main([*words, "--max-metric-drop", "0.01", "--quiet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metric"] == {"name": "recall", "float_value": pytest.approx(11 / 12), "int8_value": pytest.approx(11 / 12)} and found["samples"] == COUNT
    assert main([*words, "--max-metric-drop", "-0.5", "--report", str(tmp_path / "page.html")]) == 1
    assert "FAILED: recall dropped by 0.0000, more than -0.5" in capsys.readouterr().out
    assert "recall, int8" in (tmp_path / "page.html").read_text()


def test_a_metric_is_an_accuracy_target(tmp_path: Path) -> None:
    calibration = demo_data()[0][:16]

    def close(outputs: dict[str, np.ndarray], labels: Any) -> float:
        assert outputs["logits"].shape == (16, 10) and labels == {"any": "thing"}
        return float(10 - np.abs(outputs["logits"]).max())

    options: dict[str, Any] = {"preset": "fast", "metric": close, "labels": {"any": "thing"}}
    met = qcompiler.compile(MODEL, calibration=calibration, max_metric_drop=50.0, **options).manifest["mixed_precision"]
    assert met["met"] and met["goal"] == "--max-metric-drop 50" and met["points"][0]["metric"]["name"] == "close"
    (finding,) = met["findings"]
    assert finding["wanted"] == "close at most 50 lower" and "on all 16 samples" in finding["found"]
    missed = qcompiler.compile(MODEL, calibration=calibration, max_metric_drop=-50.0, time_budget=1.0, **options).manifest["mixed_precision"]
    assert not missed["met"] and "THE TARGET (--max-metric-drop -50) IS NOT MET" in missed["statement"]
    assert re.search(r"the time budget of 1 s does not allow another plan.*--time-budget \d+s has room for one, \d+s for all", missed["statement"])
    for wrong in ({"metric": close}, {"max_metric_drop": 1.0}):
        with pytest.raises(DataError, match="metric and max_metric_drop go together"):
            qcompiler.compile(MODEL, calibration=calibration, **wrong)  # type: ignore[arg-type]


def test_a_metric_in_python_gets_labels_as_they_are(library: Path) -> None:
    seen: list[Any] = []

    def score(outputs: dict[str, np.ndarray], labels: Any) -> float:
        seen.append((outputs["logits"].shape, labels))
        return float(len(seen))

    report = qcompiler.verify(library, MODEL, demo_data()[1][:3], metric=score, labels="anything".split(), max_metric_drop=0.5, layer_samples=0)
    assert seen == [((3, 10), ["anything"])] * 2 and report.metric is not None and report.metric.drop == -1 and report.passed
    assert report.thresholds == Thresholds(max_metric_drop=0.5)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("mine.py", "expected FILE.py:function"),
        ("none.py:f", "none.py: can't be run"),
        ("mine.py:recal", "has no function 'recal'. Did you mean 'recall'"),
        ("mine.py:broken", "the metric 'broken' failed: KeyError: 'nothing'"),
        ("mine.py:nothing", "not a number"),
        ("mine.py:endless", "the metric 'endless' is inf on these outputs; a finite number is needed"),
        ("mine.py:leaves", "the metric 'leaves' failed: SystemExit: 0"),
        ("left.py:f", "left.py: can't be run: SystemExit: 3"),
    ],
)
def test_a_metric_that_cannot_be_used(metric: str, said: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(F1)
    Path("left.py").write_text("raise SystemExit(3)")
    with pytest.raises(DataError, match=said):
        qcompiler.verify(library, library_float(library), demo_data()[1][:2], metric=metric, layer_samples=0)
    with pytest.raises(DataError, match="max_metric_drop needs a metric"):
        qcompiler.verify(library, library_float(library), demo_data()[1][:2], max_metric_drop=1.0)


def library_float(library: Path) -> Any:
    """Stands for the float network: outputs alone are compared here."""
    return qcompiler.load(library)


def test_images_are_classified(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    pixels = [np.clip(np.round(s["image"][0, 0] * 255), 0, 255).astype(np.uint8) for s in demo_data()[1][:2]]
    for name, array in zip("ab", pixels, strict=True):
        image.fromarray(array).save(f"{name}.png")
    Path("p.yaml").write_text("color: GRAY\nscale: 1/255\n")
    Path("names.txt").write_text("".join(f"digit {i}\n" for i in range(10)))
    assert main(["run", str(library), "a.png", "b.png", "--preprocess", "p.yaml", "--labels-names", "names.txt", "-o", "out.npz"]) == 0
    session = qcompiler.load(library)
    logits = [session.run({"image": (p / np.float32(255))[None, None].astype(np.float32)})["logits"] for p in pixels]
    np.testing.assert_allclose(np.load("out.npz")["logits"], np.concatenate(logits), rtol=1e-5)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "a.png" and out[1].endswith(f"digit {logits[0].argmax()}") and out[6] == "b.png"
    for words, said in (
        ("a.png", "need --preprocess"),
        ("", "give either image files or --input"),
        ("a.png --input image=x.npy", "give either"),
        ("x.npz", "x.npz: only image files stand alone; arrays are named: --input NAME=X.npy"),
        ("a.png x.npy", "x.npy: only image"),
    ):
        assert main(["run", str(library), *words.split()]) == 2
        assert said in capsys.readouterr().err
    Path("names.txt").write_text("one\n")
    assert main(["run", str(library), "a.png", "--preprocess", "p.yaml", "--labels-names", "names.txt"]) == 2
    assert "has 1 lines, and the network 10 classes" in capsys.readouterr().err


def test_samples_of_another_scale_are_noticed(library: Path) -> None:
    manifest, samples = qcompiler.load(library).manifest, demo_data()[1][:4]

    def said(factor: float) -> list[str]:
        reach = Reach(manifest)
        for sample in samples:
            reach.add({"image": sample["image"] * np.float32(factor)})
        return reach.doubts()

    assert said(1) == []
    (large,), (small,) = said(255), said(1 / 255)
    assert "is cut off. Was the calibration data preprocessed as these samples are?" in large and "of which little is used" in small
    report = qcompiler.verify(library, library_float(library), [{"image": s["image"] * np.float32(255)} for s in samples], layer_samples=0)
    assert report.warnings == [large] and f"warning: {large}" in str(report)
