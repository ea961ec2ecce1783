"""A library on several boards: samples are shared out, the report and the digest are those of one process bit for bit, and a lost board costs nothing."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler.base.errors import BoardError, BoardLost
from qcompiler.boards.board import load_boards
from qcompiler.boards.device import opened
from qcompiler.boards.session import BoardSession
from qcompiler.boards.several import SharedSession
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.numerics.metrics import Accumulator

NAMES = ("a", "b", "c")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """boards.yaml with three boards, which are this machine."""
    (tmp_path / "boards.yaml").write_text("boards:\n" + "".join(f"  {n}: {{target: native, local: true, folder: {tmp_path}/work}}\n" for n in NAMES))
    np.save(tmp_path / "x.npy", np.stack([s["image"] for s in demo_data()[1][:20]]))
    np.save(tmp_path / "labels.npy", demo_data()[2][:20])
    return tmp_path


@pytest.fixture
def library(digits: Callable[[str], Path]) -> Path:
    return digits("native")


def boards(place: Path, *names: str) -> list[str]:
    return ["--boards", str(place / "boards.yaml"), *(w for n in names for w in ("--board", n))]


def test_the_report_of_one_process_bit_for_bit(place: Path, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers, outputs, accuracy, a metric over all samples, and the digest; on this machine, on one board, on three, and on all of a target."""
    data = ["--data", str(place / "x.npy")]
    native = qcompiler.load(library).manifest["target"]
    found, digests = [], []
    for where in ([], boards(place, "a"), boards(place, *NAMES), [*boards(place), "--any", native]):
        assert main(["digest", str(library), *data, "--json", *where]) == 0
        digests.append(json.loads(capsys.readouterr().out))
        words = ["verify", str(library), "--model", str(MODEL), *data, "--labels", str(place / "labels.npy"), "--metric", "top5", "--layer-samples", "7"]
        assert main([*words, "--expect-digest", digests[0]["digest"], "--json", "--quiet", *where]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[1:] == found[:1] * 3 and digests[1:] == digests[:1] * 3
    assert len(found[0]["layers"]) > 5 and found[0]["samples"] == 20 and found[0]["warnings"] == []
    assert list((place / "work").iterdir()) == []


@contextlib.contextmanager
def shared(place: Path, library: Path, stop: threading.Event | None = None) -> Any:
    known = load_boards(place / "boards.yaml")
    with contextlib.ExitStack() as stack:
        yield SharedSession([BoardSession(stack.enter_context(opened(b)), library) for b in known.values()], stop or threading.Event())


def failing(monkeypatch: pytest.MonkeyPatch, *names: str, after: int = 2) -> dict[str, int]:
    """Boards that are lost behind their run number `after`; how many runs each has begun. The others begin no later one before all of them are lost."""
    runs: dict[str, int] = {}
    lost = {name: threading.Event() for name in names}

    def run(self: BoardSession, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = self.device.board.name
        runs[name] = runs.get(name, 0) + 1
        if runs[name] > after and name in names:
            lost[name].set()
            raise BoardLost(f"board '{name}': the connection is lost")
        if runs[name] > after:
            assert all(event.wait(60) for event in lost.values())
        return one(self, inputs)

    one = BoardSession.run
    monkeypatch.setattr(BoardSession, "run", run)
    return runs


def test_samples_of_a_lost_board_go_to_others(place: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, labels = place / "x.npy", place / "labels.npy"
    alone = qcompiler.verify(library, MODEL, data, labels=labels)
    runs = failing(monkeypatch, "a", "c")
    with shared(place, library) as session:
        report = qcompiler.verify(session, MODEL, data, labels=labels)
    assert (report.outputs, report.layers, report.int8_accuracy) == (alone.outputs, alone.layers, alone.int8_accuracy)
    assert sorted(report.warnings) == [f"board '{n}': the connection is lost; other boards did its part" for n in ("a", "c")]
    assert runs["a"] == runs["c"] == 3 and sum(runs.values()) == 20 - 8 + 2  # eight were traced


def test_no_board_is_left(place: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, *NAMES)
    with shared(place, library) as session, pytest.raises(BoardError, match="no board is left to run on. .*'a': the connection is lost.*'c'|'b'"):
        qcompiler.verify(session, MODEL, place / "x.npy", layer_samples=0)


def test_an_error_elsewhere_ends_what_boards_do(place: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, say: nobody waits for boards that have samples in hand."""
    stop = threading.Event()

    def hang(self: BoardSession, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert stop.wait(60)
        raise BoardLost("stopped")

    def interrupt(stage: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    one = BoardSession.run
    with shared(place, library, stop) as session:
        monkeypatch.setattr(BoardSession, "run", lambda self, inputs: (hang if self.device.board.name != "a" else one)(self, inputs))
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            qcompiler.verify(session, MODEL, place / "x.npy", layer_samples=0, progress=lambda *at: interrupt(*at) if at[0] == "verify" else None)
    assert stop.is_set() and time.monotonic() - begin < 50


def test_what_several_boards_can_not_do(place: Path, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", str(library), "--model", str(MODEL), "--data", str(place / "x.npy")]
    for more, said in (
        ([*boards(place, "a", "b"), "--report", str(place / "page.html")], "--report has the times of one board"),
        ([*boards(place, "a"), "--any", "native"], "--board names boards and --any takes all of a target; give one of them"),
        ([*boards(place), "--any", "armv7-neon"], "no board for armv7-neon"),
        ([*boards(place, "a", "d")], "no board 'd'"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert not (place / "page.html").exists()


def test_a_report_checks_a_digest_and_test_vectors(digits: Callable[[str], Path], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As verify without a page does, here and on a board, and the page says it."""
    library = tmp_path / "tested.so"
    qcompiler.compile(MODEL, calibration=demo_data()[0], preset="fast", selftest=1).save(library)
    assert main(["digest", str(library), "--data", str(place / "x.npy"), "--json"]) == 0
    right = json.loads(capsys.readouterr().out)["digest"]
    words = ["verify", str(library), "--model", str(MODEL), "--data", str(place / "x.npy"), "--report", str(place / "page.html"), "--expect-digest"]
    for digest, where, status in ((right, [], 0), ("0" * 64, [], 1), ("0" * 64, boards(place, "a"), 1)):
        assert main([*words, digest, *where]) == status
        said, page = capsys.readouterr().out, (place / "page.html").read_text()
        assert ("some result has other bits" in said) == ("some result has other bits" in page) == bool(status)
        assert "digest of all results" in page and "test vectors of the library" in page
    assert main([*words, "12"]) == 2
    assert "'12' is no digest" in capsys.readouterr().err


def test_merged_sums_have_the_bits_of_added_ones() -> None:
    """Also where shapes differ from pair to pair, where elements are masked or not finite, and with channels."""
    rng = np.random.default_rng(0)
    for step in (None, 0.1):
        whole, merged = Accumulator(step), Accumulator(step)
        for i in range(12):
            shape = (2, 3 + i % 2, 17)
            reference = rng.standard_normal(shape).astype(np.float32)
            if i % 5 == 0:
                reference[0, 0, 0] = -1e30
            if i == 7:
                reference[0, 1, 3] = np.inf
            actual = reference + rng.standard_normal(shape).astype(np.float32) * np.float32(1e-3)
            one = Accumulator(step)
            with np.errstate(invalid="ignore"):
                one.add(actual, reference)
                whole.add(actual, reference)
            merged.merge(one)
            for key, value in vars(whole).items():
                np.testing.assert_equal(vars(merged)[key], value, key)
            assert str(merged.metrics()) == str(whole.metrics())
