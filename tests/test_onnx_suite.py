"""The ONNX backend suite's node cases, compiled in float: each computes what the case states, or is refused with the sentence of the table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.onnx_suite import FLOAT_TABLE, cases, expected, float_verdicts

SLOW = bool(os.environ.get("QCOMPILER_SLOW"))
PARTS = 12 if SLOW else 8  # each of some 150 cases; how many there are is not asked while tests are collected: making them takes seconds
AGAIN = "If the change is meant: python -m tests.onnx_suite"


@pytest.mark.parametrize("part", range(PARTS))
def test_every_case_is_as_the_table_says(part: int, tmp_path: Path) -> None:
    """All inputs lie between pages that can't be read, so an operator that reads beside its input ends this process."""
    batch = [name for name in cases() if SLOW or "_expanded" not in name][part::PARTS]
    table, found = expected(FLOAT_TABLE), float_verdicts(batch, tmp_path)
    changed = [f"{n}: {found[n]}, table: {table.get(n, 'right')}" for n in batch if found[n] != table.get(n, "right")]
    assert not changed, "\n".join([*changed, AGAIN])


def test_the_table_holds_refusals_only() -> None:
    """One sentence each, about the model, in the model's terms; nothing is wrong, and every row is a case."""
    for name, verdict in expected(FLOAT_TABLE).items():
        assert name in cases(), f"{name}: no such case. {AGAIN}"
        assert verdict.startswith("refused: ") and not any(word in verdict for word in ("TVM", "Error", "Traceback", "None", ".py")), f"{name}: {verdict}"
