"""How a test run ends: with a failure that names the test whose process died or hung, and with what this machine could not test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = """
from tools import require_module, require_programs, require_slow
import pytest

@pytest.mark.parametrize("example", [1, 2])
def test_bundle(example):
    require_programs("bundles", "cmake", "valgrind")

def test_arm():
    require_programs("Arm", "qemu-aarch64-static")

def test_rival():
    require_module("no_such_rival", "no-such-rival")

def test_slow():
    require_slow("large networks")

def test_everywhere():
    pass
"""


LIMIT = "faulthandler_timeout=3"  # of each test; importing what it needs does not count


def run(root: Path, folder: Path, text: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest, configured as for this suite, on one file of tests."""
    (folder / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-c", str(root / "pyproject.toml"), f"--rootdir={folder}", "-p", "conftest", "-p", "no:cacheprovider"]
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "QCOMPILER_"))} | {"PYTHONPATH": str(root / "tests")} | environment
    return subprocess.run([*command, *options, "test_it.py"], cwd=folder, env=variables, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "death",
    ["os.abort()", "import tvm; ctypes.string_at(0)", "ctypes.PyDLL(None).sleep(600)", "time.sleep(600)"],
    ids=["aborts", "faults-beside-tvm", "hangs-in-native-code", "hangs"],
)
def test_a_process_that_dies_is_a_failure_of_its_test(death: str, root: Path, tmp_path: Path) -> None:
    load, _, act = death.rpartition("; ")
    text = f"import ctypes, os, time, pytest\n{load}\n@pytest.mark.parametrize('i', range(4))\ndef test_one(i):\n    if i == 2:\n        {act}\n"
    many = run(root, tmp_path, text, "-n", "1", "--dist", "loadfile", "-o", LIMIT)
    assert many.returncode == 1, many.stdout + many.stderr
    assert "FAILED test_it.py::test_one[2] - worker 'gw" in many.stdout and "1 failed, 2 passed" in many.stdout
    alone = run(root, tmp_path, text, "-o", LIMIT)
    assert alone.returncode not in (0, 5) and 'test_it.py", line 6 in test_one' in alone.stderr


def test_every_test_has_a_time_limit(pytestconfig: pytest.Config) -> None:
    assert 0 < float(pytestconfig.getini("faulthandler_timeout")) <= 900 and pytestconfig.getini("faulthandler_exit_on_timeout") is True


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "workers"])
def test_what_was_not_tested_stands_at_the_end(options: tuple[str, ...], root: Path, tmp_path: Path) -> None:
    done = run(root, tmp_path, TOOLS, *options, PATH=str(tmp_path))
    assert done.returncode == 0 and "1 passed, 5 skipped" in done.stdout, done.stdout + done.stderr
    end = done.stdout[done.stdout.index("= NOT TESTED =") :].splitlines()[1:]
    assert end[:4] == [
        "bundles: 2 tests, for want of cmake, valgrind",
        "Arm: 1 test, for want of qemu-aarch64-static",
        "against no-such-rival: 1 test, for want of no_such_rival",
        "large networks: 1 test, for want of QCOMPILER_SLOW=1",
    ]
    install = f"apt-get install cmake qemu-user-static valgrind && {sys.executable} -m pip install no-such-rival && QCOMPILER_SLOW=1 make test"
    assert end[4] == f"To test these too: {install}"


def test_missing_programs_fail_where_they_are_required(root: Path, tmp_path: Path) -> None:
    done = run(root, tmp_path, TOOLS, PATH=str(tmp_path), QCOMPILER_REQUIRE_TOOLS="1", QCOMPILER_SLOW="1")
    assert done.returncode == 1 and "4 failed, 2 passed" in done.stdout
    assert "Failed: bundles NOT TESTED: no cmake, valgrind (apt-get install cmake valgrind)" in done.stdout


def test_nothing_is_said_where_all_was_tested(root: Path, tmp_path: Path) -> None:
    assert "NOT TESTED" not in run(root, tmp_path, "def test_everywhere():\n    pass\n").stdout
