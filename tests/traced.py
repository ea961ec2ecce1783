"""A compilation's library, built for a target and traced there, by emulation where this machine lacks the target: ({output: array}, {value: array})."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from cuda_emulated import TARGET as CUDA
from cuda_emulated import EmulatedProgram
from emulated import Host
from tools import require_target
from x86_emulation import build_network

from qcompiler.backend.build import build
from qcompiler.backend.lowering import lower
from qcompiler.base.targets import Target, find_target
from qcompiler.pipeline.library import Compilation, describe
from qcompiler.runtime.session import Session

Values = dict[str, np.ndarray]


def on_x86(made: Compilation, sample: Mapping[str, np.ndarray], target: Target, folder: Path) -> tuple[Values, Values]:
    library = build_network(made.integer, target).link(**describe(made.integer, made.quantized.model)).save(folder / "net.so")
    values: Values = {}
    return Session(library).trace(sample, lambda n, v: values.__setitem__(n, v.copy())), values


def on_arm(made: Compilation, sample: Mapping[str, np.ndarray], name: str, folder: Path) -> tuple[Values, Values]:
    target = find_target(name)
    require_target(target)
    library = build(made.integer, target, "").link(**describe(made.integer, made.quantized.model))
    return Host.build(target, folder).run(library, dict(sample), folder / "run")


def on_cuda(made: Compilation, sample: Mapping[str, np.ndarray], folder: Path) -> Values:
    """Values alone, the outputs among them."""
    return {step.writes: array.copy() for step, array in EmulatedProgram(lower(made.integer, CUDA), folder).run(sample)}
