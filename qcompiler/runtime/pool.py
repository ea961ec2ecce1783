"""Several sessions on one library, each in a thread of its own, fed from one queue."""

from __future__ import annotations

import atexit
import math
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from qcompiler.base.arguments import check
from qcompiler.base.errors import DataError, PoolClosed, SessionBusy
from qcompiler.runtime.library import read_manifest
from qcompiler.runtime.session import Bound, Session
from qcompiler.runtime.shapes import specializations

Outputs = dict[str, np.ndarray]


class _Request(NamedTuple):
    """due: when (time.monotonic) it wants to run, alone if it must."""

    future: Future[Outputs]
    inputs: Bound
    due: float

    @property
    def rows(self) -> int:
        first = self.inputs[0][0]
        return len(first) if first.ndim else 1


class _Room:
    """Places in a queue. Threads that wait for one are woken when no more than half of the queue is waiting: one that asks again and again would else be woken
    for every request, which costs about as much as all else that a pool does. Made of queues of tokens, which cost a third of a semaphore."""

    def __init__(self, places: int) -> None:
        self._half = places // 2
        self._free: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._left: queue.SimpleQueue[None] = queue.SimpleQueue()  # free too, and nobody has been woken for it
        for _ in range(places):
            self._free.put(None)

    def take(self, timeout: float | None) -> bool:
        """Take a place, waiting for one if need be; False: there was none in time."""
        for tokens, wait in ((self._free, 0.0), (self._left, 0.0), (self._free, timeout), (self._left, 0.0)):
            try:
                tokens.get(timeout=wait)
                return True
            except queue.Empty:
                continue
        return False

    def leave(self, waiting: int) -> None:
        """Give a place back; so many requests still wait."""
        self._left.put(None)
        while waiting <= self._half:
            try:
                self._left.get_nowait()
            except queue.Empty:
                break
            self._free.put(None)


_CREWS: weakref.WeakSet[_Crew] = weakref.WeakSet()
_CLOSED = "the pool is closed, or belongs to the process that this one was forked from; make another"


class _Crew:
    """The streams of a pool, a thread and a session each, and the queue that feeds them. Threads hold this and not the pool, so that a pool nobody holds any
    more ends them."""

    def __init__(self, path: str | os.PathLike[str], streams: int, threads: int, waiting: int, pin: bool, deadline: float | None) -> None:
        self.deadline, self.sessions = deadline, list[Session]()
        self._batches = [] if deadline is None else batches(read_manifest(path), Path(path))
        self._room = _Room(waiting)
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._lock, self._ended, self._owner = threading.Lock(), False, os.getpid()
        self._gathered: list[_Request] = []
        self._gathering = threading.Lock()  # one stream gathers at a time, else idle ones would take a request each
        self._threads = []
        failed: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        allowed = sorted(os.sched_getaffinity(0))
        for stream in range(streams):
            own = {allowed[(stream * threads + i) % len(allowed)] for i in range(threads)} if pin else None
            thread = threading.Thread(target=self._work, args=(path, threads, own, failed), name=f"stream {stream}", daemon=True)
            self._threads.append(thread)
            thread.start()
        errors = [error for error in [failed.get() for _ in self._threads] if error is not None]
        if errors:
            self.end()
            self.join()
            raise errors[0]
        _CREWS.add(self)

    @property
    def ended(self) -> bool:
        """Are no more requests accepted?"""
        return self._ended or self._owner != os.getpid()

    @property
    def is_here(self) -> bool:
        """Is this thread one of the streams?"""
        return threading.current_thread() in self._threads

    def submit(self, inputs: Bound, timeout: float | None) -> Future[Outputs] | None:
        """None: the queue had no room in time. Raises PoolClosed."""
        due = time.monotonic() + (self.deadline or 0.0)
        if not self._room.take(timeout):
            return None
        with self._lock:
            if self.ended:
                self._room.leave(0)  # whoever else waits for room finds the pool closed too
                raise PoolClosed(_CLOSED)
            future: Future[Outputs] = Future()
            self._requests.put(_Request(future, inputs, due))
        return future

    def end(self) -> None:
        """Accept no more requests; the threads end when they have run those accepted."""
        with self._lock:
            first, self._ended = not self._ended, True
            if first and self._owner == os.getpid():
                self._room.leave(0)  # whoever waits for room finds the pool closed
                for _ in self._threads:
                    self._requests.put(None)

    def join(self) -> None:
        """Wait for the threads to end."""
        if self._owner == os.getpid():
            for thread in self._threads:
                thread.join()

    def _work(self, path: Any, threads: int, cpus: set[int] | None, failed: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            if cpus:
                os.sched_setaffinity(0, cpus)  # of this thread; the session's workers, made here, inherit it
            session = Session(path, threads)
        except BaseException as error:
            failed.put(error)
            return
        self.sessions.append(session)
        failed.put(None)
        for group in self._singly() if self.deadline is None else self._groups():
            _answer(session, group)
            del group  # a waiting stream holds no arrays, and no callback that may hold the pool

    def _singly(self) -> Iterator[list[_Request]]:
        """For one stream: one request after the other, until the pool is closed."""
        while (request := self._requests.get()) is not None:
            self._room.leave(self._requests.qsize())
            if request.future.set_running_or_notify_cancel():
                yield [request]
            del request

    def _groups(self) -> Iterator[list[_Request]]:
        """For one stream: the requests that are to run together, until the pool is closed."""
        open_, more = True, True
        while open_ or more:
            with self._gathering:
                open_, group = self._gather(open_)
            if more := bool(group):
                yield group
            del group

    def _gather(self, open_: bool) -> tuple[bool, list[_Request]]:
        """(may more requests come; those that are to run together next: none where they were cancelled or no more come)."""
        held, least, most = self._gathered, self._batches[0], self._batches[-1] // self._batches[0]
        joining = all(r.rows == least for r in held)
        while open_ and joining and len(held) < most:
            try:
                request = self._requests.get(timeout=max(0.0, held[0].due - time.monotonic()) if held else None)
            except queue.Empty:
                break
            if request is None:
                open_ = False
                break
            self._room.leave(self._requests.qsize())
            if request.future.set_running_or_notify_cancel():
                held.append(request)
                joining = request.rows == least
        alike = next((i for i, r in enumerate(held) if r.rows != least), len(held))
        size = max((b // least for b in self._batches if b // least <= alike), default=1)
        group, held[:size] = held[:size], []
        return open_, group


class SessionPool:
    """`streams` sessions on the library at `path`, `threads` threads each. They share code and weights, and requests begin in the order in which they came.

    `waiting`: so many requests may wait for a stream (two per stream if not given); `submit` then waits for room, until half of them have begun.
    `pin`: stream i stays on CPUs i * threads and up, of those that this process may use, in turns. `deadline`: of a library for several batches, requests
    of the least wait for others to run with: until they fill the largest batch, else until the first of them has waited so many seconds; then as many run
    together as the largest batch takes that they fill. Their arrays are copied side by side.
    A pool keeps no states (`--state`): each request gives them, and gets their next values with its outputs.
    A request's arrays are not copied, where they are contiguous and aligned: they must not change before its future is done.

    `close` accepts no more requests and runs those accepted to their end; leaving a `with` block closes. `submit` raises PoolClosed then, in threads that wait
    for room at that moment too. A pool that nobody holds any more ends likewise, without waiting. Of a child made by fork the pool is closed.

    Raises what Session raises, and DataError for numbers out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        streams: int = 1,
        threads: int = 1,
        waiting: int | None = None,
        pin: bool = False,
        deadline: float | None = None,
    ) -> None:
        waiting = 2 * streams if waiting is None else waiting
        for name, value in (("streams", streams), ("threads", threads), ("waiting", waiting)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= 1 << 20:
                raise DataError(f"{name} is {value!r}; at least 1 is needed")
        check("SessionPool()", "pin", pin, bool)
        if deadline is not None and not 0 < (seconds := _seconds(deadline)) <= 3600:
            said = repr(deadline) if math.isnan(seconds) else f"{seconds:g}"
            raise DataError(f"deadline is {said}; expected a number of seconds above 0, at most 3600, or None for requests that run one by one")
        self.streams, self.threads, self.deadline = int(streams), int(threads), None if deadline is None else float(deadline)
        self._path = Path(path)
        self._crew = _Crew(path, self.streams, self.threads, int(waiting), pin, self.deadline)
        weakref.finalize(self, self._crew.end).atexit = False
        session = self._crew.sessions[0]
        self.inputs, self.outputs, self.manifest, self.state = session.inputs, session.outputs, session.manifest, session.state

    def submit(self, inputs: Mapping[str, np.ndarray], timeout: float | None = None) -> Future[Outputs]:
        """Ask for one run; its outputs are the future's result. Waits for room in the queue, `timeout` seconds at most where given.

        Raises DataError for inputs that are not the library's, SessionBusy where there is no room in time, PoolClosed.
        """
        if timeout is not None and not _seconds(timeout) >= 0:
            raise DataError(f"timeout is {timeout!r}; expected 0 (do not wait) or more seconds, or None to wait as long as it takes")
        if self._crew.ended:
            raise PoolClosed(_CLOSED)
        if self.state and isinstance(inputs, Mapping) and not set(self.state) <= set(inputs):
            names = ", ".join(f"'{name}'" for name in self.state)
            raise DataError(
                f"a pool keeps no states, since a request runs in whichever stream is free: give {names} with each request, from what the request before "
                "it in its stream handed out, or use a Session for each stream"
            )
        bound = self._crew.sessions[0].bound(inputs)
        future = self._crew.submit(bound, None if timeout is None or timeout > threading.TIMEOUT_MAX else float(timeout))
        if future is None:
            raise SessionBusy(f"as many requests wait as may, and none was begun within {timeout:g} s; wait longer, or allow more to wait")
        return future

    def close(self) -> None:
        """Accept no more requests, run those accepted to their end, and end the streams. Closing twice is fine. Raises SessionBusy inside a stream (a callback
        of a future), which can't wait for its own end."""
        if self._crew.is_here:
            raise SessionBusy("a callback of a future runs in a stream of the pool, which can't wait for its own end; close the pool in another thread")
        self._crew.end()
        self._crew.join()

    def __enter__(self) -> SessionPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SessionPool{' (closed)' * self._crew.ended}: {self.streams} stream{'s' * (self.streams != 1)} of {self._crew.sessions[0]!r}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"a SessionPool holds threads of its process and can't be copied or pickled; make another on {self._path} where it is needed")


def _seconds(given: Any) -> float:
    """A number of seconds; NaN for what is none."""
    return float(given) if isinstance(given, (int, float, np.number)) and not isinstance(given, bool) else math.nan


def _tell(settle: Callable[[Any], None], what: Any) -> None:
    """Settle a future. What leaves its callbacks (SystemExit, say), which run here, must not end the stream, for which others wait: it is reported as any
    thread's."""
    try:
        settle(what)
    except BaseException:
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


def _answer(session: Session, group: Sequence[_Request]) -> None:
    try:
        found = _run(session, group)
    except BaseException as error:
        for request in group:
            _tell(request.future.set_exception, error)
    else:
        for request, outputs in zip(group, found, strict=True):
            _tell(request.future.set_result, outputs)


def _run(session: Session, group: Sequence[_Request]) -> list[Outputs]:
    """The outputs of each request of a group, which run together."""
    if len(group) == 1:
        return [session.run_bound(group[0].inputs)]
    whole = session.run({port.name: np.concatenate([r.inputs[0][i] for r in group]) for i, port in enumerate(session.inputs)})
    parts = {name: np.split(array, len(group)) for name, array in whole.items()}
    return [{name: parts[name][i].copy() for name in parts} for i in range(len(group))]


def batches(manifest: Mapping[str, Any], path: Path) -> list[int]:
    """The batches that a library was compiled for, least first. Raises DataError where its shapes differ in anything else, there is one only,
    or it keeps states."""
    found = set()
    for at in specializations(manifest):
        shapes = [tuple(p["shape"]) for kind in ("inputs", "outputs") for p in at[kind]]
        rows = {s[0] if s else 0 for s in shapes}
        found.add((rows.pop() if len(rows) == 1 else 0, tuple(s[1:] for s in shapes)))
    sizes = sorted(size for size, _ in found)
    if len({rest for _, rest in found}) > 1 or len(sizes) < 2 or sizes[0] == 0 or any(size % sizes[0] for size in sizes) or manifest.get("state"):
        raise DataError(
            f"{path}: a deadline is for a library without states for several batches, multiples of the least, and alike in all else; compile one with "
            "--input-shape NAME={1,8},... or leave the deadline out"
        )
    return sizes


@atexit.register
def _end() -> None:
    """Pools end with the interpreter, before the sessions do."""
    crews = list(_CREWS)
    for crew in crews:
        crew.end()
    for crew in crews:
        crew.join()


# -- load -----------------------------------------------------------------------------------------------------------------------------------


class Load:
    """Latencies of requests under load. rate: requests a second that are due whatever happens; None: as many as find room in the queue, which is always full.

    seconds: from the first request to the last answer. latencies: sorted seconds from the moment a request was due to its answer.
    """

    def __init__(self, seconds: float, latencies: list[float], rate: float | None) -> None:
        self.seconds, self.latencies, self.rate = seconds, sorted(latencies), rate

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds

    def quantile(self, q: float) -> float:
        """The latency that a share q of the requests did not exceed."""
        return self.latencies[max(0, -int(-q * len(self.latencies) // 1) - 1)]

    def to_json(self) -> dict[str, Any]:
        quantiles = {f"p{round(100 * q)}": self.quantile(q) for q in (0.5, 0.9, 0.99)}
        return {"requests": len(self.latencies), "per_second": self.per_second, "rate": self.rate, "seconds": quantiles}


def measure(pool: SessionPool, inputs: Mapping[str, np.ndarray], duration: float, rate: float | None = None) -> Load:
    """Put load on a pool for about `duration` seconds, and wait for the last answer."""
    for future in [pool.submit(inputs) for _ in range(3 * pool.streams)]:
        future.result()
    latencies: list[float] = []
    answered: queue.SimpleQueue[None] = queue.SimpleQueue()
    begin = time.perf_counter()

    def ask(due: float) -> None:
        def answer(future: Future[Outputs]) -> None:
            latencies.append(time.perf_counter() - due)
            answered.put(None)

        pool.submit(inputs).add_done_callback(answer)

    asked = 0
    while (after := time.perf_counter() - begin if rate is None else asked / rate) < duration or not asked:
        due = begin + after
        if rate is not None:
            time.sleep(max(0.0, due - time.perf_counter()))
        ask(due)
        asked += 1
    for _ in range(asked):
        answered.get()
    return Load(time.perf_counter() - begin, latencies, rate)
