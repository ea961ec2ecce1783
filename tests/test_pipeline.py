"""Whole networks: compiled code equals the reference arithmetic bit for bit, on every x86 row, and the same inputs give the same bytes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.base.errors import DataError, PlanError
from qcompiler.base.targets import load_targets, missing_features
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.pipeline.compile import compile_stages
from qcompiler.pipeline.float_library import compile_float
from qcompiler.pipeline.library import Compilation
from qcompiler.runtime.session import Session
from qcompiler.verification.bits import bit_parity
from qcompiler.verification.interpreter import run

X86 = [t.name for t in load_targets().values() if t.architecture == "x86_64" and not missing_features(t)]


def samples(count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(demo_data()[0], count))


@pytest.fixture(scope="module")
def digits() -> dict[str, Compilation]:
    """The embedded network for every x86 target that runs here."""
    return {name: compile_stages(MODEL, name, samples(16)) for name in X86}


@pytest.fixture(scope="module")
def sessions(digits: dict[str, Compilation], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    folder = tmp_path_factory.mktemp("libraries")
    return {name: Session(c.artifact.save(folder / f"{name}.so"), threads=2) for name, c in digits.items()}


@pytest.mark.parametrize("target", X86)
def test_every_value_equals_the_reference(digits: dict[str, Compilation], sessions: dict[str, Session], target: str) -> None:
    for sample in demo_data()[1][:5]:
        expected = run(digits[target].integer, sample, keep="all")
        compared = [v for v in sessions[target].manifest["steps"] if v["id"] in expected]
        assert len(compared) > 10
        assert bit_parity(sessions[target], expected, sample) == []


def test_targets_agree_bit_for_bit(sessions: dict[str, Session]) -> None:
    for sample in demo_data()[1][:20]:
        outputs = [s.run(sample) for s in sessions.values()]
        for other in outputs[1:]:
            for name, value in outputs[0].items():
                assert value.tobytes() == other[name].tobytes()


def test_a_plan_serves_every_target(digits: dict[str, Compilation]) -> None:
    assert len({c.artifact.manifest["digests"]["plan"] for c in digits.values()}) == 1


def test_threads_change_nothing(digits: dict[str, Compilation], tmp_path: Path) -> None:
    path = digits[X86[-1]].artifact.save(tmp_path / "digits.so")
    sample = samples(1)[0]
    results = [Session(path, threads=n).run(sample) for n in (1, 2, 3, 8)]
    for name, value in results[0].items():
        assert all(value.tobytes() == r[name].tobytes() for r in results[1:])


def test_the_same_inputs_give_the_same_bytes(digits: dict[str, Compilation]) -> None:
    again = qcompiler.compile(MODEL, X86[-1], samples(16))
    assert again.library == digits[X86[-1]].artifact.library


def test_a_wrong_kernel_is_found(digits: dict[str, Compilation], tmp_path: Path) -> None:
    """One bias off by a thousand units in one channel of one layer: bit parity names that layer first."""
    compilation = digits[X86[-1]]
    sample = samples(1)[0]
    expected = run(compilation.integer, sample, keep="all")
    session = Session(compilation.artifact.save(tmp_path / "digits.so"))
    step = next(s for s in compilation.program.steps if s.name == "qc.conv2d")
    assert step.op is not None
    bias = step.op.operands[2]
    assert isinstance(bias, np.ndarray)
    wrong = bias.copy()
    wrong[3] += 1000
    compilation.program.replace_operand(step.writes, 2, wrong)
    session.set_constants(compilation.program.constants)
    mismatches = bit_parity(session, expected, sample)
    compilation.program.replace_operand(step.writes, 2, bias)
    assert mismatches and mismatches[0].name == step.writes


@pytest.mark.parametrize("target", X86)
def test_replaced_constants_do_not_decide_the_code(digits: dict[str, Compilation], target: str) -> None:
    """Code that trusts sums to stay below 2^30 serves constants that are a little larger, and code that does not serves all."""
    program = digits[target].program
    step = next(s for s in program.steps if s.name == "qc.conv2d")
    assert step.op is not None and step.row is not None
    weight, bias, multiplier = (np.asarray(o) for o in step.op.operands[1:4])
    largest = ((np.abs(bias.astype(np.float64)) + 255 * np.abs(weight.astype(np.float64)).reshape(len(weight), -1).sum(1)) * multiplier).max()
    near, over = (multiplier * np.float32(share * 2**30 / largest) for share in (0.75, 1.5))
    assert program.packed_with(step, {3: near}).keys() == program.packed_with(step, {3: multiplier}).keys()
    with pytest.raises(AssertionError, match="must not decide"):
        program.packed_with(step, {3: over})
    op = replace(step.op, operands=[*step.op.operands[:3], over])
    clamping = replace(step, op=op, kernel=step.row.build(op, step.params, program.target))
    assert clamping.kernel.key != step.kernel.key and program.packed_with(clamping, {3: multiplier})


def test_layers_kept_float(tmp_path: Path) -> None:
    """They run in the float kernels, say why, and cost size and win accuracy; the rest equals the reference."""
    kept = compile_stages(MODEL, X86[-1], samples(16), keep_float=["conv2", "relu4"], preset="fast")
    assert [(f["id"], f["op"], f["reason"]) for f in kept.artifact.manifest["float_ops"]] == [
        ("relu2", "Relu", "kept in float32 as asked (keep_float)"),
        ("relu4", "Relu", "kept in float32 as asked (keep_float)"),
    ]
    steps = {s["id"]: s["op"] for s in kept.artifact.manifest["steps"] if not s.get("auxiliary")}
    assert steps["relu2"] == steps["relu4"] == "qc.f32.conv2d" and steps["relu3"] == "qc.conv2d"
    session = Session(kept.artifact.save(tmp_path / "kept.so"))
    sample = samples(1)[0]
    expected = run(kept.integer, sample, keep="all")
    assert sqnr_db(session.run(sample)["logits"], expected["logits"]) > 30  # float sums of another order move a few values by a step
    assert bit_parity(session, {k: expected[k] for k in ("image~nhwc", "relu1")}, sample) == []
    with pytest.raises(PlanError, match="Did you mean 'relu4'"):
        qcompiler.compile(MODEL, X86[-1], samples(1), keep_float=["relu44"])


def test_calibration_is_required_and_presets_are_named() -> None:
    with pytest.raises(DataError, match="^calibration data is needed to quantize"):
        qcompiler.compile(MODEL)
    with pytest.raises(PlanError, match="^unknown preset 'defualt'. Did you mean 'default'"):
        qcompiler.compile(MODEL, calibration=samples(1), preset="defualt")


# -- graphs that stress lowering: several outputs, shared inputs, views, halos that disagree ---------------------------------------------


def network(nodes: list[Any], outputs: list[str], shape: tuple[int, ...], constants: dict[str, np.ndarray], path: Path) -> Path:
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def weight(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def graphs(rng: np.random.Generator) -> dict[str, tuple[list[Any], list[str], tuple[int, ...], dict[str, np.ndarray]]]:
    node = helper.make_node
    conv = {"w3": weight(rng, 8, 3, 3, 3), "w1": weight(rng, 8, 8, 1, 1), "w5": weight(rng, 8, 8, 5, 5), "wd": weight(rng, 8, 1, 3, 3)}
    return {
        "two paddings of one value": (
            [node("Conv", ["x", "w3"], ["a"], pads=[1] * 4), node("Relu", ["a"], ["r"]), node("Conv", ["r", "w5"], ["b"], pads=[2] * 4),
             node("Conv", ["r", "wd"], ["c"], pads=[1] * 4, group=8), node("Add", ["b", "c"], ["y"])],
            ["y"], (1, 3, 9, 11), conv),
        "inner values are outputs": (
            [node("Conv", ["x", "w3"], ["a"], pads=[1] * 4), node("Relu", ["a"], ["r"]), node("Conv", ["r", "w1"], ["y"])],
            ["a", "r", "y"], (1, 3, 6, 6), conv),
        "a view between convolutions": (
            [node("Conv", ["x", "w3"], ["a"], pads=[1] * 4), node("Reshape", ["a", "flat"], ["f"]), node("Reshape", ["f", "image"], ["g"]),
             node("Conv", ["g", "w5"], ["y"], pads=[2] * 4)],
            ["y"], (1, 3, 6, 6), conv | {"flat": np.array([1, -1]), "image": np.array([1, 8, 6, 6])}),
        "the input twice, and as an output of a view": (
            [node("Conv", ["x", "w3"], ["a"], strides=[2, 2]), node("Flatten", ["x"], ["f"]), node("Flatten", ["a"], ["g"])],
            ["f", "g", "a"], (1, 3, 8, 8), conv),
        "concat, split and a float island": (
            [node("Conv", ["x", "w3"], ["a"], pads=[1] * 4), node("Concat", ["a", "x"], ["c"], axis=1), node("Split", ["c"], ["s", "t"], axis=1),
             node("Softmax", ["s"], ["p"], axis=1), node("Mul", ["p", "t"], ["m"]), node("GlobalAveragePool", ["m"], ["y"])],
            ["y"], (1, 3, 8, 8), {"w3": weight(rng, 7, 3, 3, 3)}),
        "batch of three": (
            [node("Conv", ["x", "w3"], ["a"], pads=[0, 1, 2, 0]), node("MaxPool", ["a"], ["p"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
             node("Conv", ["p", "wd"], ["y"], pads=[1] * 4, group=8)],
            ["y"], (3, 3, 10, 9), conv),
    }  # fmt: skip


@pytest.mark.parametrize("name", graphs(np.random.default_rng(0)))
@pytest.mark.parametrize("target", X86)
def test_small_graphs(name: str, target: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    nodes, outputs, shape, constants = graphs(rng)[name]
    path = network(nodes, outputs, shape, constants, tmp_path / "net.onnx")
    data = [{"x": rng.normal(size=shape).astype(np.float32)} for _ in range(8)]
    compilation = compile_stages(path, target, data)
    session = Session(compilation.artifact.save(tmp_path / "net.so"), threads=2)
    twin = Session(compile_float(path, target).save(tmp_path / "float.so"))
    reference = onnx.reference.ReferenceEvaluator(str(path))
    for sample in data[:3]:
        assert bit_parity(session, run(compilation.integer, sample, keep="all"), sample) == []
        exact = dict(zip(outputs, reference.run(None, sample), strict=True))
        for output, value in twin.run(sample).items():
            np.testing.assert_allclose(value, exact[output], atol=1e-4, rtol=1e-4)
        for output, value in session.run(sample).items():
            assert np.abs(value - exact[output]).max() < 0.1 * max(np.abs(exact[output]).max(), 0.1)


def test_real_network(real_data: Path, tmp_path: Path) -> None:
    """MobileNetV2 on random images: every value of the library equals the reference arithmetic."""
    rng = np.random.default_rng(0)
    data = [{"input": rng.normal(size=(1, 3, 224, 224)).astype(np.float32)} for _ in range(2)]
    compilation = compile_stages(real_data / "models" / "mobilenet_v2.onnx", "native", data)
    session = Session(compilation.artifact.save(tmp_path / "net.so"), threads=2)
    assert compilation.artifact.manifest["float_ops"] == []
    assert bit_parity(session, run(compilation.integer, data[0], keep="all"), data[0]) == []


@pytest.mark.filterwarnings("error")
def test_a_network_without_an_8_bit_operator(tmp_path: Path) -> None:
    path = network([helper.make_node("Exp", ["x"], ["y"])], ["y"], (1, 3, 4, 4), {}, tmp_path / "net.onnx")
    x = np.linspace(-1, 1, 48, dtype=np.float32).reshape(1, 3, 4, 4)
    compilation = compile_stages(path, "native", [{"x": x}])
    session = Session(compilation.artifact.save(tmp_path / "net.so"))
    np.testing.assert_allclose(session.run({"x": x})["y"], np.exp(x), rtol=1e-6)
    assert [entry["op"] for entry in compilation.artifact.manifest["float_ops"]] == ["Exp"]
    assert qcompiler.verify(tmp_path / "net.so", path, [{"x": x}]).passed


def test_a_lookup_never_leaves_its_table(tmp_path: Path) -> None:
    """ONNX says nothing of indices that are out of range; a library must not read foreign memory."""
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    info = helper.make_tensor_value_info("ids", TensorProto.INT64, [4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 2])
    graph = helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["y"])], "g", [info], [result], [numpy_helper.from_array(table, "table")])
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    artifact = qcompiler.compile(path, calibration=[{"ids": np.array([0, 1, -1, 5])}])
    session = Session(artifact.save(tmp_path / "net.so"))
    assert session.run({"ids": np.array([0, 1, -1, 5])})["y"].tolist() == table[[0, 1, -1, 5]].tolist()
    far = session.run({"ids": np.array([10**9, -(10**12), 6, -7])})["y"]
    assert {tuple(row) for row in far.tolist()} <= {tuple(row) for row in table.tolist()}


def test_an_interrupted_code_generation_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError  # what TVM makes of a Ctrl-C

    monkeypatch.setenv("QCOMPILER_CACHE", "off")  # other tests may have had the same code generated
    monkeypatch.setattr("tvm.tirx.build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_float(MODEL)


def test_a_misspelt_option_is_not_ignored() -> None:
    wrong: Any = {"prest": "fast"}
    with pytest.raises(TypeError, match="no keyword argument 'prest'. Did you mean 'preset'"):
        qcompiler.compile(MODEL, calibration=samples(1), **wrong)
