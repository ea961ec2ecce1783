"""Reads named sections of an ELF file, and its symbols, without executing it: the manifest of a library for any architecture."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from qcompiler.base.errors import ArtifactError
from qcompiler.base.files import open_regular

MACHINES = {62: "x86_64", 183: "aarch64", 40: "armv7a"}  # e_machine (System V ABI)


def mapped(path: Path) -> mmap.mmap | bytes:
    """The file's bytes, read only where they are looked at: a library is mostly weights. Raises ArtifactError when it can't be read."""
    try:
        with open_regular(path) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
    except OSError as error:
        raise ArtifactError(f"{path}: can't be read: {error.strerror or error}") from error


def read_section(path: Path, section: str) -> tuple[bytes, str]:
    """(contents of `section`, architecture) of the little-endian ELF file at `path`.

    Raises ArtifactError when the file can't be read, is not ELF, is cut short, or has no such section.
    """
    return find_section(mapped(path), path, section)


def find_section(data: mmap.mmap | bytes, path: Path, section: str) -> tuple[bytes, str]:
    """`read_section` of the file's contents `data`; `path` names it in errors."""
    if data[:4] != b"\x7fELF":
        raise ArtifactError(f"{path}: not a compiled library (no ELF header). Make one with 'qcompiler compile MODEL --output FILE.so'")
    try:
        wide = data[4] == 2
        machine = struct.unpack_from("<H", data, 18)[0]
        table = struct.unpack_from("<Q" if wide else "<I", data, 40 if wide else 32)[0]
        entry, count, names_index = struct.unpack_from("<HHH", data, 58 if wide else 46)

        def header(index: int) -> tuple[int, int, int]:  # name, offset, size
            at = table + index * entry
            name = struct.unpack_from("<I", data, at)[0]
            offset, size = struct.unpack_from("<QQ", data, at + 24) if wide else struct.unpack_from("<II", data, at + 16)
            return name, offset, size

        _, names_at, names_size = header(names_index)
        names = data[names_at : names_at + names_size]
        for index in range(count):
            name, offset, size = header(index)
            if names[name : names.index(b"\0", name)].decode() == section:
                if offset + size > len(data):
                    raise ArtifactError(f"{path}: cut short: section {section} ends at byte {offset + size}, the file has {len(data)}")
                return data[offset : offset + size], MACHINES.get(machine, f"ELF machine {machine}")
    except (struct.error, ValueError, UnicodeDecodeError, IndexError) as error:
        raise ArtifactError(f"{path}: damaged or cut short ELF file ({error})") from error
    raise ArtifactError(f"{path}: a library, but not one that qcompiler made (no section {section})")


def symbol_sizes(data: bytes, path: Path) -> dict[str, int]:
    """{symbol: bytes} of an object file; `path` names it in errors. Raises ArtifactError when it is damaged or stripped."""
    symbols, names = (find_section(data, path, section)[0] for section in (".symtab", ".strtab"))
    found = {}
    for at in range(0, len(symbols), 24 if data[4] == 2 else 16):
        name = struct.unpack_from("<I", symbols, at)[0]
        size = struct.unpack_from("<Q", symbols, at + 16)[0] if data[4] == 2 else struct.unpack_from("<I", symbols, at + 8)[0]
        found[names[name : names.index(b"\0", name)].decode(errors="replace")] = size
    return found
