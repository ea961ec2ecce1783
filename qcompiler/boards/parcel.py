"""What a farm's client and its workers send each other: a JSON object and named files, as one run of bytes. Nothing of it is ever unpickled.

4 bytes: length of the head | head: {..., "files": {name: length}} | the files, one after the other
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def packed(head: Mapping[str, Any], files: Mapping[str, bytes] = {}) -> bytes:
    """One message."""
    text = json.dumps({**head, "files": {name: len(data) for name, data in files.items()}}).encode()
    return b"".join([len(text).to_bytes(4, "little"), text, *files.values()])


def unpacked(data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The head and the files of a message. Raises ValueError for what is none."""
    size = int.from_bytes(data[:4], "little")
    head = json.loads(data[4 : 4 + size])
    lengths = head.pop("files", None) if isinstance(head, dict) else None
    if not isinstance(lengths, dict) or not all(type(n) is int and n >= 0 for n in lengths.values()) or 4 + size + sum(lengths.values()) != len(data):
        raise ValueError("not a message of ours")
    files, at = {}, 4 + size
    for name, length in lengths.items():
        files[name] = bytes(data[at : at + length])
        at += length
    return head, files
