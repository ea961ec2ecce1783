"""The examples run as they stand, and say what they promise."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

PROMISES = {
    "compile_and_verify": ("13 operators in int8, 0 in float", "PASSED", "the first digit is a"),
    "own_preprocessing": ("24 images; both ways saw the same numbers: True", "is cut off"),
    "reach_accuracy": ("dB gained when it stays float", "<- chosen", "SQNR on other digits"),
    "qat_import": ("compiled without data: 0 calibration samples", "bit for bit the same: True"),
    "cpp_service": ("answers:",),
    "tuning": ("6 variants measured", "the same results: True"),
}


def test_there_is_a_test_for_every_example(root: Path) -> None:
    assert {p.stem for p in (root / "examples").glob("*.py")} == set(PROMISES) | {"train_digits"}
    for name in PROMISES:
        assert len((root / "examples" / f"{name}.py").read_text().splitlines()) < 60, name


@pytest.mark.parametrize("name", PROMISES)
def test_example(name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "own_preprocessing":
        pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(root / "examples" / f"{name}.py"), run_name="__main__")
    out = " ".join(capsys.readouterr().out.split())
    for promised in PROMISES[name]:
        assert promised in out
    if name == "cpp_service":
        answers, labels = out.split("answers: ")[1].split(" labels: ")
        assert sum(a == b for a, b in zip(answers.split(), labels.split(), strict=True)) >= 18
