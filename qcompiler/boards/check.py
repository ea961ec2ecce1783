"""What a board is, and whether it is fit for work: reachable, the right machine, cool, with room, and right about the canary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from qcompiler.base.errors import BoardError, QCompilerError
from qcompiler.base.targets import Target
from qcompiler.boards.board import Board
from qcompiler.boards.canary import Canary, make_canary, sing
from qcompiler.boards.device import Device, opened

LEAST_FREE = 128 << 20  # bytes: a round of candidates, and what runs beside it

# Prints key=value lines; every one may be missing.
_PROBE = """\
core=${1:-0}
echo "machine=$(uname -m)"
echo "kernel=$(uname -r)"
if [ -e /system/bin/linker64 ] || [ -e /system/bin/linker ]; then echo "libc=bionic"
else echo "libc=$( { getconf GNU_LIBC_VERSION 2>/dev/null || ldd --version 2>&1; } | head -n 1)"; fi
echo "cores=$(grep -c '^processor' /proc/cpuinfo 2>/dev/null)"
for line in features:Features flags:flags; do
  echo "${line%%:*}=$(grep -m 1 "^${line#*:}" /proc/cpuinfo 2>/dev/null | cut -d: -f2)"
done
frequency=/sys/devices/system/cpu/cpu$core/cpufreq
[ -r $frequency/scaling_cur_freq ] && echo "clock=$(cat $frequency/scaling_cur_freq)"
[ -r $frequency/scaling_governor ] && echo "governor=$(cat $frequency/scaling_governor)"
[ -n "$2" ] && [ -r "$2" ] && echo "temperature=$(cat "$2")"
df -Pk . 2>/dev/null | { read -r line; read -r a b c free rest; echo "free=$free"; }
exit 0
"""


@dataclass
class Checked:
    """A board as it was found. clock: MHz of the first core used. temperature: degrees Celsius. free: bytes in its folder. digest, seconds: of the canary.
    trouble: why it is not fit, empty where it is."""

    board: Board
    machine: str = ""
    kernel: str = ""
    libc: str = ""
    cores: int | None = None
    missing: tuple[str, ...] = ()
    clock: float | None = None
    governor: str = ""
    temperature: float | None = None
    free: int | None = None
    digest: str = ""
    seconds: float | None = None
    trouble: str = ""

    def to_json(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k != "board"}
        return {"name": self.board.name, "target": self.board.target.name, "core": self.board.core, "way": self.board.way, **own}


def probe(device: Device) -> Checked:
    """What the board says of itself. Raises BoardError."""
    board = device.board
    words = ["sh", "./probe.sh", str((board.cores or (0,))[0]), board.temperature]
    answer = device.run(words, passing={"probe.sh": _PROBE.encode()}, patience=60)
    said = {key: value.strip() for line in answer.output.splitlines() for key, _, value in [line.partition("=")]}
    if not said.get("machine"):
        raise device.failed(answer, "its shell")
    found = Checked(board, _plain(said["machine"]), _plain(said.get("kernel", "")), _plain(said.get("libc", "")), governor=_plain(said.get("governor", "")))
    found.cores, kilohertz, milli, free = (_number(said.get(key, "")) for key in ("cores", "clock", "temperature", "free"))
    found.clock, found.temperature = kilohertz and kilohertz / 1e3, None if milli is None else milli / 1e3
    found.free = None if free is None else free << 10
    listed = set(said.get("flags" if board.target.architecture == "x86_64" else "features", "").split())
    if "asimd" in listed:  # how a 64-bit kernel calls what 32-bit programs know as NEON
        listed.add("neon")
    if listed and not board.target.gpu:
        found.missing = tuple(f for f in board.target.features if f not in listed)
    return found


def _plain(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:60]


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() and len(text) < 16 else None


def judge(device: Device, found: Checked, canary: Canary) -> None:
    """Complete what was found with the canary's song, and say what is wrong. Raises BoardError where that ends the matter."""
    board, names = device.board, {"armv7a": ("armv7l", "armv8l", "aarch64"), "x86_64": ("x86_64", "amd64"), "aarch64": ("aarch64", "arm64")}
    wanted = board.target.host_architecture
    where = f"board '{board.name}'"
    if board.way != "emulator" and found.machine not in names.get(wanted, (wanted,)):
        raise BoardError(f"{where}: is {found.machine}, and its target {board.target.name} is for {wanted}")
    if found.missing and board.way != "emulator":
        raise BoardError(f"{where}: its CPU lacks {', '.join(found.missing)}, which {board.target.name} needs; name another target")
    if found.free is not None and found.free < LEAST_FREE:
        raise BoardError(f"{where}: {found.free >> 20} MB are free in its folder, {LEAST_FREE >> 20} are needed; free some, or name another place ('folder')")
    found.digest, found.seconds = sing(device, canary)


def too_hot(board: Board, found: Checked) -> bool:
    return board.hottest is not None and found.temperature is not None and found.temperature >= board.hottest


def check_boards(boards: Sequence[Board]) -> list[Checked]:
    """Look at every board, all at once. A board that is not fit says why; nothing is raised for one."""
    canaries: dict[Target, Canary | QCompilerError] = {}
    for target in dict.fromkeys(b.target for b in boards):
        try:
            canaries[target] = make_canary(target)
        except QCompilerError as error:  # its compiler is missing, say
            canaries[target] = error
    with ThreadPoolExecutor(len(boards)) as pool:
        return list(pool.map(lambda board: _check(board, canaries), boards))


def _check(board: Board, canaries: Mapping[Target, Canary | QCompilerError]) -> Checked:
    found = Checked(board)
    try:
        with opened(board) as device:
            found = probe(device)
            canary = canaries[board.target]
            if isinstance(canary, QCompilerError):
                raise canary
            judge(device, found, canary)
            if too_hot(board, found):
                raise BoardError(f"is at {found.temperature:g} degrees, {board.hottest:g} is its limit ('hottest'); let it cool")
    except QCompilerError as error:
        found.trouble = str(error).removeprefix(f"board '{board.name}': ")
    return found
