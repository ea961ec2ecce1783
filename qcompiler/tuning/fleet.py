"""Boards of one target that measure a round of candidates together, library by library, and are watched while they do.

A library is measured on one board, all its candidates in turns, so ratios never compare two boards. What a board leaves undone another does. Wrong results
are believed when a second board has them too, or the only board computes its canary rightly after them.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from typing import Any

from qcompiler.base.errors import BoardError, BoardLost, QCompilerError, TuningError
from qcompiler.boards import device as devices
from qcompiler.boards.board import Board
from qcompiler.boards.canary import Canary
from qcompiler.boards.check import Checked, judge, probe, too_hot
from qcompiler.boards.device import Device, program
from qcompiler.tuning.remote import Exported, candidates_text, parse_results

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
        self._lost: set[str] = set()  # of those given up: where only the connection was at fault
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

    def recruit(self) -> None:
        """Take boards again that a farm lends, and whose workers were lost and are back."""
        back = [b for b in self.boards if b.name in self._lost and b.name not in self._members and b.lender is not None and b.lender.present(b)]
        for board in back:
            self._lost.discard(board.name)
            self.pauses.append(f"{board.name}: {self.out.pop(board.name)}; back again")
        self._each(back, self._join)

    def _give_up(self, board: Board, error: object) -> None:
        if isinstance(error, BoardLost):
            self._lost.add(board.name)
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
            try:
                unfit = self._unfit(member)
            except BoardLost:  # since the last round
                if self._stop.is_set() or not self._again(member):
                    raise
                self.pauses.append(f"{board.name}: it was lost between two rounds, and reached anew")
                unfit = False
            if unfit:
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
        self.host, self.threads = header["host"], header["threads"]
        return [{**line, "task": share.number} for line in lines]
