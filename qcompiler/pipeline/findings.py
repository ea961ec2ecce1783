"""What is found by looking at samples: it comes out of a stored calibration where that knows it, and goes into one that is made.

A finding has a key of all that decides it. So nothing is found twice, and nothing stands for what was found of another network, by other steps or on other
samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

import qcompiler
from qcompiler.calibration.stored import Pass
from qcompiler.calibration.table import CalibrationTable
from qcompiler.pipeline.job import Job

Findings = dict[str, np.ndarray]  # as a stored calibration keeps them
Found = TypeVar("Found")


def named(job: Job, what: str, *decisive: Any) -> tuple[str, str]:
    """(the name of what is found by looking at the job's samples, a digest of all that decides it beside the model and the calibration's samples)."""
    key = hashlib.sha256(json.dumps([qcompiler.__version__, job.part, *decisive], sort_keys=True, default=str).encode()).hexdigest()
    return f"{what} {key[:16]}", key


def remembered(job: Job, what: str, decisive: Sequence[Any], find: Callable[[], Findings], read: Callable[[Findings], Found]) -> Found:
    """What `read` makes of what `find` finds by looking at samples, or found before, or of what a stored calibration knows of it. decisive: what it depends
    on, beside the model, the samples and the recipe's numbers. Raises DataError for a stored calibration that `read` can't read."""
    name, key = named(job, what, repr(dataclasses.replace(job.recipe, steps=frozenset())), sorted(job.recipe.steps), *decisive)
    file = job.stored if name not in job.found else None
    known = job.found.get(name) or (file.known(name, key) if file else None)
    state = known.watchers[0] if known is not None and known.watchers else find()
    job.found[name] = Pass(key, CalibrationTable(), [state])
    with file.reading(name) if file and known is not None else contextlib.nullcontext():
        return read(state)
