"""What a user gets to report when we are at fault: a folder with the traceback and what was being worked on, and one line that names it."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import qcompiler
from qcompiler.base.debug import render
from qcompiler.base.errors import InternalError


def write_report(error: BaseException, words: Sequence[str], dumped: str | os.PathLike[str] | None) -> str:
    """Write the folder; the line to print. words: the command line. dumped: the directory with what every pass and stage made, where one was asked for.

    Where nothing can be written, the traceback goes to standard error.
    """
    text = " ".join(str(error).split())
    what = text if isinstance(error, InternalError) else f"internal error: {type(error).__name__}{f': {text[:600]}' if text else ''}"
    trace = "".join(traceback.format_exception(error))
    head = f"qcompiler {qcompiler.__version__}, Python {platform.python_version()}, {platform.platform()}\n{shlex.join(['qcompiler', *words])}\n\n"
    try:
        folder = Path(tempfile.mkdtemp(prefix="qcompiler-bug-"))
        (folder / "traceback.txt").write_text(head + trace)
        names = ["traceback.txt"]
        if (subject := getattr(error, "subject", None)) is not None:
            with contextlib.suppress(Exception):  # what is broken may not print either
                rendered, suffix = render(subject)
                (folder / f"subject{suffix}").write_text(rendered)
                names.append(f"subject{suffix} (what was worked on)")
        where = f"{' and '.join(names)} in {folder}"
    except OSError:
        print(head + trace, file=sys.stderr)
        where = "the traceback above"
    dump = f", and the dump in {dumped}" if dumped else ""
    return f"{what}. This is a bug of qcompiler, not of its input: please report it, with {where}{dump}"
