"""The page of operators says what the code does today."""

from __future__ import annotations

from tests.operator_page import AGAIN, PAGE, page


def test_the_page_of_operators_is_current() -> None:
    """Every operator, kind and count; pytest shows the lines that differ."""
    text = page()
    assert text.splitlines() == PAGE.read_text("utf-8").splitlines(), f"docs/operators.md is stale: {AGAIN}"
