"""Tuning in rounds for a device without a network: export, measure there (this CPU, and an emulated Arm), import, and the next round."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tools import require_target
from tuning_rows import FaultyRow, copy_op
from tvm.script.ir_builder import tirx as T

from qcompiler.backend.programs import build_measurer
from qcompiler.backend.tuning_log import read_log
from qcompiler.base.errors import TuningError
from qcompiler.base.host import host_architecture
from qcompiler.base.targets import Target, find_target
from qcompiler.cli.main import main
from qcompiler.schedules.builder import Emitter, make_kernel
from qcompiler.schedules.table import Kernel, Layout, OpCall
from qcompiler.tuning import remote as tuning_remote
from qcompiler.tuning.candidates import CASES, candidate_library, output_sums, plan_lines, recipe_input
from qcompiler.tuning.remote import PENDING, SIZE_LIMIT, import_results

# -- the measuring program ------------------------------------------------------------------------------------------------------------------


@dataclass
class CrashingRow(FaultyRow):
    """As `FaultyRow`, and with the kind "crash": a kernel that ends its process."""

    def build(self, op: OpCall, params: Any, target: Target) -> Kernel:
        if params["kind"] != "crash":
            return super().build(op, params, target)

        def emit(k: Emitter) -> None:
            T.evaluate(T.call_extern("int32", "abort"))
            T.buffer_store(k.output, k.inputs[0][0], [0])

        return make_kernel(self.name, op, target, emit)


@pytest.mark.parametrize("name", ["native", "arm64-neon"])
def test_the_device_finds_what_is_wrong(name: str, tmp_path: Path) -> None:
    """Right candidates are timed; wrong results, bytes changed outside the output, and crashes are told apart, and cost nobody else."""
    target = find_target(name)
    require_target(target)
    op, row = copy_op(2, 3, 5, 7), CrashingRow()
    points = [{"kind": kind, "tasks": 1} for kind in ("copy", "wrong", "crash", "backwards", "outside")]
    (tmp_path / "task000.so").write_bytes(candidate_library(row, op, target, points))
    lines = plan_lines("task000.so", op, len(points), [output_sums(op, case) for case in range(CASES)])
    (tmp_path / "candidates.txt").write_text("\n".join(["qcompiler-candidates 1 abc 2 1", *lines, ""]))
    build_measurer(tmp_path / "qc_measure", target)
    emulator = [] if target.architecture == host_architecture() else target.emulator
    done = subprocess.run([*emulator, "./qc_measure"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    header, *results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (header["results"], header["set"]) == (1, "abc")
    assert [r["status"] for r in results] == ["ok", "wrong", "crashed", "ok", "wrong"]
    assert all(0 < s < 10 for r in results for s in r.get("seconds", [])) and all(("seconds" in r) == (r["status"] == "ok") for r in results)


def test_the_program_says_what_it_lacks(tmp_path: Path) -> None:
    target = find_target("native")
    build_measurer(tmp_path / "qc_measure", target)
    done = subprocess.run(["./qc_measure"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "candidates.txt: not in this folder" in done.stderr
    (tmp_path / "candidates.txt").write_text("qcompiler-candidates 1 abc 1 1\ntask000.so 3 1")
    done = subprocess.run(["./qc_measure"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "candidates.txt: damaged" in done.stderr


def test_inputs_hold_both_extremes_and_sums_see_any_change() -> None:
    layout = Layout((1, 4, 4, 8), "uint8")
    random, extreme = (recipe_input(layout, case, 0) for case in (0, 1))
    assert len(set(random.reshape(-1).tolist())) > 60 and set(extreme.reshape(-1).tolist()) == {-128, 127}
    assert not np.array_equal(random, recipe_input(layout, 0, 1))
    reals = recipe_input(Layout((1000,), "float32"), 0, 0)
    assert reals.dtype == np.float32 and np.abs(reals).max() <= 8 and reals.std() > 2
    op = copy_op(1, 4, 4, 8)
    assert len({output_sums(op, 0), output_sums(op, 1), output_sums(copy_op(1, 4, 4, 12), 0)}) == 3


# -- rounds ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a network of one convolution, calibration data)."""
    folder, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((16, 8, 3, 3)).astype(np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 12, 12]) for n, c in (("x", 8), ("y", 16))]
    graph = helper.make_graph([node], "one", ports[:1], ports[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), folder / "one.onnx")
    np.save(folder / "data.npy", rng.standard_normal((4, 8, 12, 12)).astype(np.float32))
    return folder / "one.onnx", folder / "data.npy"


def points_of(manifest: Path) -> list[str]:
    return [json.dumps(p, sort_keys=True) for task in json.loads(manifest.read_text())["tasks"] for p in task["points"][1:]]


def test_rounds(model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rounds through the command line; what the device measured is in the log, and the second round tries other candidates."""
    log, command = tmp_path / "log", ["tune", str(model[0]), "--calibration", str(model[1]), "--preset", "fast", "--candidates", "3"]
    seen: list[str] = []
    for turn in (1, 2):
        folder = tmp_path / f"round{turn}"
        assert main([*command, "--log", str(log), "--export-candidates", str(folder)]) == 0
        assert f"{folder}: 3 candidates for 1 kernel shapes" in capsys.readouterr().out
        assert sum(p.stat().st_size for p in folder.iterdir()) < SIZE_LIMIT
        new = points_of(folder / "manifest.json")
        assert len(new) == 3 and not set(new) & set(seen)
        seen += new
        subprocess.run(["./qc_measure", str(tmp_path / f"results{turn}.jsonl")], cwd=folder, check=True, capture_output=True)
        if turn == 2:  # the file of the first round again
            assert main(["tune", "--log", str(log), "--import-results", str(tmp_path / "results1.jsonl")]) == 2
            assert "waits for set" in capsys.readouterr().err
        assert main(["tune", "--log", str(log), "--import-results", str(tmp_path / f"results{turn}.jsonl")]) == 0
        assert "3 variants measured" in capsys.readouterr().out
        assert sorted(json.dumps(r.params, sort_keys=True) for r in read_log(log)) == sorted(seen)
    assert all(0 < r.ratio < 100 and not r.failed for r in read_log(log))
    assert main(["tune", "--log", str(log), "--import-results", str(tmp_path / "results2.jsonl")]) == 2
    assert "no candidates wait for results here" in capsys.readouterr().err
    output = tmp_path / "one.so"
    assert main(["compile", str(model[0]), "--calibration", str(model[1]), "--preset", "fast", "--tuning-log", str(log), "--output", str(output)]) == 0


def test_weights_leave_room_for_other_shapes(model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape whose packed weights would fill its share of the folder gets the default and one candidate, however many are asked for."""
    monkeypatch.setattr(tuning_remote, "SHARE", SIZE_LIMIT)
    made = tuning_remote.export_candidates(model[0], "native", model[1], log=tmp_path / "log", output=tmp_path / "round", candidates=5, preset="fast")
    assert (made.tasks, made.candidates, made.skipped) == (1, 1, [])


def waiting(tmp_path: Path) -> Path:
    """A log that waits for three candidates of one task."""
    log = tmp_path / "log"
    log.mkdir()
    workload = {"op": "qc.concat", "operands": [[[4], "uint8"]], "output": [[4], "uint8"], "attrs": {}}
    task = {"row": "test/copy", "workload": workload, "points": [{"n": n} for n in range(4)], "layers": 1}
    (log / PENDING).write_text(json.dumps({"format": 1, "set": "abc", "isa": "test", "target": "t", "threads": 1, "tasks": [task]}))
    return log


def results(tmp_path: Path, *lines: str, head: str = '{"results": 1, "set": "abc", "host": "h", "threads": 1}') -> Path:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(f"{line}\n" for line in [head, *lines]))
    return path


def line(step: int, status: str = "ok", seconds: float = 0.0) -> str:
    return json.dumps({"task": 0, "step": step, "status": status} | ({"seconds": [seconds]} if seconds else {}))


def test_what_results_become(tmp_path: Path) -> None:
    """Faster, slower, and crashed candidates are records; a wrong one is reported and no record; a missing one is tried again."""
    log = waiting(tmp_path)
    path = results(tmp_path, line(0, seconds=2.0), line(1, seconds=1.0), line(2, "wrong"))
    with path.open("a") as file:
        file.write(line(3, seconds=4.0)[:20])  # the measurement was killed here
    found = import_results(path, log)
    assert (found.measured, found.missing, len(found.wrong), found.failed) == (1, 1, 1, [])
    assert [(r.params, r.ratio, r.seconds) for r in read_log(log)] == [({"n": 1}, 0.5, (1.0,))]
    assert [(ratio, point) for _, _, ratio, point in found.best] == [(0.5, {"n": 1})]


def test_no_clear_win_is_no_win(tmp_path: Path) -> None:
    log = waiting(tmp_path)
    import_results(results(tmp_path, line(0, seconds=2.0), line(1, seconds=1.99), line(2, seconds=3.0), line(3, "crashed")), log)
    assert [(r.params["n"], round(r.ratio, 3), r.failed) for r in read_log(log)] == [(1, 1.0, ""), (2, 1.5, ""), (3, float("inf"), "crashed on the device")]


@pytest.mark.parametrize(
    ("lines", "head", "message"),
    [
        ([line(0, seconds=1.0)], '{"results": 1, "set": "xyz", "host": "h", "threads": 1}', "measured candidate set xyz, and .* waits for set abc"),
        ([line(0, seconds=1.0)], '{"results": 2, "set": "abc", "host": "h", "threads": 1}', "results of format 2"),
        ([line(0, seconds=1.0)], "hello", "not a results file of qc_measure, or damaged"),
        ([line(0, seconds=1.0), '{"task": 0}'], "", "damaged"),
        ([line(0, seconds=1.0), line(1, seconds=-1.0)], "", "damaged: the times of task 0, candidate 1"),
        ([], "", "holds no result"),
    ],
)
def test_results_that_are_refused(tmp_path: Path, lines: list[str], head: str, message: str) -> None:
    """A clear error, and the log is as before: the right file can still be imported."""
    log = waiting(tmp_path)
    before = sorted((p.name, p.read_bytes()) for p in log.iterdir())
    path = results(tmp_path, *lines, **({"head": head} if head else {}))
    with pytest.raises(TuningError, match=message):
        import_results(path, log)
    assert sorted((p.name, p.read_bytes()) for p in log.iterdir()) == before
    os.remove(path)
    with pytest.raises(TuningError, match="can't be read: No such file"):
        import_results(path, log)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "[" * 100_000, '{"tasks": 3}', '{"tasks": [3], "set": "abc", "isa": "x"}', '{"tasks": [{"points": []}], "set": "abc", "isa": "x"}',
        '{"tasks": [], "set": 3, "isa": "x"}', '{"tasks": [], "isa": "x"}',
    ],
)  # fmt: skip
def test_a_damaged_candidate_set(tmp_path: Path, text: str) -> None:
    log = waiting(tmp_path)
    (log / "candidates.json").write_text(text)
    with pytest.raises(TuningError, match=r"candidates\.json: damaged \(.*\); export candidates again"):
        import_results(results(tmp_path, line(0, seconds=1.0)), log)


@pytest.mark.parametrize("bad", ["[1]", "3", "null", '{"task": 1e400, "step": 0}', '{"task": 0, "step": 0, "status": "ok", "seconds": 3}', "[" * 100_000])
def test_a_damaged_result(tmp_path: Path, bad: str) -> None:
    with pytest.raises(TuningError, match="damaged"):
        import_results(results(tmp_path, line(0, seconds=1.0), bad), waiting(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--log", "l"], "MODEL and --calibration are needed"),
        (["m.onnx", "--calibration", "d", "--log", "l", "--candidates", "3"], "--candidates belongs to --export-candidates"),
        (["m.onnx", "--log", "l", "--import-results", "r"], "takes the results and --log only"),
    ],
)
def test_options_that_mean_nothing(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *options]) == 2
    assert message in capsys.readouterr().err
