"""Concatenations whose operands are written in their place: which ones, and that every value is what numerics.py says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from small_nets import Net, TinyPlan, op
from x86_emulation import HOST, runs_here

from qcompiler.backend.build import build
from qcompiler.backend.lowering import Program, lower
from qcompiler.base.targets import find_target
from qcompiler.passes import sequence
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.runtime.session import Session
from qcompiler.verification import interpreter
from qcompiler.verification.bits import bit_parity

pytestmark = runs_here
SHAPE = (2, 7, 9, 8)


def join(net: Net, name: str, *parts: Any) -> Any:
    return net.add(name, op.concat(list(parts), axis=3))


def fire(net: Net, x: Any) -> Any:
    """Two convolutions side by side, of ragged channels."""
    a, b = net.conv("a", x, 5, 1), net.conv("b", x, 13)
    return net.conv("end", join(net, "cat", a, b), 8, 1)


def with_a_border(net: Net, x: Any) -> Any:
    """The result is read by a padded convolution, and one operand by an addition too."""
    a, b = net.conv("a", x, 16, 1), net.add("b", op.nn.max_pool2d(x, (3, 3), (1, 1), padding=(1, 1, 1, 1), layout="NHWC"))
    return net.add("sum", op.add(net.conv("end", join(net, "cat", a, b), 16), a))


def padded_operand(net: Net, x: Any) -> Any:
    """An operand that a padded convolution reads has a border of its own: it is copied."""
    a, b = net.conv("a", x, 8, 1), net.conv("b", x, 8, 1)
    return join(net, "last", net.conv("end", join(net, "cat", a, b), 8, 1), net.conv("c", a, 8))


def layer(net: Net, i: int, x: Any) -> Any:
    return net.add(f"r{i}", op.clip(net.conv(f"b{i}", x, 8, 1), 0.0, 0.2))


def nested(net: Net, x: Any) -> Any:
    """Each layer adds channels to all that came before."""
    y = layer(net, 3, x)
    for i in range(3):
        y = join(net, f"cat{i}", y, layer(net, i, y))
    return net.conv("end", y, 8, 1)


def listed(net: Net, x: Any) -> Any:
    """The same, but each concatenation names all of its layers."""
    parts = [layer(net, 0, x)]
    for i in range(1, 4):
        parts.append(layer(net, i, join(net, f"cat{i}", *parts) if i > 1 else parts[0]))
    return net.conv("end", join(net, "cat4", *parts), 8, 1)


def twice(net: Net, x: Any) -> Any:
    """One value can't lie in two places."""
    a = net.conv("a", x, 8, 1)
    return net.conv("end", join(net, "cat", a, a), 8, 1)


def of_an_input(net: Net, x: Any) -> Any:
    """Operands whose scales differ from the result's come by way of tables, which write in place."""
    return net.conv("end", join(net, "cat", net.conv("a", x, 8, 1), x), 8, 1)


def moved_data(net: Net, x: Any) -> Any:
    """Whatever row leaves the channels behind its own alone may write there: slices, padding and transposed convolutions too."""
    a, b = net.conv("a", x, 8), net.conv("b", x, 8, padding=(0, 0, 0, 0))
    return net.conv("end", join(net, "cat", net.add("cut", op.strided_slice(a, [3], [2], [7])), net.add("wide", op.nn.pad(b, [0, 0, 1, 1, 1, 1, 0, 0]))), 8, 1)


def along_rows(net: Net, x: Any) -> Any:
    """Only channels lie side by side in every pixel."""
    a, b = net.conv("a", x, 8, 1), net.conv("b", x, 8, 1)
    return net.conv("end", net.add("cat", op.concat([a, b], axis=1)), 8, 1)


CASES: dict[Callable[[Net, Any], Any], dict[str, list[int]]] = {
    fire: {"cat": [0, 1]},
    with_a_border: {"cat": [0, 1]},
    padded_operand: {"cat": [1]},
    nested: {"cat0": [0, 1], "cat1": [0, 1], "cat2": [0, 1]},
    listed: {"cat2": [0, 1], "cat3": [0, 1, 2], "cat4": [0, 1, 2, 3]},
    twice: {"cat": [0]},
    of_an_input: {"cat": [0, 1]},
    moved_data: {"cat": [0, 1]},
    along_rows: {},
}


def placed(program: Program) -> dict[str, list[int]]:
    concats = [s for s in program.steps if s.name == "qc.concat"]
    return {s.writes: s.op.attrs["in_place"] for s in concats if s.op is not None and "in_place" in s.op.attrs}


def network(make: Callable[[Net, Any], Any]) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """Integer module, input."""
    net = Net(5)
    module = net.done(net.add("soft", op.nn.softmax(make(net, net.input("x", *SHAPE)))))
    sample = {"x": np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)}
    return sequence.run(sequence.INTEGER, insert_qdq(module, TinyPlan(module, sample))), sample


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_operands_lie_in_their_concatenation(make: Callable[[Net, Any], Any], tmp_path: Path) -> None:
    integer, sample = network(make)
    built = build(integer, HOST, "test")
    found = placed(built.program)
    wanted = CASES[make]
    assert {k: v for k, v in found.items() if k in wanted} == wanted and (wanted or not found)
    values, last = built.program.values, [s for s in built.program.steps if s.name == "qc.concat"][-1]
    assert last.op is not None
    for index in found.get(last.writes, []):
        part, whole = values[last.reads[index]].place, values[last.writes].place
        assert part is not None and whole is not None and 0 <= part.offset - whole.offset < values[last.writes].layout.channel_pitch
    session = Session(built.link().save(tmp_path / "net.so"), threads=2)
    for _ in range(2):
        assert bit_parity(session, interpreter.run(integer, sample, keep="all"), sample) == []


def test_kernels_for_a_gpu_copy() -> None:
    integer, _ = network(fire)
    assert placed(lower(integer, find_target("cuda-sm80"))) == {}
