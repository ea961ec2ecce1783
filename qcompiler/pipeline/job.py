"""What is asked of a compilation, and the job that every stage of it gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qcompiler.backend.tuning_log import Tuned
from qcompiler.base.debug import Dump, Dumper, no_dump
from qcompiler.base.errors import DataError, ModelError
from qcompiler.base.progress import Progress, silent
from qcompiler.base.shape_table import Row, read_shape_table, shape_rows
from qcompiler.base.targets import Target, find_target
from qcompiler.base.tensor import first_states
from qcompiler.calibration.data import NO_SAMPLES, CheckedSamples, Samples, at_most, take
from qcompiler.calibration.frames import StreamedSamples, is_frames, streams_of, without_states
from qcompiler.calibration.ports import NO_PORTS, Ports, asked, open_real
from qcompiler.calibration.shaped import ShapedSamples
from qcompiler.calibration.stored import Pass, StoredSamples, file_behind
from qcompiler.importers.model import FloatModel
from qcompiler.importers.origin import AnyModel, origin_of
from qcompiler.passes.graph import Graph
from qcompiler.passes.sequence import WIDE, run
from qcompiler.passes.trained import Trained
from qcompiler.pipeline.float_code import float_code
from qcompiler.pipeline.options import Options, complete
from qcompiler.pipeline.padding import pad_rules
from qcompiler.pipeline.shapes import fitting_of, load_all
from qcompiler.plan.planner import named_groups
from qcompiler.plan.recipes import Recipe, recipe
from qcompiler.plan.sixteen import asked as in_sixteen

MOST_VECTORS = 64


@dataclass(frozen=True)
class Job:
    """One network to be quantized for one target. others: the same network at the other shapes of its library. pad: how their inputs are padded.
    kept: group id -> why it stays float in every plan. sixteen: groups that shall compute in 16 bits. tuned: parameters of kernels, None for the defaults.
    dump: sees what every pass and stage makes. progress: sees how far long work is. stored: the stored calibration that the samples are of. part: which of the
    calibration's samples these are, None for all. found: what looking at samples has found so far, by name; all of it where it is `to_store`, else what takes
    little memory. ports: inputs and outputs that shall not be float32. selftest: test vectors that the library gets."""

    model: FloatModel
    samples: Samples
    recipe: Recipe
    target: Target
    kept: Mapping[str, str] = field(default_factory=dict)
    tuned: Tuned | None = None
    dump: Dump = no_dump
    progress: Progress = silent
    stored: StoredSamples | None = None
    part: tuple[int, ...] | None = None
    found: dict[str, Pass] = field(default_factory=dict)
    to_store: bool = False
    ports: Ports = NO_PORTS
    others: tuple[FloatModel, ...] = ()
    pad: Mapping[str, Any] = field(default_factory=dict)
    selftest: int = 0
    sixteen: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[FloatModel, ...]:
        """The network at every shape, that of the plan first."""
        return (self.model, *self.others)

    @property
    def sampled(self) -> tuple[FloatModel, ...]:
        """The network at the other shapes that samples have."""
        return tuple(self.others[i - 1] for i in sorted(self.samples.shapes) if i) if isinstance(self.samples, ShapedSamples) else ()

    @property
    def alike(self) -> Samples:
        """The samples of the plan's shape."""
        return self.samples.at(0) if isinstance(self.samples, ShapedSamples) else self.samples

    def counted(self) -> Job:
        """The job with samples of which it is known how many there are."""
        return self if self.samples.count is not None else replace(self, samples=CheckedSamples(list(self.samples), self.model.inputs))

    def fitted_to(self, indices: Sequence[int]) -> Job:
        """The job that looks at some of its samples only."""
        count = self.samples.count or 0
        if len(indices) == count:
            return self
        part = range(count) if self.part is None else self.part
        return replace(self, samples=take(self.samples, indices), part=tuple(part[i] for i in indices))


def opened(model: AnyModel, target: str | Target, calibration: Any, options: Options, tuned: Tuned | None = None) -> Job:
    """The job that the arguments of `compile` describe: the model loaded, its 16-bit streams copied where the recipe has such, the samples not yet read.
    options: as they were given."""
    options = complete(options)
    count = options["selftest"] or 0
    if not 0 <= count <= MOST_VECTORS or options["selftest"] == 0:
        raise DataError(f"selftest is {options['selftest']}; 1 to {MOST_VECTORS} test vectors are supported, and 2 will do")
    dump = Dumper(options["dump_dir"])
    chosen = find_target(target, options["targets_file"])
    steps = recipe(options["preset"], options["enable"], options["disable"])
    rows = asked_rows(options)
    origin = origin_of(model, options["outputs"], options["example_inputs"])
    models = load_all(origin, rows, options["requantize"], dump, options["input_values"], options["state"])
    types = (options["input_types"] or {}, options["output_types"] or {})
    ports, *_ = [asked(*types, m.inputs, m.outputs, options["preprocess"], m.state, options["resize_inside"]) for m in models]
    rules = pad_rules(models, options["pad"], ports)
    if len(models) > 1 and calibration is not None:
        calibration, models = in_order(calibration, models, rules, ports, options["preprocess"], options["max_samples"])
    float_model, *others = models
    trained = Trained.of(Graph.of(float_model.module).attrs)
    if trained.quantized:
        steps = steps.without_changes()
    if calibration is None and not trained.quantized:
        raise DataError("calibration data is needed to quantize: give samples (an .npz, an .npy, a folder of images, or an iterable of {input name: array})")
    if calibration is None and rules:
        raise DataError("rules for padding are tried on a sample before they are trusted: give calibration data, or compile without padding")
    if "streams" in steps.steps:
        float_model, *others = (replace(m, module=run(WIDE, m.module, dump=dump)) for m in (float_model, *others))
    kept = dict.fromkeys(named_groups(float_model, options["keep_float"]), "kept in float32 as asked (keep_float)")
    sixteen = in_sixteen(float_model, options["keep_16"])
    ports = ports.at(float_model.inputs)
    samples = NO_SAMPLES if calibration is None else _opened(calibration, float_model, ports, options)
    return Job(
        float_model,
        samples,
        steps,
        chosen,
        kept=kept,
        tuned=tuned,
        dump=dump,
        progress=options["progress"] or silent,
        stored=file_behind(samples),
        ports=ports,
        others=tuple(others),
        pad=rules,
        selftest=count,
        sixteen=sixteen,
    )


def _opened(calibration: Any, model: FloatModel, ports: Ports, options: Options) -> Samples:
    """The samples; those that hold no states are frames of streams, through which the float network goes."""
    preprocess, most = options["preprocess"], options["max_samples"]
    held = list(calibration) if isinstance(calibration, Iterator) else calibration
    if not is_frames(held, model.inputs, model.state):
        return open_real(held, model.inputs, ports, preprocess, most, model.digest)
    inputs = without_states(model.inputs, model.state)
    streams = [open_real(one, inputs, ports, preprocess, most, model.digest) for one in streams_of(held)]
    first = first_states(model.inputs, model.state, model.initial)
    return at_most(StreamedSamples(streams, first, model.state, lambda: float_code(model).session().run), most)


def in_order(
    calibration: Any, models: Sequence[FloatModel], rules: Mapping[str, Any], ports: Ports, preprocess: Any, most: int | None
) -> tuple[Samples, tuple[FloatModel, ...]]:
    """The samples, and the network at every shape, first at the one that most of the samples used have: there the plan is made."""
    held = list(calibration) if isinstance(calibration, Iterator) else calibration
    used = open_real(held, models[0].inputs, ports, preprocess, most, fitting=fitting_of(models, rules))
    counts = used.shapes if isinstance(used, ShapedSamples) else {}
    if file := file_behind(used):  # at the one that they were stored for
        counts = {i: 1 for i, m in enumerate(models) if m.inputs == tuple(file.inputs)}
    first = max(range(len(models)), key=lambda i: counts.get(i, 0))
    ordered = (models[first], *models[:first], *models[first + 1 :])
    return open_real(held, ordered[0].inputs, ports, preprocess, fitting=fitting_of(ordered, rules)), ordered


def asked_rows(options: Options) -> list[Row]:
    """The shapes that complete options ask for. Raises ModelError where they contradict each other."""
    rows = shape_rows(options["input_shapes"])
    if options["shapes"] is None:
        return rows
    table = read_shape_table(options["shapes"])
    if len(rows) > 1 or (both := sorted(set(rows[0]) & set(table[0]))):
        what = "several shapes are given" if len(rows) > 1 else f"the shape of '{both[0]}' is given"
        raise ModelError(f"{what} as input shapes, and others by the table {options['shapes']}; say it in one of them")
    return [rows[0] | row for row in table]
