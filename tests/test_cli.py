"""The command line, with the compiler and the runtime replaced by small fakes: what it passes on, prints, and returns."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler.base.debug import Dumper, plain_json
from qcompiler.base.errors import DataError, ModelError, OutputError
from qcompiler.base.files import replacing
from qcompiler.base.progress import Lines, silent, terminal_progress
from qcompiler.base.tensor import TensorInfo
from qcompiler.cli import bench as cli_bench
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.numerics.metrics import Accumulator
from qcompiler.runtime.bench import Neighbours, Timing, interleave, random_inputs, ratios
from qcompiler.verification import footprint
from qcompiler.verification.compared import Compared
from qcompiler.verification.evidence import StepTime
from qcompiler.verification.parity import Check, ParityReport, Thresholds

MANIFEST: dict[str, Any] = {
    "format": 1,
    "target": "x86-avx2",
    "features": ["avx2", "fma"],
    "inputs": [{"name": "x", "shape": [1, 2], "dtype": "float32"}],
    "outputs": [{"name": "y", "shape": [1, 2], "dtype": "float32"}],
    "steps": [
        {"id": "conv1", "op": "qc.conv2d", "kernel": "x86-avx2/conv2d", "macs": 1500000},
        {"id": "conv1~halo", "op": "fill_halo", "kernel": "any/fill", "macs": 0, "auxiliary": True},
        {"id": "y", "op": "float", "kernel": "any/legalized", "macs": 0},
    ],
    "layouts": {"conv1": {"storage": "uint8"}, "conv1~halo": {"storage": "uint8"}, "y": {"storage": "float32"}},
    "values": {"conv1": {"dtype": "int8", "scale": 0.5, "zero_point": 3}},
    "operators": {"int8": 1, "float": 1},
    "sqnr_db": 21.5,
    "float_ops": [{"id": "y", "op": "relax.nn.softmax", "reason": "softmax stays in float"}],
}


class FakeArtifact:
    imported = None
    manifest = MANIFEST
    size = 12345

    def save(self, path: Path) -> Path:
        Path(path).write_bytes(b"library")
        return Path(path)


class FakeSession:
    """y = 2 x."""

    def __init__(self, path: str, threads: int = 1) -> None:
        self.inputs, self.outputs = ([TensorInfo(n, (1, 2), "float32")] for n in "xy")
        self.manifest, self.path = MANIFEST, path

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "x" not in inputs:
            raise DataError("input 'x' is missing")
        return {"y": inputs["x"] * 2}

    def profile(self, inputs: Mapping[str, np.ndarray], iterations: int) -> list[tuple[str, str, str, float]]:
        return [("conv1", "qc.conv2d", "x86-avx2/conv2d", 3e-6), ("y", "float", "any/legalized", 1e-6)]


def report(sqnr_error: float) -> ParityReport:
    total = Accumulator()
    total.add(np.ones(4) + sqnr_error, np.ones(4))
    check = Check("min_sqnr", 20.0 if sqnr_error < 0.1 else 5.0, sqnr_error < 0.1, "output 'y': SQNR is below 10 dB")
    return ParityReport(1, 1, [Compared("y", "float32", total.metrics())], [], Thresholds(min_sqnr=10), checks=[check])


@pytest.fixture()
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Replaces the API; the list records (function, arguments)."""
    made: list[Any] = []

    def compile(*args: Any, **kwargs: Any) -> FakeArtifact:
        made.append(("compile", args, kwargs))
        return FakeArtifact()

    def verify(*args: Any, **kwargs: Any) -> ParityReport:
        made.append(("verify", args, kwargs))
        return report(0.01 if kwargs["min_sqnr"] is None else 0.9)

    monkeypatch.setattr(qcompiler, "compile", compile, raising=False)
    monkeypatch.setattr(qcompiler, "verify", verify, raising=False)
    monkeypatch.setattr(qcompiler, "load", FakeSession, raising=False)
    monkeypatch.chdir(tmp_path)
    return made


# -- verbs -------------------------------------------------------------------------------------------------------------------------


def test_compile_passes_every_option_on(calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "compile m.onnx --target x86-avx2 --calibration c.npz --output m.so --input-shape a:0=1,3,8,8 --input-shape b=4"
    words += " --preprocess p.yaml --tuning-log logs --preset accurate --dump-dir dump --keep-float a --keep-float b"
    words += " --enable shift --disable ranges --disable equalize --targets-file t.yaml --samples 7 --quiet"
    assert main(words.split()) == 0
    (_, args, kwargs) = calls[0]
    assert args == ("m.onnx", "x86-avx2", "c.npz")
    assert kwargs == {
        "input_shapes": {"a:0": (1, 3, 8, 8), "b": (4,)}, "preprocess": "p.yaml",
        "tuning_log": "logs", "preset": "accurate", "enable": ["shift"], "disable": ["ranges", "equalize"], "keep_float": ["a", "b"],
        "targets_file": "t.yaml", "dump_dir": "dump", "max_samples": 7, "progress": silent,
    }  # fmt: skip
    out, err = capsys.readouterr()
    assert (tmp_path / "m.so").read_bytes() == b"library"
    assert (out, err) == ("", "")


def test_compile_says_what_it_made(calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("compile m.onnx --calibration c.npz -o m.so".split()) == 0
    out, err = capsys.readouterr()
    said = ["m.so: 12.3 kB for x86-avx2", "1 of 2 operators in int8; SQNR of the outputs about 21.50 dB on calibration samples"]
    said += ["y (relax.nn.softmax) stays float: softmax stays in float"]
    assert out.splitlines() == [*said, "Next: qcompiler verify m.so --model m.onnx --data DATA; qcompiler bench m.so --model m.onnx"]
    assert err == ""


def test_compile_defaults(calls: list[Any]) -> None:
    assert main("compile m.onnx --calibration c.npz --output m.so".split()) == 0
    assert calls[0][1] == ("m.onnx", "native", "c.npz") and set(calls[0][2]) == {"progress"}


def test_an_output_that_cannot_be_written_is_found_before_the_work(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("compile m.onnx --calibration c.npz --output no/such/m.so".split()) == 2
    assert calls == []
    assert capsys.readouterr().err == "error: no/such/m.so: the folder no/such does not exist; make it first\n"


def test_verify_exit_status_is_the_verdict(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = "verify m.so --model m.onnx --data d --preprocess p.yaml --labels l.tsv --min-agreement 0.9 --max-accuracy-drop 1.5"
    assert main(words.split()) == 0
    _, args, kwargs = calls[0]
    assert (args[0].path, *args[1:]) == ("m.so", "m.onnx", "d")
    assert (kwargs["labels"], kwargs["preprocess"], kwargs["min_agreement"], kwargs["max_accuracy_drop"]) == ("l.tsv", "p.yaml", 0.9, 1.5)
    assert "PASSED" in capsys.readouterr().out
    assert main([*words.split(), "--min-sqnr", "10"]) == 1
    assert calls[1][2]["min_sqnr"] == 10.0
    assert "FAILED: output 'y'" in capsys.readouterr().out
    assert main([*words.split(), "--min-sqnr", "10", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_run_writes_the_outputs(calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("x.npy", np.array([[1, 2]], np.float32))
    assert main("run m.so --input x=x.npy --output out.npz --json".split()) == 0
    assert np.load("out.npz")["y"].tolist() == [[2, 4]]
    assert json.loads(capsys.readouterr().out)["arrays"] == {"y": {"shape": [1, 2], "dtype": "float32"}}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npz", "x.npy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run m.so --input x=none.npy --output out.npz", "none.npy: can't be read as .npy: No such file or directory"),
        ("run m.so --input x=text.npy --output out.npz", "text.npy: can't be read as .npy:"),
        ("run m.so --input z=x.npy --output out.npz", "input 'x' is missing"),
        ("run m.so --input x=x.npy --input x=x.npy --output out.npz", "--input x is given twice"),
        ("run m.so --input x=x.npy --output out.txt", "outputs are written as .npz"),
        ("run m.so --input x=x.npy --output .", "is a directory"),
        ("compile m.onnx --calibration x.npy --output /dev/null", "is a device or a pipe"),
        ("bench m.so --against onnxruntime", "--against needs --model"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    np.save("x.npy", np.array([[1, 2]], np.float32))
    Path("text.npy").write_text("hello")
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.npy", "x.npy"]


@pytest.mark.parametrize(
    "words",
    [
        "", "compil m.onnx", "compile", "compile m.onnx --calibration c --output m --input-shape x=1,a",
        "compile m.onnx --calibration c --output m --input-shape x=0", "compile m.onnx --calibration c --output m --preset best",
        "run m.so --input x --output o.npz", "bench m.so --threads 0", "bench m.so --model m --against tensorflow",
    ],
)  # fmt: skip
def test_usage_errors_exit_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_errors_of_the_compiler_leave_nothing_behind(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ModelError("m.onnx: not an\n ONNX file")

    words = "compile m.onnx --calibration c.npz --output m.so".split()
    monkeypatch.setattr(qcompiler, "compile", fail, raising=False)
    assert main(words) == 2
    assert capsys.readouterr().err == "error: m.onnx: not an ONNX file\n"
    monkeypatch.setenv("QCOMPILER_TRACEBACK", "1")
    assert main(words) == 2
    assert "Traceback" in capsys.readouterr().err

    for interruption in (KeyboardInterrupt, RuntimeError):  # TVM's passes turn a Ctrl-C into a RuntimeError without text

        def interrupt(*args: Any, kind: type[BaseException] = interruption, **kwargs: Any) -> Any:
            raise kind

        monkeypatch.setattr(qcompiler, "compile", interrupt, raising=False)
        assert main(words) == 130
        assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_bench_against_nothing_prints_times_and_layers(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("bench m.so --seconds 0 --layers".split()) == 0
    out = capsys.readouterr().out
    assert "int8" in out
    assert "x86-avx2/conv2d" in out
    assert "75.00 %" in out
    assert main("bench m.so --seconds 0 --json".split()) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ratio to int8"] == {"int8": 1.0}
    assert document["seconds"]["int8"]["rounds"] == 10 and document["footprint"] == {}


def test_bench_as_csv_and_as_a_trace(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("bench m.so --duration 0s --warmup 0 --layers --csv --trace t.json".split()) == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows == [
        ["value", "operator", "kernel", "int8_us", "float_us"],
        ["conv1", "qc.conv2d", "x86-avx2/conv2d", "3.00", ""],
        ["y", "float", "any/legalized", "1.00", ""],
    ]
    events = json.loads(Path("t.json").read_text())["traceEvents"]
    assert [(e["name"], e["ph"], e.get("ts"), e.get("dur")) for e in events] == [
        ("process_name", "M", None, None), ("conv1", "X", 0, pytest.approx(3)), ("y", "X", pytest.approx(3), pytest.approx(1)),
    ]  # fmt: skip


def test_bench_says_where_int8_loses() -> None:
    steps = [StepTime("a", "qc.conv2d", "k", 5e-6, 2e-6), StepTime("b", "qc.dense", "k", 2e-6, 4e-6), StepTime("c", "qc.copy", "k", 9e-6, None)]
    said = cli_bench._not_faster(1.25, steps)
    assert said.startswith(
        "int8 is not faster than float here: it takes 1.25 of its time. Layers that are slower in int8: a (5.0 us, in float 2.0). --keep-float"
    )
    assert "No single layer is slower" in cli_bench._not_faster(1.25, steps[1:])


def test_timings_are_percentiles_of_all_calls() -> None:
    timing = Timing.of("x", [float(i) for i in range(100, 0, -1)])
    assert (timing.minimum, timing.mean, timing.median, timing.p90, timing.p99, timing.rounds) == (1, 50.5, 50.5, 90, 99, 100)


def test_neighbours_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Neighbours().cores()
    assert found is None or found >= 0
    moments = iter([(0.0, 10.0, 1.0), (2.0, 13.0, 2.0)])
    monkeypatch.setattr(Neighbours, "_now", staticmethod(lambda: next(moments)))
    assert Neighbours().cores() == 1.0


def test_bench_against_others_in_both_types(digits: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the float network and ONNX Runtime, float and as its own quantizer makes it of the same data."""
    pytest.importorskip("onnxruntime")
    np.save(tmp_path / "x.npy", np.stack([s["image"] for s in demo_data()[0][:4]]))
    words = ["bench", str(digits("native")), "--model", str(MODEL), "--data", str(tmp_path / "x.npy"), "--seconds", "0", "--quiet", "--json", "--layers"]
    assert main([*words, "--against", "onnxruntime"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["ratio to float"]) == ["int8", "float", "onnxruntime float", "onnxruntime int8"] and found["ratio to float"]["float"] == 1
    assert all(t["samples_per_second"] == pytest.approx(1 / t["mean"]) for t in found["seconds"].values())
    for more, said in (("--against litert", "LiteRT reads no ONNX"), ("--csv", "")):
        status = main([*words, *more.split()])
        assert (status == 2 and said in capsys.readouterr().err) or not said


def test_bench_footprint(calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(footprint, "memory", lambda path, threads: footprint.Memory(4000, 1000 * threads, 9000))
    monkeypatch.setattr(footprint, "joules", lambda call, seconds: None)
    assert main("bench m.so --seconds 0 --footprint --threads 2".split()) == 0
    out = capsys.readouterr().out
    assert "4.0 kB" in out and "2.0 kB" in out and "9.0 kB" in out and "energy is not measurable" in out
    assert main("bench m.so --seconds 0 --footprint --json".split()) == 0
    found = json.loads(capsys.readouterr().out)["footprint"]
    assert found == {"int8": {"constants": 4000, "workspace": 1000, "resident": 9000, "joules": None}}


ACCOUNT: dict[str, Any] = {
    "goal": "--min-sqnr 25", "met": False, "statement": "THE TARGET (--min-sqnr 25) IS NOT MET: time", "samples": 9, "held_out": 2, "threads": 1,
    "confidence": 0.95, "measured_on": "x86-avx2", "float": {"seconds": 3e-3, "bytes": 4000}, "curve": [], "sensitivity": {},
    "findings": [{"wanted": "SQNR of at least 25 dB", "found": "20.00 dB on 2 held-out samples", "met": False}],
    "points": [
        {"float_layers": [], "sqnr_db": 20.0, "sqnr_bound_db": None, "agreement": 0.5, "accuracy_drop": None, "seconds": 1e-3, "bytes": 1000,
         "met": False, "chosen": True},
    ],
}  # fmt: skip


def test_a_target_that_is_missed_is_exit_1(calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(FakeArtifact, "manifest", MANIFEST | {"mixed_precision": ACCOUNT})
    words = "compile m.onnx --calibration c.npz --output m.so --min-sqnr 25 --max-accuracy-drop 1 --labels l.tsv --time-budget 1.5m".split()
    assert main(words) == 1
    kwargs = calls[0][2]
    assert {k: kwargs[k] for k in ("min_sqnr", "max_accuracy_drop", "labels", "time_budget")} == {
        "min_sqnr": 25.0, "max_accuracy_drop": 1.0, "labels": "l.tsv", "time_budget": 90.0,
    }  # fmt: skip
    out = capsys.readouterr().out
    assert (tmp_path / "m.so").read_bytes() == b"library"
    assert "IS NOT MET" in out and "most accurate, too little" in out and "0.333" in out and "(MISSED)" in out
    monkeypatch.setattr(FakeArtifact, "manifest", MANIFEST | {"mixed_precision": ACCOUNT | {"met": True}})
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mixed_precision"]["goal"] == "--min-sqnr 25"


def test_inspect_says_why_an_operator_is_not_int8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import qcompiler.runtime.library

    monkeypatch.setattr(qcompiler.runtime.library, "read_manifest", lambda path: MANIFEST)
    (tmp_path / "m.so").write_bytes(b"x" * 1000)
    assert main(["inspect", str(tmp_path / "m.so")]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 operators in int8" in out and " 0.5 " in out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert rows["conv1"].split()[1:] == ["qc.conv2d", "int8", "0.5", "3", "x86-avx2/conv2d", "1.50"]
    assert rows["y"].endswith("softmax stays in float")
    assert main(["inspect", str(tmp_path / "m.so"), "--json"]) == 0
    assert [o["id"] for o in json.loads(capsys.readouterr().out)["operators"]] == ["conv1", "y"]


def test_inspect_tells_what_a_session_takes_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import qcompiler.runtime.library

    larger = {"inputs": [{"name": "x", "shape": [4, 1000], "dtype": "float32"}], "outputs": MANIFEST["outputs"], "workspace": 1000, "steps": MANIFEST["steps"]}
    added = {"code_added": 0, "constants_added": 0}
    more = {"triple": "nvptx64-nvidia-cuda", "constants": 5, "workspace": 4000, **added, "shapes": [larger | added]}
    monkeypatch.setattr(qcompiler.runtime.library, "read_manifest", lambda path: MANIFEST | more)
    (tmp_path / "m.so").write_bytes(b"x" * 1000)
    assert main(["inspect", str(tmp_path / "m.so")]) == 0
    out = capsys.readouterr().out
    assert "memory of a session" in out and "20.0 kB on the GPU" in out and "memory of a run" not in out


def test_inspect_in_every_format(digits: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main(["inspect", str(digits("native")), *words]) == 0
        return capsys.readouterr().out

    text = said()
    assert "13 of 13 operators in int8" in text and f"qcompiler {qcompiler.__version__}" in text and "equaliz" not in text.lower(), "preset fast"
    library = text.split("\n\n")[1].splitlines()
    assert all(len(line.split(None, 1)) == 2 for line in library if line.strip()), "no row without a value"
    rows = list(csv.DictReader(said("--format", "csv").splitlines()))
    assert rows[1]["value"] == "relu1" and float(rows[1]["scale"]) > 0 and -128 <= int(rows[1]["zero point"]) <= 127
    page = said("--format", "html")
    assert page.startswith("<!doctype html>") and "<h2>Steps</h2>" in page and "<td>relu1</td>" in page
    assert said("--format", "json") == said("--json")


def test_inspect_of_what_is_no_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.so").write_text("hello")
    for name in ("m.so", "none.so"):
        assert main(["inspect", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [t["name"] for t in document["targets"]][0] == "x86-avx2"
    assert document["native"] is None or document["native"] in [t["name"] for t in document["targets"]]
    assert main(["targets"]) == 0
    assert "x86-avx512vnni" in capsys.readouterr().out


def test_module_and_help_start_without_tvm(root: Path) -> None:
    program = "import sys, runpy; sys.argv = ['qcompiler', 'targets', '--json']\n"
    program += "try: runpy.run_module('qcompiler', run_name='__main__')\nexcept SystemExit as e: assert not e.code, e.code\n"
    program += "assert 'tvm' not in sys.modules and 'onnx' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["architecture"]


@pytest.mark.parametrize("verb", ["compile", "verify", "bench", "run", "inspect", "targets", "demo"])
def test_every_verb_and_option_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 6


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_with_every_verb(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("compile", "export-onnx", "--keep-float", "--samples"))
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_stages_are_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    said: list[str] = []
    progress = Lines(said.append, lambda: now[0])
    for seconds, *report in ((1, "code", 0, 1), (3, "code", 1, 1), (4, "run", 1, 2), (5, "run", 2, 2), (6, "read", 1, None), (7, "code", 1, 1)):
        now[0] = float(seconds)
        progress(*report)
    assert said == ["code ...", "code: done in 3.0 s", "run (2) ...", "run: done in 2.0 s", "read ...", "code: done in 1.0 s"]
    for words, lines in (({}, 1), ({"verbose": True}, 1), ({"quiet": True}, 0)):
        with terminal_progress(**words) as seen:
            seen("code", 1, 1)
        assert len(capsys.readouterr().err.splitlines()) == lines


# -- pieces ------------------------------------------------------------------------------------------------------------------------


def test_interleave_takes_turns_and_rotates_who_begins() -> None:
    order: list[str] = []
    now = [0.0]

    def candidate(name: str, cost: float) -> Any:
        def call() -> None:
            order.append(name)
            now[0] += cost

        return call

    times = interleave({"a": candidate("a", 2), "b": candidate("b", 1)}, seconds=0, min_rounds=4, warmup=1, clock=lambda: now[0])
    assert "".join(order) == "ab" + "abbaabba"
    assert [(t.name, t.minimum, t.median, t.rounds) for t in times] == [("a", 2, 2, 4), ("b", 1, 1, 4)]
    assert ratios(times, "a") == {"a": 1.0, "b": 0.5}


def test_random_inputs_fit() -> None:
    got = random_inputs([TensorInfo("x", (2, 3), "float32"), TensorInfo("i", (4,), "int64")])
    assert {n: (a.shape, str(a.dtype)) for n, a in got.items()} == {"x": ((2, 3), "float32"), "i": ((4,), "int64")}
    assert not got["i"].any()


def test_replacing_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="can't be written: No space left"), replacing(path) as temporary:
        raise OSError(28, "No space left on device")
    assert path.read_text() == "new"


def test_dumps_are_numbered_and_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILER_DUMP_DIR", str(tmp_path / "d"))
    dump = Dumper()
    dump("plan", {"a": np.float32("inf"), "b": np.arange(3), "c": np.zeros((10, 10))})
    dump("note", "text")
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["00_plan.json", "01_note.txt"]
    big = {"shape": [10, 10], "dtype": "float64", "min": 0.0, "max": 0.0}
    assert json.loads((tmp_path / "d" / "00_plan.json").read_text()) == {"a": "inf", "b": [0, 1, 2], "c": big}
    monkeypatch.delenv("QCOMPILER_DUMP_DIR")
    assert Dumper()("plan", {}) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't make the dump directory"):
        Dumper(tmp_path / "file")
    assert plain_json({1: {2, 1}, "t": Thresholds(min_sqnr=3)})["1"] == [1, 2]
