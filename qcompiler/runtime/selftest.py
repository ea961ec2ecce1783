"""Test vectors: inputs from a recipe, and sums of the values that have the same bits on every CPU. `qcompiler/runtime/cpp/qc_selftest.c` is the other half.

A manifest marks the steps whose results may differ in the last bits between CPUs: float operators, and whatever is computed from them. The *probes* of a
library are the exact outputs, and the exact values that such steps read.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from qcompiler.base.errors import ArtifactError
from qcompiler.base.parallel import in_order
from qcompiler.runtime.library import checksum

STREAMS = 64  # ports of a vector have streams of random numbers of their own

Visit = Callable[[str, np.ndarray], None]


class Traced(Protocol):
    """A session."""

    manifest: dict[str, Any]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...
    def trace(self, inputs: Mapping[str, np.ndarray], visit: Visit) -> dict[str, np.ndarray]: ...


def splitmix(seed: int, count: int) -> np.ndarray:
    """uint64[count]: the first numbers of a stream (splitmix64: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed << 32) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def recipe_inputs(manifest: Mapping[str, Any], vector: int) -> dict[str, np.ndarray]:
    """Inputs of vector number `vector`. 8-bit inputs, and float ones behind which an 8-bit value stands, take all of its 256 values in even vectors and the two
    ends in odd ones; other reals lie in [-4, 4); other integers, which may be indices, are 0 or 1."""
    return {port["name"]: _port(port, vector, splitmix(vector * STREAMS + i, _count(port))) for i, port in enumerate(manifest["inputs"])}


def _count(port: Mapping[str, Any]) -> int:
    return int(np.prod(port["shape"], dtype=np.int64))


def _port(port: Mapping[str, Any], vector: int, random: np.ndarray) -> np.ndarray:
    dtype, scale = np.dtype(port["dtype"]), np.float32(port.get("scale") or 0)
    byte = np.where(random >> np.uint64(63), np.uint8(127), np.uint8(128)) if vector % 2 else (random >> np.uint64(56)).astype(np.uint8)
    if dtype.itemsize == 1 and dtype.kind in "iu":
        values = byte.view(dtype)
    elif dtype == np.float32 and scale > 0:
        values = (byte.view(np.int8).astype(np.int32) - int(port.get("zero_point") or 0)).astype(np.float32) * scale
    elif dtype.kind == "f":
        values = ((random >> np.uint64(48)).astype(np.uint16).view(np.int16).astype(np.float32) / np.float32(8192)).astype(dtype)
    else:
        values = (random >> np.uint64(63)).astype(dtype)
    return np.asarray(values).reshape(port["shape"])


def sums_of(array: np.ndarray) -> tuple[int, int]:
    """Of a canonical array's bytes: see `qcompiler.runtime.library.checksum`."""
    raw = np.ascontiguousarray(array).tobytes()
    a, b = struct.unpack("<QQ", checksum(raw + bytes(-len(raw) % 4)))
    return a, b


def probes(manifest: Mapping[str, Any], reads: Iterable[tuple[str, Iterable[str]]]) -> dict[str, int]:
    """Value id -> step that computes it, of the probes of a library. reads: of every step what it writes and what it reads."""
    exact = exact_values(manifest)
    written = {v: i for i, s in enumerate(manifest["steps"]) if not s.get("auxiliary") for v in (s["id"], *s.get("more", []))}
    watched = {v for step, values in reads if step in written and step not in exact for v in values}
    watched |= {v for v in exact if manifest["layouts"][v]["space"] == "output"}
    found = {v: written[v] for v in exact if v in watched}
    return found or {v: written[v] for v in exact[-1:]}


def exact_values(manifest: Mapping[str, Any]) -> list[str]:
    """Value ids that have the same bits on every CPU, in the order of their steps; none where all are float: moving the inputs is no computation."""
    found = [v for s in manifest["steps"] if not s.get("auxiliary") and not s.get("inexact") for v in (s["id"], *s.get("more", []))]
    return found if any(manifest["layouts"][v]["storage"] in ("int8", "uint8", "int16") for v in found) else []


def vectors(session: Traced, manifest: Mapping[str, Any], wanted: Mapping[str, int], count: int) -> dict[str, Any]:
    """The manifest's entry `selftest`: what `session` makes of `count` vectors. manifest: of the library that gets it; wanted: its `probes`."""
    sums: dict[str, list[list[str]]] = {v: [] for v in wanted}

    def visit(name: str, array: np.ndarray) -> None:
        if name in sums and len(sums[name]) <= vector:
            sums[name].append([f"{s:016x}" for s in sums_of(array)])

    for vector in range(count):
        session.trace(recipe_inputs(manifest, vector), visit)
    assert all(len(s) == count for s in sums.values()), "a probe is no value of the session"
    return {"vectors": count, "probes": [{"value": v, "step": step, "sums": sums[v]} for v, step in wanted.items()]}


def digest(session: Traced, samples: Iterable[Mapping[str, np.ndarray]]) -> tuple[str, int, list[str]]:
    """(digest, samples, names): SHA-256 over the exact outputs of every sample in order, or where no output is exact over the last exact value. Libraries of
    one plan have the same digest on every target. Raises ArtifactError for a library without exact values."""
    outputs, values = digested(session.manifest)
    names = outputs or values
    whole, count = hashlib.sha256("\n".join(names).encode()), 0

    def of_one(session: Traced, sample: Mapping[str, np.ndarray]) -> bytes:
        found: dict[str, bytes] = {}

        def visit(name: str, array: np.ndarray) -> None:
            if name in names:
                found[name] = hashlib.sha256(f"{array.dtype} {list(array.shape)}\n".encode() + np.ascontiguousarray(array).tobytes()).digest()

        if outputs:
            for name, array in session.run(sample).items():
                visit(name, array)
        else:
            session.trace(sample, visit)
        return b"".join(found[n] for n in names)

    stop = getattr(session, "interrupt", lambda: None)
    with contextlib.closing(in_order(of_one, [session] * getattr(session, "devices", 1), samples, stop)) as parts:
        for part in parts:
            whole.update(part)
            count += 1
    return whole.hexdigest(), count, names


def digested(manifest: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What a digest is made of: (names of the exact outputs, value ids where there is none). Raises ArtifactError where nothing is exact."""
    exact = exact_values(manifest)
    if not exact:
        raise ArtifactError("no value of this library has the same bits on every CPU: all of it is computed in float, and has no digest")
    kept = manifest.get("state", {}).values()  # a session doesn't hand these out
    ports = {manifest["layouts"][v]["offset"] for v in exact if manifest["layouts"][v]["space"] == "output"}
    return [p["name"] for i, p in enumerate(manifest["outputs"]) if i in ports and p["name"] not in kept], exact[-1:]
