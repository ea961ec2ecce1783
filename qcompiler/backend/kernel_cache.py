"""Object code on disk, from one compilation to the next: of kernels, entry points and the C runtime.

An entry's name is a digest of all that decides its bytes: its key, the target, TVM's version and every source file of this installation, in Python and
C. So an entry is never out of date, only unused; the longest unused go when the folder grows beyond its limit. Each is written beside and renamed, and begins
with a digest of its own: processes share the folder without locks, and a damaged entry is as good as none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import tvm

import qcompiler
from qcompiler import passes, schedules
from qcompiler.base.debug import switch
from qcompiler.base.errors import OutputError
from qcompiler.base.files import read_regular, replacing
from qcompiler.base.targets import Target

LIMIT = 256 << 20
"""Bytes of all entries together, beyond which the longest unused are removed, down to three quarters of it."""
_DIGEST = hashlib.sha256().digest_size


def cache_folder() -> Path | None:
    """Where entries lie: QCOMPILER_CACHE, or `qcompiler/kernels` in the user's folder for caches. None where there is to be no cache, or can be none."""
    chosen = switch("QCOMPILER_CACHE")
    if chosen == "off":
        return None
    try:
        folder = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcompiler" / "kernels"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # no home, or none of ours to write to
        return None
    return folder


def cached(key: str, target: Target, make: Callable[[], bytes]) -> bytes:
    """The object code that is called `key`, which with the target decides it, kept from an earlier compilation, or made and kept for later ones."""
    folder = cache_folder()
    if folder is None:
        return make()
    path = folder / hashlib.sha256(f"{installation()}\0{target!r}\0{key}".encode()).hexdigest()
    found = _read(path)
    if found is None:
        found = make()
        with contextlib.suppress(OSError, OutputError), replacing(path) as temporary:  # a full disk costs time, not the compilation
            temporary.write_bytes(hashlib.sha256(found).digest() + found)
        if path.name.startswith("00"):  # looking at all entries takes a tenth of a second: at every 256th that is made
            trim()
    return found


def trim(limit: int = LIMIT) -> None:
    """Remove the longest unused entries, down to three quarters of `limit` bytes, where all together have more."""
    folder = cache_folder()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        entries = sorted(((s.st_mtime, s.st_size, e.path) for e in os.scandir(folder) if (s := e.stat())), reverse=True)
        if sum(size for _, size, _ in entries) <= limit:
            return
        total = 0
        for _, size, path in entries:
            total += size
            if total > limit * 3 // 4:
                Path(path).unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    try:
        content = read_regular(path)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a folder that others fill, which may be read alone
        os.utime(path)  # used now
    return content[_DIGEST:] if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST] else None


@functools.cache
def installation() -> str:
    """A digest of this compiler's sources, those of the C runtime among them, and TVM's version: what it does depends on nothing else."""
    digest = hashlib.sha256(tvm.__version__.encode())
    for package in (qcompiler, passes, schedules):
        folder = Path(package.__path__[0])  # in a checkout the second one of qcompiler is the checkout, with all that lies there
        for file in sorted(f for f in folder.rglob("*.*") if f.suffix in (".py", ".c", ".h")):
            digest.update(f"\0{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
