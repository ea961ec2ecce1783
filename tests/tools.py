"""What tests need that a machine may lack: each test that lacks it is skipped, and the end of the run says what was not tested and how to get it.

Where QCOMPILER_REQUIRE_TOOLS is 1, as in CI, a missing program or module fails the test instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from qcompiler.base.errors import TargetError
from qcompiler.base.targets import Target, find_target, host_architecture

HERE = Path(sys.executable)
PYTHON = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
APT, PIP, SET = "apt-get install", f"{PYTHON} -m pip install", "set"
PROGRAMS = {
    "g++": (APT, "g++"),
    "aarch64-linux-gnu-g++": (APT, "g++-aarch64-linux-gnu"),
    "arm-linux-gnueabihf-g++": (APT, "g++-arm-linux-gnueabihf"),
    "qemu-aarch64-static": (APT, "qemu-user-static"),
    "qemu-arm-static": (APT, "qemu-user-static"),
    "openssl": (APT, "openssl"),
    "sshd": (APT, "openssh-server"),
    "ssh": (APT, "openssh-client"),
    "clang-19": (APT, "clang-19"),
    "lld-19": (APT, "lld-19"),
    "cmake": (APT, "cmake"),
    "java": (APT, "default-jdk-headless"),
    "javac": (APT, "default-jdk-headless"),
    "valgrind": (APT, "valgrind"),
    "chromium": (APT, "chromium"),
    "nvcc": (PIP, "nvidia-cuda-nvcc"),
    "nvdisasm": (PIP, "nvidia-cuda-nvdisasm"),
}
"""What installs a program on Debian or Ubuntu, or as a Python package."""


class NotTested(pytest.skip.Exception):
    """`what` is not tested for want of `lacks`; each remedy is a command and its argument."""

    def __init__(self, what: str, lacks: Iterable[str], remedies: Iterable[tuple[str, str]]) -> None:
        self.what, self.lacks, self.remedies = what, list(lacks), list(dict.fromkeys(remedies))
        super().__init__(f"{what} NOT TESTED: no {', '.join(self.lacks)} ({one_line(self.remedies)})")


def one_line(remedies: Iterable[tuple[str, str]]) -> str:
    """The command that does all of them; what is to be set comes first, and then it is the tests' own command."""
    by_verb: dict[str, list[str]] = defaultdict(list)
    for verb, argument in remedies:
        if argument not in by_verb[verb]:
            by_verb[verb].append(argument)
    commands = [f"{verb} {' '.join(sorted(by_verb[verb]))}" for verb in (APT, PIP) if by_verb[verb]]
    return " && ".join(commands + ([f"{' '.join(sorted(by_verb[SET]))} make test"] if by_verb[SET] else []))


# -- what a test may ask for --------------------------------------------------------------------------------------------------------------


def require_programs(what: str, *names: str) -> None:
    """Programs on PATH."""
    lack(what, [n for n in names if not shutil.which(n, path=f"{os.environ.get('PATH', '')}:/usr/sbin")])


def lack(what: str, names: list[str]) -> None:
    """Skip, or fail, for want of the programs `names`, if there are any."""
    if not names:
        return
    missing = NotTested(what, names, [PROGRAMS[n] for n in names])
    if os.environ.get("QCOMPILER_REQUIRE_TOOLS") == "1":
        pytest.fail(str(missing))
    raise missing


def require_target(target: Target) -> None:
    """What links libraries for a target and runs them: a cross compiler and an emulator."""
    emulator = [] if target.architecture == host_architecture() else target.emulator[:1]
    require_programs(target.name, *target.compiler[:1], *emulator)


def require_nvcc() -> None:
    from qcompiler.backend.cuda import find_nvcc  # not above: it imports TVM

    try:
        find_nvcc(find_target("cuda-sm80"))
    except TargetError:
        lack("CUDA libraries", ["nvcc"])


def require_nvdisasm() -> str:
    """The path of nvdisasm: of a toolkit, or of the Python package."""
    places = [Path(p) for p in (shutil.which("nvdisasm") or "", "/usr/local/cuda/bin/nvdisasm") if p]
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package else []:
        places += sorted(Path(folder).glob("*/bin/nvdisasm"))
    found = [str(p) for p in places if p.is_file()]
    lack("machine code of GPU kernels", [] if found else ["nvdisasm"])
    return found[0]


def require_browser() -> str:
    """The name of a Chromium."""
    found = [b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)]
    lack("how a browser shows the report", [] if found else ["chromium"])
    return found[0]


def require_module(name: str, package: str = "", peer: bool = False) -> Any:
    """A Python module of another project; `package` has it, if that is named otherwise. peer: a rival that is measured, which CI does without."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing = NotTested(f"against {package or name}", [name], [(PIP, package or name)])
        if not peer and os.environ.get("QCOMPILER_REQUIRE_TOOLS") == "1":
            pytest.fail(str(missing))
        raise missing from None


def require_slow(what: str) -> None:
    """That tests of minutes are wanted."""
    if os.environ.get("QCOMPILER_SLOW") != "1":
        raise NotTested(what, ["QCOMPILER_SLOW=1"], [(SET, "QCOMPILER_SLOW=1")])


def require_real_data(beside: Path) -> Path:
    """The folder with real networks and images."""
    folder = Path(os.environ.get("QCOMPILER_DATA") or beside)
    if not (folder / "models").is_dir():
        raise NotTested("real networks", [f"folder {folder}"], [(SET, "QCOMPILER_DATA=FOLDER")])
    return folder


# -- the end of the run -------------------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, NotTested):
        missing = call.excinfo.value
        report.user_properties.append(("not tested", [missing.what, missing.lacks, missing.remedies]))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was not tested, for want of what, and the line that mends it."""
    records = [v for r in terminalreporter.stats.get("skipped", []) for k, v in getattr(r, "user_properties", []) if k == "not tested"]
    if not records:
        return
    lacks: dict[str, set[str]] = defaultdict(set)
    for what, missing, _ in records:
        lacks[what].update(missing)
    terminalreporter.section("NOT TESTED", yellow=True)
    for what, missing in lacks.items():
        count = sum(w == what for w, _, _ in records)
        terminalreporter.line(f"{what}: {count} test{'s' * (count > 1)}, for want of {', '.join(sorted(missing))}", yellow=True)
    terminalreporter.line(f"To test these too: {one_line(tuple(r) for _, _, remedies in records for r in remedies)}", yellow=True, bold=True)
