"""Tuning: the search, the worker and its faults, runs that stop and go on, and the command line."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_nets import OnnxNet
from tuning_rows import FaultyRow, copy_op

import qcompiler
from qcompiler import schedules
from qcompiler.backend.tuning_log import best_of, isa_of, opened, read_log, workload_of
from qcompiler.base.errors import ModelError, TargetError, TuningError
from qcompiler.base.targets import find_target, load_targets, missing_features
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.cli.tuning import Display, duration, live_table
from qcompiler.pipeline.compile import compile_stages
from qcompiler.runtime.session import Session
from qcompiler.schedules.table import KERNELS
from qcompiler.tuning.bench import Bench, Candidate
from qcompiler.tuning.model import CostModel, Space, features, key, propose
from qcompiler.tuning.search import Task, Tuner, Tuning, check_arguments
from qcompiler.tuning.worker import Limits, Worker, WorkerLost
from qcompiler.verification.bits import bit_parity
from qcompiler.verification.interpreter import run

NATIVE = find_target("native")
SPACE = Space.of(
    {"rows": [1, 2, 4], "cols": [1, 2, 3, 4, 6, 8], "order": ["a", "b"], "pixel_tasks": [1, 2, 4]},
    {"rows": 1, "cols": 5, "order": "a", "pixel_tasks": 3},
)
WORKLOAD: dict[str, Any] = {
    "op": "qc.conv2d",
    "operands": [[[1, 16, 16, 8], "uint8"], [[16, 3, 3, 8], "int8", "constant"]],
    "output": [[1, 16, 16, 16], "uint8"],
    "attrs": {"strides": [1, 1]},
}


def samples(count: int = 8) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(demo_data()[0], count))


# -- the search ------------------------------------------------------------------------------------------------------------------------


def test_a_space_holds_the_default_and_nothing_else_is_reached() -> None:
    assert SPACE.values["cols"] == [1, 2, 3, 4, 5, 6, 8]
    rng = random.Random(0)
    point = dict(SPACE.default)
    reached = set()
    for _ in range(500):
        point = SPACE.mutated(SPACE.crossed(point, SPACE.random(rng), rng), rng)
        assert all(point[k] in v for k, v in SPACE.values.items())
        reached.add(key(point))
    assert len(reached) > SPACE.size / 2
    fixed = SPACE.fixed({"rows": 1, "pixel_tasks": 4}, ["pixel_tasks"])
    assert (fixed.values["pixel_tasks"], fixed.default["pixel_tasks"], fixed.values["rows"]) == ([4], 4, [1, 2, 4])


def test_a_point_of_another_workload_moves_to_the_nearest() -> None:
    assert SPACE.nearest({"rows": 7, "cols": 7.9, "order": "c", "unknown": 1}) == {"rows": 4, "cols": 8, "order": "a", "pixel_tasks": 3}


def test_proposals_are_new_and_end_with_the_space() -> None:
    rng, tried = random.Random(0), {key(SPACE.default)}
    for _ in range(100):
        points = propose(SPACE, WORKLOAD, CostModel(), [SPACE.default], tried, 8, rng)
        assert len(points) <= 8
        assert not {key(p) for p in points} & tried
        tried |= {key(p) for p in points}
        if not points:
            break
    assert len(tried) == SPACE.size


def test_the_cost_model_finds_what_is_fast() -> None:
    """On a made-up landscape the search with its model must beat as many random points."""
    space = Space.of({"rows": list(range(1, 17)), "cols": list(range(1, 33)), "blocks": [1, 2, 3, 4, 6, 8]}, {"rows": 1, "cols": 1, "blocks": 1})

    def ratio(p: dict[str, Any]) -> float:
        return math.exp(abs(math.log(p["rows"] * p["cols"] * p["blocks"] / 24)) / 3 + 0.2 * (p["blocks"] != 4) + 0.1 * abs(p["rows"] - 2) / 16)

    rng, model = random.Random(1), CostModel()
    measured: dict[Any, tuple[float, Any]] = {}
    for _ in range(10):
        parents = [p for _, p in sorted(measured.values(), key=lambda m: m[0])]
        batch = propose(space, WORKLOAD, model, parents, set(measured), 8, rng)
        measured |= {key(p): (ratio(p), p) for p in batch}
        model.learn(features(WORKLOAD, space, batch), [ratio(p) for p in batch])
    best = min(r for r, _ in measured.values())
    others = [min(ratio(space.random(rng)) for _ in range(80)) for _ in range(20)]
    assert best < float(np.median(others))
    points = [space.random(rng) for _ in range(200)]
    predicted, actual = model.predict(features(WORKLOAD, space, points)), np.log([ratio(p) for p in points])
    assert np.corrcoef(predicted, actual)[0, 1] > 0.5


class FakeBench(Bench):
    """A bench whose clock is a table: cost of a candidate on one thread and on several."""

    def __init__(self, default: Candidate) -> None:
        self.default = self.best = default

    cores_free = True

    def free(self, threads: int) -> bool:
        return self.cores_free

    def time(self, call: Any, index: int) -> float:
        return float(call[1].stride * (0.6 if index and call[0] is not call[1].serial else 1.0))


def candidate(cost: int, parallel: bool = False) -> Candidate:
    return Candidate(None, "serial", "parallel" if parallel else None, np.zeros(0), 1, cost)  # type: ignore[arg-type]


def test_the_best_changes_only_for_a_clear_win_and_ratios_keep_that_order() -> None:
    bench = FakeBench(candidate(1000))
    assert bench.judge(candidate(995), 1) == {"status": "ok", "ratio": pytest.approx(1.001), "seconds": [995.0], "best": False}
    first = bench.judge(candidate(900), 1)
    assert (first["best"], first["ratio"]) == (True, pytest.approx(0.9))
    slower = bench.judge(candidate(895), 1)
    assert not slower["best"]
    assert slower["ratio"] > first["ratio"]
    assert bench.judge(candidate(2000), 1) == {"status": "ok", "ratio": pytest.approx(2.0), "seconds": [2000.0], "best": False}
    assert bench.judge(candidate(800), 1)["best"]


def test_several_threads_count_as_much_as_one() -> None:
    answer = FakeBench(candidate(1000)).judge(candidate(1100, parallel=True), 2)
    assert answer["ratio"] == pytest.approx(math.sqrt(1.1 * 0.66))
    assert answer["seconds"] == [1100.0, pytest.approx(660.0)]
    assert answer["best"]
    assert FakeBench(candidate(1000)).judge(candidate(1100, parallel=True), 1)["ratio"] == pytest.approx(1.1)
    busy = FakeBench(candidate(1000))
    busy.cores_free = False
    assert not busy.judge(candidate(1100, parallel=True), 2)["best"]
    assert busy.judge(candidate(900), 1)["best"]


# -- the worker and its faults ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker() -> Any:
    with Worker(2, Limits(build=4, run=4)) as made:
        yield made


def test_tunable_rows_can_be_sent_to_the_worker() -> None:
    for target in load_targets().values():
        schedules.load(target)
    for row in itertools.chain(*KERNELS.values()):
        if type(row).__name__ != "PortableRow":
            assert pickle.loads(pickle.dumps(row)).name == row.name


@pytest.mark.parametrize(
    ("kind", "status"),
    [("copy", "same"), ("backwards", "ok"), ("wrong", "wrong"), ("outside", "wrong"), ("impossible", "impossible"), ("error", "error")],
)
def test_a_candidate_is_judged(worker: Worker, kind: str, status: str) -> None:
    ready = worker.prepare(f"judged {kind}", FaultyRow(), copy_op(2, 3, 4), NATIVE, None)
    assert ready["ratio"] == 1.0
    assert all(s > 0 for s in ready["seconds"])
    answer = worker.trial({"kind": kind, "tasks": 1}, 2)
    assert answer["status"] == status
    if status == "ok":
        assert answer["ratio"] > 0
        assert len(answer["seconds"]) == 1
    reason = {"wrong": "2 of 24 outputs differ" if kind == "wrong" else "wrote outside its output", "error": "LLVM says no"}.get(status, "")
    assert reason[2:] in answer.get("reason", "")


def test_two_tasks_are_timed_both_ways(worker: Worker) -> None:
    worker.prepare("both ways", FaultyRow(), copy_op(2, 3, 4), NATIVE, None)
    answer = worker.trial({"kind": "copy", "tasks": 2}, 2)
    assert answer["status"] == "ok"
    assert len(answer["seconds"]) == 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("crash at build", "crashed .SIGSEGV. while it should build"),
        ("hang at build", "longer than 3 s to build"),
        ("hang at run", "longer than 3 s to run"),
    ],
)
def test_a_worker_that_is_lost_is_started_again(kind: str, reason: str) -> None:
    with Worker(1, Limits(build=3, run=3)) as worker:
        worker.prepare("a", FaultyRow(), copy_op(2, 3, 4), NATIVE, None)
        with pytest.raises(WorkerLost, match=reason):
            worker.trial({"kind": kind, "tasks": 1}, 1)
        assert not worker.alive
        worker.prepare("a", FaultyRow(), copy_op(2, 3, 4), NATIVE, {"kind": "backwards", "tasks": 1})
        assert worker.trial({"kind": "backwards", "tasks": 1}, 1)["status"] == "same"


def test_a_wrong_default_is_reported(worker: Worker) -> None:
    assert "outputs differ" in worker.prepare("wrong default", FaultyRow("wrong"), copy_op(2, 3, 4), NATIVE, None)["error"]


def faulty_task(row: FaultyRow, *shape: int) -> Task:
    op = copy_op(*shape)
    return Task(row, op, workload_of(op), Space.of(row.space(op, NATIVE), row.default(op, NATIVE)), 1)


def test_faults_are_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    tasks = [faulty_task(FaultyRow(), 2, 3, 4), faulty_task(FaultyRow("wrong", "test/wrong"), 2, 3, 5)]
    state = Tuning(NATIVE, 1, tasks, 100, None)
    with opened(tmp_path, isa_of(NATIVE)) as writer, Worker(1, Limits(build=3, run=3)) as worker:
        Tuner(state, worker, writer, [], lambda state: None).run()
    assert state.stopped == "nothing is left to try"
    assert [("outputs differ" in t.failure) for t in tasks] == [False, True]
    records = read_log(tmp_path)
    assert {r.row for r in records} == {"test/copy"}
    good = {(r.params["kind"], r.params["tasks"]) for r in records if not r.failed}
    assert good == {("backwards", 1)}
    failed = {r.params["kind"]: r.failed for r in records if r.failed}
    assert set(failed) == {"crash at build", "hang at build", "hang at run", "error"}
    assert {text.split("'")[3] for text in state.wrong} == {"wrong", "outside"}
    assert len(state.failed) == len(failed) + 1
    assert tasks[0].trials == len(records) + len(state.wrong)


# -- whole runs ------------------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_stopped_and_its_log_compiles_to_equal_results(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = qcompiler.tune(MODEL, "native", samples(), log=log, trials=12, preset="fast")
    assert first.stopped == "all 12 trials are done"
    assert (first.trials, first.measured, first.wrong, first.failed) == (12, 12, [], [])
    records = read_log(log)
    assert len(records) == 12
    assert len({(r.key, r.point) for r in records}) == 12
    assert {r.key for r in records} <= {t.key for t in first.tasks}
    more = qcompiler.tune(MODEL, "native", samples(), log=log, trials=14, preset="fast")
    assert (more.trials, more.measured) == (14, 2)
    records = read_log(log)
    assert len({(r.key, r.point) for r in records}) == 14
    best = {k: r.ratio for k, r in best_of(records).items() if r.ratio < 1}
    assert {t.key: t.ratio for t in more.tasks if t.best} == pytest.approx(best, abs=1e-4)

    # whatever was measured, a compilation with other tunables computes the same and is reproducible
    forced = log / f"{isa_of(NATIVE)}.jsonl"
    lines = [json.loads(line) | {"ratio": 0.5} for line in forced.read_text().splitlines()]
    forced.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain, tuned, again = (compile_stages(MODEL, "native", samples(), preset="fast", tuning_log=source) for source in (None, log, log))
    assert plain.artifact.manifest["digests"]["tuning_log"] != tuned.artifact.manifest["digests"]["tuning_log"]
    params = [[s["params"] for s in c.artifact.manifest["steps"]] for c in (plain, tuned)]
    assert params[0] != params[1]
    assert again.artifact.library == tuned.artifact.library
    session = Session(tuned.artifact.save(tmp_path / "tuned.so"), 2)
    for sample in samples(3):
        assert bit_parity(session, run(tuned.integer, sample, keep="all"), sample) == []


def test_a_killed_run_leaves_a_log_that_the_next_one_continues(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import itertools, sys; import qcompiler; from qcompiler.cli.demo import MODEL, demo_data\n"
    code += "qcompiler.tune(MODEL, 'native', list(itertools.islice(demo_data()[0], 8)), log=sys.argv[1], trials=500, preset='fast', threads=1)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    victim = subprocess.Popen([sys.executable, "-c", code, str(log)], env=environment)
    file = log / f"{isa_of(NATIVE)}.jsonl"
    deadline = time.monotonic() + 300
    while not (file.is_file() and file.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
        assert victim.poll() is None
    children = [int(p) for p in Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split()]
    victim.kill()
    victim.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = read_log(log)
    assert len(before) >= 3
    after = qcompiler.tune(MODEL, "native", samples(), log=log, trials=len(before) + 2, preset="fast", threads=1)
    assert after.measured == 2
    assert len(read_log(log)) == len(before) + 2
    assert children
    assert not any(Path(f"/proc/{c}").exists() and "qcompiler.tuning.worker" in Path(f"/proc/{c}/cmdline").read_text() for c in children)


class ScriptedWorker:
    """A worker whose cores are as busy as it is told, and whose candidates are all a little slower than the default."""

    def __init__(self, speedup: float) -> None:
        self.factor, self.asked = speedup, []  # type: float, list[tuple[dict[str, Any], int]]

    def prepare(self, *args: Any) -> dict[str, Any]:
        return {"seconds": [1e-3, 6e-4], "ratio": 1.0}

    def speedup(self) -> float:
        return self.factor

    def trial(self, params: dict[str, Any], threads: int) -> dict[str, Any]:
        self.asked.append((params, threads))
        return {"status": "ok", "ratio": 1.1, "seconds": [1e-3] * threads, "best": False}


@pytest.mark.parametrize(("speedup", "judged"), [(1.9, 2), (1.2, 1)])
def test_the_division_of_work_is_judged_on_free_cores_only(speedup: float, judged: int, tmp_path: Path) -> None:
    worker, task = ScriptedWorker(speedup), faulty_task(FaultyRow(), 2, 3, 4)
    state = Tuning(NATIVE, 2, [task], 8, None)
    with opened(tmp_path, isa_of(NATIVE)) as writer:
        Tuner(state, worker, writer, [], lambda state: None).run()  # type: ignore[arg-type]
    assert {threads for _, threads in worker.asked} == {judged} == {r.threads for r in read_log(tmp_path)}
    assert {params["tasks"] for params, _ in worker.asked} == ({1, 2} if judged == 2 else {1})
    assert state.busy == (0 if judged == 2 else state.turns)


# -- bad input -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials is 0; at least 1 is needed"),
        ({"time_limit": 0.0}, "the time limit is 0 s; it must be positive"),
        ({"threads": 0}, "threads is 0; this process may use 1 to"),
        ({"threads": 4096}, "threads is 4096; this process may use 1 to"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=message):
        qcompiler.tune("no model", "native", None, log=tmp_path / "log", **options)
    assert not (tmp_path / "log").exists()


def test_a_target_that_is_not_this_machine_is_refused() -> None:
    others = [t for t in load_targets().values() if missing_features(t)]
    for target in others:
        with pytest.raises(
            TargetError, match=f"target '{target.name}' can't be tuned here: candidates are timed on this machine, which lacks .*--export-candidates DIR"
        ):
            check_arguments(target, 1, None, None)
    import dataclasses

    with pytest.raises(TargetError, match="lacks made_up"):
        check_arguments(dataclasses.replace(NATIVE, features=("made_up",)), 1, None, None)


def test_kernels_of_several_shapes_are_tuned_together(tmp_path: Path) -> None:
    net = OnnxNet(seed=3)
    model = net.save(tmp_path / "n.onnx", [net.op("Conv", net.input("x", "n", 8, 6, 6), net.weight(16, 8, 3, 3))])
    data = [{"x": np.random.default_rng(0).standard_normal((1, 8, 6, 6)).astype(np.float32)}]
    options: dict[str, Any] = {"input_shapes": {"x": [(1, 8, 6, 6), (4, 8, 6, 6)]}, "preset": "fast"}
    found = qcompiler.tune(model, "native", data, log=tmp_path / "log", trials=2, threads=1, **options)
    assert sorted(t.workload["operands"][0][0][0] for t in found.tasks if t.op.name == "qc.conv2d") == [1, 4]
    assert found.measured == 2
    with pytest.raises(ModelError, match=r"export_onnx takes one shape of each input, and 2 are given; name one of them, such as x \[1, 8, 6, 6\]"):
        qcompiler.export_onnx(model, tmp_path / "q.onnx", data, **options)


def test_a_network_without_tunables_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 8, 8]) for n in "xy")
    graph = helper.make_graph([helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[1, 1], pads=[0, 0, 1, 1])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "pool.onnx")
    data = [{"x": np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)}]
    with pytest.raises(TuningError, match="nothing to tune: no operator of this network has tunables on"):
        qcompiler.tune(tmp_path / "pool.onnx", "native", data, log=tmp_path / "log", preset="fast")


# -- the command line ------------------------------------------------------------------------------------------------------------------


def finished(interrupted: bool = False) -> Tuning:
    task = faulty_task(FaultyRow(), 2, 3, 4)
    task.seconds, task.ratio, task.trials, task.best = [2e-3, 1e-3], 0.8, 7, {"kind": "backwards", "tasks": 1}
    return Tuning(NATIVE, 2, [task], 10, 60.0, measured=7, wrong=["it"], current=task, stopped="" if interrupted else "all 10 trials are done")


def test_tune_passes_its_options_on_and_reports(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}

    def tune(*args: Any, **kwargs: Any) -> Tuning:
        seen.update(kwargs, args=args)
        return finished()

    monkeypatch.setattr(qcompiler, "tune", tune, raising=False)
    words = "tune m.onnx --target x86-avx2 --calibration c --log d --trials 9 --time-limit 20m --threads 2 --input-shape a=1,3 --preprocess p --preset fast"
    assert main(words.split()) == 1  # a kernel was wrong
    assert seen["args"] == ("m.onnx", "x86-avx2", "c")
    assert (seen["log"], seen["trials"], seen["time_limit"], seen["threads"]) == ("d", 9, 1200.0, 2)
    assert (seen["input_shapes"], seen["preprocess"], seen["preset"]) == ({"a": (1, 3)}, "p", "fast")
    out, err = capsys.readouterr()
    assert err == ""
    assert "2.000 ms -> 1.600 ms (x 0.800)" in out
    assert "WRONG, not logged, please report: it" in out
    assert "qcompiler compile ... --tuning-log d" in out
    assert main(["--json" if w == "d" else w for w in "tune m.onnx --calibration c --log x --json".split()]) == 1
    assert json.loads(capsys.readouterr().out)["tasks"][0]["ratio"] == 0.8


def test_interrupted_means_130_and_a_summary(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def tune(*args: Any, watch: Any, **kwargs: Any) -> Tuning:
        watch(finished(interrupted=True))
        raise KeyboardInterrupt

    monkeypatch.setattr(qcompiler, "tune", tune, raising=False)
    assert main("tune m.onnx --calibration c --log d".split()) == 128 + signal.SIGINT
    assert "interrupted; the same command goes on" in capsys.readouterr().out


def test_the_live_table_shows_where_the_run_stands() -> None:
    from rich.console import Console

    state = finished(interrupted=True)
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(live_table(state, 20))
    text = console.export_text()
    for part in (">  test/copy", "2x3x4 > 2x3x4", "2000.0", "1600.0", "0.800", "trial 7 of 10", "left", "1 WRONG"):
        assert part in text
    state.doing = "build candidates: 3 of 40 tasks"
    console.print(live_table(state, 20))
    assert ", about 0:00:" in (line := console.export_text().splitlines()[-1]) and line.endswith("; build candidates: 3 of 40 tasks")


def test_without_a_terminal_a_line_says_what_begins(capsys: pytest.CaptureFixture[str]) -> None:
    state = finished(interrupted=True)
    state.time_limit = 5400.0
    with Display(argparse.Namespace(quiet=False, verbose=False)) as display:
        display.watch(state)
        display.watch(state)
    assert capsys.readouterr().err == f"tune: {len(state.tasks)} kernel shapes, 7 of 10 trials made, 1:30:00 at most ...\n"


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


def test_log_show_and_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    task = faulty_task(FaultyRow(), 2, 3, 4)
    monkeypatch.chdir(tmp_path)
    with opened("a", isa_of(NATIVE)) as writer:
        tuner = Tuner(Tuning(NATIVE, 1, [task], 10, None), None, writer, [], lambda state: None)  # type: ignore[arg-type]
        writer.append(tuner.record(task, {"kind": "backwards", "tasks": 1}, 1, 0.75, (3e-6,)))
        writer.append(tuner.record(task, {"kind": "error", "tasks": 1}, 1, failed="LLVM says no"))
    assert main("log merge a a --output b".split()) == 0
    assert f"b: 2 records of {isa_of(NATIVE)}" in capsys.readouterr().out
    assert main("log show b".split()) == 0
    out = capsys.readouterr().out
    assert "2 records of 1 workloads" in out
    assert "kind=backwards tasks=1" in out
    assert main("log show b --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["workloads"][0]["ratio"] == 0.75
    assert main("log show none".split()) == 2
    assert "is not a tuning log" in capsys.readouterr().err
