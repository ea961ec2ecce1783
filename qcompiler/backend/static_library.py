"""A network as a static archive, made of the pieces inside its finished library: linked into a program, it needs no file and no dlopen at run time.

The archive holds one object with one global symbol, `qc_library_NAME`, which returns the table of functions that opening a library gives. All else in
it is local, so that any number of networks fit into one program.
"""

from __future__ import annotations

import re
import subprocess
import zlib
from pathlib import Path
from typing import Any

from qcompiler.backend.artifact import CODE_SECTION, COMPILE, CONSTANTS_SECTION, write_sources
from qcompiler.backend.toolchain import compiler_words
from qcompiler.base.errors import ArtifactError, TargetError
from qcompiler.base.files import temporary_folder
from qcompiler.base.targets import Target
from qcompiler.runtime.elf import read_section
from qcompiler.runtime.library import MANIFEST_SECTION

_ENTRY = """#include "qcompiler/loader.h"

__attribute__((visibility("default"))) qc_library {symbol}(void);
qc_library {symbol}(void) {{ return qc_library_linked(); }}
"""


def identifier(name: str) -> str:
    """`name` with what a C identifier can't hold replaced by `_`."""
    return re.sub(r"\W", "_", name, flags=re.ASCII)


def write_static(library: Path, manifest: dict[str, Any], target: Target, name: str, output: Path) -> str:
    """Write the archive of the complete library at `library` to `output`; returns the name of its one function. The same library gives the same bytes.

    Raises ArtifactError for a library without the pieces (of an earlier version), TargetError when a tool of its target is missing or fails.
    """
    try:
        code = zlib.decompress(read_section(library, CODE_SECTION)[0])
        constants, encoded = read_section(library, CONSTANTS_SECTION)[0], read_section(library, MANIFEST_SECTION)[0].rstrip(b"\0")
    except (ArtifactError, zlib.error) as error:
        raise ArtifactError(f"{library}: holds no object code to make a static archive of; compile the model again with this version of qcompiler") from error
    compiler, symbol = compiler_words(target), f"qc_library_{identifier(name)}"
    with temporary_folder() as folder:
        sources = write_sources(folder, code, constants, encoded, manifest, target)
        (folder / "entry.c").write_text(_ENTRY.format(symbol=symbol))

        def run(*command: str) -> str:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise TargetError(f"making a static archive for '{target.name}' with {command[0]} failed: {done.stderr.strip()[:600]}")
            return done.stdout.strip()

        prefix = "llvm-" if target.android else ""
        objcopy, archiver = (run(*compiler, f"-print-prog-name={prefix}{tool}") for tool in ("objcopy", "ar"))
        inputs = [*sources, "entry.c", "data.s"]
        for source in inputs:
            run(*compiler, *COMPILE, "-x", "c" if source.endswith(".c") else "assembler", "-c", source, "-o", f"{source}.o")
        run(*compiler, "-r", "-nostdlib", "-Wl,--build-id=none", *(f"{i}.o" for i in inputs), "code.o", "-o", "all.o")
        run(objcopy, f"--keep-global-symbol={symbol}", "--strip-unneeded", "all.o", f"{identifier(name)}.o")
        run(archiver, "rcsD", "archive.a", f"{identifier(name)}.o")
        output.write_bytes((folder / "archive.a").read_bytes())
    return symbol
