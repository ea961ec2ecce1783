"""Test vectors inside libraries, and digests of what they compute: the same on every target, and a changed bit shows."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tools import require_programs, require_target

import qcompiler
from qcompiler.backend.artifact import RUNTIME, _with_checksum
from qcompiler.backend.programs import build_runner
from qcompiler.base.errors import ArtifactError, DataError, DeviceFailure, PlanError
from qcompiler.base.targets import find_target
from qcompiler.boards.board import Board
from qcompiler.boards.device import opened
from qcompiler.boards.session import BoardSession
from qcompiler.cli.main import main
from qcompiler.runtime.elf import read_section
from qcompiler.runtime.library import read_manifest
from qcompiler.runtime.selftest import digest, recipe_inputs

VECTORS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One network for this machine (here.so) and for two emulated targets, with test vectors: its output `z` is exact, `p`, behind a softmax, is not; and
    soft.so, which has `p` alone."""
    made, rng = tmp_path_factory.mktemp("selftest"), np.random.default_rng(0)
    weights = {"w": rng.standard_normal((16, 8, 3, 3)) / 8, "v": rng.standard_normal((16, 16, 3, 3)) / 12, "f": rng.standard_normal((16, 5)) / 4}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["d"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["d"], ["g"]),
        helper.make_node("Flatten", ["g"], ["h"]),
        helper.make_node("MatMul", ["h", "f"], ["z"]),
        helper.make_node("Softmax", ["z"], ["p"]),
    ]
    ports = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in (("x", [1, 8, 12, 12]), ("z", [1, 5]), ("p", [1, 5]))}
    initializers = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()]
    for name, outputs in (("both", ["z", "p"]), ("soft", ["p"])):
        graph = helper.make_graph(nodes, "one", [ports["x"]], [ports[o] for o in outputs], initializers)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), made / f"{name}.onnx")
    np.save(made / "data.npy", rng.standard_normal((4, 8, 12, 12)).astype(np.float32))
    for name, model, target in (("here", "both", "native"), ("soft", "soft", "native"), ("arm", "both", "arm64-neon"), ("arm32", "both", "armv7-neon")):
        if target != "native":
            try:
                require_target(find_target(target))
            except pytest.skip.Exception:
                continue
        qcompiler.compile(made / f"{model}.onnx", target, made / "data.npy", preset="fast", selftest=VECTORS).save(made / f"{name}.so")
    return made


@pytest.mark.parametrize("name", ["here", "soft"])
def test_a_library_tests_itself(folder: Path, name: str) -> None:
    library = folder / f"{name}.so"
    test = read_manifest(library)["selftest"]
    assert test["vectors"] == VECTORS and [p["value"] for p in test["probes"]] == ["z"]
    qcompiler.load(library).selftest()


@pytest.mark.parametrize(("name", "target"), [("arm", "arm64-neon"), ("arm32", "armv7-neon")])
def test_other_machines_test_themselves_by_the_same_sums(folder: Path, name: str, target: str) -> None:
    require_target(find_target(target))
    theirs, ours = (read_manifest(folder / f"{n}.so")["selftest"]["probes"] for n in (name, "here"))
    assert [p["sums"] for p in theirs] == [p["sums"] for p in ours]
    samples = [{"x": x[None]} for x in np.load(folder / "data.npy")]
    with opened(Board("b", find_target(target), "emulator")) as device:
        board = BoardSession(device, folder / f"{name}.so")
        board.selftest()
        assert digest(board, samples) == digest(qcompiler.load(folder / "here.so"), samples)


def damaged(library: Path, output: Path) -> Path:
    """One bit of the constants changed, and the file's own checksum mended: what a faulty memory makes of it."""
    data = bytearray(library.read_bytes()[:-24])
    constants = read_section(library, ".qc.constants")[0]
    at = data.index(constants)
    values = np.frombuffer(constants, np.int8)
    changed = int(np.argmax(np.abs(values.astype(int)) > 40))  # a weight, or a byte of a bias: each counts
    data[at + changed] ^= 0x40
    output.write_bytes(_with_checksum(bytes(data)))
    return output


def test_one_wrong_bit_is_found(folder: Path, tmp_path: Path) -> None:
    bad = damaged(folder / "here.so", tmp_path / "bad.so")
    with pytest.raises(DeviceFailure, match="value 'z' of test vector 0 is wrong: this machine computes wrongly, or the library is damaged"):
        qcompiler.load(bad).selftest()
    samples = [{"x": x[None]} for x in np.load(folder / "data.npy")]
    assert digest(qcompiler.load(bad), samples)[0] != digest(qcompiler.load(folder / "here.so"), samples)[0]
    report = qcompiler.verify(bad, folder / "both.onnx", samples)
    assert not report.passed and any("test vector" in f for f in report.failures)
    require_programs("qc_run", "g++")
    build_runner(tmp_path / "qc_run", find_target("native"))
    for library, status in ((bad, 1), (folder / "here.so", 0)):
        done = subprocess.run([str(tmp_path / "qc_run"), str(library), "--selftest"], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert ("passed" in done.stdout) == (status == 0) and ("test vector" in done.stderr) == (status == 1)


def test_digests_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, library = str(folder / "data.npy"), str(folder / "here.so")
    assert main(["digest", library, "--data", data]) == 0
    said = capsys.readouterr().out
    assert "of z, 4 samples" in said and "not of p: computed in float" in said
    found = said.splitlines()[0]
    verify = ["verify", library, "--model", str(folder / "both.onnx"), "--data", data, "--expect-digest"]
    assert main([*verify, found]) == 0
    capsys.readouterr()
    assert main([*verify, "0" * 64]) == 1
    assert "some result has other bits" in capsys.readouterr().out
    assert main([*verify, "abc"]) == 2
    assert "'abc' is no digest" in capsys.readouterr().err
    assert main(["digest", str(folder / "soft.so"), "--data", data, "--samples", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["values"] == ["z"] and document["left_out"] == ["p"] and document["samples"] == 2


@pytest.mark.parametrize("count", [0, -1, 65])
def test_a_number_of_vectors_that_is_none(folder: Path, count: int) -> None:
    with pytest.raises(DataError, match="1 to 64 test vectors"):
        qcompiler.compile(folder / "both.onnx", "native", folder / "data.npy", preset="fast", selftest=count)


def test_what_has_no_exact_value_has_no_self_test(folder: Path, tmp_path: Path) -> None:
    kept = {"keep_float": ["c", "d", "g", "z"], "preset": "fast"}
    with pytest.raises(PlanError, match="a self-test is not possible"):
        qcompiler.compile(folder / "both.onnx", "native", folder / "data.npy", selftest=1, **kept)  # type: ignore[arg-type]
    plain = qcompiler.compile(folder / "both.onnx", "native", folder / "data.npy", **kept).save(tmp_path / "plain.so")  # type: ignore[arg-type]
    session = qcompiler.load(plain)
    with pytest.raises(ArtifactError, match="has no test vectors"):
        session.selftest()
    with pytest.raises(ArtifactError, match="has no digest"):
        digest(session, [{"x": np.zeros((1, 8, 12, 12), np.float32)}])


DTYPES = ["float32", "int8", "uint8", "int32", "int64", "bool", "float64", "int16", "float16", "uint16", "uint32", "uint64"]  # qc_dtype, in order


@pytest.mark.parametrize("vector", [0, 1])
def test_both_recipes_make_the_same_inputs(vector: int, tmp_path: Path) -> None:
    """Of every type, with and without a scale behind the port: the C half compiled alone."""
    require_programs("the recipe in C", "g++")
    count = 4096
    ports: list[dict[str, Any]] = [{"name": d, "shape": [count], "dtype": d} for d in DTYPES]
    ports.append({"name": "scaled", "shape": [count], "dtype": "float32", "scale": float(np.float32(0.0173)), "zero_point": -5})
    rows = [
        f'{{"", (qc_dtype){DTYPES.index(p["dtype"])}, 1, {{{count}}}, {count * np.dtype(p["dtype"]).itemsize}u, '
        f"{p.get('scale', 0.0)!r}f, {p.get('zero_point', 0)}}}"
        for p in ports
    ]
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "qc_selftest.c"\n'
        f"static const qc_tensor_info rows[] = {{{', '.join(rows)}}};\n"
        "int main(void) {\n  static unsigned char memory[8 * 4096];\n"
        f"  for (int i = 0; i < {len(ports)}; ++i) {{\n    fill(memory, &rows[i], (uint64_t)({vector} * STREAMS + i), {vector % 2});\n"
        "    fwrite(memory, 1, rows[i].bytes, stdout);\n  }\n"
        "  return 0;\n}\n"
    )
    command = [
        "g++",
        "-x",
        "c",
        "-std=gnu11",
        "-O2",
        "-w",
        "-ffunction-sections",
        "-Wl,--gc-sections",
        f"-I{RUNTIME}",
        f"-I{RUNTIME / 'include'}",
    ]
    subprocess.run([*command, str(tmp_path / "main.c"), "-o", str(tmp_path / "recipe")], check=True)
    raw = subprocess.run([str(tmp_path / "recipe")], check=True, capture_output=True).stdout
    at = 0
    for port, wanted in zip(ports, recipe_inputs({"inputs": ports}, vector).values(), strict=True):
        found = np.frombuffer(raw[at : at + wanted.nbytes], wanted.dtype)
        assert found.tobytes() == wanted.tobytes(), port["name"]
        at += wanted.nbytes
    assert at == len(raw)
