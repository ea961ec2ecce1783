"""The reading half of an artifact: the manifest of a library and whether its file is whole, without executing it. Needs numpy alone."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.base.errors import ArtifactError
from qcompiler.base.files import parse_json
from qcompiler.runtime.elf import find_section, mapped
from qcompiler.runtime.shapes import specializations

FORMAT_VERSION = 1
MANIFEST_SECTION = ".qc.manifest"
CHECKSUM_MAGIC = b"qc.sum1\n"


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of the library at `path`, without executing it; the file may be for any architecture.

    Raises ArtifactError when the file is not one of ours, is damaged, or has another format version.
    """
    path = Path(path)
    return manifest_in(mapped(path), path)[0]


def manifest_in(data: mmap.mmap | bytes, path: Path) -> tuple[dict[str, Any], str]:
    """(manifest, architecture) of the library that `data` is the contents of; `path` names it in errors. Raises as `read_manifest`."""
    raw, architecture = find_section(data, path, MANIFEST_SECTION)
    try:
        document = parse_json(raw.rstrip(b"\0").decode())
        manifest, digest = document["manifest"], document["digest"]
        body = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: the manifest is damaged (not readable as JSON: {error}); compile the model again") from error
    if not isinstance(manifest, dict) or hashlib.sha256(body.encode()).hexdigest() != digest:
        raise ArtifactError(f"{path}: the manifest is damaged (its digest does not match); compile the model again")
    if manifest.get("format") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: artifact format {manifest.get('format')}, this version of qcompiler reads format {FORMAT_VERSION}; compile the model again"
        )
    return manifest, architecture


def on_gpu(manifest: Mapping[str, Any]) -> bool:
    """Is the library for a GPU?"""
    return str(manifest.get("triple", "")).startswith("nvptx64")


def session_bytes(manifest: Mapping[str, Any]) -> int:
    """What each session of a library for a GPU takes of the device's memory, by the plan: a workspace and ports, of the largest shape each. Counters and
    padding come on top, some kilobytes."""
    shapes = specializations(manifest)
    ports = zip(*([*m["inputs"], *m["outputs"]] for m in shapes), strict=True)
    largest = (max(int(math.prod(p["shape"])) * np.dtype(p["dtype"]).itemsize for p in same) for same in ports)
    return int(max(m["workspace"] for m in shapes) + sum(largest))


def checksum(body: bytes | memoryview) -> bytes:
    """16 bytes: a = the sum of the little-endian 32-bit words of `body`, b = the sum of a's values after each word; both modulo 2^64."""
    a = b = 0
    words = np.frombuffer(body, "<u4")
    for start in range(0, words.size, 1 << 18):
        block = words[start : start + (1 << 18)].astype(np.uint64)
        b += a * block.size + int((block * np.arange(block.size, 0, -1, dtype=np.uint64)).sum())  # uint64 wraps modulo 2^64
        a += int(block.sum())
    return struct.pack("<QQ", a % 2**64, b % 2**64)


def check_complete(data: mmap.mmap | bytes, path: Path) -> None:
    """Raise ArtifactError when `data`, the contents of the library at `path`, is not, byte for byte, what `link` wrote."""
    with memoryview(data) as whole, whole[:-24] as body:
        complete = len(body) % 4 == 0 and whole[-24:-16] == CHECKSUM_MAGIC and checksum(body) == whole[-16:]
    if not complete:
        raise ArtifactError(f"{path}: damaged, cut short or stripped (its checksum does not match); compile the model again, or copy the library again")
