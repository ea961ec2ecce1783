"""Tuning on boards, in rounds.

program, log --export_round--> round --a fleet measures--> results --import_results--> log, and again
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from qcompiler.backend.cores import check_core
from qcompiler.backend.lowering import Program
from qcompiler.backend.toolchain import find_compiler
from qcompiler.backend.tuning_log import isa_of, opened, read_file
from qcompiler.base.errors import TuningError
from qcompiler.base.files import temporary_folder
from qcompiler.base.progress import silent
from qcompiler.base.targets import Target
from qcompiler.boards.board import Board
from qcompiler.boards.canary import make_canary
from qcompiler.calibration.data import Source
from qcompiler.importers.origin import AnyModel
from qcompiler.pipeline.options import Options, complete, takes_options
from qcompiler.tuning.fleet import Fleet
from qcompiler.tuning.remote import Exported, NothingNew, Report, check_round, export_round, import_results, lowered, measurable_tasks
from qcompiler.tuning.search import Search, Tuning, Watcher

CANDIDATES = 12  # per task and round: rounds are short, so that little is lost and boards can be shared


@takes_options
def tune_on_boards(
    model: AnyModel,
    boards: Sequence[Board],
    calibration: Source | None = None,
    *,
    log: str | os.PathLike[str],
    trials: int = 1000,
    time_limit: float | None = None,
    threads: int | None = None,
    candidates: int = CANDIDATES,
    watch: Watcher = lambda state: None,
    **options: Unpack[Options],
) -> Tuning:
    """Tune the kernels of a network on boards of one target, into the folder `log`, round by round.

    candidates: at most so many per kernel shape and round. Other arguments as `tune`.

    Raises TuningError (nothing to tune, boards of several targets), BoardError (no board is left), and what `tune` raises. However it ends, what was
    measured is in the log, but for the libraries that boards have in hand.
    """
    options = complete(options, "tune_on_boards")
    target, core = _kind(boards, options["core"])
    threads = check_round(target, candidates, threads)
    if trials < 1:
        raise TuningError(f"trials is {trials}; at least 1 is needed")
    with opened(log, isa_of(target)):  # a log that can't be written shows before anything long is begun
        pass
    programs = lowered(model, target, calibration, options)
    state = Tuning(target, threads, measurable_tasks(programs), trials, time_limit, core=core)
    with Fleet(boards, make_canary(target)) as fleet:
        state.started = time.monotonic()
        run = _Run(programs, log, fleet, state, candidates, watch, options["progress"] or silent)
        while not _over(state, log, run.deadline):
            before = state.trials
            try:
                run.round()
            except NothingNew:
                state.stopped = "nothing is left to try"
                break
            fleet.check()
            _recall(state, log)
            watch(state)
            if state.trials == before:
                state.stopped = "the last round brought no record"
                break
    watch(state)
    return state


def _kind(boards: Sequence[Board], core: str | None) -> tuple[Target, str]:
    """The one target and core of boards that tune together. core: the one that was asked for. Raises TuningError; TargetError for a missing compiler."""
    targets = list(dict.fromkeys(b.target for b in boards))
    if len(targets) != 1 or len({b.core for b in boards}) > 1:
        what = ", ".join(f"{b.name} ({b.target.name}{f', {b.core}' if b.core else ''})" for b in boards)
        raise TuningError(f"boards that tune together have one target and one core; these are {what or 'none'}")
    own = boards[0].core
    if core not in (None, own):
        raise TuningError(f"the core is {core!r}, and the boards are of {own or 'no core that boards.yaml names'}; leave it out")
    check_core(own, targets[0])
    find_compiler(targets[0])
    return targets[0], own


@dataclass
class _Run:
    """What the rounds of a run share. candidates: at most so many per task and round."""

    programs: Sequence[Program]
    log: str | os.PathLike[str]
    fleet: Fleet
    state: Tuning
    candidates: int
    watch: Watcher
    progress: Report

    @property
    def deadline(self) -> float:
        return self.state.started + (math.inf if self.state.time_limit is None else self.state.time_limit)

    def round(self) -> None:
        """Build candidates, for half of the time that is left at most, measure them, and log what was found. Raises NothingNew."""
        state, fleet, now = self.state, self.fleet, time.monotonic()
        fair = max(1, math.ceil((state.budget - state.trials) / len(state.tasks)))
        with temporary_folder() as folder:
            try:
                made = export_round(
                    self.programs,
                    self.log,
                    folder / "round",
                    min(self.candidates, fair),
                    state.threads,
                    self._building,
                    None,
                    state.core,
                    now + (self.deadline - now) / 2,
                )
            finally:
                state.doing = ""
            state.failed += made.failed
            self.watch(state)
            fleet.recruit()
            try:
                fleet.measure(made, state.threads, self.deadline)
            finally:
                _collect(fleet, made, folder, self.log, state)
                state.failed[:] = [f for f in state.failed if not f.startswith("board ")] + _board_trouble(fleet)

    def _building(self, stage: str, done: int, total: int) -> None:
        self.state.doing = f"{stage}: {done} of {total} tasks"
        self.watch(self.state)
        self.progress(stage, done, total)


def _over(state: Tuning, log: str | os.PathLike[str], deadline: float) -> bool:
    _recall(state, log)
    if time.monotonic() >= deadline:
        state.stopped = "the time limit is reached"
    elif state.trials >= state.budget:
        state.stopped = f"all {state.budget} trials are done"
    return bool(state.stopped)


def _recall(state: Tuning, log: str | os.PathLike[str]) -> None:
    """What the log knows of the tasks."""
    path = Path(log) / f"{isa_of(state.target)}.jsonl"
    Search(state.target, state.tasks, read_file(path) if path.is_file() else [], state.core)


def _board_trouble(fleet: Fleet) -> list[str]:
    return [f"board {name}: {why}" for name, why in fleet.out.items()] + [f"board {text}" for text in fleet.pauses]


def _collect(fleet: Fleet, made: Exported, folder: Path, log: str | os.PathLike[str], state: Tuning) -> None:
    """Import what a round brought."""
    results = fleet.round.results
    state.failed += fleet.round.failed
    if not any(line["step"] for lines in results.values() for line in lines):
        return
    header = {"results": 1, "set": made.digest, "host": fleet.host, "threads": fleet.threads}
    lines = [line for number in sorted(results) for line in results[number]]
    (folder / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [header, *lines]))
    try:
        found = import_results(folder / "results.jsonl", log)
    except TuningError as error:  # no default was right, say
        state.failed.append(str(error))
        return
    state.measured += found.measured + len(found.failed)
    state.wrong += found.wrong
    state.failed += found.failed
    state.turns += 1
    for number, measured in results.items():
        default = next((line["seconds"] for line in measured if line["step"] == 0 and line["status"] == "ok"), None)
        task = _task_of(made, number, state)
        if default and task is not None:
            task.seconds = task.seconds or default


def _task_of(made: Exported, number: int, state: Tuning) -> Any:
    manifest = json.loads((made.folder / "manifest.json").read_text())["tasks"][number]
    return next((t for t in state.tasks if t.row.name == manifest["row"] and t.workload == manifest["workload"]), None)
