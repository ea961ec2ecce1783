"""The example network through the whole command line: compiled, verified, measured, inspected, run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.cli.demo import MODEL, THRESHOLDS, demo, demo_data, demo_text
from qcompiler.cli.main import main


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return demo(tmp_path_factory.mktemp("demo") / "digits.so", seconds=0.1)


@pytest.fixture(scope="module")
def files(result: dict[str, Any]) -> Path:
    """The folder with digits.so, and the evaluation data as files beside it."""
    folder = Path(result["output"]).parent
    _, evaluation, labels = demo_data()
    np.savez(folder / "images.npz", image=np.concatenate([s["image"] for s in evaluation[:64]]))
    np.save(folder / "labels.npy", labels[:64])
    np.save(folder / "one.npy", evaluation[0]["image"])
    return folder


def test_demo_passes_and_says_so(result: dict[str, Any]) -> None:
    report = result["parity"]
    assert report.passed, report.failures
    assert report.thresholds == THRESHOLDS
    assert report.samples == 500
    assert report.float_accuracy >= 0.97
    text = demo_text(result)
    assert "PASSED" in text
    assert "times as fast" in text


def test_every_layer_is_int8_and_compared(result: dict[str, Any]) -> None:
    rows = result["parity"].layers
    assert sum(row.dtype == "int8" for row in rows) >= 10
    assert all(row.metrics.sqnr_db > 15 for row in rows), [(r.name, r.metrics.sqnr_db) for r in rows]


def test_verify_exits_0_and_1(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "verify",
        str(files / "digits.so"),
        "--model",
        str(MODEL),
        "--data",
        str(files / "images.npz"),
        "--labels",
        str(files / "labels.npy"),
    ]
    assert main([*words, "--min-agreement", "0.95", "--max-accuracy-drop", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["samples"] == 64
    assert document["int8_accuracy"] >= 0.95
    assert main([*words, "--min-sqnr", "200"]) == 1
    assert "FAILED: output 'logits': SQNR" in capsys.readouterr().out


def test_verify_of_another_model_is_refused(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    model = onnx.load(str(MODEL))
    model.graph.output[0].name = model.graph.node[-1].output[0] = "scores"
    onnx.save(model, tmp_path / "other.onnx")
    assert main(["verify", str(files / "digits.so"), "--model", str(tmp_path / "other.onnx"), "--data", str(files / "images.npz")]) == 2
    assert "was not compiled from" in capsys.readouterr().err


def test_bench_inspect_and_run(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = str(files / "digits.so")
    assert main(["bench", library, "--model", str(MODEL), "--seconds", "0.1", "--layers", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["seconds"]) == {"int8", "float"}
    assert all(step["seconds"] > 0 for step in document["steps"])
    assert main(["inspect", library, "--json"]) == 0
    operators = json.loads(capsys.readouterr().out)["operators"]
    assert all(o["dtype"] == "int8" or o["reason"] or o["op"] in ("qc.dequantize", "qc.dense", "qc.matmul") for o in operators), operators
    assert main(["inspect", library]) == 0
    assert "qc.conv2d" in capsys.readouterr().out
    assert main(["run", library, "--input", f"image={files / 'one.npy'}", "--output", str(tmp_path / "out.npz")]) == 0
    assert np.load(tmp_path / "out.npz")["logits"].argmax() == demo_data()[2][0]


def test_compile_by_command_gives_the_demo_s_bytes(files: Path, tmp_path: Path) -> None:
    calibration, _, _ = demo_data()
    np.save(tmp_path / "c.npy", np.concatenate([s["image"] for s in calibration]))
    words = ["compile", str(MODEL), "--calibration", str(tmp_path / "c.npy"), "--output", str(tmp_path / "digits.so"), "--json"]
    assert main(words) == 0
    assert (tmp_path / "digits.so").read_bytes() == (files / "digits.so").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("compile {text} --calibration {data} --output {out}", "ONNX"),
        ("compile {none} --calibration {data} --output {out}", "none.onnx"),
        ("compile {model} --calibration {none} --output {out}", "no such file or folder"),
        ("compile {model} --calibration {data} --output {out} --target x86-avx3", "Did you mean"),
        ("verify {text} --model {model} --data {data}", "text"),
        ("bench {text}", "text"),
    ],
)
def test_bad_input_is_one_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    (tmp_path / "text.onnx").write_text("hello, this is no network")
    places = {
        "model": MODEL,
        "data": files / "images.npz",
        "text": tmp_path / "text.onnx",
        "none": tmp_path / "none.onnx",
        "out": tmp_path / "x.so",
    }
    assert main([w.format_map(places) for w in words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert [p.name for p in tmp_path.iterdir()] == ["text.onnx"]
