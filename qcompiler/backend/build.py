"""A module becomes a program, object code, and a library that is linked as often as constants change."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tvm

from qcompiler.backend import artifact as artifacts
from qcompiler.backend.artifact import Artifact
from qcompiler.backend.codegen import object_code
from qcompiler.backend.lowering import Params, Program, lower
from qcompiler.base.files import temporary_folder
from qcompiler.base.progress import Progress
from qcompiler.base.targets import Target
from qcompiler.runtime.session import Session


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
    with temporary_folder() as folder:
        yield Session(artifact.save(folder / "model.so"), len(os.sched_getaffinity(0)))
