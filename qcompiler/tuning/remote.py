"""Tuning for a device that is not on the network, in rounds: export candidates, measure them there, import the results, and again.

    log, model  --export-->  folder: libraries, qc_measure, candidates.txt, manifest.json     (and LOG/candidates.json: the round that is under way)
    folder      --qc_measure, on the device-->  results.jsonl
    results     --import-->  records in the log, as those of a local run

A results file names its candidate set by digest and is refused by a log that waits for another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from qcompiler.backend.lowering import Program
from qcompiler.backend.programs import build_measurer
from qcompiler.backend.toolchain import find_compiler
from qcompiler.backend.tuning_log import LogWriter, Record, check_point, check_workload, isa_of, key_of, opened, read_file, workload_of
from qcompiler.base.errors import TuningError
from qcompiler.base.files import new_folder, parse_json, read_regular, replacing
from qcompiler.base.progress import silent
from qcompiler.base.targets import Target, find_target
from qcompiler.calibration.data import Source
from qcompiler.importers.origin import AnyModel
from qcompiler.pipeline.options import Options, complete, takes_options
from qcompiler.tuning.bench import MARGIN, ratio_of
from qcompiler.tuning.building import libraries
from qcompiler.tuning.candidates import measurable, plan_lines
from qcompiler.tuning.model import Point
from qcompiler.tuning.search import Search, Task, tasks_of
from qcompiler.tuning.worker import Limits

FORMAT = 1
SIZE_LIMIT = 58 << 20  # bytes of an exported folder
SHARE = 4  # a task's weights, packed for every candidate, may fill this part of what is left; the first tasks of a round are those that were measured least
PENDING = "candidates.json"  # in the log's folder: the set whose results it waits for
CANDIDATES = 32  # per task and round
BUILD = "build candidates"  # as progress is told

Report = Callable[[str, int, int], None]


# -- export ---------------------------------------------------------------------------------------------------------------------------------


class NothingNew(TuningError):
    """Every candidate is known."""


@dataclass
class Exported:
    """An exported round. `skipped`: tasks that are left for another round (the folder is full) or have nothing new; `failed`: what couldn't be built."""

    folder: Path
    digest: str
    plans: list[list[str]] = field(default_factory=list)  # of every task: its library, and its lines of candidates.txt
    tasks: int = 0
    candidates: int = 0
    size: int = 0
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@takes_options
def export_candidates(
    model: AnyModel,
    target: str | Target,
    calibration: Source | None,
    *,
    log: str | os.PathLike[str],
    output: str | os.PathLike[str],
    candidates: int = CANDIDATES,
    threads: int | None = None,
    limits: Limits | None = None,
    **options: Unpack[Options],
) -> Exported:
    """Write the next round of candidates for `target` into the new folder `output`; the log then waits for its results.

    candidates: at most so many per kernel shape. threads: judge on one thread and on so many of the device's (default: the target's cores). Other arguments as
    `tune`. A round that the log still waits for is given up.

    Raises TuningError (nothing to tune, nothing new to try), TargetError (a compiler is missing), OutputError, and what `compile` raises.
    """
    options = complete(options, "export_candidates")
    chosen = find_target(target, options["targets_file"])
    find_compiler(chosen)  # a missing one shows before anything long is begun
    threads = check_round(chosen, candidates, threads)
    with opened(log, isa_of(chosen)):  # so does a log that can't be written
        pass
    programs = lowered(model, chosen, calibration, options)
    return export_round(programs, log, output, candidates, threads, options["progress"] or silent, limits, options["core"] or "")


def check_round(target: Target, candidates: int, threads: int | None) -> int:
    """The number of threads to judge on. Raises TuningError for what no round can be made of."""
    if candidates < 1 or candidates > 1000:
        raise TuningError(f"candidates is {candidates}; 1 to 1000 are supported")
    threads = threads if threads is not None else 1 if target.gpu else target.cores
    if threads < 1:
        raise TuningError(f"threads is {threads}; at least 1 is needed")
    return threads


def lowered(model: AnyModel, target: Target, calibration: Any, options: Options) -> list[Program]:
    """The programs whose kernels are tuned, one for each shape. Raises what `compile` raises."""
    from qcompiler.backend.lowering import lower
    from qcompiler.pipeline.compile import quantize

    quantized = quantize(model, target, calibration, **options)
    return [lower(module, target) for module in (quantized.integer, *quantized.others)]


def measurable_tasks(programs: Sequence[Program]) -> list[Task]:
    """The tasks of programs that a device can check, in their order. Raises TuningError where there are none."""
    target = programs[0].target
    tasks = [t for t in tasks_of([step for program in programs for step in program.steps], target) if measurable(t.op)]
    if not tasks:
        raise TuningError(f"nothing to tune: no operator of this network has tunables on {target.name}")
    return tasks


def export_round(
    programs: Sequence[Program],
    log: str | os.PathLike[str],
    output: str | os.PathLike[str],
    candidates: int,
    threads: int,
    progress: Report,
    limits: Limits | None,
    core: str = "",
    until: float = math.inf,
) -> Exported:
    """The next round for a network's programs; arguments as `export_candidates`. until: of `time.monotonic`, from when on no further task is begun. Raises
    NothingNew where every candidate is known."""
    target = programs[0].target
    with opened(log, isa_of(target)) as writer, new_folder(Path(output)) as folder:
        every = (s for program in programs for s in program.steps)
        work = {key_of(s.row.name, workload_of(s.op)): s.kernel.macs for s in every if s.op is not None and s.row is not None}
        tasks = measurable_tasks(programs)
        search = Search(target, tasks, read_file(writer.path), core)
        tasks.sort(key=lambda t: (t.trials, -t.count * work.get(t.key, 0)))
        exported = Exported(Path(output), "")
        described = _fill(folder, search, target, candidates, threads, exported, progress, limits, until)
        if not described["tasks"]:
            why = f"every candidate of this network's {len(tasks)} kernel shapes is in the log {log}, or failed"
            raise NothingNew(f"nothing new to try: {why}{f' ({len(exported.failed)} failed, first {exported.failed[0]})' if exported.failed else ''}")
        exported.digest = described["set"]
        exported.size = sum(p.stat().st_size for p in folder.rglob("*"))
        with replacing(Path(log) / PENDING) as temporary:
            temporary.write_text(json.dumps(described, sort_keys=True))
    return exported


def _fill(
    folder: Path,
    search: Search,
    target: Target,
    candidates: int,
    threads: int,
    exported: Exported,
    progress: Report,
    limits: Limits | None,
    until: float,
) -> dict[str, Any]:
    """Write an export; returns the manifest."""
    build_measurer(folder / "qc_measure", target)
    left = SIZE_LIMIT - (folder / "qc_measure").stat().st_size - (64 << 10)
    described: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    made = libraries(search, target, candidates, lambda: left // SHARE, limits, lambda: time.monotonic() > until)
    progress(BUILD, 0, len(search.tasks))
    with contextlib.closing(made):
        for number, library in enumerate(made):
            task = library.choice.task
            progress(BUILD, number + 1, len(search.tasks))
            exported.failed += library.failed
            if not library.data or len(library.data) > left:
                why = "too large for this round" if library.data else library.choice.lacking
                exported.skipped.append(f"{task.row.name} {task.text}: {why}")
                continue
            left -= len(library.data)
            name = f"task{len(described):03}.so"
            (folder / name).write_bytes(library.data)
            digest.update(library.data)
            exported.plans.append([name, *plan_lines(name, task.op, len(library.points), library.sums)])
            described.append({"row": task.row.name, "workload": task.workload, "points": list(library.points), "layers": task.count})
            exported.tasks += 1
            exported.candidates += len(library.points) - 1
    manifest = {"format": FORMAT, "target": target.name, "isa": isa_of(target), "threads": threads, "core": search.core, "tasks": described}
    digest.update(json.dumps(manifest, sort_keys=True).encode())
    manifest["set"] = digest.hexdigest()[:32]
    (folder / "candidates.txt").write_text(candidates_text(str(manifest["set"]), threads, exported.plans))
    (folder / "manifest.json").write_text(json.dumps(manifest, sort_keys=True, indent=1))
    return manifest


def candidates_text(digest: str, threads: int, plans: Sequence[Sequence[str]]) -> str:
    """candidates.txt, as qc_measure reads it, of some tasks of a round (`Exported.plans`)."""
    return "\n".join([f"qcompiler-candidates {FORMAT} {digest} {threads} {len(plans)}", *(line for _, *lines in plans for line in lines), ""])


# -- import ---------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Imported:
    """What a results file brought. `best`: (row, workload, ratio to the default, point) of every task with a candidate that is faster."""

    host: str
    measured: int = 0
    missing: int = 0  # candidates without a result: the measurement was stopped
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    best: list[tuple[str, Mapping[str, Any], float, Point]] = field(default_factory=list)


def import_results(results: str | os.PathLike[str], log: str | os.PathLike[str]) -> Imported:
    """Add the results of the round that `log` waits for to the log; the next export goes on from them. Nothing is changed on an error.

    Raises TuningError: no such file, no round under way, results of another candidate set, a damaged file, or one without a single result.
    """
    pending = Path(log) / PENDING
    manifest = _read_pending(pending)
    header, lines = _read_results(Path(results))
    if header["set"] != manifest["set"]:
        raise TuningError(
            f"{results}: measured candidate set {header['set']}, and {log} waits for set {manifest['set']}; import the file that qc_measure "
            "wrote in the folder exported last"
        )
    imported = Imported(header["host"])
    records = list(_records(manifest, header, lines, imported, results))
    if not records and not imported.wrong:
        raise TuningError(f"{results}: holds no result; run qc_measure again")
    with opened(log, manifest["isa"]) as writer:
        _append(writer, records)
        pending.unlink()
    return imported


def _append(writer: LogWriter, records: Sequence[Record]) -> None:
    for record in records:
        writer.append(record)


def _read_pending(path: Path) -> dict[str, Any]:
    """The candidate set that a log waits for. Raises TuningError."""
    try:
        manifest = parse_json(read_regular(path))
        for task in manifest["tasks"]:
            check_workload(task["workload"])
            for point in task["points"]:
                check_point(point)
        if not all(
            isinstance(text, str) for text in (manifest["set"], manifest["isa"], manifest.get("core", ""), *(task["row"] for task in manifest["tasks"]))
        ):
            raise ValueError("a field has the wrong form")
    except FileNotFoundError as error:
        why = "imported already, or never exported: `qcompiler tune --export-candidates` does"
        raise TuningError(f"{path.parent}: no candidates wait for results here ({why})") from error
    except OSError as error:
        raise TuningError(f"{path}: can't be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise TuningError(f"{path}: damaged ({error}); export candidates again") from error
    return dict(manifest)


def _read_results(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(header, results) of a file."""
    try:
        text = read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TuningError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    return parse_results(text, str(path))


def parse_results(text: str, where: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(header, results); a half-written last line, as a stopped measurement leaves it, is dropped. Raises TuningError, naming `where`."""
    lines = text.split("\n")[:-1]
    if not lines:
        raise TuningError(f"{where}: empty, or cut short before its first line ends; copy it again, or run qc_measure again")
    try:
        documents = [parse_json(line) for line in lines]
        header = documents[0]
        if header["results"] != FORMAT:
            raise TuningError(f"{where}: results of format {header['results']}, this version of qcompiler reads format {FORMAT}")
        header["host"], header["set"], header["threads"] = str(header["host"]), str(header["set"]), int(header["threads"])
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise TuningError(f"{where}: not a results file of qc_measure, or damaged ({error})") from error
    return header, documents[1:]


def _records(
    manifest: Mapping[str, Any], header: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], imported: Imported, path: str | os.PathLike[str]
) -> Iterator[Record]:
    try:
        found = {(int(line["task"]), int(line["step"])): (str(line["status"]), [float(s) for s in line.get("seconds", [])]) for line in lines}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise TuningError(f"{path}: damaged ({error})") from error
    core = manifest.get("core", "")
    for number, task in enumerate(manifest["tasks"]):
        points: list[Point] = task["points"]
        measured: list[tuple[float, Point]] = []
        default = found.get((number, 0), ("missing", []))
        if default[0] not in ("ok", "missing"):
            (imported.wrong if default[0] == "wrong" else imported.failed).append(f"{task['row']} {task['workload']['op']}: its default {default[0]}")
        for step, point in enumerate(points[1:], 1):
            status, seconds = found.get((number, step), ("missing", []))
            where = f"{task['row']} {point}"
            if status == "missing" or default[0] != "ok":
                imported.missing += 1
            elif status == "wrong":
                imported.wrong.append(where)
            elif status != "ok":
                imported.failed.append(f"{where}: {status}")
                yield Record(
                    manifest["isa"], task["row"], task["workload"], point, math.inf, (), header["threads"], header["host"], f"{status} on the device", core
                )
            elif not seconds or len(seconds) != len(default[1]) or not all(0 < s < 1e6 for s in [*seconds, *default[1]]):
                raise TuningError(f"{path}: damaged: the times of task {number}, candidate {step} are {seconds}, of its default {default[1]}")
            else:
                ratio = ratio_of(seconds, default[1])
                ratio = ratio if ratio < MARGIN else max(ratio, 1.0)  # not clearly faster is not faster
                measured.append((ratio, point))
                imported.measured += 1
                yield Record(manifest["isa"], task["row"], task["workload"], point, ratio, tuple(seconds), header["threads"], header["host"], core=core)
        ratio, point = min(measured, key=lambda m: m[0], default=(1.0, {}))
        if ratio < 1:
            imported.best.append((task["row"], task["workload"], ratio, point))
