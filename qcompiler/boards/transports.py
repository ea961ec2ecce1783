"""Reaching a board: files and a command go there, its streams and files come back, in one exchange. The board needs a shell; by ssh also tar.

A board's address, and what its programs say of it, stay here: errors name the board by its name in boards.yaml.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompiler.base.errors import BoardError, BoardLost
from qcompiler.boards.board import Board

MOST = 2 << 30  # bytes that a board may answer with
OUTPUT, COMPLAINTS, STATUS, PID = "qc.out", "qc.err", "qc.status", "qc.pid"  # files of an exchange, in the board's folder
PREFIX = "qcompiler-"


@dataclass(frozen=True)
class Answer:
    """What a command left: exit status (128 + a signal), both streams, and those of the wanted files that it wrote."""

    status: int
    output: str
    complaints: str
    files: Mapping[str, bytes]


class Transport(ABC):
    """The way to one board, and the folder there that is ours while `open` to `close` lasts. `stop`: when it is set, waiting ends with BoardLost."""

    def __init__(self, board: Board, stop: threading.Event) -> None:
        self.board, self.stop, self.folder = board, stop, ""

    def open(self) -> None:
        """Make the folder. Raises BoardError."""
        base = self.board.folder
        made = self.shell(f"umask 077; mkdir -p {shlex.quote(base)} && mktemp -d {shlex.quote(f'{base}/{PREFIX}XXXXXXXX')}", 60)
        folder = made.strip()
        if not re.fullmatch(re.escape(f"{base}/{PREFIX}") + r"\w{8}", folder, re.ASCII):
            raise BoardError(f"board '{self.board.name}': no folder could be made in {base} there; name one that can be written with the key 'folder'")
        self.folder = folder

    def close(self) -> None:
        """Remove the folder, as far as that is possible."""
        if self.folder:
            with contextlib.suppress(BoardError):
                self.shell(f"rm -rf {shlex.quote(self.folder)}", 30, stoppable=False)
        self.folder = ""

    @abstractmethod
    def exchange(self, staying: Mapping[str, bytes], passing: Mapping[str, bytes], command: Sequence[str], wanted: Sequence[str], patience: float) -> Answer:
        """Write files into the folder, run `command` there for at most `patience` seconds, and return what it left. Files `passing` and those `wanted` are
        removed there. Raises BoardError: BoardLost where the board stopped answering."""

    @abstractmethod
    def shell(self, script: str, patience: float, stoppable: bool = True) -> str:
        """What a shell on the board prints for `script`. Raises BoardError when it fails."""

    def _end(self) -> None:
        """End the command of an exchange that took too long, as far as that is possible."""
        with contextlib.suppress(BoardError):
            self.shell(f"kill -9 $(cat {shlex.quote(f'{self.folder}/{PID}')})", 15, stoppable=False)


def connect(board: Board, stop: threading.Event | None = None) -> Transport:
    """The transport of a board; nothing is reached yet. Raises BoardError where the program that it takes is missing."""
    kinds: dict[str, type[Transport]] = {"ssh": Ssh, "adb": Adb, "local": Local, "emulator": Local}
    program = {"ssh": "ssh", "adb": "adb", "emulator": (*board.target.emulator, "")[0]}.get(board.way)
    if program and not shutil.which(program):
        raise BoardError(f"board '{board.name}': {program} is not on PATH; install it, on Debian or Ubuntu it is in {_PACKAGES.get(program, program)}")
    return kinds[board.way](board, stop or threading.Event())


_PACKAGES = {"ssh": "openssh-client", "qemu-aarch64-static": "qemu-user-static", "qemu-arm-static": "qemu-user-static"}


class Local(Transport):
    """This machine, with the target's emulator in front of programs of ours where the board is one."""

    def exchange(self, staying: Mapping[str, bytes], passing: Mapping[str, bytes], command: Sequence[str], wanted: Sequence[str], patience: float) -> Answer:
        folder = Path(self.folder)
        try:
            _remove(folder, wanted)
            for name, data in {**staying, **passing}.items():
                (folder / name).write_bytes(data)
                (folder / name).chmod(0o755)
        except OSError as error:
            raise BoardError(f"board '{self.board.name}': {folder.parent}: can't be written: {error.strerror}") from error
        first = next((i for i, word in enumerate(command) if word.startswith("./")), 0)
        emulator = self.board.target.emulator if self.board.way == "emulator" and command[0] != "sh" else ()
        words = [*command[:first], *emulator, *command[first:]]
        status, output, complaints = piped(words, b"", patience, self.stop, self.board.name, folder)
        found = {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}
        _remove(folder, [*passing, *wanted])
        return Answer(status, output.decode(errors="replace"), complaints, found)

    def shell(self, script: str, patience: float, stoppable: bool = True) -> str:
        status, output, complaints = piped(["sh", "-c", script], b"", patience, self.stop if stoppable else threading.Event(), self.board.name)
        if status:
            raise BoardError(f"board '{self.board.name}': a command failed: {_last(complaints)}")
        return output.decode(errors="replace")


class Ssh(Transport):
    """By the user's own ssh, with the user's configuration, keys and known hosts. Files travel as tar through one connection that is kept open."""

    def __init__(self, board: Board, stop: threading.Event) -> None:
        super().__init__(board, stop)
        self._sockets = tempfile.mkdtemp(prefix="qc-ssh-")  # private, and short enough for the path of a socket
        options = ["BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3", "ControlMaster=auto", "ControlPersist=30"]
        self._command = ["ssh", "-T", *(word for o in [*options, f"ControlPath={self._sockets}/s"] for word in ("-o", o))]

    def close(self) -> None:
        super().close()
        with contextlib.suppress(BoardError):
            piped([*self._command, "-O", "exit", "--", self.board.address], b"", 10, threading.Event(), self.board.name)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def exchange(self, staying: Mapping[str, bytes], passing: Mapping[str, bytes], command: Sequence[str], wanted: Sequence[str], patience: float) -> Answer:
        answers, left = quoted(wanted), quoted([*passing, *wanted])
        packed = f'set -- {STATUS} {OUTPUT} {COMPLAINTS}; for f in {answers}; do [ -f "$f" ] && set -- "$@" "$f"; done; tar -cf - "$@"'
        script = f"cd {shlex.quote(self.folder)} && rm -f {STATUS} {answers} && tar -xof - && {{ {ran(command)}; {packed}; rm -f {left} qc.none; }}"
        try:
            status, output, complaints = self._run(script, _tar({**staying, **passing}), patience, self.stop)
        except BoardLost:
            self._end()
            raise
        found = _untar(output, {STATUS, OUTPUT, COMPLAINTS, *wanted})
        if STATUS not in found:
            raise self._failure(status or 1, complaints)
        return answer(found)

    def shell(self, script: str, patience: float, stoppable: bool = True) -> str:
        status, output, complaints = self._run(script, b"", patience, self.stop if stoppable else threading.Event())
        if status:
            raise self._failure(status, complaints)
        return output.decode(errors="replace")

    def _run(self, script: str, data: bytes, patience: float, stop: threading.Event) -> tuple[int, bytes, str]:
        return piped([*self._command, "--", self.board.address, script], data, patience, stop, self.board.name)

    def _failure(self, status: int, complaints: str) -> BoardError:
        where = f"board '{self.board.name}'"
        by_hand = "connect once by hand (`ssh` with its address) to see why"
        for kind, pattern, meaning in _SSH_TROUBLE:
            if re.search(pattern, complaints, re.IGNORECASE):
                return kind(f"{where}: {meaning}")
        if status == 255:
            return BoardLost(f"{where}: ssh ended with status 255; {by_hand}")
        return BoardLost(f"{where}: its answer was cut short (status {status}); it has no tar or no shell, or the connection broke")


_SSH_TROUBLE: tuple[tuple[type[BoardError], str, str], ...] = (
    (
        BoardError,
        "IDENTIFICATION HAS CHANGED",
        "its host key has changed: another machine may answer. If the board was set up anew, remove its old key (ssh-keygen -R)",
    ),
    (BoardError, "Host key verification failed", "its host key is not known; connect once by hand with ssh and accept it"),
    (
        BoardError,
        "Permission denied|Too many authentication",
        "permission denied; ssh must log in without a question: put your key there, or use an agent",
    ),
    (BoardError, "No space left|Disk quota", "no space left on it; free some, or name another place with the key 'folder'"),
    (BoardError, "Could not resolve|refused|No route|timed out|unreachable|Name or service", "can't be reached; is it on, and is its address right?"),
    (BoardError, "Read-only file system", "its folder can't be written; name another with the key 'folder'"),
    (BoardLost, "closed by|broken pipe|reset by peer|not responding|lost connection", "the connection was lost"),
)


class Adb(Transport):
    """An Android device, by adb of Google's platform tools."""

    def exchange(self, staying: Mapping[str, bytes], passing: Mapping[str, bytes], command: Sequence[str], wanted: Sequence[str], patience: float) -> Answer:
        with tempfile.TemporaryDirectory(prefix="qc-adb-") as made:
            here, files = Path(made), {**staying, **passing}
            for name, data in files.items():
                (here / name).write_bytes(data)
            if files:
                self._adb(["push", *(str(here / name) for name in files), f"{self.folder}/"], patience)
            listed = f'for f in {STATUS} {OUTPUT} {COMPLAINTS} {quoted(wanted)}; do [ -f "$f" ] && echo "$f"; done; true'
            permitted = f"rm -f {STATUS} {quoted(wanted)}; " + (f"chmod 755 {quoted(files)} && " if files else "")
            try:
                there = self.shell(f"cd {shlex.quote(self.folder)} && {permitted}{{ {ran(command)}; {listed}; }}", patience)
            except BoardLost:
                self._end()
                raise
            found: dict[str, bytes] = {}
            for name in {STATUS, OUTPUT, COMPLAINTS, *wanted} & set(there.split("\n")):
                self._adb(["pull", f"{self.folder}/{name}", str(here / "pulled")], patience)
                found[name] = (here / "pulled").read_bytes()
            if passing or wanted:
                self.shell(f"cd {shlex.quote(self.folder)} && rm -f {quoted([*passing, *wanted])}", patience)
        if STATUS not in found:
            raise BoardLost(f"board '{self.board.name}': its answer was cut short")
        return answer(found)

    def shell(self, script: str, patience: float, stoppable: bool = True) -> str:
        return self._adb(["shell", script], patience, stoppable)

    def _adb(self, words: Sequence[str], patience: float, stoppable: bool = True) -> str:
        command = ["adb", "-s", self.board.address, *words]
        status, output, complaints = piped(command, b"", patience, self.stop if stoppable else threading.Event(), self.board.name)
        if not status:
            return output.decode(errors="replace").replace("\r\n", "\n")
        where, said = f"board '{self.board.name}'", complaints + output.decode(errors="replace")
        for kind, pattern, meaning in _ADB_TROUBLE:
            if re.search(pattern, said, re.IGNORECASE):
                raise kind(f"{where}: {meaning}")
        raise BoardLost(f"{where}: adb {words[0]} failed; `adb devices` shows what it sees")


_ADB_TROUBLE: tuple[tuple[type[BoardError], str, str], ...] = (
    (BoardError, "unauthorized", "it has not allowed this computer; unlock it and confirm the key"),
    (BoardError, "not found|no devices", "adb doesn't see it; `adb devices` lists what it sees"),
    (BoardError, "No space left", "no space left on it; free some, or name another place with the key 'folder'"),
    (BoardError, "Permission denied|Read-only", "its folder can't be written; /data/local/tmp can"),
    (BoardLost, "offline|closed|reset", "the connection was lost"),
)


# -- pieces ---------------------------------------------------------------------------------------------------------------------------------


def ran(command: Sequence[str]) -> str:
    """A shell command that runs `command` in the folder it stands in, and leaves its streams, status and process number in files there."""
    words = quoted(command)
    return f"sh -c 'echo $$ > {PID}; exec \"$@\"' sh {words} > {OUTPUT} 2> {COMPLAINTS} < /dev/null; echo $? > {STATUS}"


def quoted(words: Iterable[str]) -> str:
    """Words for a shell."""
    return " ".join(map(shlex.quote, words))


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def answer(found: Mapping[str, bytes]) -> Answer:
    text = found.get(STATUS, b"").decode(errors="replace").strip()
    output, complaints = (found.get(name, b"").decode(errors="replace") for name in (OUTPUT, COMPLAINTS))
    files = {name: data for name, data in found.items() if name not in (STATUS, OUTPUT, COMPLAINTS)}
    return Answer(int(text) if text.isdigit() and len(text) < 5 else 1, output, complaints, files)


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1][:300]


def _tar(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as packed:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(data), 0o755, int(time.time())
            packed.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _untar(data: bytes, wanted: set[str]) -> dict[str, bytes]:
    """The regular files of these names; what else a board sends, or how it ends, is passed over."""
    found: dict[str, bytes] = {}
    with contextlib.suppress(tarfile.TarError, OSError, ValueError, EOFError), tarfile.open(fileobj=io.BytesIO(data), mode="r:") as packed:
        for member in packed:
            if member.isreg() and member.name in wanted and (file := packed.extractfile(member)) is not None:
                content = file.read()
                if len(content) == member.size:
                    found[member.name] = content
    return found


def piped(
    command: Sequence[str], data: bytes, patience: float, stop: threading.Event, name: str, folder: Path | None = None, most: int = MOST
) -> tuple[int, bytes, str]:
    """(exit status, output, complaints) of a program that reads `data`. Raises BoardLost, and ends the program, when it takes longer than `patience` seconds,
    prints more than `most` bytes, or `stop` is set; BoardError when it can't be started."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as complaints:
        given.write(data)
        given.seek(0)
        try:
            process = subprocess.Popen(command, stdin=given, stdout=output, stderr=complaints, cwd=folder, start_new_session=True)
        except OSError as error:
            raise BoardError(f"board '{name}': {command[0]} can't be started: {error.strerror}") from error
        end, why = time.monotonic() + patience, ""
        try:
            while process.poll() is None and not why:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
                printed = os.fstat(output.fileno()).st_size + os.fstat(complaints.fileno()).st_size
                if printed > most:
                    why = f"it answered with more than {most >> 20} MB"
                elif time.monotonic() > end:
                    why = f"no answer within {patience:g} s"
                elif stop.is_set():
                    why = "the work was stopped"
        finally:
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if why:
            raise BoardLost(f"board '{name}': {why}")
        output.seek(0)
        complaints.seek(0)
        status = process.returncode
        return (status if status >= 0 else 128 - status), output.read(), complaints.read(1 << 16).decode(errors="replace")
