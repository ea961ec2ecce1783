"""Float operators that reduce over rows are one launch on a GPU, with what goes element by element in front of them and behind."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from cuda_emulated import Emulated, EmulatedProgram
from onnx_nets import OnnxNet
from small_nets import Net, op, scalar
from test_cuda_fused import dequantize, inputs_of, quantize
from test_cuda_sass import instructions
from test_cuda_tails import Ended
from tools import require_nvcc
from transformer_nets import bert, vit

from qcompiler.backend.codegen_cuda import cuda_source
from qcompiler.backend.lowering import Program, lower
from qcompiler.base.targets import Target, find_target
from qcompiler.importers.model import load
from qcompiler.passes import sequence
from qcompiler.passes.graph import const, make_op
from qcompiler.schedules.table import Kernel, OpCall
from qcompiler.verification.interpreter import run

TARGET = find_target("cuda-sm80")
Make = Callable[[Net, Any], Any]


def layer_norm(net: Net, x: Any, *axes: int) -> Any:
    shape = [int(x.ty.shape[a]) for a in axes]
    return op.nn.layer_norm(x, net.random(*shape), net.random(*shape), axes=list(axes))


def channels(normalize: Any, axis: int, *axes: int, **attrs: Any) -> Make:
    def make(net: Net, x: Any) -> Any:
        many = int(x.ty.shape[axis])
        return normalize(x, net.random(many), net.random(many), channel_axis=axis, axes=list(axes), **attrs)

    return make


def unit(net: Net, x: Any) -> Any:
    """Of length 1."""
    total = net.add("total", op.sum(net.add("squares", op.multiply(x, x)), axis=[-1], keepdims=True))
    return op.divide(x, net.add("length", op.sqrt(net.add("positive", op.add(total, scalar(1e-6))))))


def both_ends(net: Net, x: Any) -> Any:
    return op.subtract(net.add("most", op.max(x, axis=[1])), net.add("least", op.min(x, axis=[1])))


ROWS: dict[str, tuple[Make, tuple[int, ...]]] = {  # elements of a row, neighbours or not: few, no multiple of threads, several warps, more than registers hold
    "softmax": (lambda net, x: op.nn.softmax(x, axis=-1), (2, 3, 70)),
    "softmax of few": (lambda net, x: op.nn.softmax(x, axis=-1), (45, 3)),
    "softmax over rows": (lambda net, x: op.nn.softmax(x, axis=1), (2, 33, 35)),
    "softmax over long columns": (lambda net, x: op.nn.softmax(x, axis=0), (130, 3)),
    "log-softmax": (lambda net, x: op.nn.log_softmax(x, axis=-1), (3, 2500)),
    "layer norm": (lambda net, x: layer_norm(net, x, -1), (5, 384)),
    "layer norm of two axes": (lambda net, x: layer_norm(net, x, -2, -1), (3, 7, 30)),
    "rms norm": (lambda net, x: op.nn.rms_norm(x, net.random(130), axes=[-1]), (2, 3, 130)),
    "group norm": (channels(op.nn.group_norm, 1, 2, 3, num_groups=3), (2, 6, 5, 7)),
    "group norm, channels last": (channels(op.nn.group_norm, 3, 1, 2, num_groups=3), (2, 5, 7, 6)),
    "instance norm": (channels(op.nn.instance_norm, 1, 2, 3), (2, 3, 5, 7)),
    "instance norm, channels last": (channels(op.nn.instance_norm, 3, 1, 2), (2, 5, 7, 3)),
    "mean": (lambda net, x: op.mean(x, axis=[1, 2], keepdims=True), (2, 9, 11, 33)),
    "variance": (lambda net, x: op.variance(x, axis=[2]), (2, 3, 140)),
    "product": (lambda net, x: op.prod(x, axis=[-1]), (4, 9)),
    "sum of all": (lambda net, x: op.sum(x), (3, 900)),
    "unit length": (unit, (4, 200)),
    "both ends": (both_ends, (3, 41, 2)),
}


def alone(name: str) -> tvm.IRModule:
    make, shape = ROWS[name]
    net = Net(2)
    return net.done(net.add("y", make(net, net.input("x", *shape))))


def between_integers(net: Net) -> tvm.IRModule:
    """int8, made channels last, normalized twice, back to int8 channels first; the mean of the first and the second in float are handed out too."""
    table = const(np.arange(-128, 128).astype(np.int8))
    stored = net.add("stored", quantize(net.input("x", 2, 3, 5, 8)))
    x = net.add("real", dequantize(net.add("moved", make_op("qc.lut", [stored, table], {}, (2, 3, 5, 8), "int8")), 0, 2, 3, 1))
    mean = net.add("mean", op.mean(net.add("scaled", op.multiply(x, net.random(3))), axis=[-1], keepdims=True))
    soft = net.add("soft", op.nn.softmax(net.add("centred", op.subtract(x, mean)), axis=-1))
    return net.done(net.add("q", quantize(net.add("half", op.multiply(soft, scalar(0.5))), 0, 3, 1, 2)), mean, soft)


def other_rows(net: Net) -> tvm.IRModule:
    """What is reduced along one axis, then along another, are two kernels; a matrix product is none of them."""
    x = net.add("soft", op.nn.softmax(net.input("x", 4, 6), axis=1))
    y = net.add("other", op.nn.softmax(net.add("twice", op.multiply(x, scalar(2))), axis=0))
    return net.done(net.add("product", op.matmul(y, net.random(6, 3))))


def joined(net: Net) -> tvm.IRModule:
    """A concatenation of what is computed, before a sum; padded in front and behind afterwards."""
    x, y = net.add("a", op.abs(net.input("x", 3, 5))), net.add("b", op.negative(net.input("y", 3, 4)))
    both = net.add("both", op.concat([x, y, net.add("c", op.sqrt(x))], axis=1))
    soft = net.add("soft", op.nn.softmax(both, axis=1))
    return net.done(net.add("padded", op.nn.pad(soft, [0, 0, 2, 3], "constant", 7.0)), net.add("again", op.concat([soft, both], axis=0)))


NETS: dict[str, tuple[tvm.IRModule, list[str]]] = {  # and the rows of its launches
    **{name: (alone(name), ["cuda/rows"]) for name in ROWS},
    "between integers": (between_integers(Net(2)), ["any/lut", "any/quantize", "cuda/rows"]),
    "other rows": (other_rows(Net(2)), ["cuda/legalized", "cuda/rows", "cuda/rows"]),
    "joined": (joined(Net(2)), ["cuda/fused", "cuda/fused", "cuda/rows"]),
}


def reduced(target: Target) -> dict[str, tuple[Ended, Kernel]]:
    """For whoever runs all cases of all kernels, with kernels for `target`."""
    found = {}
    for name in ROWS:
        module = alone(name)
        program, inputs = lower(module, target), inputs_of(module)
        (step,), (expected,) = program.steps, run(module, inputs).values()
        layout = program.values[step.writes].layout
        case = Ended(OpCall("rows", [], {}, layout), [inputs[value] for value in step.reads], layout, expected.reshape(layout.shape), 1e-4)
        found[f"rows/{name}"] = case, step.kernel
    return found


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {name: lower(module, TARGET) for name, (module, _) in NETS.items()}


def test_programs(programs: dict[str, Program], tmp_path: Path) -> None:
    """As many launches as stated, whose results are the reference's but for the order of sums, and do not depend on the order of threads."""
    kernels = {step.kernel.key: step.kernel for program in programs.values() for step in program.steps}
    symbols = {key: f"k{i}" for i, key in enumerate(kernels)}
    emulated = Emulated({symbols[key]: kernel for key, kernel in kernels.items()}, TARGET, tmp_path)
    for name, (module, rows) in NETS.items():
        program, inputs = programs[name], inputs_of(module)
        assert sorted(step.kernel.row for step in program.steps) == rows, name
        wanted, emulation = run(module, inputs, keep="all"), EmulatedProgram(program, emulated, symbols)
        list(emulation.run(inputs))
        compared = [value for value in emulation.values if value in wanted]
        assert compared
        for value in compared:
            found, want = emulation.values[value], wanted[value].reshape(emulation.values[value].shape)
            assert found.size == 1 or np.unique(found).size > 1, f"{name}: {value} shows nothing"
            if found.dtype == np.int8:
                assert np.abs(found.astype(int) - want).max() <= 1, f"{name}: {value}"
            else:
                np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max(), err_msg=f"{name}: {value}")
        for step in program.steps if len(program.steps) == 1 else []:
            emulated.run_all(symbols[step.kernel.key], [inputs[v] for v in step.reads], [program.values[v].layout for v in (step.writes, *step.more)])


def test_order_of_sums(tmp_path: Path) -> None:
    """As numerics.md says: each thread's elements in order, then halves of the lanes, then warps."""
    net = Net()
    module = net.done(net.add("y", op.sum(net.input("x", 3, 777), axis=[-1])))
    x = np.random.default_rng(0).lognormal(0, 4, (3, 777)).astype(np.float32)
    program = lower(module, TARGET)
    (value,) = (v for _, v in EmulatedProgram(program, tmp_path).run({"x": x}))
    threads = 256  # the power of two from 777 / 4 on
    part = np.zeros((3, threads), np.float32)
    for begin in range(0, 777, threads):
        piece = x[:, begin : begin + threads]
        part[:, : piece.shape[1]] += piece
    warps = part.reshape(3, threads // 32, 32)
    for half in (16, 8, 4, 2, 1):
        warps = warps[..., :half] + warps[..., half : 2 * half]
    total = warps[:, 0, 0]
    for warp in range(1, threads // 32):
        total = total + warps[:, warp, 0]
    np.testing.assert_array_equal(value, total)
    assert (total != x.astype(np.float64).sum(1)).any()


def test_machine_code(programs: dict[str, Program], tmp_path: Path) -> None:
    """Lanes hand each other sums, nothing is spilled, and a row that registers hold is read once: 384 elements by 128 threads, with gain and shift."""
    require_nvcc()
    names = ("softmax", "layer norm", "group norm", "log-softmax", "softmax over rows")
    kernels = {"k_" + name.replace(" ", "_").replace("-", "_"): programs[name].steps[-1].kernel for name in names}
    found = instructions(kernels, TARGET, tmp_path)
    for name, counts in found.items():
        assert not counts["LDL"] + counts["STL"], (name, counts)
        assert (counts["SHFL"] > 0) == (name != "k_softmax_over_rows"), (name, counts)
    norm = found["k_layer_norm"]
    assert (norm["SHFL"], norm["LDG"], norm["STG"]) == (2 * 5, 3 * 3, 3), norm


def test_a_barrier_that_is_missing_shows(programs: dict[str, Program], tmp_path: Path) -> None:
    """Of the tests above: warps that do not wait for each other's sums."""
    kernel = programs["layer norm"].steps[0].kernel
    source = cuda_source({"k": kernel}, TARGET)
    assert source.count("  __syncthreads();") >= 2
    emulated = Emulated({"k": kernel}, TARGET, tmp_path, lambda text: text.replace("  __syncthreads();", ""))
    layout = programs["layer norm"].values["y"].layout
    x = inputs_of(NETS["layer norm"][0])["x"]
    with pytest.raises(AssertionError):
        found = emulated.run("k", [x], layout)
        np.testing.assert_allclose(found.reshape(layout.shape), run(NETS["layer norm"][0], {"x": x})["out0"], rtol=1e-5, atol=1e-5)


def group_norms(path: Path) -> Path:
    """SiLU behind two group norms, between convolutions."""
    net = OnnxNet(opset=21)
    x = net.op("Conv", net.input("x", 1, 3, 10, 10), net.weight(12, 3, 3, 3))
    for _ in range(2):
        x = net.op("GroupNormalization", x, net.weight(12), net.weight(12), num_groups=3)
        x = net.op("Conv", net.op("Mul", x, net.op("Sigmoid", x)), net.weight(12, 12, 3, 3), pads=[1] * 4)
    return net.save(path, [x])


@pytest.mark.parametrize(("make", "most"), [(bert, 30), (vit, 33), (group_norms, 7)])
def test_launches(make: Callable[[Path], Path], most: int, tmp_path: Path) -> None:
    """Of whole networks in float. More would be a loss that nothing else shows."""
    assert len(lower(sequence.run(sequence.FLOAT, load(make(tmp_path / "net.onnx")).module), TARGET).steps) <= most


def test_nothing_is_read_outside(tmp_path: Path) -> None:
    """What a condition keeps inside of a tensor is not read where it doesn't hold: beside the operands of padding and concatenation lies memory of nobody."""
    net, page = Net(), mmap.PAGESIZE
    x, y = net.input("x", 2, 3), net.input("y", 2, 2)
    padded = op.nn.pad(x, [0, 0, 700, 700], "constant", 7.0)
    program = lower(net.done(net.add("padded", padded), net.add("both", op.concat([y, net.input("z", 2, 900)], axis=1))), TARGET)
    symbols = {step.kernel.key: f"k{i}" for i, step in enumerate(program.steps)}
    emulated = Emulated({symbols[step.kernel.key]: step.kernel for step in program.steps}, TARGET, tmp_path)
    child = os.fork()
    if child == 0:  # it dies of a page that nobody may read
        protect = ctypes.CDLL(None).mprotect
        for at_end in (False, True):
            for step in program.steps:
                arrays = []
                for value in step.reads:
                    layout, memory = program.values[value].layout, np.frombuffer(mmap.mmap(-1, 4 * page), np.uint8)
                    for empty in (0, 3):
                        protect(ctypes.c_void_p(memory.ctypes.data + empty * page), page, 0)
                    begin = 3 * page - layout.bytes if at_end else page
                    arrays.append(memory[begin : begin + layout.bytes].view(layout.dtype))
                written = [np.zeros(program.values[v].layout.elements, np.float32) for v in (step.writes, *step.more)]
                emulated.launch(symbols[step.kernel.key], [*arrays, *step.kernel.constants, *written])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_limits() -> None:
    """A long row's elements are not computed along with its sum where there are few rows: the whole GPU computes those."""

    def rows(*shape: int) -> list[str]:
        net = Net()
        x = net.add("half", op.multiply(net.input("x", *shape), scalar(0.5)))
        total = net.add("total", op.sum(x, axis=[-1], keepdims=True))
        return sorted(step.kernel.row for step in lower(net.done(net.add("y", op.subtract(x, total))), TARGET).steps)

    assert rows(3, 2000) == rows(64, 10000) == ["cuda/rows"]
    assert rows(3, 10000) == ["cuda/fused", "cuda/fused", "cuda/rows"]
