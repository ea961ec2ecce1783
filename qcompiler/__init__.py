"""qcompiler: a float network in, a verified, autotuned int8 library out."""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from qcompiler.backend.artifact import Artifact
    from qcompiler.pipeline.compile import compile
    from qcompiler.runtime.session import Session
    from qcompiler.runtime.session import Session as load
    from qcompiler.tuning.search import tune
    from qcompiler.verification.parity import verify

# In a checkout, passes/ and schedules/ lie beside this package; installed, they lie inside it.
_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "passes" / "__init__.py").is_file() and (_ROOT / "targets.yaml").is_file():
    __path__.append(str(_ROOT))

__version__ = "0.1.0"

__all__ = ["Artifact", "Session", "compile", "load", "tune", "verify"]

# Imported on first use: running a library needs numpy alone, and listing targets needs no compiler.
_LAZY = {
    "Artifact": ("qcompiler.backend.artifact", "Artifact"),
    "Session": ("qcompiler.runtime.session", "Session"),
    "compile": ("qcompiler.pipeline.compile", "compile"),
    "load": ("qcompiler.runtime.session", "Session"),
    "tune": ("qcompiler.tuning.search", "tune"),
    "verify": ("qcompiler.verification.parity", "verify"),
}


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'qcompiler' has no attribute '{name}'")
    import importlib

    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)
