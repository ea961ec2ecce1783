"""The compilation, as one literal list of stages. `compile` is the public entry; the command line calls it too."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

import tvm

import qcompiler
from qcompiler import artifact as artifacts
from qcompiler.analytic import mean_of_rounding
from qcompiler.artifact import Artifact
from qcompiler.calibration import CalibrationTable, calibrate
from qcompiler.codegen import object_code
from qcompiler.correction import Correction, FloatMeans, SessionExecutor, correct, with_operands
from qcompiler.cuda import toolkit_versions
from qcompiler.data import NO_SAMPLES, Samples, open_samples
from qcompiler.debug import Dumper
from qcompiler.equalization import ChannelWatcher, Equalization, decide_channels, equalized_layers
from qcompiler.errors import DataError, PlanError, closest
from qcompiler.goal import Goal
from qcompiler.lowering import Params, Program, lower
from qcompiler.model import FloatModel, load
from qcompiler.passes.graph import Graph
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.realize import realize
from qcompiler.passes.replace_weights import replace_weights
from qcompiler.passes.select_float import select_float
from qcompiler.passes.trained import Trained
from qcompiler.plan import decide, named_groups, observed_ids
from qcompiler.progress import Progress
from qcompiler.quant_plan import Proposals, QuantPlan
from qcompiler.quant_plan import Quantized as QuantizedEdge
from qcompiler.ranges import SampleEnds, choose, output_noise
from qcompiler.recipes import STEPS, Recipe, recipe
from qcompiler.rounding import NARROW, DataRounder
from qcompiler.runtime.session import Session
from qcompiler.suspicion import doubts
from qcompiler.targets import Target, find_target
from qcompiler.tuning_log import Tuned
from qcompiler.weight_only import WeightScheme


class Options(TypedDict, total=False):
    """Keyword arguments of `compile`.

    input_shapes: {input name: shape}, for dimensions that the file leaves open. preprocess: for a folder of images, a YAML path.
    preset, enable, disable: the recipe of quantization, and steps to switch on and off in it, by the names in `recipes.STEPS`. keep_float: layers
    that stay float32, by the names that their nodes or values have in the model file. min_sqnr (dB), min_agreement (fraction), max_accuracy_drop
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


@dataclass
class Built:
    """A program with its object code: linked again with other constants, no code is generated anew."""

    program: Program
    code: bytes

    def link(self, **manifest: Any) -> Artifact:
        described = artifacts.program_manifest(self.program) | {"values": {}, "float_ops": []} | manifest
        described |= artifacts.port_parameters(self.program, described["values"])
        return artifacts.link(self.code, self.program.constants, described, self.program.target)


def build(module: tvm.IRModule, target: Target, stage: str, params: Params | None = None, *, progress: Progress | None = None) -> Built:
    """Lower a module, with tuned `params` where there are some, and generate its code."""
    program = lower(module, target, params)
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


@dataclass
class Measured:
    """The float network with its native code (made when it is wanted), and its statistics: what every plan is made from."""

    model: FloatModel
    built: Built | None
    samples: Samples
    table: CalibrationTable
    means: FloatMeans
    recipe: Recipe
    equalization: Equalization
    warnings: list[str]
    ends: SampleEnds = field(default_factory=lambda: SampleEnds(()))
    _noise: dict[str, tuple[Proposals, dict[str, float]]] = field(default_factory=dict)

    @property
    def twin(self) -> Built:
        """The float network's code for this machine."""
        self.built = self.built or float_twin(self.model, None)
        return self.built

    def noise(self, proposals: Mapping[str, Proposals], progress: Progress | None) -> dict[str, dict[str, float]]:
        """`ranges.output_noise` of proposals; what an earlier plan asked for is known."""
        new = {name: p for name, p in proposals.items() if name not in self._noise or self._noise[name][0] != p}
        if new:
            with session_of(self.twin.link()) as session:
                found = output_noise(session, new, self.ends, self.samples, self.table.samples, *self.recipe.judges, progress)
            self._noise |= {name: (p, found.get(name, {})) for name, p in new.items()}
        return {name: noise for name in proposals if (noise := self._noise[name][1])}


@dataclass
class Quantized:
    """A plan, and both modules that the float network became by it."""

    measured: Measured
    plan: QuantPlan
    qdq: tvm.IRModule
    integer: tvm.IRModule
    mixed: str = ""  # what the step of that name did

    @property
    def model(self) -> FloatModel:
        return self.measured.model

    def effects(self) -> dict[str, str]:
        """What each step of the recipe did so far, for people: {step: sentence}, in order."""
        recipe, edges = self.measured.recipe, [e for e in self.plan.edges.values() if isinstance(e, QuantizedEdge)]
        found = {"steps": ", ".join(s for s in STEPS if s in recipe.steps) or "none"}
        if "equalize" in recipe.steps:
            found["channel_equalization"] = self.measured.equalization.summary()
        if "ranges" in recipe.steps:
            found["ranges"] = f"outliers clipped in {sum(', clips ' in e.reason for e in edges)} of {len(edges)} values with a range of their own"
        if self.mixed:
            found["mixed"] = self.mixed
        return found


@dataclass
class Compilation:
    """A finished compilation: the artifact, and the integer module that it equals bit for bit."""

    artifact: Artifact
    quantized: Quantized
    integer: tvm.IRModule
    built: Built

    @property
    def program(self) -> Program:
        return self.built.program


def float_twin(model: FloatModel, progress: Progress | None) -> Built:
    return build(select_float(model.module), find_target("native"), "generate float code", progress=progress)


def measure(model: FloatModel, samples: Samples, recipe: Recipe, dump: Dumper, progress: Progress | None) -> Measured:
    """Run the float network, on this machine whatever the target, over all samples; the result's network is the equalized one.

    Without any samples (a model that states its own ranges) nothing is run.
    """
    equalization = Equalization()
    if samples.count == 0:
        return Measured(model, None, samples, CalibrationTable(), FloatMeans(model.module, 0), recipe, equalization, [])
    twin = float_twin(model, progress)
    with session_of(twin.link()) as session:
        if "equalize" in recipe.steps:
            model, equalization = equalized(model, twin, session, samples, recipe, progress)
            dump("equalized", model.module)
        ids = observed_ids(model)
        means, ends = FloatMeans(model.module, recipe.samples if recipe.optimizes else 0), SampleEnds(ids if recipe.judges_ranges else ())
        table = calibrate(session, samples, ids=ids, watchers=[means, ends], progress=progress)
    dump("calibration", table)
    warnings = doubts(table, [i.name for i in model.inputs], means.outputs)
    return Measured(model, twin, samples, table, means, recipe, equalization, warnings, ends)


def equalized(
    model: FloatModel, twin: Built, session: Session, samples: Samples, recipe: Recipe, progress: Progress | None
) -> tuple[FloatModel, Equalization]:
    """The network with its channels equalized, in `twin` and its session too: their code serves any weights."""
    seen = ChannelWatcher(model.module)
    if not seen.streams:
        return model, Equalization()
    calibrate(session, samples, ids=(), watchers=[seen], progress=progress, stage="measure channels")
    found = decide_channels(model.module, seen.values, "shift" in recipe.steps)
    layers = equalized_layers(model.module, found.channels)
    for value_id, operands in layers.items():
        for index, array in enumerate(operands, 1):
            twin.program.replace_operand(value_id, index, array)
    session.set_constants(twin.program.constants)
    return dataclasses.replace(model, module=replace_weights(model.module, layers)), found


def plan_for(measured: Measured, target: Target, keep_float: Mapping[str, str], progress: Progress | None) -> QuantPlan:
    """The plan, with the ranges that the network's outputs prefer where the recipe asks for it."""
    recipe = measured.recipe
    plan = decide(measured.model, measured.table, target, recipe, keep_float)
    if not recipe.judges_ranges or not plan.proposals or not any(o.dtype == "float32" for o in measured.model.outputs):
        return plan
    proposals = plan.proposals
    if "judge-ranges" not in recipe.steps:
        proposals = {name: p.only_first() for name, p in proposals.items()}
    ranges = choose(proposals, measured.noise(proposals, progress), "margins" in recipe.steps)
    return decide(measured.model, measured.table, target, recipe, keep_float, ranges)


def planned(measured: Measured, target: Target, keep_float: Mapping[str, str], dump: Dumper, progress: Progress | None = None) -> Quantized:
    """The stages from statistics to the integer module. keep_float: group id -> why it stays float."""
    plan = plan_for(measured, target, keep_float, progress)
    dump("plan", plan.explain())
    module = measured.model.module
    if "analytic-bias" in measured.recipe.steps:
        module = replace_weights(module, mean_of_rounding(module, plan, measured.table))
    qdq = insert_qdq(module, plan)
    dump("qdq", qdq)
    integer = realize(qdq)
    dump("integer", integer)
    return Quantized(measured, plan, qdq, integer)


def mixed(measured: Measured, target: Target, kept: Mapping[str, str], dump: Dumper, progress: Progress | None) -> Quantized:
    """`planned`, where the recipe asks for it with the layers in float that are worth it."""
    stages = planned(measured, target, kept, dump, progress)
    if "mixed" not in measured.recipe.steps or target.gpu or not any(o.dtype == "float32" for o in measured.model.outputs):
        return stages
    from qcompiler.survey import worth_keeping

    found = worth_keeping(stages, target, kept, progress)
    if found.reasons:
        stages = planned(measured, target, {**found.reasons, **kept}, dump, progress)
    return dataclasses.replace(stages, mixed=found.summary)


def opened(model: str | os.PathLike[str], calibration: Any, dump: Dumper, options: Options) -> tuple[FloatModel, Samples, Recipe, dict[str, str]]:
    """The model, its calibration samples, the recipe, and the groups that shall stay float, with the reason. Arguments as `compile`."""
    chosen = recipe(options.get("preset", "default"), options.get("enable", ()), options.get("disable", ()))
    float_model = load(Path(model), options.get("input_shapes"))
    dump("float", float_model.module)
    trained = Trained.of(Graph.of(float_model.module).attrs)
    if trained:
        chosen = chosen.without_changes()
    if calibration is None and not trained:
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
        from qcompiler.accuracy_target import compile_to

        return compile_to(goal, float_model, samples, options.get("labels"), options.get("time_budget"), row, tuned, chosen, kept, dump, progress)
    measured = measure(float_model, samples, chosen, dump, progress)
    return finish(mixed(measured, row, kept, dump, progress), row, tuned, dump, progress)


def check_names(options: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword argument that `compile` does not have."""
    for name in set(options) - set(Options.__annotations__):
        raise TypeError(f"compile() has no keyword argument '{name}'.{closest(name, list(Options.__annotations__))}")


def finish(stages: Quantized, target: Target, tuned: Tuned, dump: Dumper, progress: Progress | None) -> Compilation:
    """The stages from the integer module to the artifact."""
    built = build(stages.integer, target, "generate int8 code", tuned, progress=progress)
    integer = stages.integer
    effects = stages.effects()
    for name, correction in corrections(built, stages, progress):
        effects[name] = correction.summary()
        dump(name, correction)
        if correction.kept:
            integer = with_operands(integer, correction)
            for operand, arrays in correction.operands():
                for value_id, array in arrays.items():
                    built.program.replace_operand(value_id, operand, array)
    channels = {k: c.to_json() for k, c in stages.measured.equalization.channels.items()}
    artifact = built.link(
        **describe(integer, stages.model),
        channels=channels,
        compiler={"qcompiler": qcompiler.__version__, "tvm": tvm.__version__} | toolkit_versions(target),
        preset=stages.plan.preset,
        calibration_samples=stages.measured.table.samples,
        quantization=effects,
        warnings=stages.measured.warnings,
        digests={
            "model": stages.model.digest,
            "calibration": stages.measured.table.digest,
            "plan": stages.plan.digest,
            "tuning_log": tuned.digest,
            "constants": hashlib.sha256(built.program.constants.tobytes()).hexdigest(),
        },
    )
    return Compilation(artifact, stages, integer, built)


def corrections(built: Built, stages: Quantized, progress: Progress | None) -> Iterator[tuple[str, Correction]]:
    """What measurably brings the int8 network closer to the float one on calibration samples: (name in the manifest, what changes), in order."""
    measured, host = stages.measured, find_target("native")
    limit = measured.means.limit
    if not limit:
        return
    on_host = built if built.program.target == host else build(stages.integer, host, "generate host code", progress=progress)
    with session_of(on_host.link()) as session:
        executor = SessionExecutor(session, on_host.program)
        start = stages.integer
        if "correct-bias" in measured.recipe.steps:
            first = correct(start, executor, measured.means, itertools.islice(measured.samples, limit), progress=progress)
            start = with_operands(start, first) if first.kept else start
            yield "bias_correction", first
        if not measured.recipe.steps & {"round-narrow", "round-all"}:
            return
        rounder = DataRounder(measured.recipe.positions, None if "round-all" in measured.recipe.steps else NARROW)
        yield "weight_rounding", correct(start, executor, measured.means, itertools.islice(measured.samples, limit), rounder=rounder, progress=progress)


def compile(model: str | os.PathLike[str], target: str = "native", calibration: Any = None, **options: Unpack[Options]) -> Artifact:
    """Compile a float ONNX network into an int8 library for `target`.

    model: path of the ONNX file. target: a row of targets.yaml, a triple, or "native". calibration: samples as `qcompiler.data.open_samples`
    takes them (a path, or an iterable of {input name: array with the model's shape}); not needed for a model that states all its ranges itself
    (ONNX with QuantizeLinear and DequantizeLinear, from quantization-aware training say). options: see `Options`.

    Raises a QCompilerError for anything a user can mend: the model, the data, the target.
    """
    if options.get("weights") is not None:
        return compile_weights(model, target, calibration, **options)
    return compile_stages(model, target, calibration, **options).artifact


_DEFAULTS = {"preset": "default", "enable": [], "disable": [], "keep_float": []}  # what the command line passes when an option is not given


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
    built = build(select_float(float_model.module), find_target(target), "generate float code", progress=progress)
    return built.link(model=float_model.name, digests={"model": float_model.digest})
