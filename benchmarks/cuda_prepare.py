"""What benchmarks/cuda.py runs on a GPU, made where there is none: a folder with libraries, inputs, and the outputs to expect.

plan.json             {targets: [name], capability, rows: [a case each, those that matter most first], networks: [{name, network, batch, inputs, integer}],
                      failed: [{section, error}]}
rows.so, rows.npz     for the first target: one step per case of the test suite, all on the same workspace; of each case inputs, places of the output's
                      elements, and their values
NAME@TARGET.so        a network at a batch size for a GPU target
NAME.npz              its samples, and its outputs by the library of this CPU made from the same plan
NAME-qdq.onnx         the network with quantize and dequantize nodes, and NETWORK.onnx, the float one: for TensorRT

Packed (`pack`), what several files have in common is there once: weights, which all tensor-core targets and batch sizes lay out alike, and samples.
"""

from __future__ import annotations

import importlib
import itertools
import json
import lzma
import re
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networks
import numpy as np

if TYPE_CHECKING:
    from qcompiler.base.targets import Target

HERE = Path(__file__).resolve().parent
GUARD, SINGLES = 4096, 8
WEIGHTS = (("encoder", 1), ("product", 32))  # what comes along always
WEIGHTS_ALONE = "weights in 4 bits"
WINDOW = 512 << 20  # bytes in which `pack` finds what was there before: all that a visit to a GPU carries


def batch_of(singles: np.ndarray, batch: int, sample: int) -> np.ndarray:
    """Sample 0 or 1: [batch, ...] of a few images or texts, each moved by some columns so that no two are equal."""
    return np.ascontiguousarray([np.roll(singles[(sample + k) % len(singles)], k // len(singles), axis=-1) for k in range(batch)])


# -- rows -----------------------------------------------------------------------------------------------------------------------------------


def row_cases(target: Target) -> dict[str, Any]:
    """The cases of the test suite, by name, with kernels for `target`: {name: (case, kernel)}."""
    from qcompiler import schedules

    schedules.load(target)
    sys.path.insert(0, str(HERE.parent / "tests"))
    plain, gemm, depthwise, products = (importlib.import_module(f"test_kernels_{name}") for name in ("cuda", "cuda_gemm", "cuda_depthwise", "cuda_products"))
    transformers, weights = importlib.import_module("transformer_cases"), importlib.import_module("test_weight_only")
    cases = plain.CASES | transformers.CASES | {f"weights/{i}": layer.case() for i, layer in enumerate(weights.LAYERS)}
    for name, layer in importlib.import_module("recurrent_cases").LAYERS.items():
        (operands, attrs), (real, real_attrs) = layer.integer(), layer.real()
        cases[f"recurrence/{name}"] = plain.Case("qc.recurrence", operands, attrs, constants=tuple(range(1, len(operands))))
        cases[f"f32.recurrence/{name}"] = plain.Case("qc.f32.recurrence", real, real_attrs, constants=tuple(range(1, len(real))), tolerance=1e-4)
    found = {name: (case, case.prepare(target)) for name, case in cases.items()}
    if "cuda-mma" in target.rows:
        for group in products.every_point(target).values():
            found |= group
    for unit in gemm.UNITS:
        if unit.name in target.rows:
            found |= {f"{gemm.tag(unit)}/{name}": pair for name, pair in gemm.kernels(unit).items()}
    found |= importlib.import_module("test_cuda_tails").ended(target)
    found |= importlib.import_module("test_cuda_fused").of_one_result(target) | importlib.import_module("test_cuda_rows").reduced(target)
    for name, conv in depthwise.CONVS.items():
        case = conv.case()
        found[f"depthwise/{name}"] = (case, case.prepare(target))
    return found


def by_importance(cases: dict[str, Any], target: Target) -> dict[str, Any]:
    """First the kernels that heuristics choose, which networks run, then other points of design spaces; of each a case of every row, then a second."""
    from qcompiler.schedules.table import KERNELS

    rows = {row.name: row for table in KERNELS.values() for row in table}
    seen, order = Counter[tuple[bool, str]](), {}
    for name, (case, kernel) in cases.items():
        other = bool(kernel.params) and kernel.params != rows[kernel.row].default(case.op, target)
        order[name] = other, seen[other, kernel.row]
        seen[other, kernel.row] += 1
    return {name: cases[name] for name in sorted(cases, key=order.__getitem__)}


def rows_program(cases: dict[str, Any], target: Target) -> Any:
    """One step per case, every tensor between guards. All cases have the same workspace: they run one at a time, and each fills it anew."""
    from qcompiler.backend.lowering import Place, Program, Step, Value, pack_constants
    from qcompiler.schedules.table import Layout

    values: dict[str, Any] = {}
    steps, at, most = [], GUARD, 0

    def place(name: str, layout: Any) -> str:
        nonlocal at
        values[name] = Value(name, layout, name, Place("workspace", at))
        at += -(-layout.bytes // 64) * 64 + GUARD
        return name

    for number, (case, kernel) in enumerate(cases.values()):
        at = GUARD
        reads = [place(f"{number}x{i}", Layout((stored.size,), str(stored.dtype))) for i, stored in enumerate(case.inputs)]
        steps.append(Step(place(f"{number}y", case.output), None, case.name, kernel, reads, scratch=at))
        most = max(most, at + -(-kernel.scratch // 64) * 64)
    return Program(target, steps, values, [], [], most, pack_constants(steps))


def prepare_rows(folder: Path, target: Target) -> list[dict[str, Any]]:
    """Write rows.so and rows.npz; a description of each case."""
    from qcompiler.backend.build import Built
    from qcompiler.backend.codegen import object_code
    from qcompiler.schedules.harness import fetch

    cases = by_importance(row_cases(target), target)
    program = rows_program(cases, target)
    described, arrays = [], {}
    for number, (step, (name, (case, kernel))) in enumerate(zip(program.steps, cases.items(), strict=True)):
        for i, stored in enumerate(case.inputs):
            arrays[f"{number}x{i}"] = np.ascontiguousarray(stored)
        arrays[f"{number}at"] = fetch(np.arange(case.output.elements, dtype=np.int32), replace(case.output, dtype="int32")).reshape(-1)
        arrays[f"{number}y"] = np.ascontiguousarray(case.expected).reshape(-1)
        place = {"reads": [program.values[v].place.offset for v in step.reads], "writes": program.values[step.writes].place.offset}
        place |= {"bytes": case.output.bytes, "dtype": case.output.dtype, "scratch": [step.scratch, kernel.scratch]}
        described.append({"case": name, "row": kernel.row, "tolerance": case.tolerance} | place)
    Built(program, object_code(program)).link().save(folder / "rows.so")
    np.savez(folder / "rows.npz", **arrays)
    return described


# -- networks -------------------------------------------------------------------------------------------------------------------------------


def prepare_network(folder: Path, network: networks.Network, batch: int, targets: Sequence[Target], peers: bool, progress: Any) -> dict[str, Any]:
    """Compile for the GPU targets and for this CPU from one plan; write the former and what the latter answers."""
    import onnx

    from qcompiler.backend.build import build
    from qcompiler.base.targets import find_target
    from qcompiler.calibration.data import open_samples
    from qcompiler.importers.model import load
    from qcompiler.pipeline.compile import quantize

    ports = onnx.load(str(network.model), load_external_data=False).graph.input
    shapes: Any = {p.name: (batch, *(d.dim_value for d in p.type.tensor_type.shape.dim[1:])) for p in ports}
    alone = load(network.model, {name: (1, *shape[1:]) for name, shape in shapes.items()}).inputs
    singles = list(itertools.islice(open_samples(network.calibration(), alone, network.preprocess), SINGLES))
    inputs = {name: np.concatenate([sample[name] for sample in singles]) for name in shapes}
    samples = [{name: batch_of(array, batch, i) for name, array in inputs.items()} for i in (0, 1)]
    integer = quantize(network.model, targets[0], samples, preset="fast", input_shapes=shapes, progress=progress).integer
    name = f"{re.sub(r'[^A-Za-z0-9_.]+', '-', network.name)}-{batch}"
    on_cpu, *on_gpu = (build(integer, t, "generate code", progress=progress).link() for t in (find_target("native"), *targets))
    if peers:
        from qcompiler.exporters.export_onnx import export_onnx

        shutil.copy(network.model, folder / f"{network.name}.onnx")
        export_onnx(network.model, folder / f"{name}-qdq.onnx", samples, preset="fast", input_shapes=shapes)
    return {"name": name, "network": network.name, "batch": batch} | keep(folder, name, on_gpu, on_cpu, inputs, batch)


def keep(folder: Path, name: str, on_gpu: Sequence[Any], on_cpu: Any, inputs: dict[str, np.ndarray], batch: int) -> dict[str, Any]:
    """Write the libraries for the GPU, samples, and what the one for this CPU answers; float operators may differ in their last bits."""
    import qcompiler

    for artifact in on_gpu:
        artifact.save(folder / f"{name}@{artifact.manifest['target']}.so")
    session = qcompiler.load(on_cpu.save(folder / "cpu.so"))
    answers = [session.run({port: batch_of(array, batch, i) for port, array in inputs.items()}) for i in (0, 1)]
    outputs = {f"{key}-{i}": value.copy() for i, answer in enumerate(answers) for key, value in answer.items()}
    np.savez(folder / f"{name}.npz", **{f"input {port}": array for port, array in inputs.items()}, **outputs)
    (folder / "cpu.so").unlink()
    steps = on_gpu[0].manifest["steps"]
    integer = not any(s["op"].startswith("qc.f32.") or s["kernel"] in ("cuda/legalized", "cuda/rows") for s in steps)
    return {"inputs": list(inputs), "integer": integer}


def prepare_weights(folder: Path, name: str, rows: int, targets: Sequence[Target], progress: Any) -> dict[str, Any]:
    """Linear layers with weights in 4 bits beside float activations: a layer of `encoder`, or `product`, of benchmarks/weight_only.py."""
    import weight_only

    import qcompiler

    model = weight_only.encoder(rows, folder / "weights.onnx", 1) if name == "encoder" else weight_only.product(rows, 1024, folder / "weights.onnx")
    columns = weight_only.HIDDEN if name == "encoder" else 1024
    inputs = {"x": np.random.default_rng(0).standard_normal((SINGLES, columns)).astype(np.float32)}
    on_cpu, *on_gpu = (qcompiler.compile(model, t, weights="int4", asymmetric=True, progress=progress) for t in ("native", *targets))
    model.unlink()
    network = f"{name}, {WEIGHTS_ALONE}"
    return {"name": f"{name}-int4-{rows}", "network": network, "batch": rows} | keep(folder, f"{name}-int4-{rows}", on_gpu, on_cpu, inputs, rows)


def prepare(
    folder: Path,
    targets: Sequence[Target],
    chosen: Sequence[networks.Network],
    batches: Sequence[int],
    *,
    rows: bool,
    weights: Sequence[tuple[str, int]],
    peers: bool,
    progress: Any,
) -> dict[str, Any]:
    """Fill the folder. rows: with the cases of single kernels, for the first target; weights: see `prepare_weights`, name and rows of each; peers: with files
    for TensorRT. What fails is noted in the plan and left out."""
    folder.mkdir(parents=True, exist_ok=True)
    plan: dict[str, Any] = {"targets": [t.name for t in targets], "capability": max(t.capability for t in targets), "rows": [], "networks": [], "failed": []}

    def attempt(section: str, work: Any) -> Any:
        try:
            return work()
        except Exception as error:  # whatever it is, it must not cost the other parts
            plan["failed"].append({"section": f"prepare {section}", "error": f"{type(error).__name__}: {error}"[:600]})
            print(f"FAILED: prepare {section}: {plan['failed'][-1]['error']}", file=sys.stderr)
            return None

    if rows:
        plan["rows"] = attempt("rows", lambda: prepare_rows(folder, targets[0])) or []
    work = {f"{n.name}-{b}": lambda n=n, b=b: prepare_network(folder, n, b, targets, peers, progress) for n, b in itertools.product(chosen, batches)}
    work |= {f"{n}-int4-{r}": lambda n=n, r=r: prepare_weights(folder, n, r, targets, progress) for n, r in weights}
    for name, make in work.items():
        made = attempt(name, make)
        plan["networks"] += [made] if made else []
    (folder / "plan.json").write_text(json.dumps(plan, indent=1))
    return plan


def pack(folder: Path, archive: Path) -> None:
    """One file of all that a folder has."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": min(WINDOW, max(4096, sum(p.stat().st_size for p in folder.iterdir())))}]
    with lzma.open(archive, "wb", filters=filters) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(folder.iterdir(), key=lambda p: (p.suffix, p.name)):
            tar.add(path, path.name)


def unpack(archive: Path, folder: Path) -> None:
    with lzma.open(archive, "rb") as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
        tar.extractall(folder, filter="data")
