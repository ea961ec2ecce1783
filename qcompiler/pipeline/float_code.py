"""The float twin of a network, as code for this machine or another."""

from __future__ import annotations

from collections.abc import Sequence

from qcompiler.backend.build import Built, build
from qcompiler.base.debug import Dump, no_dump
from qcompiler.base.progress import Progress, silent
from qcompiler.base.targets import find_target
from qcompiler.importers.model import FloatModel
from qcompiler.passes.sequence import FLOAT, run


def float_code(model: FloatModel, target: str = "native", dump: Dump = no_dump, progress: Progress = silent, others: Sequence[FloatModel] = ()) -> Built:
    """The float twin of a network: float32 kernels of the same templates. others: the same network at other shapes."""
    modules = [run(FLOAT, m.module) for m in others]
    return build(run(FLOAT, model.module, dump=dump), find_target(target), "generate float code", others=modules, dump=dump, progress=progress)
