"""`tune --export-candidates` and `tune --import-results`: tuning in rounds, for a device that is not on the network."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from qcompiler.base.errors import TuningError
from qcompiler.cli.arguments import chosen
from qcompiler.cli.process import watched

Show = Callable[[argparse.Namespace, Any, Callable[[], str]], None]


def check_options(options: argparse.Namespace) -> None:
    """Raises TuningError for a combination of `tune`'s options that means nothing."""
    if options.import_results and (options.export_candidates or options.model or options.calibration):
        raise TuningError("--import-results takes the results and --log only; the next round is another --export-candidates")
    if not options.import_results and not (options.model and options.calibration):
        raise TuningError("MODEL and --calibration are needed (only --import-results does without)")
    on_boards = bool(options.board or options.any or options.farm)
    if on_boards and (options.import_results or options.export_candidates):
        raise TuningError("--board, --any and --farm measure by themselves; --export-candidates and --import-results carry rounds by hand")
    if options.candidates is not None and not (options.export_candidates or on_boards):
        raise TuningError("--candidates belongs to --export-candidates and --board; a search on this machine has --trials")
    if options.export_candidates and options.time_limit:
        raise TuningError("--time-limit is for a search on this machine; --candidates says how large an exported round is")


def export_round(options: argparse.Namespace, show: Show) -> int:
    from qcompiler.base.text import size
    from qcompiler.tuning.remote import CANDIDATES, export_candidates

    with watched(options) as progress:
        made = export_candidates(
            options.model,
            options.target,
            options.calibration,
            log=options.log,
            output=options.export_candidates,
            candidates=CANDIDATES if options.candidates is None else options.candidates,
            threads=options.threads,
            **chosen(options),
            progress=progress,
        )
    document = {"folder": str(made.folder), "set": made.digest, "tasks": made.tasks, "candidates": made.candidates, "bytes": made.size}
    lines = [f"left out: {text}" for text in made.skipped] + [f"failed: {text}" for text in made.failed]
    lines.append(
        f"{made.folder}: {made.candidates} candidates for {made.tasks} kernel shapes, {size(made.size)}. Copy it to the device, run ./qc_measure "
        f"there, bring results.jsonl back, then: qcompiler tune --log {options.log} --import-results results.jsonl"
    )
    show(options, document | {"skipped": made.skipped, "failed": made.failed}, lambda: "\n".join(lines))
    return 0


def import_round(options: argparse.Namespace, show: Show) -> int:
    from qcompiler.backend.tuning_log import workload_text
    from qcompiler.base.text import table
    from qcompiler.tuning.remote import import_results

    found = import_results(options.import_results, options.log)
    best = [{"row": row, "workload": workload, "ratio": ratio, "params": point} for row, workload, ratio, point in found.best]
    document = {"host": found.host, "measured": found.measured, "missing": found.missing, "failed": found.failed, "wrong": found.wrong, "best": best}

    def text() -> str:
        rows = []
        for row, workload, ratio, point in found.best:
            rows.append([row, workload_text(workload), f"{ratio:.3f}", " ".join(f"{k}={v}" for k, v in sorted(point.items()))])
        lines = [table(f"Faster than the default on {found.host}", ("kernel", "workload", "ratio|", "variant"), rows, width=200)] if rows else []
        lines += [f"failed: {what}" for what in found.failed]
        lines += [f"WRONG, not logged, please report: {what}" for what in found.wrong]
        missing = f", {found.missing} without a result" if found.missing else ""
        lines.append(f"{options.log}: {found.measured} variants measured{missing}. Next: another --export-candidates, or compile --tuning-log {options.log}")
        return "\n".join(lines)

    show(options, document, text)
    return 1 if found.wrong else 0
