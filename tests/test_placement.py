"""Which operators are int8 and which values are stored so, when any set of layers is kept in float."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from calibrated import table_of
from small_nets import evaluate, random_inputs, residual_net

from qcompiler.backend.lowering import lower
from qcompiler.base.targets import find_target
from qcompiler.calibration.table import CalibrationTable
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes import sequence
from qcompiler.passes.graph import Graph
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.plan.placement import Placer
from qcompiler.plan.planner import decide
from qcompiler.verification.interpreter import run

TARGET = find_target("x86-avx2")


@functools.cache
def network() -> tuple[Any, Placer, CalibrationTable, np.ndarray]:
    """(module, placer, calibration table, float output on `random_inputs`)."""
    module = residual_net()
    output = str(Graph.of(module).outputs[0][1].name)
    return module, Placer(module, TARGET), table_of(module), evaluate(module, random_inputs(module), [output])[output]


@pytest.mark.parametrize(("seed", "share"), [(0, 0.2), (1, 0.4), (2, 0.6), (3, 0.8)])
def test_any_set_of_layers_may_stay_float(seed: int, share: float) -> None:
    """Residual blocks, depthwise, tables, a gate, pools, a concat: the plan is what placement says, it lowers, and it computes the same network."""
    module, placer, table, reference = network()
    rng = np.random.default_rng(seed)
    keep = {g.id: "chosen" for g in placer.groups if rng.random() < share}
    placement, plan = placer.place(keep), decide(module, table, TARGET, keep_float=keep)
    assert keep.items() <= placement.reasons.items() and plan.reasons == placement.reasons
    assert {v for v in plan.edges if plan.params(v) is not None} == set(placement.stored)
    integer = sequence.run(sequence.INTEGER, insert_qdq(module, plan))
    assert {s.writes for s in lower(integer, TARGET).steps} & set(keep), "it has steps of its own"
    assert sqnr_db(run(integer, random_inputs(module))["out0"], reference) > 20  # 23 to 33; wrong arithmetic has below 5


def test_everything_in_float_rounds_nothing() -> None:
    module, placer, table, reference = network()
    keep = {g.id: "chosen" for g in placer.groups}
    assert placer.place(keep).stored == ()
    integer = sequence.run(sequence.INTEGER, insert_qdq(module, decide(module, table, TARGET, keep_float=keep)))
    assert sqnr_db(run(integer, random_inputs(module))["out0"], reference) > 100


def test_neighbours_in_float_store_nothing_between_them() -> None:
    """a1_r is read by a2_b alone, a2_b by block_a, stem_r by both kinds."""
    _, placer, _, _ = network()
    everything, alone, pair = (set(placer.place(dict.fromkeys(keep, "chosen")).stored) for keep in ((), ("a1_r",), ("a1_r", "a2_b")))
    assert alone == everything and pair == everything - {"a1_r"}


def test_float_layers_take_float_neighbours_with_them() -> None:
    """What only they read is not rounded (its maker hands out the accumulator), and a light operator behind them is float too."""
    _, placer, _, _ = network()
    placement = placer.place({"b1_r": "chosen", "block_b": "because"})
    assert placement.reasons == {"b1_r": "chosen", "block_b": "because", "swish": "its operands are float32"}
    assert set(placer.place().stored) - set(placement.stored) == {"block_a", "b1_r", "block_b"}
