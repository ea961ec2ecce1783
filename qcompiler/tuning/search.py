"""Tuning: searches the design spaces of a network's kernels on this machine and writes what it finds to a log (`tuning_log.py`).

A *task* is a workload, however many layers of the network share it. Each turn goes to the task from which most time is expected to be saved: the
time it takes in the network now, times the gain of its recent turns, plus an optimism that fades with every turn. A turn is a batch of candidates
that evolution proposes and the cost model ranks (`model.py`), built, checked and timed by the worker (`worker.py`). A candidate
is in the log as soon as it is measured, so a run may be stopped at any moment, and one that is started again goes on.

MetaSchedule's builders and cost models want schedule traces of one TIR function; our kernels are generated anew for every point, so the search is ours.
"""

from __future__ import annotations

import math
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from qcompiler.backend.tuning_log import SHIPPED, SUFFIX, LogWriter, Record, allowed, best_of, isa_of, key_of, opened, read_file, workload_of, workload_text
from qcompiler.base.errors import TargetError, TuningError
from qcompiler.base.targets import Target, find_target, missing_features
from qcompiler.calibration.data import Source
from qcompiler.importers.origin import AnyModel
from qcompiler.pipeline.options import Options, complete, takes_options
from qcompiler.schedules.table import OpCall, Row
from qcompiler.tuning.bench import FREE
from qcompiler.tuning.model import CostModel, Point, Space, features, key, propose, sizes
from qcompiler.tuning.worker import Limits, Worker, WorkerLost

BATCH = 8  # measured candidates of a turn
OPTIMISM = 0.2  # the gain that a first turn is expected to bring
PATIENCE = 40  # turns without a better candidate before a task counts as used up
IMPOSSIBLE_LIMIT = 400  # candidates in a row that can't be built before a task counts as used up


@dataclass
class Task:
    """A workload of the network and the state of its search. `seconds`: of the default, on one thread and on all."""

    row: Row
    op: OpCall
    workload: dict[str, Any]
    space: Space
    count: int = 0  # layers that share it
    seconds: list[float] = field(default_factory=list)
    ratio: float = 1.0  # of the best point to the default
    best: Point | None = None
    trials: int = 0  # measured, or failed, in the log and in this run
    turns: int = 0
    won: int = 0  # turns when the best changed last
    gain: float = 0.0  # running mean of the share that a turn saved
    done: bool = False
    failure: str = ""
    points: list[tuple[float, Point]] = field(default_factory=list)  # measured: (ratio, point)
    tried: set[tuple[Any, ...]] = field(default_factory=set)

    @property
    def key(self) -> str:
        return key_of(self.row.name, self.workload)

    @property
    def text(self) -> str:
        return workload_text(self.workload)

    @property
    def default_seconds(self) -> float:
        """One thread, all layers that share the task."""
        return self.count * self.seconds[0] if self.seconds else 0.0

    @property
    def best_seconds(self) -> float:
        return self.default_seconds * self.ratio

    @property
    def promise(self) -> float:
        """Seconds that the next turn is expected to save."""
        return 0.0 if self.done else self.best_seconds * (self.gain + OPTIMISM / (1 + self.turns))


@dataclass
class Tuning:
    """A run: what a display shows while it lasts, and its result. Times in seconds."""

    target: Target
    threads: int
    tasks: list[Task]
    budget: int  # trials in all, those of earlier runs included
    time_limit: float | None
    started: float = field(default_factory=time.monotonic)
    measured: int = 0  # trials of this run
    failed: list[str] = field(default_factory=list)  # what went wrong, in words
    busy: int = 0  # turns in which other processes kept the cores busy, so that candidates were judged on one thread
    turns: int = 0
    wrong: list[str] = field(default_factory=list)  # kernels with wrong results: never logged, always reported
    current: Task | None = None
    doing: str = ""  # where it is not measuring: what else, and how far that is
    stopped: str = ""  # why the run ended
    core: str = ""  # the type of core that is measured, where it was named

    @property
    def trials(self) -> int:
        return sum(t.trials for t in self.tasks)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float | None:
        """Estimated seconds until the budget or the time is used up; None before anything is known."""
        by_time = [max(0.0, self.time_limit - self.elapsed)] if self.time_limit else []
        by_trials = [self.elapsed / self.measured * max(0, self.budget - self.trials)] if self.measured >= 4 else []
        return min([*by_time, *by_trials], default=None)

    @property
    def default_seconds(self) -> float:
        """The network's tuned operators with their defaults, one thread."""
        return sum(t.default_seconds for t in self.tasks)

    @property
    def best_seconds(self) -> float:
        return sum(t.best_seconds for t in self.tasks)


Watcher = Callable[[Tuning], None]


def tasks_of(steps: Sequence[Any], target: Target) -> list[Task]:
    """The distinct workloads of a program's steps whose rows have something to tune. What suits an operator suits it with a tail."""
    tasks: dict[str, Task] = {}
    for step in steps:
        if step.row is None or step.op is None:
            continue
        op = step.op.alone
        space, default = step.row.space(op, target), step.row.default(op, target)
        if space:
            task = Task(step.row, op, workload_of(op), Space.of(space, default))
            tasks.setdefault(task.key, task).count += 1
    return [t for t in tasks.values() if t.space.size > 1]


class Search:
    """What is known of the tasks of a network, and which points to try next. core: whose records count; those of other cores are points to start from, and
    teach the cost models."""

    def __init__(self, target: Target, tasks: Sequence[Task], records: Sequence[Record], core: str = "") -> None:
        foreign = [r for r in records if r.core != core]
        records = [r for r in records if r.core == core]
        self.tasks, self.core, self.others = tasks, core, sorted({r.core for r in foreign})
        self.models: dict[str, CostModel] = {}
        file = SHIPPED / f"{isa_of(target)}{SUFFIX}"
        self.good = [r for r in best_of([*(read_file(file) if file.is_file() else []), *records]).values() if r.ratio < 1]
        self.good += [r for r in best_of(foreign).values() if r.ratio < 1]
        by_key: dict[str, list[Record]] = {}
        for record in records:
            by_key.setdefault(record.key, []).append(record)
        spaces = {t.row.name: t.space for t in tasks}
        own = {t.key: t.space for t in tasks}
        for task in tasks:
            self.recall(task, by_key.pop(task.key, []))
        for others in by_key.values():  # workloads of other networks teach the cost model too
            if others[0].row in spaces:
                self.learn(others[0].row, others[0].workload, spaces[others[0].row], [r.params for r in others], [r.ratio for r in others])
        for record in foreign:
            if record.row in spaces and not record.failed:
                space = own.get(record.key, spaces[record.row])
                self.learn(record.row, record.workload, space, [record.params], [record.ratio], record.core)

    def recall(self, task: Task, records: Sequence[Record]) -> None:
        """Take up where earlier runs stopped."""
        same = [r for r in records if allowed(r.params, task.space.values, task.space.default)]
        task.trials, task.tried = len(same), {key(r.params) for r in same}
        measured = [r for r in same if not r.failed]
        task.points = [(r.ratio, r.params) for r in measured]
        best = min(measured, key=lambda r: r.rank, default=None)
        if best is not None and best.ratio < 1:
            task.ratio, task.best = best.ratio, best.params
        self.learn(task.row.name, task.workload, task.space, [r.params for r in measured], [r.ratio for r in measured])

    def learn(
        self,
        row: str,
        workload: Mapping[str, Any],
        space: Space,
        points: Sequence[Mapping[str, Any]],
        ratios: Sequence[float],
        other: str | None = None,
    ) -> None:
        """other: the type of core they were measured on, where it is not the one that is tuned."""
        usable = [(p, r) for p, r in zip(points, ratios, strict=True) if space.understands(p)]
        if usable:
            self.model(row).learn(features(workload, space, [p for p, _ in usable]), [r for _, r in usable], other)

    def model(self, row: str) -> CostModel:
        return self.models.setdefault(row, CostModel(self.others))

    def candidates(self, task: Task, space: Space, count: int, rng: random.Random) -> list[Point]:
        """Up to `count` untried points, most promising first."""
        return propose(space, task.workload, self.model(task.row.name), self.parents(task), task.tried, count, rng)

    def parents(self, task: Task) -> list[Point]:
        ranked = [point for _, point in sorted(task.points, key=lambda p: p[0])[:12]]
        return [*ranked, task.space.default, *self.similar(task)]

    def starts(self, task: Task, space: Space) -> list[Point]:
        """First candidates: what is best for similar workloads."""
        moved = [space.nearest(p) for p in self.similar(task)]
        return [p for p in {key(p): p for p in moved}.values() if key(p) not in task.tried and p != task.space.default]

    def similar(self, task: Task, count: int = 4) -> list[Point]:
        known = [(r.workload, r.params) for r in self.good if r.row == task.row.name]
        known += [(t.workload, t.best) for t in self.tasks if t.row is task.row and t.best and t is not task]
        here = sizes(task.workload)
        return [task.space.nearest(p) for _, p in sorted(known, key=lambda k: math.dist(sizes(k[0]), here))[:count]]


class Tuner(Search):
    """The search over the tasks of one run."""

    def __init__(self, state: Tuning, worker: Worker, log: LogWriter, records: Sequence[Record], watch: Watcher) -> None:
        super().__init__(state.target, state.tasks, records, state.core)
        self.state, self.worker, self.log, self.watch = state, worker, log, watch
        self.host = cpu_name()

    def over(self) -> bool:
        """Whether the run must end now; sets `stopped`."""
        state = self.state
        if state.time_limit is not None and state.elapsed >= state.time_limit:
            state.stopped = "the time limit is reached"
        elif state.trials >= state.budget:
            state.stopped = f"all {state.budget} trials are done"
        return bool(state.stopped)

    def run(self) -> None:
        for task in self.state.tasks:  # what each takes now decides where trials go
            if self.over():
                return
            self.prepare(task)
        while not self.over():
            task = max(self.state.tasks, key=lambda t: t.promise)
            if task.done or not task.promise:
                self.state.stopped = "nothing is left to try"
                return
            self.turn(task)

    def prepare(self, task: Task) -> bool:
        """Make `task` the worker's; False, and the task is given up, when its default can't be measured."""
        self.state.current = task
        try:
            answer = self.worker.prepare(task.key, task.row, task.op, self.state.target, task.best)
        except WorkerLost as error:
            answer = {"error": str(error)}
        if "error" in answer:
            task.done, task.failure = True, f"its default schedule: {answer['error']}"
            self.state.failed.append(f"{task.row.name} {task.text}: {task.failure}")
        elif not task.seconds:
            task.seconds = answer["seconds"]
        self.watch(self.state)
        return not task.done

    def turn(self, task: Task) -> None:
        """One batch of candidates for one task."""
        if not self.prepare(task):
            return
        rng = random.Random(f"{task.key} {task.trials}")
        threads, space = self.judges(task)
        whole = threads == self.state.threads  # else more of the space can be tried when the cores are free
        before, measured, impossible = task.ratio, 0, 0
        while measured < BATCH and impossible < IMPOSSIBLE_LIMIT and not task.done and not self.over():
            batch = self.candidates(task, space, BATCH - measured, rng)
            if task.turns == 0 and measured == 0:
                batch = [*self.starts(task, space), *batch][:BATCH]
            if not batch:
                task.done = whole
                break
            for point in batch:
                if task.failure or self.over():
                    break
                task.tried.add(key(point))
                if self.attempt(task, point, threads):
                    measured += 1
                else:
                    impossible += 1
        task.done = task.done or (measured == 0 and whole) or task.turns - task.won > PATIENCE
        saved = 1 - task.ratio / before
        task.gain = saved if task.turns == 0 else (task.gain + saved) / 2
        task.turns += 1
        if saved:
            task.won = task.turns

    def judges(self, task: Task) -> tuple[int, Space]:
        """On how many threads to judge the next candidates, and the space that this leaves.

        One thread can't judge how work is divided, so then the tunables that say so stay as the best point has them.
        """
        threads, state = self.state.threads, self.state
        state.turns += 1
        try:
            if threads > 1 and self.worker.speedup() < FREE * threads:
                state.busy, threads = state.busy + 1, 1
        except WorkerLost:
            threads = 1
            self.prepare(task)
        division = [k for k in task.space.values if k.endswith("tasks")] if threads == 1 else []
        return threads, task.space.fixed(task.best or task.space.default, division)

    def attempt(self, task: Task, point: Point, threads: int) -> bool:
        """Measure one candidate and log it; False when it was none (impossible, or code known already)."""
        state, where = self.state, f"{task.row.name} {task.text} {point}"
        try:
            answer = self.worker.trial(point, threads)
        except WorkerLost as error:
            answer = {"status": "lost", "reason": str(error)}
        status = answer["status"]
        if status == "same":
            return False
        if status == "impossible":
            self.learn(task.row.name, task.workload, task.space, [point], [math.inf])
            return False
        state.measured += 1
        task.trials += 1
        if status == "ok":
            self.log.append(self.record(task, point, threads, ratio=answer["ratio"], seconds=tuple(answer["seconds"])))
            self.learn(task.row.name, task.workload, task.space, [point], [answer["ratio"]])
            task.points.append((answer["ratio"], point))
            if answer["best"] and answer["ratio"] < task.ratio:
                task.ratio, task.best = answer["ratio"], point
        elif status == "wrong":
            state.wrong.append(f"{where}: {answer['reason']}")
        else:
            state.failed.append(f"{where}: {answer['reason']}")
            self.log.append(self.record(task, point, threads, failed=answer["reason"][:200]))
            self.learn(task.row.name, task.workload, task.space, [point], [math.inf])
        self.watch(state)
        if status == "lost":
            self.prepare(task)
        return True

    def record(self, task: Task, point: Point, threads: int, ratio: float = math.inf, seconds: tuple[float, ...] = (), failed: str = "") -> Record:
        return Record(isa_of(self.state.target), task.row.name, task.workload, point, ratio, seconds, threads, self.host, failed, self.state.core)


def cpu_name() -> str:
    """What /proc/cpuinfo calls this processor, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@takes_options
def tune(
    model: AnyModel,
    target: str | Target = "native",
    calibration: Source | None = None,
    *,
    log: str | os.PathLike[str],
    trials: int = 1000,
    time_limit: float | None = None,
    threads: int | None = None,
    watch: Watcher = lambda state: None,
    limits: Limits | None = None,
    **options: Unpack[Options],
) -> Tuning:
    """Tune the kernels of a network, at all the shapes that are given, on this machine, into the folder `log`, which `compile(tuning_log=...)` reads.

    trials: candidates to measure, those that the log already has for this network included. time_limit: seconds of search. threads: a candidate is
    judged by the geometric mean of its times on one thread and on so many (default: the target's cores, as far as this process may use them).
    watch: called after every candidate. limits: of a candidate's build and run. The other arguments are those of `compile`.

    Raises TuningError (nothing to tune, no trials, another run on `log`), TargetError (`target` is not this machine), OutputError (`log` can't be
    written), and what `compile` raises. KeyboardInterrupt leaves a log that the same call continues.
    """
    from qcompiler.pipeline.compile import quantize

    options = complete(options, "tune")
    chosen = find_target(target, options["targets_file"])
    threads = check_arguments(chosen, trials, time_limit, threads)
    with opened(log, isa_of(chosen)) as writer:
        records = read_file(writer.path)
        quantized = quantize(model, chosen, calibration, **options)
        modules = [quantized.integer, *quantized.others]
        return tune_modules(modules, chosen, writer, records, trials, time_limit, threads, watch, limits, options["core"] or "")


def check_arguments(target: Target, trials: int, time_limit: float | None, threads: int | None) -> int:
    """The number of threads to use. Raises TuningError or TargetError for what can't be tuned."""
    if trials < 1:
        raise TuningError(f"trials is {trials}; at least 1 is needed")
    if time_limit is not None and not time_limit > 0:
        raise TuningError(f"the time limit is {time_limit:g} s; it must be positive")
    missing = missing_features(target)
    if missing:
        raise TargetError(
            f"target '{target.name}' can't be tuned here: candidates are timed on this machine, which lacks {', '.join(missing)}; "
            "tune on a machine that has it and copy the log folder, or tune by files: --export-candidates DIR writes candidates and a program that measures "
            "them on the device, --import-results takes what it wrote"
        )
    available = len(os.sched_getaffinity(0))
    threads = threads if threads is not None else min(target.cores, available)
    if not 1 <= threads <= available:
        raise TuningError(f"threads is {threads}; this process may use 1 to {available}")
    return threads


def tune_modules(
    modules: Sequence[Any],
    target: Target,
    log: LogWriter,
    records: Sequence[Record],
    trials: int,
    time_limit: float | None,
    threads: int,
    watch: Watcher = lambda state: None,
    limits: Limits | None = None,
    core: str = "",
) -> Tuning:
    """The search itself, on modules as `lower` takes them, a network's at each shape; arguments as `tune`. Raises TuningError where there are no tunables."""
    from qcompiler.backend.lowering import lower

    steps = [step for module in modules for step in lower(module, target).steps]
    tasks = tasks_of(steps, target)
    if not tasks:
        rows = sorted({s.row.name for s in steps if s.row is not None})
        raise TuningError(f"nothing to tune: no operator of this network has tunables on {target.name} (its kernels: {', '.join(rows)})")
    state = Tuning(target, threads, tasks, trials, time_limit, core=core)
    with Worker(threads, limits) as worker:
        tuner = Tuner(state, worker, log, records, watch)
        state.started = time.monotonic()
        tuner.run()
    state.current = None
    watch(state)
    return state
