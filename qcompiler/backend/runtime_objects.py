"""The C runtime of a library as object files: compiled on all cores, or taken from the cache of kernels (`kernel_cache.py`). All of its sources but one
depend on the target alone."""

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
    """Names of the object files, made in `folder` from the runtime's C sources, which lie there beside all that they include. command: the compiler and its
    options. Raises TargetError when it fails."""
    compiler = os.stat(command[0])
    tool = (command, compiler.st_mtime_ns, compiler.st_size)
    model = hashlib.sha256((folder / "model.h").read_bytes()).hexdigest()

    def made(source: str) -> bytes:
        done = subprocess.run([*command, "-x", "c", "-c", source, "-o", f"{source}.o"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"compiling the runtime for '{target.name}' with {command[0]} failed: {done.stderr.strip()[:600]}")
        return (folder / f"{source}.o").read_bytes()

    def placed(source: str) -> str:
        includes = b'#include "model.h"' in (folder / source).read_bytes()
        key = f"{source} {tool} {model if includes else ''}"
        (folder / f"{source}.o").write_bytes(cached(key, target, lambda: made(source)))
        return f"{source}.o"

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(placed, sources))
