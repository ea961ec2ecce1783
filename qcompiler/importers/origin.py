"""Where a network comes from: a file of one of the formats that are read here, or an object in memory. All of them are read as ONNX models.

What stands behind this file has no part in the format: `Origin.read` ends in the same operators, `import_onnx` makes the module of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import onnx

from qcompiler.base.errors import ModelError
from qcompiler.importers import formats
from qcompiler.importers.cut import Cut
from qcompiler.importers.onnx_file import OnnxFile, OnnxInMemory
from qcompiler.importers.tflite import TfliteFile
from qcompiler.importers.torch_program import TorchProgram, is_module, is_program
from qcompiler.runtime.reference import Elsewhere


class Origin(Protocol):
    """`where`: what messages call it; `name`: of the network; `files`: all that it is read from."""

    @property
    def where(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def files(self) -> list[Path]: ...
    def read(self) -> tuple[onnx.ModelProto, str]:
        """(the network as an ONNX model without functions of its own, sha256 hex of all that it was read from). Raises ModelError."""
        ...

    def elsewhere(self) -> Elsewhere:
        """The runtime that it was made for."""
        ...


AnyModel: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | Origin
"""A network as a user gives it: a path, a model in memory, or where it comes from."""


def origin_of(model: AnyModel, cut: Iterable[str] = ()) -> Origin:
    """The origin of a network that a user gives. cut: names of values that it ends at, all of it where there are none.

    Raises ModelError, with the way in, for a file of a format that is not read here; TypeError for an object that is no network.
    """
    whole, names = _whole(model), tuple(cut)
    if not names or cut_of(whole):
        return whole
    return TfliteFile(whole.path, names) if isinstance(whole, TfliteFile) else Cut(whole, names)


def cut_of(origin: Origin) -> list[str]:
    """The names of the values that a network ends at where it was cut; none for a whole one."""
    return list(origin.cut) if isinstance(origin, (Cut, TfliteFile)) else []


def _whole(model: AnyModel) -> Origin:
    if isinstance(model, onnx.ModelProto):
        return OnnxInMemory(model)
    if is_program(model):
        return TorchProgram(model)
    if is_module(model):
        way = "give an exported program instead, which has shapes: torch.export.export(module.eval(), (x,))"
        raise ModelError(f"the module {type(model).__name__}: {way}")
    if all(hasattr(model, name) for name in ("where", "read", "elsewhere")):
        return cast(Origin, model)
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"a model is a path, an onnx.ModelProto or a torch.export.ExportedProgram; {type(model).__module__}.{type(model).__qualname__} given")
    path = Path(model)
    kind = formats.recognised(path)
    return TfliteFile(path) if kind == formats.TFLITE else OnnxFile(path)


def files_of(model: AnyModel) -> list[Path]:
    """The files that a network is read from, as far as they can be told; none for one in memory. Raises nothing: whoever reads it will say what is wrong."""
    try:
        return origin_of(model).files
    except (ModelError, TypeError):
        return [Path(model)] if isinstance(model, (str, os.PathLike)) else []
