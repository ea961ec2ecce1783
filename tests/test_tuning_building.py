"""Candidates built by several processes at once: the same round as by one, whatever fails, and an end that waits for nothing."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_nets import OnnxNet
from tuning_rows import FaultyRow, copy_op

from qcompiler.backend.lowering import Program
from qcompiler.backend.tuning_log import workload_of
from qcompiler.base.parallel import in_order
from qcompiler.base.targets import Target, find_target
from qcompiler.pipeline.options import complete
from qcompiler.schedules.table import Kernel, OpCall
from qcompiler.tuning import boards as tuning_boards
from qcompiler.tuning import building
from qcompiler.tuning import remote as tuning_remote
from qcompiler.tuning.building import libraries
from qcompiler.tuning.model import Space
from qcompiler.tuning.remote import NothingNew, export_round, lowered
from qcompiler.tuning.search import Search, Task, Tuning
from qcompiler.tuning.worker import Limits

NATIVE = find_target("native")


@dataclass
class AwayRow(FaultyRow):
    """As `FaultyRow`, of kinds that only a process other than this one can't build: "crash" ends it, "hang" never returns, "full" finds no room on its disk."""

    default_kind: str = "copy"
    kinds: tuple[str, ...] = ("copy", "backwards", "crash")
    home: int = field(default_factory=os.getpid)

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return {"kind": list(self.kinds), "tasks": [1]}

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        if os.getpid() != self.home and params["kind"] == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if os.getpid() != self.home and params["kind"] == "hang":
            time.sleep(3600)
        if os.getpid() != self.home and params["kind"] == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().build(op, {**params, "kind": {"crash": "outside", "hang": "wrong", "full": "wrong"}.get(params["kind"], params["kind"])}, target)


def task(row: FaultyRow, *shape: int) -> Task:
    op = copy_op(*shape)
    return Task(row, op, workload_of(op), Space.of(row.space(op, NATIVE), row.default(op, NATIVE)), 1)


def search(*rows: FaultyRow) -> Search:
    return Search(NATIVE, [task(row, 2, 3, 4 + i) for i, row in enumerate(rows)], [])


def children() -> set[int]:
    found = itertools.chain.from_iterable(p.read_text().split() for p in Path("/proc/self/task").glob("*/children"))
    return {int(p) for p in found if b"qcompiler.tuning.worker" in Path(f"/proc/{p}/cmdline").read_bytes()}


@pytest.mark.parametrize("processes", [1, 3])
def test_what_one_process_can_not_build_costs_nobody_else(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that crashes is left out; a task whose default does has nothing; the libraries come in the order of the tasks."""
    monkeypatch.setattr(building, "cores", lambda: processes)
    rows = [AwayRow(), AwayRow("crash"), AwayRow(kinds=("copy",)), AwayRow(kinds=("copy", "backwards"))]
    with contextlib.closing(libraries(search(*rows), NATIVE, 3, lambda: 1 << 20)) as made:
        found = list(made)
    assert [[p["kind"] for p in library.points] for library in found if library.data] == [["copy", "backwards"], ["copy", "backwards"]]
    assert [bool(library.data) for library in found] == [True, False, False, True]
    assert [len(library.failed) for library in found] == [1, 1, 0, 0] and all("SIGSEGV" in f for library in found for f in library.failed)
    assert [len(library.sums) for library in found] == [2, 0, 0, 2] and not children()


def test_an_end_in_the_middle_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while processes are at work, as an error in whoever takes the libraries: they end now."""
    monkeypatch.setattr(building, "cores", lambda: 2)
    made = libraries(search(AwayRow(kinds=("copy", "backwards")), *(AwayRow(kinds=("copy", "hang")) for _ in range(3))), NATIVE, 3, lambda: 1 << 20)
    with pytest.raises(KeyboardInterrupt), contextlib.closing(made):
        assert next(made).data and children()
        begin = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - begin < 20 and not children()


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "cores", lambda: 1)
    with contextlib.closing(libraries(search(AwayRow(kinds=("copy", "backwards", "full"))), NATIVE, 3, lambda: 1 << 20)) as made:
        (found,) = made
    assert [p["kind"] for p in found.points] == ["copy", "backwards"] and found.data
    assert len(found.failed) == 1 and "No space left on device" in found.failed[0]


def test_a_process_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "cores", lambda: 2)
    rows = [AwayRow(kinds=("copy", "backwards", "hang")), AwayRow(kinds=("copy", "backwards"))]
    with contextlib.closing(libraries(search(*rows), NATIVE, 3, lambda: 1 << 20, Limits(prepare=8, build=1))) as made:
        first, second = made
    assert [p["kind"] for p in first.points] == ["copy", "backwards"] and "took longer than" in first.failed[0] and second.data and not second.failed


def test_what_is_over_begins_no_further_task() -> None:
    rows = [AwayRow(kinds=("copy", "backwards")) for _ in range(3)]
    with contextlib.closing(libraries(search(*rows), NATIVE, 3, lambda: 1 << 20, over=lambda: True)) as made:
        found = list(made)
    assert [bool(library.data) for library in found] == [True, False, False] and found[1].choice.lacking == "no time left in this round"


def test_a_time_limit_leaves_half_for_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is left of it, and who watches sees what is being built."""
    state, left, seen = Tuning(NATIVE, 1, [task(AwayRow(), 2, 3)], 10, 60.0), list[float](), list[str]()

    def exported(*arguments: Any) -> None:
        arguments[5]("build candidates", 1, 4)
        left.append(arguments[-1] - time.monotonic())
        raise NothingNew("all is known")

    monkeypatch.setattr(tuning_boards, "export_round", exported)
    state.started -= 20
    run = tuning_boards._Run([], "log", None, state, 12, lambda s: seen.append(s.doing), lambda *at: None)  # type: ignore[arg-type]
    with pytest.raises(NothingNew):
        run.round()
    assert 15 < left[0] <= 20 and seen == ["build candidates: 1 of 4 tasks"] and state.doing == ""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Program]:
    folder, net = tmp_path_factory.mktemp("model"), OnnxNet()
    x = net.input("x", 1, 8, 10, 10)
    for channels in (16, 24, 8, 12):
        x = net.op("Relu", net.op("Conv", x, net.weight(channels, {16: 8, 24: 16, 8: 24, 12: 8}[channels], 3, 3), pads=[1, 1, 1, 1], kernel_shape=[3, 3]))
    np.save(folder / "data.npy", np.random.default_rng(0).standard_normal((4, 8, 10, 10)).astype(np.float32))
    return lowered(net.save(folder / "m.onnx", [x]), NATIVE, folder / "data.npy", complete({"preset": "fast"}))


@pytest.mark.parametrize("room", [None, 40_000])
def test_the_same_round_on_any_number_of_cores(programs: list[Program], tmp_path: Path, room: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the folder gets full, so that choices are cut by libraries that were not built when they were made."""
    if room is not None:
        monkeypatch.setattr(tuning_remote, "SHARE", tuning_remote.SIZE_LIMIT // room)
    rounds = []
    for processes in (1, 4):
        monkeypatch.setattr(building, "cores", lambda: processes)  # noqa: B023
        steps: list[int] = []
        made = export_round(programs, tmp_path / f"log{processes}", tmp_path / f"round{processes}", 4, 1, lambda *at: steps.append(at[1]), None)  # noqa: B023
        rounds.append(({p.name: p.read_bytes() for p in made.folder.iterdir()}, made.plans, made.skipped, made.digest, steps))
    assert rounds[0] == rounds[1] and rounds[0][4] == list(range(5))


def test_a_choice_is_cut_to_what_has_room() -> None:
    row = AwayRow()
    choice = building.Choice(task(row, 2, 3), [{"n": n} for n in range(4)], [100, 200, 300, 300])
    assert [len(choice.within(room).points) for room in (0, 200, 299, 300, 1000)] == [2, 2, 2, 4, 4]


def test_results_that_are_not_taken_stop_the_work() -> None:
    """`in_order` tells its caller before it waits for what is under way."""
    stopped: list[str] = []

    def work(worker: str, item: int) -> int:
        while item and not stopped:
            time.sleep(0.01)
        return item

    def results() -> Iterator[int]:
        with contextlib.closing(in_order(work, ["a", "b"], range(9), lambda: stopped.append("now"))) as found:
            yield next(found)

    assert list(results()) == [0] and stopped == ["now"]
