"""The stages of a compilation that quantizes, and the values between them. `compile.py` has them in order; searches run some again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm

import qcompiler
from qcompiler.backend.artifact import Artifact, port_parameters, program_manifest
from qcompiler.backend.build import Built, build
from qcompiler.backend.cuda import toolkit_versions
from qcompiler.backend.lowering import Program
from qcompiler.base.debug import Dump, no_dump
from qcompiler.base.errors import ArtifactError, PlanError, bugs_named
from qcompiler.base.progress import Progress, silent
from qcompiler.base.shape_table import shape_rows
from qcompiler.base.targets import find_target
from qcompiler.calibration import table as calibration
from qcompiler.calibration.data import unused
from qcompiler.calibration.lookups import Lookups
from qcompiler.calibration.padding import Padding
from qcompiler.calibration.ports import stored_inputs
from qcompiler.calibration.stored import Pass, Remembering, file_behind
from qcompiler.calibration.suspicion import SAMPLES, doubts
from qcompiler.calibration.table import CalibrationTable
from qcompiler.importers.model import FloatModel
from qcompiler.importers.origin import AnyModel, origin_of
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import find_groups
from qcompiler.passes.sequence import FLOAT, INSERT_QDQ, INTEGER, REPLACE_OPERANDS, REPLACE_WEIGHTS, run
from qcompiler.pipeline.job import Job
from qcompiler.pipeline.padding import check_padding
from qcompiler.pipeline.shapes import common_constants, load_all, plan_for
from qcompiler.plan.planner import decide, observed_ids
from qcompiler.plan.quant_plan import Judged, Proposals, Quantized, QuantPlan, count_operators
from qcompiler.plan.ranges import SampleEnds, choose, output_noise
from qcompiler.plan.recipes import STEPS, Recipe
from qcompiler.refine.analytic import mean_of_rounding
from qcompiler.refine.correction import correct_biases
from qcompiler.refine.equalization import ChannelWatcher, Equalization, decide_channels, equalized_layers
from qcompiler.refine.means import FloatMeans
from qcompiler.refine.rounding import NARROW, DataRounder
from qcompiler.refine.trial import EXACT, Correction, SessionExecutor
from qcompiler.refine.weight_rounding import round_weights
from qcompiler.runtime.reference import ImportCheck, check_import
from qcompiler.runtime.selftest import probes, vectors

# -- the float network ----------------------------------------------------------------------------------------------------------------------


def float_code(model: FloatModel, target: str = "native", dump: Dump = no_dump, progress: Progress = silent, others: Sequence[FloatModel] = ()) -> Built:
    """The float twin of a network: float32 kernels of the same templates. others: the same network at other shapes."""
    modules = [run(FLOAT, m.module) for m in others]
    return build(run(FLOAT, model.module, dump=dump), find_target(target), "generate float code", others=modules, dump=dump, progress=progress)


def compile_float(
    model: AnyModel,
    target: str = "native",
    input_shapes: Any = None,
    progress: Progress = silent,
    input_values: Mapping[str, Any] | None = None,
    wanted: Sequence[str | None] = (),
) -> Artifact:
    """The float twin as a library, for comparison. Arguments as `compile`; wanted: the digest of a model at each shape, ArtifactError when the file's are
    others."""
    origin = origin_of(model)
    models = load_all(origin, shape_rows(input_shapes), input_values=input_values)
    for expected, found in zip(wanted, models, strict=False):
        if expected not in (None, found.digest):
            raise ArtifactError(
                f"the library was not compiled from {origin.where}: its manifest says that its model has the digest {expected}, and this one has "
                f"{found.digest} (of all that is read, and the input shapes); give the very model that it was compiled from"
            )
    first, *others = models
    further = [{"digests": {"model": m.digest}} for m in others]
    return float_code(first, target, progress=progress, others=others).link(**first.account(), digests={"model": first.digest}, further=further)


@dataclass
class Equalized:
    """The job with its network equalized; its float twin for this machine, with the same weights (None before it is wanted). imported: what another
    runtime says of the float network."""

    job: Job
    twin: Built | None
    equalization: Equalization
    imported: ImportCheck | None = None


def equalize(job: Job) -> Equalized:
    """FloatModel, samples -> FloatModel: channels scaled against each other, where the recipe asks for it and something is gained."""
    if job.samples.count == 0:
        return Equalized(job, None, Equalization())
    twin = float_code(job.model, dump=job.dump, progress=job.progress, others=job.sampled)
    imported = check_import(job.model.origin.elsewhere(), twin.session(), itertools.islice(job.samples, 1), job.model.exactness, job.model.fixed)
    if "equalize" not in job.recipe.steps or not (seen := ChannelWatcher(job.model.module)).streams:
        return Equalized(job, twin, Equalization(), imported)
    observe(job, twin, (), [seen], "measure channels")
    found = decide_channels(job.model.module, seen.values, "shift" in job.recipe.steps)
    layers = equalized_layers(job.model.module, found.channels)
    for value_id, operands in layers.items():
        for index, array in enumerate(operands, 1):
            twin.replace_operand(value_id, index, array)
    model, *others = (dataclasses.replace(m, module=run(REPLACE_WEIGHTS, m.module, layers, dump=job.dump)) for m in job.models)
    return Equalized(dataclasses.replace(job, model=model, others=tuple(others)), twin, found, imported)


def observe(
    job: Job, twin: Built, ids: Sequence[str], watchers: Sequence[Remembering], stage: str, decided_by: Sequence[int] = (), at_first: bool = False
) -> CalibrationTable:
    """One pass over the samples; or what a stored calibration knows of the same pass. ids: values of the table. decided_by: what a watcher looks at, beside
    the recipe's steps that changed the network before. at_first: watchers see samples of the plan's shape only."""
    before = sorted(job.recipe.steps & ({"streams"} if stage == "measure channels" else {"streams", "equalize", "shift"}))
    decisive = [qcompiler.__version__, before, job.recipe.judges_ranges, list(ids), list(decided_by), job.model.fixed]
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()
    file = file_behind(job.samples)
    known = file.known(stage, key) if file else None
    if known is not None and len(known.watchers) == len(watchers):
        for watcher, state in zip(watchers, known.watchers, strict=True):
            watcher.restore(state)
        return known.table
    looking: dict[str, Any] = {"at_first": watchers} if at_first else {}
    everyone = [Lookups(job.model.module), *(() if at_first else watchers)]
    padding = Padding(*(m.module for m in job.models))
    table = calibration.calibrate(twin.session(), job.samples, ids=ids, watchers=everyone, padding=padding, progress=job.progress, stage=stage, **looking)
    if job.passes is not None:
        job.passes[stage] = Pass(key, table, [w.state() for w in watchers])
    return table


@dataclass
class Measured:
    """What every plan is made from: the job, its network equalized, and statistics of its values."""

    equalized: Equalized
    table: CalibrationTable
    means: FloatMeans
    ends: SampleEnds
    warnings: list[str]
    _noise: dict[str, tuple[Proposals, dict[str, float]]] = field(default_factory=dict)

    @property
    def job(self) -> Job:
        return self.equalized.job

    @property
    def model(self) -> FloatModel:
        return self.job.model

    @functools.cached_property
    def padding(self) -> Padding:
        """The positions that the network's masks hide."""
        return Padding(*(m.module for m in self.job.models))

    @functools.cached_property
    def twin(self) -> Built:
        """The float network's code for this machine."""
        return self.equalized.twin or float_code(self.model, dump=self.job.dump, progress=self.job.progress, others=self.job.sampled)

    def under(self, recipe: Recipe) -> Measured:
        """The same statistics for another recipe, which may look at no more samples."""
        job = dataclasses.replace(self.job, recipe=recipe)
        return dataclasses.replace(self, equalized=dataclasses.replace(self.equalized, job=job, twin=self.twin), _noise={})

    def with_noise_of(self, before: Measured) -> Measured:
        """The same, with what `before` knows of ranges: of a network that computes the same values."""
        return dataclasses.replace(self, _noise=dict(before._noise))

    def noise(self, proposals: Mapping[str, Proposals]) -> dict[str, dict[str, float]]:
        """`ranges.output_noise` of proposals; what an earlier plan asked for is known."""
        new = {name: p for name, p in proposals.items() if name not in self._noise or self._noise[name][0] != p}
        if new:
            job = self.job
            session, count = self.twin.session(), job.alike.count or self.table.samples
            found = output_noise(session, new, self.ends, job.alike, count, *job.recipe.judges, job.progress, self.padding)
            self._noise |= {name: (p, found.get(name, {})) for name, p in new.items()}
        return {name: noise for name in proposals if (noise := self._noise[name][1])}


def calibrate(equalized: Equalized, stage: str = "calibrate") -> Measured:
    """FloatModel, samples -> CalibrationTable: the float network runs, on this machine whatever the target, over all samples. Without any (a model that
    states its own ranges) nothing is run. stage: what the pass is called."""
    job = equalized.job
    if equalized.twin is None:
        return Measured(equalized, CalibrationTable(), FloatMeans(job.model.module, 0), SampleEnds(()), [])
    ports = {name: str(v.name) for name, v in Graph.of(job.model.module).outputs if name in job.ports.outputs}
    ids = list(dict.fromkeys([*observed_ids(job.model), *job.ports.integers, *ports.values()]))
    means = FloatMeans(job.model.module, job.recipe.samples if job.recipe.optimizes else 0, outputs=SAMPLES)
    ends = SampleEnds(ids if job.recipe.judges_ranges else ())
    table = observe(job, equalized.twin, ids, [means, ends], stage, [means.limit], at_first=True)
    job.dump("calibration", table)
    warnings = unused(job.samples) + doubts(table, [i.name for i in job.model.inputs], means.outputs, find_groups(job.model.module))
    if equalized.imported is not None and equalized.imported.failure:
        warnings.append(equalized.imported.failure)
    return Measured(equalized, table, means, ends, warnings)


# -- the integer network --------------------------------------------------------------------------------------------------------------------


def plan(measured: Measured, kept: Mapping[str, str]) -> QuantPlan:
    """FloatModel, table, target -> QuantPlan, with the ranges that the network's outputs prefer where the recipe asks for it. kept: group id -> why it
    stays float."""
    job = measured.job

    def decided(ranges: Mapping[str, Judged]) -> QuantPlan:
        with bugs_named("stage 'plan'", measured.model.module):
            return decide(measured.model, measured.table, job.target, job.recipe, kept, ranges)

    found = decided({})
    if job.recipe.judges_ranges and found.proposals and any(o.dtype == "float32" for o in job.model.outputs):
        proposals = found.proposals
        if "judge-ranges" not in job.recipe.steps:
            proposals = {name: p.only_first() for name, p in proposals.items()}
        found = decided(choose(proposals, measured.noise(proposals), "margins" in job.recipe.steps))
    found.constants |= common_constants(found, job.models) if job.others else {}
    job.dump("plan", found.explain())
    return found


@dataclass
class QuantizedNetwork:
    """A plan, and both modules that the float network became by it. account: what was done to find layers to keep in float, {step: sentence}.
    warnings: of what the outputs lose. noise: over power of the worst output, estimated; None before that is known, or without samples."""

    measured: Measured
    plan: QuantPlan
    qdq: tvm.IRModule
    integer: tvm.IRModule
    account: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    noise: float | None = None

    @property
    def job(self) -> Job:
        return self.measured.job

    @property
    def model(self) -> FloatModel:
        return self.measured.model

    @functools.cached_property
    def others(self) -> list[tvm.IRModule]:
        """The integer modules at the other shapes of the library."""
        return [run(INTEGER, quantize(self.measured, self.plan, model)) for model in self.job.others]


def quantize(measured: Measured, plan: QuantPlan, model: FloatModel | None = None) -> tvm.IRModule:
    """FloatModel, QuantPlan -> QDQ module, with biases that undo what rounded weights do to means where the recipe asks for it. model: the network at
    another shape than that of the plan."""
    module, dump = measured.model.module, measured.job.dump
    biases = mean_of_rounding(module, plan, measured.table) if "analytic-bias" in measured.job.recipe.steps else None
    if model is not None:
        module, plan, dump = model.module, plan_for(plan, model), no_dump
    if biases is not None:
        module = run(REPLACE_WEIGHTS, module, biases, dump=dump)
    return run(INSERT_QDQ, module, plan, dump=dump)


def realize(measured: Measured, plan: QuantPlan, qdq: tvm.IRModule) -> QuantizedNetwork:
    """QDQ module -> integer module."""
    return QuantizedNetwork(measured, plan, qdq, run(INTEGER, qdq, dump=measured.job.dump))


def integer_network(measured: Measured, kept: Mapping[str, str]) -> QuantizedNetwork:
    """The three stages from statistics to the integer module. kept: group id -> why it stays float."""
    decided = plan(measured, kept)
    return realize(measured, decided, quantize(measured, decided))


# -- the library ----------------------------------------------------------------------------------------------------------------------------


def generate(network: QuantizedNetwork) -> Built:
    """Integer module, target, tuning log -> Program and its object code."""
    job = network.job
    return build(network.integer, job.target, "generate int8 code", job.tuned, others=network.others, dump=job.dump, progress=job.progress)


@dataclass
class Corrected:
    """A network's code with the constants that calibration samples led to. integer: the module that it equals bit for bit; others: at the other shapes of
    the library. here: its code for this machine, if there is any. corrections: what was tried, by its name in the manifest. ports: what the manifest says
    of inputs and outputs whose types are not the float network's, at each shape."""

    network: QuantizedNetwork
    built: Built
    integer: tvm.IRModule
    here: Built | None
    corrections: dict[str, Correction]
    others: Sequence[tvm.IRModule] = ()
    ports: Sequence[Mapping[str, Any]] = ()

    @property
    def described_ports(self) -> dict[str, Any]:
        """What the manifest says of inputs and outputs at the first shape."""
        values = describe(self.integer, self.network.job.model)["values"]
        return {**port_parameters(self.built.program, values), **({"ports": self.ports[0]} if self.ports else {})}


def correct(network: QuantizedNetwork, built: Built) -> Corrected:
    """Integer module, samples -> integer module: biases and weights with which the int8 network comes measurably closer to the float one."""
    measured, job, host = network.measured, network.job, find_target("native")
    here = built if built.program.target == host else None
    integer, others, tried = network.integer, network.others, dict[str, Correction]()
    limit = min(measured.means.limit, job.recipe.samples)
    if limit and job.recipe.optimizes and measured.means.outputs:  # there may be no sample of the plan's shape left
        here = here or build(integer, host, "generate host code", others=others, progress=job.progress)
        twin = measured.twin.session()
        executor = SessionExecutor(here.session(), here, lambda sample: measured.padding.of(twin, sample), network.model.naming)
        for name, change in _corrections(job.recipe):
            found = tried[name] = change(integer, executor, measured.means, itertools.islice(job.alike, limit), progress=job.progress)
            job.dump(name, found)
            if found.kept:
                integer = run(REPLACE_OPERANDS, integer, found.operands(), dump=job.dump)
                others = [run(REPLACE_OPERANDS, module, found.operands()) for module in others]
                for operand, arrays in found.operands().items() if built is not here else ():
                    for value_id, array in arrays.items():
                        built.replace_operand(value_id, operand, array)
    return Corrected(network, built, integer, here, tried, others)


def _corrections(recipe: Recipe) -> list[tuple[str, Callable[..., Correction]]]:
    """(name in the manifest, how it is done) of the corrections that a recipe asks for, in order."""
    found: list[tuple[str, Callable[..., Correction]]] = []
    if "correct-bias" in recipe.steps:
        found.append(("bias_correction", correct_biases))
    if recipe.steps & {"round-narrow", "round-all"}:
        rounder = DataRounder(recipe.positions, None if "round-all" in recipe.steps else NARROW)
        found.append(("weight_rounding", functools.partial(round_weights, rounder)))
    return found


@dataclass
class Compilation:
    """A finished compilation: the artifact, and the integer module that it equals bit for bit."""

    artifact: Artifact
    corrected: Corrected

    @property
    def quantized(self) -> QuantizedNetwork:
        return self.corrected.network

    @property
    def integer(self) -> tvm.IRModule:
        return self.corrected.integer

    @property
    def built(self) -> Built:
        return self.corrected.built

    @property
    def program(self) -> Program:
        return self.built.program


def link(corrected: Corrected, searched: Mapping[str, str] = {}, **account: Any) -> Compilation:
    """Program -> Artifact. searched: what a choice between networks found, {name: sentence}. account: further entries of the manifest."""
    network, measured, job = corrected.network, corrected.network.measured, corrected.network.job
    warnings = [*measured.warnings, *network.warnings]
    here = corrected.built if job.target == find_target("native") else corrected.here
    if here is None and (job.pad or job.selftest):
        here = build(corrected.integer, find_target("native"), "generate host code", others=corrected.others, progress=job.progress)
    if job.selftest and here is not None:
        account["selftest"] = self_test(corrected, here, job.selftest)
    if job.pad and here is not None:
        first = [stored_inputs(corrected.described_ports, sample) for sample in itertools.islice(job.alike, 1)]
        warnings += [w for sample in first for w in check_padding(here.session(), job.pad, sample, job.ports.outputs)]
        account["padding"] = dict(job.pad)
    artifact = corrected.built.link(
        **describe(corrected.integer, job.model),
        channels={k: c.to_json() for k, c in measured.equalized.equalization.channels.items()},
        compiler={"qcompiler": qcompiler.__version__, "tvm": tvm.__version__} | toolkit_versions(job.target),
        preset=network.plan.preset,
        calibration_samples=measured.table.samples,
        operators=count_operators(find_groups(job.model.module), Graph.of(corrected.integer).attrs.get("qc.float_ops", {}).keys()),
        sqnr_db=expected_sqnr(corrected),
        quantization={**effects(network), **network.account} | {name: c.summary() for name, c in corrected.corrections.items()} | {**searched},
        warnings=warnings,
        notes=network.plan.notes,
        **({"ports": corrected.ports[0]} if corrected.ports else {}),
        digests={
            "model": job.model.digest,
            "calibration": measured.table.digest,
            "plan": network.plan.digest,
            "tuning_log": "" if job.tuned is None else job.tuned.digest,
            "constants": hashlib.sha256(corrected.built.constants.tobytes()).hexdigest(),
        },
        further=[
            described_further(module, model) | ({"ports": corrected.ports[number]} if corrected.ports else {})
            for number, (module, model) in enumerate(zip(corrected.others, job.others, strict=True), 1)
        ],
        **account,
    )
    return Compilation(dataclasses.replace(artifact, imported=measured.equalized.imported), corrected)


def self_test(corrected: Corrected, here: Built, count: int) -> dict[str, Any]:
    """The manifest's entry of that name: what this machine makes of `count` test vectors. Raises PlanError where nothing has the same bits on every CPU."""
    program = corrected.built.program
    manifest = program_manifest(program) | corrected.described_ports
    wanted = probes(manifest, [(s.writes, s.reads) for s in program.steps])
    if not wanted:
        raise PlanError("a self-test is not possible: all of this network is computed in float, and no value has the same bits on every CPU")
    return vectors(here.session(1), manifest, wanted, count)


def expected_sqnr(corrected: Corrected) -> float | None:
    """dB of the worst output on calibration samples: as the last correction measured it, else as estimated. None where no sample tells, or nothing is lost."""
    tried, noise = list(corrected.corrections.values()), corrected.network.noise
    found = (tried[-1].after if tried[-1].kept else tried[-1].before) if tried else None if not noise else -10 * math.log10(noise)
    return round(found, 2) if found is not None and found < EXACT and math.isfinite(found) else None  # as many digits as every machine agrees on


def described_further(integer: tvm.IRModule, model: FloatModel) -> dict[str, Any]:
    """`describe` of the network at another shape of its library, and its digest."""
    described = describe(integer, model)
    return {"values": described["values"], "float_ops": described["float_ops"], "digests": {"model": model.digest}}


def effects(network: QuantizedNetwork) -> dict[str, str]:
    """What each step of the recipe did up to the integer module, for people: {step: sentence}, in order."""
    recipe, edges = network.job.recipe, [e for e in network.plan.edges.values() if isinstance(e, Quantized)]
    found = {"steps": ", ".join(s for s in STEPS if s in recipe.steps) or "none"}
    if "equalize" in recipe.steps:
        found["channel_equalization"] = network.measured.equalized.equalization.summary()
    if "ranges" in recipe.steps:
        found["ranges"] = f"outliers clipped in {sum(', clips ' in e.reason for e in edges)} of {len(edges)} values with a range of their own"
    return found


def describe(integer: tvm.IRModule, model: FloatModel) -> dict[str, Any]:
    """The manifest's account of quantization: every 8-bit value with its parameters, every operator that stayed float with the reason."""
    attrs = Graph.of(integer).attrs
    values = {name: {"scale": scale, "zero_point": zero_point} for name, (scale, zero_point) in attrs.get("qc.params", {}).items()}
    float_ops = []
    for value_id, reason in attrs.get("qc.float_ops", {}).items():
        node, op = model.source(value_id)
        float_ops.append({"id": value_id, "node": node, "op": op, "reason": reason})
    return {**model.account(), "values": values, "float_ops": float_ops}
