"""The artifact: one shared library with code, packed weights and a JSON manifest, built reproducibly and read without executing it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.elf import read_section
from qcompiler.errors import ArtifactError, OutputError, TargetError
from qcompiler.lowering import Program
from qcompiler.targets import Target

FORMAT_VERSION = 1
NUMERICS_VERSION = 1
MANIFEST_SECTION = ".qc.manifest"

# Weights and manifest enter the library as they are; .incbin keeps them out of the compiler. Read-only data is mapped, not copied, at load.
_DATA = """
    .section .qc.constants,"a",%progbits
    .balign 64
    .globl qc_constants
    .type qc_constants, %object
qc_constants:
    .incbin "constants.bin"
    .size qc_constants, . - qc_constants
    .section .qc.manifest,"a",%progbits
    .globl qc_manifest
    .type qc_manifest, %object
qc_manifest:
    .incbin "manifest.json"
    .size qc_manifest, . - qc_manifest
    .section .note.GNU-stack,"",%progbits
"""


@dataclass(frozen=True)
class Artifact:
    """A compiled library in memory. `library` is the whole shared library; `manifest` is the JSON object inside it."""

    library: bytes
    manifest: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of the shared library."""
        return len(self.library)

    @property
    def digest(self) -> str:
        """SHA-256 of the shared library, hexadecimal."""
        return hashlib.sha256(self.library).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the library to `path`, beside it first and then renamed, so that no half-written file is left. Raises OutputError."""
        path = Path(path)
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                file.write(self.library)
            os.chmod(file.name, 0o755)
            os.replace(file.name, path)
        except OSError as error:
            if "file" in locals():
                Path(file.name).unlink(missing_ok=True)
            raise OutputError(f"can't write {path}: {error.strerror or error}") from error
        return path


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OutputError now, before the long work, when `path` can't be written later."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"can't write {path}: it is a folder; name a file, for example {path / 'model.so'}")
    if not path.parent.is_dir():
        raise OutputError(f"can't write {path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"can't write {path}: no permission to write in {path.parent}")


def program_manifest(program: Program) -> dict[str, Any]:
    """What the runtime and `inspect` need to know of a program: ports, memory, steps, values."""

    def layout(value: str) -> dict[str, Any]:
        v = program.values[value]
        assert v.place is not None
        entry: dict[str, Any] = {"shape": list(v.layout.shape), "storage": v.layout.dtype, "space": v.place.space, "offset": v.place.offset}
        if not v.layout.dense:
            entry |= {"halo": list(v.layout.halo), "pitch": v.layout.channel_pitch}
        return entry

    return {
        "target": program.target.name,
        "triple": program.target.triple,
        "features": list(program.target.features),
        "inputs": [{"name": p.name, "shape": list(p.shape), "dtype": p.dtype} for p in program.inputs],
        "outputs": [{"name": p.name, "shape": list(p.shape), "dtype": p.dtype} for p in program.outputs],
        "workspace": program.workspace,
        "constants": int(program.constants.size),
        "steps": [
            {
                "id": s.writes,
                "op": s.name,
                "kernel": s.kernel.row,
                "tasks": s.kernel.tasks,
                "macs": s.kernel.macs,
                "params": s.params,
                **({"auxiliary": True} if s.auxiliary else {}),
            }
            for s in program.steps
        ],
        "layouts": {v: layout(v) for v in program.values},
    }


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """Canonical JSON, with a digest of itself: {"digest": sha256 of the rest, ...}."""
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return json.dumps({"digest": hashlib.sha256(body.encode()).hexdigest(), "manifest": manifest}, sort_keys=True, separators=(",", ":")).encode()


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of the library at `path`, without executing it; the file may be for any architecture.

    Raises ArtifactError when the file is not one of ours, is damaged, or has another format version.
    """
    path = Path(path)
    raw, _ = read_section(path, MANIFEST_SECTION)
    try:
        document = json.loads(raw.decode())
        manifest, digest = document["manifest"], document["digest"]
        body = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: the manifest is damaged (not readable as JSON: {error}); compile the model again") from error
    if not isinstance(manifest, dict) or hashlib.sha256(body.encode()).hexdigest() != digest:
        raise ArtifactError(f"{path}: the manifest is damaged (its digest does not match); compile the model again")
    if manifest.get("format") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: artifact format {manifest.get('format')}, this version of qcompiler reads format {FORMAT_VERSION}; compile the model again")
    return manifest


def find_compiler(target: Target) -> str:
    """The first of the target's C++ compilers that is installed. Raises TargetError naming what to install."""
    for name in target.compiler:
        found = shutil.which(name)
        if found:
            return found
    raise TargetError(f"target '{target.name}' needs one of the compilers {', '.join(target.compiler)} to link, and none is on PATH")


def link(code: bytes, constants: np.ndarray, manifest: dict[str, Any], target: Target) -> Artifact:
    """Link object code, constants and manifest into a shared library. The same arguments give the same bytes.

    Raises TargetError when the linker is missing or fails.
    """
    manifest = {"format": FORMAT_VERSION, "numerics": NUMERICS_VERSION, **manifest}
    compiler = find_compiler(target)
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as name:
        folder = Path(name)
        (folder / "code.o").write_bytes(code)
        (folder / "constants.bin").write_bytes(constants.tobytes())
        (folder / "manifest.json").write_bytes(encode_manifest(manifest))
        (folder / "data.s").write_text(_DATA)
        # No build id, no path, no time stamp: nothing but the inputs decides the bytes.
        command = [compiler, "-shared", "-fPIC", "-nostartfiles", "-o", "out.so", "code.o", "data.s", "-lm", "-Wl,--build-id=none", "-s"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"linking for '{target.name}' with {compiler} failed: {done.stderr.strip()[:600]}")
        return Artifact((folder / "out.so").read_bytes(), manifest)
