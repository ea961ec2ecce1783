"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory with real networks and images; the test is skipped where there is none."""
    folder = Path(os.environ.get("QCOMPILER_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "models").is_dir():
        pytest.skip("no real networks here (set QCOMPILER_DATA)")
    return folder
