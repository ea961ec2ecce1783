"""The error family. Every message says what, where, what is supported, and what to do.

The command line prints the message of a `QCompilerError` on one line and exits with 2; anything else is a bug and shows a traceback.
"""


class QCompilerError(Exception):
    """Base of every error that a user can cause and mend."""


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
    """A call of a session can't begin and waiting would never end: it comes from inside another call, or in a child of a process that was inside one."""


class OutputError(QCompilerError):
    """A result can't be written where the user asked."""


class TuningError(QCompilerError):
    """A tuning log can't be used, or there is nothing to tune."""


def closest(word: str, candidates: list[str], count: int = 3) -> str:
    """`" Did you mean 'a' or 'b'?"` for the nearest candidates, or an empty string when none is near."""
    import difflib

    near = difflib.get_close_matches(word, candidates, n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
