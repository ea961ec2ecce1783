"""Fixtures that several test files share."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

if TYPE_CHECKING:
    from qcompiler.pipeline.library import Compilation

pytest_plugins = ["tools"]
ROOT = Path(__file__).resolve().parent.parent


LONG = (
    "test_first_hour.py",
    "test_operator_page.py",
    "test_onnx_suite.py",
    "test_x86_networks.py",
    "test_arm.py",
    "test_pipeline.py",
    "test_cuda.py",
    "test_kernels_conv.py",
    "test_kernels_arm.py",
    "test_kernels_winograd.py",
    "test_accuracy_target.py",
    "test_example_scripts.py",
)
"""Files that take long, or are one long test. Begun last, each would keep one core busy when the others have nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first."""
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let Python's handler of crashes have the last word, which says what ran: TVM installs its own when it is imported."""
    if faulthandler.is_enabled():
        faulthandler.disable()
        faulthandler.enable(session.config.stash[fault_handler_stderr_fd_key])


def pytest_configure(config: pytest.Config) -> None:
    """Processes of one run share compiled kernels; no run takes those of another."""
    if "PYTEST_XDIST_WORKER" not in os.environ and "QCOMPILER_CACHE" not in os.environ:
        os.environ["QCOMPILER_CACHE"] = folder = tempfile.mkdtemp(prefix="kernels-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory with real networks and images; the test is skipped where there is none."""
    from tools import require_real_data

    return require_real_data(ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """digits("x86-avx2"): the example network compiled for a target; compiled once, for all processes of this run. Not to be changed."""
    import qcompiler
    from qcompiler.base.targets import find_target
    from qcompiler.cli.demo import MODEL, demo_data

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "digits"  # a worker's folder lies in that of the run
    folder.mkdir(exist_ok=True)

    def compiled(target: str) -> Path:
        path = folder / f"{find_target(target).name}.so"
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                qcompiler.compile(MODEL, target=target, calibration=demo_data()[0][:40], preset="fast").save(path)
        return path

    return compiled


@pytest.fixture(scope="session")
def digits_compilation() -> Compilation:
    """The same for this machine, with all that led to it. Not to be changed."""
    from qcompiler.cli.demo import MODEL, demo_data
    from qcompiler.pipeline.compile import compile_stages

    return compile_stages(MODEL, "native", demo_data()[0][:40], preset="fast")
