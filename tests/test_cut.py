"""Networks that are cut at values of their own (`outputs`), and the offer of those where a tail can't be compiled."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

import qcompiler
from qcompiler.base.errors import ModelError
from qcompiler.cli.main import main
from qcompiler.importers.model import load
from qcompiler.importers.origin import origin_of
from tests.onnx_nets import OnnxNet


def detector(path: Path, tail: str) -> tuple[str, str]:
    """Boxes and scores, then a tail whose shapes depend on data. Returns the names of both."""
    net = OnnxNet()
    x = net.op("Relu", net.op("Conv", net.input("x", 1, 3, 8, 8), net.weight(8, 3, 3, 3), pads=[1, 1, 1, 1]))
    rows = net.op("Transpose", net.op("Reshape", net.op("Conv", x, net.weight(6, 8, 1, 1)), net.ints(1, 6, 64)), perm=[0, 2, 1])
    boxes = net.op("Slice", rows, net.ints(0), net.ints(4), net.ints(2), name="all boxes ")
    scores = net.op("Sigmoid", net.op("Transpose", net.op("Slice", rows, net.ints(4), net.ints(6), net.ints(2)), perm=[0, 2, 1]))
    threshold = net.input("threshold", 1)
    if tail == "NonMaxSuppression":
        found = net.op(tail, boxes, scores, net.ints(5), net.const([0.5]), threshold)
        last = net.op("GatherND", scores, found)
    else:
        found = net.op("NonZero", net.op("Greater", scores, threshold))
        last = net.op("Gather", net.op("Identity", boxes), net.op("Gather", found, net.ints(2)), axis=1)
    net.save(path, [last])
    return boxes, scores


@pytest.mark.parametrize("tail", ["NonMaxSuppression", "NonZero"])
def test_the_offer_compiles(tail: str, tmp_path: Path) -> None:
    """What the refusal offers is taken as it stands, and is what ONNX Runtime computes there; the input that only the tail reads is gone."""
    path = tmp_path / "net.onnx"
    detector(path, tail)
    with pytest.raises(ModelError, match=f"\\({tail}\\).*--outputs ") as refused:
        load(path)
    text = str(refused.value)
    names = shlex.split(text[text.index("--outputs ") + 10 : text.index(" (in Python outputs=")])
    model = load(origin_of(path, names))
    assert [o.name for o in model.outputs] == names and [i.name for i in model.inputs if i.name == "x"] == ["x"]
    samples = [{i.name: np.random.default_rng(n).standard_normal(i.shape).astype(np.float32) for i in model.inputs} for n in range(4)]
    artifact = qcompiler.compile(path, calibration=samples, outputs=names, preset="fast")
    library = artifact.save(tmp_path / "net.so")
    report = qcompiler.verify(library, path, samples)
    assert report.imported is not None and report.imported.status == "equal" and artifact.manifest["cut"] == names
    whole = onnx.load(path)
    whole.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    feeds = {"x": samples[0]["x"], "threshold": np.array([0.5], np.float32)}
    wanted = onnxruntime.InferenceSession(whole.SerializeToString()).run(names, feeds)
    got = qcompiler.Session(library).run(samples[0])
    for name, array in zip(names, wanted, strict=True):
        if array.dtype == np.float32:
            assert 10 * np.log10((array**2).sum() / ((got[name] - array) ** 2).sum()) > 25


def test_many_values_are_cut_where_they_come_from(tmp_path: Path) -> None:
    """A tail that takes classes one at a time, at two levels: few names are offered, behind the last layer, that tell it all that it reads."""
    net, classes = OnnxNet(), 5
    image, found = net.input("x", 1, 3, 8, 8), []
    x = net.op("Relu", net.op("Conv", image, net.weight(8, 3, 3, 3), pads=[1, 1, 1, 1]))
    for _ in range(2):
        x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        rows = net.op("Transpose", net.op("Conv", x, net.weight(4 + classes, 8, 1, 1)), perm=[0, 2, 3, 1])
        corners = net.op("Add", net.op("Slice", rows, net.ints(0), net.ints(4), net.ints(3)), net.const([1.0]))
        scores = net.op("Softmax", net.op("Slice", rows, net.ints(4), net.ints(4 + classes), net.ints(3)), axis=-1)
        for c in range(classes):
            score = net.op("Slice", scores, net.ints(c), net.ints(c + 1), net.ints(3))
            kept = net.op("NonZero", net.op("Greater", score, net.const([0.3])))
            found += [net.op("GatherND", net.op("Mul", corners, score), net.op("Transpose", kept, perm=[1, 0]))]
    logits = net.op("GlobalAveragePool", x)
    path = tmp_path / "net.onnx"
    net.save(path, [net.op("Concat", *found, axis=0), logits])
    with pytest.raises(ModelError) as refused:
        load(path)
    text = str(refused.value)
    names = shlex.split(text[text.index("--outputs ") + 10 : text.index(" (in Python outputs=")])
    assert len(names) == 3 and logits in names
    assert text.count("(NonZero)") == 3 and f" and {2 * classes - 3} nodes more: the shape of its result" in text
    assert [o.name for o in load(origin_of(path, names)).outputs] == names
    tail = onnx.utils.Extractor(onnx.load(path)).extract_model(names, [o.name for o in onnx.load(path).graph.output])
    assert not {node.op_type for node in tail.graph.node} & {"Conv", "MaxPool"}


def test_numbers_are_offered_before_comparisons(tmp_path: Path) -> None:
    """A tail that reads only which numbers passed two thresholds; beside it one that reads what tells only true from false at the input."""
    net = OnnxNet()
    x = net.op("Conv", net.input("x", 1, 3, 8, 8), net.weight(2, 3, 1, 1))
    scores, sizes = (net.op("Sigmoid", net.op("Slice", x, net.ints(i), net.ints(i + 1), net.ints(1))) for i in range(2))
    passed = net.op("And", net.op("Greater", scores, net.const([0.3])), net.op("Less", sizes, net.const([0.7])))
    at = net.op("NonZero", net.op("Reshape", passed, net.ints(-1)))
    path = net.save(tmp_path / "net.onnx", [at, net.op("NonZero", net.op("Greater", "x", net.const([0.0]))), net.op("Relu", x)])
    with pytest.raises(ModelError) as refused:
        load(path)
    text = str(refused.value)
    names = shlex.split(text[text.index("--outputs ") + 10 : text.index(" (in Python outputs=")])
    assert [o.dtype for o in load(origin_of(path, names)).outputs].count("bool") == 1


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.onnx"
    boxes, scores = detector(path, "NonMaxSuppression")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((4, 1, 3, 8, 8)).astype(np.float32))
    command = ["compile", str(path), "--calibration", str(tmp_path / "data.npz"), "-o", str(tmp_path / "net.so"), "--preset", "fast", "--json"]
    assert main([*command, "--outputs", scores, boxes]) == 0
    assert [o.name for o in qcompiler.Session(tmp_path / "net.so").outputs] == [scores, boxes]
    assert main([*command, "--outputs", "boxes"]) == 2
    assert "no operator computes 'boxes'" in capsys.readouterr().err


BAD = [("x", "'x' is an input or a constant"), ("inner", "'inner' is inside of a subgraph"), ("node_y", "no operator computes 'node_y'")]


@pytest.mark.parametrize(("name", "message"), BAD)
def test_names_that_are_no_value(name: str, message: str, tmp_path: Path) -> None:
    helper = onnx.helper
    branch = helper.make_graph([helper.make_node("Neg", ["x"], ["inner"])], "b", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [2])])
    node = helper.make_node("If", ["c"], ["y"], name="node_y", then_branch=branch, else_branch=branch)
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]), helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    graph = helper.make_graph([node], "g", ports, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])])
    with pytest.raises(ModelError, match=message):
        load(origin_of(helper.make_model(graph), [name]))
