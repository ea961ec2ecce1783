"""The compilation, as one literal list of stages. `compile` is the public entry; the command line calls it too."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import tvm

import qcompiler
from qcompiler.backend import artifact as artifacts
from qcompiler.backend.artifact import Artifact
from qcompiler.backend.build import build
from qcompiler.backend.cuda import toolkit_versions
from qcompiler.backend.tuning_log import Tuned
from qcompiler.base.debug import Dumper
from qcompiler.base.errors import DataError, PlanError, closest
from qcompiler.base.progress import Progress
from qcompiler.base.targets import Target, find_target
from qcompiler.calibration.data import NO_SAMPLES, Samples, open_samples
from qcompiler.importers.model import FloatModel, load
from qcompiler.numerics.weight_only import WeightScheme
from qcompiler.passes.graph import Graph
from qcompiler.passes.select_float import select_float
from qcompiler.passes.trained import Trained
from qcompiler.pipeline.accuracy_target import compile_to
from qcompiler.pipeline.goal import Goal
from qcompiler.pipeline.stages import Compilation, Measured, Quantized, finish, measure, planned
from qcompiler.pipeline.survey import worth_keeping
from qcompiler.plan.planner import named_groups
from qcompiler.plan.recipes import Recipe, recipe


class Options(TypedDict, total=False):
    """Keyword arguments of `compile`.

    input_shapes: {input name: shape}, for dimensions that the file leaves open. preprocess: for a folder of images, a YAML path.
    preset, enable, disable: the recipe of quantization, and steps to switch on and off in it, by the names in `recipes.STEPS`. keep_float: layers
    that stay float32, by the names that their nodes or values have in the model file. requantize: a model that is quantized already keeps in float what
    its file leaves in float; quantize that too. min_sqnr (dB), min_agreement (fraction), max_accuracy_drop
    (points; needs labels: class indices of the calibration samples, or a file of them): keep those layers in float that reach this at the least
    measured time (`accuracy_target.py`), within time_budget seconds; whether it was reached is in the manifest. tuning_log: a folder that `tune`
    wrote. dump_dir: every stage's result is written there. targets_file: a file like targets.yaml.
    progress: called with (stage, done, total).

    weights: "int8" or "int4": another kind of compilation, without calibration: activations stay float32 and dense layers get weights in so many bits,
    with a scale for every group_size weights of a row (default 64) and, if asymmetric, a zero point. Of the other options keep_float, input_shapes,
    dump_dir, targets_file and progress go with it.
    """

    input_shapes: Mapping[str, Sequence[int]] | None
    preprocess: Any
    preset: str
    enable: Sequence[str]
    disable: Sequence[str]
    keep_float: Sequence[str]
    requantize: bool
    min_sqnr: float | None
    min_agreement: float | None
    max_accuracy_drop: float | None
    labels: Any
    time_budget: float | None
    tuning_log: str | os.PathLike[str] | None
    dump_dir: str | Path | None
    targets_file: Path | None
    progress: Progress | None
    weights: str | None
    group_size: int | None
    asymmetric: bool


def mixed(measured: Measured, target: Target, kept: Mapping[str, str], dump: Dumper, progress: Progress | None) -> Quantized:
    """`planned`, where the recipe asks for it with the layers in float that are worth it."""
    stages = planned(measured, target, kept, dump, progress)
    if "mixed" not in measured.recipe.steps or target.gpu or not any(o.dtype == "float32" for o in measured.model.outputs):
        return stages
    found = worth_keeping(stages, target, kept, progress)
    if found.reasons:
        stages = planned(measured, target, {**found.reasons, **kept}, dump, progress)
    return dataclasses.replace(stages, mixed=found.summary)


def opened(model: str | os.PathLike[str], calibration: Any, dump: Dumper, options: Options) -> tuple[FloatModel, Samples, Recipe, dict[str, str]]:
    """The model, its calibration samples, the recipe, and the groups that shall stay float, with the reason. Arguments as `compile`."""
    chosen = recipe(options.get("preset", "default"), options.get("enable", ()), options.get("disable", ()))
    float_model = load(Path(model), options.get("input_shapes"), bool(options.get("requantize")))
    dump("float", float_model.module)
    trained = Trained.of(Graph.of(float_model.module).attrs)
    if trained.quantized:
        chosen = chosen.without_changes()
    if calibration is None and not trained.quantized:
        raise DataError("calibration data is needed to quantize: give samples (an .npz, an .npy, a folder of images, or an iterable of {input name: array})")
    kept = dict.fromkeys(named_groups(float_model, options.get("keep_float", ())), "kept in float32 as asked (keep_float)")
    samples = NO_SAMPLES if calibration is None else open_samples(calibration, float_model.inputs, options.get("preprocess"))
    return float_model, samples, chosen, kept


def quantize(
    model: str | os.PathLike[str],
    target: Target,
    calibration: Any,
    dump: Dumper,
    **options: Unpack[Options],
) -> Quantized:
    """The stages from the model file to the integer module. Arguments as `compile`."""
    float_model, samples, chosen, kept = opened(model, calibration, dump, options)
    return mixed(measure(float_model, samples, chosen, dump, options.get("progress")), target, kept, dump, options.get("progress"))


def compile_stages(
    model: str | os.PathLike[str],
    target: str = "native",
    calibration: Any = None,
    **options: Unpack[Options],
) -> Compilation:
    """`compile`, with the values between the stages. Same arguments, same errors."""
    check_names(options)
    if options.get("weights") is not None:
        raise PlanError("weights in 8 or 4 bits beside float activations make no integer network; only compile and explain know them")
    for name in ("group_size", "asymmetric"):
        if options.get(name) is not None and options.get(name) is not False:
            raise PlanError(f"{name} describes the option weights, which is not given")
    dump, progress = Dumper(options.get("dump_dir")), options.get("progress")
    row = find_target(target, options.get("targets_file"))
    artifacts.find_compiler(row)
    toolkit_versions(row)  # a missing toolkit shows before anything long is begun
    tuned = Tuned(row, options.get("tuning_log"))
    goal = Goal(options.get("min_sqnr"), options.get("min_agreement"), options.get("max_accuracy_drop"))
    for name in () if goal else ("labels", "time_budget"):
        if options.get(name) is not None:
            raise DataError(f"{name} serves an accuracy target only; give min_sqnr, min_agreement or max_accuracy_drop too")
    float_model, samples, chosen, kept = opened(model, calibration, dump, options)
    if goal:
        if samples.count == 0:
            raise DataError("calibration data is needed for an accuracy target: it is measured on them")
        return compile_to(goal, float_model, samples, options.get("labels"), options.get("time_budget"), row, tuned, chosen, kept, dump, progress)
    measured = measure(float_model, samples, chosen, dump, progress)
    return finish(mixed(measured, row, kept, dump, progress), row, tuned, dump, progress)


def check_names(options: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword argument that `compile` does not have."""
    for name in set(options) - set(Options.__annotations__):
        raise TypeError(f"compile() has no keyword argument '{name}'.{closest(name, list(Options.__annotations__))}")


def compile(model: str | os.PathLike[str], target: str = "native", calibration: Any = None, **options: Unpack[Options]) -> Artifact:
    """Compile a float ONNX network into an int8 library for `target`.

    model: path of the ONNX file. target: a row of targets.yaml, a triple, or "native". calibration: samples as `qcompiler.calibration.data.open_samples`
    takes them (a path, or an iterable of {input name: array with the model's shape}); not needed for a model that states all its ranges itself
    (ONNX with QuantizeLinear and DequantizeLinear, from quantization-aware training say). options: see `Options`.

    Raises a QCompilerError for anything a user can mend: the model, the data, the target.
    """
    if options.get("weights") is not None:
        return compile_weights(model, target, calibration, **options)
    return compile_stages(model, target, calibration, **options).artifact


_DEFAULTS = {"preset": "default", "enable": [], "disable": [], "keep_float": [], "requantize": False}  # what the command line passes without options


def quantize_weights(model: str | os.PathLike[str], calibration: Any, dump: Dumper, options: Options) -> tuple[FloatModel, tvm.IRModule]:
    """The float network, and the same with its dense weights stored in few bits. Arguments as `compile`."""
    check_names(options)
    goes = {"weights", "group_size", "asymmetric", "keep_float", "input_shapes", "dump_dir", "targets_file", "progress"}
    given = {k for k, v in options.items() if v is not None and v != _DEFAULTS.get(k)} | ({"calibration"} if calibration is not None else set())
    if extra := sorted(given - goes):
        raise PlanError(f"weights in 8 or 4 bits beside float activations need no {', '.join(extra)}; leave {'it' if len(extra) == 1 else 'them'} out")
    scheme = WeightScheme.of(str(options["weights"]), options.get("group_size"), bool(options.get("asymmetric")))
    float_model = load(Path(model), options.get("input_shapes"))
    dump("float", float_model.module)
    module = select_float(float_model.module, scheme, set(named_groups(float_model, options.get("keep_float") or ())))
    dump("weights", module)
    if not Graph.of(module).attrs["qc.weights"]["layers"]:
        raise PlanError(f"'{float_model.name}' has no layer whose weights could be stored in {scheme.bits} bits: no Gemm or MatMul with constant weights")
    return float_model, module


def compile_weights(model: str | os.PathLike[str], target: str = "native", calibration: Any = None, **options: Unpack[Options]) -> Artifact:
    """A library that computes in float32, with the weights of dense layers in 8 or 4 bits. Arguments and errors as `compile`."""
    row = find_target(target, options.get("targets_file"))
    if row.gpu:
        raise PlanError(f"weights in 8 or 4 bits beside float activations have kernels for CPUs only; '{row.name}' is a GPU")
    artifacts.find_compiler(row)
    float_model, module = quantize_weights(model, calibration, Dumper(options.get("dump_dir")), options)
    built = build(module, row, "generate code", progress=options.get("progress"))
    return built.link(
        model=float_model.name,
        weights=Graph.of(module).attrs["qc.weights"],
        compiler={"qcompiler": qcompiler.__version__, "tvm": tvm.__version__},
        digests={"model": float_model.digest, "constants": hashlib.sha256(built.program.constants.tobytes()).hexdigest()},
    )
