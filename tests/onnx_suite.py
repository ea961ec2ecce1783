"""The node cases of the ONNX backend suite that a compiler of tensors can be asked for, and how to run hundreds of them in one library.

A case feeds every operand at run time; what this compiler needs to know when it compiles (axes, sizes, recurrent weights, ...) is made a constant first.
What becomes of each case is in onnx_suite.tsv: only the refused ones are listed. After a change that is meant: `python -m tests.onnx_suite`.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test import loader

from qcompiler.backend.build import build, session_of
from qcompiler.base.errors import InternalError, QCompilerError
from qcompiler.base.targets import find_target
from qcompiler.importers.model import FloatModel, load
from qcompiler.passes import sequence
from qcompiler.passes.graph import Graph, GraphBuilder, dtype_of, shape_of, substitute
from qcompiler.passes.trained import ATTRIBUTE, Trained

HERE = Path(__file__).resolve().parent
FLOAT_TABLE = "onnx_suite.tsv"
RIGHT = "right"

NARROW = {
    TensorProto.INT4, TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2, TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ, TensorProto.FLOAT8E8M0,
}  # fmt: skip
RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}

# Operator -> operands that are its parameters: known when a network is compiled.
PARAMETERS = {
    "AffineGrid": [1], "BlackmanWindow": [0], "CenterCropPad": [1], "Col2Im": [1, 2], "Compress": [1], "ConstantOfShape": [0], "ConvInteger": [1, 2, 3],
    "CumProd": [1], "CumSum": [1], "DFT": [1, 2], "DequantizeLinear": [1, 2], "Dropout": [1, 2], "Expand": [1], "GRU": [1, 2, 3, 4],
    "HammingWindow": [0], "HannWindow": [0], "If": [0], "LSTM": [1, 2, 3, 4, 7], "Loop": [0, 1], "MatMulInteger": [1, 2, 3], "MaxUnpool": [2],
    "MelWeightMatrix": [0, 1, 2, 3, 4], "OneHot": [1, 2], "Pad": [1, 2, 3], "QLinearConv": [1, 2, 3, 4, 5, 6, 7, 8], "QLinearMatMul": [1, 2, 4, 5, 6, 7],
    "QuantizeLinear": [1, 2], "RNN": [1, 2, 3, 4], "Range": [0, 1, 2], "Reshape": [1], "Resize": [1, 2, 3], "STFT": [1, 2, 3], "Slice": [1, 2, 3, 4],
    "Split": [1], "Squeeze": [1], "Tile": [1, 2], "TopK": [1], "Trilu": [1], "Unsqueeze": [1], "Upsample": [1],
    **{f"Reduce{kind}": [1] for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")},
}  # fmt: skip
BESIDE = "beside"  # an input that passes through a model without other inputs: a network has at least one


@dataclass(frozen=True)
class Case:
    """One model with one data set. `feeds`: {input name: array}; `wanted`: the outputs in order; tolerances as numpy's `allclose` takes them."""

    name: str
    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    wanted: list[np.ndarray]
    rtol: float
    atol: float


@functools.cache
def cases() -> dict[str, Case]:
    """Every case by its name, but for those of training, strings, sequences, optionals, random numbers, and types narrower than 8 bits or float8."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = {t.name: t for t in loader.load_model_tests(kind="node")}
    wanted = {name: t for name, t in found.items() if _in_scope(t)}
    return {name: _case(t, _parameters(found.get(name.split("_expanded")[0], t).model.graph)) for name, t in wanted.items()}


def _in_scope(test: Any) -> bool:
    graph = test.model.graph
    infos = [*graph.input, *graph.output]
    types = {v.type.tensor_type.elem_type for v in infos}
    return not (
        any(not v.type.HasField("tensor_type") for v in infos)
        or types & NARROW
        or TensorProto.STRING in types
        or "train" in test.name
        or any("training" in n.domain or n.op_type in RANDOM for n in graph.node)
    )


def _parameters(graph: onnx.GraphProto) -> set[str]:
    return {n.input[i] for n in graph.node for i in PARAMETERS.get(n.op_type, []) if i < len(n.input)}


def _case(test: Any, parameters: set[str]) -> Case:
    """The case with its parameters as constants; with an input of its own beside it when none is left."""
    inputs, outputs = test.data_sets[0]
    model = onnx.ModelProto()
    model.CopyFrom(test.model)
    graph, feeds = model.graph, {}
    for info, value in zip(list(graph.input), inputs, strict=False):
        if value is None:
            continue
        array = _array(value)
        if info.name in parameters:
            graph.initializer.append(numpy_helper.from_array(array, info.name))
            graph.input.remove(info)
        else:
            feeds[info.name] = array
    if not feeds:
        feeds[BESIDE] = np.ones(1, np.float32)
        graph.input.append(helper.make_tensor_value_info(BESIDE, TensorProto.FLOAT, [1]))
        graph.output.append(helper.make_tensor_value_info(f"{BESIDE}-out", TensorProto.FLOAT, [1]))
        graph.node.append(helper.make_node("Identity", [BESIDE], [f"{BESIDE}-out"]))
        outputs = [*outputs, feeds[BESIDE]]
    return Case(test.name, model, feeds, [_array(o) for o in outputs], test.rtol, test.atol)


def _array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def imported(case: Case, folder: Path) -> FloatModel | str:
    """The canonical network, or what its refusal says; a traceback where another error than a refusal is raised."""
    path = folder / f"{case.name}.onnx"
    path.write_bytes(case.model.SerializeToString())
    try:
        return load(path, {name: array.shape for name, array in case.feeds.items() if array.ndim})
    except InternalError:
        return traceback.format_exc()
    except QCompilerError as refusal:
        return "refused: " + str(refusal).removeprefix(f"{path}: ").removeprefix("node ")
    except Exception:
        return traceback.format_exc()


def merged(models: Mapping[str, FloatModel]) -> tvm.IRModule:
    """One module that computes all of them, side by side: value `v` of model `m` is called `m/v`."""
    trained, parts = Trained(), {name: Graph.of(model.module) for name, model in models.items()}
    for name, graph in parts.items():
        own = Trained.of(graph.attrs)
        for field in ("values", "weights", "biases", "constants"):
            getattr(trained, field).update({f"{name}/{k}": v for k, v in getattr(own, field).items()})
        trained.notes += own.notes
    builder, outputs = GraphBuilder({ATTRIBUTE: trained.attribute()} if trained else {}), []
    for name, graph in parts.items():
        env = {str(p.name): builder.input(f"{name}/{p.name}", shape_of(p), dtype_of(p)) for p in graph.inputs}
        for value, expr in graph.bindings:
            env[value] = builder.emit(f"{name}/{value}", substitute(expr, lambda v, env=env: env[str(v.name)]))  # type: ignore[misc]
        outputs += [(f"{name}/{output}", env[str(v.name)]) for output, v in graph.outputs]
    return builder.finish(outputs)


def float_verdicts(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Every case compiled in float, all in one library, and run: "right", "refused: <sentence>" or what is wrong."""
    found, models = {}, dict[str, FloatModel]()
    for name in names:
        result = imported(cases()[name], folder)
        if isinstance(result, str):
            found[name] = result
        else:
            models[name] = result
    built = build(sequence.run(sequence.FLOAT, merged(models)), find_target("native"), "generate float code")
    with session_of(built.link()) as session:
        feeds = feeds_of(models)
        for behind in (True, False):  # a guard page directly behind the inputs, then directly before them
            outputs = session.run({name: guarded(array, behind) for name, array in feeds.items()})
            for name, model in models.items():
                short = fault(cases()[name], [outputs[f"{name}/{o.name}"] for o in model.outputs])
                found[name] = found.get(name) if found.get(name, RIGHT) != RIGHT else short or RIGHT  # type: ignore[assignment]
    return found


def guarded(array: np.ndarray, behind: bool) -> np.ndarray:
    """A copy whose last byte lies before a page that can't be read, or whose first byte lies behind one. The rest of its own pages holds NaN bytes."""
    page = mmap.PAGESIZE
    size = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    whole = np.frombuffer(memory, np.uint8)
    whole[page : page + size] = 0xFF
    first = page + (size - array.nbytes if behind else 0)
    part = whole[first : first + array.nbytes]
    part[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for at in (start, start + page + size):
        assert _LIBC.mprotect(ctypes.c_void_p(at), page, 0) == 0  # PROT_NONE
    return part.view(array.dtype).reshape(array.shape)


_LIBC = ctypes.CDLL(None, use_errno=True)


def feeds_of(models: Mapping[str, FloatModel]) -> dict[str, np.ndarray]:
    """Inputs of the merged network: floating types as float32, as every floating input is."""
    found = {}
    for name, model in models.items():
        for info in model.inputs:
            found[f"{name}/{info.name}"] = np.ascontiguousarray(cases()[name].feeds[info.name].astype(info.dtype)).reshape(info.shape)
    return found


def fault(case: Case, got: list[np.ndarray]) -> str:
    """How computed outputs differ from the case's, in a few words; empty when they don't."""
    for index, (want, have) in enumerate(zip(case.wanted, got, strict=True)):
        if want.shape != have.shape:
            return f"output {index} has shape {have.shape}, not {want.shape}"
        floating = want.dtype.kind == "f" or want.dtype.name == "bfloat16"
        if not floating and want.dtype != have.dtype:
            return f"output {index} is {have.dtype}, not {want.dtype}"
        narrow = {"float16": 2e-3, "bfloat16": 2e-2}.get(want.dtype.name, 0.0)  # the case's own values are rounded to that type at every step
        close = np.isclose(have.astype(np.float64), want.astype(np.float64), max(case.rtol, narrow), max(case.atol, 1e-6 + narrow), equal_nan=True)
        if not close.all():
            return f"output {index} is wrong in {np.count_nonzero(~close)} of {close.size} elements"
    return ""


def expected(file: str) -> dict[str, str]:
    """{case: verdict} of the cases whose verdict is not "right"."""
    rows = [line.split("\t", 1) for line in (HERE / file).read_text().splitlines() if not line.startswith("#")]
    return dict(rows)


def write(file: str, verdicts: Mapping[str, str], header: str, usual: str = RIGHT) -> None:
    lines = [f"{name}\t{verdict}" for name, verdict in sorted(verdicts.items()) if verdict != usual]
    (HERE / file).write_text("\n".join([f"# {header}", *lines]) + "\n")


def batches(names: Sequence[str], size: int = 150) -> list[list[str]]:
    return [list(names[i : i + size]) for i in range(0, len(names), size)]


def main() -> None:
    verdicts: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for batch in batches(list(cases())):
            verdicts |= float_verdicts(batch, Path(folder))
    plain = [v for n, v in verdicts.items() if "_expanded" not in n]
    right, refused = (sum(v.startswith(word) for v in plain) for word in (RIGHT, "refused"))
    others = len(plain) - right - refused
    header = f"onnx {onnx.__version__}: {right} of {len(plain)} cases are right, {refused} refused, {others} wrong (those of expanded definitions not counted)"
    write(FLOAT_TABLE, verdicts, header)
    print(header)


if __name__ == "__main__":
    main()
