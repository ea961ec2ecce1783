"""A library's file, copied before it is mapped: what happens to the file afterwards can't reach code that runs.

The dynamic linker maps a library by its inode. A file that is overwritten in place (`cp` does that) would change under a session that is alive, and be taken
for the old one by the next. The copy is made in memory that has no name, so nothing is left of it however the process ends. Sessions of equal contents
share one, which is gone with the last of them.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import itertools
import mmap
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from qcompiler.base.errors import ArtifactError
from qcompiler.base.files import open_regular, temporary_folder

_EXECUTABLE = 0x10  # MFD_EXEC (Linux 6.3): wanted where the system makes other memory files unfit for code; older kernels don't know it
_numbers = itertools.count(1)
_close = _ctypes.dlclose  # kept here: the module may be gone first when the interpreter ends


class PrivateCopy:
    """The contents of the file at `path`: `data` to look at, `load` to execute. Raises ArtifactError when it can't be read or there is no room."""

    _loaded: ClassVar[weakref.WeakValueDictionary[bytes, PrivateCopy]] = weakref.WeakValueDictionary()
    library: ctypes.CDLL | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sessions: set[int] = set()  # the id() of each whose code this is
        self._unused = False
        try:
            with open_regular(path) as source, os.fdopen(_memory_file(path.name), "w+b") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                self.data: mmap.mmap | bytes = mmap.mmap(file.fileno(), file.tell(), access=mmap.ACCESS_READ) if file.tell() else b""
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise ArtifactError(f"{path}: can't be read: {error.strerror or error}") from error

    def load(self) -> PrivateCopy:
        """This copy, or an equal one that was loaded before, with its `library` open. Raises OSError where the system won't."""
        key = self.data[-24:]  # the checksum
        equal = self._loaded.get(key)
        if equal is not None and np.array_equal(np.frombuffer(self.data, np.uint8), np.frombuffer(equal.data, np.uint8)):
            return equal
        with self._named() as name:
            self.library = ctypes.CDLL(name)
        self._release()
        self._loaded[key] = self
        return self

    @contextlib.contextmanager
    def _named(self) -> Iterator[str]:
        """A name for the dynamic linker. It compares names too, and descriptors' numbers come again: so each copy gets a spelling of its own."""
        spelling = "".join("./" if digit == "0" else ".//" for digit in f"{next(_numbers):b}")
        name = f"/proc/self/fd/{spelling}{self._file}"
        if os.access(name, os.X_OK):
            yield name
            return
        with temporary_folder() as folder:
            copy = folder / self.path.name
            copy.write_bytes(self.data)
            yield str(copy)

    def _release(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._release()
        self._unused = True
        self._unmap()

    def ended(self, session: int) -> None:
        """Must be called after a session in `sessions` has ended. In a cycle of references the collector may finalize the copy before its sessions."""
        self.sessions.discard(session)
        self._unmap()

    def _unmap(self) -> None:
        if self._unused and not self.sessions and self.library is not None:
            _close(self.library._handle)
            self.library = None


def _memory_file(name: str) -> int:
    name = name[:60]  # Linux allows 249 bytes
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC | _EXECUTABLE)
    except OSError:
        return os.memfd_create(name, os.MFD_CLOEXEC)
