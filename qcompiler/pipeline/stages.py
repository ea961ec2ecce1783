"""The stages of a compilation that quantizes, and the values between them. `compile.py` runs them in order; searches for mixed precision run some again."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm

import qcompiler
from qcompiler.backend.artifact import Artifact
from qcompiler.backend.build import Built, build, session_of
from qcompiler.backend.cuda import toolkit_versions
from qcompiler.backend.lowering import Program
from qcompiler.backend.tuning_log import Tuned
from qcompiler.base.debug import Dumper
from qcompiler.base.progress import Progress
from qcompiler.base.targets import Target, find_target
from qcompiler.calibration.data import Samples
from qcompiler.calibration.suspicion import doubts
from qcompiler.calibration.table import CalibrationTable, calibrate
from qcompiler.importers.model import FloatModel, load
from qcompiler.passes.graph import Graph
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.realize import realize
from qcompiler.passes.replace_weights import replace_weights
from qcompiler.passes.select_float import select_float
from qcompiler.plan.planner import decide, observed_ids
from qcompiler.plan.quant_plan import Proposals, QuantPlan
from qcompiler.plan.quant_plan import Quantized as QuantizedEdge
from qcompiler.plan.ranges import SampleEnds, choose, output_noise
from qcompiler.plan.recipes import STEPS, Recipe
from qcompiler.refine.analytic import mean_of_rounding
from qcompiler.refine.correction import Correction, FloatMeans, SessionExecutor, correct, with_operands
from qcompiler.refine.equalization import ChannelWatcher, Equalization, decide_channels, equalized_layers
from qcompiler.refine.rounding import NARROW, DataRounder
from qcompiler.runtime.session import Session


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


def compile_float(
    model: str | os.PathLike[str], target: str = "native", input_shapes: Mapping[str, Sequence[int]] | None = None, progress: Progress | None = None
) -> Artifact:
    """The float twin of a network: float32 kernels of the same templates, for comparison and calibration. Arguments as `compile`."""
    float_model = load(Path(model), input_shapes)
    built = build(select_float(float_model.module), find_target(target), "generate float code", progress=progress)
    return built.link(model=float_model.name, digests={"model": float_model.digest})


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


def equalized(model: FloatModel, twin: Built, session: Session, samples: Samples, recipe: Recipe, progress: Progress | None) -> tuple[FloatModel, Equalization]:
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
        notes=stages.plan.notes,
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


def describe(integer: tvm.IRModule, model: FloatModel) -> dict[str, Any]:
    """The manifest's account of quantization: every 8-bit value with its parameters, every operator that stayed float with the reason."""
    attrs = Graph.of(integer).attrs
    values = {name: {"scale": scale, "zero_point": zero_point} for name, (scale, zero_point) in attrs.get("qc.params", {}).items()}
    float_ops = []
    for value_id, reason in attrs.get("qc.float_ops", {}).items():
        node, op = model.source(value_id)
        float_ops.append({"id": value_id, "node": node, "op": op, "reason": reason})
    return {"model": model.name, "values": values, "float_ops": float_ops}
