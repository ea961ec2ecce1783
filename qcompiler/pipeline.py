"""The compilation, as one literal list of stages. `compile` is the public entry; the command line calls it too."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from qcompiler import artifact as artifacts
from qcompiler import calibration as calibrations
from qcompiler import correction
from qcompiler import plan as plans
from qcompiler.artifact import Artifact
from qcompiler.codegen import object_code
from qcompiler.data import open_samples
from qcompiler.debug import Dumper
from qcompiler.lowering import Program, lower
from qcompiler.model import FloatModel, load
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.realize import realize
from qcompiler.passes.select_float import select_float
from qcompiler.plan import QuantPlan
from qcompiler.progress import Progress
from qcompiler.runtime.session import Session
from qcompiler.targets import Target, find_target

PRESETS = ("fast", "default", "accurate")


@dataclass
class Built:
    """A program with its object code: link it again with other constants without generating code again."""

    program: Program
    code: bytes

    def link(self, **manifest: Any) -> Artifact:
        return artifacts.link(self.code, self.program.constants, artifacts.program_manifest(self.program) | manifest, self.program.target)


@contextlib.contextmanager
def session_of(artifact: Artifact, threads: int | None = None) -> Iterator[Session]:
    """A session on an artifact that has no file yet."""
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        yield Session(artifact.save(Path(folder) / "model.so"), threads or len(os.sched_getaffinity(0)))
