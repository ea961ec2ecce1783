"""The compilation, as one literal list of stages. `compile` is the public entry; the command line calls it too."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

import qcompiler
from qcompiler import artifact as artifacts
from qcompiler.artifact import Artifact
from qcompiler.calibration import calibrate
from qcompiler.codegen import object_code
from qcompiler.correction import SAMPLES, FloatMeans, SessionExecutor, correct, with_biases
from qcompiler.data import open_samples
from qcompiler.debug import Dumper
from qcompiler.errors import DataError
from qcompiler.lowering import Program, lower
from qcompiler.model import FloatModel, load
from qcompiler.passes.graph import Graph
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.realize import realize
from qcompiler.passes.select_float import select_float
from qcompiler.plan import decide, observed_ids
from qcompiler.progress import Progress
from qcompiler.runtime.session import Session
from qcompiler.targets import Target, find_target


@dataclass
class Built:
    """A program with its object code: linked again with other constants, no code is generated anew."""

    program: Program
    code: bytes

    def link(self, **manifest: Any) -> Artifact:
        described = artifacts.program_manifest(self.program) | {"values": {}, "float_ops": []} | manifest
        return artifacts.link(self.code, self.program.constants, described, self.program.target)


def build(module: tvm.IRModule, target: Target, stage: str, progress: Progress | None = None) -> Built:
    """Lower a module and generate its code."""
    program = lower(module, target)
    if progress is not None:
        progress(stage, 0, 1)
    code = object_code(program)
    if progress is not None:
        progress(stage, 1, 1)
    return Built(program, code)


@contextlib.contextmanager
def session_of(artifact: Artifact) -> Iterator[Session]:
    """A session, on all cores of this process, of an artifact that has no file yet."""
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        yield Session(artifact.save(Path(folder) / "model.so"), len(os.sched_getaffinity(0)))


def compile(
    model: str | os.PathLike[str],
    target: str = "native",
    calibration: Any = None,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    preprocess: Any = None,
    preset: str = "default",
    tuning_log: str | os.PathLike[str] | None = None,
    dump_dir: str | os.PathLike[str] | None = None,
    targets_file: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compile a float ONNX network into an int8 library for `target`.

    model: path of the ONNX file. target: a row of targets.yaml, a triple, or "native". calibration: samples as `qcompiler.data.open_samples`
    takes them (a path, or an iterable of {input name: array with the model's shape}). input_shapes: {input name: shape}, for dimensions that
    the file leaves open. preprocess: for a folder of images. preset: "fast" (no bias correction), "default" or "accurate". dump_dir: every
    stage's result is written there.

    Raises a QCompilerError for anything a user can mend: the model, the data, the target.
    """
    dump = Dumper(None if dump_dir is None else Path(dump_dir))
    row = find_target(target, None if targets_file is None else Path(targets_file))
    artifacts.find_compiler(row)
    if calibration is None:
        raise DataError("calibration data is needed to quantize: give samples (an .npz, an .npy, a folder of images, or an iterable of {input name: array})")
    float_model = load(Path(model), input_shapes)
    dump("float", float_model.module)
    samples = open_samples(calibration, float_model.inputs, preprocess)
    host = find_target("native")

    means = FloatMeans(float_model.module, SAMPLES[preset])
    float_twin = build(select_float(float_model.module), host, "generate float code", progress)
    with session_of(float_twin.link()) as session:
        table = calibrate(session, samples, ids=observed_ids(float_model), watcher=means, progress=progress)
    dump("calibration", table)

    plan = decide(float_model, table, row, preset)
    dump("plan", plan.explain())
    qdq = insert_qdq(float_model.module, plan)
    dump("qdq", qdq)
    integer = realize(qdq)
    dump("integer", integer)

    built = build(integer, row, "generate int8 code", progress)
    summary = "none"
    if means.limit:
        on_host = built if row == host else build(integer, host, "generate host code", progress)
        with session_of(on_host.link()) as session:
            correction = correct(integer, SessionExecutor(session, on_host.program), means, itertools.islice(samples, means.limit))
        summary = correction.summary()
        dump("correction", correction)
        if correction.kept:
            integer = with_biases(integer, correction.biases)
            for value_id, bias in correction.biases.items():
                built.program.replace_operand(value_id, 2, bias)
    return built.link(
        **describe(integer, float_model),
        compiler={"qcompiler": qcompiler.__version__, "tvm": tvm.__version__},
        preset=preset,
        calibration_samples=table.samples,
        bias_correction=summary,
        digests={
            "model": float_model.digest,
            "calibration": table.digest,
            "plan": plan.digest,
            "constants": hashlib.sha256(built.program.constants.tobytes()).hexdigest(),
        },
    )


def describe(integer: tvm.IRModule, model: FloatModel) -> dict[str, Any]:
    """The manifest's account of quantization: every 8-bit value with its parameters, every operator that stayed float with the reason."""
    attrs = Graph.of(integer).attrs
    values = {name: {"scale": scale, "zero_point": zero_point} for name, (scale, zero_point) in attrs.get("qc.params", {}).items()}
    float_ops = []
    for value_id, reason in attrs.get("qc.float_ops", {}).items():
        node, op = model.source(value_id)
        float_ops.append({"id": value_id, "node": node, "op": op, "reason": reason})
    return {"model": model.name, "values": values, "float_ops": float_ops}


def compile_float(
    model: str | os.PathLike[str], target: str = "native", input_shapes: Mapping[str, Sequence[int]] | None = None, progress: Progress | None = None
) -> Artifact:
    """The float twin of a network: float32 kernels of the same templates, for comparison and calibration. Arguments as `compile`."""
    float_model = load(Path(model), input_shapes)
    built = build(select_float(float_model.module), find_target(target), "generate float code", progress)
    return built.link(model=float_model.name, digests={"model": float_model.digest})
