"""The verb `farm`: Dask's scheduler, and a Dask worker for each board of a host."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qcompiler.base.errors import BoardError
from qcompiler.boards.board import DEFAULT_FILE, Board, find_board, load_boards
from qcompiler.cli.arguments import common_options
from qcompiler.cli.boards import FILE_HELP
from qcompiler.cli.process import REFUSED

Verb = Callable[..., argparse.ArgumentParser]
LOOPBACK = "127.0.0.1"


def add(verb: Verb) -> None:
    """Add the verb."""
    p = verb("farm", None, "lend boards to others in a network", "The two parts of a farm of boards, both thin wrappers of Dask's: docs/boards.md.")
    parts = p.add_subparsers(title="commands", metavar="COMMAND", required=True)
    q = parts.add_parser(
        "scheduler",
        help="the one process that hands out work",
        description="Run Dask's scheduler. Without TLS and without a --host among its options it listens on this machine only. Whoever reaches it may run "
        "programs on every host of the farm: use TLS, or a network that you trust.",
    )
    q.set_defaults(run=_scheduler)
    q.add_argument("dask", nargs="*", metavar="DASK-OPTION", help="behind a --, options of `dask scheduler`: -- --host HOST --port 8786 --tls-ca-file FILE ...")
    common_options(q, argparse.SUPPRESS)
    q = parts.add_parser(
        "worker",
        help="lends the boards of this host",
        description="Run one Dask worker for each board of boards.yaml. How a board is reached, and what is run there before and after, stays on this host.",
    )
    q.set_defaults(run=_worker)
    q.add_argument("--farm", required=True, metavar="ADDRESS", help="the scheduler's: tls://host:8786, or tcp://host:8786")
    q.add_argument("--boards", default=DEFAULT_FILE, metavar="FILE", help=FILE_HELP)
    q.add_argument("--board", action="append", default=[], metavar="NAME", help="lend this board only; repeat for more")
    q.add_argument("dask", nargs="*", metavar="DASK-OPTION", help="behind a --, options of `dask worker`: -- --tls-ca-file FILE --tls-cert FILE --tls-key FILE")
    common_options(q, argparse.SUPPRESS)


def _scheduler(options: argparse.Namespace) -> int:
    _require_dask()
    words = list(options.dask)
    if not _encrypted(words, "scheduler") and not _among(words, "--host", "--interface"):
        words += ["--host", LOOPBACK]
    if not _among(words, "--dashboard-address", "--no-dashboard"):
        words += ["--dashboard-address", f"{LOOPBACK}:8787"]
    return _both([subprocess.Popen([*_dask("scheduler"), *words])])


def _worker(options: argparse.Namespace) -> int:
    from qcompiler.boards import lender
    from qcompiler.boards.farm import check_address

    known, file = load_boards(options.boards), Path(options.boards).absolute()
    boards = [find_board(known, name, options.boards) for name in dict.fromkeys(options.board)] or list(known.values())
    _require_dask()
    check_address(options.farm, _context(options.dask))

    def command(board: Board) -> list[str]:
        own = ["--name", board.name, "--nthreads", "1", "--nworkers", "1", "--memory-limit", "0", "--no-dashboard"]
        return [*_dask("worker"), options.farm, *own, "--resources", f"{lender.token(board)}=1", "--preload", lender.__name__, *options.dask]

    surroundings = [{**os.environ, lender.FILE: str(file), lender.NAME: board.name} for board in boards]
    return _both([subprocess.Popen(command(board), env=env) for board, env in zip(boards, surroundings, strict=True)])


def _both(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for Dask's processes, and end them with us. They end by themselves where the scheduler does."""
    try:
        while any(p.poll() is None for p in processes):
            time.sleep(0.2)
    finally:
        for process in processes:
            with contextlib.suppress(OSError):
                process.terminate()
        for process in processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
    return REFUSED if any(p.returncode for p in processes) else 0


def _dask(part: str) -> list[str]:
    return [sys.executable, "-m", "dask", part]


def _require_dask() -> None:
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise BoardError("a farm needs Dask: pip install 'qcompiler[farm]'") from error


def _among(words: Sequence[str], *names: str) -> bool:
    return any(word.split("=")[0] in names for word in words)


def _encrypted(words: Sequence[str], role: str) -> bool:
    import dask
    import distributed  # noqa: F401  # its defaults of the configuration

    return _among(words, "--tls-cert") or bool(dask.config.get(f"distributed.comm.tls.{role}.cert", None))


def _context(words: Sequence[str]) -> ssl.SSLContext | None:
    """What a worker with these options knocks at the scheduler's door with."""
    from distributed.security import Security

    from qcompiler.boards.farm import context_of

    given = dict(itertools.pairwise(words)) | dict(w.split("=", 1) for w in words if "=" in w)
    names = {"tls_ca_file": "--tls-ca-file", "tls_worker_cert": "--tls-cert", "tls_worker_key": "--tls-key"}
    return context_of(Security(**{name: given[option] for name, option in names.items() if option in given}), "worker")
