"""States that a session keeps: a call takes the next frame alone, and gives the same bits as a call that is handed the states."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from recurrent_nets import feeds, network, saved

import qcompiler
from qcompiler.backend.artifact import RUNTIME
from qcompiler.base.errors import DataError, ModelError
from qcompiler.cli.main import main
from qcompiler.importers.model import load
from qcompiler.importers.states import KEY
from qcompiler.pipeline.float_library import compile_float
from qcompiler.pipeline.job import opened
from qcompiler.runtime.library import CHECKSUM_MAGIC, checksum
from qcompiler.runtime.session import Session

STATE = {"h": "h_out", "c": "c_out"}
FRAMES = 5
CPP = Path(__file__).parent / "cpp"


def compiled(source: Path, program: Path) -> Path:
    subprocess.run(["g++", "-std=c++17", "-Wall", "-Werror", f"-I{RUNTIME / 'include'}", str(source), "-o", str(program), "-ldl"], check=True)
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx, an LSTM that takes one step; model.so, which keeps its states; x.npy."""
    made = tmp_path_factory.mktemp("state")
    model = network("LSTM", steps=1, batch=1, states=True)
    path = saved(model, made)
    qcompiler.compile(path, calibration=[feeds(model, s) for s in range(40)], state=STATE).save(made / "model.so")
    np.save(made / "x.npy", feeds(model, 99)["x"])
    return made


@pytest.fixture
def session(folder: Path) -> Session:
    return qcompiler.load(folder / "model.so")


def handed(session: Session, frames: list[np.ndarray]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """y of each frame, and the last states, of calls that hand the states on."""
    states, results = {i.name: np.zeros(i.shape, i.dtype) for i in session.inputs if i.name in STATE}, []
    for x in frames:
        outputs = session.run({"x": x, **states})
        states = {name: outputs[output] for name, output in STATE.items()}
        results.append(outputs["y"])
    return results, states


def frames(count: int = FRAMES) -> list[np.ndarray]:
    return [np.random.default_rng(s).standard_normal((1, 1, 6)).astype(np.float32) for s in range(count)]


def test_a_stream(session: Session) -> None:
    wanted, _ = handed(session, frames())  # which changes nothing in the session
    for _ in range(2):
        got = [session.run({"x": x}) for x in frames()]
        assert [list(g) for g in got] == [["y"]] * FRAMES
        np.testing.assert_array_equal([g["y"] for g in got], wanted)
        assert not np.array_equal(session.run({"x": frames()[0]})["y"], wanted[0])
        session.reset()
    seen: list[str] = []
    traced = [session.trace({"x": x}, lambda name, array: seen.append(name)) for x in frames()]
    np.testing.assert_array_equal([t["y"] for t in traced], wanted)
    assert {"h", "c", "x"} <= set(seen)


def test_states_are_given_together(session: Session) -> None:
    with pytest.raises(DataError, match="'h' is given, 'c' not"):
        session.run({"x": frames()[0], "h": np.zeros((1, 1, 5), np.float32)})
    with pytest.raises(DataError, match="input 'x' is no array"):
        session.run({"x": [[1], [1, 2]]})
    with pytest.raises(DataError, match="input 'x' is missing"):
        session.run({})


def test_from_cpp(folder: Path, session: Session, tmp_path: Path) -> None:
    """The program says what it sees; qc_run needs no states."""
    program = compiled(CPP / "state.cc", tmp_path / "state")
    lines = subprocess.run([program, folder / "model.so"], capture_output=True, text=True, check=True).stdout.splitlines()
    wanted, _ = handed(session, [np.array([1, -2, 3, -4, 5, -6], np.float32).reshape(1, 1, 6)] * 2)
    for line, y in zip(lines, [*wanted, *wanted], strict=False):
        np.testing.assert_array_equal([float.fromhex(v) for v in line.split()], y.reshape(-1))
    assert lines[4:7] == ["x 0", "h 1", "c 1"]
    assert "'h' is a state that the session keeps" in lines[7] and "'c_out' is a state that the session keeps" in lines[8]
    runner = compiled(RUNTIME / "qc_run.cc", tmp_path / "qc_run")
    subprocess.run([runner, folder / "model.so", "--input", f"x={folder / 'x.npy'}", "--output", tmp_path / "out"], check=True)
    session.reset()
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "y.npy"), session.run({"x": np.load(folder / "x.npy")})["y"])


def test_cpp_takes_libraries_without_later_functions(folder: Path, tmp_path: Path) -> None:
    data = (folder / "model.so").read_bytes()[:-24]
    for name in (b"qc_session_reset", b"qc_input_state", b"qc_selftest", b"qc_session_fit", b"qc_session_input_info", b"qc_session_write", b"qc_session_read"):
        assert data.count(b"\0" + name + b"\0") >= 1
        data = data.replace(b"\0" + name + b"\0", b"\0" + b"x" * len(name) + b"\0")  # in the table of names
    (tmp_path / "old.so").write_bytes(data + CHECKSUM_MAGIC + checksum(data))
    lines = subprocess.run(
        [compiled(CPP / "state.cc", tmp_path / "state"), tmp_path / "old.so"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines[4:7] == ["x 0", "h 0", "c 0"] and len(lines[0].split()) == 3


BAD = [
    ({"g": "h_out"}, r"state 'g=h_out': there is no input 'g'"),
    ({"h": "hout"}, r"state 'h=hout': there is no output 'hout'.*'h_out'"),
    ({"h": "y"}, r"the input is float32 \[1, 1, 5\] and the output float32 \[1, 1, 3\]"),
    ({"h": "c_out", "c": "c_out"}, "output 'c_out' is given as the state of two inputs"),
]


@pytest.mark.parametrize(("state", "message"), BAD)
def test_states_that_do_not_fit(state: dict[str, str], message: str, folder: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load(folder / "model.onnx", state=state)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("{", "its metadata 'qcompiler.states' is damaged"),
        ('["x"]', "is damaged"),
        ('{"x": {"output": "y"}}', "is damaged"),
        ('{"x": {"output": "y", "initial": [[1], [2, 3]]}}', "is damaged"),
        ('{"x": {"output": "z", "initial": 0}}', "there is no output 'z'"),
        ('{"x": {"output": "y", "initial": [1, 2, 3]}}', r"has shape \[2\], and its first value \[3\]"),
        ('{"x": {"output": "y", "initial": 300}}', "state 'x' holds int8, and its first value does not"),
    ],
)
def test_states_that_a_model_declares_wrongly(declared: str, message: str) -> None:
    ports = [[helper.make_tensor_value_info(n, TensorProto.INT8, [2])] for n in ("x", "y")]
    model = helper.make_model(helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", *ports), opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    model.metadata_props.add(key=KEY, value=declared)
    with pytest.raises(ModelError, match=message):
        load(model)


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", **{n: np.stack([feeds(network("LSTM", steps=1, batch=1, states=True), s)[n] for s in range(8)]) for n in ("x", "h", "c")})
    command = ["compile", str(folder / "model.onnx"), "--calibration", str(tmp_path / "data.npz"), "--output", str(tmp_path / "m.so"), "--state"]
    assert main([*command, "h=h_out", "--input-type", "h=int8"]) == 2
    assert "input 'h' is a state, which stays inside of sessions" in capsys.readouterr().err
    assert main([*command, "h=nothing"]) == 2 and not (tmp_path / "m.so").exists()
    assert main([*command, "h=h_out", "--state", "c=c_out"]) == 0
    capsys.readouterr()
    assert main(["run", str(tmp_path / "m.so"), "--input", f"x={folder / 'x.npy'}", "--output", str(tmp_path / "y.npz")]) == 0
    assert np.load(tmp_path / "y.npz").files == ["y"]


def test_frames_are_calibrated_as_a_stream(folder: Path, tmp_path: Path) -> None:
    """Data without states: each frame meets the states that the float network has there, from zeros on; each file of a folder is a stream."""
    x = np.random.default_rng(0).standard_normal((12, 1, 1, 6)).astype(np.float32)
    (tmp_path / "x").mkdir()
    for place, part in enumerate((x[:7], x[7:])):
        np.savez(tmp_path / "x" / f"{place}.npz", x=part)
    job = opened(folder / "model.onnx", "x86-avx2", tmp_path / "x", {"state": STATE})
    session, wanted = compile_float(folder / "model.onnx"), []
    float_session = Session(session.save(tmp_path / "float.so"))
    for place, frame in enumerate(x):
        if place in (0, 7):
            states = {i.name: np.zeros(i.shape, i.dtype) for i in float_session.inputs if i.name in STATE}
        wanted.append({"x": frame, **states})
        results = float_session.run(wanted[-1])
        states = {name: results[output] for name, output in STATE.items()}
    assert job.samples.count == 12
    for _ in range(2):
        for got, expected in zip(job.samples, wanted, strict=True):
            assert all(np.array_equal(got[name], expected[name]) for name in got) and set(got) == set(expected)
    artifact = qcompiler.compile(folder / "model.onnx", "x86-avx2", ({"x": frame} for frame in x), state=STATE, max_samples=10, preset="fast")
    assert artifact.manifest["calibration_samples"] == 10
    report = qcompiler.verify(artifact, folder / "model.onnx", [{"x": frame} for frame in x], min_sqnr=15)
    assert report.passed and report.samples == 12, str(report)
    with pytest.raises(DataError, match="missing input 'c'"):
        list(opened(folder / "model.onnx", "x86-avx2", [{"x": x[0], "h": wanted[0]["h"]}], {"state": STATE}).samples)


# -- pools, and verbs that take data ----------------------------------------------------------------------------------------------------------


def test_a_pool_keeps_no_states(folder: Path, session: Session, tmp_path: Path) -> None:
    """A request gives them all, and gets the next ones, in Python, C++ and C: requests of several streams don't mix."""
    with qcompiler.SessionPool(folder / "model.so", streams=2) as pool:
        with pytest.raises(DataError, match="a pool keeps no states.*give 'c', 'h' with each request.*or use a Session for each stream"):
            pool.submit({"x": frames()[0]})
        wanted, last = handed(session, frames())
        states = {i.name: np.zeros(i.shape, i.dtype) for i in session.inputs if i.name in STATE}
        for x, y in zip(frames(), wanted, strict=True):
            outputs = pool.submit({"x": x, **states}).result()
            states = {name: outputs[output] for name, output in STATE.items()}
            np.testing.assert_array_equal(outputs["y"], y)
        assert all(np.array_equal(states[name], last[name]) for name in last)
    flags = ["-std=c++17", "-Wall", "-Werror", "-fsanitize=address", f"-I{RUNTIME / 'include'}"]
    subprocess.run(["g++", *flags, str(CPP / "state_pool.cc"), "-o", str(tmp_path / "state_pool"), "-lpthread", "-ldl"], check=True)
    lines = subprocess.run([tmp_path / "state_pool", folder / "model.so"], capture_output=True, text=True, check=True).stdout.splitlines()
    inputs = [np.array(x, np.float32).reshape(1, 1, 6) for x in ((1, -2, 3, -4, 5, -6), (6, 5, -4, -3, 2, 1))]
    streams = [handed(session, [x] * 3)[0] for x in inputs]
    for request, line in enumerate(lines):
        np.testing.assert_array_equal([float.fromhex(v) for v in line.split()], streams[request % 2][request // 2].reshape(-1))
    assert len(lines) == 6


def test_sessions_on_one_library_are_streams_of_their_own(folder: Path) -> None:
    first, second = qcompiler.load(folder / "model.so"), qcompiler.load(folder / "model.so")
    wanted = [first.run({"x": x})["y"] for x in frames()]
    np.testing.assert_array_equal([second.run({"x": x})["y"] for x in frames()], wanted)


def test_verbs_take_frames(folder: Path, session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data without states are frames: bench, digest and the page of verify stream them; data with the library's own states are the same digest."""
    library = str(folder / "model.so")
    x, states = np.concatenate(frames())[:, None], {i.name: np.zeros(i.shape, i.dtype) for i in session.inputs if i.name in STATE}
    np.savez(tmp_path / "frames.npz", x=x)
    whole: dict[str, list[np.ndarray]] = {name: [] for name in ("x", *STATE)}
    for frame in frames():
        outputs = session.run({"x": frame, **states})
        for name, array in {"x": frame, **states}.items():
            whole[name].append(array)
        states = {name: outputs[output] for name, output in STATE.items()}
    np.savez(tmp_path / "whole.npz", **{name: np.stack(arrays) for name, arrays in whole.items()})
    said = []
    for data in ("frames.npz", "whole.npz"):
        assert main(["digest", library, "--data", str(tmp_path / data)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and f"{FRAMES} samples" in said[0]
    assert main(["bench", library, "--data", str(tmp_path / "frames.npz"), "--seconds", "0.05"]) == 0
    page = tmp_path / "page.html"
    command = ["verify", library, "--model", str(folder / "model.onnx"), "--data", str(tmp_path / "frames.npz"), "--report", str(page), "--min-sqnr", "5"]
    assert main(command) == 0 and page.stat().st_size > 10_000
