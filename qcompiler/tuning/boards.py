"""Tuning on boards: rounds of candidates, each shared out among boards of one target, library by library.

    program, log --export_round--> round --boards, in parallel--> results --import_results--> log, and again

A library is measured on one board, all its candidates in turns, so ratios never compare two boards. What a board leaves undone another does. Wrong results
are believed when a second board has them too, or the only board computes its canary rightly after them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from qcompiler.backend.artifact import find_compiler
from qcompiler.backend.tuning_log import isa_of, opened, read_file
from qcompiler.base.errors import BoardError, BoardLost, QCompilerError, TuningError
from qcompiler.base.files import temporary_folder
from qcompiler.base.progress import silent
from qcompiler.boards import device as devices
from qcompiler.boards.board import Board
from qcompiler.boards.canary import Canary, make_canary
from qcompiler.boards.check import Checked, judge, probe, too_hot
from qcompiler.boards.device import Device, program
from qcompiler.importers.origin import AnyModel
from qcompiler.pipeline.options import Options, complete, takes_options
from qcompiler.tuning.remote import Exported, NothingNew, candidates_text, check_round, export_round, import_results, lowered, measurable_tasks, parse_results
from qcompiler.tuning.search import Search, Tuning, Watcher

CANDIDATES = 12  # per task and round: rounds are short, so that little is lost and boards can be shared
SECONDS = 3  # of timing per library
ATTEMPTS = 3  # of a library, on whichever boards
SLOW = 1.5  # times the canary's first time, from which a board is left alone for a round
_STATUSES = ("ok", "wrong", "crashed", "hung", "refused")

Lines = list[dict[str, Any]]


@dataclass
class _Share:
    """One library of a round. doubted: {board that found wrong results: what it found}."""

    number: int
    files: Mapping[str, bytes]
    steps: int
    attempts: int = 0
    doubted: dict[str, Lines] = field(default_factory=dict)


class _Round:
    """The libraries of a round, as boards take and return them. All methods may be called from any thread."""

    def __init__(self, shares: Sequence[_Share], boards: Sequence[str], deadline: float) -> None:
        self._changed = threading.Condition()
        self._left, self._at_work, self._boards, self._deadline = list(shares), 0, set(boards), deadline
        self.results: dict[int, Lines] = {}
        self.failed: list[str] = []

    @property
    def open(self) -> bool:
        """Whether there is time left."""
        return time.monotonic() < self._deadline

    def take(self, board: str) -> _Share | None:
        """A library that this board has not looked at; waits while another board may give one back. None when there is nothing left for it."""
        with self._changed:
            while self.open:
                if share := next((s for s in self._left if board not in s.doubted), None):
                    self._left.remove(share)
                    self._at_work += 1
                    return share
                if not self._at_work:
                    return None
                self._changed.wait(0.2)
            return None

    def give_back(self, share: _Share, lines: Lines | None, doubtful: str = "") -> None:
        """A library was measured, or not (None). doubtful: the board whose wrong results another board is to confirm."""
        with self._changed:
            self._at_work -= 1
            others = self._boards - set(share.doubted) - {doubtful}
            if lines is not None and doubtful and not share.doubted and others:
                share.doubted[doubtful] = lines
                self._left.append(share)
            elif lines is not None:
                self.results[share.number] = lines
            elif share.attempts < ATTEMPTS:
                self._left.insert(0, share)
            else:
                self.failed.append(f"{next(iter(share.files))}: {ATTEMPTS} attempts to measure it ended without results")
            self._changed.notify_all()

    def leave(self, board: str) -> None:
        """The board takes no more."""
        with self._changed:
            self._boards.discard(board)
            for share in [s for s in self._left if s.doubted and not self._boards - set(s.doubted)]:  # nobody is left to confirm
                self._left.remove(share)
                self.results[share.number] = next(iter(share.doubted.values()))
            self._changed.notify_all()


@dataclass
class _Member:
    """A board at work. close: leaves it. canary: seconds of its first."""

    board: Board
    device: Device
    close: contextlib.ExitStack
    canary: float


class Fleet:
    """Boards of one target that measure together. `out`: those that were given up, and why; `pauses`: what else happened, in words."""

    def __init__(self, boards: Sequence[Board], canary: Canary) -> None:
        self.boards, self.canary = boards, canary
        self.out: dict[str, str] = {}
        self.pauses: list[str] = []
        self._members: dict[str, _Member] = {}
        self._stop = threading.Event()
        self._measurer = program("qc_measure", boards[0].target)
        self.host, self.threads = "", 1

    def __enter__(self) -> Fleet:
        try:
            self._each(self.boards, self._join)
            self.check()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._each([m.board for m in self._members.values()], lambda b: self._members.pop(b.name).close.close())

    def check(self) -> None:
        """Raises BoardError when no board is left."""
        if not self._members:
            raise BoardError("no board is left to measure on. " + "; ".join(f"{name}: {why}" for name, why in self.out.items()))

    def _each(self, boards: Sequence[Board], call: Callable[[Board], None]) -> None:
        """Call for every board, all at once. A Ctrl-C ends what they do."""
        if not boards:
            return
        with ThreadPoolExecutor(len(boards)) as pool:
            waiting = {pool.submit(call, board) for board in boards}
            try:
                while waiting:
                    done, waiting = wait_for(waiting, 0.2)
                    for future in done:
                        future.result()
            except BaseException:
                self._stop.set()
                raise

    def _join(self, board: Board) -> None:
        stack = contextlib.ExitStack()
        try:
            device = stack.enter_context(devices.opened(board, self._stop))
            found = self._sing(device)
        except QCompilerError as error:
            stack.close()
            self._give_up(board, error)
            return
        self._members[board.name] = _Member(board, device, stack, found.seconds or math.inf)

    def _sing(self, device: Device) -> Checked:
        found = probe(device)
        judge(device, found, self.canary)
        return found

    def _give_up(self, board: Board, error: object) -> None:
        self.out.setdefault(board.name, str(error).removeprefix(f"board '{board.name}': "))
        if member := self._members.pop(board.name, None):
            member.close.close()

    def measure(self, made: Exported, threads: int, deadline: float) -> _Round:
        """Share out a round. Boards that fail are given up. The round's results are valid however this ends."""
        shares = []
        for number, plan in enumerate(made.plans):
            files = {plan[0]: (made.folder / plan[0]).read_bytes(), "candidates.txt": candidates_text(made.digest, threads, [plan]).encode()}
            shares.append(_Share(number, files, int(plan[1].split()[1])))
        self.round = _Round(shares, list(self._members), deadline)
        try:
            self._each([m.board for m in self._members.values()], lambda board: self._work(board, made.digest))
        finally:
            self._each([m.board for m in self._members.values() if m.board.name in self.out], lambda board: self._give_up(board, ""))
        return self.round

    def _work(self, board: Board, digest: str) -> None:
        """A board's part of a round."""
        member, losses = self._members[board.name], 0
        try:
            if self._unfit(member):
                return
            while not self._stop.is_set() and board.name not in self.out and (share := self.round.take(board.name)) is not None:
                share.attempts += 1
                try:
                    lines = self._one(member, share, digest)
                    wrong = any(line["status"] == "wrong" for line in lines)
                    if wrong:
                        self._sing(member.device)  # raises where the board itself is wrong
                except BoardLost as error:
                    self.round.give_back(share, None)
                    losses += 1
                    if self._stop.is_set():
                        return
                    if losses > 1 or not self._again(member):
                        self._give_up(board, error)
                        return
                    continue
                except BaseException:
                    self.round.give_back(share, None)
                    raise
                losses = 0
                for name in () if wrong else share.doubted:
                    self.out.setdefault(name, f"its results are wrong where those of '{board.name}' are right; its memory or its CPU is faulty")
                self.round.give_back(share, lines, board.name if wrong else "")
        except BoardError as error:
            self._give_up(board, error)
        finally:
            self.round.leave(board.name)

    def _again(self, member: _Member) -> bool:
        """Reach a board anew after it was lost."""
        member.close.close()
        try:
            member.device = member.close.enter_context(devices.opened(member.board, self._stop))
            self._sing(member.device)
        except QCompilerError:
            return False
        return True

    def _unfit(self, member: _Member) -> bool:
        """Whether the board is too hot or too slow for this round, and others can do it. One that is alone cools down first."""
        found = self._sing(member.device)
        seconds, alone = found.seconds or math.inf, len(self._members) == 1
        trouble = f"its canary takes {seconds / member.canary:.2f} of its best time" if seconds > SLOW * member.canary else ""
        trouble = "it is too hot" if too_hot(member.board, found) else trouble
        if trouble:
            self.pauses.append(f"{member.board.name}: {trouble}; {'alone, so it goes on' if alone else 'left alone for a round'}")
        while alone and too_hot(member.board, found) and self.round.open and not self._stop.wait(5):
            found = probe(member.device)
        member.canary = min(member.canary, seconds)
        return bool(trouble) and not alone

    def _one(self, member: _Member, share: _Share, digest: str) -> Lines:
        """Measure a library. Raises BoardLost where the answer can't be right."""
        where = f"board '{member.board.name}'"
        command = ["./qc_measure", "results.jsonl", str(SECONDS)]
        answer = member.device.run(command, staying={"qc_measure": self._measurer}, passing=share.files, wanted=["results.jsonl"])
        if "results.jsonl" not in answer.files:
            raise member.device.failed(answer, "qc_measure")
        try:
            header, lines = parse_results(answer.files["results.jsonl"].decode(), where)
            if header["set"] != digest:
                raise TuningError(f"{where}: answers for another round")
            for line in lines:
                seconds = line.get("seconds", [])
                fine = line["task"] == 0 and 0 <= line["step"] < share.steps and line["status"] in _STATUSES and len(seconds) <= 2
                ways = 2 if header["threads"] > 1 else 1
                if (
                    not fine
                    or (seconds and len(seconds) != ways)
                    or not all(isinstance(s, (int, float)) and 0 < s < 1e6 for s in seconds)
                    or (line["status"] == "ok" and not seconds)
                ):
                    raise TuningError(f"{where}: a line that can't be: {str(line)[:100]}")
        except (TuningError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise BoardLost(f"{where}: its results can't be read ({error})") from error
        self.host, self.threads = member.board.core or header["host"], header["threads"]
        return [{**line, "task": share.number} for line in lines]


@takes_options
def tune_on_boards(
    model: AnyModel,
    boards: Sequence[Board],
    calibration: Any = None,
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
    targets = list(dict.fromkeys(b.target for b in boards))
    if len(targets) != 1 or len({b.core for b in boards}) > 1:
        what = ", ".join(f"{b.name} ({b.target.name}{f', {b.core}' if b.core else ''})" for b in boards)
        raise TuningError(f"boards that tune together have one target and one core; these are {what or 'none'}")
    (target,) = targets
    find_compiler(target)
    threads = check_round(target, candidates, threads)
    if trials < 1:
        raise TuningError(f"trials is {trials}; at least 1 is needed")
    with opened(log, isa_of(target)):  # a log that can't be written shows before anything long is begun
        pass
    lowered_program = lowered(model, target, calibration, options)
    state = Tuning(target, threads, measurable_tasks(lowered_program), trials, time_limit)
    progress = options["progress"] or silent
    with Fleet(boards, make_canary(target)) as fleet:
        state.started = time.monotonic()
        deadline = state.started + (math.inf if time_limit is None else time_limit)
        while not _over(state, log, deadline):
            before = state.trials
            with temporary_folder() as folder:
                try:
                    made = export_round(lowered_program, log, folder / "round", min(candidates, _fair(state)), threads, progress, None)
                except NothingNew:
                    state.stopped = "nothing is left to try"
                    break
                state.failed += made.failed
                watch(state)
                try:
                    fleet.measure(made, threads, deadline)
                finally:
                    _collect(fleet, made, folder, log, state)
                    state.failed[:] = [f for f in state.failed if not f.startswith("board ")] + _board_trouble(fleet)
            fleet.check()
            _recall(state, log)
            watch(state)
            if state.trials == before:
                state.stopped = "the last round brought no record"
                break
    watch(state)
    return state


def _fair(state: Tuning) -> int:
    return max(1, math.ceil((state.budget - state.trials) / len(state.tasks)))


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
    Search(state.target, state.tasks, read_file(path) if path.is_file() else [])


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
