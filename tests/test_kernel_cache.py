"""The cache of kernels' object code: the same code with it and without it, whatever became of its files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tvm import relax

from qcompiler.backend.codegen import _symbol, object_code
from qcompiler.backend.kernel_cache import cache_folder, cached, trim
from qcompiler.backend.lowering import Program, lower
from qcompiler.base.targets import find_target
from qcompiler.passes.graph import GraphBuilder, const
from qcompiler.runtime.elf import symbol_sizes

TARGET = find_target("x86-avx2")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    found = cache_folder()
    assert found == tmp_path / "cache"
    return found


def program() -> Program:
    builder = GraphBuilder()
    x = builder.input("x", (4, 8), "float32")
    product = builder.emit("product", relax.op.matmul(x, const(np.arange(40, dtype=np.float32).reshape(8, 5))))
    return lower(builder.finish([("y", builder.emit("soft", relax.op.nn.softmax(product)))]), TARGET)


def unmade() -> bytes:
    raise AssertionError("made although it is in the cache")


def test_code_is_the_same_with_a_cache_and_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, kept = object_code(program()), object_code(program())
    assert len(list(folder.iterdir())) == len(program().kernels()) + 1  # the entry point
    monkeypatch.setenv("QCOMPILER_CACHE", "off")
    assert made == kept == object_code(program())


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-1], lambda b: bytes(40), lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:]], ids=["empty", "short", "zeros", "bit"]
)
def test_a_damaged_entry_is_made_anew(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    code = bytes(range(100))
    assert cached("k", TARGET, lambda: code) == code == cached("k", TARGET, unmade)
    (entry,) = folder.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert cached("k", TARGET, lambda: code) == code == cached("k", TARGET, unmade)


def test_a_folder_that_others_fill_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached("k", TARGET, lambda: b"code")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    assert cached("k", TARGET, unmade) == b"code"


def test_targets_and_keys_have_entries_of_their_own(folder: Path) -> None:
    for target in ("x86-avx2", "x86-avx512", "arm64-neon"):
        for key in ("a", "b"):
            assert cached(key, find_target(target), lambda t=target, k=key: f"{t} {k}".encode()) == f"{target} {key}".encode()
    assert len(list(folder.iterdir())) == 6


def test_the_longest_unused_entries_go(folder: Path) -> None:
    for index in range(8):
        cached(str(index), TARGET, lambda: bytes(1000))
        (newest,) = set(folder.iterdir()) - {p for p in folder.iterdir() if p.stat().st_mtime < 1e9}
        os.utime(newest, (index + 1, index + 1))
    cached("0", TARGET, unmade)  # used again
    trim(8 * 1032)
    assert len(list(folder.iterdir())) == 8
    trim(4 * 1032)
    assert len(list(folder.iterdir())) == 3
    for kept in "067":
        cached(kept, TARGET, unmade)


def test_a_folder_that_can_not_be_made_is_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "file" / "cache"))
    assert cache_folder() is None
    assert cached("k", TARGET, lambda: b"code") == b"code"


def test_a_kernel_that_two_rows_share_has_the_name_of_either(folder: Path) -> None:
    """A product and a convolution of one pixel may be the same kernel; each network asks for it under the name of its row."""
    for row in ("f32 dense", "f32 conv2d"):
        made = program()
        for step in made.steps:
            object.__setattr__(step, "kernel", dataclasses.replace(step.kernel, row=row))
        sizes = symbol_sizes(object_code(made), Path("code.o"))
        assert all(sizes.get(_symbol(kernel)) for kernel in made.kernels().values())
