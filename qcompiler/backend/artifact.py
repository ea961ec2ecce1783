"""The artifact: one shared library with code, packed weights and a JSON manifest, built reproducibly and read without executing it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.backend.toolchain import compiler_words, link_words
from qcompiler.base.arguments import checks_arguments
from qcompiler.base.errors import TargetError
from qcompiler.base.files import replacing, temporary_folder
from qcompiler.base.targets import Target
from qcompiler.runtime.library import CHECKSUM_MAGIC, FORMAT_VERSION, checksum
from qcompiler.runtime.reference import ImportCheck
from qcompiler.runtime.shapes import REPEAT, kinds, specializations

if TYPE_CHECKING:  # a session reads manifests with this file, and needs no compiler
    from qcompiler.backend.lowering import Port, Program

NUMERICS_VERSION = 1
ENTRY = "qc_run"
CONSTANTS_SECTION = ".qc.constants"
CODE_SECTION = ".qc.code"  # zlib: the object file before linking, of which `bundle --static` makes an archive; not loaded with the library

# Weights and manifest enter the library as they are; .incbin keeps them out of the compiler. Read-only data is mapped, not copied, at load.
_DATA = """
    .section .qc.constants,"a",%progbits
    .balign 64
    .globl qc_constants
    .hidden qc_constants
    .type qc_constants, %object
qc_constants:
    .incbin "constants.bin"
    .size qc_constants, . - qc_constants
    .section .qc.manifest,"a",%progbits
    .globl qc_manifest
    .hidden qc_manifest
    .type qc_manifest, %object
qc_manifest:
    .incbin "manifest.json"
    .globl qc_manifest_end
    .hidden qc_manifest_end
qc_manifest_end:
    .byte 0
    .section .note.GNU-stack,"",%progbits
"""
_CODE = """
    .section .qc.code,"",%progbits
    .incbin "code.z"
"""


# Only the C interface is visible: two libraries in one process never see each other's symbols.
_EXPORTS = "{ global: qc_*; local: *; };\n"

RUNTIME = Path(__file__).resolve().parent.parent / "runtime" / "cpp"
COMPILE = ("-fPIC", "-O2", "-std=gnu11", "-fvisibility=hidden", "-I.", f"-I{RUNTIME / 'include'}")
_DTYPES = {  # qc_dtype
    **{"float32": 0, "int8": 1, "uint8": 2, "int32": 3, "int64": 4, "bool": 5, "float64": 6, "int16": 7, "float16": 8},
    **{"uint16": 9, "uint32": 10, "uint64": 11},
}


@dataclass(frozen=True)
class Artifact:
    """A compiled library in memory. `library` is the whole shared library; `manifest` is the JSON object inside it.

    `imported`: how the float network that it was made from compares with another runtime, where it was. It is not in the library, whose bytes depend on
    the inputs of the compilation alone.
    """

    library: bytes
    manifest: dict[str, Any]
    imported: ImportCheck | None = None

    @property
    def size(self) -> int:
        """Bytes of the shared library."""
        return len(self.library)

    @property
    def digest(self) -> str:
        """SHA-256 of the shared library, hexadecimal."""
        return hashlib.sha256(self.library).hexdigest()

    @checks_arguments
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the library to `path`, beside it first and then renamed, so that no half-written file is left. Raises OutputError."""
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(self.library)
        return Path(path)


def program_manifest(program: Program) -> dict[str, Any]:
    """What the runtime and `inspect` need to know of a program: ports, memory, steps, values. Inexact steps are those in float, and those that read what they
    make: their last bits may differ between CPUs."""

    def layout(value: str) -> dict[str, Any]:
        v = program.values[value]
        assert v.place is not None
        entry: dict[str, Any] = {"shape": list(v.layout.shape), "storage": v.layout.dtype, "space": v.place.space, "offset": v.place.offset}
        if not v.layout.dense:
            entry |= {"halo": list(v.layout.halo), "pitch": v.layout.channel_pitch}
        if v.unsigned:
            entry["unsigned"] = True
        return entry

    inexact: set[str] = set()
    for s in program.steps:
        if not s.name.startswith("qc.") or s.name.startswith("qc.f32.") or inexact & set(s.reads):
            inexact |= {s.writes, *s.more}
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
                "macs": s.images * s.kernel.macs,
                "params": s.params,
                **({"images": s.images} if s.images > 1 else {}),
                **({"launch": list(s.kernel.launch)} if s.kernel.launch else {}),
                **({"auxiliary": True} if s.auxiliary else {}),
                **({"inexact": True} if s.writes in inexact else {}),
                **({"more": s.more} if s.more else {}),
            }
            for s in program.steps
        ],
        "layouts": {v: layout(v) for v in program.values},
    }


def port_parameters(program: Program, values: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's ports, with `scale` and `zero_point` of the first (outputs: last) integer value behind them where there is
    one, and `stored` where that has 16 bits.

    `values` is the manifest's {value id: {"scale", "zero_point"}}.
    """
    behind = {p.value: s.writes for p in program.inputs for s in program.steps if s.name == "qc.quantize" and p.value in s.reads}
    behind |= {s.writes: s.reads[0] for s in program.steps if s.name == "qc.dequantize"}

    def ports(described: list[Port]) -> list[dict[str, Any]]:
        found = {p.name: values.get(p.value) or values.get(behind.get(p.value, ""), {}) for p in described}
        found |= {p.name: {**found[p.name], "stored": "int16"} for p in described if (v := behind.get(p.value)) and program.values[v].layout.dtype == "int16"}
        return [{"name": p.name, "shape": list(p.shape), "dtype": p.dtype, **found[p.name]} for p in described]

    return {"inputs": ports(program.inputs), "outputs": ports(program.outputs)}


def entry_name(index: int) -> str:
    """The entry point of a library's shape number `index`, in its object code."""
    return f"{ENTRY}_{index}" if index else ENTRY


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """Canonical JSON, with a digest of itself: {"digest": sha256 of the rest, ...}."""
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return json.dumps({"digest": hashlib.sha256(body.encode()).hexdigest(), "manifest": manifest}, sort_keys=True, separators=(",", ":")).encode()


def _feature_test(target: Target, features: Sequence[str]) -> str:
    """A C expression: the name of the first of `features` that the CPU lacks, or 0."""
    expression = "(const char*)0"
    for feature in reversed(() if target.gpu else features):  # a GPU is looked at when a session is made
        expression = f'({target.cpu_test(feature)} ? {expression} : "{feature}")'
    return expression


def _c_string(text: str) -> str:
    """A C string literal of `text` in UTF-8: any character is allowed in names."""
    return '"' + "".join(chr(b) if 32 <= b < 127 and b not in b'"\\\\?' else f"\\{b:03o}" for b in text.encode()) + '"'


def _model_header(manifest: dict[str, Any], target: Target) -> str:
    """model.h: what the C runtime knows of the model, for qc_model.c."""

    def port_bytes(port: dict[str, Any]) -> int:
        return int(math.prod(port["shape"])) * int(np.dtype(port["dtype"]).itemsize)

    def info(port: dict[str, Any]) -> str:
        shape = ", ".join(map(str, port["shape"])) or "0"
        if len(port["shape"]) > 8:
            raise TargetError(f"port '{port['name']}' has rank {len(port['shape'])}; the runtime supports at most 8")
        quantization = f"{float(port.get('scale') or 0.0)!r}f, {int(port.get('zero_point') or 0)}"
        return f"{{{_c_string(port['name'])}, (qc_dtype){_DTYPES[port['dtype']]}, {len(port['shape'])}, {{{shape}}}, {port_bytes(port)}u, {quantization}}}"

    shapes = specializations(manifest)
    kind_of, rules = kinds(shapes), manifest.get("padding", {})
    lines = ["#include <cpuid.h>" if target.architecture == "x86_64" else ""]
    if target.architecture == "x86_64":
        lines.append("__attribute__((unused)) static int qc_cpuid7(unsigned subleaf, int which, int bit) {")
        lines.append("  unsigned r[4] = {0}; return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[which] >> bit & 1); }")
    lines.append(f"#define QC_TILES {int('amx_tile' in manifest['features'])}")
    lines += [f"#define QC_SHAPES {len(shapes)}", f"#define QC_AXES {max(kind_of.values(), default=0)}", f"#define QC_PADDED {int(bool(rules))}"]
    for name, what in (("INPUT", "inputs"), ("OUTPUT", "outputs")):
        at_each = ", ".join(f"(const qc_tensor_info[]){{{', '.join(map(info, m[what]))}}}" for m in shapes)
        axes = (f"{{{', '.join(str(kind_of.get((what, p['name'], a), 0)) for a in range(8))}}}" for p in manifest[what])
        lines += [f"#define QC_{name}_COUNT {len(manifest[what])}", f"#define QC_{name}S {at_each}", f"#define QC_{name}_AXES {', '.join(axes)}"]
        most = ", ".join(f"{max(port_bytes(m[what][i]) for m in shapes)}u" for i in range(len(manifest[what]))) or 0
        lines.append(f"#define QC_MOST_{name} {most}")
    lines.append(f"#define QC_PADS {', '.join(_pad_rule(rules.get(p['name'])) for p in manifest['inputs'])}")
    lines.append(f"#define QC_ENTRIES(X) {'' if target.gpu else ' '.join(f'X({entry_name(i)})' for i in range(len(shapes)))}")
    lines += [f"#define QC_WORKSPACE {max(m['workspace'] for m in shapes)}u", f"#define QC_CONSTANTS {manifest['constants']}u"]
    lines.append(f"#define QC_STEP_COUNTS {', '.join(str(len(m['steps'])) for m in shapes)}")
    numbers = [{p["name"]: i for i, p in enumerate(manifest[ports])} for ports in ("inputs", "outputs")]
    state = manifest.get("state", {})
    pairs = (f"{{{numbers[0][i]}, {numbers[1][o]}, {_first_bytes(manifest, i)}}}" for i, o in state.items())
    lines += [f"#define QC_STATE_COUNT {len(state)}", f"#define QC_STATES {', '.join(pairs)}"]
    test = manifest.get("selftest", {"vectors": 0, "probes": []})
    lines += [f"#define QC_VECTORS {test['vectors']}", f"#define QC_PROBE_COUNT {len(test['probes'])}"]
    lines.append(f"#define QC_PROBES {', '.join(_probe(p, manifest['layouts'][p['value']]) for p in test['probes'])}")
    lines.append(f"#define QC_TARGET {_c_string(manifest['target'])}")
    return "\n".join([*lines, f"#define QC_MISSING_FEATURE {_feature_test(target, manifest['features'])}", ""])


def _first_bytes(manifest: dict[str, Any], name: str) -> str:
    """What a state is in the first run: a C string that is repeated, and its length."""
    dtype = next(p["dtype"] for p in manifest["inputs"] if p["name"] == name)
    data = np.asarray(manifest.get("initial", {}).get(name, 0), dtype).tobytes()
    data = data if any(data) else b"\0"
    return f'"{"".join(f"{chr(92)}{byte:03o}" for byte in data)}", {len(data)}u'


def _probe(probe: dict[str, Any], layout: dict[str, Any]) -> str:
    """A model_probe of qc_model.h."""
    shape, size = layout["shape"], np.dtype(layout["storage"]).itemsize
    numbers = [1, 1, 1, math.prod(shape), 0, 0, 1, 1, math.prod(shape)]  # n, rows, columns, pitch, top, left, height, width, channels
    if "halo" in layout:
        top, left, bottom, right = layout["halo"]
        n, height, width, channels = shape
        numbers = [n, top + height + bottom, left + width + right, layout["pitch"], top, left, height, width, channels]
    sums = ", ".join(f"{{0x{a}u, 0x{b}u}}" for a, b in probe["sums"])
    offset = 128 if layout["storage"] == "uint8" and "unsigned" not in layout else 0
    place = [probe["step"], int(layout["space"] == "output"), layout["offset"], *numbers, size, offset]
    return f"{{{_c_string(probe['value'])}, {', '.join(map(str, place))}, (const uint64_t[][2]){{{sums}}}}}"


def _pad_rule(rule: Any) -> str:
    """A pad_rule of qc_model.h."""
    if rule is None:
        return "{0, 0.0}"
    return "{2, 0.0}" if rule == REPEAT else f"{{1, {float(rule)!r}}}"


def _with_checksum(library: bytes) -> bytes:
    """The library with the trailer that loaders check (runtime/cpp/include/qcompiler/loader.h) behind its last ELF byte."""
    padding = bytes(-len(library) % 4)
    return b"".join((library, padding, CHECKSUM_MAGIC, checksum(library + padding if padding else library)))


def link(code: bytes, constants: np.ndarray, manifest: dict[str, Any], target: Target, lasting: bool = True) -> Artifact:
    """Link object code, constants and manifest into a shared library. The same arguments give the same bytes. lasting: no, for one that lives as long as this
    process: it takes less time to make, there can be no archive of it, and on a CPU its sessions are given the constants, which are not in it.

    Raises TargetError when the linker is missing or fails.
    """
    from qcompiler.backend.runtime_objects import runtime_objects  # not above: it needs TVM, and sessions need this file

    manifest = {"format": FORMAT_VERSION, "numerics": NUMERICS_VERSION, **manifest}
    compiler = compiler_words(target)
    with temporary_folder() as folder:
        inside = (constants if lasting or target.gpu else constants[:0]).data
        sources = write_sources(folder, code, inside, encode_manifest(manifest), manifest, target)
        (folder / "code.z").write_bytes(zlib.compress(code, 9) if lasting else b"")
        with (folder / "data.s").open("a") as file:
            file.write(_CODE)
        (folder / "exports.map").write_text(_EXPORTS)
        # No build id, no path, no time stamp: nothing but the inputs decides the bytes.
        objects = runtime_objects(folder, sources, [*compiler, *COMPILE], target)
        command = [*compiler, "-shared", "-o", "out.so", *objects, "-x", "assembler", "data.s", "-x", "none", "code.o"]
        command += [*link_words(target, "m", "pthread", *(["dl"] if target.gpu else []))]
        command += ["-Wl,--build-id=none", "-Wl,--version-script=exports.map", "-Wl,-Bsymbolic", "-Wl,--gc-sections", "-s"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"linking for '{target.name}' with {compiler[0]} failed: {done.stderr.strip()[:600]}")
        return Artifact(_with_checksum((folder / "out.so").read_bytes()), manifest)


def write_sources(folder: Path, code: bytes, constants: bytes | memoryview, encoded: bytes, manifest: dict[str, Any], target: Target) -> list[str]:
    """What a library is linked from: code.o, data.s, and C sources, whose names are returned. `encoded`: the manifest as JSON. Compile it with COMPILE."""
    (folder / "code.o").write_bytes(code)
    (folder / "constants.bin").write_bytes(constants)
    (folder / "manifest.json").write_bytes(encoded)
    (folder / "data.s").write_text(_DATA)
    (folder / "model.h").write_text(_model_header(manifest, target))
    sources = [
        "qc_model.c",
        "qc_runtime.c",
        "qc_selftest.c",
        "qc_cuda.c" if target.gpu else "qc_threads.c",
        *(["qc_arm32.c"] if target.host_architecture == "armv7a" else []),
        *(["qc_bionic.c"] if target.android else []),
    ]
    for name in (*sources, "qc_engine.h", "qc_launches.h", "qc_model.h", "qc_shapes.h"):
        shutil.copy(RUNTIME / name, folder)
    return sources
