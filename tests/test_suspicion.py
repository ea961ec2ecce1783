"""Warnings about calibration data that can't be typical."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompiler.calibration.suspicion import doubts
from qcompiler.calibration.table import CalibrationTable, Statistics
from qcompiler.cli.demo import MODEL
from qcompiler.cli.main import main


def table(array: np.ndarray) -> CalibrationTable:
    result = CalibrationTable(samples=3, values={"x": Statistics()})
    assert result.values["x"].add(array.astype(np.float32))
    return result


def outputs(change: float) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    steady = rng.standard_normal(50)
    return [{"y": (steady + change * rng.standard_normal(50)).astype(np.float32)} for _ in range(8)]


def test_each_symptom_is_named_and_sound_data_is_not() -> None:
    varied = np.arange(10)
    assert doubts(table(varied), ["x"], outputs(1.0)) == [] == doubts(table(varied), ["x"], outputs(0.01)[:1])
    (constant,) = doubts(table(np.full(10, 0.5)), ["x"], [])
    assert "input 'x' is 0.5 everywhere in all 3 calibration samples" in constant
    (steady,) = doubts(table(varied), ["x"], outputs(0.1))
    assert "output 'y' hardly depends on the calibration sample" in steady and "between 8 of them" in steady
    assert doubts(table(varied), ["x"], [{"y": np.zeros(5, np.float32)}] * 3) == [], "an output that is always zero says nothing"


def test_one_sample_of_zeros_compiles_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "zeros.npy"
    np.save(data, np.zeros((1, 1, 1, 16, 16), np.float32))
    assert main(["compile", str(MODEL), "--calibration", str(data), "--output", str(tmp_path / "m.so")]) == 0
    assert "warning: input 'image' is 0 everywhere in all 1 calibration samples" in capsys.readouterr().err
