"""The verb `boards`, and the options with which other verbs do on a board what they do here."""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcompiler.base.errors import BoardError, DataError
from qcompiler.base.shape_table import shape_rows
from qcompiler.base.targets import find_target
from qcompiler.base.text import milliseconds, size, table
from qcompiler.boards.board import DEFAULT_FILE, Board, find_board, load_boards
from qcompiler.cli.arguments import once
from qcompiler.cli.process import REFUSED, show
from qcompiler.pipeline.options import OPTIONS

if TYPE_CHECKING:
    from qcompiler.boards.session import BoardSession

FILE_HELP = f"what boards there are: a file as docs/boards.md describes it (default {DEFAULT_FILE})"


def add(verb: Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]) -> None:
    """Add the verb with `verb(name, run, summary, description)`, which makes its parser."""
    p = verb(
        "boards",
        _boards,
        "check the boards of boards.yaml",
        "Reach every board (by ssh, adb, or an emulator here), and print what it is, how hot and how full, and whether it computes a small network "
        "rightly, and how fast. Nothing is installed on a board, and nothing is left there. Exit status 2 when one is not fit for work.",
    )
    p.add_argument("name", nargs="*", metavar="NAME", help="check these boards only")
    add_files(p)


def add_board(p: argparse.ArgumentParser, what: str, several: bool = False) -> None:
    """The options --board, --boards and --farm of a verb. several: samples may be shared out to boards, named or with --any."""
    if several:
        p.add_argument(
            "--board", action="append", default=[], metavar="NAME", help=f"{what} on this board instead of on this machine; repeat to spread samples"
        )
        p.add_argument("--any", metavar="T", help="share out samples to every board of --boards, or of --farm, that has this target")
    else:
        p.add_argument("--board", metavar="NAME", help=f"{what} on this board instead of on this machine")
    add_files(p)


def add_files(p: argparse.ArgumentParser) -> None:
    """The options that say where boards are."""
    p.add_argument("--boards", default=DEFAULT_FILE, metavar="FILE", help=FILE_HELP)
    p.add_argument("--farm", metavar="ADDRESS", help="take boards of the farm behind this scheduler, tls://host:8786 or tcp://host:8786, not those of --boards")


@contextlib.contextmanager
def chosen_boards(options: argparse.Namespace, names: Sequence[str] | None, any_of: str | None = None) -> Iterator[list[Board]]:
    """The boards of these names, or all of a target (and of the core `options.core`, where one is named), or all (None). Raises BoardError."""
    target = None if any_of is None else find_target(any_of)
    core = getattr(options, "core", None)
    with contextlib.ExitStack() as stack:
        if options.farm is None:
            where, every = f"{options.boards}", load_boards(options.boards)
            known = {name: (b.target.name, b.core) for name, b in every.items()}
        else:
            from qcompiler.boards.farm import Farm

            where, farm = "the farm", stack.enter_context(Farm(options.farm))
            known = farm.names()
        if target is not None:
            names = [name for name, kind in known.items() if kind[0] == target.name and core in (None, kind[1])]
            if not names:
                there = ", ".join(dict.fromkeys(f"{t}{f' ({c})' if c and core else ''}" for t, c in known.values())) or "nothing"
                raise BoardError(f"{where}: no board for {target.name}{f' ({core})' if core else ''}; its boards are for {there}")
        names = list(dict.fromkeys(known if names is None else names))
        yield farm.boards(names) if options.farm is not None else [find_board(every, name, options.boards) for name in names]


@contextlib.contextmanager
def named_boards(options: argparse.Namespace) -> Iterator[list[Board]]:
    """The boards that --board names, or --any; none for this machine. Raises BoardError."""
    any_of, names = getattr(options, "any", None), options.board or []
    names = [names] if isinstance(names, str) else names
    if any_of is not None and names:
        raise BoardError("--board names boards and --any takes all of a target; give one of them")
    if options.farm is not None and any_of is None and not names:
        raise BoardError(f"--farm: which of its boards? --board names one{', --any takes all of a target' if hasattr(options, 'any') else ''}")
    if any_of is None and not names:
        yield []
        return
    with chosen_boards(options, names, any_of) as found:
        yield found


@contextlib.contextmanager
def tuning_boards(options: argparse.Namespace) -> Iterator[list[Board]]:
    """The boards that `tune` was told to measure on; none for this machine. Raises BoardError."""
    with named_boards(options) as found:
        if found and options.target not in ("native", found[0].target.name):
            raise BoardError(f"--target {options.target}: the boards are for {found[0].target.name}; leave --target out")
        yield found


@contextlib.contextmanager
def session_of(options: argparse.Namespace) -> Iterator[Any]:
    """The library `options.library`: on the boards that were named, else here."""
    if not on_board(options):
        import qcompiler

        yield qcompiler.load(options.library, threads=options.threads)
        return
    from qcompiler.boards.device import opened
    from qcompiler.boards.session import BoardSession
    from qcompiler.boards.several import SharedSession

    stop = threading.Event()
    with named_boards(options) as boards, contextlib.ExitStack() as stack:
        sessions = [BoardSession(stack.enter_context(opened(board, stop)), options.library, options.threads) for board in boards]
        yield sessions[0] if len(sessions) == 1 else SharedSession(sessions, stop)


def on_board(options: argparse.Namespace) -> bool:
    """Was a board named? Raises BoardError for a farm without one of its boards."""
    named = bool(options.board) or getattr(options, "any", None) is not None
    if not named and options.farm is not None:
        raise BoardError(f"--farm: which of its boards? Name one with --board{', or take all of a target with --any' if hasattr(options, 'any') else ''}")
    return named


def refuse_on_board(options: argparse.Namespace, *names: str) -> None:
    """Raises DataError for an option that has no meaning on a board."""
    for name in names:
        if options.board and getattr(options, name):
            raise DataError(f"--{name} measures on this machine, and --board asks for another; leave one of them out")


def bench(options: argparse.Namespace) -> int:
    """The verb `bench` on a board: the library, and with --model the float network for the same target, in turns there."""
    from qcompiler.base.files import temporary_folder
    from qcompiler.boards.device import opened
    from qcompiler.boards.session import BoardSession
    from qcompiler.runtime.shapes import chosen_shapes, spelled
    from qcompiler.verification.twin import float_artifact

    refuse_on_board(options, "against", "footprint", "data", "trace", "csv", "throughput")
    with temporary_folder() as folder, chosen_boards(options, [options.board]) as (board,), opened(board) as device:
        session, twin = BoardSession(device, options.library, options.threads), None
        if options.model:
            twin = BoardSession(device, float_artifact(options.model, session).save(folder / "float.so"), options.threads)
        numbers = chosen_shapes(session.manifest, shape_rows(once(OPTIONS["input_shapes"], options.input_shape)))
        found = [_measured(options, session.specializations[i], None if twin is None else twin.specializations[i]) for i in numbers]
    if "shapes" in session.manifest:
        titles = [spelled(session.fitting.inputs[i]) for i in numbers]
        found = [({"shape": t, **document}, f"{t}\n\n{text}") for t, (document, text) in zip(titles, found, strict=True)]
    show(options, found[0][0] if len(found) == 1 else {"shapes": [document for document, _ in found]}, lambda: "\n\n".join(text for _, text in found))
    return 0


def _measured(options: argparse.Namespace, session: BoardSession, twin: BoardSession | None) -> tuple[dict[str, Any], str]:
    """What `bench` finds of a library, and of its float network, at one shape, as a document and as text."""
    from qcompiler.boards.session import take_turns
    from qcompiler.cli.tables import profile_text, timing_text
    from qcompiler.runtime.bench import ratios

    timings = take_turns({"int8": session} | ({} if twin is None else {"float": twin}), options.seconds)
    steps = session.profile() if options.layers else []
    floats = twin.profile() if options.layers and twin is not None else []
    base = "int8" if twin is None else "float"
    batch = max((port.shape[0] for port in session.inputs if port.shape), default=1)
    document = {
        "board": session.device.board.name,
        "threads": options.threads,
        "seconds": {t.name: {k: v for k, v in vars(t).items() if k != "name"} | {"samples_per_second": batch / t.mean} for t in timings},
        f"ratio to {base}": ratios(timings, base),
        "steps": [dict(zip(("id", "op", "kernel", "seconds"), step, strict=True)) for step in steps],
    }
    parts = [timing_text(timings, base, batch, options.threads), *([profile_text(steps, floats)] if steps else [])]
    return document, "\n\n".join(parts)


def _boards(options: argparse.Namespace) -> int:
    from qcompiler.boards.check import check_boards

    with chosen_boards(options, options.name or None) as boards:
        if not boards:
            raise BoardError("the farm: no worker lends a board; `qcompiler farm worker` does, on the host that reaches them")
        found = check_boards(boards)
    show(options, {"boards": [c.to_json() for c in found]}, lambda: boards_text([c.to_json() for c in found]))
    return REFUSED if any(c.trouble for c in found) else 0


def boards_text(found: Sequence[Mapping[str, Any]]) -> str:
    """One row per board, and a line for each that is not fit."""
    columns = ("board", "target", "core", "by", "machine", "kernel", "libc", "cores|", "MHz|", "governor", "deg C|", "free|", "canary", "ms|", "")
    rows = []
    for c in found:
        clock, warm = (("" if c[k] is None else f"{c[k]:.0f}") for k in ("clock", "temperature"))
        cells = [c["name"], c["target"], c["core"], c["way"], c["machine"], c["kernel"], c["libc"], str(c["cores"] or ""), clock, c["governor"], warm]
        cells += ["" if c["free"] is None else size(c["free"]), c["digest"], "" if c["seconds"] is None else milliseconds(c["seconds"])]
        rows.append([*cells, "NOT FIT" if c["trouble"] else "fit"])
    lines = [table("Boards", columns, rows, width=200)]
    return "\n".join(lines + [f"{c['name']}: {c['trouble']}" for c in found if c["trouble"]])
