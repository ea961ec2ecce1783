"""Calibrate once: all that a compilation finds by looking at data, kept in a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from qcompiler.base.errors import DataError, PlanError
from qcompiler.base.files import check_writable
from qcompiler.calibration.data import Source
from qcompiler.calibration.stored import SUFFIX, save
from qcompiler.calibration.table import CalibrationTable
from qcompiler.importers.origin import AnyModel, files_of
from qcompiler.pipeline import stages
from qcompiler.pipeline.job import opened
from qcompiler.pipeline.judgement import judged
from qcompiler.pipeline.options import OPTIONS, AnyPath, Options, complete, given, takes_options
from qcompiler.pipeline.rivals import best_of, network, rival_of

_GROUPS = ("network", "recipe", "work")  # of options that may decide what calibration sees


@dataclass(frozen=True)
class Calibration:
    """A calibration that was stored. samples: how many. table: statistics of every value that a plan may ask for. warnings: about the data."""

    path: Path
    samples: int
    table: CalibrationTable
    warnings: list[str]


@takes_options
def calibrate(model: AnyModel, output: AnyPath, calibration: Source, **options: Unpack[Options]) -> Calibration:
    """Run `model` over the calibration data and store what was seen, with the samples, in `output` (FILE.qcal). `compile`, `explain`, `export_onnx`, `tune` and
    `verify` take the file in the place of data, for this model alone, and make of it what they make of the data itself. What was stored for one preset and its
    steps, up to the corrected network, is measured anew, from the samples in the file, for another one that looks at other things.

    Raises OutputError when `output` can't be written, PlanError for options that calibration has no part in, and what `compile` raises.
    """
    options = complete(options, "calibrate")
    path = check_writable(Path(output), [*files_of(model), *([calibration] if isinstance(calibration, (str, Path)) else [])])
    if path.suffix != SUFFIX:
        raise DataError(f"{path}: a calibration is stored as {SUFFIX}; name a file that ends so")
    if calibration is None:
        raise DataError("calibration data is needed: give samples (an .npz, an .npy, a folder of images, or an iterable of {input name: array})")
    if extra := [name for name in given(options) if OPTIONS[name].group not in _GROUPS]:
        raise PlanError(f"calibration has no part in {', '.join(extra)}; leave {'it' if len(extra) == 1 else 'them'} out, and give {extra[0]} to compile")
    job = dataclasses.replace(opened(model, "native", calibration, options).counted(), to_store=True)
    measured, rival = stages.calibrate(stages.equalize(job)), rival_of(job)
    made = network(measured) if rival is None else best_of(job, rival)[0]  # which holds samples out, and looks at the others by themselves
    judged(made, job.recipe)
    count = save(path, job.model.digest, job.model.inputs, job.samples, job.found, [m.inputs for m in job.sampled])
    return Calibration(path, count, measured.table, measured.warnings)
