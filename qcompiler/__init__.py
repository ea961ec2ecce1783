"""qcompiler: a float network in, a verified, autotuned int8 library out."""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from qcompiler.base.tvm_alone import import_tvm_alone as _import_tvm_alone

if _TYPE_CHECKING:
    from qcompiler.backend.artifact import Artifact
    from qcompiler.base.errors import (
        ArtifactError,
        DataError,
        DeviceFailure,
        IncompatibleDevice,
        InternalError,
        ModelError,
        OutputError,
        PlanError,
        PoolClosed,
        QCompilerError,
        SessionBusy,
        TargetError,
        TuningError,
    )
    from qcompiler.base.targets import Target
    from qcompiler.base.targets import load_targets as targets
    from qcompiler.calibration.preprocess import Preprocess
    from qcompiler.calibration.table import CalibrationTable
    from qcompiler.exporters.export_onnx import export_onnx
    from qcompiler.pipeline.calibrate import calibrate
    from qcompiler.pipeline.compile import compile
    from qcompiler.pipeline.explain import explain
    from qcompiler.pipeline.options import Options
    from qcompiler.plan.quant_plan import QuantPlan
    from qcompiler.runtime.pool import SessionPool
    from qcompiler.runtime.session import Session
    from qcompiler.runtime.session import Session as load
    from qcompiler.tuning.search import tune
    from qcompiler.verification.parity import ParityReport, Thresholds, verify

# In a checkout, passes/ and schedules/ lie beside this package; installed, they lie inside it.
_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "passes" / "__init__.py").is_file() and (_ROOT / "targets.yaml").is_file():
    __path__.append(str(_ROOT))

__version__ = "0.1.0"
_import_tvm_alone()

# Imported on first use: running a library needs numpy alone, and listing targets needs no compiler.
_PUBLIC = {
    "backend.artifact": "Artifact",
    "base.errors": "ArtifactError DataError DeviceFailure IncompatibleDevice InternalError ModelError OutputError PlanError PoolClosed QCompilerError "
    "SessionBusy TargetError TuningError",
    "base.targets": "Target load_targets:targets",
    "calibration.preprocess": "Preprocess",
    "calibration.table": "CalibrationTable",
    "exporters.export_onnx": "export_onnx",
    "pipeline.calibrate": "calibrate",
    "pipeline.compile": "compile",
    "pipeline.explain": "explain",
    "pipeline.options": "Options",
    "plan.quant_plan": "QuantPlan",
    "runtime.pool": "SessionPool",
    "runtime.session": "Session Session:load",
    "tuning.search": "tune",
    "verification.parity": "ParityReport Thresholds verify",
}
_LAZY = {name.split(":")[-1]: (f"qcompiler.{module}", name.split(":")[0]) for module, names in _PUBLIC.items() for name in names.split()}

__all__ = [  # spelled out for type checkers
    "Artifact",
    "ArtifactError",
    "CalibrationTable",
    "DataError",
    "DeviceFailure",
    "IncompatibleDevice",
    "InternalError",
    "ModelError",
    "Options",
    "OutputError",
    "ParityReport",
    "PlanError",
    "PoolClosed",
    "Preprocess",
    "QCompilerError",
    "QuantPlan",
    "Session",
    "SessionBusy",
    "SessionPool",
    "Target",
    "TargetError",
    "Thresholds",
    "TuningError",
    "calibrate",
    "compile",
    "explain",
    "export_onnx",
    "load",
    "targets",
    "tune",
    "verify",
]


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'qcompiler' has no attribute '{name}'")
    import importlib

    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
