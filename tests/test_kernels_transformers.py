"""Kernels of transformers' operators, and of int16, equal the reference arithmetic bit for bit on every target."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_emulated import TARGET as CUDA
from cuda_emulated import Emulated
from emulated import ARM
from emulated_kernels import Prepared, run_on_x86, run_prepared
from tools import require_target
from transformer_cases import CASES, attentions, products
from x86_emulation import AVX512VNNI, AVXVNNI, HOST, each, runs_here

from qcompiler.base.targets import Target, find_target


@pytest.mark.parametrize("target", each([HOST, AVXVNNI, AVX512VNNI]))
@runs_here
def test_x86(target: Target, tmp_path: Path) -> None:
    """AVX-VNNI differs from AVX2 in its products only."""
    cases = products() | attentions() if target == AVXVNNI else CASES
    run_on_x86(lambda: [Prepared.of(name, case, target) for name, case in cases.items()], target, tmp_path)


@pytest.mark.parametrize("name", ARM)
def test_arm(name: str, tmp_path: Path) -> None:
    """The other two rows of 64 bits differ from the first in their products only."""
    target = find_target(name)
    require_target(target)
    cases = CASES if name in ("arm64-neon", "armv7-neon") else products()
    run_prepared([Prepared.of(n, case, target) for n, case in cases.items()], target, tmp_path)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    kernels = {f"k_{name.replace('-', '_')}": case.prepare(CUDA) for name, case in CASES.items()}
    return Emulated(kernels, CUDA, tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("name", CASES)
def test_cuda(name: str, emulated: Emulated) -> None:
    case = CASES[name]
    case.check(emulated.run(f"k_{name.replace('-', '_')}", case.inputs, case.output))
