"""The stages of a compilation that quantizes, and the values between them. `compile.py` has them in order; searches run some again."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm

from qcompiler.backend.build import Built, build
from qcompiler.backend.kernel_cache import installation
from qcompiler.base.debug import no_dump
from qcompiler.base.errors import bugs_named
from qcompiler.base.memory import give_back
from qcompiler.base.parallel import one_blas_thread
from qcompiler.base.targets import find_target
from qcompiler.calibration import table as calibration
from qcompiler.calibration.data import unused
from qcompiler.calibration.lookups import Lookups
from qcompiler.calibration.padding import Padding
from qcompiler.calibration.stored import Pass, Remembering
from qcompiler.calibration.suspicion import SAMPLES, doubts
from qcompiler.calibration.table import CalibrationTable
from qcompiler.importers.model import FloatModel
from qcompiler.importers.onnx_file import QUANTIZED
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import SIXTEEN, Group, find_groups
from qcompiler.passes.halves import HALVES
from qcompiler.passes.sequence import INSERT_QDQ, INTEGER, REPLACE_OPERANDS, REPLACE_WEIGHTS, run
from qcompiler.pipeline.findings import Findings, Found, named, remembered
from qcompiler.pipeline.float_code import float_code
from qcompiler.pipeline.job import Job
from qcompiler.pipeline.shapes import common_constants, plan_for
from qcompiler.plan.planner import decide, observed_ids
from qcompiler.plan.quant_plan import Judged, Proposals, QuantPlan
from qcompiler.plan.ranges import TRIFLE, Heard, SampleEnds, output_noise
from qcompiler.plan.recipes import Recipe
from qcompiler.plan.together import CLEARLY, noise_together, rival_ranges
from qcompiler.refine.analytic import mean_of_rounding, shift_of_rounding
from qcompiler.refine.correction import correct_biases, stated_biases
from qcompiler.refine.equalization import ChannelWatcher, Equalization, decide_channels, equalized_layers
from qcompiler.refine.first_layers import FirstLayers, first_layers
from qcompiler.refine.means import FloatMeans
from qcompiler.refine.rounding import NARROW, DataRounder
from qcompiler.refine.trial import Correction, SessionExecutor
from qcompiler.refine.weight_rounding import round_weights
from qcompiler.runtime.reference import ImportCheck, check_import, installed_version

# -- the float network ----------------------------------------------------------------------------------------------------------------------


@dataclass
class FloatTwin:
    """The code of a job's float network for this machine. built: None before it is wanted; with all that is seen of samples in a stored calibration, it never
    is."""

    job: Job
    built: Built | None = None

    def code(self) -> Built:
        """`built`, made where there is none yet."""
        if self.built is None:
            self.built = float_code(self.job.model, dump=self.job.dump, progress=self.job.progress, others=self.job.sampled)
        return self.built


@dataclass
class Equalized:
    """The job with its network equalized, and its float twin, with the same weights. imported: what another runtime says of the float network. first: the
    layers at the inputs, with the weights that they had before."""

    job: Job
    twin: FloatTwin
    equalization: Equalization
    imported: ImportCheck | None = None
    first: Mapping[str, tuple[str, Group]] = field(default_factory=dict)


def equalize(job: Job) -> Equalized:
    """FloatModel, samples -> FloatModel: channels scaled against each other, where the recipe asks for it and something is gained."""
    if job.samples.count == 0:
        return Equalized(job, FloatTwin(job), Equalization())
    first = first_layers(find_groups(job.model.module), [i.name for i in job.model.inputs])
    plain = Equalized(job, FloatTwin(job), Equalization(), first=first)
    plain.imported = imported = compared(plain)
    if "equalize" not in job.recipe.steps or not (seen := ChannelWatcher(job.model.module)).streams:
        return plain
    observe(plain, (), [seen], "measure channels")
    found = decide_channels(job.model.module, seen.values, "shift" in job.recipe.steps)
    layers = equalized_layers(job.model.module, found.channels)
    give_back()
    model, *others = (dataclasses.replace(m, module=run(REPLACE_WEIGHTS, m.module, layers, dump=job.dump)) for m in job.models)
    if (built := plain.twin.built) is not None:
        groups = {g.id: g for g in find_groups(model.module)}
        for value_id, operands in layers.items():
            for index, array in enumerate(operands, 1):
                weight = groups[value_id].weight if index == 1 else None
                array = array if weight is None or not np.array_equal(weight, array) else weight  # kept once
                built.replace_operand(groups[value_id].front.id, index, array)
    job = dataclasses.replace(job, model=model, others=tuple(others))
    return Equalized(job, FloatTwin(job, built), found, imported, first)


def compared(equalized: Equalized) -> ImportCheck:
    """The float network beside another runtime on the file, on one sample. A stored calibration tells as long as it is the same compiler and runtime."""
    job = equalized.job
    other, model = job.model.origin.elsewhere(), job.model

    def find() -> Findings:
        session = equalized.twin.code().session()
        give_back()  # what import and lowering took
        found = check_import(other, session, itertools.islice(job.samples, 1), model.exactness, model.fixed, model.rounded)
        give_back()  # what the other runtime took
        return found.state()

    return remembered(job, "import", [installation(), installed_version(other.package), model.exactness], find, ImportCheck.of_state)


def observe(
    equalized: Equalized, ids: Sequence[str], watchers: Sequence[Remembering], stage: str, decided_by: Sequence[int] = (), at_first: bool = False
) -> CalibrationTable:
    """One pass over the samples; or what a stored calibration knows of the same pass. ids: values of the table. decided_by: what a watcher looks at, beside
    the recipe's steps that changed the network before. at_first: watchers see samples of the plan's shape only."""
    job, attrs = equalized.job, Graph.of(equalized.job.model.module).attrs
    before = sorted(job.recipe.steps & ({"streams"} if stage == "measure channels" else {"streams", "equalize", "shift"}))
    rewritten = [attrs.get(SIXTEEN, {}), attrs.get(HALVES, {})]
    name, key = named(job, stage, before, job.recipe.judges_ranges, list(ids), list(decided_by), job.model.fixed, rewritten)
    known = job.stored.known(name, key) if job.stored else None
    if known is not None and len(known.watchers) == len(watchers):
        for watcher, state in zip(watchers, known.watchers, strict=True):
            watcher.restore(state)
        if job.to_store:
            job.found[name] = known
        return known.table
    looking: dict[str, Any] = {"at_first": watchers} if at_first else {}
    everyone = [Lookups(job.model.module), *(() if at_first else watchers)]
    padding = Padding(*(m.module for m in job.models))
    twin = equalized.twin.code().session()
    table = calibration.calibrate(twin, job.samples, ids=ids, watchers=everyone, padding=padding, progress=job.progress, stage=stage, **looking)
    if job.to_store:
        job.found[name] = Pass(key, table, [w.state() for w in watchers])
    return table


@dataclass
class Measured:
    """What every plan is made from: the job, its network equalized, and statistics of its values."""

    equalized: Equalized
    table: CalibrationTable
    means: FloatMeans
    ends: SampleEnds
    warnings: list[str]
    _noise: dict[str, tuple[Proposals, Heard | None]] = field(default_factory=dict)

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

    @property
    def twin(self) -> Built:
        """The float network's code for this machine."""
        return self.equalized.twin.code()

    def under(self, recipe: Recipe) -> Measured:
        """The same statistics for another recipe, which may look at no more samples, and a library of its own. What either comes to know of ranges, both do."""
        job = dataclasses.replace(self.job, recipe=recipe, tuned=self.job.tuned and self.job.tuned.anew())
        return dataclasses.replace(self, equalized=dataclasses.replace(self.equalized, job=job))

    def with_noise_of(self, before: Measured) -> Measured:
        """The same, with what `before` knows of ranges, and what plans of it have asked: of a network that computes the same values."""
        self.table.asked.update(before.table.asked)
        return dataclasses.replace(self, _noise=dict(before._noise))

    def noise(self, proposals: Mapping[str, Proposals]) -> dict[str, Heard]:
        """`ranges.output_noise` of proposals; what an earlier plan asked for is known."""
        new = {name: p for name, p in proposals.items() if name not in self._noise or self._noise[name][0] != p}
        if new:
            job = self.job
            known = (min(h.noise.values()) for name in proposals.keys() - new.keys() if (h := self._noise[name][1]))
            beside = math.fsum(filter(math.isfinite, known))

            def judged() -> Findings:
                count = job.alike.count or self.table.samples
                noise = output_noise(self.twin.session(), new, self.ends, job.alike, count, *job.recipe.judges, job.progress, self.padding, beside)
                return {name: np.array([*heard.noise.values(), heard.cut]) for name, heard in noise.items()}

            decisive = [TRIFLE, beside, self.table.digest, sorted((name, repr(p)) for name, p in new.items())]

            def pairs(found: Findings) -> dict[str, tuple[Proposals, Heard | None]]:
                return {name: (p, _heard(p, found[name].tolist()) if name in found else None) for name, p in new.items()}

            self._noise |= remembered(job, "ranges", decisive, judged, pairs)
        return {name: heard for name in proposals if (heard := self._noise[name][1])}


def calibrate(equalized: Equalized) -> Measured:
    """FloatModel, samples -> CalibrationTable: the float network runs, on this machine whatever the target, over all samples. Without any (a model that
    states its own ranges) nothing is run."""
    job = equalized.job
    if job.samples.count == 0:
        return Measured(equalized, CalibrationTable(), FloatMeans(job.model.module, 0), SampleEnds(()), [])
    ids, means = looked_at(job), means_of(job)
    ends, first = SampleEnds(ids), FirstLayers(equalized.first, SAMPLES)
    groups = find_groups(job.model.module)
    give_back()  # what equalization took
    table = observe(equalized, ids, [means, ends, first], "calibrate", [means.limit], at_first=True)
    job.dump("calibration", table)
    warnings = unused(job.samples) + doubts(table, [i.name for i in job.model.inputs], means.outputs, groups, first.constancy())
    if equalized.imported is not None and equalized.imported.failure and job.model.exactness != QUANTIZED:  # such a file is judged by its library
        warnings.append(equalized.imported.failure)
    return Measured(equalized, table, means, ends, warnings)


def means_of(job: Job) -> FloatMeans:
    """What is to be known of the means of a job's network; nothing yet."""
    return FloatMeans(job.model.module, job.recipe.samples if job.recipe.optimizes else 0, outputs=SAMPLES)


def looked_at(job: Job) -> list[str]:
    """The values whose statistics a plan may need."""
    ports = [value for name, value in computed_outputs(job.model).items() if name in job.ports.outputs]
    return list(dict.fromkeys([*observed_ids(job.model), *job.ports.integers, *ports]))


def computed_outputs(model: FloatModel) -> dict[str, str]:
    """Output name -> the value that holds its numbers where the network runs; no step computes a view of it."""
    views = {g.id: g.inputs[0] for g in find_groups(model.module) if g.traits.views and g.inputs}
    found = {name: str(var.name) for name, var in Graph.of(model.module).outputs}
    while behind := {name: views[value] for name, value in found.items() if value in views}:
        found |= behind
    return found


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
        room, heard = measured.equalized.equalization.room, measured.noise(proposals)
        rivals = rival_ranges(proposals, heard, measured.ends, measured.table.samples, room, job.recipe.steps)
        found = decided(_best(measured, rivals, found))
    found.constants |= common_constants(found, job.models) if job.others else {}
    job.dump("plan", found.explain())
    return found


def _best(measured: Measured, ranges: Sequence[dict[str, Judged]], first: QuantPlan) -> dict[str, Judged]:
    """Those of some ranges with which the outputs lose least with all values rounded: the first, where none are clearly better. first: a plan with others."""
    job, plans = measured.job, [first.with_ranges(r) for r in ranges]
    if len(plans) == 1:
        return ranges[0]

    def found() -> Findings:
        give_back()  # what judging ranges one by one took
        count = job.alike.count or measured.table.samples
        return {"noise": noise_together(measured.twin.session(), plans, measured.ends, job.alike, count, job.recipe.judges[0], measured.padding)}

    decisive = [measured.table.digest, first.digest, [sorted((name, repr(judged)) for name, judged in r.items()) for r in ranges]]
    noise = remembered(job, "ranges together", decisive, found, lambda state: state["noise"])
    best = int(noise.argmin())
    return ranges[best if noise[best] < CLEARLY * noise[0] else 0]


def _heard(proposals: Proposals, numbers: Sequence[float]) -> Heard:
    return Heard(dict(zip(proposals.params, numbers[:-1], strict=True)), numbers[-1])


@dataclass
class QuantizedNetwork:
    """A plan, and both modules that the float network became by it. account: what was done to find layers to keep in float, {step: sentence}.
    noise: over power of the worst output, estimated; None before that is known, or without samples."""

    measured: Measured
    plan: QuantPlan
    qdq: tvm.IRModule
    integer: tvm.IRModule
    account: Mapping[str, str] = field(default_factory=dict)
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

    @functools.cached_property
    def digest(self) -> str:
        """That of the plan, which changes no more."""
        return self.plan.digest

    def remembered(self, what: str, find: Callable[[], Findings], read: Callable[[Findings], Found], *decisive: Any) -> Found:
        """As the function `remembered`, of what depends on the plan and its statistics, and on `decisive`."""
        return remembered(self.job, what, [self.digest, self.measured.table.digest, *decisive], find, read)


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


@one_blas_thread
def integer_network(measured: Measured, kept: Mapping[str, str]) -> QuantizedNetwork:
    """The three stages from statistics to the integer module. kept: group id -> why it stays float."""
    decided = plan(measured, kept)
    made = realize(measured, decided, quantize(measured, decided))
    give_back()
    return made


# -- code, and what corrects it ----------------------------------------------------------------------------------------------------------------------------


def generate(network: QuantizedNetwork) -> Built:
    """Integer module, target, tuning log -> Program and its object code."""
    job = network.job
    return build(network.integer, job.target, "generate int8 code", job.tuned, others=network.others, dump=job.dump, progress=job.progress)


@dataclass
class Corrected:
    """A network's code with the constants that calibration samples led to. integer: the module that it equals bit for bit; others: at the other shapes of
    the library. here: its code for this machine, if there is any. corrections: what was tried, by its name in the manifest. ports: what the manifest says
    of inputs and outputs whose types are not the float network's, at each shape. noise: over power of the worst output, once it was judged; warnings: of
    what the outputs lose."""

    network: QuantizedNetwork
    built: Built
    integer: tvm.IRModule
    here: Built | None
    corrections: dict[str, Correction]
    others: Sequence[tvm.IRModule] = ()
    ports: Sequence[Mapping[str, Any]] = ()
    noise: float | None = None
    warnings: tuple[str, ...] = ()

    def host_code(self) -> Built:
        """`here`, made where there is none yet."""
        if self.here is None:
            progress = self.network.job.progress
            self.here = build(self.integer, find_target("native"), "generate host code", others=self.others, progress=progress)
        return self.here


class _Bench:
    """The integer network on this machine, with its code made when the first change is tried on it. here: that code, if there is any."""

    def __init__(self, network: QuantizedNetwork, here: Built | None) -> None:
        self.here, self.tries = here, 0
        self._network = network
        self._executor: SessionExecutor | None = None

    def attempt(self, change: Callable[..., Correction], integer: tvm.IRModule, others: Sequence[tvm.IRModule], limit: int) -> Findings:
        """`change` tried on so many samples, and left in force where it is kept."""
        measured, job = self._network.measured, self._network.job
        self.here = here = self.here or build(integer, find_target("native"), "generate host code", others=others, progress=job.progress)
        if not self.tries:
            twin = measured.twin.session()
            self._executor = SessionExecutor(here.session(), here, lambda sample: measured.padding.of(twin, sample), self._network.model.naming)
        self.tries += 1
        return change(integer, self._executor, measured.means, itertools.islice(job.alike, limit), progress=job.progress).state()


@one_blas_thread
def correct(network: QuantizedNetwork, built: Built) -> Corrected:
    """Integer module, samples -> integer module: biases and weights with which the int8 network comes measurably closer to the float one."""
    measured, job = network.measured, network.job
    bench = _Bench(network, built if built.program.target == find_target("native") else None)
    integer, others, tried = network.integer, network.others, dict[str, Correction]()
    limit = min(measured.means.limit, job.recipe.samples)
    for name, change in _corrections(network) if limit and measured.means.outputs else ():  # there may be no sample of the plan's shape left
        if name == "stated_biases" and tried["bias_correction"].kept:
            continue  # means are worth keeping here
        tries = bench.tries
        find = functools.partial(bench.attempt, change, integer, others, limit)
        found = tried[name] = network.remembered(name, find, Correction.of_state, limit)
        job.dump(name, found)
        if found.kept:
            integer = run(REPLACE_OPERANDS, integer, found.operands(), dump=job.dump)
            others = [run(REPLACE_OPERANDS, module, found.operands()) for module in others]
            codes = {id(c): c for c in (built, bench.here) if c is not None and (bench.tries == tries or c is not bench.here)}
            for code, (operand, arrays) in itertools.product(codes.values(), found.operands().items()):
                for value_id, array in arrays.items():
                    code.replace_operand(value_id, operand, array)
    return Corrected(network, built, integer, bench.here, tried, others)


def _corrections(network: QuantizedNetwork) -> list[tuple[str, Callable[..., Correction]]]:
    """(name in the manifest, how it is done) of the corrections that a network's recipe asks for, in order."""
    recipe, found = network.job.recipe, list[tuple[str, Callable[..., Correction]]]()
    if "correct-bias" in recipe.steps:
        found.append(("bias_correction", correct_biases))
    if recipe.steps >= {"correct-bias", "analytic-bias"}:
        shifts = shift_of_rounding(network.model.module, network.plan, network.measured.table)
        found.append(("stated_biases", functools.partial(stated_biases, shifts)))
    if recipe.steps & {"round-narrow", "round-all"}:
        rounder = DataRounder(recipe.positions, None if "round-all" in recipe.steps else NARROW)
        found.append(("weight_rounding", functools.partial(round_weights, rounder)))
    return found
