"""Where a network comes from: a file of one of the formats that are read here, or an object in memory. All of them are read as ONNX models.

What stands behind this file has no part in the format: `Origin.read` ends in the same operators, `import_onnx` makes the module of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import onnx

from qcompiler.base.errors import ModelError
from qcompiler.importers import formats
from qcompiler.importers.cut import Cut
from qcompiler.importers.onnx_file import OnnxFile, OnnxInMemory
from qcompiler.importers.pt2_file import read_program
from qcompiler.importers.tflite import TfliteFile
from qcompiler.importers.torch_program import TorchProgram, exported, is_module, is_program
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


def origin_of(model: AnyModel, cut: Iterable[str] = (), example_inputs: Any = None) -> Origin:
    """The origin of a network that a user gives. cut: names of values that it ends at, all of it where there are none. example_inputs: of a PyTorch module,
    see `torch_program.exported`.

    Raises ModelError, with the way in, for a file of a format that is not read here, and for a module that can't be exported; TypeError for an object that
    is no network.
    """
    whole, names = _whole(model, example_inputs), tuple(cut)
    if not names or cut_of(whole):
        return whole
    return TfliteFile(whole.path, names) if isinstance(whole, TfliteFile) else Cut(whole, names)


def cut_of(origin: Origin) -> list[str]:
    """The names of the values that a network ends at where it was cut; none for a whole one."""
    return list(origin.cut) if isinstance(origin, (Cut, TfliteFile)) else []


def _whole(model: AnyModel, example_inputs: Any) -> Origin:
    if is_module(model):
        where = f"the module {type(model).__name__}"
        if example_inputs is None:
            way = "give example_inputs=(x,), the arguments of a call, at whose shapes it is exported; or a program: torch.export.export(module.eval(), (x,))"
            raise ModelError(f"{where}: a module has no shapes. What to do: {way}")
        return TorchProgram(exported(model, example_inputs), where)
    if example_inputs is not None and not isinstance(model, TorchProgram):
        raise ModelError("example_inputs are the arguments that a PyTorch module is exported with; this network has shapes already. Leave them out")
    if isinstance(model, onnx.ModelProto):
        return OnnxInMemory(model)
    if is_program(model):
        return TorchProgram(model)
    if all(hasattr(model, name) for name in ("where", "read", "elsewhere")):
        return cast(Origin, model)
    if not isinstance(model, (str, os.PathLike)):
        kinds = "a path, an onnx.ModelProto, a torch.export.ExportedProgram or a torch.nn.Module"
        raise TypeError(f"a model is {kinds}; {type(model).__module__}.{type(model).__qualname__} given")
    path = Path(model)
    kind = formats.recognised(path)
    if kind == formats.PT2:
        return TorchProgram(read_program(path), str(path), path)
    return TfliteFile(path) if kind == formats.TFLITE else OnnxFile(path)


def files_of(model: AnyModel) -> list[Path]:
    """The files that a network is read from, as far as they can be told; none for one in memory. Raises nothing: whoever reads it will say what is wrong."""
    if isinstance(model, (str, os.PathLike)) and Path(model).suffix == ".pt2":
        return [Path(model)]
    try:
        return origin_of(model).files
    except (ModelError, TypeError):
        return [Path(model)] if isinstance(model, (str, os.PathLike)) else []
