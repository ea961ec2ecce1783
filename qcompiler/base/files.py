"""Writing results: beside the destination first, then renamed, so that nothing half-written is ever left."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qcompiler.base.errors import OutputError


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """`path` opened for reading. Raises OSError where it can't be, or is a pipe or a device, which may wait or go on without end."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(file).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(file, "rb")
    os.close(file)
    raise OSError(errno.EINVAL, "is a folder; a file is expected" if stat.S_ISDIR(mode) else "is a pipe or a device; a regular file is expected")


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The contents of a file, as `open_regular` opens it."""
    with open_regular(path) as file:
        return file.read()


def check_writable(path: str | Path) -> Path:
    """`path` as a Path when a file can be written there. Raises OutputError, naming the cause, when it can't.

    Meant to be asked before long work whose result goes to `path`.
    """
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; name a file to write")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is a device or a pipe, which can't be replaced by a file; name a file to write")
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: no permission to write into {folder.resolve()}")
    return path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file name beside `path`; on success it replaces `path` in one step, on any exception it is removed.

    The name keeps the suffix of `path`. Raises OutputError when the place can't be written or the disk is full.
    """
    path = check_writable(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place on success; on any exception nothing is left of it.

    Raises OutputError when `path` exists and is not an empty folder, or can't be made.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; make it first")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path}: exists already; name a new folder, or remove it first")
    try:
        parent = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise OutputError(f"{path}: can't be made: {error.strerror}") from error
    try:
        folder = parent / "new"
        folder.mkdir()
        yield folder
        folder.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(parent, ignore_errors=True)
