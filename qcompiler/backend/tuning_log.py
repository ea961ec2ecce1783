"""Tuning logs: which tunables were measured for which workload, how fast they were, and which to compile with.

A log is a folder with one file of JSON lines per ISA. A line is one measured candidate, complete in itself:

    {"schema": 1, "isa", "row", "workload": {...}, "params": {...}, "ratio", "seconds": [...], "threads", "host"[, "core"]}

`core` is the type of core that was measured, as people name it (cortex-a72), where one was named. A record is the answer for that core alone; for others of the
same ISA it is a point to start from.
`ratio` is the candidate's time over that of the row's default, both timed in turns by one process: below 1 is faster. `seconds` is the least time
on one thread and, where `threads` is more than 1, the least on so many. Every `ratio` belongs to a kernel that was bit-exact. A line with
`"failed": reason` instead of `ratio` keeps a candidate that could not be built or timed from being tried again. Lines are only ever appended, each
with a single write.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import hashlib
import json
import math
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompiler.base.errors import OutputError, TuningError
from qcompiler.base.files import about, parse_json, read_regular, replacing
from qcompiler.base.targets import Target
from qcompiler.schedules.table import Layout, OpCall, Row

SCHEMA = 1
SHIPPED = Path(__file__).resolve().parent / "shipped_log"
SUFFIX, LOCK = ".jsonl", "lock"

# Attributes that only change numbers a kernel reads, not its code (a clamp adds an instruction at most).
_VALUES = ("zero_point", "multiplier", "shift", "scale", "ratio", "low", "high", "value")


def isa_of(target: Target) -> str:
    """The ISA whose log a target reads and writes: its best kernel row."""
    return target.rows[0]


def workload_of(op: OpCall) -> dict[str, Any]:
    """What decides an operator's code apart from its tunables: shapes, layouts, types and geometry, as plain JSON values."""

    def tensor(layout: Layout) -> list[Any]:
        return [list(layout.shape), layout.dtype, *([list(layout.halo), layout.channel_pitch] if not layout.dense else [])]

    operands = [tensor(o) if isinstance(o, Layout) else [list(o.shape), str(o.dtype), "constant"] for o in op.operands]
    attrs = {k: v for k, v in op.attrs.items() if not k.endswith(_VALUES)}
    return {"op": op.name, "operands": operands, "output": tensor(op.output), "attrs": attrs}


def key_of(row: str, workload: Mapping[str, Any]) -> str:
    """A digest that equal workloads of any two networks share."""
    return hashlib.sha256(_canonical([SCHEMA, row, workload]).encode()).hexdigest()[:16]


def workload_text(workload: Mapping[str, Any]) -> str:
    """A workload in a few words: `1x112x112x32 > 1x112x112x16, 1x1`."""
    operands, attrs = workload["operands"], workload["attrs"]
    words = ["x".join(map(str, operands[0][0])) + " > " + "x".join(map(str, workload["output"][0]))]
    if len(operands) > 1 and len(operands[1][0]) == 4:
        words.append("x".join(map(str, operands[1][0][1:3])))
    if list(attrs.get("strides", [1, 1])) != [1, 1]:
        words.append("/" + "x".join(map(str, attrs["strides"])))
    if attrs.get("groups", 1) not in (1, operands[0][0][-1]):
        words.append(f"{attrs['groups']} groups")
    if sum(o[-1] != "constant" for o in operands) > 1:
        words.append("+ residual")
    return ", ".join(words[:2]) + " ".join(["", *words[2:]])


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Record:
    """One line of a log. `ratio` is infinite for a candidate that failed; see the module's text."""

    isa: str
    row: str
    workload: dict[str, Any]
    params: dict[str, Any]
    ratio: float
    seconds: tuple[float, ...]
    threads: int
    host: str
    failed: str = ""
    core: str = ""

    @property
    def key(self) -> str:
        return key_of(self.row, self.workload)

    @property
    def point(self) -> str:
        """The tunables as text, for comparison."""
        return _canonical(self.params)

    @property
    def rank(self) -> tuple[float, str]:
        """Smaller is better."""
        return (self.ratio, self.point)

    def line(self) -> str:
        fields: dict[str, Any] = {"schema": SCHEMA, "isa": self.isa, "row": self.row, "workload": self.workload, "params": self.params}
        fields |= {"failed": self.failed} if self.failed else {"ratio": round(self.ratio, 5), "seconds": [float(f"{s:.5g}") for s in self.seconds]}
        return _canonical(fields | {"threads": self.threads, "host": self.host} | ({"core": self.core} if self.core else {})) + "\n"

    @staticmethod
    def of_line(text: str) -> Record:
        """Raises ValueError for what is not a complete record, TuningError for a record of another schema version."""
        try:
            f = parse_json(text)
            if f["schema"] != SCHEMA:
                raise TuningError(f"schema version {f['schema']}, this version of qcompiler reads version {SCHEMA}; tune again into another folder")
            failed = str(f.get("failed", ""))
            ratio, seconds = (math.inf, []) if failed else (f["ratio"], f["seconds"])
            names, threads = (f["isa"], f["row"], f["host"], f.get("core", "")), f["threads"]
            times = isinstance(seconds, list) and all(_number(s) and s > 0 for s in seconds)
            if not (times and (failed or (_number(ratio) and ratio > 0)) and _number(threads) and threads >= 1 and all(isinstance(n, str) for n in names)):
                raise ValueError("a field has the wrong form")
            check_workload(f["workload"])
            check_point(f["params"])
            return Record(f["isa"], f["row"], f["workload"], f["params"], float(ratio), tuple(map(float, seconds)), int(threads), f["host"], failed, names[-1])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"missing or malformed: {error}") from error


def _number(value: Any) -> bool:
    """Whether a value is a number as measurements and shapes have them."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1 << 53


def check_workload(workload: Any) -> None:
    """Raises ValueError for what `workload_of` can't have made."""

    def extents(value: Any) -> bool:
        return isinstance(value, list) and all(_number(v) and isinstance(v, int) and v > 0 for v in value)

    def tensor(value: Any) -> bool:
        return isinstance(value, list) and len(value) >= 2 and extents(value[0]) and isinstance(value[1], str)

    operands, attrs = workload["operands"], workload["attrs"]
    geometry = isinstance(attrs, dict) and extents(attrs.get("strides", [1, 1])) and extents([attrs.get("groups", 1)])
    if not (geometry and isinstance(workload["op"], str) and isinstance(operands, list) and operands and all(map(tensor, [*operands, workload["output"]]))):
        raise ValueError("the workload has the wrong form")
    _canonical(workload)


def check_point(params: Any) -> None:
    """Raises ValueError for what can be no point of a design space: tunables are numbers and words."""
    if not isinstance(params, dict) or not all(isinstance(v, (str, bool)) or _number(v) for v in params.values()):
        raise ValueError("the tunables have the wrong form")


# -- reading ------------------------------------------------------------------------------------------------------------------------------


def read_file(path: Path) -> list[Record]:
    """The records of one file. Lines that are no records (the half-written last one of a killed run) are skipped with a warning.

    Raises TuningError when the file can't be read or is of another schema version.
    """
    try:
        lines = read_regular(path).split(b"\n")
    except OSError as error:
        raise TuningError(f"{path}: the tuning log can't be read: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = Record.of_line(line.decode())
        except TuningError as error:
            raise TuningError(f"{path}: line {number} has {error}") from error
        except ValueError:
            warnings.warn(f"{path}: line {number} is not a whole record (a run was stopped while it wrote); skipped", stacklevel=2)
            continue
        if record.isa != path.name.removesuffix(SUFFIX):
            raise TuningError(f"{path}: line {number} was measured for {record.isa}; a file holds one ISA, the one it is named after")
        records.append(record)
    return records


def read_log(folder: str | os.PathLike[str], isa: str | None = None) -> list[Record]:
    """The records of a log; `isa`: of this ISA only.

    Raises TuningError when the folder is missing, unreadable, holds no log, no log of `isa`, or one of another schema version.
    """
    folder = Path(folder)
    try:
        files = _files(folder)
    except OSError as error:
        why = {errno.ENOENT: "missing", errno.ENOTDIR: "a file"}.get(error.errno or 0, error.strerror)
        raise TuningError(f"{folder}: is not a tuning log: {why}; `qcompiler tune --log DIR` makes the folder") from error
    if not files:
        raise TuningError(f"{folder}: no tuning log in this folder (no *{SUFFIX} file); `qcompiler tune --log DIR` makes one")
    if isa is not None:
        found, files = files, [f for f in files if f.name == f"{isa}{SUFFIX}"]
        if not files:
            present = ", ".join(f.name.removesuffix(SUFFIX) for f in found)
            raise TuningError(f"{folder}: the tuning log is for {present}, and {isa} is wanted; times of one ISA say nothing about another. Tune for {isa}")
    return [record for file in files for record in read_file(file)]


def _files(folder: Path) -> list[Path]:
    """Raises OSError."""
    return sorted(folder / name for name in os.listdir(folder) if name.endswith(SUFFIX))


def best_of(records: Iterable[Record]) -> dict[str, Record]:
    """workload key -> its best record, for the workloads that have a measured one."""
    return {key: group[0] for key, group in _ranked(records).items()}


# -- writing ------------------------------------------------------------------------------------------------------------------------------


class LogWriter:
    """Appends records to the log of one ISA. One writer per folder at a time: see `opened`."""

    def __init__(self, folder: Path, isa: str) -> None:
        self.path = folder / f"{isa}{SUFFIX}"
        try:
            self._file = _opened(self.path, os.O_APPEND)
        except OSError as error:
            raise OutputError(f"{self.path}: the tuning log can't be written: {error.strerror}") from error
        size = os.fstat(self._file).st_size
        try:
            if size and os.pread(self._file, 1, size - 1) != b"\n":  # end the torn line, so that the next one is whole
                self._write(b"\n")
        except BaseException:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """Raises OutputError when the disk is full; the file then ends where it did before."""
        self._write(record.line().encode())

    def _write(self, data: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            if written != len(data):
                raise OSError(28, os.strerror(28))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise OutputError(f"{self.path}: the tuning log can't be written: {error.strerror}; everything before is safe, run again to go on") from error

    def close(self) -> None:
        os.close(self._file)


def _opened(path: Path, flags: int = 0) -> int:
    """A regular file for reading and writing, made when missing. Raises OSError."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | flags, 0o644)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "is a pipe or a device")
    return file


@contextmanager
def opened(folder: str | os.PathLike[str], isa: str) -> Iterator[LogWriter]:
    """The folder, made when missing, locked against other writers while the context lasts.

    The lock is the kernel's, on the file `lock`, so that it ends with its process, however that ends.
    Raises OutputError when the folder can't be written, TuningError when another run has it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _opened(folder / LOCK)
    except OSError as error:
        raise OutputError(f"{folder}: can't be used as a tuning log: {error.strerror}; name a folder that can be written") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(lock, 64, 0).decode(errors="replace").strip()
            raise TuningError(f"{folder}: another run (process {owner or 'unknown'}) is tuning into this log; wait for it, or use another folder") from error
        with contextlib.suppress(OSError):  # on a full disk whoever finds the log locked misses the owner's number; the first record will tell
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        writer = LogWriter(folder, isa)
        try:
            yield writer
        finally:
            writer.close()
    finally:
        os.close(lock)


def merge(sources: Iterable[str | os.PathLike[str]], output: str | os.PathLike[str]) -> dict[str, int]:
    """Write the union of logs to the folder `output`; equal points keep their best measurement. Returns {ISA: records}.

    Raises TuningError for a source that is no log, OutputError when `output` can't be written or holds a log already.
    """
    output = Path(output)
    try:
        taken = about(output) is not None and bool(_files(output))
    except OSError as error:
        raise OutputError(f"{output}: can't be made: {error.strerror}") from error
    if taken:
        raise OutputError(f"{output}: holds a tuning log already; name a new folder")
    merged: dict[str, dict[tuple[str, str, str, int], Record]] = {}
    for source in sources:
        for record in read_log(source):
            points = merged.setdefault(record.isa, {})
            place = (record.key, record.core, record.point, record.threads)
            known = points.get(place)
            if known is None or record.rank < known.rank:
                points[place] = record
    write_log(output, [record for points in merged.values() for record in points.values()])
    return {isa: len(points) for isa, points in sorted(merged.items())}


def write_log(folder: Path, records: Iterable[Record]) -> None:
    """A new log with these records, in an order that only their contents decide. Raises OutputError."""
    by_isa: dict[str, list[str]] = {}
    for record in sorted(records, key=lambda r: (r.isa, r.row, _canonical(r.workload), r.rank)):
        by_isa.setdefault(record.isa, []).append(record.line())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: can't be made: {error.strerror}") from error
    for isa, lines in by_isa.items():
        with replacing(folder / f"{isa}{SUFFIX}") as temporary:
            temporary.write_text("".join(lines))


# -- compiling with a log -------------------------------------------------------------------------------------------------------------------


class Tuned:
    """Tuned parameters for `lower`: the best record of the user's log, else of the shipped one, else None (the row's heuristic).

    core: only records of this type of core count, and the shipped ones, which name none, not; empty: only those that name none.
    """

    def __init__(self, target: Target, log: str | os.PathLike[str] | None = None, shipped: Path | None = SHIPPED, core: str = "") -> None:
        """Raises TuningError, see `read_log`, when `log` is no log for `target`, and when all its records are of other cores."""
        self.target = target
        self.used: dict[str, Record] = {}
        own = _ranked(of_core(read_log(log, isa_of(target)), core, log)) if log is not None else {}
        file = None if shipped is None or core else shipped / f"{isa_of(target)}{SUFFIX}"
        self.records = (_ranked(read_file(file)) if file is not None and file.is_file() else {}) | own

    def anew(self) -> Tuned:
        """The same records for another library, which accounts for those that it uses itself."""
        other = copy.copy(self)
        other.used = {}
        return other

    def __call__(self, row: Row, op: OpCall) -> dict[str, Any] | None:
        space = row.space(op, self.target) if self.records else None
        records = self.records.get(key_of(row.name, workload_of(op)), []) if space else []
        for record in records:
            if record.ratio >= 1:  # the default is the best that is known
                break
            if self.buildable(row, op, record.params):
                self.used[record.key] = record
                return dict(record.params)
        return None

    def buildable(self, row: Row, op: OpCall, params: Mapping[str, Any]) -> bool:
        """Whether this version's template still knows the point."""
        if not allowed(params, row.space(op, self.target), row.default(op, self.target)):
            return False
        try:
            row.build(op, params, self.target)
        except ValueError:
            return False
        return True

    @property
    def digest(self) -> str:
        """Of the records that were used: equal schedules have equal digests, whatever else the logs hold."""
        return hashlib.sha256(_canonical([[k, self.used[k].params] for k in sorted(self.used)]).encode()).hexdigest()


def of_core(records: Sequence[Record], core: str, log: str | os.PathLike[str]) -> list[Record]:
    """The records of one type of core. Raises TuningError where there are only others: what is best for them is not silently best for this one."""
    found = [r for r in records if r.core == core]
    if records and not found:
        others = ", ".join(sorted({r.core or "a core without a name" for r in records}))
        wanted = f"none is of {core}" if core else "no core is named"
        raise TuningError(f"{log}: its records are of {others}, and {wanted}. Name one of its cores with --core, or tune for yours: these are a good start")
    return found


def _ranked(records: Iterable[Record]) -> dict[str, list[Record]]:
    """workload key -> its measured records, best first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if not record.failed:
            groups.setdefault(record.key, []).append(record)
    return {k: sorted(g, key=lambda r: r.rank) for k, g in groups.items()}


def allowed(params: Mapping[str, Any], space: Mapping[str, list[Any]], default: Mapping[str, Any]) -> bool:
    """Whether a point lies in a row's space (the default's own values count as part of it). A number of another type, 1.0 for 1, does not."""
    return params.keys() == space.keys() and all(
        any(type(v) is type(params[k]) and v == params[k] for v in (*values, default[k])) for k, values in space.items()
    )
