"""Boards: how they are described, reached and checked, and what becomes of those that are away, full, hanging, lying, or not what they were."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from board_server import TARGET, Server, served, server
from onnx import TensorProto, helper, numpy_helper
from test_shapes import BATCHES, batch, pictures

import qcompiler
from qcompiler.base.errors import BoardError, BoardLost, DataError
from qcompiler.boards.board import Board, load_boards
from qcompiler.boards.device import opened
from qcompiler.boards.session import BoardSession
from qcompiler.boards.transports import piped
from qcompiler.cli.main import main

__all__ = ["served", "server"]

# -- boards.yaml --------------------------------------------------------------------------------------------------------------------------------


def load(tmp_path: Path, text: str) -> dict[str, Board]:
    (tmp_path / "boards.yaml").write_text(text)
    return load_boards(tmp_path / "boards.yaml")


def test_a_board_is_described(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        "boards:\n  pi: {target: arm64-neon, core: cortex-a72, ssh: pi@host, cores: [2, 3, 2], before: a b, after: [c, d], hottest: 75, patience: 5}\n"
        "  phone: {target: arm64-dotprod, adb: 12345}\n",
    )
    pi, phone = found["pi"], found["phone"]
    assert (pi.way, pi.address, pi.core, pi.cores, pi.folder) == ("ssh", "pi@host", "cortex-a72", (2, 3), "/tmp")
    assert (pi.before, pi.after, pi.hottest, pi.patience) == (("a b",), ("c", "d"), 75.0, 5.0)
    assert (phone.way, phone.address, phone.folder, phone.core) == ("adb", "12345", "/data/local/tmp", "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{target: native, ssh: h, colour: red}", "unknown key 'colour'"),
        ("{target: native, local: true, foldr: /tmp}", "Did you mean 'folder'"),
        ("{target: native}", "exactly one of ssh, adb, local, emulator .* found none"),
        ("{target: native, ssh: h, local: true}", "found ssh, local"),
        ("{ssh: h}", "'target' is missing"),
        ("{target: arm64-neno, ssh: h}", "arm64-neno"),
        ("{target: native, local: 3}", "'local' is 3; expected true"),
        ("{target: native, emulator: true}", "has no emulator"),
        ("{target: native, ssh: -oProxyCommand=x}", "expected user@host"),
        ("{target: native, ssh: a b}", "expected user@host"),
        ("{target: native, ssh: true}", "expected user@host"),
        ("{target: native, ssh: h, core: 'Cortex A72'}", "expected a name such as cortex-a72"),
        ("{target: native, ssh: h, cores: 2}", "'cores' is 2"),
        ("{target: native, ssh: h, cores: [-1]}", "'cores' is"),
        ("{target: native, ssh: h, folder: tmp}", "a path that begins with /"),
        ("{target: native, ssh: h, before: [3]}", "'before' is a command"),
        ("{target: native, ssh: h, patience: 0}", "'patience' is 0; expected a positive number"),
        ("{target: native, ssh: h, hottest: true}", "'hottest' is True"),
        ("7", "expected a mapping"),
    ],
)
def test_a_board_that_is_described_badly(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(BoardError, match=message):
        load(tmp_path, f"boards:\n  pi: {row}\n")


@pytest.mark.parametrize(
    "text", ["", "boards: {}", "[]", "boards: [a]", "board: {}", "boards: {a: {}}\nmore: 1", "boards: {'a b': {target: native, local: true}}", "a: *b"]
)
def test_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(BoardError, match=r"boards\.yaml"):
        load(tmp_path, text)


def test_a_file_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["boards", "--boards", str(tmp_path / "none.yaml")]) == 2
    assert "name one with --boards FILE" in capsys.readouterr().err


# -- reaching them ------------------------------------------------------------------------------------------------------------------------------


def test_boards_are_checked(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Every board at once; each that is not fit says why, and the others are as they are. No address is printed, nothing is left there."""
    server.mode("two", "full")
    server.mode("three", "other")
    names = ["one", "two", "three", "changed", "unknown", "stranger", "away", "phone", "lost", "here"]
    assert main(["boards", "--boards", str(server.file), "--json", *names]) == 2
    printed = capsys.readouterr().out
    found = {c["name"]: c for c in json.loads(printed)["boards"]}
    fit = [name for name in names if not found[name]["trouble"]]
    assert fit == ["one", "phone", "here"], {n: c["trouble"] for n, c in found.items()}
    assert len({found[name]["digest"] for name in fit}) == 1 and all(found[name]["seconds"] > 0 for name in fit)
    assert found["one"]["machine"] == "aarch64" and found["one"]["free"] > 0 and found["one"]["core"] == "cortex-a76"
    troubles = {"two": "no space left", "three": "is riscv64", "changed": "host key has changed", "unknown": "host key is not known"}
    troubles |= {"stranger": "permission denied", "away": "can't be reached", "lost": "adb doesn't see it"}
    for name, trouble in troubles.items():
        assert trouble in found[name]["trouble"], found[name]["trouble"]
    assert "127.0.0.1" not in printed and str(server.port) not in printed
    assert server.left() == []
    server.mode("one", "wrong")
    (server.folder / "locked").touch()
    assert main(["boards", "--boards", str(server.file), "one", "phone"]) == 2
    printed = capsys.readouterr().out
    assert "one: computes wrongly: the canary's results" in printed and "phone: it has not allowed this computer" in printed


# -- working on them ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one.onnx (residual, images with a halo, a softmax in float), data.npy, x.npy, one.so for the boards and here.so for this machine."""
    folder, rng = tmp_path_factory.mktemp("network"), np.random.default_rng(0)
    weights = {"w": rng.standard_normal((16, 8, 3, 3)) / 8, "v": rng.standard_normal((16, 16, 3, 3)) / 12, "f": rng.standard_normal((16, 5)) / 4}
    nodes = [
        helper.make_node("Conv", ["in/put", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["d"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["d", "r"], ["s"]),
        helper.make_node("GlobalAveragePool", ["s"], ["g"]),
        helper.make_node("Flatten", ["g"], ["h"]),
        helper.make_node("MatMul", ["h", "f"], ["z"]),
        helper.make_node("Softmax", ["z"], ["p"]),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in (("in/put", [1, 8, 12, 12]), ("z", [1, 5]), ("p", [1, 5]))]
    initializers = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "one", ports[:1], ports[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), folder / "one.onnx")
    np.save(folder / "data.npy", rng.standard_normal((6, 8, 12, 12)).astype(np.float32))
    np.save(folder / "x.npy", rng.standard_normal((1, 8, 12, 12)).astype(np.float32))
    for name, target in (("one", TARGET), ("here", "native")):
        qcompiler.compile(folder / "one.onnx", target, folder / "data.npy", preset="fast").save(folder / f"{name}.so")
    return folder


def test_a_board_computes_what_this_machine_does(server: Server, network: Path) -> None:
    """Every integer of every layer, and the outputs that come from them; floats behind a softmax nearly."""
    sample, here = {"in/put": np.load(network / "x.npy")}, qcompiler.load(network / "here.so")
    expected: dict[str, np.ndarray] = {}
    outputs = here.trace(sample, lambda name, array: expected.__setitem__(name, array.copy()))
    with opened(load_boards(server.file)["one"]) as device:
        board = BoardSession(device, network / "one.so")
        found: dict[str, np.ndarray] = {}
        traced = board.trace(sample, lambda name, array: found.__setitem__(name, array.copy()))
        ran = board.run(sample)
        assert [t for *_, t in board.profile(2)] and board.bench(2).minimum > 0
    integers = [n for n, a in expected.items() if a.dtype == np.int8]
    assert len(integers) >= 4 and set(expected) == set(found)
    for name in integers:
        assert np.array_equal(expected[name], found[name]), name
    for result in (traced, ran):
        assert np.array_equal(result["z"], outputs["z"]) and np.allclose(result["p"], outputs["p"], atol=1e-6)
    assert server.left() == []


def test_the_same_commands_on_a_board(server: Server, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--boards", str(server.file), "--board", "phone"]
    model, library = str(network / "one.onnx"), str(network / "here.so")
    assert main(["verify", library, "--model", model, "--data", str(network / "data.npy"), "--json", *place]) == 0
    there = json.loads(capsys.readouterr().out)
    assert main(["verify", library, "--model", model, "--data", str(network / "data.npy"), "--json"]) == 0
    assert there == json.loads(capsys.readouterr().out) and len(there["layers"]) > 4
    assert main(["run", library, "--input", f"in/put={network / 'x.npy'}", "--output", str(tmp_path / "o.npz"), *place]) == 0
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(["verify", library, "--model", model, "--data", str(network / "data.npy"), "--report", str(page), "--quiet", *place]) == 0
    assert "board phone: " in (said := page.read_text()) and "Memory and energy" not in said and server.folder.name not in said.replace(str(tmp_path), "")
    assert np.array_equal(np.load(tmp_path / "o.npz")["z"], qcompiler.load(library).run({"in/put": np.load(network / "x.npy")})["z"])
    assert main(["bench", library, "--model", model, "--layers", "--seconds", "0.2", "--json", *place]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert set(measured["seconds"]) == {"int8", "float"} and measured["ratio to float"]["float"] == 1 and len(measured["steps"]) > 4
    for words, message in (
        (["run", str(network / "one.so"), "--input", "x=y", "--output", "o.npz", *place], "board 'phone' is x86_64"),
        (["bench", str(network / "one.so"), *place], "compiled for aarch64 .* board 'phone' is x86_64"),
        (["bench", library, "--footprint", *place], "--footprint measures on this machine"),
        (["bench", library, "--boards", str(server.file), "--board", "phon"], "no board 'phon'. Did you mean 'phone'"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
    assert server.left() == []


def test_a_library_for_several_shapes_on_a_board(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every compiled shape, one that is padded and cut, every layer of each; and the commands."""
    model, data = pictures(tmp_path / "p.onnx"), [batch(1, seed) for seed in range(3)]
    for name, target in (("board", TARGET), ("here", "native")):
        made = qcompiler.compile(model, target, data, preset="fast", input_shapes={"image": [(n, 3, 12, 12) for n in BATCHES]}, pad={"image": "repeat"})
        made.save(tmp_path / f"{name}.so")
    here = qcompiler.load(tmp_path / "here.so")
    with opened(load_boards(server.file)["one"]) as device:
        board = BoardSession(device, tmp_path / "board.so")
        for count in (*BATCHES, 2):
            expected: dict[str, np.ndarray] = {}
            found: dict[str, np.ndarray] = {}
            outputs = here.trace(batch(count, 9), lambda name, array, kept=expected: kept.__setitem__(name, array.copy()))
            traced = board.trace(batch(count, 9), lambda name, array, kept=found: kept.__setitem__(name, array.copy()))
            for results in (traced, board.run(batch(count, 9))):
                assert all(np.array_equal(results[name], array) and array.shape == (count, 5) for name, array in outputs.items())
            assert expected.keys() == found.keys() and all(np.array_equal(found[name], array) for name, array in expected.items())
        with pytest.raises(DataError, match="is no shape that this library was compiled for"):
            board.run({"image": np.zeros((9, 3, 12, 12), np.float32)})
        last = board.specializations[-1]
        assert last.inputs[0].shape[0] == BATCHES[-1] and len(last.profile(1)) == len(last.manifest["steps"])
    np.savez(tmp_path / "data.npz", image=np.concatenate([batch(1, seed)["image"] for seed in range(4)]))
    place, library = ["--boards", str(server.file), "--board", "phone"], str(tmp_path / "here.so")
    reports = []
    for where in (place, []):
        assert main(["verify", library, "--model", str(model), "--data", str(tmp_path / "data.npz"), "--json", *where]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1] and len(reports[0]["layers"]) > 3
    for words, count in ((["--model", str(model)], len(BATCHES)), (["--input-shape", "image=3,3,12,12", "--layers"], 1)):
        assert main(["bench", library, "--seconds", "0.02", "--json", *words, *place]) == 0
        measured = json.loads(capsys.readouterr().out)
        found_shapes = measured["shapes"] if count > 1 else [measured]
        assert len(found_shapes) == count and all(m["shape"].startswith("image [") and m["seconds"]["int8"]["minimum"] > 0 for m in found_shapes)
    assert server.left() == []


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("hang", "no answer within 3 s"),
        ("die", "the connection was lost|status 255|cut short"),
        ("garbage", "cut short|no folder"),
        ("full", "no space left"),
        ("endless", "more than|no answer"),
    ],
)
def test_a_board_that_fails_in_the_middle(server: Server, network: Path, mode: str, message: str) -> None:
    board = load_boards(server.file)["two"]
    with opened(board) as device:
        session = BoardSession(device, network / "one.so")
        server.mode("two", mode)
        object.__setattr__(board, "patience", 3.0)
        with pytest.raises(BoardError, match=message) as raised:
            session.run({"in/put": np.load(network / "x.npy")})
        assert isinstance(raised.value, BoardLost) == (mode != "full")
        server.mode("two", "")
        object.__setattr__(board, "patience", 60.0)
        assert session.run({"in/put": np.load(network / "x.npy")})["z"].shape == (1, 5)  # and goes on when it is well again
    assert server.left() == []


def test_waiting_ends_when_it_is_told_to() -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(BoardLost, match="the work was stopped"):
        piped(["sleep", "100"], b"", 100, stop, "b")
    with pytest.raises(BoardLost, match="more than 1 MB"):
        piped(["cat", "/dev/zero"], b"", 100, threading.Event(), "b", most=1 << 20)


def test_a_farm_without_one_of_its_boards_measures_nothing_here(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["bench", "m.so"], ["digest", "m.so", "--data", "x.npz"], ["verify", "m.so", "--model", "m.onnx", "--data", "x.npz"]):
        assert main([*words, "--farm", "tcp://127.0.0.1:1"]) == 2
        assert "--farm: which of its boards? Name one with --board" in capsys.readouterr().err
