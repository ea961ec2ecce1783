"""What is asked of a compilation, and the job that every stage of it gets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from qcompiler.backend.tuning_log import Tuned
from qcompiler.base.debug import Dump, Dumper, no_dump
from qcompiler.base.errors import DataError, closest
from qcompiler.base.progress import Progress, silent
from qcompiler.base.targets import Target, find_target
from qcompiler.calibration.data import NO_SAMPLES, Samples, open_samples
from qcompiler.importers.model import FloatModel, load
from qcompiler.passes.graph import Graph
from qcompiler.passes.sequence import WIDE, run
from qcompiler.passes.trained import Trained
from qcompiler.plan.planner import named_groups
from qcompiler.plan.recipes import Recipe, recipe


class Options(TypedDict, total=False):
    """Keyword arguments of `compile`.

    input_shapes: {input name: shape}, for dimensions that the file leaves open. input_values: {input name: value}, inputs that are the same in every call
    and become constants (a number for all elements, an array, or text "1,2,3"). preprocess: for a folder of images, a YAML path.
    preset, enable, disable: the recipe of quantization, and steps to switch on and off in it, by the names in `recipes.STEPS`. keep_float: layers
    that stay float32, by the names that their nodes or values have in the model file. requantize: a model that is quantized already keeps in float what
    its file leaves in float; quantize that too. min_sqnr (dB), min_agreement (fraction), max_accuracy_drop
    (points; needs labels: class indices of the calibration samples, or a file of them): keep those layers in float that reach this at the least
    measured time (`accuracy_target.py`), within time_budget seconds; whether it was reached is in the manifest. tuning_log: a folder that `tune`
    wrote. dump_dir: what every pass and stage made is written there. targets_file: a file like targets.yaml.
    progress: called with (stage, done, total).

    weights: "int8" or "int4": another kind of compilation, without calibration: activations stay float32 and dense layers get weights in so many bits,
    with a scale for every group_size weights of a row (default 64) and, if asymmetric, a zero point. Of the other options keep_float, input_shapes,
    input_values, dump_dir, targets_file and progress go with it.
    """

    input_shapes: Mapping[str, Sequence[int]] | None
    input_values: Mapping[str, Any] | None
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


@dataclass(frozen=True)
class Job:
    """One network to be quantized for one target. kept: group id -> why it stays float in every plan. tuned: parameters of kernels, None for the
    defaults. dump: sees what every pass and stage makes. progress: sees how far long work is."""

    model: FloatModel
    samples: Samples
    recipe: Recipe
    target: Target
    kept: Mapping[str, str] = field(default_factory=dict)
    tuned: Tuned | None = None
    dump: Dump = no_dump
    progress: Progress = silent


def opened(model: str | os.PathLike[str], target: str | Target, calibration: Any, options: Options, tuned: Tuned | None = None) -> Job:
    """The job that the arguments of `compile` describe: the model loaded, its 16-bit streams copied where the recipe has such, the samples not yet read."""
    check_names(options)
    dump = Dumper(options.get("dump_dir"))
    chosen = target if isinstance(target, Target) else find_target(target, options.get("targets_file"))
    steps = recipe(options.get("preset", "default"), options.get("enable", ()), options.get("disable", ()))
    float_model = load(Path(model), options.get("input_shapes"), bool(options.get("requantize")), dump, options.get("input_values"))
    trained = Trained.of(Graph.of(float_model.module).attrs)
    if trained.quantized:
        steps = steps.without_changes()
    if calibration is None and not trained.quantized:
        raise DataError("calibration data is needed to quantize: give samples (an .npz, an .npy, a folder of images, or an iterable of {input name: array})")
    if "streams" in steps.steps:
        float_model = replace(float_model, module=run(WIDE, float_model.module, dump=dump))
    kept = dict.fromkeys(named_groups(float_model, options.get("keep_float", ())), "kept in float32 as asked (keep_float)")
    samples = NO_SAMPLES if calibration is None else open_samples(calibration, float_model.inputs, options.get("preprocess"))
    return Job(float_model, samples, steps, chosen, kept, tuned, dump, options.get("progress") or silent)


def check_names(options: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword argument that `compile` does not have."""
    for name in set(options) - set(Options.__annotations__):
        raise TypeError(f"compile() has no keyword argument '{name}'.{closest(name, list(Options.__annotations__))}")
