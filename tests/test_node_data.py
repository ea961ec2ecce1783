"""Node data for Model Explorer: it names tensors of the model file, and says of each what the commands print; an exported model for viewers, with names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.cli.node_data import node_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", np.stack([s["image"] for s in demo_data()[0][:8]]))
    return tmp_path / "x.npy"


def tensors() -> set[str]:
    graph = onnx.load(str(MODEL)).graph
    return {name for node in graph.node for name in node.output} | {i.name for i in graph.input}


def written(path: Path) -> dict[str, float]:
    document: dict[str, Any] = json.loads(path.read_text())
    assert set(document) == {"results", "gradient"} and [g["stop"] for g in document["gradient"]] == [0.0, 0.5, 1.0]
    return {name: result["value"] for name, result in document["results"].items()}


def test_explain_writes_estimates_or_sensitivities(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", str(MODEL), "--calibration", str(data), "--preset", "fast", "--json", "--quiet", "--node-data", str(tmp_path / "n.json")]
    assert main(words) == 0
    plan, values = json.loads(capsys.readouterr().out)["edges"], written(tmp_path / "n.json")
    assert {name for name in values if "~" not in name} <= tensors() and len(values) > 10
    assert all(
        value == pytest.approx(min(float(plan[name]["sqnr"]), 100.0), abs=0.01) for name, value in values.items() if isinstance(plan[name]["sqnr"], float)
    )
    assert main([*words, "--sensitivity"]) == 0
    layers = json.loads(capsys.readouterr().out)["sensitivity"]["layers"]
    assert written(tmp_path / "n.json").keys() <= {row["id"] for row in layers} and layers == sorted(layers, key=lambda r: -r["gain_db"])


def test_verify_writes_what_it_measured(digits: Callable[[str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", str(digits("native")), "--model", str(MODEL), "--data", str(data), "--quiet", "--json", "--node-data", str(tmp_path / "v.json")]
    assert main(words) == 0
    measured = {row["name"]: row["metrics"]["sqnr_db"] for row in json.loads(capsys.readouterr().out)["layers"]}
    found = written(tmp_path / "v.json")
    assert found and all(found[name] == pytest.approx(min(float(measured[name]), 100.0), abs=0.01) for name in found)
    assert main([*words, "--layer-samples", "0"]) == 2
    assert "--layer-samples 0 compares none" in capsys.readouterr().err


def test_what_is_no_number_is_left_out() -> None:
    values = [("a", 20.0), ("b", float("inf")), ("c", float("nan")), ("d", float("-inf"))]
    assert {k: v["value"] for k, v in node_data(values)["results"].items()} == {"a": 20.0, "b": 100.0}


def test_the_exported_model_shows_names_and_scales(data: Path, tmp_path: Path) -> None:
    """As a viewer shows it: every node has a name, layers keep theirs, and every quantizer has its scale and zero point as named constants."""
    assert main(["export-onnx", str(MODEL), "--calibration", str(data), "--preset", "fast", "--quiet", "-o", str(tmp_path / "q.onnx")]) == 0
    graph, source = onnx.load(str(tmp_path / "q.onnx")).graph, onnx.load(str(MODEL)).graph
    constants = {i.name for i in graph.initializer}
    assert all(node.name for node in graph.node)
    assert {n.name for n in source.node if n.op_type == "Conv"} <= {n.name for n in graph.node}
    quantizers = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert quantizers and all(set(n.input[1:3]) <= constants for n in quantizers)
