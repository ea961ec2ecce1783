"""A board in use: a folder of ours on it, the files that stay there, and one exchange at a time, whoever else on this machine uses it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qcompiler.backend.programs import build_measurer, build_runner
from qcompiler.base.errors import BoardError, BoardLost
from qcompiler.base.files import temporary_folder
from qcompiler.base.targets import Target
from qcompiler.boards.board import Board
from qcompiler.boards.transports import Answer, Transport, connect


class Device:
    """An open board; `opened` makes it. `staying` files are sent once; others are gone when an exchange ends."""

    def __init__(self, board: Board, transport: Transport) -> None:
        self.board, self._transport = board, transport
        self._there: dict[str, bytes] = {}  # digests of the files that stayed

    def run(
        self,
        command: Sequence[str],
        *,
        staying: Mapping[str, bytes] = {},
        passing: Mapping[str, bytes] = {},
        wanted: Sequence[str] = (),
        patience: float | None = None,
    ) -> Answer:
        """Run one of the files sent (`./name`), or `sh` on one, on the board's cores. patience: seconds, the board's own where None.

        Raises BoardError: BoardLost where the board stopped answering.
        """
        new = self._missing(staying)
        words = [*self._pinned(), *command] if command[0].startswith("./") else list(command)
        with _turn(self.board, self._transport.stop):
            answer = self._transport.exchange(new, passing, words, wanted, self.board.patience if patience is None else patience)
        self._stayed(new)
        return answer

    def _missing(self, staying: Mapping[str, bytes]) -> dict[str, bytes]:
        """Those of the files that are not there yet."""
        return {name: data for name, data in staying.items() if self._there.get(name) != hashlib.sha256(data).digest()}

    def _stayed(self, new: Mapping[str, bytes]) -> None:
        self._there |= {name: hashlib.sha256(data).digest() for name, data in new.items()}

    def _pinned(self) -> list[str]:
        return ["taskset", f"{sum(1 << c for c in self.board.cores):x}"] if self.board.cores else []

    def failed(self, answer: Answer, what: str) -> BoardError:
        """What a program of ours that ended badly means."""
        said = (answer.complaints.strip().splitlines() or [f"status {answer.status}"])[-1][:400].removeprefix("error: ")
        if "Exec format error" in said or answer.status in (126, 127):
            said = {126: f"{said}; the board has another architecture than {self.board.target.name}"}.get(answer.status, said)
            said += "; it lacks that program, or the libc that programs for this target want" if answer.status == 127 else ""
        elif answer.status > 128:
            said = f"ended by signal {answer.status - 128}"
        return BoardError(f"board '{self.board.name}': {what}: {said}")


@contextlib.contextmanager
def opened(board: Board, stop: threading.Event | None = None) -> Iterator[Device]:
    """Reach a board, make the folder there, run its commands `before`; at the end the commands `after`, and nothing of ours is left there.

    Raises BoardError.
    """
    if board.lender is not None:
        with board.lender.lent(board, stop or threading.Event()) as device:
            yield device
        return
    transport = connect(board, stop)
    try:
        transport.open()
        try:
            for number, command in enumerate(board.before):
                _own(transport, command, f"command {number + 1} of 'before'")
            yield Device(board, transport)
        finally:
            for command in board.after:
                with contextlib.suppress(BoardError):
                    _own(transport, command, "after")
    finally:
        transport.close()


def _own(transport: Transport, command: str, what: str) -> None:
    try:
        transport.shell(command, 60, stoppable=False)
    except BoardLost as error:
        raise BoardError(f"board '{transport.board.name}': {what} failed") from error


@contextlib.contextmanager
def _turn(board: Board, stop: threading.Event) -> Iterator[None]:
    """The board to ourselves, among the processes of this user on this machine: a lock of the kernel's, which ends with its process."""
    folder = Path(tempfile.gettempdir()) / f"qcompiler-boards-{os.getuid()}"
    place = hashlib.sha256(f"{board.way} {board.address}".encode()).hexdigest()[:24]
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        file = os.open(folder / place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BoardError(f"{folder}: can't be written: {error.strerror}") from error
    try:
        while not stop.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.05)
        yield
    finally:
        os.close(file)


@functools.cache
def program(name: str, target: Target) -> bytes:
    """`qc_run` or `qc_measure` for a target. Raises TargetError."""
    with temporary_folder() as folder:
        (build_runner if name == "qc_run" else build_measurer)(folder / name, target)
        return (folder / name).read_bytes()
