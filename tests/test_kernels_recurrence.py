"""Kernels of recurrent layers: integers equal numerics bit for bit on every row, float32 agrees with float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from cuda_emulated import TARGET, Emulated
from emulated import ARM
from emulated_kernels import Prepared, run_prepared
from kernel_cases import Case
from recurrent_cases import LAYERS, Layer
from tools import require_target
from x86_emulation import build, runs_here, sampled

from qcompiler import schedules
from qcompiler.base.targets import Target, find_target, missing_features
from qcompiler.numerics import operators as numerics
from qcompiler.schedules.harness import fetch, run_kernel, store
from qcompiler.schedules.table import KERNELS, Layout, OpCall, Row, select

FLOAT = [t for name in ("x86-avx2", "x86-avx512vnni") if not missing_features(t := find_target(name))]
SAMPLE = {"lstm_reverse", "lstm_wide", "lstm_final", "gru", "gru_wide", "gru_reset_last"}
pytestmark = runs_here
schedules.load(FLOAT[0])


def compiled(name: str, layer: Layer, target: Target, row: Row | None = None, runtime: tuple[int, ...] = (0,)) -> tuple[np.ndarray, np.ndarray]:
    """(what the kernel computes, what numerics does). runtime: operands that are no constants."""
    operands, attrs = layer.real() if ".f32." in name else layer.integer()
    wanted = numerics.OPERATORS[name](*operands, **attrs)
    layouts = {i: Layout(operands[i].shape, str(operands[i].dtype)) for i in runtime}
    output = Layout(wanted.shape, target.storage if wanted.dtype == np.int8 else str(wanted.dtype))
    op = OpCall(name, [layouts.get(i, o) for i, o in enumerate(operands)], attrs, output)
    row = row or select(op, target)
    assert row.refuse(op, target) is None
    kernel, able = build(row, op, row.default(op, target), target)
    return fetch(run_kernel(kernel, [store(operands[i], layouts[i]) for i in runtime], output, able), output), wanted


@sampled("name", LAYERS, SAMPLE)
def test_integers_are_exact(name: str, target: Target) -> None:
    np.testing.assert_array_equal(*compiled("qc.recurrence", LAYERS[name], target))


@pytest.mark.parametrize("name", ("lstm_reverse", "gru", "gru_wide", "rnn"))
def test_the_row_for_every_target(name: str) -> None:
    row = next(r for r in KERNELS["qc.recurrence"] if r.isa == "any")
    np.testing.assert_array_equal(*compiled("qc.recurrence", LAYERS[name], FLOAT[0], row, runtime=(0, 5, 6, 7)))


@pytest.mark.parametrize("name", ("lstm_reverse", "lstm_final", "gru_reset_last", "gru_reverse", "rnn_hard"))
def test_float(name: str) -> None:
    results = [compiled("qc.f32.recurrence", LAYERS[name], target, runtime=(0, 3, 4, 5)) for target in FLOAT]
    for got, wanted in results:
        np.testing.assert_allclose(got, wanted, atol=2e-6)
        np.testing.assert_array_equal(got, results[0][0])


def cases(name: str) -> dict[str, Case]:
    made = {}
    for layer in LAYERS:
        operands, attrs = LAYERS[layer].integer() if name == "qc.recurrence" else LAYERS[layer].real()
        made[layer] = Case(name, operands, attrs, constants=(1, 2, 3, 4) if name == "qc.recurrence" else (1, 2), tolerance=2e-6 if ".f32." in name else 0.0)
    return made


@pytest.mark.parametrize("name", ARM)
def test_arm(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    require_target(target)
    run_prepared([Prepared.of(layer, case, target) for layer, case in cases("qc.recurrence").items() if layer in SAMPLE], target, tmp_path)


@pytest.mark.parametrize("name", ("qc.recurrence", "qc.f32.recurrence"))
def test_cuda(name: str, tmp_path: Path) -> None:
    made = cases(name)
    emulated = Emulated({f"k_{layer}": case.prepare(TARGET) for layer, case in made.items()}, TARGET, tmp_path)
    for layer, case in made.items():
        case.check(emulated.run(f"k_{layer}", case.inputs, case.output))


@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn"))
def test_steps_one_by_one(cell: str) -> None:
    """States handed from call to call lose nothing."""
    finals = 2 if cell == "lstm" else 1
    operands, attrs = dataclasses.replace(LAYERS["gru"], cell=cell, steps=7, lengths=None, finals=finals).integer(3)
    whole = numerics.recurrence(*operands, **attrs)
    p, *_, h, c, lengths = operands
    for t in range(7):
        part = numerics.recurrence(p[t : t + 1], *operands[1:5], h, c, np.minimum(lengths, 1), **attrs)
        np.testing.assert_array_equal(part[0], whole[t])
        h, c = part[1], part[-1]
    np.testing.assert_array_equal(part[1:], whole[7:])


@pytest.mark.parametrize("name", LAYERS)
def test_integers_are_near_the_real_numbers(name: str) -> None:
    layer = LAYERS[name]
    (operands, attrs), (real, more) = layer.integer(), layer.real()
    got, wanted = numerics.recurrence(*operands, **attrs), numerics.f32_recurrence(*real, **more)
    if got.dtype != np.float32:
        got = layer.out.dequantize(got)
    assert np.abs(got - wanted).mean() < 0.012 * layer.spread
