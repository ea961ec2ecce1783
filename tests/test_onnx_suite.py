"""The ONNX backend suite's node cases, compiled in float: each computes what the case states, or is refused with the sentence of the table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.onnx_suite import FLOAT_TABLE, batches, cases, expected, float_verdicts

NAMES = [name for name in cases() if os.environ.get("QCOMPILER_SLOW") or "_expanded" not in name]
AGAIN = "If the change is meant: python -m tests.onnx_suite"


@pytest.mark.parametrize("batch", batches(NAMES), ids=lambda names: names[0].removeprefix("test_"))
def test_every_case_is_as_the_table_says(batch: list[str], tmp_path: Path) -> None:
    """All inputs lie between pages that can't be read, so an operator that reads beside its input ends this process."""
    table, found = expected(FLOAT_TABLE), float_verdicts(batch, tmp_path)
    changed = [f"{n}: {found[n]}, table: {table.get(n, 'right')}" for n in batch if found[n] != table.get(n, "right")]
    assert not changed, "\n".join([*changed, AGAIN])


def test_the_table_holds_refusals_only() -> None:
    """One sentence each, about the model, in the model's terms; nothing is wrong, and every row is a case."""
    for name, verdict in expected(FLOAT_TABLE).items():
        assert name in cases(), f"{name}: no such case. {AGAIN}"
        assert verdict.startswith("refused: ") and not any(word in verdict for word in ("TVM", "Error", "Traceback", "None", ".py")), f"{name}: {verdict}"
