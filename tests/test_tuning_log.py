"""Tuning logs: lines, damage, locks, merging, and what a compilation takes from them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler import schedules
from qcompiler.backend.cores import check_core
from qcompiler.backend.tuning_log import (
    SCHEMA,
    SHIPPED,
    Record,
    Tuned,
    allowed,
    best_of,
    isa_of,
    key_of,
    merge,
    opened,
    read_file,
    read_log,
    workload_of,
    workload_text,
    write_log,
)
from qcompiler.base.errors import OutputError, TargetError, TuningError
from qcompiler.base.targets import Target, find_target, load_targets
from qcompiler.schedules.table import KERNELS, Kernel, Layout, OpCall
from qcompiler.tuning.model import CostModel, Space
from qcompiler.tuning.search import Search, Task

TARGET = load_targets()["x86-avx2"]
ISA = "x86-avx2"
schedules.load(TARGET)


def convolution(zero_point: int = 3, outputs: int = 16, low: int = -128, halo: int = 0) -> OpCall:
    weight = np.ones((outputs, 1, 1, 8), np.int8)
    attrs = {"strides": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1, "out_dtype": "int8"}
    attrs |= {"x_zero_point": zero_point, "zero_point": zero_point, "low": low, "high": 127}
    operands: list[Any] = [Layout((1, 6, 6, 8), "uint8"), weight, np.zeros(outputs, np.int32), np.ones(outputs, np.float32)]
    return OpCall("qc.conv2d", operands, attrs, Layout((1, 6, 6, outputs), "uint8", (halo,) * 4))


def record(ratio: float = 0.9, size: int = 4, **fields: Any) -> Record:
    made = Record(ISA, f"{ISA}/conv2d", workload_of(convolution()), {"size": size, "order": "a"}, ratio, (1e-5, 6e-6), 2, "a CPU")
    return dataclasses.replace(made, **fields)


def log_of(folder: Path, *records: Record) -> Path:
    with opened(folder, ISA) as writer:
        for r in records:
            writer.append(r)
    return folder


# -- workloads -------------------------------------------------------------------------------------------------------------------------


def test_a_workload_is_what_decides_code_not_numbers() -> None:
    base = key_of("row", workload_of(convolution()))
    assert key_of("row", workload_of(convolution(zero_point=-9, low=-3))) == base
    other = convolution()
    other.operands[1] = -np.asarray(other.operands[1])
    assert key_of("row", workload_of(other)) == base
    keys = {base, *(key_of("row", workload_of(o)) for o in (convolution(outputs=24), convolution(halo=1))), key_of("other row", workload_of(convolution()))}
    assert len(keys) == 4


def test_a_workload_survives_json() -> None:
    workload = workload_of(convolution(halo=1))
    assert json.loads(json.dumps(workload)) == workload
    assert workload_text(workload) == "1x6x6x8 > 1x6x6x16, 1x1"


# -- lines -----------------------------------------------------------------------------------------------------------------------------


def test_records_come_back_as_written(tmp_path: Path) -> None:
    written = [record(), record(0.8, 2), record(params={"size": 9}, ratio=float("inf"), seconds=(), failed="took longer than 15 s to build")]
    assert read_log(log_of(tmp_path / "log", *written)) == written


@pytest.mark.parametrize("cut", [1, 40, -2])
def test_a_half_written_last_line_is_skipped_and_the_log_goes_on(tmp_path: Path, cut: int) -> None:
    folder = log_of(tmp_path, record())
    torn = record(0.5, 2).line()[:cut]
    with (tmp_path / f"{ISA}.jsonl").open("a") as file:
        file.write(torn)
    with pytest.warns(UserWarning, match="line 2 is not a whole record"):
        assert read_log(folder) == [record()]
    log_of(folder, record(0.7, 8))
    with pytest.warns(UserWarning, match="line 2"):
        assert read_log(folder) == [record(), record(0.7, 8)]


def test_a_complete_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    (tmp_path / f"{ISA}.jsonl").write_text(record().line().rstrip("\n"))
    assert read_log(log_of(tmp_path, record(0.7, 8))) == [record(), record(0.7, 8)]


def test_binary_garbage_is_skipped(tmp_path: Path) -> None:
    (tmp_path / f"{ISA}.jsonl").write_bytes(b"\xff\xfe\x00\n" + record().line().encode() + b"[1]\nnull\n{}\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_log(tmp_path) == [record()]
    assert len(caught) == 4


NO_RECORDS = [
    {"ratio": "fast"}, {"ratio": True}, {"ratio": float("inf")}, {"ratio": float("nan")}, {"ratio": -1}, {"ratio": 1e400},
    {"seconds": 3}, {"seconds": ["1"]}, {"seconds": [0.0]}, {"threads": 0}, {"threads": "2"}, {"threads": float("inf")},
    {"isa": 5}, {"row": ["x"]}, {"host": None}, {"params": []}, {"params": {"size": [1]}}, {"params": {"size": {"a": 1}}},
    {"params": {"size": float("nan")}}, {"params": {"size": 10**40}}, {"workload": []}, {"workload": {}}, {"workload": "op"},
    *({"workload": workload_of(convolution()) | change} for change in (
        {"op": 3}, {"operands": 5}, {"operands": []}, {"operands": [[1, "int8"]]}, {"operands": [[["a"], "int8"]]}, {"operands": [[[1.5], "int8"]]},
        {"operands": [[[0, 4], "int8"]]},
        {"output": [[1]]}, {"output": None}, {"attrs": []}, {"attrs": {"strides": 2}}, {"attrs": {"groups": "two"}}, {"attrs": {"x": float("nan")}},
    )),
]  # fmt: skip


@pytest.mark.parametrize("change", NO_RECORDS, ids=str)
def test_json_that_is_no_record_is_skipped(tmp_path: Path, change: dict[str, Any]) -> None:
    """As a line, and in everything that reads logs."""
    bad = json.dumps(json.loads(record(0.5).line()) | change)
    (tmp_path / f"{ISA}.jsonl").write_text(f"{bad}\n{record().line()}")
    with pytest.warns(UserWarning, match="line 1 is not a whole record"):
        assert read_log(tmp_path) == [record()]


def test_a_line_nested_too_deeply_is_skipped(tmp_path: Path) -> None:
    (tmp_path / f"{ISA}.jsonl").write_text("[" * 100_000 + "\n" + record().line())
    with pytest.warns(UserWarning, match="line 1 is not a whole record"):
        assert read_log(tmp_path) == [record()]


def test_a_number_of_another_type_is_another_point(tmp_path: Path) -> None:
    """1.0 is not 1: a template given it would build other code, or none."""
    assert allowed({"n": 1, "order": "a"}, {"n": [1, 2], "order": ["a"]}, {"n": 4, "order": "b"})
    assert allowed({"n": 4, "order": "b"}, {"n": [1, 2], "order": ["a"]}, {"n": 4, "order": "b"})
    for n in (1.0, True, 4.0, "1", 3):
        assert not allowed({"n": n, "order": "a"}, {"n": [1, 2], "order": ["a"]}, {"n": 4, "order": "b"})


def test_pipes_in_place_of_a_log(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{ISA}.jsonl")
    with pytest.raises(TuningError, match="is a pipe or a device"):
        read_log(tmp_path)
    with pytest.raises(OutputError, match="is a pipe or a device"), opened(tmp_path, ISA):
        pass
    (tmp_path / "lock").unlink()
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(OutputError, match="is a pipe or a device"), opened(tmp_path, ISA):
        pass


def test_a_full_disk_when_a_log_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock needs no room; a log's first record does."""

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with opened(tmp_path, ISA) as writer:
        monkeypatch.setattr(os, "write", full)
        monkeypatch.setattr(os, "ftruncate", full)
        with pytest.raises(OutputError, match="can't be written: No space left on device; everything before is safe"):
            writer.append(record())


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    line = json.loads(record().line()) | {"schema": SCHEMA + 1}
    (tmp_path / f"{ISA}.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(TuningError, match=f"line 1 has schema version {SCHEMA + 1}, this version of qcompiler reads version {SCHEMA}"):
        read_log(tmp_path)


def test_another_isa_is_refused(tmp_path: Path) -> None:
    log_of(tmp_path, record())
    with pytest.raises(TuningError, match="the tuning log is for x86-avx2, and x86-avx512vnni is wanted"):
        read_log(tmp_path, "x86-avx512vnni")
    (tmp_path / f"{ISA}.jsonl").rename(tmp_path / "x86-avxvnni.jsonl")
    with pytest.raises(TuningError, match="line 1 was measured for x86-avx2"):
        read_log(tmp_path)


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="is not a tuning log: missing"):
        read_log(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningError, match="is not a tuning log: a file"):
        read_log(tmp_path / "file")
    with pytest.raises(TuningError, match="no tuning log in this folder"):
        read_log(tmp_path)


# -- writing ---------------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with opened(tmp_path, ISA) as writer:
        writer.append(record())
        monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: len(data) // 2]))
        with pytest.raises(OutputError, match="No space left on device"):
            writer.append(record(0.5, 2))
        monkeypatch.undo()
        assert read_log(tmp_path) == [record()]
        writer.append(record(0.6, 3))
    assert read_log(tmp_path) == [record(), record(0.6, 3)]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="can't be used as a tuning log"), opened(folder, ISA):
            pass


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path, ISA) as writer:
        with pytest.raises(TuningError, match=f"another run \\(process {os.getpid()}\\) is tuning into this log"), opened(tmp_path, "x86-avxvnni"):
            pass
        writer.append(record())
    assert read_log(tmp_path) == [record()]


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from qcompiler.backend.tuning_log import opened\n"
    code += f"with opened(Path(sys.argv[1]), {ISA!r}): print('locked', flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert other.stdout is not None and other.stdout.readline() == b"locked\n"
    with pytest.raises(TuningError, match=f"process {other.pid}"), opened(tmp_path, ISA):
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    log_of(tmp_path, record())
    assert read_log(tmp_path) == [record()]


# -- merging and choosing --------------------------------------------------------------------------------------------------------------


def test_the_best_has_the_least_ratio() -> None:
    failed = record(float("inf"), 3, seconds=(), failed="crashed")
    assert list(best_of([record(0.9), record(0.8, 2), record(0.85, 1), failed]).values()) == [record(0.8, 2)]
    assert best_of([failed]) == {}


def test_merge_is_the_union_with_the_best_of_equal_points(tmp_path: Path) -> None:
    a = log_of(tmp_path / "a", record(0.9), record(0.7, 2))
    b = log_of(tmp_path / "b", record(0.8), record(0.6, 3, threads=1))
    write_log(b, [record(0.9, isa="x86-avxvnni", row="x86-avxvnni/conv2d")])
    assert merge([a, b], tmp_path / "c") == {"x86-avx2": 3, "x86-avxvnni": 1}
    assert sorted(r.ratio for r in read_log(tmp_path / "c", ISA)) == [0.6, 0.7, 0.8]
    merge([b, a], tmp_path / "d")
    for isa in ("x86-avx2", "x86-avxvnni"):
        assert (tmp_path / "c" / f"{isa}.jsonl").read_bytes() == (tmp_path / "d" / f"{isa}.jsonl").read_bytes()
    with pytest.raises(OutputError, match="holds a tuning log already"):
        merge([a, b], tmp_path / "c")
    with pytest.raises(TuningError, match="missing"):
        merge([a, tmp_path / "none"], tmp_path / "e")
    assert not (tmp_path / "e").exists()


class SomeRow:
    """A row with two tunables, of which one combination can't be built."""

    name, isa = f"{ISA}/conv2d", ISA

    def refuse(self, op: OpCall, target: Target) -> str | None:
        return None

    def needs(self, op: OpCall, target: Target) -> list[Any]:
        return []

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return {"size": [1, 2, 4, 8], "order": ["a", "b"]}

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        return {"size": 3, "order": "a"}

    def build(self, op: OpCall, params: Any, target: Target) -> Kernel:
        if params["size"] == 8:
            raise ValueError("too large")
        return Kernel(lambda: None, 1, [], "key", self.name)


def test_a_compilation_takes_the_best_record_of_an_equal_workload(tmp_path: Path) -> None:
    for number, useless in enumerate((record(0.6, 8), record(0.6, 5), record(0.6, params={"size": 4}), record(1.0), record(1.2, 2))):
        tuned = Tuned(TARGET, log_of(tmp_path / str(number), useless), None)
        assert tuned(SomeRow(), convolution()) is None
        assert not tuned.used
    unusable = [record(0.7, 8), record(0.6, 5), record(0.5, params={"size": 4})]  # can't be built; not in the space; other tunables
    tuned = Tuned(TARGET, log_of(tmp_path / "log", record(0.9), record(0.8, 2), *unusable), None)
    assert tuned(SomeRow(), convolution(zero_point=77)) == {"size": 2, "order": "a"}
    assert tuned(SomeRow(), convolution(outputs=24)) is None
    assert list(tuned.used.values()) == [record(0.8, 2)]


def test_the_users_log_comes_before_the_shipped_one(tmp_path: Path) -> None:
    shipped = log_of(tmp_path / "shipped", record(0.5, 4))
    assert Tuned(TARGET, None, shipped)(SomeRow(), convolution()) == {"size": 4, "order": "a"}
    assert Tuned(TARGET, log_of(tmp_path / "own", record(0.9, 2)), shipped)(SomeRow(), convolution()) == {"size": 2, "order": "a"}
    assert Tuned(TARGET, log_of(tmp_path / "slow", record(1.1, 2)), shipped)(SomeRow(), convolution()) is None


def test_the_digest_is_of_what_was_used(tmp_path: Path) -> None:
    def digest(*records: Record, use: bool = True) -> str:
        tuned = Tuned(TARGET, log_of(tmp_path / str(time.monotonic_ns()), *records), None)
        if use:
            tuned(SomeRow(), convolution())
        assert not tuned.anew().used, "another library's"
        return tuned.digest

    other = workload_of(convolution(outputs=24))
    assert digest(record()) == digest(record(0.7), record(0.75, 2), record(0.1, 2, workload=other))
    assert len({digest(record()), digest(record(0.9, 2)), digest(record(), use=False)}) == 3


def test_the_shipped_log_is_small_and_every_record_in_it_pays() -> None:
    files = sorted(SHIPPED.glob("*.jsonl"))
    assert sum(f.stat().st_size for f in files) < 200_000
    for file in files:
        records = read_file(file)
        assert len({r.key for r in records}) == len(records) > 0
        assert all(r.ratio < 0.98 and not r.failed for r in records)
        target = next(t for t in load_targets().values() if isa_of(t) == file.name.removesuffix(".jsonl"))
        schedules.load(target)
        assert {r.row for r in records} <= {row.name for rows in KERNELS.values() for row in rows}


# -- cores ----------------------------------------------------------------------------------------------------------------------------------


def test_records_are_of_a_core(tmp_path: Path) -> None:
    """What is best on one core is not silently best on another, nor where none is named; logs that mix cores keep them apart."""
    a72, a76 = dataclasses.replace(record(0.9, 2), core="cortex-a72"), dataclasses.replace(record(0.5, 1), core="cortex-a76")
    assert Record.of_line(a72.line()) == a72 and '"core"' not in record(0.9).line()
    log = log_of(tmp_path / "both", a72, a76)
    assert Tuned(TARGET, log, None, "cortex-a72")(SomeRow(), convolution()) == {"size": 2, "order": "a"}
    assert Tuned(TARGET, log, None, "cortex-a76")(SomeRow(), convolution()) == {"size": 1, "order": "a"}
    with pytest.raises(TuningError, match="its records are of cortex-a72, cortex-a76, and none is of neoverse-n1. Name one of its cores with --core"):
        Tuned(TARGET, log, None, "neoverse-n1")
    with pytest.raises(TuningError, match="and no core is named"):
        Tuned(TARGET, log, None)
    mixed = log_of(tmp_path / "mixed", record(0.8, 4), a76)
    assert Tuned(TARGET, mixed, None)(SomeRow(), convolution()) == {"size": 4, "order": "a"}
    assert merge([log, mixed], tmp_path / "merged") == {ISA: 3}
    shipped = log_of(tmp_path / "shipped", record(0.7, 4))
    assert Tuned(TARGET, None, shipped, "cortex-a72")(SomeRow(), convolution()) is None


def test_another_core_is_a_point_to_start_from() -> None:
    others = [dataclasses.replace(record(0.5, 1), core="cortex-a76"), dataclasses.replace(record(0.6, 2), core="cortex-a72")]
    space = Space.of(SomeRow().space(convolution(), TARGET), SomeRow().default(convolution(), TARGET))
    task = Task(SomeRow(), convolution(), workload_of(convolution()), space)
    search = Search(TARGET, [task], others, "cortex-a72")
    assert task.trials == 1 and task.best == {"size": 2, "order": "a"}
    assert {"size": 1, "order": "a"} in search.starts(task, space)


def test_a_cost_model_learns_across_cores() -> None:
    """Many points of one core and few of another rank the other's points better than its few alone, also where the two disagree."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 8, (600, 6)).astype(np.float32)
    common = 0.2 * np.abs(x[:, 0] - 3) + 0.1 * np.abs(x[:, 1] - x[:, 2]) + 0.1 * x[:, 3]
    here, there = common + 0.15 * x[:, 4], common - 0.15 * x[:, 4]  # what one core likes of the fifth, the other does not
    transferred, alone = CostModel(["cortex-a76"]), CostModel()
    transferred.learn(x[:300], np.exp(there[:300]).tolist(), "cortex-a76")
    assert transferred.predict(x[400:]).any()  # something to start from
    errors = {}
    for name, model in (("transferred", transferred), ("alone", alone)):
        model.learn(x[300:364], np.exp(here[300:364]).tolist())
        ranks = np.argsort(np.argsort(model.predict(x[400:])))
        errors[name] = float(np.abs(ranks - np.argsort(np.argsort(here[400:]))).mean())
    assert errors["transferred"] < 0.9 * errors["alone"], errors


def test_records_of_other_cores_teach_the_search() -> None:
    others = [dataclasses.replace(record(ratio, size), core="cortex-a76") for size, ratio in ((1, 0.5), (2, 1.2), (4, 1.5))] * 8
    space = Space.of(SomeRow().space(convolution(), TARGET), SomeRow().default(convolution(), TARGET))
    task = Task(SomeRow(), convolution(), workload_of(convolution()), space)
    search = Search(TARGET, [task], others, "cortex-a72")
    assert (task.trials, task.best, task.tried) == (0, None, set())  # never the answer
    first, *_ = search.candidates(task, space, 1, random.Random(0))
    assert first["size"] == 1


@pytest.mark.parametrize(
    ("core", "target", "message"),
    [
        ("cortex-a27", "arm64-dotprod", "no core 'cortex-a27' is known for arm64-dotprod. Did you mean 'cortex-a"),
        ("cortex-a72", "x86-avx2", "no core 'cortex-a72' is known for x86-avx2. "),
        ("h200x", "cuda-sm90", "no core 'h200x' is known for cuda-sm90. Did you mean 'h200'"),
    ],
)
def test_cores_that_there_are_not(core: str, target: str, message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        check_core(core, find_target(target))
    with pytest.raises(TargetError, match=re.escape(message)):
        qcompiler.compile("m.onnx", target, core=core)
    for known, row in (("cortex-a72", "arm64-dotprod"), ("cortex-a78ae", "arm64-dotprod"), ("cortex-a7", "armv7-neon"), ("h200", "cuda-sm90"), ("", target)):
        check_core(known, find_target(row))
