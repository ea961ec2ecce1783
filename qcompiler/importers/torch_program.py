"""A PyTorch network as an ONNX model in memory, written by PyTorch's own exporter; values are named by module paths. It is an exported program
(`torch.export.export`), a module that is exported here, or a `.pt2` file.

    layer3.0.conv1, the convolution's result;  layer3.0/relu, what a module with children computes itself;  inputs and outputs as the program has them

Nothing here imports torch before there is a program.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qcompiler.base.errors import ModelError
from qcompiler.base.files import read_regular
from qcompiler.importers.onnx_file import checked
from qcompiler.importers.pt2_file import reason_of, silent
from qcompiler.importers.torch_quantized import translations
from qcompiler.runtime.reference import Outputs

_SCOPES = "pkg.torch.onnx.name_scopes"


def is_program(model: object) -> bool:
    """Is this a `torch.export.ExportedProgram`?"""
    return any(c.__module__ == "torch.export.exported_program" and c.__qualname__ == "ExportedProgram" for c in type(model).__mro__)


def is_module(model: object) -> bool:
    """Is this a `torch.nn.Module`?"""
    return any(c.__module__ == "torch.nn.modules.module" and c.__qualname__ == "Module" for c in type(model).__mro__)


def exported(module: Any, example_inputs: Any) -> Any:
    """The program of a module in evaluation mode, at the shapes of `example_inputs`: the arguments of a call (a tensor, a tuple of them, or a mapping of
    keyword arguments; arrays do as well). Raises ModelError with the exporter's reason."""
    import torch
    from torch.utils import _pytree as tree

    where, positional, keywords = f"the module {type(module).__name__}", example_inputs, {}
    if isinstance(example_inputs, Mapping):
        positional, keywords = (), dict(example_inputs)
    elif not isinstance(example_inputs, (tuple, list)):
        positional = (example_inputs,)
    positional, keywords = tree.tree_map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, (tuple(positional), keywords))
    training = [m for m in module.modules() if m.training]
    try:
        module.eval()
        with silent():
            return torch.export.export(module, positional, keywords)
    except Exception as error:  # a module's code raises whatever it likes
        raise ModelError(f"{where}: PyTorch can't export it: {reason_of(error)}") from error
    finally:
        for part in training:
            part.training = True


@dataclass(eq=False)
class TorchProgram:
    """An `Origin`: a `torch.export.ExportedProgram`. where: what messages call it. path: of the file that it was read from."""

    program: Any
    where: str = "the PyTorch program"
    path: Path | None = None

    @property
    def name(self) -> str:
        return self.path.stem if self.path else "program"

    @property
    def files(self) -> list[Path]:
        return [self.path] if self.path else []

    def read(self) -> tuple[onnx.ModelProto, str]:
        data = self._exported
        source = data if self.path is None else read_regular(self.path)
        return checked(self.where, onnx.ModelProto.FromString(data)), hashlib.sha256(source).hexdigest()

    def elsewhere(self) -> Torch:
        graph = onnx.ModelProto.FromString(self._exported).graph
        return Torch(self.program, [v.name for v in graph.input], [v.name for v in graph.output])

    @functools.cached_property
    def _exported(self) -> bytes:
        """The ONNX model, without what depends on where the program's sources lie."""
        import torch

        try:
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ModelError(f"{self.where}: PyTorch's exporter needs the package onnxscript: pip install 'qcompiler[torch]'") from error
        try:
            with silent(), torch.no_grad():  # attention has other strides where weights may want gradients, and views of it then fail
                export = torch.onnx.export(self.program, dynamo=True, optimize=False, verbose=False, custom_translation_table=translations())
                model: onnx.ModelProto = export.model_proto
        except Exception as error:  # the exporter raises whatever its parts raise
            raise ModelError(f"{self.where}: PyTorch can't write it as ONNX: {reason_of(error)}") from error
        _by_modules(model)
        for node in [*model.graph.node, *(n for f in model.functions for n in f.node)]:
            del node.metadata_props[:]
            node.doc_string = ""
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
            del value.metadata_props[:]
        del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
        return bytes(model.SerializeToString(deterministic=True))


@dataclass(frozen=True, eq=False)
class Torch:
    """PyTorch on a program; `inputs` and `outputs`: what its leaves are called here, in order."""

    program: Any
    inputs: list[str]
    outputs: list[str]
    package: str = "torch"

    def open(self) -> tuple[str, Outputs]:
        import torch
        from torch.utils import _pytree as tree

        module = self.program.module()

        def run(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            leaves = [torch.from_numpy(np.array(given[name])) for name in self.inputs]
            args, kwargs = tree.tree_unflatten(leaves, self.program.call_spec.in_spec)
            with torch.no_grad():
                results = tree.tree_leaves(module(*args, **kwargs))
            return {name: r.detach().float().numpy() if r.is_floating_point() else r.numpy() for name, r in zip(self.outputs, results, strict=True)}

        return f"PyTorch {torch.__version__}", run


def _by_modules(model: onnx.ModelProto) -> None:
    """Names nodes and their results by the modules that compute them: the last result of a module without children is called as the module."""
    graph = model.graph
    paths = [_module(node) for node in graph.node]
    last = {path: index for index, path in enumerate(paths) if path and not any(p.startswith(f"{path}.") for p in paths)}
    kept = {v.name for v in (*graph.input, *graph.output, *graph.initializer)}
    taken, names = set(kept), dict[str, str]()
    for index, (node, path) in enumerate(zip(graph.node, paths, strict=True)):
        for place, name in enumerate(node.output):
            if not path or name in kept or not name:
                continue
            wanted = path if last.get(path) == index and place == 0 else f"{path}/{name}"
            while wanted in taken:
                wanted += "_"
            taken.add(wanted)
            names[name] = wanted
    for node, path in zip(graph.node, paths, strict=True):
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
        node.name = names.get(node.name, node.output[0] if path else node.name)


def _module(node: onnx.NodeProto) -> str:
    """The path of the module that computes a node; empty for the outermost."""
    text = next((p.value for p in node.metadata_props if p.key == _SCOPES), "[]")
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""
