"""The error family. Every message says what, where, what is supported, and what to do.

The command line prints the message of a `QCompilerError` on one line and exits with 2. An `InternalError`, and any exception that is not of the family,
is a bug of ours: exit status 3, and a file with the traceback to report (`qcompiler/cli/bug_report.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class QCompilerError(Exception):
    """Base of all errors that are raised on purpose: but for `InternalError`, a user can cause and mend them."""


class ModelError(QCompilerError):
    """The model file can't be read, or holds what can't be compiled at all."""


class DataError(QCompilerError):
    """Calibration or evaluation data, or an input of a call, is missing, of the wrong name, shape or dtype, or not finite."""


class TargetError(QCompilerError):
    """The target is unknown, malformed, or lacks a tool that building for it needs."""


class PlanError(QCompilerError):
    """A quantization plan contradicts itself or the model."""


class ArtifactError(QCompilerError):
    """A compiled library can't be read, is damaged, or is of another format version."""


class IncompatibleDevice(ArtifactError):
    """A compiled library needs CPU features, an architecture, a driver or a GPU that this machine lacks."""


class DeviceFailure(ArtifactError):
    """The machine ran out of memory (a GPU of its own), or a GPU failed during a run."""


class SessionBusy(QCompilerError):
    """A call of a session can't begin and waiting would never end: it comes from inside another call, or in a child of a process that was inside one. Or a
    pool has no room in the time that was given."""


class PoolClosed(QCompilerError):
    """A request to a pool of sessions that accepts none any more."""


class OutputError(QCompilerError):
    """A result can't be written where the user asked."""


class TuningError(QCompilerError):
    """A tuning log can't be used, or there is nothing to tune."""


class BoardError(QCompilerError):
    """A board is unknown or badly described, can't be reached, or lacks something that was asked of it."""


class BoardLost(BoardError):
    """A board stopped answering, or answered with what can't be right, in the middle of work that another board, or a later try, can do."""


class InternalError(QCompilerError):
    """A bug of this program: nothing that a user gives should cause it. `__cause__` is the exception behind it; `subject` is what was worked on when it
    happened (a module, say), for a report."""

    def __init__(self, message: str, subject: Any = None) -> None:
        super().__init__(message)
        self.subject = subject


_LONGEST = 600  # characters of a message: a code generator may list kilobytes of offending calls


_CALLERS = "_raised_by_the_caller"


def callers_own(error: Exception) -> Exception:
    """The error, marked as one of code that the caller gave us: no bug of ours."""
    with contextlib.suppress(AttributeError):
        setattr(error, _CALLERS, True)
    return error


@contextlib.contextmanager
def bugs_named(where: str, subject: Any = None) -> Iterator[None]:
    """Raise InternalError, naming `where`, for an exception inside that a user can't have caused. Errors of the family, of the operating system and of
    memory pass as they are, and those of the caller's code (`callers_own`); so does a Ctrl-C, which TVM reports as a RuntimeError without text."""
    try:
        yield
    except InternalError as error:  # named already, further inside
        error.subject = subject if error.subject is None else error.subject
        raise
    except (QCompilerError, OSError, MemoryError):
        raise
    except Exception as error:
        if getattr(error, _CALLERS, False):
            raise
        text = " ".join(str(error).split())
        if type(error) is RuntimeError and not text:
            raise KeyboardInterrupt from error
        what = f"{type(error).__name__}: {text[:_LONGEST]}{' ...' if len(text) > _LONGEST else ''}" if text else type(error).__name__
        raise InternalError(f"internal error in {where}: {what}", subject) from error


def closest(word: str, candidates: list[str], count: int = 3) -> str:
    """`" Did you mean 'a' or 'b'?"` for the nearest candidates, or an empty string when none is near."""
    import difflib

    near = difflib.get_close_matches(word, candidates, n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
