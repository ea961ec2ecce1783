"""A whole transformer in integers: close to the float one, and the same bits from the interpreter and from every target's library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cuda_emulated import TARGET as CUDA
from cuda_emulated import EmulatedProgram
from emulated import ARM, Host
from integer_transformer import transformer
from tools import require_target
from x86_emulation import ALL, build_network, each, runs_here

from qcompiler.backend.build import build
from qcompiler.backend.lowering import lower
from qcompiler.base.targets import Target, find_target
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.runtime.session import Session
from qcompiler.verification import interpreter

MODULE, INPUTS, EXACT = transformer()
ABOUT = {"model": "transformer", "values": {}, "float_ops": []}


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return interpreter.run(MODULE, INPUTS, keep="all") | interpreter.run(MODULE, INPUTS)


def same(got: dict[str, np.ndarray], reference: dict[str, np.ndarray], least: int) -> None:
    common = got.keys() & reference.keys()
    for name in common:
        assert got[name].dtype == reference[name].dtype, name
        np.testing.assert_array_equal(got[name], reference[name], err_msg=name)
    assert len(common) >= least and "logits" in common


def test_it_is_close_to_float(reference: dict[str, np.ndarray]) -> None:
    assert sqnr_db(reference["logits"], EXACT) > 25
    assert {str(reference[n].dtype) for n in ("words", "x_0", "projected_1", "up_0", "hidden")} == {"int16"}
    assert not any(v.dtype == np.float32 for n, v in reference.items() if n != "logits")


@pytest.mark.parametrize("target", each(ALL))
@runs_here
def test_x86(target: Target, reference: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Every value, with one thread and with three."""
    library = build_network(MODULE, target).link(**ABOUT).save(tmp_path / "net.so")
    for threads in (1, 3):
        values: dict[str, np.ndarray] = {}
        session = Session(library, threads=threads)
        outputs = session.trace(INPUTS, lambda n, v, values=values: values.__setitem__(n, v.copy()))
        same(values | outputs, reference, 18)


@pytest.mark.parametrize("name", ARM)
def test_arm(name: str, reference: dict[str, np.ndarray], tmp_path: Path) -> None:
    target = find_target(name)
    require_target(target)
    outputs, values = Host.build(target, tmp_path).run(build(MODULE, target, "generate code").link(**ABOUT), INPUTS, tmp_path / name)
    same(values | outputs, reference, 15)


def test_cuda(reference: dict[str, np.ndarray], tmp_path: Path) -> None:
    values = {step.writes: value for step, value in EmulatedProgram(lower(MODULE, CUDA), tmp_path).run(INPUTS) if not step.auxiliary}
    same(values, reference, 18)
