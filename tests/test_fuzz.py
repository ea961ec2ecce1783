"""500 damaged files against everything that reads files (`tests/fuzz.py`): never a signal, a hang, or an exception that is no refusal."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest

from qcompiler.base.errors import DataError, InternalError

COUNT = 500


def test_no_damage_is_more_than_a_refusal(digits: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, fuzz.__file__, "--count", str(COUNT), "--library", str(digits("native")), "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert f"{COUNT} cases in " in done.stdout and "; 0 findings" in done.stdout


def test_cases_repeat_and_are_of_every_kind() -> None:
    drawn = [fuzz.chosen(0, n) for n in range(COUNT)]
    assert {case.__name__ for _, case in drawn} == {case.__name__ for _, case in fuzz.CASES}
    assert [case for _, case in drawn] == [fuzz.chosen(0, n)[1] for n in range(COUNT)]
    assert fuzz.damaged(bytes(range(256)), random.Random(3)) == fuzz.damaged(bytes(range(256)), random.Random(3)) != bytes(range(256))


def crash(rng: random.Random, folder: Path, library: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(rng: random.Random, folder: Path, library: Path) -> None:
    while True:
        pass


def sleep(rng: random.Random, folder: Path, library: Path) -> None:
    time.sleep(1000)


def slip(rng: random.Random, folder: Path, library: Path) -> None:
    raise KeyError("x")


def bug(rng: random.Random, folder: Path, library: Path) -> None:
    raise InternalError("ours")


def mute(rng: random.Random, folder: Path, library: Path) -> None:
    raise DataError("")


def refuse(rng: random.Random, folder: Path, library: Path) -> None:
    raise DataError("refused")


@pytest.mark.parametrize(
    ("case", "found"),
    [
        (crash, "SIGSEGV"),
        (hang, "a hang: more than 1 s of CPU"),
        (sleep, "a hang: more than 2 s"),
        (slip, "KeyError: 'x'"),
        (bug, "InternalError: ours"),
        (mute, "an error without a word"),
        (refuse, ""),
    ],
)
def test_what_is_a_finding(case: fuzz.Case, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that the cases behind one that kills its worker are run."""
    monkeypatch.setattr(fuzz, "CASES", [(1, case)])
    monkeypatch.setattr(fuzz, "CPU", 1)
    monkeypatch.setattr(fuzz, "WALL", 2 if case is sleep else 100)
    outcome = fuzz.run(0, 0, 2, 1, tmp_path, tmp_path)
    assert [f.number for f in outcome.findings] == ([0, 1] if found else [])
    assert all(found in f.what for f in outcome.findings)
    assert outcome.refused[case.__name__] == (0 if found else 2)
