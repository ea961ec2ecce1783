"""Damaged and hostile files against everything that reads files: each is read, or refused with a `QCompilerError`; never a signal, a hang or another exception.

    python tests/fuzz.py [--count 500] [--first 0] [--seed 0] [--workers 2] [--library FILE.so] [--keep DIR]

Case number n of a seed is always the same. A worker process that dies names its case by having begun it. Exit status 1 when there is a finding; with --keep
the files of the findings are left in DIR.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tflite_states
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tflite_cases import BOTH
from tflite_nets import TfliteNet

from qcompiler.backend.lowering import lower
from qcompiler.backend.tuning_log import SHIPPED, best_of, merge, read_log, workload_text
from qcompiler.base.errors import InternalError, QCompilerError
from qcompiler.base.targets import default_file, find_target, load_targets
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.data import load_labels, open_samples
from qcompiler.calibration.preprocess import load_preprocess
from qcompiler.calibration.table import CalibrationTable
from qcompiler.importers.model import load
from qcompiler.passes.groups import find_groups
from qcompiler.passes.select_float import select_float
from qcompiler.plan.quant_plan import QuantPlan
from qcompiler.runtime.library import read_manifest
from qcompiler.runtime.session import Session
from qcompiler.tuning.model import Space, features
from qcompiler.tuning.remote import PENDING, import_results

CPU, WALL = 30, 240  # seconds that a case may compute, and take
MEMORY = 24 << 30  # bytes of address space of a worker

# -- damage to bytes --------------------------------------------------------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to four of: bits flipped, bytes and numbers set, a piece cut out, doubled, moved or invented, the end lost."""
    whole = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(whole)
        at, length = rng.randrange(size + 1), min(size, int(2 ** (rng.random() * 9)))
        match rng.randrange(8):
            case 0:
                for _ in range(rng.choice((1, 1, 8, 64))):
                    if whole:
                        whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            case 1:
                whole[at : at + length] = bytes([rng.choice((0, 255, 127, 128, 32))]) * length
            case 2:
                number = rng.choice((-1, 0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62))
                whole[at : at + 8] = (number % 2**64).to_bytes(8, "little")[: rng.choice((2, 4, 8))]
            case 3:
                del whole[at : at + length]
            case 4:
                whole[at:at] = whole[at : at + length]
            case 5:
                other = rng.randrange(size + 1)
                whole[at:at] = whole[other : other + length]
            case 6:
                whole[at:at] = rng.randbytes(length)
            case _:
                del whole[at:]
    return bytes(whole)


NUMBERS = (-1, 0, 1, 2, 7, -(2**31), 2**31, 2**40, 10**30, 1.0, -0.5, 1e400, float("nan"), 1e-400)
VALUES: tuple[Any, ...] = (*NUMBERS, True, None, "", "x", "1/0", "1e999999999", [], [8], [[1]], {})


def damaged_json(value: Any, rng: random.Random) -> Any:
    """Something inside replaced, removed or nested."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        copy = dict(value) if isinstance(value, dict) else list(value)
        place = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        if rng.random() < 0.1:
            del copy[place]
        else:
            copy[place] = damaged_json(copy[place], rng)
        return copy
    if rng.random() < 0.05:
        nested: Any = 1
        for _ in range(rng.choice((3, 300))):
            nested = [nested]
        return nested
    return rng.choice(VALUES)


# -- what is damaged ------------------------------------------------------------------------------------------------------------------------------


def _model(nodes: list[onnx.NodeProto], shape: list[int], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@cache
def models() -> list[onnx.ModelProto]:
    """A convolutional network, one of matrix products and shapes computed at run time, a quantized one, and one with a function and a subgraph."""
    rng, node = np.random.default_rng(0), helper.make_node

    def random_(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    convolutions = _model(
        [
            node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2], kernel_shape=[3, 3]),
            node("BatchNormalization", ["c", "b", "b", "b", "v"], ["n"], epsilon=1e-5),
            node("PRelu", ["n", "slopes"], ["r"]),
            node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[1, 1], pads=[0, 0, 1, 1]),
            node("ConvTranspose", ["p", "t"], ["d"], strides=[2, 2]),
            node("LeakyRelu", ["d"], ["l"], alpha=0.1),
            node("Resize", ["l", "", "f"], ["z"], mode="nearest"),
            node("Pad", ["z", "a"], ["e"]),
            node("AveragePool", ["e"], ["g"], kernel_shape=[3, 3]),
            node("GlobalAveragePool", ["g"], ["h"]),
            node("Flatten", ["h"], ["y"]),
        ],
        [1, 3, 8, 8],
        {"w": random_(4, 3, 3, 3), "b": random_(4), "v": np.ones(4, np.float32), "t": random_(4, 2, 2, 2), "f": np.array([1, 1, 2, 2], np.float32)}
        | {"a": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "slopes": random_(4, 1, 1)},
    )
    products = _model(
        [
            node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "one"], ["k"]),
            node("Concat", ["k", "minus"], ["rs"], axis=0),
            node("Reshape", ["x", "rs"], ["m"]),
            node("LayerNormalization", ["m", "g"], ["n"], axis=-1),
            node("MatMul", ["n", "w"], ["q"]),
            node("Transpose", ["q"], ["qt"], perm=[1, 0]),
            node("MatMul", ["q", "qt"], ["a"]),
            node("Softmax", ["a"], ["p"], axis=-1),
            node("Split", ["p"], ["p0", "p1"], axis=0),
            node("Mul", ["p0", "p1"], ["pm"]),
            node("Slice", ["pm", "zero", "two", "zero", "one"], ["sl"]),
            node("ReduceMean", ["sl"], ["rm"], axes=[1], keepdims=1),
            node("Where", ["c", "rm", "half"], ["wh"]),
            node("Gemm", ["wh", "gw"], ["y"], alpha=0.5, transB=1),
        ],
        [1, 4, 8],
        {"one": np.array([1]), "minus": np.array([-1]), "g": random_(8), "w": random_(8, 8), "zero": np.array([0]), "two": np.array([2])}
        | {"c": np.array([[True], [False]]), "half": np.array(0.5, np.float32), "gw": random_(3, 1)},
    )
    quantized = _model(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
            node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
            node("MatMul", ["xd", "wd"], ["m"]),
            node("Relu", ["m"], ["r"]),
            node("QuantizeLinear", ["r", "s", "z"], ["rq"]),
            node("DequantizeLinear", ["rq", "s", "z"], ["y"]),
        ],
        [1, 8],
        {"s": np.array(0.05, np.float32), "z": np.array(3, np.int8), "w": rng.integers(-127, 127, (8, 4)).astype(np.int8)}
        | {"ws": np.abs(random_(4)) + np.float32(0.1), "wz": np.zeros(4, np.int8)},
    )
    branch = helper.make_graph([node("Sigmoid", ["x"], ["o"])], "b", [], [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)])
    composed = _model([node("If", ["t"], ["i"], then_branch=branch, else_branch=branch), node("F", ["i"], ["y"], domain="own")], [1, 8], {"t": np.array(True)})
    opsets = [helper.make_opsetid("", 17)]
    composed.functions.append(helper.make_function("own", "F", ["a"], ["b"], [node("Exp", ["a"], ["e"]), node("Elu", ["e"], ["b"], alpha=0.3)], opsets))
    composed.opset_import.append(helper.make_opsetid("own", 1))
    return [convolutions, products, quantized, composed]


OPERATORS = [s.name for s in onnx.defs.get_all_schemas() if not s.deprecated]
INTEGERS = (-(2**40), -(2**31), -2, -1, 0, 1, 2, 3, 5, 127, 2**16, 2**31, 2**40, 2**62)
FLOATS = (0.0, -1.0, 1e-45, 1e38, float("nan"), float("inf"), -float("inf"), 1e-3)


def damaged_model(rng: random.Random) -> bytes:
    model = onnx.ModelProto()
    model.CopyFrom(rng.choice(models()))
    if rng.random() < 0.3:
        return damaged(model.SerializeToString(), rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        graph = model.graph
        node = rng.choice(graph.node) if graph.node else graph.node.add()
        tensor = rng.choice(graph.initializer) if graph.initializer else graph.initializer.add()
        names = [o for n in graph.node for o in n.output] + [t.name for t in graph.initializer] + ["x", "", "absent"]
        match rng.randrange(14):
            case 0:
                node.op_type = rng.choice(OPERATORS)
            case 1 if node.input:
                node.input[rng.randrange(len(node.input))] = rng.choice(names)
            case 2:
                node.input.append(rng.choice(names))
            case 3 if node.input:
                del node.input[rng.randrange(len(node.input))]
            case 4 if node.output:
                node.output[rng.randrange(len(node.output))] = rng.choice(names)
            case 5 | 6 if node.attribute:
                _damage_attribute(rng.choice(node.attribute), rng)
            case 7 if tensor.dims:
                tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(INTEGERS)
            case 8:
                tensor.data_type = rng.randrange(30)
            case 9 if tensor.data_type in (1, 7) and tensor.raw_data:
                values = numpy_helper.to_array(tensor).copy() if _whole(tensor) else np.zeros(1, np.float32)
                if values.size:
                    values.flat[rng.randrange(values.size)] = rng.choice(FLOATS) if values.dtype.kind == "f" else rng.choice(INTEGERS)
                tensor.raw_data = values.tobytes()
            case 10:
                tensor.raw_data = damaged(tensor.raw_data, rng)
            case 11:
                dim = graph.input[0].type.tensor_type.shape.dim[rng.randrange(len(graph.input[0].type.tensor_type.shape.dim))]
                if rng.random() < 0.3:
                    dim.dim_param = rng.choice(("N", "?", "", "\n"))
                else:
                    dim.dim_value = rng.choice(INTEGERS)
                if rng.random() < 0.3:
                    graph.input[0].type.tensor_type.elem_type = rng.randrange(30)
            case 12:
                model.opset_import[0].version = rng.choice((-1, 0, 1, 5, 6, 7, 9, 11, 13, 18, 21, 23, 99))
            case _:
                nodes = list(graph.node)
                rng.shuffle(nodes)
                kept = nodes[: rng.randrange(len(nodes) + 1)]
                del graph.node[:]
                graph.node.extend(kept)
    return bytes(model.SerializeToString())


def _whole(tensor: onnx.TensorProto) -> bool:
    try:
        numpy_helper.to_array(tensor)
    except Exception:
        return False
    return True


def _damage_attribute(attribute: onnx.AttributeProto, rng: random.Random) -> None:
    if attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(INTEGERS)
        if rng.random() < 0.3:
            del attribute.ints[rng.randrange(len(attribute.ints)) :]
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice(INTEGERS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice(FLOATS)
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = rng.choice((b"", b"linear", b"\xff\xfe", b"SAME_UPPER"))
    else:
        attribute.type = rng.randrange(1, 12)
    if rng.random() < 0.2:
        attribute.name = rng.choice(("axis", "perm", "pads", "", "alpha"))


# -- the cases ------------------------------------------------------------------------------------------------------------------------------------

Case = Callable[[random.Random, Path, Path], None]  # random numbers, an empty folder, a library
IMAGE = [TensorInfo("x", (1, 3, 4, 4), "float32")]
YAML = b"""resize: 8
crop: [4, 4]
interpolation: bilinear
color: RGB
scale: 1/255
mean: [0.485, 0.456, 0.406]
std: [0.2, 0.2, 0.2]
layout: NCHW
background: 7
"""


def model(rng: random.Random, folder: Path, library: Path) -> None:
    (folder / "m.onnx").write_bytes(damaged_model(rng))
    imported = load(folder / "m.onnx")
    find_groups(imported.module)
    if rng.random() < 0.5:
        lower(select_float(imported.module), find_target("x86-avx2"))


@cache
def tflite_models() -> list[bytes]:
    """A float network, a quantized one, and what keeps something from call to call; loaded once before the processes part."""
    made = []
    for quantization in (None, (0.05, -3)):
        net = TfliteNet(quantization)
        x = net.input((1, 6, 6, 4), "float32" if quantization is None else "int8", quantization, name="x")
        parts = [case(net, x) for case in (BOTH["conv same"], BOTH["pieces"], BOTH["sliced"], BOTH["bilinear"], BOTH["dense flattened"])]
        made.append(net.bytes([p for part in parts for p in (part if isinstance(part, list) else [part])]))
    return made + [
        net.bytes(outputs) for net, outputs in (tflite_states.CASES[name]() for name in ("stream", "lstm", "lstm all", "svdf rank 2", "both second"))
    ]


def tflite(rng: random.Random, folder: Path, library: Path) -> None:
    whole = bytearray(rng.choice(tflite_models()))
    if rng.random() < 0.3:
        whole = bytearray(damaged(bytes(whole), rng))
    else:  # numbers in place: what moves makes offsets wrong, and little else is seen then
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(8, len(whole))
            number = rng.choice((-(2**31), -2, -1, 0, 1, 2, 3, 5, 7, 64, 127, 255, 2**20, 2**31 - 1, rng.randrange(2**32)))
            size = rng.choice((1, 1, 4))
            whole[at : at + size] = (number % 2**32).to_bytes(4, "little")[:size]
    (folder / "m.tflite").write_bytes(whole)
    load(folder / "m.tflite")


def arrays(rng: random.Random, folder: Path, library: Path) -> None:
    stream = io.BytesIO()
    values = np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)
    suffix = rng.choice(("npz", "npz", "npy"))
    if suffix == "npy":
        np.save(stream, values)
    else:
        rng.choice((np.savez, np.savez_compressed))(stream, x=values)
    path = folder / f"x.{suffix}"
    path.write_bytes(damaged(stream.getvalue(), rng))
    list(open_samples(path, IMAGE))


def images(rng: random.Random, folder: Path, library: Path) -> None:
    suffix, mode = rng.choice((("png", "RGBA"), ("png", "I;16"), ("png", "P"), ("jpg", "RGB"), ("bmp", "RGB"), ("webp", "RGBA"), ("ppm", "RGB")))
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (9, 11, 4)).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    image.save(stream, {"jpg": "JPEG", "ppm": "PPM"}.get(suffix, suffix.upper()))
    (folder / f"a.{suffix}").write_bytes(damaged(stream.getvalue(), rng))
    (folder / "p.yaml").write_bytes(YAML)
    list(open_samples(folder, IMAGE, folder / "p.yaml"))


def settings(rng: random.Random, folder: Path, library: Path) -> None:
    import yaml

    if rng.random() < 0.3:
        (folder / "t.yaml").write_bytes(damaged(default_file().read_bytes(), rng))
        load_targets(folder / "t.yaml")
        return
    text = damaged(YAML, rng) if rng.random() < 0.5 else yaml.safe_dump(damaged_json(yaml.safe_load(YAML), rng)).encode()
    (folder / "p.yaml").write_bytes(text)
    settings = load_preprocess(folder / "p.yaml")
    Image.new("RGB", (9, 9), (1, 2, 3)).save(folder / "a.png")
    settings(folder / "a.png")


def labels(rng: random.Random, folder: Path, library: Path) -> None:
    samples = open_samples([{"x": np.zeros((1, 3, 4, 4), np.float32)}], IMAGE)
    if rng.random() < 0.5:
        stream = io.BytesIO()
        np.save(stream, np.arange(5))
        (folder / "l.npy").write_bytes(damaged(stream.getvalue(), rng))
        load_labels(folder / "l.npy", samples)
    else:
        (folder / "l.tsv").write_bytes(damaged(b"file\tclass_index\na.png\t3\nb.png\t4\n", rng))
        load_labels(folder / "l.tsv", samples)


@cache
def log_lines() -> list[bytes]:
    return next(SHIPPED.glob("*avx512vnni.jsonl")).read_bytes().splitlines()[:40]


def logs(rng: random.Random, folder: Path, library: Path) -> None:
    lines = rng.sample(log_lines(), 6)
    spaces = {r["row"]: Space.of({k: [v] for k, v in r["params"].items()}, r["params"]) for r in map(json.loads, log_lines())}
    lines = [damaged(line, rng) if rng.random() < 0.3 else json.dumps(damaged_json(json.loads(line), rng)).encode() for line in lines] + lines[:2]
    (folder / "x86-avx512vnni.jsonl").write_bytes(b"\n".join(lines))
    records = read_log(folder)
    best_of(records)
    for record in records:
        workload_text(record.workload)
        if record.row in spaces and spaces[record.row].understands(record.params):
            features(record.workload, spaces[record.row], [record.params])
    merge([folder], folder / "merged")


def results(rng: random.Random, folder: Path, library: Path) -> None:
    record = json.loads(log_lines()[0])
    tasks = [{"row": record["row"], "workload": record["workload"], "points": [record["params"]] * 3, "layers": 1}]
    pending: Any = {"format": 1, "set": "abc", "isa": "test", "target": "t", "threads": 1, "tasks": tasks}
    lines: list[Any] = [{"results": 1, "set": "abc", "host": "h", "threads": 1}]
    lines += [{"task": 0, "step": i, "status": "ok", "seconds": [1.0 + i]} for i in range(3)]
    if rng.random() < 0.5:
        pending = damaged_json(pending, rng)
    else:
        place = rng.randrange(len(lines))
        lines[place] = damaged_json(lines[place], rng)
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / PENDING).write_bytes(json.dumps(pending).encode() if rng.random() < 0.8 else damaged(json.dumps(pending).encode(), rng))
    (folder / "r.jsonl").write_bytes(text if rng.random() < 0.8 else damaged(text, rng))
    import_results(folder / "r.jsonl", folder)


def plans(rng: random.Random, folder: Path, library: Path) -> None:
    if rng.random() < 0.5:
        row: Any = {"kind": "int8", "scale": 0.1, "zero_point": 3}
        plan: Any = {"format": 1, "preset": "p", "table": "t", "notes": [], "float": {"a": "b"}, "edges": {"x": row}, "scales": {"c": [1.0]}}
        (folder / "plan.json").write_text(json.dumps(damaged_json(plan, rng)))
        QuantPlan.load(folder / "plan.json")
    else:
        (folder / "table.json").write_bytes(damaged(CalibrationTable(3).to_json().encode(), rng))
        CalibrationTable.load(folder / "table.json")


def libraries(rng: random.Random, folder: Path, library: Path) -> None:
    path = folder / "m.so"
    path.write_bytes(damaged(library.read_bytes(), rng))
    try:
        read_manifest(path)
    finally:
        session = Session(path)  # only where the damage did not change a byte
        session.run({i.name: np.zeros(i.shape, i.dtype) for i in session.inputs})


CASES: list[tuple[int, Case]] = [
    (10, model),
    (4, tflite),
    (4, arrays),
    (3, images),
    (3, settings),
    (1, labels),
    (3, logs),
    (2, results),
    (1, plans),
    (3, libraries),
]


# -- running -----------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Finding:
    number: int
    kind: str
    what: str


@dataclass
class Outcome:
    cases: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    killed: int = 0
    slowest: float = 0.0


def chosen(seed: int, number: int) -> tuple[random.Random, Case]:
    rng = random.Random(f"{seed} {number}")
    return rng, rng.choices([c for _, c in CASES], [w for w, _ in CASES])[0]


def run_case(seed: int, number: int, library: Path, folder: Path) -> str | None:
    """None when the file was read, "" when it was refused, else the traceback."""
    rng, case = chosen(seed, number)
    signal.setitimer(signal.ITIMER_PROF, CPU)
    signal.alarm(WALL)
    try:
        case(rng, folder, library)
    except InternalError:
        return traceback.format_exc()
    except QCompilerError as error:
        return "" if str(error).strip() else "an error without a word"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    return None


def work(seed: int, numbers: range, library: Path, scratch: Path, pipe: int) -> None:
    """In a worker process: one line of JSON before and after each case."""
    warnings.simplefilter("ignore")
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(pipe, "w") as out:
        for number in numbers:
            folder = scratch / str(number)
            folder.mkdir()
            print(json.dumps([number]), file=out, flush=True)
            start = time.process_time()
            answer = run_case(seed, number, library, folder)
            print(json.dumps([number, answer, time.process_time() - start]), file=out, flush=True)
            if not answer:
                shutil.rmtree(folder)


def run(seed: int, first: int, count: int, workers: int, library: Path, scratch: Path, say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Cases first .. first + count - 1, dealt out to worker processes; one that dies is replaced by another that goes on behind the case it died of."""
    outcome = Outcome()
    models(), tflite_models(), log_lines(), load(_saved(scratch))  # once, before the processes part
    left = [range(first + w, first + count, workers) for w in range(workers)]
    running: dict[int, tuple[int, io.TextIOWrapper, range]] = {}
    import select

    def start(numbers: range) -> None:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                work(seed, numbers, library, scratch, writing)
            finally:
                os._exit(0)
        os.close(writing)
        running[reading] = (child, os.fdopen(reading), numbers)

    for numbers in left:
        if numbers:
            start(numbers)
    begun: dict[int, int | None] = {}
    while running:
        for reading in select.select(list(running), [], [])[0]:
            child, stream, numbers = running[reading]
            line = stream.readline()
            if line:
                number, *rest = json.loads(line)
                begun[child] = None if rest else number
                if rest:
                    answer, seconds = rest
                    kind = chosen(seed, number)[1].__name__
                    outcome.cases[kind] += 1
                    outcome.refused[kind] += answer == ""
                    outcome.slowest = max(outcome.slowest, seconds)
                    if answer:
                        outcome.findings.append(Finding(number, kind, answer))
                        say(f"case {number} ({kind}): {answer}")
                continue
            status = os.waitpid(child, 0)[1]
            stream.close()
            del running[reading]
            number = begun.get(child)
            if number is not None:
                outcome.killed += 1
                name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"
                name = {"SIGPROF": f"a hang: more than {CPU} s of CPU", "SIGALRM": f"a hang: more than {WALL} s"}.get(name, name)
                outcome.findings.append(Finding(number, chosen(seed, number)[1].__name__, name))
                say(f"case {number} ({chosen(seed, number)[1].__name__}): {name}")
                rest_ = range(number + workers, numbers.stop, workers)
                if rest_:
                    start(rest_)
    return outcome


def _saved(folder: Path) -> Path:
    onnx.save(models()[0], folder / "warm.onnx")
    return folder / "warm.onnx"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("count", 500), ("first", 0), ("seed", 0), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        library = options.library
        if library is None:
            import qcompiler
            from qcompiler.cli.demo import MODEL, demo_data

            library = qcompiler.compile(MODEL, calibration=demo_data()[0][:40], preset="fast").save(scratch / "digits.so")
        start = time.monotonic()
        outcome = run(options.seed, options.first, options.count, options.workers, library, scratch, lambda text: print(text, flush=True))
        for finding in outcome.findings if options.keep else ():
            shutil.copytree(scratch / str(finding.number), options.keep / f"{options.seed}-{finding.number}", dirs_exist_ok=True)
    total = sum(outcome.cases.values()) + outcome.killed
    kinds = ", ".join(f"{outcome.cases[k]} {k} ({outcome.refused[k]} refused)" for k in sorted(outcome.cases))
    print(f"{total} cases in {time.monotonic() - start:.0f} s, the slowest {outcome.slowest:.1f} s of CPU: {kinds}; {len(outcome.findings)} findings")
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
