"""The table of kinds is complete, and nobody keeps a list of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from qcompiler import schedules
from qcompiler.base.targets import load_targets
from qcompiler.numerics.operators import OPERATORS
from qcompiler.passes.kinds import KINDS, Kind
from qcompiler.passes.realize import RULES
from qcompiler.schedules.table import KERNELS

ASKING = ("passes", "qcompiler/plan", "qcompiler/refine", "qcompiler/backend", "qcompiler/pipeline", "qcompiler/verification", "qcompiler/exporters")


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda k: k.name)
def test_a_kind_with_an_operator_has_its_meaning_a_rule_and_a_kernel(kind: Kind) -> None:
    assert (kind.name in RULES) == (kind.operator is not None)
    if kind.operator is None:
        return
    for target in load_targets().values():
        schedules.load(target)
        assert any(row.isa in (*target.rows, "any") for row in KERNELS[kind.operator]), target.name
    assert kind.operator in OPERATORS
    if kind.float_kernel:
        assert f"qc.f32.{kind.name}" in OPERATORS


def test_impossible_rows_are_refused() -> None:
    for wrong in ({"scatters": True}, {"moves": True}, {"pads": True, "keeps": True}, {"sums": True}, {"residual": True}):
        with pytest.raises(AssertionError):
            Kind("wrong", **wrong)


def lists_of_kinds(path: Path) -> list[int]:
    """Lines with a tuple, list or set of at least two names of kinds and nothing else."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Tuple | ast.List | ast.Set) and len(node.elts) > 1:
            names = [e.value if isinstance(e, ast.Constant) else None for e in node.elts]
            if all(isinstance(n, str) and n in KINDS for n in names):
                found.append(node.lineno)
    return found


def test_properties_of_kinds_are_in_the_table_alone(root: Path) -> None:
    """Rules of realization name their kinds; everybody else asks `kinds.py`."""
    files = [p for folder in ASKING for p in sorted((root / folder).rglob("*.py")) if p.parent.name != "realize"]
    wrong = [f"{p.relative_to(root)}:{line}" for p in files for line in lists_of_kinds(p)]
    assert not wrong
    assert lists_of_kinds(root / "passes/realize/__init__.py"), "the search finds what it looks for"
