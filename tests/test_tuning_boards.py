"""Tuning on boards: rounds that boards share, lose, lie about, and that a Ctrl-C ends."""

from __future__ import annotations

import importlib
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from board_server import BOARDS, Server, served, server
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backend.lowering import Program
from qcompiler.backend.tuning_log import read_log
from qcompiler.base.errors import BoardError
from qcompiler.boards.board import Board, load_boards
from qcompiler.boards.canary import Canary, make_canary
from qcompiler.cli.main import main
from qcompiler.pipeline.options import complete
from qcompiler.tuning import boards as tuning_boards
from qcompiler.tuning import fleet as tuning_fleet
from qcompiler.tuning.boards import tune_on_boards
from qcompiler.tuning.fleet import Fleet, _Round, _Share
from qcompiler.tuning.remote import export_round, lowered

__all__ = ["served", "server"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a network of three convolutions of different shapes, calibration data)."""
    folder, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    sizes = [8, 16, 24, 8]
    weights = [(rng.standard_normal((b, a, 1, 1)) / 4).astype(np.float32) for a, b in itertools.pairwise(sizes)]
    initializers = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    nodes = [helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"], kernel_shape=[1, 1]) for i in range(3)]
    ports = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [1, sizes[i], 6, 6]) for i in (0, 3)]
    graph = helper.make_graph(nodes, "three", ports[:1], ports[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), folder / "m.onnx")
    np.save(folder / "data.npy", rng.standard_normal((3, 8, 6, 6)).astype(np.float32))
    return folder / "m.onnx", folder / "data.npy"


@pytest.fixture(scope="module")
def canary(served: Server) -> Canary:
    return make_canary(load_boards(served.file)["one"].target)


@pytest.fixture(scope="module")
def programs(served: Server, model: tuple[Path, Path]) -> list[Program]:
    return lowered(model[0], load_boards(served.file)["one"].target, model[1], complete({"preset": "fast"}))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, canary: Canary, programs: list[Program]) -> Iterator[None]:
    """Short timings, one canary and one program for all tests, and no board that counts as slow because this machine is busy."""
    monkeypatch.setattr(tuning_boards, "lowered", lambda *arguments: programs)
    monkeypatch.setattr(tuning_fleet, "SECONDS", 0)
    monkeypatch.setattr(tuning_fleet, "SLOW", 1e9)
    monkeypatch.setattr(tuning_boards, "make_canary", lambda target: canary)
    yield


def boards_of(server: Server) -> list[Board]:
    found = load_boards(server.file)
    return [found[name] for name in BOARDS]


def tuned(model: tuple[Path, Path], boards: list[Board], log: Path, trials: int = 9, **options: Any) -> Any:
    return tune_on_boards(model[0], boards, model[1], log=log, trials=trials, candidates=3, threads=1, preset="fast", **options)


def points(log: Path) -> list[str]:
    return sorted(json.dumps([r.row, r.workload, r.params], sort_keys=True) for r in read_log(log) if not r.failed)


def test_three_boards_find_what_one_finds_by_hand(server: Server, model: tuple[Path, Path], tmp_path: Path) -> None:
    """The same candidates, each right and timed once; nothing is left on the boards, and no address is in the log."""
    state = tuned(model, boards_of(server), tmp_path / "log")
    assert (state.trials, state.measured, state.wrong, state.failed) == (9, 9, [], []) and state.stopped == "all 9 trials are done"
    assert all(len(t.seconds) == 1 and t.trials == 3 for t in state.tasks)
    words = [
        "tune",
        str(model[0]),
        "--calibration",
        str(model[1]),
        "--preset",
        "fast",
        "--candidates",
        "3",
        "--threads",
        "1",
        "--log",
        str(tmp_path / "by hand"),
    ]
    target = boards_of(server)[0].target
    assert main([*words, "--target", target.name, "--export-candidates", str(tmp_path / "round")]) == 0
    subprocess.run([*target.emulator, "./qc_measure", "results.jsonl", "0"], cwd=tmp_path / "round", check=True, capture_output=True)
    assert main(["tune", "--log", str(tmp_path / "by hand"), "--import-results", str(tmp_path / "round" / "results.jsonl")]) == 0
    assert points(tmp_path / "log") == points(tmp_path / "by hand")
    assert {r.core for r in read_log(tmp_path / "log")} == {"cortex-a76"} and {r.core for r in read_log(tmp_path / "by hand")} == {""}
    text = (tmp_path / "log" / f"{target.rows[0]}.jsonl").read_text()
    assert server.left() == [] and "127.0.0.1" not in text and str(server.folder) not in text


def test_boards_that_fail_are_given_up_and_nothing_is_lost(server: Server, model: tuple[Path, Path], tmp_path: Path, canary: Canary) -> None:
    """One dies in the middle and one hangs from then on; the third does what they leave. Then the last one goes too."""
    boards = boards_of(server)
    object.__setattr__(boards[1], "patience", 5.0)
    modes = iter(("die", "hang"))

    def watch(state: Any) -> None:
        for name, mode in zip(("one", "two"), modes, strict=False):
            server.mode(name, mode)

    state = tuned(model, boards, tmp_path / "log", watch=watch)
    assert state.trials == 9 and len(points(tmp_path / "log")) == 9
    assert {f.split(":")[0] for f in state.failed} <= {"board one", "board two"} and len(state.failed) == 2
    with pytest.raises(BoardError, match="no board is left to measure on.*one: "):
        tuned(model, boards[:2], tmp_path / "log", trials=99)


def test_a_board_that_lies_is_found_out(server: Server, model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong results that another board does not have are that board's fault. Alone it is believed, and no wrong candidate gets into the log."""
    server.mode("one", "lie")
    taken, take = threading.Event(), _Round.take

    def after_one(shared: _Round, board: str) -> _Share | None:
        if board != "one":
            taken.wait(60)
        share = take(shared, board)
        if board == "one":
            taken.set()
        return share

    monkeypatch.setattr(_Round, "take", after_one)
    state = tuned(model, boards_of(server), tmp_path / "log")
    assert state.wrong == [] and len(points(tmp_path / "log")) == 9
    assert [f for f in state.failed if f.startswith("board one: its results are wrong where those of ")]
    alone = tuned(model, boards_of(server)[:1], tmp_path / "alone")
    assert alone.trials == 0 and alone.stopped == "the last round brought no record"


def test_a_wrong_canary_keeps_a_board_out(server: Server, model: tuple[Path, Path], tmp_path: Path) -> None:
    server.mode("one", "wrong")
    with pytest.raises(BoardError, match="no board is left.*one: computes wrongly: the canary's results"):
        tuned(model, boards_of(server)[:1], tmp_path / "log")


def test_an_interrupted_tune_keeps_what_it_has(server: Server, model: tuple[Path, Path], tmp_path: Path) -> None:
    """Ctrl-C while one board hangs: what the others measured is in the log, the boards are left clean, and the same command goes on."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # what runs in the background of a shell ignores it
    code += f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from qcompiler.tuning import fleet; fleet.SECONDS = 0; fleet.SLOW = 1e9; "
    code += "from qcompiler.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["tune", str(model[0]), "--calibration", str(model[1]), "--preset", "fast", "--candidates", "2", "--threads", "1"]
    words += ["--log", str(tmp_path / "log"), "--boards", str(server.file), "--board", "one", "--board", "two", "--trials"]
    running = subprocess.Popen([sys.executable, "-c", code, *words, "300"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic() + 600
    while not (tmp_path / "log" / "candidates.json").exists() and time.monotonic() < waited:  # the first round is out
        time.sleep(0.02)
    server.mode("two", "hang")
    time.sleep(4)
    running.send_signal(signal.SIGINT)
    output, error = running.communicate(timeout=600)
    assert running.returncode == 130, error
    assert "interrupted; the same command goes on" in output
    assert server.left() == []
    before = points(tmp_path / "log")
    server.mode("two", "")
    assert main([*words, str(len(before) + 4)]) == 0
    assert len(points(tmp_path / "log")) >= len(before) + 4 and set(before) <= set(points(tmp_path / "log"))


# -- sharing a round --------------------------------------------------------------------------------------------------------------------------


def share(number: int) -> _Share:
    return _Share(number, {"t.so": b""}, 3)


def test_what_one_board_doubts_another_confirms() -> None:
    shared = _Round([share(0)], ["a", "b"], time.monotonic() + 10)
    first = shared.take("a")
    assert first is not None
    shared.give_back(first, [{"step": 0}], "a")
    assert shared.results == {} and shared.take("a") is None
    second = shared.take("b")
    assert second is first
    shared.give_back(second, [{"step": 1}], "b")
    assert shared.results == {0: [{"step": 1}]}


def test_doubts_that_nobody_can_settle_are_believed() -> None:
    shared = _Round([share(0)], ["a", "b"], time.monotonic() + 10)
    taken = shared.take("a")
    assert taken is not None
    shared.give_back(taken, [{"step": 0}], "a")
    shared.leave("b")
    assert shared.results == {0: [{"step": 0}]} and shared.take("a") is None


def test_a_library_that_no_board_can_measure_is_left() -> None:
    shared = _Round([share(0)], ["a"], time.monotonic() + 10)
    for _ in range(tuning_fleet.ATTEMPTS):
        taken = shared.take("a")
        assert taken is not None
        taken.attempts += 1
        shared.give_back(taken, None)
    assert shared.take("a") is None and len(shared.failed) == 1
    assert _Round([share(0)], ["a"], time.monotonic() - 1).take("a") is None


# -- what is refused ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--board", "four"], "no board 'four'"),
        (["--board", "one", "--board", "here"], "have one target and one core; these are one"),
        (["--any", "armv7-neon"], "no board for armv7-neon; its boards are for arm64-dotprod"),
        (["--any", "arm64-dotprod", "--board", "one"], "give one of them"),
        (["--board", "one", "--target", "arm64-neon"], "leave --target out"),
        (["--board", "one", "--export-candidates", "d"], "measure by themselves"),
        (["--board", "one", "--trials", "0"], "at least 1 is needed"),
        (["--board", "away"], "no board is left to measure on. away: can't be reached"),
    ],
)
def test_options_that_mean_nothing(server: Server, model: tuple[Path, Path], tmp_path: Path, options: list[str], message: str, capsys: Any) -> None:
    words = ["tune", str(model[0]), "--calibration", str(model[1]), "--preset", "fast", "--log", str(tmp_path / "log"), "--boards", str(server.file)]
    assert main([*words, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_fleet_leaves_nothing_when_it_can_not_begin(server: Server, canary: Canary) -> None:
    server.mode("two", "garbage")
    with Fleet(boards_of(server), canary) as fleet:
        assert set(fleet.out) == {"two"}
    assert server.left() == []


# -- the benchmark ------------------------------------------------------------------------------------------------------------------------------


def test_the_benchmark_of_shared_rounds(
    programs: list[Program], canary: Canary, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """Equal records on three boards and by hand, and a third of the time on a simulated clock."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    script = importlib.import_module("boards")
    monkeypatch.setattr(script, "make_canary", lambda target: canary)
    monkeypatch.setattr(tuning_fleet, "SECONDS", 3)
    made = export_round(programs, tmp_path / "hand", tmp_path / "round", 2, 1, lambda *_: None, None)
    found = script.compared(made, tmp_path / "hand", 3, programs[0].target)
    assert (found["records"], found["equal"], found["lost"]) == (6, True, {})
    sizes = [(made.folder / name).stat().st_size for name, *_ in made.plans]
    assert found["one"] == pytest.approx(9 + sum(sizes) / script.RATE, abs=0.01) and found["many"] == pytest.approx(3 + max(sizes) / script.RATE, abs=0.01)
