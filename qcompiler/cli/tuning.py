"""The verbs `tune` and `log` of the command line, and the display of a tuning run."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcompiler.cli.arguments import QUANTIZING, add_model, add_options, chosen, common_options, duration
from qcompiler.cli.boards import add_files, tuning_boards
from qcompiler.cli.process import complain, watched

Verb = Callable[..., argparse.ArgumentParser]
Show = Callable[[argparse.Namespace, Any, Callable[[], str]], None]


def add_verbs(verb: Verb, show: Show) -> None:
    """Add the verbs."""
    p = verb(
        "tune",
        lambda options: _tune(options, show),
        "search for faster kernels on this machine, into a log for compile --tuning-log",
        "Build, check and time variants of MODEL's kernels on this machine. Every variant is compared with the reference arithmetic before it is timed, "
        "and is in the log as soon as it is; stop whenever you like, the same command goes on. Results never depend on tuning, only times do.",
    )
    p.add_argument("model", nargs="?", metavar="MODEL", help="a model, as `qcompiler compile` takes it")
    p.add_argument("--target", default="native", metavar="T", help="a target that this machine can run (default native); any with --export-candidates")
    add_model(p, "calibration")
    p.add_argument("--log", required=True, metavar="DIR", help="folder of the log; made when missing, continued when not, one run at a time")
    p.add_argument("--trials", type=int, default=1000, metavar="N", help="variants to measure, those of earlier runs included (default 1000)")
    p.add_argument("--time-limit", type=duration, metavar="TIME", help="end the search after this time: 90s, 20m, 1.5h")
    p.add_argument("--threads", type=int, metavar="N", help="judge kernels on one thread and on N (default: the target's cores that are free to use)")
    add_options(p, QUANTIZING, without=["tuning_log", "selftest"])
    p.add_argument(
        "--export-candidates",
        metavar="DIR",
        help="for a device that is not on the network: write the next candidates into the new folder DIR, below 60 MB, with a program that measures them there",
    )
    p.add_argument(
        "--candidates", type=int, metavar="N", help="of a round, with --export-candidates or --board: at most N per kernel shape (default 32, with --board 12)"
    )
    p.add_argument(
        "--board", action="append", default=[], metavar="NAME", help="measure on this board instead of on this machine; repeat for more, of one target"
    )
    p.add_argument("--any", metavar="T", help="measure on every board of --boards, or of --farm, that has this target")
    add_files(p)
    p.add_argument("--import-results", metavar="FILE", help="add what that program wrote to the log; MODEL is not needed")

    p = verb("log", None, "show or merge tuning logs", "Work with the folders that `qcompiler tune` writes.")
    logs = p.add_subparsers(title="commands", metavar="COMMAND", required=True)
    q = logs.add_parser("show", help="what a log holds", description="Per workload: variants measured, and the best one's time and ratio to the default.")
    q.add_argument("log", metavar="DIR")
    q.set_defaults(run=lambda options: _show_log(options, show))
    common_options(q, argparse.SUPPRESS)
    q = logs.add_parser("merge", help="make one log of several", description="Write the union of logs; of equal variants the best measurement stays.")
    q.add_argument("logs", nargs="+", metavar="DIR")
    q.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for the new log")
    q.set_defaults(run=lambda options: _merge(options, show))
    common_options(q, argparse.SUPPRESS)


def _tune(options: argparse.Namespace, show: Show) -> int:
    import qcompiler
    from qcompiler.cli.remote import check_options, export_round, import_round

    check_options(options)
    if options.import_results:
        return import_round(options, show)
    if options.export_candidates:
        return export_round(options, show)
    interrupted = False
    with Display(options) as display:
        try:
            settings: dict[str, Any] = {"log": options.log, "trials": options.trials, "time_limit": options.time_limit, "threads": options.threads}
            settings |= {**chosen(options), "progress": display.progress, "watch": display.watch}
            with tuning_boards(options) as boards:
                if boards:
                    from qcompiler.tuning.boards import CANDIDATES, tune_on_boards

                    settings["candidates"] = options.candidates or CANDIDATES
                    display.state = tune_on_boards(options.model, boards, options.calibration, **settings)
                else:
                    display.state = qcompiler.tune(options.model, options.target, options.calibration, **settings)
        except KeyboardInterrupt:
            if display.state is None:
                raise
            interrupted = True
            display.state.stopped = "interrupted; the same command goes on"
    state = display.state
    assert state is not None
    show(options, document(state), lambda: result_text(state, options.log))
    return 128 + signal.SIGINT if interrupted else 1 if state.wrong else 0


def document(state: Any) -> dict[str, Any]:
    """A run as plain values; times in seconds, one thread."""
    tasks = [
        {
            "row": t.row.name,
            "workload": t.workload,
            "layers": t.count,
            "trials": t.trials,
            "default_seconds": t.default_seconds,
            "best_seconds": t.best_seconds,
            "ratio": t.ratio,
            "params": t.best or t.space.default,
        }
        for t in state.tasks
    ]
    keys = ("threads", "trials", "measured", "stopped", "failed", "wrong", "default_seconds", "best_seconds")
    return {"target": state.target.name, **{k: getattr(state, k) for k in keys}, "tasks": tasks}


def summary(state: Any) -> str:
    """One line: the network's tuned part, from and to (the sum of what its kernels take alone, so an estimate)."""
    ratio = f" (x {state.best_seconds / state.default_seconds:.3f})" if state.default_seconds else ""
    judged = "one thread" if state.threads == 1 else f"one thread and {state.threads}"
    return f"{state.target.name}, judged on {judged}: about {state.default_seconds * 1e3:.3f} ms -> {state.best_seconds * 1e3:.3f} ms{ratio}"


_COLUMNS = ("kernel", "workload", "layers|", "trials|", "default us|", "best us|", "ratio|")


def _cells(task: Any) -> list[str]:
    times = [f"{task.default_seconds * 1e6:.1f}", f"{task.best_seconds * 1e6:.1f}", f"{task.ratio:.3f}"] if task.seconds else ["", "", ""]
    if task.failure:
        times[-1] = "failed"
    return [task.row.name, task.text, str(task.count), str(task.trials), *times]


def result_text(state: Any, log: str) -> str:
    from qcompiler.base.text import table

    rows = [_cells(t) for t in sorted(state.tasks, key=lambda t: -t.default_seconds)]
    busy = f"; in {state.busy} of {state.turns} turns other processes kept the cores busy, and one thread judged" if state.busy else ""
    lines = [table("Tuned kernels; times of all layers that share one", _COLUMNS, rows, width=180), summary(state) + busy]
    lines += [f"failed: {text}" for text in state.failed]
    lines += [f"WRONG, not logged, please report: {text}" for text in state.wrong]
    lines.append(f"{log}: {state.measured} variants measured now, {state.trials} in all; {state.stopped}. Next: qcompiler compile ... --tuning-log {log}")
    return "\n".join(lines)


class Display:
    """Shows a run on standard error: bars while the model is prepared, then a live table; where that is no terminal, lines."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.state: Any = None
        self._options = options
        self._stack = contextlib.ExitStack()
        self._live: Any = None
        self._bars: Any = None

    def __enter__(self) -> Display:
        self._bars = self._stack.enter_context(watched(self._options))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def progress(self, stage: str, done: int, total: int | None) -> None:
        if self._bars is not None:
            self._bars(stage, done, total)

    def watch(self, state: Any) -> None:
        first, self.state = self.state is None, state
        if self._options.quiet:
            return
        if not sys.stderr.isatty():
            if first:
                complain(f"tune: {begun_text(state)} ...")
            return
        from rich.console import Console
        from rich.live import Live

        if self._live is None:
            self._stack.close()  # the bars
            self._bars = None
            self._live = self._stack.enter_context(Live(console=Console(stderr=True), refresh_per_second=4, transient=True))
        self._live.update(live_table(state, self._live.console.height - 8))


def begun_text(state: Any) -> str:
    """What a run is about to do."""
    limit = "" if state.time_limit is None else f", {clock(state.time_limit)} at most"
    return f"{len(state.tasks)} kernel shapes, {state.trials} of {state.budget} trials made{limit}"


def live_table(state: Any, height: int) -> Any:
    """The live view: the tasks that take most time, at most `height` of them, and where the run stands. A rich renderable."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False)
    for column in ("", *_COLUMNS):
        grid.add_column(column.removesuffix("|"), justify="right" if column.endswith("|") else "left", no_wrap=True)
    shown = sorted(state.tasks, key=lambda t: -t.best_seconds)[: max(3, height)]
    for task in shown:
        cells = _cells(task)
        grid.add_row(">" if task is state.current else "", *cells, style="bold" if task is state.current else "")
    hidden = len(state.tasks) - len(shown)
    left = "" if state.left is None else f", about {clock(state.left)} left"
    trouble = f", {len(state.failed)} failed" * bool(state.failed) + f", {len(state.wrong)} WRONG" * bool(state.wrong)
    place = f"trial {state.trials} of {state.budget}, {clock(state.elapsed)}{left}{trouble}" + f"; {hidden} more tasks" * (hidden > 0)
    place += f"; {state.doing}" if state.doing else ""
    return Group(grid, Text(summary(state)), Text(place))


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _show_log(options: argparse.Namespace, show: Show) -> int:
    from qcompiler.backend.tuning_log import Record, best_of, read_log, workload_text

    records = read_log(options.log)
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.isa, record.core, record.key), []).append(record)
    rows = []
    for (isa, core, _), group in groups.items():
        best = next(iter(best_of(group).values()), None)
        row: dict[str, Any] = {"isa": isa, "core": core, "row": group[0].row, "workload": workload_text(group[0].workload), "trials": len(group)}
        row |= {"failed": sum(bool(r.failed) for r in group), "ratio": best and best.ratio, "seconds": best and list(best.seconds)}
        rows.append(row | {"threads": best and best.threads, "host": group[0].host, "params": best and best.params})
    rows.sort(key=lambda r: (r["isa"], r["core"], -max(r["seconds"] or [0]), r["workload"]))
    show(options, {"records": len(records), "workloads": rows}, lambda: log_text(options.log, len(records), rows))
    return 0


def log_text(name: str, count: int, rows: Sequence[Mapping[str, Any]]) -> str:
    from qcompiler.base.text import table

    def cells(r: Mapping[str, Any]) -> list[str]:
        measured = [f"{r['ratio']:.3f}", " / ".join(f"{s * 1e6:.1f}" for s in r["seconds"]), str(r["threads"])] if r["ratio"] else ["", "", ""]
        point = " ".join(f"{k}={v}" for k, v in sorted(r["params"].items())) if r["ratio"] and r["ratio"] < 1 else "default"
        return [r["row"], r["core"], r["workload"], str(r["trials"]), str(r["failed"] or ""), *measured, point]

    columns = ("kernel", "core", "workload", "trials|", "failed|", "ratio|", "best us, 1 / all threads|", "threads|", "best variant")
    hosts = ", ".join(sorted({r["host"] for r in rows}))
    return table(f"{name}: {count} records of {len(rows)} workloads, measured on {hosts}", columns, [cells(r) for r in rows], width=230)


def _merge(options: argparse.Namespace, show: Show) -> int:
    from qcompiler.backend.tuning_log import merge

    counts = merge(options.logs, options.output)
    show(options, {"output": options.output, "records": counts}, lambda: f"{options.output}: " + ", ".join(f"{n} records of {i}" for i, n in counts.items()))
    return 0
