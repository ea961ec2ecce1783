"""Reading what may be anything, and writing results: beside the destination first, then renamed, so that nothing half-written is ever left.

Files and folders under construction are locked by their process. What a killed process leaves is unlocked, and removed by the next one that writes there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import io
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qcompiler.base.errors import OutputError

_PREFIX = "qcompiler-"
_MARK = "in-use"  # the file in a temporary folder that is locked while its process lives
_SETTLED = 60.0  # seconds after which a file is locked if it ever will be
_FULL = (errno.ENOSPC, errno.EDQUOT)


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """`path` opened for reading. Raises OSError where it can't be, or is a pipe or a device, which may wait or go on without end."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(file).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(file, "rb")
    os.close(file)
    raise OSError(errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else OSError(errno.EINVAL, "is a pipe or a device; a regular file is expected")


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The contents of a file, as `open_regular` opens it."""
    with open_regular(path) as file:
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """`json.loads`; ValueError for what is nested too deeply, too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def about(path: str | os.PathLike[str]) -> os.stat_result | None:
    """What `path` is; None where nothing is there. Raises OSError when that can't be told: no permission, a name that is too long, a circle of links."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_writable(path: str | Path, inputs: Iterable[object] = ()) -> Path:
    """`path` as a Path when a file can be written there. Raises OutputError, naming the cause, when it can't, or when it is one of the files `inputs`,
    or in one of the folders, under whatever name (what is no path among them is passed over).

    Meant to be asked before long work whose result goes to `path`.
    """
    path = Path(path)
    folder = path.parent
    try:
        there, around = about(path), about(folder)
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}") from error
    if there is not None and stat.S_ISDIR(there.st_mode):
        raise OutputError(f"{path}: is a directory; name a file to write")
    if there is not None and not stat.S_ISREG(there.st_mode):
        raise OutputError(f"{path}: is a device or a pipe, which can't be replaced by a file; name a file to write")
    if around is None or not stat.S_ISDIR(around.st_mode):
        raise OutputError(f"{path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: no permission to write into {folder.resolve()}")
    if there is None:
        return path
    for file in inputs:
        if isinstance(file, (str, os.PathLike)) and any(_same(one, there) for one in _files(file)):
            raise OutputError(f"{path}: is an input of this command ({file}), which would be lost; name another file to write")
    return path


def _files(path: str | os.PathLike[str]) -> Iterator[str | os.PathLike[str]]:
    yield path
    for folder, _, names in os.walk(path):
        yield from (os.path.join(folder, name) for name in names)


def _same(path: str | os.PathLike[str], there: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), there)
    except OSError:
        return False


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file name beside `path`; on success it replaces `path` in one step, on any exception it is removed.

    The name keeps the suffix of `path`. Raises OutputError when the place can't be written or the disk is full.
    """
    path = check_writable(path)
    _sweep_beside(path.parent)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{_PREFIX}", suffix=path.suffix if len(path.suffix) < 16 else "", dir=path.parent)
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}") from error
    temporary = Path(name)
    try:
        _lock(handle)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place on success; on any exception nothing is left of it.

    Raises OutputError when `path` exists and is not an empty folder, or can't be made.
    """
    path = Path(path)
    try:
        there, around = about(path), about(path.parent)
        taken = there is not None and (not stat.S_ISDIR(there.st_mode) or bool(os.listdir(path)))
    except OSError as error:
        raise OutputError(f"{path}: can't be made: {error.strerror}") from error
    if around is None or not stat.S_ISDIR(around.st_mode):
        raise OutputError(f"{path}: the folder {path.parent} does not exist; make it first")
    if taken:
        raise OutputError(f"{path}: exists already; name a new folder, or remove it first")
    _sweep_beside(path.parent)
    try:
        with _locked_folder(f".{_PREFIX}", path.parent) as parent:
            folder = parent / "new"
            folder.mkdir()
            yield folder
            folder.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror or error}") from error


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for intermediate files, removed at the end. Raises OutputError where none can be made, and when the disk is full."""
    try:
        root = Path(tempfile.gettempdir())
        _sweep_once(root)
        with _locked_folder(_PREFIX, root) as folder:
            yield folder
    except OSError as error:
        if error.errno in _FULL or "temporary directory" in str(error):  # gettempdir's FileNotFoundError when no folder takes a file
            raise OutputError("there is no room for intermediate files: free some, or name a folder that has room in the variable TMPDIR") from error
        raise


@contextlib.contextmanager
def _locked_folder(prefix: str, root: Path) -> Iterator[Path]:
    folder = root / f"{prefix}{secrets.token_hex(8)}"  # known before it is made: a signal may come at any moment from then on
    try:
        folder.mkdir(mode=0o700)
        with (folder / _MARK).open("wb") as mark:
            _lock(mark.fileno())
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(file: int) -> bool:
    """Whether this process now holds the file; the kernel ends that with the process, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@functools.cache
def _sweep_once(root: Path) -> None:
    for mark in root.glob(f"{_PREFIX}*/{_MARK}"):
        if _abandoned(mark):
            shutil.rmtree(mark.parent, ignore_errors=True)


def _sweep_beside(folder: Path) -> None:
    """Remove what killed processes left where results are written."""
    ours = re.compile(rf"\.{_PREFIX}\w{{8,}}(\.\w*)?")  # as tempfile and `_locked_folder` name them
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in [e for e in entries if ours.fullmatch(e.name)]:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                if _abandoned(path / _MARK):
                    shutil.rmtree(path, ignore_errors=True)
            elif _abandoned(path):
                path.unlink(missing_ok=True)


def _abandoned(path: Path) -> bool:
    """Whether a file is this user's, not new, and locked by no process."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = os.fstat(file)
        settled = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and time.time() - found.st_mtime > _SETTLED
        return settled and _lock(file)
    finally:
        os.close(file)
