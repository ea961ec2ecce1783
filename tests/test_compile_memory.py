"""What a compilation keeps in memory: each weight once as the network has it and once packed, however many stages look at it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from qcompiler.base.memory import aligned, is_aligned
from qcompiler.base.targets import find_target
from qcompiler.importers.model import load
from qcompiler.passes.graph import const, const_value
from qcompiler.passes.groups import find_groups
from qcompiler.pipeline.stages import float_code

WIDTH, DEPTH = 1024, 8
_COMPILE = """
import sys
import numpy as np
import qcompiler

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

for width, path in ((64, sys.argv[1]), (int(sys.argv[3]), sys.argv[2])):
    samples = [{"x": np.random.default_rng(i).standard_normal((4, width)).astype(np.float32)} for i in range(2)]
    qcompiler.compile(path, calibration=samples)
    print(peak())
"""


def dense(folder: Path, width: int, depth: int = 1) -> Path:
    """Dense layers of width^2 weights each."""
    rng, names = np.random.default_rng(0), ["x", *(f"h{i}" for i in range(1, depth)), "y"]
    weights = [rng.standard_normal((width, width)).astype(np.float32) / np.float32(np.sqrt(width)) for _ in range(depth)]
    ports = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, width])] for name in "xy"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(depth)]
    graph = helper.make_graph(nodes, "dense", *ports, [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / f"dense{width}.onnx")
    return folder / f"dense{width}.onnx"


def test_read_only_arrays_are_shared_with_constants() -> None:
    array = aligned(np.arange(12, dtype=np.float32).reshape(3, 4).T)
    assert is_aligned(array) and not np.shares_memory(const_value(const(array)), array)  # it may still change
    array.flags.writeable = False
    made = const(array)
    assert np.shares_memory(const_value(made), array) and not array.flags.writeable
    assert np.shares_memory(const_value(const(const_value(made))), array)
    del array
    np.testing.assert_array_equal(const_value(made), np.arange(12).reshape(3, 4).T)
    with pytest.raises(ValueError, match="read-only"):
        const_value(made)[0, 0] = 1
    for other in (np.frombuffer(bytes(64), np.int8), np.zeros((0, 3), np.float32), np.bool_(True), np.float64(0.1)):
        np.testing.assert_array_equal(const_value(const(other)), other)
        assert const_value(const(other)).dtype == other.dtype


def test_the_float_twin_holds_its_weights_once_beside_their_packed_form(tmp_path: Path) -> None:
    model = load(dense(tmp_path, 64))
    twin = float_code(model, find_target("native").name)
    (group,) = (g for g in find_groups(model.module) if g.kind == "dense")
    step = twin.program.step_of(group.id)
    assert step.op is not None and group.weight is not None
    assert np.shares_memory(np.asarray(step.op.operands[1]), group.weight)
    assert all(np.shares_memory(array, twin.constants) for array in step.kernel.constants)
    sessions = [twin.session(1), twin.session(1)]
    sample = {"x": np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)}
    before = [s.run(sample)["y"] for s in sessions]
    assert max(s.path.stat().st_size for s in sessions) < twin.link().size - group.weight.nbytes // 2  # the weights are not in its file
    np.testing.assert_allclose(before[0], sample["x"] @ group.weight.T, rtol=1e-4, atol=1e-4)
    halved = twin.constants_with([(group.id, {1: group.weight / 2})])
    np.testing.assert_array_equal(sessions[0].run(sample)["y"], before[0])  # others are not touched
    sessions[1].set_constants(halved)
    np.testing.assert_array_equal(sessions[1].run(sample)["y"], before[0] / 2)
    twin.replace_operand(group.id, 1, group.weight / 2)
    np.testing.assert_array_equal(sessions[0].run(sample)["y"], before[0] / 2)  # a session has the constants as they are
    np.testing.assert_array_equal(twin.constants, halved)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process")
def test_the_peak_of_a_compilation_is_a_few_times_the_weights(tmp_path: Path) -> None:
    """Over that of a tiny network, which is what the compiler itself takes."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, str(dense(tmp_path, 64)), str(dense(tmp_path, WIDTH, DEPTH)), str(WIDTH)], capture_output=True, text=True, check=True
    )
    small, large = map(int, done.stdout.split())
    weights = 4 * WIDTH * WIDTH * DEPTH
    assert large - small < 11 * weights
