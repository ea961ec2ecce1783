"""What is said of vector ISAs: numbers with their source, and facts that can't contradict each other."""

import pickle
from dataclasses import fields, replace
from typing import Any

import pytest

from qcompiler.base.targets import load_targets
from qcompiler.schedules.arm.isa import DOTPROD, FLOAT, FLOAT32, I8MM, NEON, NEON32
from qcompiler.schedules.cuda.gemm_plan import DP4A, MMA
from qcompiler.schedules.isa import Cycles, Isa, guessed, measured
from qcompiler.schedules.x86 import depthwise
from qcompiler.schedules.x86.amx import UNIT
from qcompiler.schedules.x86.isa import AVX2, AVX2FMA, AVX512, AVX512FMA, AVX512VNNI, AVXVNNI

ISAS: list[Isa] = [AVX2, AVX2FMA, AVX512, AVX512FMA, AVX512VNNI, AVXVNNI, UNIT, I8MM, DOTPROD, NEON, NEON32, FLOAT, FLOAT32]


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: f"{isa.name}-{isa.kind}")
def test_every_cost_says_where_it_is_from(isa: Isa) -> None:
    assert isa.name in {row for target in load_targets().values() for row in target.rows}
    for form in isa.forms:
        costs = [getattr(form, f.name) for f in fields(form) if f.name.endswith("_cost") or f.name == "latency"]
        assert len(costs) == 5 and all(c.source.startswith(("measured on ", "guessed from ")) for c in costs)
        assert form.fits(1, 1) and 8 * form.bytes % 128 == 0


@pytest.mark.parametrize(
    ("isa", "changed", "said"),
    [
        (AVX2, {"lanes": 6}, "'x86-avx2' contradicts itself; what has to hold: vectors are whole parts of 128 bits"),
        (AVX2, {"lanes": 16}, "AVX512 has 32 registers and AVX2 16"),
        (AVX2, {"registers": 0}, "scratch leaves registers for a tile"),
        (AVX2, {"scratch_registers": 16}, "scratch leaves registers for a tile"),
        (AVX2, {"kind": "word"}, "the kind is known"),
        (AVX2, {"group": 3}, "groups are positive powers of two"),
        (AVX2, {"group": 2}, "an 8-bit step takes four channels"),
        (AVX2, {"order": (0, 1, 2, 2)}, "the order is one of the group"),
        (AVX2, {"dot_cost": 1.0}, "every cost is measured or guessed"),
        (AVX2FMA, {"group": 4}, "a float step takes one channel"),
        (NEON, {"lanes": 8}, "a vector has 128 bits"),
        (NEON, {"wide": False}, "AArch64 has 32 registers and ARMv7 16"),
        (NEON32, {"kind": "dot"}, "only AArch64 has SDOT and SMMLA"),
        (DOTPROD, {"kind": "mmla"}, "the kind is known and takes that many channels"),
        (depthwise.AVX2, {"widths": (16, 32)}, "widths are those of vectors widest first"),
        (depthwise.AVX2, {"widths": ()}, "widths are those of vectors widest first"),
        (depthwise.AVX2, {"taps": 3}, "taps are 2 or 4"),
        (depthwise.AVX2, {"registers": 32}, "AVX512 has 32 registers and AVX2 16"),
        (MMA, {"rows": 8}, "the 32 lanes of a warp hold a part"),
        (DP4A, {"depth": 6}, "the depth is words of 4 bytes"),
    ],
    ids=str,
)
def test_facts_that_contradict_each_other_are_refused(isa: Any, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}$"):
        replace(isa, **changed)


def test_cycles_keep_their_source() -> None:
    cost = measured("this core")(0.5)
    assert (cost, cost.source) == (0.5, "measured on this core")
    assert cost.times(3).source == "measured on this core, times 3" and type(2 * cost) is float
    assert guessed("two units")(1).source == "guessed from two units"
    assert pickle.loads(pickle.dumps(cost)).source == cost.source
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a positive number"):
            Cycles(wrong, "measured on nothing")
