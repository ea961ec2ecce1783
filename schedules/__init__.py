"""Kernels. Imported as qcompiler.schedules only."""

from __future__ import annotations

from typing import Any

if __name__ != "qcompiler.schedules":
    raise ImportError("import this package as qcompiler.schedules, not as schedules")


def load(target: Any) -> None:
    """Fill the table with the rows of a target's architecture, then the portable ones."""
    import importlib

    if target.architecture == "x86_64":
        importlib.import_module("qcompiler.schedules.x86")
    elif target.architecture in ("aarch64", "armv7a"):
        importlib.import_module("qcompiler.schedules.arm")
    elif target.gpu:
        importlib.import_module("qcompiler.schedules.cuda")
    importlib.import_module("qcompiler.schedules.portable")
    if not target.gpu:
        importlib.import_module("qcompiler.schedules.floats")
