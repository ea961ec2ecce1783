"""qcompiler: a float network in, a verified, autotuned int8 library out."""

from pathlib import Path as _Path

# In a checkout, passes/ and schedules/ lie beside this package; installed, they lie inside it.
_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "passes" / "__init__.py").is_file() and (_ROOT / "targets.yaml").is_file():
    __path__.append(str(_ROOT))

__version__ = "0.1.0"
