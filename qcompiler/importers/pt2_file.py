"""A `.pt2` file (`torch.export.save`) as an exported program, without running anything that the file says.

It is a zip archive: the graph as JSON (`models/model.json`), weights as raw bytes (`data/weights/weight_N`), example inputs as a pickle.
`torch.export.load` unpickles (the example inputs, and whatever the archive marks so), evaluates texts as Python (symbolic shapes, guards) and takes any
function below `torch` for an operator, so it is not for files of strangers. Here weights are read as numbers, pickles are left unread, and of the graph's JSON
only what `_checked` knows goes to PyTorch's deserializer; all else is refused.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import math
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcompiler.base.errors import ModelError
from qcompiler.base.files import open_regular

LOADED = "load it in Python, if you trust it (that may run code from the file), and give qcompiler.compile the program: torch.export.load(PATH)"
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file|_print|set_|_?resize|as_strided_|_nested|_sparse|_reinterpret|_cuda|_cudnn|_mkldnn)\w+\.\w+"
    r"|torch\.ops\.(quantized_decomposed|prims)\.\w+\.\w+|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\.sym_(int|float|max|min|not)|math\.(ceil|floor|trunc)"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
"""Operators of numbers. Left out: what reads files, prints, or looks into memory by addresses and strides of its own."""
_SHAPE_WORDS = frozenset("Symbol Integer Add Mul Max Min FloorDiv ModularIndexing Mod PythonMod CleanDiv CeilDiv CeilToInt FloorToInt TruncToInt".split())
_DICTIONARIES = ("builtins.dict", "collections.OrderedDict")
_DEEPEST = 200  # nested lists and objects of the JSON
_BEYOND = 1 << 63
_KEPT_METADATA = ("nn_module_stack",)


def read_program(path: Path) -> Any:
    """The `torch.export.ExportedProgram` in a `.pt2` file. Raises ModelError for a file that can't be read or holds what would have to be unpickled or run."""
    try:
        import torch
        from torch._export.serde import schema, serialize
    except ImportError as error:
        raise ModelError(f"{path}: an exported PyTorch program is read with PyTorch: pip install 'qcompiler[torch]'") from error
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            held = _Archive(path, archive)
            graph = _checked(path, held.json("models/model.json"))
            tensors = {part: _tensors(path, held, part) for part in ("weights", "constants")}
        torch.export  # noqa: B018  the deserializer needs it to be there
        with silent():
            described = serialize._dict_to_dataclass(schema.ExportedProgram, graph)
            return serialize.ExportedProgramDeserializer(None).deserialize(described, tensors["weights"], tensors["constants"], b"")
    except (ModelError, MemoryError, KeyboardInterrupt):
        raise
    except OSError as error:
        raise ModelError(f"{path}: can't read the model: {error.strerror or error}") from error
    except Exception as error:  # the deserializer trusts the file, and raises whatever its parts raise
        raise ModelError(f"{path}: damaged, or of a form that PyTorch {torch.__version__} doesn't read: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """The first sentence of what PyTorch says, of the innermost cause."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)[:300]


class _Archive:
    """The members of the archive, below its one folder."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path, self._archive = path, archive
        self._members = {i.filename.partition("/")[2]: i for i in archive.infolist()}
        if "models/model.json" not in self._members or "data/weights/model.pt" in self._members:
            what = "an older PyTorch wrote it, with its weights as a pickle (nothing is unpickled here: that would run code from the file)"
            raise ModelError(f"{path}: {what}. What to do: {LOADED}; torch.export.save writes it anew")
        if "byteorder" in self._members and self.bytes("byteorder").strip() != b"little":
            raise ModelError(f"{path}: its weights are big-endian; write it on a little-endian machine")

    def bytes(self, name: str) -> bytes:
        member = self._members.get(name)
        if member is None:
            raise ModelError(f"{self._path}: damaged: '{name}' is missing in the archive")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ModelError(f"{self._path}: '{name}' is compressed, which torch.export.save never does; write the file with it")
        return self._archive.read(member)

    def json(self, name: str) -> Any:
        try:
            return _shallow(json.loads(self.bytes(name)))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{self._path}: damaged: '{name}' is no JSON ({str(error)[:100]})") from error


def _shallow(value: Any) -> Any:
    """`value`, if it is not nested deeper than any network is. Raises ValueError."""
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [v for item in level if isinstance(item, (dict, list)) for v in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {_DEEPEST}")


def _tensors(path: Path, archive: _Archive, part: str) -> dict[str, Any]:
    """The weights or constants, by name: views of the bytes that several may share."""
    import torch
    from torch._export.serde import schema, serialize

    stored: dict[str, Any] = {}
    found = {}
    for name, described in archive.json(f"data/{part}/model_{part}_config.json")["config"].items():
        if described["use_pickle"]:
            raise ModelError(f"{path}: '{name}' is kept as a pickle (nothing is unpickled here: that would run code from the file). What to do: {LOADED}")
        meta = serialize._dict_to_dataclass(schema.TensorMeta, described["tensor_meta"])
        kind = serialize.deserialize_scalar_type(meta.dtype)
        sizes, strides = serialize.deserialize_size(meta.sizes), serialize.deserialize_stride(meta.strides)
        place = described["path_name"]
        if place not in stored:
            stored[place] = bytearray(archive.bytes(f"data/{part}/{place}"))
        flat = torch.frombuffer(stored[place], dtype=kind) if stored[place] else torch.empty(0, dtype=kind)
        if math.prod(sizes) > flat.numel():
            more = f"{flat.numel()} numbers are stored for it; save an expanded view as .contiguous()"
            raise ModelError(f"{path}: '{name}' is {list(sizes)}, and {more}")
        tensor = torch.as_strided(flat, sizes, strides, serialize.deserialize_storage_offset(meta.storage_offset))
        found[name] = torch.nn.Parameter(tensor, requires_grad=False) if described["is_param"] else tensor
    return found


def _checked(path: Path, graph: Any) -> Any:
    """The JSON of a graph without what is of no use here, when nothing in it makes PyTorch run or import what the file names. Raises ModelError."""

    def refused(what: str) -> ModelError:
        return ModelError(f"{path}: {what}, which is not read from a file here. What to do: {LOADED}")

    graph["guards_code"] = []  # Python source
    for holder, key, value in _walk(graph):
        if key in ("target", "as_operator") and isinstance(value, str) and not _OPERATOR.fullmatch(value):
            raise refused(f"the graph calls '{value[:100]}'")
        elif key == "expr_str" and not _is_shape(value):
            raise refused(f"a shape is given as '{str(value)[:100]}'")
        elif key in ("in_spec", "out_spec") and isinstance(value, str):
            holder[key] = _plain_tree(value)
        elif key in ("as_custom_obj", "as_opaque") or (key == "custom_obj_values" and value):
            raise refused("the graph holds objects that are no tensors")
        elif key == "metadata" and isinstance(value, dict) and "target" in holder:
            holder[key] = {name: text for name, text in value.items() if name in _KEPT_METADATA and isinstance(text, str)}
        elif isinstance(value, int) and not -_BEYOND <= value < _BEYOND:
            raise ModelError(f"{path}: damaged: the integer {value:.3g} is beyond any size")
    return graph


def _walk(value: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Every (object, key, value) of the JSON; values in lists under the key of the list."""
    todo: list[Any] = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, list):
            todo += item
        elif isinstance(item, dict):
            for key, held in list(item.items()):
                yield item, key, held
                todo.append(item[key])


def _is_shape(text: Any) -> bool:
    """Is this an expression of sizes (`Mul(Integer(2), Symbol('s0', positive=True))`), and nothing else that Python could evaluate?"""
    if not isinstance(text, str) or len(text) > 1000:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            known = isinstance(node.func, ast.Name)
        elif isinstance(node, ast.Name):
            known = node.id in _SHAPE_WORDS
        elif isinstance(node, ast.Constant):
            known = isinstance(node.value, (bool, int)) or (isinstance(node.value, str) and re.fullmatch(r"[a-z]\w{0,30}", node.value) is not None)
        else:
            known = isinstance(node, (ast.Expression, ast.keyword, ast.Load, ast.UnaryOp, ast.USub))
        if not known:
            return False
    return True


def _plain_tree(text: str) -> str:
    """The form of arguments or results in tuples, lists and dictionaries; what is of any other class, which would be imported, becomes a tuple of the same
    leaves. Raises ValueError, TypeError or KeyError for what is no such form."""
    version, tree = _shallow(json.loads(text))
    level = [tree]
    while level:
        for node in level:
            keys = json.loads(node["context"] or "null")
            if node["type"] in _DICTIONARIES and isinstance(keys, list) and all(isinstance(k, (str, int)) for k in keys):
                continue
            if node["type"] is not None:
                node["type"], node["context"] = ("builtins.list" if node["type"] == "builtins.list" else "builtins.tuple"), "null"
        level = [child for node in level for child in node["children_spec"]]
    return json.dumps([version, tree])


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without PyTorch's warnings and logs of its own."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
