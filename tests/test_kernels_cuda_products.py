"""Attention and batched products on tensor cores: every number of warps and columns gives the bits of numerics.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_emulated import TARGET, Emulated
from kernel_cases import HALO, Case, data
from transformer_cases import attentions

from qcompiler.base.targets import Target
from qcompiler.schedules.table import Kernel

Points = dict[str, tuple[Case, Kernel]]


def points(target: Target, name: str, make: Any, tunable: str, values: tuple[int, ...]) -> Points:
    """A case by the heuristic and at each value of a tunable that can be built."""
    found: Points = {}
    for value in (0, *values):
        case = make()
        try:
            found[f"{name.replace('-', '_')}_{value}"] = case, case.prepare(target, {tunable: value} if value else None)
        except ValueError as error:
            assert "shared memory" in str(error)
    return found


def matmuls() -> dict[str, Any]:
    """Functions that make cases: of ragged and whole tiles, broadcast batches, padded layouts, constants, every kind of result."""
    shapes = [
        ((5, 8), (8, 36)),
        ((2, 3, 9, 20), (2, 3, 20, 16)),
        ((2, 1, 4, 64), (3, 64, 64)),
        ((35, 44), (44, 100)),
        ((1, 40), (40, 4)),
        ((33, 128), (128, 128)),
    ]
    made: dict[str, Any] = {}
    for i, (a, b) in enumerate(shapes):
        for kind, more in (("int8", {"zero_point": 2, "low": -100}), ("int16", {}), ("float32", {"float_low": -1.5, "float_high": 2.0})):
            for zeros in ((0, 0), (-128, 127), (0, 3), (5, 0)) if kind == "int8" else ((9, -7),):
                attrs = {"a_zero_point": zeros[0], "b_zero_point": zeros[1], "multiplier": float(np.float32(3e-4)), "out_dtype": kind} | more
                layout = {0: {"pitch": a[-1] + 4, "halo": HALO}} if len(a) == 4 else {}
                out = {"halo": HALO} if len(a) == 4 else {}
                constant = (1,) if kind == "float32" else ()
                make = lambda o=(a, b), c=attrs, x=layout, y=out, f=constant: Case("qc.matmul", [data(1, *o[0]), data(2, *o[1])], dict(c), x, y, f)  # noqa: E731
                made[f"matmul-{i}-{kind}-{'-'.join(str(z).replace('-', 'm') for z in zeros)}"] = make
    return made


ATTENTIONS, MATMULS = attentions(), matmuls()


def every_point(target: Target) -> dict[str, Points]:
    found = {name: points(target, name, lambda name=name: attentions()[name], "warps", (1, 2, 4, 8)) for name in ATTENTIONS}
    return found | {name: points(target, name, make, "parts", (1, 2, 4)) for name, make in MATMULS.items()}


@pytest.fixture(scope="module")
def built() -> dict[str, Points]:
    return every_point(TARGET)


@pytest.fixture(scope="module")
def emulated(built: dict[str, Points], tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    kernels = {symbol: kernel for group in built.values() for symbol, (_, kernel) in group.items()}
    return Emulated(kernels, TARGET, tmp_path_factory.mktemp("products"))


@pytest.mark.parametrize("name", [*ATTENTIONS, *MATMULS])
def test_exact(name: str, built: dict[str, Points], emulated: Emulated) -> None:
    for symbol, (case, kernel) in built[name].items():
        words = all(n % 4 == 0 for o in case.operands[: 3 if "attention" in name else 2] for n in (np.shape(o)[-1], *case.attrs.get("columns", ())))
        words &= all(case.attrs.get(size, 0) % 4 == 0 for size in ("size", "value_size"))
        assert kernel.row.startswith("cuda-mma/" if words else "cuda/"), kernel.row
        case.check(emulated.run(symbol, case.inputs, case.output))


def test_the_choice_fills_the_card() -> None:
    """Few queries: the warps of a block share their keys; many: a warp has all of them. Columns of a product likewise."""
    from qcompiler.numerics import constants

    def warps(batch: int, length: int) -> int:
        x = data(0, batch, length, 4 * 32)
        m, c = constants.attention_multipliers(1.0, np.full(4, 1e-5), 1.0, 1.0, 1.0, 4)
        attrs = {"heads": 4, "kv_heads": 4, "size": 32, "value_size": 32, "columns": [0, 0, 0], "zero_points": [0, 0, 0], "extra": []}
        return int(Case("qc.attention", [x, x, x, m, c], attrs, constants=(3, 4)).prepare(TARGET).params["warps"])

    def parts(batch: int, columns: int) -> int:
        attrs = {"a_zero_point": 0, "b_zero_point": 0, "multiplier": 0.1, "out_dtype": "int8"}
        return int(Case("qc.matmul", [data(1, batch, 64, 32), data(2, batch, 32, columns)], attrs).prepare(TARGET).params["parts"])

    assert warps(1, 128) == 4 and warps(1, 300) == 8 and warps(60, 128) == 1 and warps(1, 20) == 1
    assert parts(1, 64) == 1 and parts(120, 128) >= 2 and parts(400, 128) == 4 and parts(400, 32) == 1
