"""The verb `bundle`: everything a device needs to run a library, in one folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qcompiler.cli.process import show


def add(verb: Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]) -> None:
    """Add the verb with `verb(name, run, summary, description)`, which makes its parser."""
    p = verb(
        "bundle",
        _bundle,
        "pack a library for devices: headers, CMake package, example, runner",
        "Write the folder DIR with FILE.so, a C and a C++17 header, a CMake package, a README, an example, and bin/qc_run built for the library's "
        "architecture with the compiler of its target. Nothing in it needs Python or any other library: FILE.so contains its whole runtime and is "
        "one self-contained file on libc, libm and pthread, so there are no runtime libraries to add.",
    )
    p.add_argument("library", metavar="FILE.so", help="a library that `qcompiler compile` wrote, for any target")
    p.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to write, new or empty; it appears only when it is complete")
    p.add_argument("--static", action="store_true", help="also write the network as a static archive, to be linked into programs that open no file")


def _bundle(options: argparse.Namespace) -> int:
    from qcompiler.backend.bundle import make_bundle
    from qcompiler.base.text import size, table

    bundle = make_bundle(options.library, options.output, options.static)
    document = {"output": str(bundle.folder), "target": bundle.target, "bytes": bundle.size, "files": dict(bundle.files)}
    title = f"{bundle.folder}: {size(bundle.size)} for {bundle.target}"
    show(options, document, lambda: table(title, ("file", "size|"), [[name, size(count)] for name, count in bundle.files.items()]))
    return 0
