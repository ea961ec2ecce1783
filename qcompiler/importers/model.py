"""FloatModel: a network as the rest of the compiler sees it, whatever file it came from."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm

from qcompiler.base.debug import Dump, no_dump
from qcompiler.base.errors import ModelError
from qcompiler.base.tensor import TensorInfo
from qcompiler.base.value_ids import Naming
from qcompiler.importers.onnx import import_onnx
from qcompiler.passes.graph import Graph, dtype_of, shape_of
from qcompiler.passes.sequence import CANONICAL, run


@dataclass(frozen=True, eq=False)
class FloatModel:
    """The canonical float module (docs/architecture.md) and what a user calls its inputs and outputs.

    Every floating tensor is float32, whatever the file's precision. `digest`: sha256 (hex) of the file, its external data and the input shapes.
    `sources`: value id -> (name, operator type) of the node in the file that computes it, folded ones included; `readers`: value id of the file
    -> the values computed from it directly. `fixed`: inputs of the file that are constants here, and their values as nested lists. `path`: of the file.
    """

    module: tvm.IRModule
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    name: str
    digest: str
    sources: dict[str, tuple[str, str]]
    readers: dict[str, list[str]]
    path: Path
    fixed: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def naming(self) -> Naming:
        """How its value ids are made and read."""
        return Graph.of(self.module).naming

    def account(self) -> dict[str, Any]:
        """What a manifest says of the network: its name, and what it takes to load the same from its file again."""
        return {"model": self.name, **({"fixed_inputs": self.fixed} if self.fixed else {})}

    def source(self, value_id: str) -> tuple[str, str]:
        """(node name, operator type) behind a value id; a value made by the compiler (`<id>~<what>`) has the source of `<id>`."""
        found = self.naming.nearest(value_id, self.sources)
        return self.sources.get(found, (found, "Input"))


def load(
    path: str | Path,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    requantize: bool = False,
    dump: Dump = no_dump,
    input_values: Mapping[str, Any] | None = None,
) -> FloatModel:
    """Read a model file and bring it into canonical form.

    A symbolic batch dimension is 1 unless `input_shapes` says otherwise; any other symbolic dimension must be in `input_shapes`
    ({input name: whole shape}). requantize: of a file that is quantized in part, the rest may be quantized too.
    input_values: {input name: number, array or text "1,2,3"}, inputs that are the same in every call and become constants.
    Raises ModelError when the file can't be read, is not ONNX, is damaged, or holds what can't be compiled at all.
    """
    path = Path(path)
    imported = import_onnx(path, input_shapes or {}, requantize, input_values)
    graph = Graph.of(imported.module)
    if not graph.inputs:
        raise ModelError(f"{path}: the model has no inputs: all of its outputs are constants")
    inputs, outputs = ([TensorInfo(n, shape_of(v), dtype_of(v)) for n, v in pairs] for pairs in ([(str(p.name), p) for p in graph.inputs], graph.outputs))
    dump("import", imported.module)
    module = run(CANONICAL, imported.module, dump=dump)
    fixed = {name: array.tolist() for name, array in imported.fixed.items()}
    digest = hashlib.sha256(f"{imported.digest} {[(i.name, i.shape) for i in inputs]}{fixed or ''}".encode()).hexdigest()
    return FloatModel(module, tuple(inputs), tuple(outputs), path.stem, digest, imported.sources, graph.consumers(), path, fixed)
