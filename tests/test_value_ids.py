"""Names of a file can't imitate those that the compiler makes: a network whose tensors are called so compiles to the same, and is reported in its own words."""

from __future__ import annotations

import ast
import doctest
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_nets import OnnxNet, agrees

import qcompiler
from qcompiler.backend.build import session_of
from qcompiler.base import value_ids
from qcompiler.base.value_ids import Naming
from qcompiler.cli.main import main
from qcompiler.exporters.export_onnx import export_onnx
from qcompiler.importers.model import load
from qcompiler.verification.parity import verify

NASTY = {  # of tensors and nodes
    "input0": "in~q",
    "stem": "v",
    "pool": "v~padded",
    "left": "v~nhwc",
    "right": "v~moved",
    "sum": "v~padded~1",
    "flat": "v~output",
    "gate": "v~accumulated",
    "scores": "v~nhwc~1",
    "soft": "v~dq",
    "last": "v~~weight",
    "node_": "v~padded/",
}


def plain_net() -> onnx.ModelProto:
    """Values that lowering copies beside themselves (read by a padded convolution and by float operators), that layout moves, and that end in float."""
    net = OnnxNet()
    x = net.input("input0", 1, 3, 9, 9)

    def named(name: str, op: str, *inputs: str, **attrs: object) -> str:
        net.nodes.append(onnx.helper.make_node(op, list(inputs), [name], name=f"node_{name}", **attrs))
        return name

    stem = named("stem", "Relu", net.op("Conv", x, net.weight(5, 3, 3, 3), net.weight(5), pads=[1, 1, 1, 1]))
    pool = named("pool", "MaxPool", stem, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    left = named("left", "Conv", pool, net.weight(5, 5, 3, 3), pads=[1, 1, 1, 1])
    right = named("right", "Conv", stem, net.weight(5, 5, 3, 3), net.weight(5), pads=[1, 1, 1, 1])
    total = named("sum", "Add", left, right)
    flat = named("flat", "Flatten", total)
    gate = named("gate", "Elu", net.op("Gemm", flat, net.weight(405, 8), net.weight(8)), alpha=0.5)
    soft = named("soft", "Softmax", net.op("Conv", total, net.weight(4, 5, 3, 3), pads=[1, 1, 1, 1]), axis=1)
    scores = named("scores", "Mul", gate, net.op("ReduceMean", named("last", "Sigmoid", stem), axes=[1, 2, 3], keepdims=0))
    return net.proto([scores, soft, total])


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network in nasty words."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    for node in graph.node:
        node.name = node.name.replace("node_", NASTY["node_"])
        for tensors in (node.input, node.output):
            tensors[:] = [NASTY.get(t, t) for t in tensors]
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = NASTY.get(value.name, value.name)
    return model


def in_nasty_words(text: str) -> str:
    """What is said of the plain network, as it has to be said of the other one."""
    text = text.replace("~", "~~~")
    for plain, nasty in NASTY.items():
        text = re.sub(rf"node_{plain}\b", f"{NASTY['node_']}{plain}", text)
        text = re.sub(rf"(?<![\w/]){plain}(?![a-z0-9])", nasty, text) if plain != "node_" else text.replace("node_", nasty)
    return text


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("names"), plain_net()
    onnx.save(model, folder / "plain.onnx")
    onnx.save(renamed(model), folder / "nasty.onnx")
    return {kind: folder / f"{kind}.onnx" for kind in ("plain", "nasty")}


def samples(name: str) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [{name: rng.standard_normal((1, 3, 9, 9)).astype(np.float32)} for _ in range(6)]


def words(text: str) -> list[str]:
    """Widths of columns depend on names."""
    return text.split()


def test_examples() -> None:
    assert doctest.testmod(value_ids).failed == 0 and doctest.testmod(value_ids).attempted


@pytest.mark.parametrize("names", [["x"], ["x~", "y"], ["a~~b", "~~~"], ["", "~padded"], ["x~1~2"]])
def test_what_is_made_is_read_back_and_nothing_else(names: list[str]) -> None:
    naming = Naming.beside(names)
    assert Naming.of(naming.attributes()) == naming
    for name in names:
        assert naming.split(name) == (name, "")
        once = naming.made(name, "padded")
        twice = naming.made(once, 1)
        assert naming.split(once) == (name, "padded") and naming.split(twice) == (once, "1")
        assert naming.nearest(twice, {name}) == name and naming.nearest(twice, {once, name}) == once and naming.nearest(twice, ()) == name
        assert once not in names


def test_imports_right(files: dict[str, Path]) -> None:
    model = agrees(files["nasty"])
    assert model.naming.mark == "~~~"
    assert model.source("v~padded") == ("v~padded/pool", "MaxPool") and model.source("v~padded~~~q") == ("v~padded/pool", "MaxPool")
    assert load(files["plain"]).naming.mark == "~"


@pytest.mark.parametrize("preset", ["default", "accurate"])
def test_compiles_to_the_same_network(files: dict[str, Path], preset: str, tmp_path: Path) -> None:
    """Outputs, every layer, what `inspect` and `verify` say of each."""
    results, steps, rows = {}, {}, {}
    for kind, path in files.items():
        source = NASTY["input0"] if kind == "nasty" else "input0"
        artifact = qcompiler.compile(path, target="native", calibration=samples(source), preset=preset)
        steps[kind] = [(s["id"], s["op"], s.get("auxiliary", False)) for s in artifact.manifest["steps"]]
        with session_of(artifact) as session:
            results[kind] = session.run(samples(source)[0])
        report = verify(artifact.save(tmp_path / f"{kind}.so"), path, samples(source), layer_samples=4)
        rows[kind] = [(r.name, r.dtype, r.metrics.sqnr_db) for r in [*report.outputs, *report.layers]]
    assert [in_nasty_words(k) for k in results["plain"]] == list(results["nasty"])
    for a, b in zip(results["plain"].values(), results["nasty"].values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(auxiliary and "~padded" in id for id, _, auxiliary in steps["plain"]), "the network has what a name could imitate"
    assert [(in_nasty_words(id), *rest) for id, *rest in steps["plain"]] == [(id, *rest) for id, *rest in steps["nasty"]]
    assert [(in_nasty_words(id), *rest) for id, *rest in rows["plain"]] == rows["nasty"] and len(rows["nasty"]) > 8


def test_layers_are_kept_in_float_by_name(files: dict[str, Path]) -> None:
    """By the name of a value, and by that of a node."""
    for keep in ({"left"}, {"node_right"}):
        plain = qcompiler.compile(files["plain"], target="native", calibration=samples("input0"), preset="fast", keep_float=list(keep))
        nasty = [in_nasty_words(k) for k in keep]
        other = qcompiler.compile(files["nasty"], target="native", calibration=samples("in~q"), preset="fast", keep_float=nasty)
        for manifest in (plain.manifest, other.manifest):
            assert sum(s["op"] == "qc.f32.conv2d" for s in manifest["steps"]) == 1
        assert [in_nasty_words(s["id"]) for s in plain.manifest["steps"]] == [s["id"] for s in other.manifest["steps"]]


def test_explain_and_inspect_say_the_same(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for kind, path in files.items():
        folder = tmp_path / kind
        folder.mkdir()
        name = NASTY["input0"] if kind == "nasty" else "input0"
        np.savez(folder / "data.npz", **{name: np.concatenate([s[name] for s in samples(name)])})
        assert main(["explain", str(path), "--calibration", str(folder / "data.npz"), "--target", "native", "--preset", "fast"]) == 0
        explained = capsys.readouterr().out
        library = qcompiler.compile(path, target="native", calibration=samples(name), preset="fast").save(tmp_path / f"{kind}.so")
        assert main(["inspect", str(library), "--json"]) == 0
        steps = json.loads(capsys.readouterr().out)["operators"]
        said[kind] = words(explained), [(s["id"], s["op"], s["dtype"], s["reason"]) for s in steps]
    assert words(in_nasty_words(" ".join(said["plain"][0]))) == said["nasty"][0]
    assert [(in_nasty_words(id), *rest) for id, *rest in said["plain"][1]] == said["nasty"][1]


def test_exports_right(files: dict[str, Path], tmp_path: Path) -> None:
    """The exported networks are the same, and ONNX Runtime computes the same with them."""
    runtime, results = pytest.importorskip("onnxruntime"), {}
    for kind, path in files.items():
        name = NASTY["input0"] if kind == "nasty" else "input0"
        export = export_onnx(path, tmp_path / f"{kind}-qdq.onnx", samples(name), preset="fast")
        session = runtime.InferenceSession(str(tmp_path / f"{kind}-qdq.onnx"))
        results[kind] = export, session.run(None, samples(name)[0])
    (plain, ours), (nasty, theirs) = results["plain"], results["nasty"]
    assert {in_nasty_words(k): v for k, v in plain.values.items()} == nasty.values and plain.weighted == nasty.weighted > 2
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_exported_network_comes_back(files: dict[str, Path], tmp_path: Path) -> None:
    """Its tensors have the names that an export made, its integers those that an import would make."""
    results = []
    for kind, path in files.items():
        name = NASTY["input0"] if kind == "nasty" else "input0"
        exported = tmp_path / f"{kind}.onnx"
        export_onnx(path, exported, samples(name), preset="fast")
        assert load(exported).naming.mark == ("~~" if kind == "plain" else "~~~~")
        with session_of(qcompiler.compile(exported, target="native", calibration=samples(name), preset="fast")) as session:
            results.append(list(session.run(samples(name)[0]).values()))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def marks(path: Path) -> list[int]:
    """Lines with a text, or a piece of an f-string, that starts with the mark."""
    constants = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Constant)]
    return [n.lineno for n in constants if isinstance(n.value, str) and n.value.startswith("~")]


def test_one_file_knows_the_mark(root: Path) -> None:
    files = [p for folder in ("qcompiler", "passes", "schedules") for p in sorted((root / folder).rglob("*.py"))]
    assert {p.relative_to(root).as_posix() for p in files if marks(p)} == {"qcompiler/base/value_ids.py"}
