"""A session against what its surroundings do: files that change, copies, calls within calls, forks, memory over many loads."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.base.errors import ArtifactError, SessionBusy
from qcompiler.runtime.session import Session


@pytest.fixture
def library(digits: Callable[[str], Path], tmp_path: Path) -> Path:
    path = tmp_path / "net.so"
    path.write_bytes(digits("native").read_bytes())
    return path


def image(session: Session) -> dict[str, np.ndarray]:
    return {i.name: np.random.default_rng(0).standard_normal(i.shape).astype(i.dtype) for i in session.inputs}


def in_child(work: Callable[[], str]) -> str:
    """What `work` returns in a forked child, which must end within a minute."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, work().encode())
        finally:
            os._exit(0)
    os.close(writing)
    alarm = threading.Timer(60, os.kill, (child, 9))
    alarm.start()
    with os.fdopen(reading) as stream:
        text = stream.read()
    status = os.waitpid(child, 0)[1]
    alarm.cancel()
    assert status == 0, f"the child ended with status {status}"
    return text


def test_a_library_overwritten_in_place(library: Path) -> None:
    """As `cp` writes it: same inode, with the same bytes, with others, cut short; while a session lives and after it was dropped."""
    data = library.read_bytes()
    alive = Session(library)
    wanted = alive.run(image(alive))

    def overwrite(contents: bytes) -> None:
        with library.open("r+b") as file:
            file.truncate()
            file.write(contents)

    for _ in range(3):
        overwrite(data)
        session = Session(library)
        for name, value in session.run(image(session)).items():
            assert (value == wanted[name]).all()
        del session
    overwrite(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="cut short"):
        Session(library)
    overwrite(bytes(len(data)))
    with pytest.raises(ArtifactError, match="no ELF header"):
        Session(library)
    library.unlink()
    for name, value in alive.run(image(alive)).items():
        assert (value == wanted[name]).all()


def test_a_library_is_unmapped_with_its_last_session(library: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:net.so")

    before = mapped()
    session = Session(library)
    context = session.new_context(image(session))
    del session
    one = mapped()
    others = [Session(library) for _ in range(4)]
    assert mapped() == one > before  # one copy for all
    del others
    context.run(0, 1)
    del context
    assert mapped() == before


def test_the_collector_ends_sessions_before_it_unmaps_them(library: Path) -> None:
    """In a cycle of references, as tracebacks make them, objects are finalized in any order."""
    before = Path("/proc/self/maps").read_text().count("memfd:net.so")
    for _ in range(20):
        cycle: dict[str, Any] = {"session": Session(library, threads=2)}
        cycle["copy"] = cycle["session"]._copy
        cycle["cycle"] = cycle
        cycle["session"].cycle = cycle
        del cycle
        gc.collect()
    assert Path("/proc/self/maps").read_text().count("memfd:net.so") == before


def test_without_memory_files(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system lets no code run from memory files, a copy on disk is loaded."""
    wanted = Session(library).run(image(Session(library)))
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: not str(path).startswith("/proc/self/fd/") and real(path, mode, **more))
    session = Session(library)
    assert "qcompiler-" in Path("/proc/self/maps").read_text()
    for name, value in session.run(image(session)).items():
        assert (value == wanted[name]).all()


def test_a_session_is_not_copied(library: Path) -> None:
    session = Session(library)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can't be copied or pickled; load"):
            attempt(session)
    with pytest.raises(TypeError, match="can't be copied or pickled"):
        copy.deepcopy(session.new_context(image(session)))
    session.run(image(session))


def test_a_call_from_inside_a_call(library: Path) -> None:
    session = Session(library)
    inputs = image(session)
    wanted = session.run(inputs)
    for call in (lambda: session.run(inputs), lambda: session.profile(inputs, 1), lambda: session.trace(inputs, lambda name, array: None)):
        with pytest.raises(SessionBusy, match="from inside a call of the same session"):
            session.trace(inputs, lambda name, array, call=call: call())  # type: ignore[misc]
    other = Session(library)
    session.trace(inputs, lambda name, array: other.run(inputs))
    for name, value in session.run(inputs).items():
        assert (value == wanted[name]).all()


def test_threads_wait_for_each_other(library: Path) -> None:
    session = Session(library, threads=2)
    inputs = image(session)
    wanted = session.run(inputs)
    wrong: list[str] = []

    def work() -> None:
        wrong.extend(n for _ in range(50) for n, v in session.run(inputs).items() if not (v == wanted[n]).all())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_fork_while_another_thread_runs(library: Path) -> None:
    session = Session(library, threads=2)
    inputs = image(session)
    inside, go_on = threading.Event(), threading.Event()

    def visit(name: str, array: np.ndarray) -> None:
        inside.set()
        go_on.wait(60)

    thread = threading.Thread(target=session.trace, args=(inputs, visit))
    thread.start()
    inside.wait(60)

    def work() -> str:
        try:
            session.run(inputs)
        except SessionBusy as error:
            return f"{error} {len(Session(library).run(inputs))}"
        return "ran"

    try:
        assert "another thread was inside this session when the process was forked" in in_child(work)
    finally:
        go_on.set()
        thread.join()
    assert in_child(lambda: str(len(session.run(inputs)))) == "1"  # nobody was inside: the child may use it
    session.run(inputs)


_GROWTH = """
import ctypes, sys
from qcompiler.runtime.session import Session
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])
def load(count):
    for _ in range(count):
        session = Session(sys.argv[1], threads=2)
        libc.malloc(3000)  # something of the application's that stays, between a session's memory and the next one's
        del session
for _ in range(1000):
    libc.malloc(20000)  # no holes are left in the heap
load(100)
before = resident()
load(2000)
print(resident() - before - 2000 * 3000)
"""


def test_loading_again_and_again_does_not_grow(library: Path) -> None:
    """2,000 loads: less than 2 KB each, where a workspace alone has 34."""
    done = subprocess.run([sys.executable, "-c", _GROWTH, str(library)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000 * 2048, done.stdout
