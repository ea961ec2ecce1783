"""A module becomes a program, object code, and a library that is linked as often as constants change."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from qcompiler.backend import artifact as artifacts
from qcompiler.backend.artifact import Artifact
from qcompiler.backend.codegen import code_added, object_code
from qcompiler.backend.lowering import Params, Program
from qcompiler.backend.shared import Places, lower_all, packed, share
from qcompiler.base.debug import Dump, no_dump
from qcompiler.base.errors import bugs_named
from qcompiler.base.files import temporary_folder
from qcompiler.base.memory import aligned_bytes
from qcompiler.base.progress import Progress, silent
from qcompiler.base.targets import Target
from qcompiler.runtime.session import Session


@dataclass
class Built:
    """A program with its object code: linked again with other constants, no code is generated anew. others: programs of the same network at other shapes,
    whose code is in the same object."""

    program: Program
    code: bytes
    others: tuple[Program, ...] = ()
    _places: Places | None = field(default=None, repr=False)  # of the constants, as the code has them
    _here: tuple[Path, int] | None = field(default=None, repr=False)  # a library for sessions of this process, and the constants' revision when it was made
    _blob: np.ndarray | None = field(default=None, repr=False)  # constants of several programs
    _packed: int = field(default=-1, repr=False)  # the revision that it has

    @property
    def programs(self) -> tuple[Program, ...]:
        return (self.program, *self.others)

    @property
    def places(self) -> Places:
        """Where the code looks for its constants."""
        if self._places is None:
            self._places = share(self.programs)
        return self._places

    @property
    def constants(self) -> np.ndarray:
        """The library's constants as they are now, where its code looks for them: the same memory each time, until the places change. Leave it alone."""
        if not self.others:
            return self.program.constants
        if self._blob is None or self._packed != self.revision or self._blob.size != self.places.size:
            kept = self._blob if self._blob is not None and self._blob.size == self.places.size else None
            self._blob, self._packed = packed(self.programs, self.places, kept), self.revision
        return self._blob

    def constants_with(self, layers: Iterable[tuple[str, Mapping[int, np.ndarray]]]) -> np.ndarray:
        """The constants, with other operands of some layers: (value id, {number of the operand: array}). The programs are left as they are."""
        constants = aligned_bytes(self.constants.size)
        constants[...] = self.constants
        for value_id, operands in layers:
            for program, offsets in zip(self.programs, self.places.offsets, strict=True):
                step = program.step_of(value_id)
                at = next(places for each, places in zip(program.steps, offsets, strict=True) if each is step)
                for index, raw in program.packed_with(step, operands).items():
                    constants[at[index] : at[index] + raw.size] = raw
        return constants

    @property
    def revision(self) -> int:
        return sum(p.revision for p in self.programs)

    def replace_operand(self, value_id: str, index: int, array: np.ndarray) -> None:
        """`Program.replace_operand` at every shape."""
        for program in self.programs:
            program.replace_operand(value_id, index, array)

    def _settle(self) -> None:
        """Constants of several shapes that were equal by chance, and no longer are, need places of their own, and so other code."""
        if self.others and (places := share(self.programs)).offsets != self.places.offsets:
            self.code, self._places, self._here, self._blob = object_code(self.program, self.others, places), places, None, None

    def link(self, *, further: Sequence[Mapping[str, Any]] = (), **manifest: Any) -> Artifact:
        """The library, with the program's constants as they are now. manifest: entries beside those that describe the program; further: the same of the
        others, where they are not those of the first."""
        return self._linked(manifest, further)

    def _linked(self, manifest: Mapping[str, Any], further: Sequence[Mapping[str, Any]] = (), lasting: bool = True) -> Artifact:
        """`link`. lasting: as `artifact.link`."""
        with bugs_named("stage 'link'"):
            self._settle()
            further = further or [{}] * len(self.others)
            described = artifacts.program_manifest(self.program) | {"values": {}, "float_ops": []} | dict(manifest)
            described |= artifacts.port_parameters(self.program, described["values"])
            if self.others:
                first, *added = ({"constants_added": c, "code_added": k} for c, k in zip(self.places.own, code_added(self.code, self.programs), strict=True))
                described |= first | {"constants": self.places.size}
                described["shapes"] = [self._shape(program, described, more) | size for program, more, size in zip(self.others, further, added, strict=True)]
            return artifacts.link(self.code, self.constants, described, self.program.target, lasting)

    def _shape(self, program: Program, first: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
        """What the manifest says of another shape than the first, where it says something else."""
        entry = artifacts.program_manifest(program) | dict(more)
        entry |= artifacts.port_parameters(program, {**first["values"], **entry.get("values", {})})
        return {k: v for k, v in entry.items() if k != "constants" and (k not in first or first[k] != v)}

    def session(self, threads: int | None = None) -> Session:
        """A session on this machine, with the program's constants: on a CPU as they are whenever it runs, on a GPU as they are now. The library behind it is
        linked once and lives as long as this object. threads: all cores of this process where None."""
        self._settle()
        if self._here is None:
            stack = contextlib.ExitStack()
            folder = stack.enter_context(temporary_folder())
            weakref.finalize(self, stack.close)
            self._here = self._linked({}, lasting=False).save(folder / "model.so"), self.revision
        path, revision = self._here
        session = Session(path, threads or len(os.sched_getaffinity(0)))
        if self.revision != revision or not self.program.target.gpu:
            session.set_constants(self.constants)
        session.held = [p.held() for p in self.programs]
        return session


def build(
    module: tvm.IRModule,
    target: Target,
    stage: str,
    params: Params | None = None,
    *,
    others: Sequence[tvm.IRModule] = (),
    dump: Dump = no_dump,
    progress: Progress = silent,
) -> Built:
    """Lower a module, with tuned `params` where there are some, and generate its code. others: the same network at other shapes. stage: what `progress`
    calls it."""
    with bugs_named(f"lowering for {target.name}", module):
        program, *more = lower_all([module, *others], target, params, dump)
        built = Built(program, b"", tuple(more))
        progress(stage, 0, 1)
        built.code = object_code(program, more, built.places)
    progress(stage, 1, 1)
    return built


@contextlib.contextmanager
def session_of(artifact: Artifact) -> Iterator[Session]:
    """A session, on all cores of this process, of an artifact that has no file yet."""
    with temporary_folder() as folder:
        yield Session(artifact.save(folder / "model.so"), len(os.sched_getaffinity(0)))
