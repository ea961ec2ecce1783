"""What a command owes the process that called it: an exit status, words on the right stream, and nothing left behind when it is told to end."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from qcompiler.base.debug import plain_json, switch
from qcompiler.base.errors import InternalError, OutputError, QCompilerError
from qcompiler.base.progress import Progress, terminal_progress
from qcompiler.cli.bug_report import write_report

MISSED, REFUSED, BUG = 1, 2, 3  # exit statuses beside 0: a threshold or a target was missed; what was asked for can't be done; we are at fault
_SURROUNDINGS = {  # what a full disk, a quota, missing permissions or a limit of the system make of a call: no fault of the program's
    getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EIO EROFS EACCES EPERM EMFILE ENFILE ENOMEM EAGAIN ENAMETOOLONG ELOOP ESTALE".split()
}


def guarded(command: Callable[[], int], words: Sequence[str] = (), dumped: str | os.PathLike[str] | None = None) -> int:
    """The exit status of `command`: what it returns, `REFUSED` after an error that a user can mend, printed on one line, `BUG` after any other, with a folder
    to report, or 128 + the signal that ended it. words: the command line; dumped: the directory with a dump, where one was asked for. Both for the report."""
    with _ending_on_signals() as received:
        try:
            _check_streams()
            status = command()
            _flush()
        except InternalError as error:
            status = _bug(error, words, dumped)
        except QCompilerError as error:
            if switch("QCOMPILER_TRACEBACK"):
                traceback.print_exc()
            else:
                complain(f"error: {' '.join(str(error).split())}")
            status = REFUSED
        except KeyboardInterrupt:
            status = _interrupted(received)
        except BrokenPipeError:  # the reader (head, less) has seen enough
            _discard(sys.stdout)
            status = 128 + signal.SIGPIPE
        except MemoryError as error:
            complain(f"error: out of memory{f': {error}' if str(error) else ''}; this model, or these data, need more than the machine has free")
            status = REFUSED
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _SURROUNDINGS:
                complain(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror}")
                status = REFUSED
            elif type(error) is RuntimeError and not str(error):  # how TVM's passes report a Ctrl-C
                status = _interrupted(received)
            else:
                status = _bug(error, words, dumped)
    return 128 + received[0] if received else status


def _interrupted(received: Sequence[int]) -> int:
    complain("interrupted" if not received else "terminated")
    return 128 + signal.SIGINT


def _bug(error: Exception, words: Sequence[str], dumped: str | os.PathLike[str] | None) -> int:
    if switch("QCOMPILER_TRACEBACK"):
        traceback.print_exc()
    complain(f"error: {write_report(error, words, dumped)}")
    return BUG


def show(options: argparse.Namespace, document: Any, text: Callable[[], str]) -> None:
    """Print a result: as JSON where that was asked for, else as text, unless --quiet. Raises OutputError when standard output takes no more."""
    try:
        if options.json or not options.quiet:
            print(json.dumps(plain_json(document), indent=1) if options.json else text())
        _flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(sys.stdout)
        raise OutputError(f"standard output can't be written: {error.strerror}") from error


def watched(options: argparse.Namespace) -> AbstractContextManager[Progress]:
    """Whom a command's progress is reported to."""
    return terminal_progress(quiet=options.quiet, verbose=options.verbose)


def complain(text: str) -> None:
    """Print on standard error, as far as that is possible."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _flush() -> None:
    sys.stdout.flush()


def _discard(stream: Any) -> None:
    """Let what is left in a stream that can't be written go nowhere, so that the interpreter doesn't stumble over it at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _check_streams() -> None:
    """Raise OutputError when standard output is closed. Names of any script can be printed on any stream afterwards."""
    if sys.stdout is None or sys.stderr is None:
        while os.open(os.devnull, os.O_RDWR) < 2:  # else a file that is written would become the stream of some library's messages
            pass
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stdout is None:
        raise OutputError("standard output is closed, and results go there; send it to /dev/null if nobody reads them")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _ending_on_signals() -> Iterator[list[int]]:
    """Lets SIGTERM and SIGHUP end a command as Ctrl-C does, by a KeyboardInterrupt; yields the list that such a signal's number is put into."""
    received: list[int] = []

    def end(number: int, frame: object) -> None:
        if not received:
            received.append(number)
            raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {n: signal.signal(n, end) for n in numbers if signal.getsignal(n) is signal.SIG_DFL}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
