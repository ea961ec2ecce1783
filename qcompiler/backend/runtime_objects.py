"""The C runtime of a library as object files: compiled on all cores, or taken from the cache of kernels (`kernel_cache.py`), as it depends on nothing of a
network but its shapes."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qcompiler.backend.kernel_cache import cached
from qcompiler.base.errors import TargetError
from qcompiler.base.targets import Target


def runtime_objects(folder: Path, sources: Sequence[str], command: Sequence[str], target: Target) -> list[str]:
    """Names of the object files, made in `folder` from C sources that lie there, beside all that they include. command: the compiler and its options. Raises
    TargetError when it fails."""
    compiler = os.stat(command[0])
    decisive = hashlib.sha256(repr((command, compiler.st_mtime_ns, compiler.st_size)).encode())
    for file in sorted(folder.glob("*.[ch]")):
        decisive.update(f"\0{file.name}\0".encode() + file.read_bytes())

    def made(source: str) -> bytes:
        done = subprocess.run([*command, "-x", "c", "-c", source, "-o", f"{source}.o"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"compiling the runtime for '{target.name}' with {command[0]} failed: {done.stderr.strip()[:600]}")
        return (folder / f"{source}.o").read_bytes()

    def placed(source: str) -> str:
        (folder / f"{source}.o").write_bytes(cached(f"{source} {decisive.hexdigest()}", target, lambda: made(source)))
        return f"{source}.o"

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(placed, sources))
