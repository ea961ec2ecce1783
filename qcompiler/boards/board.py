"""Boards as people describe them: rows of boards.yaml, validated.

boards:
  pi4:
    target: arm64-neon             # a row of `qcompiler targets`
    core: cortex-a72               # whose records tuning writes
    ssh: pi@raspberry              # or adb: SERIAL, local: true, emulator: true (of the target's row)
    cores: [2, 3]                  # to run on; all when left out
    folder: /tmp                   # where a folder of our own is made, and removed again
    before: [sudo cpupower frequency-set -g performance]
    after: [sudo cpupower frequency-set -g ondemand]
    temperature: /sys/class/thermal/thermal_zone0/temp
    hottest: 75                    # degrees Celsius from which a tune leaves the board alone
    patience: 600                  # seconds that one answer may take
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qcompiler.base.errors import BoardError, TargetError, closest
from qcompiler.base.targets import Target, find_target
from qcompiler.base.yaml_file import read_yaml

WAYS = ("ssh", "adb", "local", "emulator")
"""How a board is reached."""

DEFAULT_FILE = "boards.yaml"
_FOLDERS = {"adb": "/data/local/tmp"}
_TEXTS = ("core", "folder", "temperature")
_KEYS = ("target", *_TEXTS, *WAYS, "cores", "before", "after", "hottest", "patience")


class Lender(Protocol):
    """Who reaches a board for us, where this process does not."""

    def lent(self, board: Board, stop: threading.Event) -> AbstractContextManager[Any]:
        """The board, open: a `Device`. When `stop` is set, waiting ends with BoardLost. Raises BoardError."""

    def present(self, board: Board) -> bool:
        """Whether it could be lent now."""


@dataclass(frozen=True)
class Board:
    """A row of boards.yaml. way: one of `WAYS`; address: what that program calls the board. cores: numbers of CPUs, none: all. before, after: commands that
    a shell on the board runs around a piece of work. temperature: a file there, in thousandths of a degree. hottest: degrees Celsius. patience: seconds.
    lender: who reaches it, None: this process."""

    name: str
    target: Target
    way: str
    address: str = ""
    core: str = ""
    folder: str = "/tmp"
    cores: tuple[int, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    temperature: str = ""
    hottest: float | None = None
    patience: float = 600.0
    lender: Lender | None = None


def load_boards(path: str | os.PathLike[str], targets_file: str | os.PathLike[str] | None = None) -> dict[str, Board]:
    """All boards of a file, by name, in order. Raises BoardError for a malformed one, naming the board and the key."""
    path = Path(path)
    try:
        document = read_yaml(path)
    except ValueError as error:
        hint = "; name one with --boards FILE" if not path.exists() else ""
        raise BoardError(f"{path}: {error}{hint}") from error
    if not isinstance(document, dict) or set(document) != {"boards"} or not isinstance(document["boards"], dict) or not document["boards"]:
        raise BoardError(f"{path}: expected one mapping with the key 'boards', {{name: {{target: ..., ssh: user@host}}}}")
    return {str(name): _board(f"{path}: board '{name}'", str(name), fields, targets_file) for name, fields in document["boards"].items()}


def find_board(boards: dict[str, Board], name: str, path: str | os.PathLike[str]) -> Board:
    """Raises BoardError for a name that the file doesn't have."""
    if name not in boards:
        raise BoardError(f"{path}: no board '{name}'.{closest(name, list(boards))} Boards: {', '.join(boards)}")
    return boards[name]


def _board(where: str, name: str, fields: Any, targets_file: str | os.PathLike[str] | None) -> Board:
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise BoardError(f"{where}: a name has letters, digits and . _ - only")
    if not isinstance(fields, dict):
        raise BoardError(f"{where}: expected a mapping")
    for key in fields:
        if key not in _KEYS:
            raise BoardError(f"{where}: unknown key '{key}'.{closest(str(key), list(_KEYS))} Known: {', '.join(_KEYS)}")
    ways = [w for w in WAYS if w in fields]
    if len(ways) != 1:
        raise BoardError(f"{where}: exactly one of {', '.join(WAYS)} says how to reach it; found {', '.join(ways) or 'none'}")
    if not isinstance(fields.get("target"), str):
        raise BoardError(f"{where}: 'target' is missing; it is a row of `qcompiler targets`")
    try:
        target = find_target(fields["target"], targets_file)
    except TargetError as error:
        raise BoardError(f"{where}: {error}") from error
    texts = {key: fields[key] for key in _TEXTS if key in fields}
    for key, value in texts.items():
        if not isinstance(value, str) or not value.isprintable() or not value:
            raise BoardError(f"{where}: '{key}' is {value!r}; expected a text")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", texts.get("core", "a")):
        raise BoardError(f"{where}: 'core' is {texts['core']!r}; expected a name such as cortex-a72: small letters, digits, . + -")
    texts.setdefault("folder", _FOLDERS.get(ways[0], "/tmp"))
    if not texts["folder"].startswith("/"):
        raise BoardError(f"{where}: 'folder' is {texts['folder']!r}; expected a path that begins with /")
    if ways[0] == "emulator" and not target.emulator:
        raise BoardError(f"{where}: the target {target.name} has no emulator")
    more: dict[str, Any] = {key: _commands(where, key, fields[key]) for key in ("before", "after") if key in fields}
    more |= {key: _positive(where, key, fields[key]) for key in ("hottest", "patience") if key in fields}
    return Board(name, target, ways[0], _address(where, ways[0], fields[ways[0]]), **texts, cores=_cores(where, fields.get("cores", [])), **more)


def _address(where: str, way: str, value: Any) -> str:
    if way in ("local", "emulator"):
        if value is not True:
            raise BoardError(f"{where}: '{way}' is {value!r}; expected true")
        return ""
    if not isinstance(value, (str, int)) or isinstance(value, bool) or not re.fullmatch(r"[^\s-]\S*", str(value)):
        raise BoardError(f"{where}: '{way}' is {value!r}; expected {'user@host, or a name of your ssh configuration' if way == 'ssh' else 'a serial number'}")
    return str(value)


def _cores(where: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(c, int) and not isinstance(c, bool) and 0 <= c < 1024 for c in value):
        raise BoardError(f"{where}: 'cores' is {value!r}; expected a list of CPU numbers, such as [2, 3]")
    return tuple(dict.fromkeys(value))


def _commands(where: str, key: str, value: Any) -> tuple[str, ...]:
    commands = [value] if isinstance(value, str) else value
    if not isinstance(commands, list) or not all(isinstance(c, str) and c.strip() for c in commands):
        raise BoardError(f"{where}: '{key}' is a command, or a list of commands")
    return tuple(commands)


def _positive(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise BoardError(f"{where}: '{key}' is {value!r}; expected a positive number")
    return float(value)
