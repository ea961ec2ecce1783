"""A farm: boards that Dask's workers hold, on whichever hosts, behind one scheduler. To whoever uses them they are boards like others.

client --task that takes the board's token--> scheduler --> the worker of that board (`lender.py`) --ssh, adb, ...--> board

Dask queues, watches its workers, starts those anew that die, and gives their tasks to them again. Tasks and their results are bytes (`parcel.py`), and
this side of Dask is told to unpickle nothing.
"""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import ssl
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from qcompiler.base.errors import BoardError, BoardLost, TargetError, closest
from qcompiler.base.targets import find_target
from qcompiler.boards import lender
from qcompiler.boards.board import Board
from qcompiler.boards.device import Device
from qcompiler.boards.parcel import packed, unpacked
from qcompiler.boards.transports import Answer

CONNECT = 20.0  # seconds for a connection
RETURN = 30.0  # seconds that a worker may be away: Dask starts one anew that died
_TOKEN = re.compile(r"qc/([\w.-]+)/([\w.-]+)/([a-z0-9.+-]*)", re.ASCII)


class Farm:
    """A connection to a farm's scheduler. address: tcp://host:port or tls://host:port; certificates for TLS are those of Dask's configuration.

    Raises BoardError: Dask is not installed, nothing answers, what answers is no scheduler, or a certificate is not accepted.
    """

    def __init__(self, address: str) -> None:
        self._client = connected(address)
        self._looked, self._tokens, self._lock = -RETURN, {}, threading.Lock()  # type: float, dict[str, list[str]], threading.Lock

    def __enter__(self) -> Farm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(Exception):
            self._client.close(timeout=5)

    def tokens(self, at_most: float = 0.0) -> Mapping[str, Sequence[str]]:
        """{token: addresses of the workers that have it}, not older than `at_most` seconds. Raises BoardLost where the scheduler is gone."""
        with self._lock:
            if time.monotonic() - self._looked >= at_most:
                try:
                    workers = self._client.scheduler_info(n_workers=-1)["workers"]
                except Exception as error:
                    raise BoardLost("the farm: its scheduler doesn't answer any more") from error
                found: dict[str, list[str]] = {}
                for address, worker in workers.items():
                    for name in worker.get("resources") or {}:
                        if _TOKEN.fullmatch(name):
                            found.setdefault(name, []).append(address)
                self._tokens, self._looked = found, time.monotonic()
            return self._tokens

    def names(self) -> dict[str, tuple[str, str]]:
        """{board: (its target, its core)} of all boards that have a worker now. Raises BoardError where two workers serve boards of one name."""
        found: dict[str, tuple[str, str]] = {}
        for name, addresses in sorted(self.tokens().items()):
            board, target, core = _matched(name)
            if board in found or len(addresses) > 1:
                raise BoardError(f"the farm: two workers serve a board '{board}'; a farm needs a name of its own for each board")
            found[board] = (target, core)
        return found

    def boards(self, names: Sequence[str]) -> list[Board]:
        """These boards. Raises BoardError for a name without a worker, and for a worker of another version."""
        known = self.names()
        for name in names:
            if name not in known:
                raise BoardError(f"the farm: no worker serves a board '{name}'.{closest(name, list(known))} Boards: {', '.join(known) or 'none'}")
        return [self._described(name, f"qc/{name}/{'/'.join(known[name])}") for name in dict.fromkeys(names)]

    def _described(self, name: str, token: str) -> Board:
        (where,) = self.tokens(1.0).get(token) or [""]
        try:
            (answer,) = self._client.run(lender.described, workers=[where]).values()
            said, _ = unpacked(answer)
        except Exception as error:
            raise BoardError(f"board '{name}': its worker doesn't answer as one of `qcompiler farm worker`") from error
        if said["protocol"] != lender.PROTOCOL:
            raise BoardError(f"board '{name}': its worker has another version of qcompiler; install the same one there")
        try:
            target = find_target(said["target"])
        except TargetError as error:
            raise BoardError(f"board '{name}': {error}") from error
        cores, limits = tuple(said["cores"]), {key: said[key] for key in ("core", "temperature", "hottest", "patience")}
        return Board(name, target, said["way"], address=token, cores=cores, lender=self, **limits)

    @contextlib.contextmanager
    def lent(self, board: Board, stop: threading.Event) -> Iterator[LentDevice]:
        """The board, with a folder of our own there, until the context ends. Raises BoardError."""
        device = LentDevice(board, self, stop)
        try:
            device.open()
            yield device
        finally:
            device.close()

    def present(self, board: Board) -> bool:
        """Whether a worker serves it now."""
        try:
            return board.address in self.tokens(1.0)
        except BoardLost:
            return False

    def ask(self, board: Board, request: bytes, stop: threading.Event, session: str, patience: float | None = None) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What the board's worker answers. Waits while other clients have the board, and while its worker is started anew.

        Raises BoardError for what it complains of; BoardLost also where its worker stays away, `stop` is set, or `patience` seconds have passed.
        """
        where = f"board '{board.name}'"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dask's, about large tasks
            future = self._client.submit(lender.serve, request, key=f"qc-{board.name}-{uuid.uuid4().hex}", resources={board.address: 1}, pure=False)
        begin = seen = time.monotonic()
        try:
            while not future.done():
                if stop.wait(0.02):
                    self._stop(board, session)
                    raise BoardLost(f"{where}: the work was stopped")
                now = time.monotonic()
                seen = now if board.address in self.tokens(1.0) else seen
                if now - seen > RETURN:
                    raise BoardLost(f"{where}: its worker is gone")
                if patience is not None and now - begin > patience:
                    raise BoardLost(f"{where}: its worker doesn't answer")
            try:
                head, files = unpacked(future.result(timeout=60))
            except Exception as error:  # its process died over it again and again, say
                raise BoardLost(f"{where}: its worker failed") from error
        finally:
            with contextlib.suppress(Exception):
                future.cancel()
        if "error" in head:
            raise (BoardLost if head.get("lost") else BoardError)(str(head["error"]))
        return head, files

    def _stop(self, board: Board, session: str) -> None:
        """Tell the worker, beside what it does, to end what a session waits for."""
        with contextlib.suppress(Exception):
            self._client.run(functools.partial(lender.stopped, session), workers=list(self.tokens(1.0)[board.address]))


class LentDevice(Device):
    """A board of a farm in use. A worker that was started anew is given what it lost."""

    def __init__(self, board: Board, farm: Farm, stop: threading.Event) -> None:
        self.board, self._farm, self._waits = board, farm, stop
        self._session, self._there = "", {}

    def open(self) -> None:
        """Raises BoardError."""
        self._session, self._there = uuid.uuid4().hex, {}
        self._farm.ask(self.board, self._request("open"), self._waits, self._session)

    def close(self) -> None:
        """As far as that is possible."""
        with contextlib.suppress(BoardError):
            self._farm.ask(self.board, self._request("close"), threading.Event(), self._session, 30)

    def _request(self, what: str, head: Mapping[str, Any] = {}, files: Mapping[str, bytes] = {}) -> bytes:
        return packed({"protocol": lender.PROTOCOL, "what": what, "session": self._session, **head}, files)

    def run(
        self,
        command: Sequence[str],
        *,
        staying: Mapping[str, bytes] = {},
        passing: Mapping[str, bytes] = {},
        wanted: Sequence[str] = (),
        patience: float | None = None,
    ) -> Answer:
        for _ in range(3):
            new = self._missing(staying)
            head = {"command": list(command), "staying": list(new), "passing": list(passing), "wanted": list(wanted), "patience": patience}
            said, files = self._farm.ask(self.board, self._request("run", head, {**new, **passing}), self._waits, self._session)
            if "gone" in said:
                self.open()
                continue
            self._stayed(new)
            return Answer(said["status"], said["output"], said["complaints"], files)
        raise BoardLost(f"board '{self.board.name}': its worker dies again and again")


# -- Dask -------------------------------------------------------------------------------------------------------------------------------------


def connected(address: str) -> Any:
    """A Dask client that unpickles nothing. Raises BoardError, as `Farm`."""
    try:
        import dask
        from distributed import Client
        from distributed.security import Security
    except ImportError as error:
        raise BoardError("a farm needs Dask: pip install 'qcompiler[farm]'") from error
    security = Security()
    check_address(address, context_of(security, "client"))
    kept = {"distributed.comm.timeouts.connect": f"{CONNECT:g}s", "distributed.comm.retry.count": 0}
    try:
        with dask.config.set(kept), _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            client = Client(
                address,
                security=security,
                timeout=CONNECT,
                set_as_default=False,
                serializers=["dask", "pickle"],
                deserializers=["dask", "msgpack", "error"],
                name="qcompiler",
            )
            if client.scheduler_info().get("type") == "Scheduler":
                return client
            client.close(timeout=1)
    except Exception as error:
        raise BoardError(_NO_SCHEDULER) from error
    raise BoardError(_NO_SCHEDULER)


_NO_SCHEDULER = "the farm: what answers at its address is no scheduler of `qcompiler farm scheduler`, or is one of another version of Dask"


def context_of(security: Any, role: str) -> ssl.SSLContext | None:
    """For TLS, as Dask's `Security` makes it for a client or a worker. Raises BoardError where one of its files can't be read."""
    try:
        context: ssl.SSLContext | None = security.get_connection_args(role).get("ssl_context")
        return context
    except (OSError, ssl.SSLError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a certificate with its key"
        raise BoardError(f"the farm: a certificate can't be used (of Dask's configuration distributed.comm.tls, or its options): {reason}") from error


def check_address(address: str, context: ssl.SSLContext | None) -> None:
    """Knock at a farm's door, before Dask does: its own errors don't say what is wrong. Raises BoardError."""
    match = re.fullmatch(r"(tcp|tls)://(\[[^\]/]+\]|[^:/\s]+):(\d{1,5})", address)
    if match is None or not 0 < int(match[3]) < 65536:
        raise BoardError(f"the farm {address!r}: expected tls://host:port, or tcp://host:port in a network that you trust")
    way, host, port = match[1], match[2].strip("[]"), int(match[3])
    if way == "tls" and context is None:
        raise BoardError(
            "the farm: TLS needs a certificate: name its files in Dask's configuration, distributed.comm.tls.ca-file, client.cert and client.key "
            "(or DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ...__CLIENT__CERT, ...__CLIENT__KEY)"
        )
    try:
        with socket.create_connection((host, port), CONNECT) as plain:
            plain.settimeout(CONNECT)
            stream = context.wrap_socket(plain, server_hostname=host) if way == "tls" and context is not None else plain
            with stream:
                first = stream.recv(1)  # a scheduler greets whoever comes; who does not like our certificate says so now
    except ssl.SSLError as error:
        text = f"{error} {getattr(error, 'verify_message', '')}".lower()
        if "expired" in text:
            whose = "the scheduler's" if isinstance(error, ssl.SSLCertVerificationError) else "our"
            raise BoardError(f"the farm: {whose} certificate has expired; issue a new one") from error
        if isinstance(error, ssl.SSLCertVerificationError) or "alert" in text:
            raise BoardError("the farm: a certificate is not accepted: both sides need one of the same authority (distributed.comm.tls.ca-file)") from error
        raise BoardError("the farm: it doesn't speak TLS; is it tcp://, or no scheduler?") from error
    except TimeoutError as error:
        raise BoardError(f"the farm: no answer; is it a scheduler, and its address right?{' It may want tls://' if way == 'tcp' else ''}") from error
    except OSError as error:
        raise BoardError(f"the farm: can't be reached: {error.strerror or 'its name is not known'}; is the scheduler on, and its address right?") from error
    if not first:
        raise BoardError("the farm: it closes the connection; its scheduler may want tls://, or is none")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Dask's log lines on standard error."""
    import logging

    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _matched(token: str) -> tuple[str, str, str]:
    match = _TOKEN.fullmatch(token)
    assert match is not None
    return match[1], match[2], match[3]
