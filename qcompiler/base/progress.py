"""Progress of long work: stages call a `Progress`, the terminal shows a bar, and a pipe sees nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Progress = Callable[[str, int, "int | None"], None]
"""`progress(stage, done, total)`: `done` of `total` steps (None: unknown) of the named stage are finished. Cheap to call often."""


def silent(stage: str, done: int, total: int | None) -> None:
    """The `Progress` that nobody looks at."""


@contextlib.contextmanager
def terminal_progress() -> Iterator[Progress]:
    """A `Progress` drawn on standard error, with rate and time left; a silent one when standard error is not a terminal."""
    if not sys.stderr.isatty():
        yield silent
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
