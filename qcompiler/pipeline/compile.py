"""The compilation: its stages in order, as docs/architecture.md lists them. `compile` is the public entry; the command line calls it too."""

from __future__ import annotations

import hashlib
import math
from typing import Unpack

import tvm

import qcompiler
from qcompiler.backend.artifact import Artifact
from qcompiler.backend.build import build
from qcompiler.backend.cores import check_core
from qcompiler.backend.cuda import toolkit_versions
from qcompiler.backend.toolchain import find_compiler
from qcompiler.backend.tuning_log import Tuned
from qcompiler.base.debug import Dumper, no_dump
from qcompiler.base.errors import DataError, PlanError
from qcompiler.base.progress import silent
from qcompiler.base.targets import Target, find_target
from qcompiler.calibration.data import Source
from qcompiler.importers.model import FloatModel
from qcompiler.importers.origin import AnyModel, origin_of
from qcompiler.numerics.weight_only import WeightScheme
from qcompiler.passes.graph import Graph
from qcompiler.passes.sequence import FLOAT, run
from qcompiler.pipeline.accuracy_target import search
from qcompiler.pipeline.goal import Goal
from qcompiler.pipeline.job import Job, asked_rows, opened
from qcompiler.pipeline.judgement import judged
from qcompiler.pipeline.library import Compilation, link
from qcompiler.pipeline.options import Options, complete, given, takes_options
from qcompiler.pipeline.ports import ported
from qcompiler.pipeline.rivals import best_of, network, planned, rival_of
from qcompiler.pipeline.shapes import load_all
from qcompiler.pipeline.stages import QuantizedNetwork, calibrate, equalize
from qcompiler.plan.planner import named_groups


def compiled(job: Job) -> Compilation:
    """All stages behind `load`. A caller that keeps no reference to the job spares the memory of the weights as they were before equalization."""
    recipe = job.recipe
    if (rival := rival_of(job)) is not None:
        best, verdict = best_of(job, rival)  # the stages below for two recipes
        return link(ported(judged(best, recipe)), verdict)
    equalized = equalize(job)
    del job
    return link(ported(judged(network(calibrate(equalized)), recipe)))


@takes_options
def quantize(model: AnyModel, target: str | Target = "native", calibration: Source | None = None, **options: Unpack[Options]) -> QuantizedNetwork:
    """The stages from the model file to the integer network that the preset itself makes. Errors as `compile`."""
    check_core(options.get("core"), find_target(target, options.get("targets_file")))
    return planned(calibrate(equalize(opened(model, target, calibration, options))))


@takes_options
def compile_stages(model: AnyModel, target: str | Target = "native", calibration: Source | None = None, **options: Unpack[Options]) -> Compilation:
    """`compile`, with the values between the stages. Same arguments, same errors."""
    options = complete(options)
    if options["weights"] is not None:
        raise PlanError("weights in 8 or 4 bits beside float activations make no integer network; only compile and explain know them")
    asked = given(options)
    for name in ("group_size", "asymmetric"):
        if name in asked:
            raise PlanError(f"{name} describes the option weights, which is not given")
    chosen = find_target(target, options["targets_file"])
    find_compiler(chosen)
    toolkit_versions(chosen)  # a missing toolkit shows before anything long is begun
    check_core(options["core"], chosen)
    tuned = Tuned(chosen, options["tuning_log"], core=options["core"] or "")
    if (budget := options["time_budget"]) is not None and not 0 < budget < math.inf:
        raise DataError(f"time_budget is {budget:g} s; a finite number of seconds above 0 is needed")
    goal = Goal(options["min_sqnr"], options["min_agreement"], options["max_accuracy_drop"], options["max_metric_drop"])
    if (options["metric"] is None) != (goal.max_metric_drop is None):
        raise DataError("metric and max_metric_drop go together: what is measured, and how much of it may be lost")
    for name in () if goal else ("labels", "time_budget"):
        if name in asked:
            raise DataError(f"{name} serves an accuracy target only; give min_sqnr, min_agreement, max_accuracy_drop or max_metric_drop too")
    if not goal:
        return compiled(opened(model, chosen, calibration, options, tuned))
    job = opened(model, chosen, calibration, options, tuned)
    if job.samples.count == 0:
        raise DataError("calibration data is needed for an accuracy target: it is measured on them")
    return search(job, goal, options["labels"], budget, options["metric"])


@takes_options
def compile(model: AnyModel, target: str | Target = "native", calibration: Source | None = None, **options: Unpack[Options]) -> Artifact:
    """Compile a trained network into an int8 library for `target`. The artifact is saved with `artifact.save("model.so")`.

    Raises a QCompilerError: for anything a user can mend, the model, the data, the target; InternalError, with the cause attached, for a bug of ours.
    TypeError for an argument that there is not, or of another type.
    """
    if options.get("weights") is not None:
        return compile_weights(model, target, calibration, **options)
    return compile_stages(model, target, calibration, **options).artifact


def quantize_weights(model: AnyModel, calibration: Source | None, options: Options) -> list[tuple[FloatModel, tvm.IRModule]]:
    """The float network, and the same with its dense weights stored in few bits, at each shape. Arguments as `compile`; options: complete."""
    goes = {"weights", "group_size", "asymmetric", "keep_float", "input_shapes", "shapes", "input_values", "outputs", "example_inputs", "state"}
    goes |= {"dump_dir", "targets_file", "progress"}
    asked = {*given(options), *(["calibration"] if calibration is not None else [])}
    if "pad" in asked:
        raise PlanError(
            "rules for padding are tried on calibration data before they are trusted, and weights in 8 or 4 bits beside float activations take none; "
            "leave pad out, and bring inputs to one of the shapes before a call"
        )
    if extra := sorted(asked - goes):
        raise PlanError(f"weights in 8 or 4 bits beside float activations need no {', '.join(extra)}; leave {'it' if len(extra) == 1 else 'them'} out")
    dump = Dumper(options["dump_dir"])
    scheme = WeightScheme.of(str(options["weights"]), options["group_size"], options["asymmetric"])
    origin = origin_of(model, options["outputs"], options["example_inputs"])
    models = load_all(origin, asked_rows(options), dump=dump, input_values=options["input_values"], state=options["state"])
    kept = set(named_groups(models[0], options["keep_float"]))
    modules = [run(FLOAT, m.module, scheme, kept, dump=dump if m is models[0] else no_dump) for m in models]
    if not Graph.of(modules[0]).attrs["qc.weights"]["layers"]:
        raise PlanError(f"'{models[0].name}' has no layer whose weights could be stored in {scheme.bits} bits: no Gemm or MatMul with constant weights")
    return list(zip(models, modules, strict=True))


def compile_weights(model: AnyModel, target: str | Target = "native", calibration: Source | None = None, **options: Unpack[Options]) -> Artifact:
    """A library that computes in float32, with the weights of dense layers in 8 or 4 bits. Arguments and errors as `compile`."""
    options = complete(options)
    chosen = find_target(target, options["targets_file"])
    find_compiler(chosen)
    toolkit = toolkit_versions(chosen)
    (float_model, module), *others = quantize_weights(model, calibration, options)
    built = build(module, chosen, "generate code", others=[m for _, m in others], progress=options["progress"] or silent)
    return built.link(
        further=[{"digests": {"model": m.digest}} for m, _ in others],
        **float_model.account(),
        weights=Graph.of(module).attrs["qc.weights"],
        compiler={"qcompiler": qcompiler.__version__, "tvm": tvm.__version__, **toolkit},
        digests={"model": float_model.digest, "constants": hashlib.sha256(built.constants.data).hexdigest()},
    )
