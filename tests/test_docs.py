"""The arithmetic's text: its examples run, its equations are numbered, and no operator is left out."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from qcompiler.numerics.operators import OPERATORS


@pytest.fixture(scope="module")
def path(root: Path) -> Path:
    return root / "docs" / "numerics.md"


def test_the_examples_of_the_numerics_text(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = doctest.testfile(str(path), module_relative=False, encoding="utf-8")
    assert result.failed == 0, capsys.readouterr().out
    assert result.attempted >= 40


def test_equations_are_numbered_in_order_and_references_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    equations = [int(n) for line in text.splitlines() if line.startswith("    ") for n in re.findall(r"\((\d+)\)$", line)]
    assert equations == list(range(1, len(equations) + 1)) and len(equations) > 15
    prose = "\n".join(line for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines() if not line.startswith("    "))
    assert {int(n) for n in re.findall(r"\((\d+)\)", prose)} <= set(equations)


def test_every_operator_is_defined(path: Path) -> None:
    text = path.read_text("utf-8")
    edges = {"qc.quantize": "    quantize:", "qc.dequantize": "    dequantize:"}
    assert [name for name in OPERATORS if edges.get(name, name) not in text] == []
    assert set(re.findall(r"qc\.[a-z0-9_.]*[a-z0-9]", text)) <= set(OPERATORS)
