"""Weights in 8 and 4 bits beside float32 activations, against float32: times, sizes and errors, single threaded and interleaved.

    python benchmarks/weight_only.py [--rows 1 4] [--size 4096] [--group-size 64] [--network FILE.onnx] [--seconds 6]

A matrix product with a square weight, and a block of a transformer's linear layers (MODEL below; --network takes another ONNX file of float inputs).
Candidates: our float library, ours with int8 and int4 weights, ONNX Runtime in float32, and for the product its MatMulNBits with 4-bit weights in groups
of the same size (random ones: its time does not depend on them). `of float` and `of ORT` are ratios of the least times; errors are against our float
library's output. Few rows wait for memory, which is what small weights are for.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.backend.artifact import Artifact
from qcompiler.base.text import number, size, table
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.pipeline.float_library import compile_float
from qcompiler.runtime.bench import interleave, random_inputs, ratios
from qcompiler.runtime.peers import onnxruntime_call
from qcompiler.runtime.session import Session

HIDDEN, INNER, LAYERS = 768, 3072, 4  # the linear layers of a BERT-like encoder: query, key, value, output, two of the MLP


def initializer(rng: np.random.Generator, name: str, rows: int, columns: int) -> onnx.TensorProto:
    return numpy_helper.from_array((rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32), name)


def saved(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], shapes: list[tuple[int, int]], path: Path, domains: tuple[str, ...] = ("",)) -> Path:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in zip(("x", "y"), shapes, strict=True)]
    graph = helper.make_graph(nodes, path.stem, ports[:1], ports[1:], weights)
    opsets = [helper.make_opsetid(domain, 1 if domain else 17) for domain in domains]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def product(rows: int, count: int, path: Path) -> Path:
    weights = [initializer(np.random.default_rng(0), "w", count, count)]
    return saved([helper.make_node("MatMul", ["x", "w"], ["y"])], weights, [(rows, count)] * 2, path)


def matmul_nbits(rows: int, count: int, group: int, path: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.integers(0, 256, (count, count // group, group // 2), np.uint8), "q"),
        numpy_helper.from_array(rng.random(count * (count // group), np.float32), "s"),
    ]
    node = helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", K=count, N=count, bits=4, block_size=group)
    return saved([node], weights, [(rows, count)] * 2, path, ("", "com.microsoft"))


def encoder(rows: int, path: Path, layers: int = LAYERS) -> Path:
    """Per layer: x + (sigmoid(x Q + x K) * x V) O, then x + relu(x A) B: all the linear layers of an encoder, without its attention's sums over positions."""
    rng, nodes, weights, x = np.random.default_rng(0), list[onnx.NodeProto](), list[onnx.TensorProto](), "x"
    for layer in range(layers):

        def node(op: str, inputs: list[str], name: str, layer: int = layer) -> str:
            nodes.append(helper.make_node(op, inputs, [f"{name}{layer}"]))
            return f"{name}{layer}"

        def linear(source: str, name: str, rows: int, columns: int, layer: int = layer, node: Callable[[str, list[str], str], str] = node) -> str:
            weights.append(initializer(rng, f"w_{name}{layer}", rows, columns))
            return node("MatMul", [source, f"w_{name}{layer}"], name)

        q, k, v = (linear(x, name, HIDDEN, HIDDEN) for name in ("q", "k", "v"))
        mixed = node("Mul", [node("Sigmoid", [node("Add", [q, k], "sum")], "gate"), v], "mixed")
        x = node("Add", [x, linear(mixed, "o", HIDDEN, HIDDEN)], "attended")
        inner = node("Relu", [linear(x, "a", HIDDEN, INNER)], "inner")
        x = node("Add", [x, linear(inner, "b", INNER, HIDDEN)], "block")
    nodes.append(helper.make_node("Identity", [x], ["y"]))
    return saved(nodes, weights, [(rows, HIDDEN)] * 2, path)


def compare(title: str, model: Path, group: int, seconds: float, folder: Path, more: Path | None = None) -> str:
    """The table of one network. more: a model that only ONNX Runtime runs."""
    built: dict[str, Artifact] = {"float": compile_float(model)}
    for weights in ("int8", "int4"):
        for asymmetric in (False, True):
            name = f"{weights}{' asymmetric' if asymmetric else ''}"
            built[name] = qcompiler.compile(model, weights=weights, group_size=group, asymmetric=asymmetric)
    sessions = {name: Session(artifact.save(folder / f"{model.stem}-{name.replace(' ', '-')}.so"), 1) for name, artifact in built.items()}
    inputs = random_inputs(sessions["float"].inputs)
    outputs = {name: np.concatenate([v.reshape(-1) for v in s.run(inputs).values()]) for name, s in sessions.items()}
    calls: dict[str, Callable[[], object]] = {name: (lambda s=s: s.run(inputs)) for name, s in sessions.items()}  # type: ignore[misc]
    calls["onnxruntime float"] = onnxruntime_call(str(model), inputs, 1)
    if more is not None:
        calls["onnxruntime MatMulNBits 4"] = onnxruntime_call(str(more), inputs, 1)
    timings = interleave(calls, seconds=seconds)
    of_float, of_peer, rows = ratios(timings, "float"), ratios(timings, "onnxruntime float"), []
    for t in timings:
        error = number(sqnr_db(outputs[t.name], outputs["float"])) if t.name in outputs and t.name != "float" else ""
        bytes_ = size(built[t.name].size) if t.name in built else ""
        rows.append([t.name, f"{t.minimum * 1e3:.3f}", f"{of_float[t.name]:.3f}", f"{of_peer[t.name]:.3f}", bytes_, error])
    return table(title, ("what", "ms|", "of float|", "of ORT|", "library|", "SQNR dB|"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--network", type=Path, metavar="FILE.onnx")
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    group, seconds, count = options.group_size, options.seconds, options.size
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as name:
        folder = Path(name)
        if options.network is not None:
            print(compare(options.network.name, options.network, group, seconds, folder))
            return 0
        for rows in options.rows:
            peer = matmul_nbits(rows, count, group, folder / f"nbits{rows}.onnx") if count % group == 0 else None
            print(compare(f"{rows} x {count} times {count} x {count}", product(rows, count, folder / f"product{rows}.onnx"), group, seconds, folder, peer))
            print(compare(f"linear layers of an encoder, {rows} rows", encoder(rows, folder / f"encoder{rows}.onnx"), group, seconds, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
