"""Reading an ONNX file: its bytes, its external data, its digest; what is wrong with it, said once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.defs
import onnx.inliner
import onnx.version_converter
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from qcompiler.base.errors import ModelError
from qcompiler.base.files import open_regular, read_regular
from qcompiler.base.value_ids import Naming
from qcompiler.importers.cells import with_cells
from qcompiler.importers.formats import by_name
from qcompiler.importers.sequences import without_sequences
from qcompiler.runtime.reference import OnnxRuntime

OLDEST, UPGRADED = 7, 13  # operator sets: older files are converted to UPGRADED first
_HALVES = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
LARGEST, DEEPEST = 100_000, 100  # nodes of a model; functions that call each other


@dataclass(frozen=True)
class OnnxFile:
    """A `Origin`: an ONNX file, with its external data beside it."""

    path: Path

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def files(self) -> list[Path]:
        return files_of(self.path)

    def read(self) -> tuple[onnx.ModelProto, str]:
        return read(self.path)

    def elsewhere(self) -> OnnxRuntime:
        return OnnxRuntime(str(self.path))


@dataclass(frozen=True, eq=False)
class OnnxInMemory:
    """A `Origin`: an ONNX model with all of its data inside."""

    model: onnx.ModelProto

    @property
    def where(self) -> str:
        return f"the model '{self.name}'"

    @property
    def name(self) -> str:
        return self.model.graph.name or "model"

    @property
    def files(self) -> list[Path]:
        return []

    def read(self) -> tuple[onnx.ModelProto, str]:
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        if any(uses_external_data(t) for t in tensors(copy)):
            raise ModelError(f"{self.where}: some of its tensors are stored in other files; load it with onnx.load(path), which reads them, or give the path")
        return checked(self.where, copy), hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()

    def elsewhere(self) -> OnnxRuntime:
        return OnnxRuntime(self.model.SerializeToString())


def read(path: Path) -> tuple[onnx.ModelProto, str]:
    """(model, sha256 hex of its file and of its external data). Model-local functions are inlined, operator sets before 7 upgraded.

    Raises ModelError for a file that can't be read, is no ONNX model, is truncated, or whose external data is missing or too short.
    """
    try:
        data = read_regular(path)
    except OSError as error:
        raise ModelError(f"{path}: can't read the model: {error.strerror or error}") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError
        raise ModelError(f"{path}: not an ONNX model, or truncated ({len(data)} bytes can't be decoded). Export or download it again{by_name(path)}") from error
    if not model.ir_version or not model.opset_import or not (model.graph.node or model.graph.output):
        raise ModelError(f"{path}: not an ONNX model: it has no graph or no operator set. Expected a file written by an ONNX exporter{by_name(path)}")
    digest = hashlib.sha256(data)
    del data  # as large as the model
    loaded: dict[str, bytes] = {}
    for tensor in tensors(model):
        if uses_external_data(tensor):
            _load_external(path, tensor, loaded)
    for location in sorted(loaded):
        digest.update(location.encode() + b"\0" + loaded[location])
    return checked(str(path), model), digest.hexdigest()


def checked(where: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its functions inlined, its operator set upgraded. Raises ModelError for one that contradicts itself."""
    if not model.opset_import or not (model.graph.node or model.graph.output):
        raise ModelError(f"{where}: not an ONNX model: it has no graph or no operator set. Expected a model made by an ONNX exporter")
    for tensor in tensors(model):
        try:
            numpy_helper.to_array(tensor)
        except Exception as error:  # of an unknown type, or with more or fewer bytes than its shape takes
            raise ModelError(f"{where}: the data of tensor '{tensor.name}' is damaged: {type(error).__name__}: {error}") from error
    return _modern(where, model)


def files_of(path: Path) -> list[Path]:
    """The file of a model and those of its external data, as far as they can be told."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(read_regular(path))
    except Exception:  # whoever compiles it will say what is wrong
        return [path]
    located = {e.value for t in tensors(model) if uses_external_data(t) for e in t.external_data if e.key == "location"}
    return [path, *(path.parent / name for name in sorted(located))]


def names(model: onnx.ModelProto) -> Iterator[str]:
    """The names of every tensor and node of a model, in subgraphs too."""
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        yield from (named.name for named in (*graph.input, *graph.output, *graph.initializer, *graph.node))
        yield from (sparse.values.name for sparse in graph.sparse_initializer)
        for node in graph.node:
            yield from (*node.input, *node.output)
            graphs += [a.g for a in node.attribute if a.HasField("g")] + [g for a in node.attribute for g in a.graphs]


QUANTIZED = 10.0
"""`exactness` of a quantized file."""


def exactness(model: onnx.ModelProto) -> float:
    """The SQNR, in dB, that two implementations of the float network of a model reach at least: 60 where everything is float32 (sums in another order,
    other approximations of exp), 30 where halves are stored or computed, `QUANTIZED` where the file is, whose steps the float network leaves out."""
    nodes = list(_nodes([*model.graph.node, *(n for function in model.functions for n in function.node)]))
    if any(n.op_type.startswith(("QLinear", "QGemm")) or n.op_type.endswith(("QuantizeLinear", "Integer", "QuantizeLSTM")) for n in nodes):
        return QUANTIZED
    ports = [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)]
    casts = [a.i for n in nodes if n.op_type == "Cast" for a in n.attribute if a.name == "to"]
    return 30.0 if _HALVES & {t.data_type for t in tensors(model)}.union(ports, casts) else 60.0


def rounded(model: onnx.ModelProto) -> frozenset[str]:
    """The outputs that are the integers of a quantization."""
    return frozenset({o.name for o in model.graph.output} & {n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"})


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model stores: initializers and attributes, in subgraphs and functions too."""
    everywhere = [*model.graph.node, *(n for function in model.functions for n in function.node)]
    attributes = [a for node in _nodes(everywhere) for a in node.attribute]
    for graph in [model.graph, *(g for a in attributes for g in (a.g, *a.graphs))]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def _load_external(path: Path, tensor: onnx.TensorProto, loaded: dict[str, bytes]) -> None:
    """Read a tensor's external data in place; `loaded` collects the digests of the files' contents by location."""
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    where = f"{path}: tensor '{tensor.name}' is stored in '{location}'"
    file = path.parent / location
    try:
        inside = file.resolve().is_relative_to(path.parent.resolve())
        if location not in loaded and inside:
            with open_regular(file) as stream:
                loaded[location] = hashlib.file_digest(stream, "sha256").digest()
    except (OSError, ValueError) as error:
        raise ModelError(f"{where}, which can't be read: {getattr(error, 'strerror', None) or error}. Put that file beside the model") from error
    if not inside:
        raise ModelError(f"{where}, outside of the model's folder; supported: files beside the model")
    try:
        load_external_data_for_tensor(tensor, str(path.parent))
    except Exception as error:  # the helper raises its own checker's errors
        raise ModelError(f"{where}, which can't be read: {error}") from error
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """These nodes, and those of their subgraphs."""
    left = list(nodes)
    while left:
        node = left.pop()
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                left += graph.node


def check_size(where: str, model: onnx.ModelProto) -> None:
    """Raises ModelError for a model of more than `LARGEST` nodes, those of its functions counted wherever they are called: a few nested functions that
    call each other twice are millions. Nothing is expanded for it."""
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    under_way: set[tuple[str, str]] = set()

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in _nodes(nodes):
            name = (node.domain, node.op_type)
            if name in under_way or len(under_way) > DEEPEST:
                problem = "calls itself" if name in under_way else f"is one of more than {DEEPEST} that call each other"
                raise ModelError(f"{where}: its function '{node.op_type}' {problem}; export the model without functions")
            if name in functions and name not in sizes:
                under_way.add(name)
                sizes[name] = size(functions[name].node)
                under_way.remove(name)
            total += sizes.get(name, 1)
        return total

    if size(model.graph.node) > LARGEST:
        raise ModelError(f"{where}: the model has more than {LARGEST} nodes, its functions expanded; cut it into parts")


def check_nodes(where: str, model: onnx.ModelProto) -> None:
    """Raises ModelError for a node that lacks a result or an operand that its operator must have, and for a name that is no text."""
    version = default_opset(model)
    for node in _nodes(model.graph.node):  # functions may be of other operator sets
        node_name = f"{where}: node '{node.name or next(iter(node.output), '')}' ({node.op_type})"
        if not all(isinstance(text, str) for text in (node.name, node.op_type, node.domain, *node.input, *node.output)):
            raise ModelError(f"{node_name}: a name is damaged (it is no UTF-8)")
        if not any(node.output):
            raise ModelError(f"{node_name}: has no result")
        try:
            formals = onnx.defs.get_schema(node.op_type, version, "").inputs if node.domain in ("", "ai.onnx") else []
        except onnx.defs.SchemaError:
            continue
        for index, formal in enumerate(formals):
            if formal.option == onnx.defs.OpSchema.FormalParameterOption.Single and not (index < len(node.input) and node.input[index]):
                raise ModelError(f"{node_name}: its operand {index} ({formal.name}) is missing")


def _modern(where: str, model: onnx.ModelProto) -> onnx.ModelProto:
    check_size(where, model)
    for opset in model.opset_import:
        if not 1 <= opset.version <= 10_000:
            raise ModelError(f"{where}: asks for version {opset.version} of the operator set '{opset.domain or 'ai.onnx'}', which there can't be")
    check_nodes(where, model)
    try:
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        version = default_opset(model)
        if version < OLDEST:
            model = onnx.version_converter.convert_version(model, UPGRADED)
    except Exception as error:
        reason = f"operator set {default_opset(model)} can't be converted to {UPGRADED}: {error}"
        raise ModelError(f"{where}: {reason}. Export the model with operator set 13 or later") from error
    naming = Naming.beside(names(model))
    return with_cells(without_sequences(model, naming), naming)


def default_opset(model: onnx.ModelProto) -> int:
    """The version of the standard operator set that a model uses; any will do for one that uses none."""
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), UPGRADED)
