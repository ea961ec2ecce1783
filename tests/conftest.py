"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable
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


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """digits("x86-avx2"): the example network compiled for a target; compiled once."""
    import qcompiler
    from qcompiler.cli.demo import MODEL, demo_data

    folder = tmp_path_factory.mktemp("digits")

    def compiled(target: str) -> Path:
        path = folder / f"{target}.so"
        if not path.exists():
            qcompiler.compile(MODEL, target=target, calibration=demo_data()[0][:40], preset="fast").save(path)
        return path

    return compiled
