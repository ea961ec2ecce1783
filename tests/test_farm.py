"""A farm: boards that Dask's workers hold, real processes on loopback; workers that are killed, and everything that an address may turn out to be."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tuning_boards import model, points
from tools import require_module, require_programs

import qcompiler
from qcompiler.backend.tuning_log import read_log
from qcompiler.base.errors import BoardError, BoardLost
from qcompiler.base.targets import find_target
from qcompiler.boards import farm as farms
from qcompiler.boards import lender
from qcompiler.boards.canary import Canary
from qcompiler.boards.check import Checked
from qcompiler.boards.device import opened
from qcompiler.boards.farm import Farm
from qcompiler.boards.parcel import packed, unpacked
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.pipeline.options import complete
from qcompiler.tuning import boards as tuning_boards
from qcompiler.tuning import fleet as tuning_fleet
from qcompiler.tuning.boards import tune_on_boards
from qcompiler.tuning.fleet import Fleet
from qcompiler.tuning.remote import export_round, import_results, lowered

__all__ = ["model"]
BOARDS = ("one", "two", "three")
TARGET = "arm64-dotprod"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Processes:
    """`qcompiler farm scheduler` and `qcompiler farm worker`, with three emulated boards and this machine."""

    def __init__(self, folder: Path, way: str = "tcp", emulated: Sequence[str] = BOARDS, options: Sequence[str] = ()) -> None:
        self.folder, self.address = folder, f"{way}://127.0.0.1:{free_port()}"
        lines = [f"  {b}: {{target: {TARGET}, core: cortex-a76, emulator: true, folder: {folder}/work}}" for b in emulated]
        self.file = folder / "boards.yaml"
        self.file.write_text("\n".join(["boards:", *lines, f"  here: {{target: native, local: true, folder: {folder}/work, before: 'true'}}", ""]))
        self._running: list[subprocess.Popen[bytes]] = []
        port = self.address.rpartition(":")[2]
        self._begin(["scheduler", "--", "--port", port, "--no-dashboard", *options])
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(0.05)
        self._begin(["worker", "--farm", self.address, "--boards", str(self.file), *(["--", *options] if options else [])])
        self._expected = len(emulated) + 1

    def _begin(self, words: list[str]) -> None:
        log = (self.folder / f"{words[0]}.log").open("wb")
        self._running.append(subprocess.Popen([sys.executable, "-m", "qcompiler", "farm", *words], stdout=log, stderr=log, cwd=self.folder))

    def wait_for(self, farm: Farm) -> None:
        end = time.monotonic() + 120
        while len(farm.names()) < self._expected:
            assert time.monotonic() < end, (self.folder / "worker.log").read_text()[-2000:]
            time.sleep(0.1)

    def workers(self) -> dict[str, int]:
        """{board: the process that serves it}, by what Dask knows."""
        with Farm(self.address) as farm:
            addresses = {name.split("/")[1]: found for name, (found,) in farm.tokens().items()}
            running = farm._client.run(os.getpid)
            return {name: running[address] for name, address in addresses.items()}

    def end(self) -> list[int]:
        for process in reversed(self._running):
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        return [p.returncode for p in self._running]

    def left(self) -> list[str]:
        """What is left of us on the boards."""
        return sorted(os.listdir(self.folder / "work")) if (self.folder / "work").exists() else []


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    require_module("distributed")
    require_programs("a farm of boards", "qemu-aarch64-static", "aarch64-linux-gnu-g++")
    processes = Processes(tmp_path_factory.mktemp("farm"))
    with Farm(processes.address) as farm:
        processes.wait_for(farm)
    yield processes
    processes.end()


@pytest.fixture(scope="module")
def library(digits: Callable[[str], Path]) -> Path:
    return digits("native")


def test_a_board_of_a_farm_does_what_a_board_does(running: Processes, library: Path, tmp_path: Path, capsys: Any) -> None:
    """Everything that takes --board; the farm's table has no address, and nothing is left on the board."""
    farm = ["--farm", running.address]
    x = np.random.default_rng(0).standard_normal((1, 1, 16, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    (name,) = [i.name for i in qcompiler.load(library).inputs]
    assert main(["boards", "here", *farm]) == 0
    assert "local" in (said := capsys.readouterr().out) and "127.0.0.1" not in said
    assert main(["run", str(library), "--input", f"{name}={tmp_path}/x.npy", "--output", str(tmp_path / "o.npz"), "--board", "here", *farm]) == 0
    with np.load(tmp_path / "o.npz") as found:
        for output, values in qcompiler.load(library).run({name: x}).items():
            assert np.array_equal(found[output], values)
    assert main(["bench", str(library), "--seconds", "0.01", "--board", "here", *farm]) == 0
    capsys.readouterr()
    for where in (["--board", "here", *farm], []):
        assert main(["digest", str(library), "--data", str(tmp_path / "x.npy"), *where]) == 0
    there, here = (part for part in capsys.readouterr().out.split("sha256:")[1:])
    assert there == here and running.left() == []


def test_workers_that_are_killed_lose_no_record(running: Processes, model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three boards share a tune while their workers are killed at random: Dask starts them anew, and every record is the one that files by hand bring."""
    monkeypatch.setattr(tuning_fleet, "SECONDS", 0)
    monkeypatch.setattr(tuning_fleet, "SLOW", 1e9)
    programs = lowered(model[0], find_target(TARGET), model[1], complete({"preset": "fast"}))
    monkeypatch.setattr(tuning_boards, "lowered", lambda *arguments: programs)
    begun, over, killed, rng = threading.Event(), threading.Event(), [], random.Random(3)

    def kill() -> None:
        begun.wait(300)
        while not over.wait(rng.uniform(0.1, 0.8)) and len(killed) < 4:
            name = rng.choice(BOARDS[1:])  # one stays, else a round may end without all of its points, and the next one has others
            if process := running.workers().get(name):
                os.kill(process, signal.SIGKILL)
                killed.append(name)

    killer = threading.Thread(target=kill)
    with Farm(running.address) as farm:
        killer.start()
        try:
            state = tune_on_boards(
                model[0],
                farm.boards(BOARDS),
                model[1],
                log=tmp_path / "log",
                trials=9,
                candidates=3,
                threads=1,
                time_limit=300,
                preset="fast",
                watch=lambda state: begun.set(),
            )
        finally:
            over.set()
            begun.set()
            killer.join()
    assert killed and state.wrong == [] and state.trials == 9 and state.stopped == "all 9 trials are done"
    records = read_log(tmp_path / "log")
    assert len(records) == 9 == len(set(points(tmp_path / "log"))) and {r.core for r in records} == {"cortex-a76"}
    made = export_round(programs, tmp_path / "hand", tmp_path / "round", 3, 1, lambda *_: None, None, "cortex-a76")
    subprocess.run([*find_target(TARGET).emulator, "./qc_measure", "results.jsonl", "0"], cwd=made.folder, check=True, capture_output=True)
    import_results(made.folder / "results.jsonl", tmp_path / "hand")
    assert points(tmp_path / "hand") == points(tmp_path / "log")
    text = "".join(p.read_text() for p in (tmp_path / "log").iterdir())
    assert "127.0.0.1" not in text and str(running.folder) not in text


def test_samples_are_shared_out_while_workers_are_killed(running: Processes, digits: Callable[[str], Path], tmp_path: Path, capsys: Any) -> None:
    """verify over all boards of a target, whose workers die now and then: the report of one board, bit for bit."""
    np.save(tmp_path / "x.npy", np.stack([s["image"] for s in demo_data()[1][:30]]))
    words = ["verify", str(digits(TARGET)), "--model", str(MODEL), "--data", str(tmp_path / "x.npy"), "--json", "--quiet", "--layer-samples", "3"]
    processes, over, killed, rng = running.workers(), threading.Event(), [], random.Random(5)

    def kill() -> None:
        for name in rng.sample(BOARDS, 2):
            if not over.wait(rng.uniform(0.5, 1.5)):
                os.kill(processes[name], signal.SIGKILL)
                killed.append(name)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert main([*words, "--farm", running.address, "--any", TARGET]) == 0
    finally:
        over.set()
        killer.join()
    shared = json.loads(capsys.readouterr().out)
    assert main([*words, "--farm", running.address, "--board", "one"]) == 0
    assert json.loads(capsys.readouterr().out) | {"warnings": shared["warnings"]} == shared and shared["samples"] == 30 and killed


def test_a_worker_that_stays_away_is_a_lost_board(running: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(farms, "RETURN", 0.5)
    before = running.left()  # a worker that was killed could remove nothing
    with Farm(running.address) as farm:
        (board,) = farm.boards(["here"])
        gone = board.__class__(**{**vars(board), "address": "qc/gone/native/"})
        with pytest.raises(BoardLost, match="board 'here': its worker is gone"), opened(gone):
            pass
        stop = threading.Event()
        with opened(board, stop) as device:
            threading.Timer(0.5, stop.set).start()
            begin = time.monotonic()
            with pytest.raises(BoardLost, match="the work was stopped"):
                device.run(["sh", "./s.sh"], passing={"s.sh": b"sleep 100"})
            assert time.monotonic() - begin < 60
        monkeypatch.setattr(Fleet, "_sing", lambda self, device: Checked(device.board, seconds=1.0))
        with Fleet([board], Canary(b"", {}, {})) as fleet:
            fleet._give_up(board, BoardLost("board 'here': its worker is gone"))
            with pytest.raises(BoardError, match="no board is left to measure on. here: its worker is gone"):
                fleet.check()
            fleet.recruit()
            fleet.check()
            assert fleet.out == {} and fleet.pauses == ["here: its worker is gone; back again"]
    assert running.left() == before


def test_two_clients_take_turns(running: Processes) -> None:
    """Exchanges of two clients on one board never overlap."""
    script = b"echo begin $1 >> ../../turns; sleep 0.1; echo end $1 >> ../../turns"

    def work(who: str) -> None:
        with Farm(running.address) as farm, opened(*farm.boards(["here"])) as device:
            for _ in range(4):
                assert device.run(["sh", "./s.sh", who], passing={"s.sh": script}).status == 0

    threads = [threading.Thread(target=work, args=[who]) for who in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (running.folder / "turns").read_text().split("\n")[:-1]
    assert len(lines) == 16 and all(a.replace("begin", "end") == b for a, b in zip(lines[::2], lines[1::2], strict=True))


# -- what is refused --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--board", "tree"], "no worker serves a board 'tree'. Did you mean 'three' or 'here'? Boards: here, one, three, two"),
        (["--any", "armv7-neon"], "the farm: no board for armv7-neon; its boards are for "),
        (["--any", TARGET, "--core", "cortex-a55"], "the farm: no board for arm64-dotprod (cortex-a55); its boards are for "),
        ([], "which of its boards?"),
        (["--any", TARGET, "--export-candidates", "d"], "measure by themselves"),
    ],
)
def test_boards_that_a_farm_has_not(running: Processes, tmp_path: Path, words: list[str], message: str, capsys: Any) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    assert main(["tune", str(tmp_path / "m.onnx"), "--calibration", "d.npy", "--log", str(tmp_path / "log"), "--farm", running.address, *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "log").exists()


@contextlib.contextmanager
def banner(text: bytes, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a server that says `text` to whoever comes, and closes the connection where that is nothing."""
    over, kept = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)

        def answer() -> None:
            while not over.is_set():
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    connection = connection if context is None else context.wrap_socket(connection, server_side=True)
                    if text:
                        connection.sendall(text)
                        kept.append(connection)
                    else:
                        connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        over.set()
        thread.join()
    for connection in kept:
        connection.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", "what answers at its address is no scheduler"), (b"", "it closes the connection")],
)
def test_an_address_that_is_no_scheduler(text: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_module("distributed")
    monkeypatch.setattr(farms, "CONNECT", 2.0)
    with banner(text) as address, pytest.raises(BoardError, match=message):
        Farm(f"tcp://{address}")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("host:8786", "expected tls://host:port"),
        ("tcp://host", "expected tls://host:port"),
        ("tcp://127.0.0.1:99999", "expected tls://host:port"),
        ("tcp://127.0.0.1:1", "can't be reached: Connection refused"),
        ("tls://127.0.0.1:1", "TLS needs a certificate"),
    ],
)
def test_addresses_that_mean_nothing(address: str, message: str, tmp_path: Path, capsys: Any) -> None:
    require_module("distributed")
    assert main(["boards", "--farm", address]) == 2
    assert message in capsys.readouterr().err
    (tmp_path / "boards.yaml").write_text("boards:\n  here: {target: native, local: true}\n")
    assert main(["farm", "worker", "--farm", address, "--boards", str(tmp_path / "boards.yaml")]) == 2
    assert message in capsys.readouterr().err


# -- TLS --------------------------------------------------------------------------------------------------------------------------------------


def certificates(folder: Path) -> None:
    """An authority, and certificates of it: good, and expired; and one of another authority."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)

    for name in ("ca", "other"):
        new = ["-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        openssl("req", "-x509", "-subj", f"/CN={name}", *new, "-addext", "basicConstraints=critical,CA:TRUE")
    (folder / "database").write_text("")
    for name, authority, end in (("good", "ca", "20400101000000Z"), ("old", "ca", "20200201000000Z"), ("strange", "other", "20400101000000Z")):
        openssl("req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        lines = ["[ca]", "default_ca=d", "[d]", "database=database", "new_certs_dir=.", "default_md=sha256", "policy=p", "rand_serial=yes", "[p]"]
        (folder / "config").write_text("\n".join([*lines, "commonName=supplied", ""]))
        of = ["-cert", f"{authority}.pem", "-keyfile", f"{authority}.key"]
        openssl("ca", "-batch", "-config", "config", *of, "-startdate", "20200101000000Z", "-enddate", end, "-in", f"{name}.csr", "-out", f"{name}.pem")


def trusted(folder: Path, name: str) -> Any:
    """A context in which Dask's configuration names these certificates."""
    import dask

    files = {"ca-file": "ca.pem", "client.cert": f"{name}.pem", "client.key": f"{name}.key"}
    return dask.config.set({f"distributed.comm.tls.{key}": str(folder / file) for key, file in files.items()})


def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who has a certificate of the authority gets in, and one that has expired is named as that, on either side."""
    require_module("dask")
    require_programs("TLS", "openssl")
    certificates(tmp_path)
    files = ["--tls-ca-file", f"{tmp_path}/ca.pem", "--tls-cert", f"{tmp_path}/good.pem", "--tls-key", f"{tmp_path}/good.key"]
    processes = Processes(tmp_path, "tls", (), files)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "old.pem", tmp_path / "old.key")
    try:
        with banner(b"x", context) as expired, trusted(tmp_path, "good"):
            with Farm(processes.address) as farm:
                processes.wait_for(farm)
                with opened(*farm.boards(["here"])) as device:
                    assert device.run(["sh", "./s.sh"], passing={"s.sh": b"echo here"}).output == "here\n"
            with pytest.raises(BoardError, match="the farm: the scheduler's certificate has expired"):
                Farm(f"tls://{expired}")
        for name, message in (
            ("old", "the farm: our certificate has expired"),
            ("strange", "a certificate is not accepted"),
            ("absent", "a certificate can't be used"),
        ):
            with trusted(tmp_path, name), pytest.raises(BoardError, match=message):
                Farm(processes.address)
        monkeypatch.setattr(farms, "CONNECT", 1.0)
        with pytest.raises(BoardError, match="no answer.*may want tls://"):
            Farm(processes.address.replace("tls", "tcp"))
    finally:
        processes.end()


# -- messages ---------------------------------------------------------------------------------------------------------------------------------


def test_messages_are_plain() -> None:
    head, files = unpacked(packed({"a": [1]}, {"x": b"12", "y": b""}))
    assert (head, files) == ({"a": [1]}, {"x": b"12", "y": b""})
    for damaged in (b"", b"\x05\0\0\0{}", packed({}, {"x": b"1"})[:-1], b"\x02\0\0\0[]", b"\xff\xff\xff\xff"):
        with pytest.raises(ValueError):
            unpacked(damaged)


def test_a_worker_answers_whatever_comes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Errors are answers that name the board alone."""
    (tmp_path / "boards.yaml").write_text("boards:\n  lab: {target: native, ssh: somebody@nowhere.invalid}\n")
    monkeypatch.setenv(lender.FILE, str(tmp_path / "boards.yaml"))
    monkeypatch.setenv(lender.NAME, "lab")
    other = unpacked(lender.serve(packed({"protocol": 99, "session": "s", "what": "open"})))[0]
    assert "another version of qcompiler" in other["error"] and not other["lost"]
    for request in (b"", b"garbage", packed({}), packed({"protocol": lender.PROTOCOL, "session": "s", "what": "open"})):
        said = unpacked(lender.serve(request))[0]["error"]
        assert said.startswith("board 'lab': ") and "nowhere" not in said and str(tmp_path) not in said
    assert b"nowhere" not in lender.described()
    gone = packed({"protocol": lender.PROTOCOL, "session": "s", "what": "run", "staying": [], "passing": [], "wanted": [], "command": ["sh"], "patience": 1})
    assert unpacked(lender.serve(gone))[0] == {"gone": True}
