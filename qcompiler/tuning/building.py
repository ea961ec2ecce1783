"""The candidates of a round, built on all cores: points are chosen task by task, and worker processes make a library of each choice, several at a time.

A choice uses what the choices before it have taught the cost model, so they are made in order, and so are the libraries handed out: a round is the same on
any number of cores. What a library may hold depends on the size of those before it, which may not be built yet; a choice that proves too large is cut, and
built anew.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import tvm_ffi

from qcompiler.base.parallel import cores, in_order
from qcompiler.base.targets import Target
from qcompiler.tuning.model import Point, key
from qcompiler.tuning.search import IMPOSSIBLE_LIMIT, Search, Task
from qcompiler.tuning.worker import Limits, Worker, WorkerLost

PROCESSES = 8  # at most, of a few hundred MB each


@dataclass(frozen=True)
class Choice:
    """Points of a task to be tried, each with code of its own; the others are compared with the first, the default. packed: bytes of the constants of the
    first 1, 2, ... of them."""

    task: Task
    points: Sequence[Point]
    packed: Sequence[int]
    lacking: str = "no new candidate"  # why it is empty, where it is

    def within(self, room: int) -> Choice:
        """Without those whose constants don't fit into `room` bytes; the default and one more always stay."""
        count = next((i for i, size in enumerate(self.packed) if i > 1 and size > room), len(self.points))
        return Choice(self.task, self.points[:count], self.packed[:count])


@dataclass(frozen=True)
class Library:
    """What became of a choice. data: the shared library, empty where there is nothing to measure; a step for each of `points`. sums: of the right output, of
    every case. failed: what couldn't be built, in words."""

    choice: Choice
    data: bytes
    points: Sequence[Point]
    sums: Sequence[tuple[int, int]]
    failed: Sequence[str]


def libraries(
    search: Search, target: Target, count: int, room: Callable[[], int], limits: Limits | None = None, over: Callable[[], bool] = lambda: False
) -> Generator[Library, None, None]:
    """For each task of the search, in order: its default and up to `count` untried points. room: bytes that the constants of the next library may take, which
    never grow. over: asked before each task but the first, whether the rest are left out.

    Close it (`contextlib.closing`): that ends the processes, also in the middle of their work.
    """
    most = room()

    def choices() -> Iterator[Choice]:
        for number, task in enumerate(search.tasks):
            late = number > 0 and over()
            yield Choice(task, [], [], "no time left in this round") if late else _choose(search, task, target, count, most).within(room())

    def build(worker: Worker, choice: Choice) -> Library:
        return _library(worker, choice, target)

    with contextlib.ExitStack() as stack:
        wanted = min(cores(), PROCESSES, len(search.tasks))
        again, *workers = (stack.enter_context(Worker(1, limits)) for _ in range(1 + wanted))

        def stop() -> None:
            for worker in workers:
                worker.abandon()

        with contextlib.closing(in_order(build, workers, choices(), stop)) as found:
            for library in found:
                cut = library.choice.within(room())
                yield library if len(cut.points) == len(library.choice.points) else build(again, cut)


def _choose(search: Search, task: Task, target: Target, count: int, room: int) -> Choice:
    """The default, then up to `count` untried points with code of their own; one, and no more than whose constants fit into `room` bytes."""
    rng, seen, impossible = random.Random(f"{task.key} {task.trials} remote"), set(), 0
    constants: set[bytes] = set()  # of all chosen; equal ones are held once
    chosen: list[Point] = []
    packed: list[int] = []
    batch = [task.space.default, *search.starts(task, task.space)]
    while batch and len(chosen) <= count and impossible < IMPOSSIBLE_LIMIT:
        for point in batch[: count + 1 - len(chosen)]:
            task.tried.add(key(point))
            try:
                kernel = task.row.build(task.op, point, target)
            except ValueError:
                search.learn(task.row.name, task.workload, task.space, [point], [math.inf])
                impossible += 1
                continue
            code = (tvm_ffi.structural_hash(kernel.func), kernel.tasks, kernel.launch)
            if code in seen:
                impossible += 1
                continue
            constants |= {array.tobytes() for array in kernel.constants}
            size = sum(map(len, constants))
            if len(chosen) > 1 and size > room:
                task.tried.discard(key(point))
                return Choice(task, chosen, packed)
            seen.add(code)
            chosen.append(point)
            packed.append(size)
        batch = search.candidates(task, task.space, max(1, count + 1 - len(chosen)), rng)
    return Choice(task, chosen, packed)


def _library(worker: Worker, choice: Choice, target: Target) -> Library:
    """Candidates that keep the code generator too long are left out; nothing is left where the default is one of them."""
    task, points, failed = choice.task, choice.points, list[str]()

    def built(points: Sequence[Point]) -> bytes:
        try:
            answer = worker.library(task.row, task.op, target, points)
        except WorkerLost as error:
            answer = {"error": str(error)}
        if "error" in answer and len(points) == 1:
            failed.append(f"{task.row.name} {task.text} {points[0]}: {answer['error']}")
        return bytes(answer.get("library", b""))

    if len(points) < 2:
        return Library(choice, b"", (), (), ())
    data = built(points)
    if not data:
        points = [point for point in points if built([point])]
        data = built(points) if len(points) > 1 and points[0] == choice.points[0] else b""
    sums: Sequence[tuple[int, int]] = ()
    if data:
        try:
            sums = worker.sums(task.op)
        except WorkerLost as error:
            failed.append(f"{task.row.name} {task.text}: its right results: {error}")
            data = b""
    return Library(choice, data, points, sums, failed)
