"""A module becomes a program, object code, and a library that is linked as often as constants change."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm

from qcompiler.backend import artifact as artifacts
from qcompiler.backend.artifact import Artifact
from qcompiler.backend.codegen import object_code
from qcompiler.backend.lowering import Params, Program, lower
from qcompiler.base.debug import Dump, no_dump
from qcompiler.base.errors import bugs_named
from qcompiler.base.files import temporary_folder
from qcompiler.base.progress import Progress, silent
from qcompiler.base.targets import Target
from qcompiler.runtime.session import Session


@dataclass
class Built:
    """A program with its object code: linked again with other constants, no code is generated anew."""

    program: Program
    code: bytes
    _here: tuple[Path, int] | None = field(default=None, repr=False)  # a library for sessions of this process, and the program's revision in it

    def link(self, **manifest: Any) -> Artifact:
        """The library, with the program's constants as they are now. manifest: entries beside those that describe the program."""
        with bugs_named("stage 'link'"):
            described = artifacts.program_manifest(self.program) | {"values": {}, "float_ops": []} | manifest
            described |= artifacts.port_parameters(self.program, described["values"])
            return artifacts.link(self.code, self.program.constants, described, self.program.target)

    def session(self, threads: int | None = None) -> Session:
        """A session on this machine, with the program's constants as they are now. The library behind it is linked once and lives as long as this object.
        threads: all cores of this process where None."""
        if self._here is None:
            stack = contextlib.ExitStack()
            folder = stack.enter_context(temporary_folder())
            weakref.finalize(self, stack.close)
            self._here = self.link().save(folder / "model.so"), self.program.revision
        path, revision = self._here
        session = Session(path, threads or len(os.sched_getaffinity(0)))
        if self.program.revision != revision:
            session.set_constants(self.program.constants)
        return session


def build(module: tvm.IRModule, target: Target, stage: str, params: Params | None = None, *, dump: Dump = no_dump, progress: Progress = silent) -> Built:
    """Lower a module, with tuned `params` where there are some, and generate its code. stage: what `progress` calls it."""
    with bugs_named(f"lowering for {target.name}", module):
        program = lower(module, target, params, dump)
        progress(stage, 0, 1)
        code = object_code(program)
    progress(stage, 1, 1)
    return Built(program, code)


@contextlib.contextmanager
def session_of(artifact: Artifact) -> Iterator[Session]:
    """A session, on all cores of this process, of an artifact that has no file yet."""
    with temporary_folder() as folder:
        yield Session(artifact.save(folder / "model.so"), len(os.sched_getaffinity(0)))
