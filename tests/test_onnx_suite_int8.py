"""The ONNX backend suite's node cases in int8: at least 25 dB against what the case states, or the reason that the table gives."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest

from tests.onnx_suite_int8 import GOOD, PARTS, TABLE, chosen, expected, int8_verdicts

AGAIN = "If the change is meant: python -m tests.onnx_suite_int8"
TODAY = datetime.date.today().toordinal() % PARTS  # one part a day; all of them with QCOMPILER_SLOW=1


@pytest.mark.parametrize("part", range(PARTS) if os.environ.get("QCOMPILER_SLOW") else [TODAY])
def test_every_case_is_as_the_table_says(part: int, tmp_path: Path) -> None:
    table, names = expected(TABLE), chosen()[part::PARTS]
    found = int8_verdicts(names, tmp_path)
    changed = [f"{n}: {found[n]}, table: {table.get(n, GOOD)}" for n in names if found[n] != table.get(n, GOOD)]
    assert not changed, "\n".join([*changed, AGAIN])
