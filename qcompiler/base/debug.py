"""The one table of debug switches, and dumps of what every stage made.

No switch changes a result. `python -m qcompiler.base.debug` prints the table.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.base.errors import OutputError

SWITCHES = {
    "QCOMPILER_DUMP_DIR": "write the module or value that each pass and stage of a compilation makes into this directory (as --dump-dir does)",
    "QCOMPILER_CACHE": "folder for object code of kernels from earlier compilations, or off (as --no-cache does); a folder of the user's caches when unset",
    "QCOMPILER_ANDROID_SYSROOT": "sysroot of an Android NDK, to link for Android with any clang and lld in the place of that NDK's",
    "QCOMPILER_TRACEBACK": "1: show the Python traceback of an error that the command line would print on one line",
    "QCOMPILER_DATA": "directory with real networks and images for tests and benchmarks (as --data does)",
}


def switch(name: str) -> str | None:
    """The value of a switch of the table above; None when unset, empty or "0"."""
    assert name in SWITCHES, f"{name} is not in the table"
    value = os.environ.get(name, "")
    return None if value in ("", "0") else value


Dump = Callable[[str, Any], object]
"""`dump(name, value)`: what a stage or a pass made, for whoever looks (a `Dumper`, or `no_dump`)."""


def no_dump(name: str, value: Any) -> None:
    """The `Dump` that writes nothing."""


class Dumper:
    """Writes `NN_stage.<suffix>` files, numbered in the order of the calls: modules as TVMScript, anything else as JSON.

    `Dumper(None)` takes QCOMPILER_DUMP_DIR, and does nothing when that is unset too.
    Raises OutputError when the directory can't be made or written.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        chosen = directory if directory is not None else switch("QCOMPILER_DUMP_DIR")
        self.directory = None if chosen is None else Path(chosen)
        self._count = 0
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{self.directory}: can't make the dump directory: {error.strerror}") from error

    def __call__(self, stage: str, value: Any) -> Path | None:
        """Dump `value` under the name `stage`; the path written, or None when dumping is off."""
        if self.directory is None:
            return None
        text, suffix = render(value)
        path = self.directory / f"{self._count:02d}_{stage}{suffix}"
        self._count += 1
        try:
            path.write_text(text)
        except OSError as error:
            raise OutputError(f"{path}: can't be written: {error.strerror}") from error
        return path


def render(value: Any) -> tuple[str, str]:
    """(text, file suffix) of a module (TVMScript), a text, or plain values, arrays and dataclasses (JSON)."""
    if isinstance(value, str):
        return value, ".txt"
    if hasattr(value, "script"):
        return str(value.script(show_meta=False)), ".py"
    return json.dumps(plain_json(value), indent=1, sort_keys=False), ".json"


def plain_json(value: Any) -> Any:
    """`value` as JSON values. Arrays above 64 elements become their shape, dtype and range; non-finite numbers become strings."""
    if isinstance(value, np.ndarray):
        if value.size <= 64:
            return plain_json(value.tolist())
        return {
            "shape": list(value.shape),
            "dtype": str(value.dtype),
            "min": plain_json(value.min().item()),
            "max": plain_json(value.max().item()),
        }
    if isinstance(value, np.generic):
        return plain_json(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "to_json"):
        return plain_json(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_json(item) for item in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    return str(value)


if __name__ == "__main__":
    for name, meaning in SWITCHES.items():
        print(f"{name:22} {meaning}")
