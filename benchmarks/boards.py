"""A round of tuning on several emulated boards against the same round carried by hand: equal records, and the time that sharing saves.

    python benchmarks/boards.py [--data FOLDER] [--model mobilenet_v2] [--target arm64-dotprod] [--boards 3] [--candidates 1] [--images 4]

An emulator's times mean nothing, so time is simulated: the fleet's own threads, queue and rules share out the libraries, and a library takes a board
what it takes a real one: the seconds that qc_measure gives it, and its transfer at 10 MB/s. A clock that all boards share goes on when each of them
waits. Building the candidates is not in it: that is this machine's work, before the boards', and printed beside it as measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qcompiler.backend.tuning_log import read_log
from qcompiler.base.targets import find_target
from qcompiler.boards.board import Board
from qcompiler.boards.canary import make_canary
from qcompiler.pipeline.options import complete
from qcompiler.tuning import fleet as fleets
from qcompiler.tuning.fleet import Fleet
from qcompiler.tuning.remote import Exported, export_round, import_results, lowered, parse_results

RATE = 10e6  # bytes a second to a board


class Clock:
    """Simulated seconds that pass when all who work wait for them: `settled`(how many wait)."""

    def __init__(self, settled: Callable[[int], bool]) -> None:
        self.now, self._settled, self._waking, self._changed = 0.0, settled, [], threading.Condition()  # type: float, Any, list[float], threading.Condition

    def sleep(self, seconds: float) -> None:
        with self._changed:
            mine = self.now + seconds
            self._waking.append(mine)
            while self.now < mine:
                if min(self._waking) > self.now and self._settled(len(self._waking)):
                    self.now = min(self._waking)
                    self._changed.notify_all()
                else:
                    self._changed.wait(0.02)
            self._waking.remove(mine)


class Simulated(Fleet):
    """Boards that answer what was measured before, after the time that it takes. answers: lines by library."""

    def __init__(self, boards: list[Board], answers: Mapping[int, list[dict[str, Any]]]) -> None:
        self.boards, self.clock, self._answers = boards, Clock(self._settled), answers
        self.out, self.pauses, self._stop, self.host, self.threads = {}, [], threading.Event(), "simulated", 1
        self._members = {b.name: fleets._Member(b, None, contextlib.ExitStack(), 1.0) for b in boards}  # type: ignore[arg-type]

    def __enter__(self) -> Simulated:
        return self

    def _settled(self, asleep: int) -> bool:
        """Whether every library that was handed out is being waited for, and no board is about to take another."""
        shared = self.round
        return asleep >= shared._at_work and (not shared._left or shared._at_work >= len(self.boards))

    def _unfit(self, member: Any) -> bool:
        return False

    def _one(self, member: Any, share: Any, digest: str) -> list[dict[str, Any]]:
        self.clock.sleep(fleets.SECONDS + sum(map(len, share.files.values())) / RATE)
        return list(self._answers[share.number])


def simulated_seconds(made: Exported, answers: Mapping[int, list[dict[str, Any]]], count: int) -> float:
    """Of a round on so many boards."""
    board = Board("b", find_target("arm64-dotprod"), "emulator")
    with Simulated([dataclasses.replace(board, name=f"b{i}") for i in range(count)], answers) as fleet:
        found = fleet.measure(made, 1, math.inf)
    assert found.results == answers, "a library was lost or measured twice"
    return fleet.clock.now


def answers_by_hand(made: Exported, emulator: tuple[str, ...]) -> dict[int, list[dict[str, Any]]]:
    """Run an exported folder as its user does, under the emulator; the lines of results.jsonl by library."""
    subprocess.run([*emulator, "./qc_measure", "results.jsonl", "0"], cwd=made.folder, check=True, capture_output=True)
    found: dict[int, list[dict[str, Any]]] = {}
    for line in parse_results((made.folder / "results.jsonl").read_text(), "by hand")[1]:
        found.setdefault(line["task"], []).append(line)
    return found


def points(log: Path) -> list[str]:
    """What a log's records say, without the times."""
    return sorted(json.dumps([r.row, r.workload, r.params, r.core, bool(r.failed)], sort_keys=True) for r in read_log(log))


def compared(made: Exported, log: Path, boards: int, target: Any) -> dict[str, Any]:
    """A round that `log` waits for: by hand into it, and on emulated boards into a copy of it."""
    other = log.with_name("boards")
    shutil.copytree(log, other)
    answers = answers_by_hand(made, target.emulator)
    import_results(made.folder / "results.jsonl", log)
    shared = [Board(f"b{i}", target, "emulator") for i in range(boards)]
    fleets.SECONDS, fleets.SLOW, seconds = 0, math.inf, fleets.SECONDS  # no timing under an emulator
    try:
        with Fleet(shared, make_canary(target)) as fleet:
            found = fleet.measure(made, 1, math.inf)
    finally:
        fleets.SECONDS = seconds
    header = {"results": 1, "set": made.digest, "host": fleet.host, "threads": fleet.threads}
    lines = [header, *(line for number in sorted(found.results) for line in found.results[number])]
    (made.folder / "boards.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    import_results(made.folder / "boards.jsonl", other)
    one, many = (simulated_seconds(made, answers, count) for count in (1, boards))
    return {"records": len(points(log)), "equal": points(log) == points(other), "lost": fleet.out, "one": one, "many": many, "ratio": many / one}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with models/ and images (default ../shared/data)")
    p.add_argument("--model", default="mobilenet_v2")
    p.add_argument("--target", default="arm64-dotprod")
    p.add_argument("--boards", type=int, default=3)
    p.add_argument("--candidates", type=int, default=1)
    p.add_argument("--images", type=int, default=4)
    given = p.parse_args()
    import networks

    target, network = find_target(given.target), networks.find(given.model, given.data, Path("build"))
    options = complete({"preset": "fast", "max_samples": given.images, "preprocess": network.preprocess}, "benchmark")
    programs = lowered(network.model, target, network.calibration(), options)
    with tempfile.TemporaryDirectory() as folder:
        log, begin = Path(folder) / "hand", time.monotonic()
        made = export_round(programs, log, Path(folder) / "round", given.candidates, 1, lambda *_: None, None)
        built = time.monotonic() - begin
        found = compared(made, log, given.boards, target)
    print(f"{given.model}, {target.name}: {made.tasks} kernel shapes, {made.candidates} candidates; built in {built:.0f} s on this machine")
    verdict = "equal" if found["equal"] else "DIFFER FROM"
    print(f"records: {found['records']}, those of {given.boards} boards {verdict} those by hand; boards lost: {found['lost'] or 'none'}")
    print(f"simulated seconds of the boards: {found['one']:.1f} on one, {found['many']:.1f} on {given.boards}, ratio {found['ratio']:.3f}")


if __name__ == "__main__":
    main()
