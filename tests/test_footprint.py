"""Memory of a library in a fresh process, and energy from counters (made-up ones: few machines have them)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qcompiler.runtime.session import Session
from qcompiler.verification.footprint import energy_counters, joules, memory


def test_memory(digits: Callable[[str], Path]) -> None:
    library = digits("x86-avx2")
    found = memory(library)
    manifest = Session(library).manifest
    assert (found.constants, found.workspace) == (manifest["constants"], manifest["workspace"])
    assert found.resident is not None
    assert found.constants // 2 < found.resident < 64 << 20, "it touches its constants; numpy and Python are not its own"


def counters(root: Path, **packages: int) -> None:
    for i, (name, energy) in enumerate(packages.items()):
        folder = root / f"intel-rapl:{i}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(name.replace("_", "-") + "\n")
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text("1000000\n")


def test_energy_is_counted_per_call(tmp_path: Path) -> None:
    """Two packages; one counter goes round; the cores' own counter, part of a package's, is left out."""
    counters(tmp_path, package_0=100, package_1=999_990, core=5)
    assert set(energy_counters(tmp_path)) == {"package-0", "package-1"}
    time = iter(range(100))

    def call() -> None:
        spent = int((tmp_path / "intel-rapl:0" / "energy_uj").read_text()) - 100
        counters(tmp_path, package_0=100 + spent + 30, package_1=(999_990 + (spent + 30) // 3) % 1_000_000, core=5)

    assert joules(call, 3.0, tmp_path, lambda: float(next(time))) == pytest.approx(40e-6)  # 30 and 10 microjoules


def test_no_counter_is_no_number(tmp_path: Path) -> None:
    assert joules(lambda: None, 0.0, tmp_path / "nothing") is None
    counters(tmp_path, package_0=1)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("unreadable")
    assert joules(lambda: None, 0.0, tmp_path) is None
