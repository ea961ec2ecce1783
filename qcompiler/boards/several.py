"""A library on several boards of one target, with the methods of a `Session`: samples are spread over the boards, and those of a lost one go to others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from qcompiler.base.errors import BoardError, BoardLost
from qcompiler.boards.session import BoardSession

Result = TypeVar("Result")


class SharedSession:
    """Sessions of one library on several boards, as one that may be called from as many threads: a run goes to a board that is free. A board that is lost is
    left, and another does what it had in hand. lost: those that were, and why, in words. stop: set it, and the boards' work ends.

    Every method raises BoardError where no board is left, beside what `BoardSession` raises.
    """

    def __init__(self, sessions: Sequence[BoardSession], stop: threading.Event) -> None:
        first = sessions[0]
        self.path, self.threads, self.manifest, self.fitting = first.path, first.threads, first.manifest, first.fitting
        self.whole_inputs, self.inputs, self.outputs = first.whole_inputs, first.inputs, first.outputs
        self.lost: list[str] = []
        self._all, self._free, self._stop, self._changed = list(sessions), list(sessions), stop, threading.Condition()

    @property
    def devices(self) -> int:
        """How many there are at most."""
        return len(self._all)

    def interrupt(self) -> None:
        """End what the boards do; from any thread."""
        self._stop.set()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As `Session.run`."""
        return self._on_one(lambda session: session.run(inputs))

    def trace(self, inputs: Mapping[str, np.ndarray], visit: Callable[[str, np.ndarray], None]) -> dict[str, np.ndarray]:
        """As `Session.trace`; no value is visited before a board has answered with all of them."""

        def traced(session: BoardSession) -> tuple[list[tuple[str, np.ndarray]], dict[str, np.ndarray]]:
            seen: list[tuple[str, np.ndarray]] = []
            return seen, session.trace(inputs, lambda name, array: seen.append((name, array)))

        seen, outputs = self._on_one(traced)
        for name, array in seen:
            visit(name, array)
        return outputs

    def selftest(self) -> None:
        """As `Session.selftest`, on every board that is left."""
        for session in list(self._all):
            session.selftest()

    def _on_one(self, call: Callable[[BoardSession], Result]) -> Result:
        while True:
            session = self._taken()
            try:
                found = call(session)
            except BoardLost as error:
                self._leave(session, error)
                if self._stop.is_set():
                    raise
                continue
            except BaseException:
                self._put(session)
                raise
            self._put(session)
            return found

    def _taken(self) -> BoardSession:
        with self._changed:
            while not self._free:
                if not self._all:
                    raise BoardError(f"no board is left to run on. {'; '.join(self.lost)}")
                self._changed.wait(0.2)
            return self._free.pop(0)

    def _put(self, session: BoardSession) -> None:
        with self._changed:
            self._free.append(session)
            self._changed.notify()

    def _leave(self, session: BoardSession, error: Exception) -> None:
        with self._changed:
            self._all.remove(session)
            self.lost.append(f"{error}; other boards did its part" if self._all else str(error))
            self._changed.notify_all()
