"""Progress of long work: stages call a `Progress`, a terminal shows a bar, anything else a line when a stage begins and ends."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from qcompiler.base.errors import callers_own

Progress = Callable[[str, int, "int | None"], None]
"""`progress(stage, done, total)`: `done` of `total` steps (None: unknown) of the named stage are finished. Cheap to call often."""


def silent(stage: str, done: int, total: int | None) -> None:
    """The `Progress` that nobody looks at."""


class Callers:
    """A `Progress` of the caller's: what it raises is the caller's own, and passes through all stages as it is (`bugs_named`)."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        try:
            self.progress(stage, done, total)
        except Exception as error:
            raise callers_own(error) from error.__cause__


class Lines:
    """A `Progress` of plain lines: one when a stage begins, and one when it ends, with seconds. One that is over at once has only the second."""

    def __init__(self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._begun: dict[str, float] = {}
        self._last = clock()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now, self._last = self._last, self._clock()  # a stage begins where the report before ends
        over = total is not None and done >= total
        if stage not in self._begun:
            self._begun[stage] = now
            if not over:
                self._write(f"{stage}{'' if total is None or total == 1 else f' ({total})'} ...")
        if over:
            self._write(f"{stage}: done in {self._last - self._begun.pop(stage):.1f} s")


@contextlib.contextmanager
def terminal_progress(*, quiet: bool = False, verbose: bool = False) -> Iterator[Progress]:
    """A `Progress` on standard error: bars with rate and time left on a terminal, else, or where `verbose`, a line when a stage begins and ends."""
    if quiet:
        yield silent
        return
    if verbose or not sys.stderr.isatty():
        yield Lines(lambda text: print(text, file=sys.stderr, flush=True))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report
