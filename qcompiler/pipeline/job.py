"""What is asked of a compilation, and the job that every stage of it gets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qcompiler.backend.tuning_log import Tuned
from qcompiler.base.debug import Dump, Dumper, no_dump
from qcompiler.base.errors import DataError
from qcompiler.base.progress import Progress, silent
from qcompiler.base.targets import Target, find_target
from qcompiler.calibration.data import NO_SAMPLES, Samples
from qcompiler.calibration.ports import NO_PORTS, Ports, asked, open_real
from qcompiler.calibration.stored import Pass
from qcompiler.importers.model import FloatModel, load
from qcompiler.passes.graph import Graph
from qcompiler.passes.sequence import WIDE, run
from qcompiler.passes.trained import Trained
from qcompiler.pipeline.options import Options, complete
from qcompiler.plan.planner import named_groups
from qcompiler.plan.recipes import Recipe, recipe


@dataclass(frozen=True)
class Job:
    """One network to be quantized for one target. kept: group id -> why it stays float in every plan. tuned: parameters of kernels, None for the
    defaults. ports: inputs and outputs that shall not be float32. dump: sees what every pass and stage makes. progress: sees how far long work is. passes:
    where what passes over the samples saw is collected, if anyone wants it."""

    model: FloatModel
    samples: Samples
    recipe: Recipe
    target: Target
    kept: Mapping[str, str] = field(default_factory=dict)
    tuned: Tuned | None = None
    dump: Dump = no_dump
    progress: Progress = silent
    passes: dict[str, Pass] | None = None
    ports: Ports = NO_PORTS


def opened(model: str | os.PathLike[str], target: str | Target, calibration: Any, options: Options, tuned: Tuned | None = None) -> Job:
    """The job that the arguments of `compile` describe: the model loaded, its 16-bit streams copied where the recipe has such, the samples not yet read.
    options: as they were given."""
    options = complete(options)
    dump = Dumper(options["dump_dir"])
    chosen = find_target(target, options["targets_file"])
    steps = recipe(options["preset"], options["enable"], options["disable"])
    float_model = load(Path(model), options["input_shapes"], options["requantize"], dump, options["input_values"], options["state"])
    trained = Trained.of(Graph.of(float_model.module).attrs)
    if trained.quantized:
        steps = steps.without_changes()
    if calibration is None and not trained.quantized:
        raise DataError("calibration data is needed to quantize: give samples (an .npz, an .npy, a folder of images, or an iterable of {input name: array})")
    if "streams" in steps.steps:
        float_model = replace(float_model, module=run(WIDE, float_model.module, dump=dump))
    kept = dict.fromkeys(named_groups(float_model, options["keep_float"]), "kept in float32 as asked (keep_float)")
    ports = asked(options["input_types"] or {}, options["output_types"] or {}, float_model.inputs, float_model.outputs, options["preprocess"])
    typed = {*(options["input_types"] or {}), *(options["output_types"] or {})}
    if found := sorted({name for pair in float_model.state.items() for name in pair} & typed):
        raise DataError(f"'{found[0]}' is a state that sessions keep, in float32; give no type for it")
    given = (options["preprocess"], options["max_samples"], float_model.digest)
    samples = NO_SAMPLES if calibration is None else open_real(calibration, float_model.inputs, ports, *given)
    return Job(float_model, samples, steps, chosen, kept, tuned, dump, options["progress"] or silent, ports=ports)
