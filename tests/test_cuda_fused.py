"""Operators that go element by element are one launch on a GPU where they hang together, and yield what they yield one by one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from cuda_emulated import Emulated, EmulatedProgram
from small_nets import Net, op, scalar
from test_cuda_sass import instructions
from test_cuda_tails import Ended
from tools import require_nvcc

from qcompiler.backend import fused
from qcompiler.backend.lowering import Program, lower
from qcompiler.base.errors import ModelError
from qcompiler.base.targets import Target, find_target
from qcompiler.passes.graph import const, dtype_of, make_op, shape_of
from qcompiler.schedules.table import LARGEST, Kernel, OpCall
from qcompiler.verification.interpreter import run

TARGET = find_target("cuda-sm80")


def converted(name: str, x: Any, axes: tuple[int, ...], dtype: str, attrs: dict[str, Any]) -> Any:
    axes = axes or tuple(range(len(shape_of(x))))
    return make_op(name, [x], {"scale": 0.037, "zero_point": 5, "axes": list(axes), **attrs}, tuple(shape_of(x)[a] for a in axes), dtype)


def quantize(x: Any, *axes: int, **attrs: Any) -> Any:
    return converted("qc.quantize", x, axes, attrs.get("out_dtype", "int8"), attrs)


def dequantize(x: Any, *axes: int, **attrs: Any) -> Any:
    return converted("qc.dequantize", x, axes, "float32", attrs)


def attention_mask(net: Net) -> tvm.IRModule:
    kept = net.add("kept", op.astype(net.input("mask", 2, 11, dtype="int64"), "float32"))
    bias = net.add("bias", op.multiply(net.add("sub", op.subtract(scalar(1), kept)), scalar(np.finfo(np.float32).min)))
    view = net.add("view", op.reshape(bias, [2, 1, 1, 11]))
    counts = net.add("counts", op.astype(net.add("greater", op.greater(view, scalar(-1e4))), "int8"))
    logits = net.add("logits", op.astype(net.add("round", op.round(net.add("clip", op.clip(view, -(2**29), 2**29)))), "int32"))
    return net.done(counts, logits)


def broadcasts(net: Net) -> tvm.IRModule:
    """Small results that larger ones read, one of which the network hands out too; constants per channel."""
    x, column, one = net.input("x", 3, 5, 7), net.input("c", 5, 1), net.input("s", dtype="float32")
    small = net.add("small", op.add(net.add("product", op.multiply(column, one)), net.random(5, 1)))
    y = net.add("y", op.subtract(net.add("scaled", op.multiply(x, net.random(7))), small))
    return net.done(net.add("chosen", op.where(net.add("positive", op.greater(y, scalar(0))), y, small)), small)


def mixed(net: Net) -> tvm.IRModule:
    """int64, int32, bool and float32, of rank 0."""
    a, b = net.input("a", dtype="int64"), net.input("b", dtype="int32")
    total = net.add("total", op.add(a, net.add("wide", op.astype(b, "int64"))))
    odd = net.add("odd", op.logical_not(net.add("even", op.equal(net.add("rest", op.mod(total, const(np.int64(2)))), const(np.int64(0))))))
    return net.done(net.add("y", op.where(odd, net.add("f", op.astype(total, "float32")), scalar(-0.5))), odd)


def conversions(net: Net) -> tvm.IRModule:
    """int8 NCHW, read in NHWC, to int8 and int16 in other orders; those at the edges are steps of their own."""
    stored = net.add("stored", quantize(net.input("x", 1, 3, 5, 6)))
    table = const(np.arange(-128, 128).astype(np.int8))
    x = net.add("real", dequantize(net.add("moved", make_op("qc.lut", [stored, table], {}, (1, 3, 5, 6), "int8")), 0, 2, 3, 1))
    y = net.add("sum", op.add(net.add("square", op.multiply(x, x)), net.random(3)))
    q = net.add("q", quantize(y, 0, 3, 1, 2))
    wide = net.add("wide", quantize(net.add("half", op.multiply(y, scalar(0.5))), zero_point=0, out_dtype="int16"))
    return net.done(q, net.add("out", dequantize(wide, zero_point=0)))


def diamonds(net: Net) -> tvm.IRModule:
    """40 values, each second one read twice: code that doubled with each would never end. Iterations that amplify every rounding."""
    x = net.add("start", op.clip(net.input("x", 2, 1, 3, 1, 9), -1.5, 1.5))
    for i in range(20):
        x = net.add(f"next{i}", op.subtract(net.add(f"square{i}", op.multiply(x, x)), scalar(1.4)))
    return net.done(x)


def one_function_twice(net: Net) -> tvm.IRModule:
    """Legalization writes one function for both roots."""
    a = net.add("a", op.abs(net.input("x", 33)))
    return net.done(net.add("third", op.add(net.add("second", op.sqrt(net.add("first", op.sqrt(a)))), a)))


def there_and_back(net: Net) -> tvm.IRModule:
    """What goes through a sum and back is two kernels, whatever else hangs together."""
    x = net.add("half", op.multiply(net.input("x", 4, 6), scalar(0.5)))
    total = net.add("total", op.sum(x, axis=[1], keepdims=True))
    return net.done(net.add("y", op.divide(x, net.add("positive", op.add(total, scalar(9))))))


def moved(net: Net) -> tvm.IRModule:
    """Parts and permutations are read where they lie; what is padded is not, whose index may lie outside."""
    x = net.add("twice", op.multiply(net.input("x", 3, 8, 5), scalar(2)))
    part = net.add("part", op.strided_slice(x, [1], [1], [8], [2]))
    turned = net.add("turned", op.add(net.add("permuted", op.permute_dims(part, [2, 0, 1])), scalar(1)))
    padded = net.add("padded", op.nn.pad(part, [0, 0, 1, 1, 0, 0], "constant", 3.0))
    return net.done(turned, padded)


def reshaped(net: Net) -> tvm.IRModule:
    """In the middle, to another rank; the reshape itself is handed out too."""
    x = net.add("twice", op.multiply(net.input("x", 4, 6), scalar(2)))
    view = net.add("view", op.reshape(x, [3, 2, 4]))
    return net.done(net.add("y", op.add(net.add("z", op.negative(view)), net.random(4))), view)


NETS: dict[str, tuple[Callable[[Net], tvm.IRModule], list[str]]] = {  # and the rows of its launches
    "attention mask": (attention_mask, ["cuda/fused"]),
    "broadcasts": (broadcasts, ["cuda/fused"]),
    "mixed types": (mixed, ["cuda/fused"]),
    "conversions": (conversions, ["any/dequantize", "any/lut", "any/quantize", "cuda/fused"]),
    "diamonds": (diamonds, ["cuda/fused"]),
    "one function twice": (one_function_twice, ["cuda/fused"]),
    "there and back": (there_and_back, ["cuda/rows"]),
    "moved": (moved, ["cuda/fused"]),
    "reshaped": (reshaped, ["any/copy", "cuda/fused"]),
}


def inputs_of(module: tvm.IRModule) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    drawn = {"float32": lambda s: 2 * rng.standard_normal(s), "int8": lambda s: rng.integers(-128, 128, s)}
    return {str(p.name): np.asarray(drawn.get(dtype_of(p), lambda s: rng.integers(0, 2, s))(shape_of(p)), dtype_of(p)) for p in module["main"].params}


def of_one_result(target: Target) -> dict[str, tuple[Ended, Kernel]]:
    """For whoever runs all cases of all kernels, with kernels for `target`."""
    found = {}
    for name in ("diamonds", "one function twice"):
        module = NETS[name][0](Net(2))
        program, inputs = lower(module, target), inputs_of(module)
        (step,), (expected,) = program.steps, run(module, inputs).values()
        layout = program.values[step.writes].layout
        found[f"fused/{name}"] = Ended(OpCall("fused", [], {}, layout), [inputs[value] for value in step.reads], layout, expected), step.kernel
    return found


@pytest.fixture(scope="module")
def programs() -> dict[str, tuple[tvm.IRModule, Program]]:
    modules = {name: make(Net(2)) for name, (make, _) in NETS.items()}
    return {name: (module, lower(module, TARGET)) for name, module in modules.items()}


def test_programs(programs: dict[str, tuple[tvm.IRModule, Program]], tmp_path: Path) -> None:
    kernels = {step.kernel.key: step.kernel for _, program in programs.values() for step in program.steps}
    symbols = {key: f"k{i}" for i, key in enumerate(kernels)}
    emulated = Emulated({symbols[key]: kernel for key, kernel in kernels.items()}, TARGET, tmp_path)
    for name, (module, program) in programs.items():
        assert sorted(step.kernel.row for step in program.steps) == NETS[name][1], name
        inputs = inputs_of(module)
        wanted, emulation = run(module, inputs, keep="all"), EmulatedProgram(program, emulated, symbols)
        assert {step.writes for step, _ in emulation.run(inputs)} & set(wanted)
        for value, found in emulation.values.items():
            if value in wanted:
                np.testing.assert_array_equal(found, wanted[value].reshape(found.shape), f"{name}: {value}")
                assert found.size == 1 or np.unique(found).size > 1, f"{name}: {value} shows nothing"


def test_products_are_rounded(programs: dict[str, tuple[tvm.IRModule, Program]], tmp_path: Path) -> None:
    """Machine code contracts no product with a sum, and keeps in registers what lies between."""
    require_nvcc()
    names = ("broadcasts", "conversions", "diamonds")  # a division is made of contracted ones
    kernels = {name: next(step.kernel for step in programs[name][1].steps if step.kernel.row == "cuda/fused") for name in names}
    for name, found in instructions(kernels, TARGET, tmp_path).items():
        assert found["FMUL"] and found["FADD"] and not found["FFMA"] + found["LDL"] + found["STL"], (name, found)


@pytest.mark.parametrize("seed", range(4))
def test_groups_of_random_networks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However groups grow, each has a rank above those of all that it reads from, so none reads from itself through others; and some grow."""
    net, rng = Net(seed), np.random.default_rng(seed)
    values, weight = [net.input("x", 4, 6), net.input("y", 4, 6)], net.random(6, 6)
    for i in range(40):
        a, b = (values[max(0, len(values) - int(rng.geometric(0.15)))] for _ in range(2))
        kind = int(rng.integers(8))
        if kind == 0:
            made = op.reshape(net.add(f"negative{i}", op.negative(net.add(f"view{i}", op.reshape(a, [2, 12])))), [4, 6])
        else:
            made = op.matmul(a, weight) if kind == 1 else op.nn.softmax(a, axis=i % 2) if kind == 2 else op.add(a, b)
        values.append(net.add(f"value{i}", made))
    merge, merged = fused._Grouping.merge, []

    def checked(self: Any, *groups: Any) -> None:
        merge(self, *groups)
        merged.append(groups)
        first = {node.id: self.groups[node.id][0].id for node in self.nodes}
        edges = {(first[source], first[node.id]) for node in self.nodes if not self.views(node) for source in self.before[node.id]}
        assert all(self.rank[a] < self.rank[b] for a, b in edges if a != b)

    monkeypatch.setattr(fused._Grouping, "merge", checked)
    assert len(lower(net.done(*values[-3:]), TARGET).steps) < 40 and len(merged) > 5


def test_limits() -> None:
    """Indices are int32, and what is small is not computed anew for each of very many: such operators are launched one by one."""

    def rows(shape: tuple[int, ...]) -> list[str]:
        net = Net()
        x = net.add("root", op.sqrt(net.input("x", shape[-1])))
        return [step.kernel.row for step in lower(net.done(net.add("y", op.add(net.input("z", *shape), x))), TARGET).steps]

    assert rows((8, 8)) == ["cuda/fused"]
    assert rows((2**14, 2**12)) == ["cuda/fused", "cuda/fused"]
    assert rows((2, LARGEST // 2 + 1))[-1] == "cuda/legalized"


@pytest.mark.parametrize("target", ["cuda-sm80", "x86-avx2"])
def test_rows_of_ours_index_in_32_bits(target: str) -> None:
    """So a larger tensor is refused, by its name."""
    net = Net()
    x = net.input("x", 2, 2**15, 2**15, dtype="int8")
    module = net.done(net.add("bent", make_op("qc.lut", [x, const(np.arange(-128, 128).astype(np.int8))], {}, shape_of(x), "int8")))
    with pytest.raises(ModelError, match=r"'bent': 2147483648 elements of a tensor \(2 x 32768 x 32768\); kernels index at most 2147483392"):
        lower(module, find_target(target))


def test_on_a_cpu_nothing_changes() -> None:
    assert [s.writes for s in lower(one_function_twice(Net(2)), find_target("x86-avx2")).steps] == ["a", "first", "second", "third"]
