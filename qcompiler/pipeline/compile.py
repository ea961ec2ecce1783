"""The compilation: its stages in order, as docs/architecture.md lists them. `compile` is the public entry; the command line calls it too."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Unpack

import tvm

import qcompiler
from qcompiler.backend import artifact as artifacts
from qcompiler.backend.artifact import Artifact
from qcompiler.backend.build import build
from qcompiler.backend.cuda import toolkit_versions
from qcompiler.backend.tuning_log import Tuned
from qcompiler.base.debug import Dumper
from qcompiler.base.errors import DataError, PlanError
from qcompiler.base.progress import silent
from qcompiler.base.targets import Target, find_target
from qcompiler.importers.model import FloatModel, load
from qcompiler.numerics.weight_only import WeightScheme
from qcompiler.passes.graph import Graph
from qcompiler.passes.sequence import FLOAT, run
from qcompiler.pipeline.accuracy_target import search
from qcompiler.pipeline.goal import Goal
from qcompiler.pipeline.job import Job, Options, check_names, opened
from qcompiler.pipeline.rivals import best_of, network, planned
from qcompiler.pipeline.stages import Compilation, QuantizedNetwork, calibrate, equalize, link
from qcompiler.plan.planner import named_groups


def compiled(job: Job) -> Compilation:
    """All stages behind `load`."""
    rival = job.recipe.rival
    if rival is not None and job.samples.count != 0 and any(o.dtype == "float32" for o in job.model.outputs):
        return best_of(job, rival)  # the stages below for two recipes
    equalized = equalize(job)
    measured = calibrate(equalized)
    return link(network(measured))


def quantize(model: str | os.PathLike[str], target: str | Target, calibration: Any, **options: Unpack[Options]) -> QuantizedNetwork:
    """The stages from the model file to the integer network that the preset itself makes. Arguments as `compile`."""
    return planned(calibrate(equalize(opened(model, target, calibration, options))))


def compile_stages(model: str | os.PathLike[str], target: str = "native", calibration: Any = None, **options: Unpack[Options]) -> Compilation:
    """`compile`, with the values between the stages. Same arguments, same errors."""
    check_names(options)
    if options.get("weights") is not None:
        raise PlanError("weights in 8 or 4 bits beside float activations make no integer network; only compile and explain know them")
    for name in ("group_size", "asymmetric"):
        if options.get(name) is not None and options.get(name) is not False:
            raise PlanError(f"{name} describes the option weights, which is not given")
    chosen = find_target(target, options.get("targets_file"))
    artifacts.find_compiler(chosen)
    toolkit_versions(chosen)  # a missing toolkit shows before anything long is begun
    tuned = Tuned(chosen, options.get("tuning_log"))
    goal = Goal(options.get("min_sqnr"), options.get("min_agreement"), options.get("max_accuracy_drop"))
    for name in () if goal else ("labels", "time_budget"):
        if options.get(name) is not None:
            raise DataError(f"{name} serves an accuracy target only; give min_sqnr, min_agreement or max_accuracy_drop too")
    job = opened(model, chosen, calibration, options, tuned)
    if not goal:
        return compiled(job)
    if job.samples.count == 0:
        raise DataError("calibration data is needed for an accuracy target: it is measured on them")
    return search(job, goal, options.get("labels"), options.get("time_budget"))


def compile(model: str | os.PathLike[str], target: str = "native", calibration: Any = None, **options: Unpack[Options]) -> Artifact:
    """Compile a float ONNX network into an int8 library for `target`.

    model: path of the ONNX file. target: a row of targets.yaml, a triple, or "native". calibration: samples as `qcompiler.calibration.data.open_samples`
    takes them (a path, or an iterable of {input name: array with the model's shape}); not needed for a model that states all its ranges itself
    (ONNX with QuantizeLinear and DequantizeLinear, from quantization-aware training say). options: see `Options`.

    Raises a QCompilerError: for anything a user can mend, the model, the data, the target; InternalError, with the cause attached, for a bug of ours.
    """
    if options.get("weights") is not None:
        return compile_weights(model, target, calibration, **options)
    return compile_stages(model, target, calibration, **options).artifact


_DEFAULTS = {"preset": "default", "enable": [], "disable": [], "keep_float": [], "requantize": False}  # what the command line passes without options


def quantize_weights(model: str | os.PathLike[str], calibration: Any, options: Options) -> tuple[FloatModel, tvm.IRModule]:
    """The float network, and the same with its dense weights stored in few bits. Arguments as `compile`."""
    check_names(options)
    goes = {"weights", "group_size", "asymmetric", "keep_float", "input_shapes", "input_values", "dump_dir", "targets_file", "progress"}
    given = {k for k, v in options.items() if v is not None and v != _DEFAULTS.get(k)} | ({"calibration"} if calibration is not None else set())
    if extra := sorted(given - goes):
        raise PlanError(f"weights in 8 or 4 bits beside float activations need no {', '.join(extra)}; leave {'it' if len(extra) == 1 else 'them'} out")
    dump = Dumper(options.get("dump_dir"))
    scheme = WeightScheme.of(str(options["weights"]), options.get("group_size"), bool(options.get("asymmetric")))
    float_model = load(Path(model), options.get("input_shapes"), dump=dump, input_values=options.get("input_values"))
    module = run(FLOAT, float_model.module, scheme, set(named_groups(float_model, options.get("keep_float") or ())), dump=dump)
    if not Graph.of(module).attrs["qc.weights"]["layers"]:
        raise PlanError(f"'{float_model.name}' has no layer whose weights could be stored in {scheme.bits} bits: no Gemm or MatMul with constant weights")
    return float_model, module


def compile_weights(model: str | os.PathLike[str], target: str = "native", calibration: Any = None, **options: Unpack[Options]) -> Artifact:
    """A library that computes in float32, with the weights of dense layers in 8 or 4 bits. Arguments and errors as `compile`."""
    chosen = find_target(target, options.get("targets_file"))
    if chosen.gpu:
        raise PlanError(f"weights in 8 or 4 bits beside float activations have kernels for CPUs only; '{chosen.name}' is a GPU")
    artifacts.find_compiler(chosen)
    float_model, module = quantize_weights(model, calibration, options)
    built = build(module, chosen, "generate code", progress=options.get("progress") or silent)
    return built.link(
        **float_model.account(),
        weights=Graph.of(module).attrs["qc.weights"],
        compiler={"qcompiler": qcompiler.__version__, "tvm": tvm.__version__},
        digests={"model": float_model.digest, "constants": hashlib.sha256(built.program.constants.tobytes()).hexdigest()},
    )
