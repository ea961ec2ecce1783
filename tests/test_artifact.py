"""Libraries: the manifest survives, damage is found, another CPU is refused, sessions check what they are given."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tvm import relax

from qcompiler.backend import artifact as artifacts
from qcompiler.backend.artifact import Artifact
from qcompiler.backend.codegen import object_code
from qcompiler.backend.lowering import Program, lower
from qcompiler.base import host
from qcompiler.base.errors import ArtifactError, DataError, IncompatibleDevice, OutputError, TargetError
from qcompiler.base.targets import find_target
from qcompiler.passes.graph import GraphBuilder, const
from qcompiler.runtime.elf import read_section
from qcompiler.runtime.library import read_manifest
from qcompiler.runtime.session import Session

WEIGHT = np.arange(40, dtype=np.float32).reshape(8, 5) / 40


@pytest.fixture(scope="module")
def built() -> tuple[Program, bytes]:
    """softmax(x @ w), and its two halves added: views, several outputs, scratch memory."""
    builder = GraphBuilder()
    x = builder.input("x", (4, 8), "float32")
    product = builder.emit("product", relax.op.matmul(x, const(WEIGHT)))
    soft = builder.emit("soft", relax.op.nn.softmax(builder.emit("view", relax.op.reshape(product, (2, 2, 5)))))
    halves = builder.emit("halves", relax.op.split(soft, 2, axis=0))
    first, second = (builder.emit(f"half{i}", relax.TupleGetItem(halves, i)) for i in (0, 1))
    program = lower(builder.finish([("soft", soft), ("sum", builder.emit("sum", relax.op.add(first, second)))]), find_target("native"))
    return program, object_code(program)


@pytest.fixture(scope="module")
def artifact(built: tuple[Program, bytes]) -> Artifact:
    program, code = built
    return artifacts.link(code, program.constants, artifacts.program_manifest(program) | {"note": "a"}, program.target)


@pytest.fixture
def library(artifact: Artifact, tmp_path: Path) -> Path:
    return artifact.save(tmp_path / "net.so")


def expected(x: np.ndarray) -> np.ndarray:
    e = np.exp((x @ WEIGHT).reshape(2, 2, 5).astype(np.float64))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 8)).astype(np.float32)


def test_results(library: Path) -> None:
    session = Session(library)
    soft = expected(image())
    outputs = session.run({"x": image()})
    np.testing.assert_allclose(outputs["soft"], soft, atol=1e-6)
    np.testing.assert_allclose(outputs["sum"], soft[:1] + soft[1:], atol=1e-6)


def test_outputs_are_fresh_and_inputs_may_be_strided_or_unaligned(library: Path) -> None:
    session = Session(library)
    first = session.run({"x": image(1)})
    kept = {k: v.copy() for k, v in first.items()}
    session.run({"x": image(2)})
    assert all((first[k] == kept[k]).all() for k in kept)
    strided = np.zeros((4, 16), np.float32)
    strided[:, ::2] = image(1)
    raw = np.zeros(4 * 8 * 4 + 1, np.uint8)
    raw[1:] = image(1).view(np.uint8).reshape(-1)
    unaligned = np.frombuffer(raw.data, np.float32, 32, 1).reshape(4, 8)
    for x in (strided[:, ::2], unaligned):
        assert (session.run({"x": x})["soft"] == kept["soft"]).all()


def test_a_library_that_replaced_a_loaded_one(built: tuple[Program, bytes], library: Path) -> None:
    program, code = built
    old = Session(library)
    before = old.run({"x": image()})["sum"]
    twice = program.constants.copy()
    twice[: WEIGHT.nbytes] = (2 * WEIGHT).reshape(-1).view(np.uint8)
    artifacts.link(code, twice, artifacts.program_manifest(program), program.target).save(library)
    assert np.abs(Session(library).run({"x": image()})["sum"] - before).max() > 1e-3
    assert (old.run({"x": image()})["sum"] == before).all()


def test_trace_profile_and_contexts(library: Path) -> None:
    session = Session(library)
    seen: dict[str, np.ndarray] = {}
    session.trace({"x": image()}, lambda name, array: seen.update({name: array.copy()}))
    assert list(seen) == ["x", "product", "soft", "half0", "half1", "sum"]
    np.testing.assert_allclose(seen["product"], image() @ WEIGHT, atol=1e-5)
    assert [row[0] for row in session.profile({"x": image()}, 2)] == ["product", "soft", "half0", "sum"]
    contexts = [session.new_context({"x": image(i)}) for i in range(3)]
    for step in range(4):
        for context in contexts:
            context.run(step, step + 1)
    for i, context in enumerate(contexts):
        assert (context.outputs()["sum"] == session.run({"x": image(i)})["sum"]).all()


def test_sessions_in_threads(library: Path) -> None:
    wanted = {i: Session(library).run({"x": image(i)})["sum"] for i in range(4)}
    wrong: list[int] = []

    def work(i: int) -> None:
        session = Session(library, threads=2)
        wrong.extend(i for _ in range(200) if not (session.run({"x": image(i)})["sum"] == wanted[i]).all())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'x' is missing; the model wants x [4, 8] float32"),
        ({"X": image()}, "unknown input 'X'. Inputs: x"),
        (image(), "inputs are a mapping {name: array}, not ndarray; names: x"),
        (None, "inputs are a mapping {name: array}, not NoneType; names: x"),
        ({"x": image()[:2]}, "input 'x' has shape [2, 8]; the model wants [4, 8]"),
        ({"x": image().astype(np.float64)}, "input 'x' has dtype float64; the model wants float32"),
    ],
)
def test_wrong_inputs(library: Path, inputs: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError) as error:
        Session(library).run(inputs)
    assert str(error.value) == message


def test_the_manifest_is_readable_without_running(library: Path, artifact: Artifact) -> None:
    manifest = read_manifest(library)
    assert manifest == json.loads(json.dumps(artifact.manifest))
    assert manifest["note"] == "a" and manifest["format"] == artifacts.FORMAT_VERSION
    assert read_section(library, ".qc.manifest")[1] == "x86_64"


def test_linking_is_reproducible(built: tuple[Program, bytes], artifact: Artifact) -> None:
    program, code = built
    again = artifacts.link(code, program.constants, artifacts.program_manifest(program) | {"note": "a"}, program.target)
    assert again.library == artifact.library and again.digest == artifact.digest


def damaged(library: Path, at: int, value: bytes) -> Path:
    data = bytearray(library.read_bytes())
    data[at : at + len(value)] = value
    path = library.with_name("damaged.so")
    path.write_bytes(data)
    return path


def test_a_damaged_manifest(library: Path) -> None:
    at = library.read_bytes().index(b'"note":"a"')
    with pytest.raises(ArtifactError, match="the manifest is damaged .its digest does not match.; compile the model again"):
        read_manifest(damaged(library, at, b'"note":"b"'))
    with pytest.raises(ArtifactError, match="the manifest is damaged .not readable as JSON"):
        Session(damaged(library, at, b"\x00\xff\x00"))


def test_files_that_are_no_library(library: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("hello")
    with pytest.raises(ArtifactError, match="not a compiled library .no ELF header."):
        Session(text)
    with pytest.raises(ArtifactError, match="can't be read: No such file"):
        Session(tmp_path / "absent.so")
    data = library.read_bytes()
    for size in (64, len(data) // 3, len(data) - 200):
        text.write_bytes(data[:size])
        with pytest.raises(ArtifactError, match="damaged or cut short|cut short|no section"):
            Session(text)
    import _ctypes

    with pytest.raises(ArtifactError, match="not one that qcompiler made"):
        Session(_ctypes.__file__)


def test_another_format_version(built: tuple[Program, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, code = built
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "FORMAT_VERSION", 99)
        path = artifacts.link(code, program.constants, artifacts.program_manifest(program), program.target).save(tmp_path / "new.so")
    with pytest.raises(ArtifactError, match="artifact format 99, this version of qcompiler reads format 1"):
        Session(path)


def test_a_cpu_that_lacks_a_feature(built: tuple[Program, bytes], tmp_path: Path, library: Path) -> None:
    program, code = built
    manifest = artifacts.program_manifest(program)
    path = artifacts.link(code, program.constants, manifest | {"features": ["avx2", "xop"]}, program.target)
    with pytest.raises(IncompatibleDevice, match="needs the CPU features xop, and this CPU lacks them; compile again with --target native"):
        Session(path.save(tmp_path / "new.so"))
    foreign = damaged(library, 18, struct.pack("<H", 183))
    with pytest.raises(IncompatibleDevice, match="compiled for aarch64"):
        Session(foreign)


def test_the_library_is_asked_where_the_kernel_shows_another_machine(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As to a process under emulation: what the library itself finds decides."""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    host.host_features.cache_clear()
    try:
        assert host.host_features() is None
        Session(library)
    finally:
        host.host_features.cache_clear()


def test_places_that_cannot_be_written(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        artifact.save(tmp_path / "absent" / "net.so")
    with pytest.raises(OutputError, match="is a directory"):
        artifact.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_linker(built: tuple[Program, bytes]) -> None:
    program, code = built
    target = dataclasses.replace(program.target, compiler=("no-such-g++",))
    with pytest.raises(TargetError, match="needs one of the compilers no-such-g[+][+] to link"):
        artifacts.link(code, program.constants, {}, target)


def test_threads_must_be_positive(library: Path) -> None:
    with pytest.raises(DataError, match="threads is 0; at least 1 is needed"):
        Session(library, threads=0)


def test_running_a_library_needs_no_compiler() -> None:
    code = "import sys, qcompiler; qcompiler.load; sys.exit('tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parent.parent, check=False).returncode == 0
