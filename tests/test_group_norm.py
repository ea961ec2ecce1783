"""Group and instance normalizations, however they are spelled, stay float and work channels last: imported as ONNX Runtime computes them, and compiled between
int8 convolutions as one step each, without moving data."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from cuda_emulated import EmulatedProgram
from onnx_nets import OnnxNet, agrees, operators

from qcompiler.backend.build import session_of
from qcompiler.backend.lowering import lower
from qcompiler.base.errors import ModelError
from qcompiler.base.targets import find_target
from qcompiler.importers.model import load
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes.graph import Graph, plain
from qcompiler.passes.sequence import FLOAT, run
from qcompiler.pipeline.compile import compile_stages
from qcompiler.verification import interpreter

SHAPES = [(2, 12, 7), (1, 12, 1), (2, 12, 5, 6), (1, 12, 1, 1), (2, 12, 3, 4, 2)]


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("shape", SHAPES)
def test_import(opset: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    for groups in (1, 2, 3, 4, 6, 12):
        net = OnnxNet(opset=opset)
        many = groups if opset == 18 else 12
        attrs = {} if groups == 3 else {"epsilon": 1e-2}
        y = net.op("GroupNormalization", net.input("x", *shape), net.weight(many), net.weight(many), num_groups=groups, **attrs)
        model = agrees(net.save(tmp_path / "net.onnx", [y]))
        assert operators(model).count("group_norm") == 1


@pytest.mark.parametrize("opset", [18, 21])
def test_scales_that_are_computed_at_run_time(opset: int, tmp_path: Path) -> None:
    net = OnnxNet(opset=opset)
    scale, bias = (net.input(n, 3 if opset == 18 else 12) for n in ("scale", "bias"))
    image = net.op("Conv", net.input("x", 1, 3, 5, 6), net.weight(12, 3, 3, 3))
    agrees(net.save(tmp_path / "net.onnx", [net.op("GroupNormalization", image, scale, bias, num_groups=3)]))


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("opset", [18, 21])
def test_nothing_moves_between_convolutions(rank: int, opset: int, tmp_path: Path) -> None:
    """One permutation in front of all, one behind; a kernel of ours for each normalization."""
    net, window = OnnxNet(opset=opset), (3,) * (rank - 2)
    many = 4 if opset == 18 else 12
    x = net.op("Conv", net.input("x", 2, 3, *(9, 8)[: rank - 2]), net.weight(12, 3, *window))
    for _ in range(2):
        x = net.op("Relu", net.op("GroupNormalization", x, net.weight(many), net.weight(many), num_groups=4))
        x = net.op("Conv", x, net.weight(12, 12, *window), pads=[1] * 2 * (rank - 2))
    model = agrees(net.save(tmp_path / "net.onnx", [x]))
    assert operators(model).count("permute_dims") <= 2
    calls = [e for _, e in Graph.of(model.module).bindings if getattr(getattr(e, "op", None), "name", "") == "relax.nn.group_norm"]
    assert [(int(c.attrs.channel_axis), plain(c.attrs.axes)) for c in calls] == [(3, [1, 2] if rank == 4 else [2])] * 2
    assert [s.name for s in lower(run(FLOAT, model.module), find_target("native")).steps].count("qc.f32.group_norm") == 2


@pytest.mark.parametrize("affine", ["none", "product", "both"])
@pytest.mark.parametrize("shape", [(2, 12, 7), (1, 12, 5, 6), (1, 12, 3, 4, 2)])
def test_groups_that_were_made_channels(shape: tuple[int, ...], affine: str, tmp_path: Path) -> None:
    """As PyTorch writes torch.nn.GroupNorm below operator set 21."""
    net, ones, found = OnnxNet(17), (1,) * (len(shape) - 2), []
    for groups in (1, 3, 12):
        x = net.op("Conv", net.input(f"x{groups}", *shape), net.weight(12, 12, *ones))
        parted = net.op("Reshape", x, net.ints(0, groups, -1))
        y = net.op("Reshape", net.op("InstanceNormalization", parted, net.weight(groups), net.weight(groups)), net.ints(*shape))
        y = y if affine == "none" else net.op("Mul", y, net.weight(12, *ones))
        found.append(y if affine != "both" else net.op("Add", y, net.weight(12, *ones)))
    model = agrees(net.save(tmp_path / "net.onnx", found))
    assert operators(model).count("group_norm") == 3 and not {"mean", "variance", "divide"} & set(operators(model))


@pytest.mark.parametrize(("axes", "channels"), [((2, 3), 1), ((1, 2), 3), ((2, 3, 4), 1), ((2,), 1)])
def test_instances_spelled_out(axes: tuple[int, ...], channels: int, tmp_path: Path) -> None:
    """Means over pixels, channels in front of them or behind; by the operator, where the channels are in front."""
    net, shape = OnnxNet(17), [2, 4, 5, 4, 3][: max(*axes, channels) + 1]
    along = [shape[channels] if a == channels else 1 for a in range(len(shape))]
    x = net.input("x", *shape)
    found = [] if len(axes) == 1 else [net.spelled_norm(x, net.weight(*along), net.weight(*along), axes, end=end) for end in ("Div", "One")]
    found += [net.op("InstanceNormalization", x, net.weight(4), net.weight(4), epsilon=1e-2)] if channels == 1 else []
    model = agrees(net.save(tmp_path / "net.onnx", found))
    assert operators(model).count("group_norm") == len(found) and not {"mean", "variance", "divide"} & set(operators(model))
    assert [s.name for s in lower(run(FLOAT, model.module), find_target("native")).steps].count("qc.f32.group_norm") == len(found)


def test_what_is_no_group_normalization_is_refused(tmp_path: Path) -> None:
    for groups, many, reason in [(5, 5, "12 channels of a tensor of shape [1, 12, 4] can't be divided into 5 groups"), (3, 12, "its scale has shape [12]")]:
        net = OnnxNet(opset=18)
        y = net.op("GroupNormalization", net.input("x", 1, 12, 4), net.weight(many), net.weight(many), num_groups=groups)
        graph = onnx.helper.make_graph(net.nodes, "net", net.inputs, [onnx.helper.make_empty_tensor_value_info(y)], net.initializers)
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), tmp_path / "net.onnx")
        with pytest.raises(ModelError, match=re.escape(reason)):
            load(tmp_path / "net.onnx")


def test_compiled_between_int8_convolutions(tmp_path: Path) -> None:
    """On this machine and on the emulated GPU, equal to the reference but for the rounding of float sums."""
    net = OnnxNet(opset=21)
    x = net.op("Conv", net.input("x", 1, 3, 10, 10), net.weight(12, 3, 3, 3))
    x = net.op("Relu", net.op("GroupNormalization", x, net.weight(12), net.weight(12), num_groups=3))
    path = net.save(tmp_path / "net.onnx", [net.op("Conv", x, net.weight(6, 12, 3, 3))])
    samples = [{"x": np.random.default_rng(i).standard_normal((1, 3, 10, 10)).astype(np.float32)} for i in range(6)]
    compilation = compile_stages(path, "native", samples, preset="fast")
    steps = [s["op"] for s in compilation.artifact.manifest["steps"]]
    assert {"qc.conv2d"} <= set(steps) and steps.count("qc.f32.group_norm") == 1 and "float" not in steps
    want = interpreter.run(compilation.integer, samples[0], keep="all")
    with session_of(compilation.artifact) as session:
        (result,) = session.run(samples[0]).values()
    (output,) = interpreter.run(compilation.integer, samples[0]).values()
    assert sqnr_db(output, result) > 40
    runtime = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    assert sqnr_db(runtime.run(None, samples[0])[0], result) > 25
    program = lower(compilation.integer, find_target("cuda-sm80"))
    assert [step.kernel.row for step in program.steps].count("cuda/rows") == 1 and "cuda/legalized" not in {step.kernel.row for step in program.steps}
    for step, value in EmulatedProgram(program, tmp_path).run(samples[0]):
        if step.writes in want and value.dtype == np.int8:  # a float value next to a tie may be rounded to either side
            assert np.abs(value.astype(int) - want[step.writes]).max() <= (step.kernel.row == "cuda/rows")
            if step.kernel.row == "cuda/rows":
                break
    else:
        pytest.fail("the normalization writes no 8-bit value")
