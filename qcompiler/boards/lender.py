"""A worker of a farm: a Dask process that holds one board, and does on it what the farm's clients ask for, one exchange at a time.

Dask loads this file into the process (`dask worker --preload qcompiler.boards.lender`), runs `serve` as a task that takes the board's token, and `described`
and `stopped` beside it. Each client has a folder of its own on the board, an open `Device`, until it says that it has finished or is not heard of for a while.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from qcompiler.base.errors import BoardError, BoardLost, QCompilerError
from qcompiler.boards.board import Board, find_board, load_boards
from qcompiler.boards.device import Device, opened
from qcompiler.boards.parcel import packed, unpacked

PROTOCOL = 1
FILE, NAME = "QCOMPILER_FARM_BOARDS", "QCOMPILER_FARM_BOARD"  # the environment of the process: boards.yaml, and which of its boards
IDLE = 900  # seconds after which a client that is not heard of has gone


@dataclass
class _Session:
    """A client's: the open board, and what ends its waiting."""

    device: Device
    close: contextlib.ExitStack
    stop: threading.Event
    used: float = field(default_factory=time.monotonic)


_sessions: dict[str, _Session] = {}
_ended: set[str] = set()  # sessions that were told to stop before they began
_one_at_a_time = threading.Lock()


def board() -> Board:
    """The board of this process. Raises BoardError."""
    path = os.environ[FILE]
    return find_board(load_boards(path), os.environ[NAME], path)


def token(which: Board) -> str:
    """The name of the abstract resource of which the board's worker has one: what a task for it takes."""
    return f"qc/{which.name}/{which.target.name}/{which.core}"


def described() -> bytes:
    """What a client has to know of the board; nothing of how it is reached."""
    own = board()
    known = {"cores": list(own.cores), "temperature": own.temperature, "hottest": own.hottest, "patience": own.patience}
    return packed({"protocol": PROTOCOL, "name": own.name, "way": own.way, "target": own.target.name, "core": own.core, **known})


def serve(request: bytes) -> bytes:
    """Do one thing for a client: open, run, or close its session. Errors are answers too."""
    try:
        with _one_at_a_time:
            _forget()
            return _done(*unpacked(request))
    except QCompilerError as error:
        return packed({"error": str(error), "lost": isinstance(error, BoardLost)})
    except Exception as error:  # a bug, or a request of another version; its text may name what is private
        return packed({"error": f"board '{os.environ[NAME]}': its worker failed ({type(error).__name__})", "lost": True})


def stopped(session: str) -> None:
    """End what a session waits for, now and from now on."""
    _ended.add(session)
    if found := _sessions.get(session):
        found.stop.set()


def _done(head: dict[str, Any], files: dict[str, bytes]) -> bytes:
    if head["protocol"] != PROTOCOL:
        raise BoardError(f"board '{os.environ[NAME]}': its worker has another version of qcompiler; install the same one there")
    name, what = head["session"], head["what"]
    if what == "close":
        _close(name)
        return packed({})
    if what == "open":
        _close(name)
        stack, stop = contextlib.ExitStack(), threading.Event()
        if name in _ended:
            raise BoardLost(f"board '{os.environ[NAME]}': the work was stopped")
        with stack:
            device = stack.enter_context(opened(board(), stop))
            _sessions[name] = _Session(device, stack.pop_all(), stop)
        return packed({})
    session = _sessions.get(name)
    if session is None:
        return packed({"gone": True})
    staying = {n: files[n] for n in head["staying"]}
    passing = {n: files[n] for n in head["passing"]}
    try:
        answer = session.device.run(head["command"], staying=staying, passing=passing, wanted=head["wanted"], patience=head["patience"])
    finally:
        session.used = time.monotonic()
    return packed({"status": answer.status, "output": answer.output, "complaints": answer.complaints}, answer.files)


def _close(name: str) -> None:
    if session := _sessions.pop(name, None):
        session.close.close()


def _forget() -> None:
    """Leave the board for clients that have gone."""
    for name in [n for n, s in _sessions.items() if time.monotonic() - s.used > IDLE]:
        _close(name)


# -- Dask's hooks -----------------------------------------------------------------------------------------------------------------------------


async def dask_setup(worker: Any) -> None:
    """Look at the clock now and then, so that a client that vanished leaves the board as it was."""
    import asyncio

    async def watch() -> None:
        while True:
            await asyncio.sleep(60)
            if _one_at_a_time.acquire(blocking=False):
                try:
                    await asyncio.to_thread(_forget)
                finally:
                    _one_at_a_time.release()

    worker._qcompiler_watch = asyncio.create_task(watch())


async def dask_teardown(worker: Any) -> None:
    worker._qcompiler_watch.cancel()
    for name in list(_sessions):
        stopped(name)
        _close(name)
