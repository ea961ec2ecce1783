"""Kernels of transformers' operators, and of int16, equal the reference arithmetic bit for bit on every target."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from cuda_emulated import TARGET as CUDA
from cuda_emulated import Emulated
from emulated import ARM
from emulated_kernels import Prepared, run_prepared
from tools import require_target
from transformer_cases import CASES
from x86_emulation import code_target, runs_here

from qcompiler.base.targets import Target, find_target

BASELINE = dataclasses.replace(
    find_target("x86-avx2"), name="baseline", tvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"}, features=(), rows=(), storage="int8"
)


def run(target: Target, folder: Path) -> None:
    run_prepared([Prepared.of(name, case, target) for name, case in CASES.items()], target, folder)


@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512vnni"])
@runs_here
def test_x86(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    run(dataclasses.replace(target, tvm=code_target(target).tvm), tmp_path)


def test_x86_without_avx(tmp_path: Path) -> None:
    """Vectors of 16 bytes, int8 storage."""
    run(BASELINE, tmp_path)


@pytest.mark.parametrize("name", ARM)
def test_arm(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    require_target(target)
    run(target, tmp_path)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    kernels = {f"k_{name.replace('-', '_')}": case.prepare(CUDA) for name, case in CASES.items()}
    return Emulated(kernels, CUDA, tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("name", CASES)
def test_cuda(name: str, emulated: Emulated) -> None:
    case = CASES[name]
    case.check(emulated.run(f"k_{name.replace('-', '_')}", case.inputs, case.output))
