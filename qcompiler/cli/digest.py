"""The verb `digest`: one number for all that a library computes on a data set."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qcompiler.cli.arguments import positive
from qcompiler.cli.boards import add_board, session_of
from qcompiler.cli.process import show
from qcompiler.pipeline.options import DATA_HELP, OPTIONS


def add(verb: Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]) -> None:
    """Add the verb with `verb(name, run, summary, description)`, which makes its parser."""
    p = verb(
        "digest",
        _digest,
        "print one digest of what a library computes on a data set",
        "Run FILE.so on all of DATA, and print the SHA-256 of its outputs. Integer networks have the same digest on every CPU and GPU, so that results need "
        "no new validation on another: `verify --expect-digest` compares. Outputs that are computed in float are left out, and named.",
    )
    p.add_argument("library", metavar="FILE.so", help="a library that `qcompiler compile` wrote")
    p.add_argument("--data", required=True, metavar="DATA", help=f"inputs: {DATA_HELP}")
    p.add_argument("--preprocess", metavar="FILE.yaml", help=OPTIONS["preprocess"].help)
    p.add_argument("--samples", dest="max_samples", type=positive, metavar="N", help="at most N samples, as `verify` takes them")
    p.add_argument("--threads", type=positive, default=1, metavar="N", help="threads of a run (default 1)")
    add_board(p, "run FILE.so", several=True)


def _digest(options: argparse.Namespace) -> int:
    from qcompiler.calibration.frames import open_kept
    from qcompiler.runtime.selftest import digest

    with session_of(options) as session:
        found, count, names = digest(session, open_kept(options.data, session, options.preprocess, options.max_samples))
        others = [o.name for o in session.outputs if o.name not in names]
    said = [f"sha256:{found}", f"of {', '.join(names)}, {count} sample{'s' * (count > 1)}"]
    said += [f"not of {', '.join(others)}: computed in float, the last bits may differ between CPUs"] if others else []
    show(options, {"digest": found, "samples": count, "values": names, "left_out": others}, lambda: "\n".join(said))
    return 0
