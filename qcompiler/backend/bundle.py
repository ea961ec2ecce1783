"""Deployment bundles: a compiled library with headers, a CMake package, an example and a runner, for machines without Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qcompiler
from qcompiler.backend.aar import ABIS, api_level, write_aar
from qcompiler.backend.artifact import RUNTIME
from qcompiler.backend.programs import build_runner
from qcompiler.backend.static_library import identifier, write_static
from qcompiler.backend.toolchain import find_compiler
from qcompiler.base.errors import OutputError, TargetError
from qcompiler.base.files import new_folder
from qcompiler.base.targets import Target, find_target, load_targets
from qcompiler.runtime.elf import mapped, read_section
from qcompiler.runtime.library import MANIFEST_SECTION, check_complete, on_gpu, read_manifest
from qcompiler.runtime.shapes import of_inputs, specializations, spelled

HEADERS = ("qcompiler.h", "loader.h", "pool.h", "qcompiler.hpp", "pool.hpp")

# How CMake spells the processors (CMAKE_SYSTEM_PROCESSOR, from uname -m or a toolchain file).
_PROCESSORS = {"x86_64": "x86_64|AMD64|amd64", "aarch64": "aarch64|arm64|ARM64", "armv7a": "armv7.*|arm|armhf|armv8l"}
_OF_THE_SYSTEM = ("c", "dl", "gcc_s", "m", "pthread", "rt", "stdc++", "util")  # what every program links, or may: -lm must not find a network
_C_TYPES = {"float32": "float", "float64": "double", "bool": "bool"} | {f"{u}int{b}": f"std::{u}int{b}_t" for u in ("", "u") for b in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Bundle:
    """A written bundle: its folder, the target it is for, and the bytes of every file in it by relative path."""

    folder: Path
    target: str
    files: Mapping[str, int]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())


def make_bundle(library: str | os.PathLike[str], output: str | os.PathLike[str], static: bool = False) -> Bundle:
    """Write everything a device needs to run `library` into the new folder `output`.

    The folder appears only when it is complete. `bin/qc_run` is built with the compiler of the library's target. static: the network also as a static
    archive, with a header and a CMake package of its own (static_library.py).

    Raises ArtifactError for a library that is damaged or not ours, TargetError when its compiler is missing or fails, OutputError when `output` exists
    already and is not an empty folder, or can't be written, or when the library has the name of a system library ("m.so").
    """
    library, output = Path(library), Path(output)
    manifest = read_manifest(library)
    check_complete(mapped(library), library)
    if _stem(library) in _OF_THE_SYSTEM:
        raise OutputError(f"{library}: in a bundle this would be lib{_stem(library)}.so, a name of the system's own; rename the file, to network.so, say")
    target = _target_of(manifest)
    find_compiler(target)
    with new_folder(output) as folder:
        _fill(folder, library, manifest, target, static)
    files = {str(p.relative_to(output)): p.stat().st_size for p in sorted(output.rglob("*")) if p.is_file()}
    return Bundle(output, str(manifest["target"]), files)


def _stem(library: Path) -> str:
    return library.name.removesuffix(".so").removeprefix("lib")


def _target_of(manifest: Mapping[str, Any]) -> Target:
    """The row of targets.yaml that a library was compiled for; one of the same triple for a row that this installation does not know."""
    row = load_targets().get(manifest["target"])
    if row is not None and row.triple == manifest["triple"]:
        return row
    try:
        return find_target(manifest["triple"])
    except TargetError as error:
        raise TargetError(f"the library is for {manifest['triple']} ({manifest['target']}), and no target of this installation is for it: {error}") from error


def _fill(folder: Path, library: Path, manifest: dict[str, Any], target: Target, static: bool) -> None:
    stem = _stem(library)
    name = f"lib{stem}.so"  # as linkers look for it
    for part in ("lib/cmake/qcompiler", "include/qcompiler", "bin"):
        (folder / part).mkdir(parents=True)
    shutil.copyfile(library, folder / "lib" / name)
    for header in HEADERS:
        shutil.copyfile(RUNTIME / "include" / "qcompiler" / header, folder / "include" / "qcompiler" / header)
    shutil.copytree(RUNTIME / "bundle" / "example", folder / "example", ignore=shutil.ignore_patterns("__pycache__"))
    runner = folder / "bin" / "qc_run"
    build_runner(runner, target)

    _, architecture = read_section(library, MANIFEST_SECTION)
    facts = {
        "LIBRARY": name,
        "ARCHITECTURE": architecture,
        "PROCESSORS": _PROCESSORS.get(architecture, architecture),
        "TARGET": manifest["target"],
        "SYSTEMS": "Android" if target.android else "Linux|Generic",
    }
    (folder / "lib" / "cmake" / "qcompiler" / "qcompiler-config.cmake").write_text(_expand("qcompiler-config.cmake.in", facts))
    inputs, outputs = manifest["inputs"], manifest["outputs"]
    first, last = (inputs or outputs)[0], outputs[0]
    facts |= {
        "MODEL": str(manifest.get("model") or library.stem),
        "VERSION": qcompiler.__version__,
        "TRIPLE": manifest["triple"],
        "NEEDS": _needs(manifest),
        "LIBC": _libc(target, library, runner),
        "STEM": stem,
        "LIBRARY_SIZE": f"{library.stat().st_size} bytes",
        "RUN_SIZE": f"{runner.stat().st_size} bytes",
        "PORTS": _ports(inputs, outputs) + _shapes(manifest),
        "INPUT_OPTIONS": " ".join(f"--input '{p['name']}=input{i}.npy'" for i, p in enumerate(inputs)),
        "INPUT_NAME": json.dumps(first["name"], ensure_ascii=False),
        "INPUT_TYPE": _C_TYPES.get(first["dtype"], first["dtype"]),
        "OUTPUT_NAME": json.dumps(last["name"], ensure_ascii=False),
        "OUTPUT_TYPE": _C_TYPES.get(last["dtype"], last["dtype"]),
    }
    readme = _expand("README.md.in", facts)
    if target.android:
        readme += _fill_android(folder, folder / "lib" / name, target, facts)
    if static:
        readme += _fill_static(folder, library, manifest, target, facts)
    (folder / "README.md").write_text(readme)


def _fill_android(folder: Path, library: Path, target: Target, facts: dict[str, str]) -> str:
    """The archive for Gradle, and the sources of its Java class and native half; returns the README's section about them."""
    shutil.copytree(RUNTIME / "bundle" / "jni", folder / "jni")
    name, archive = identifier(facts["STEM"]), folder / f"{facts['STEM']}.aar"
    has_class = write_aar(archive, library, target, folder / "include")
    use = "class" if has_class else "no-class"
    facts = facts | {"API": str(api_level(target)), "ABI": ABIS[target.architecture], "AAR": archive.name, "NAME": name}
    return _expand("android.md.in", facts) + _expand(f"android-{use}.md.in", facts)


def _fill_static(folder: Path, library: Path, manifest: dict[str, Any], target: Target, facts: dict[str, str]) -> str:
    """The archive with its header and CMake package; returns the README's section about it."""
    name, archive = identifier(facts["STEM"]), folder / "lib" / f"lib{facts['STEM']}.a"
    write_static(library, manifest, target, facts["STEM"], archive)
    facts = facts | {"NAME": name, "ARCHIVE": archive.name, "ARCHIVE_SIZE": f"{archive.stat().st_size} bytes"}
    header, package = folder / "include" / "qcompiler" / "model" / f"{name}.h", folder / "lib" / "cmake" / f"qcompiler_{name}"
    header.parent.mkdir()
    package.mkdir()
    header.write_text(_expand("model.h.in", facts))
    (package / f"qcompiler_{name}-config.cmake").write_text(_expand("static-config.cmake.in", facts))
    return _expand("static.md.in", facts)


def _needs(manifest: Mapping[str, Any]) -> str:
    features = ", ".join(manifest["features"])
    if on_gpu(manifest):
        return f"Needed: an NVIDIA driver, and a GPU of architecture {features} or later"
    return f"CPU features needed: {features or 'no more than the architecture has'}"


class _Template(string.Template):
    """@NAME@, as CMake's configure_file has it."""

    delimiter = "@"
    pattern = r"@(?:(?P<named>[A-Z_]+)@|(?P<escaped>(?!))|(?P<braced>(?!))|(?P<invalid>(?!)))"  # type: ignore[assignment]


def _expand(template: str, facts: Mapping[str, str]) -> str:
    return _Template((RUNTIME / "bundle" / template).read_text()).substitute(facts)


def _ports(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> str:
    rows = ["| | name | type | shape | scale | zero point |", "|---|---|---|---|---|---|"]
    for what, ports in (("input", inputs), ("output", outputs)):
        for p in ports:
            quantization = [f"{p['scale']:.6g}", str(p["zero_point"])] if p.get("scale") else ["none", "none"]
            rows.append(f"| {what} | `{p['name']}` | {p['dtype']} | {p['shape']} | {' | '.join(quantization)} |")
    return "\n".join(rows)


def _shapes(manifest: Mapping[str, Any]) -> str:
    """The shapes of a library that has several, as a list."""
    if "shapes" not in manifest:
        return ""
    padding = "".join(f", `{name}` with {rule}" for name, rule in manifest.get("padding", {}).items())
    what = f"Inputs of lengths in between are padded{padding.replace(',', ':', 1)}." if padding else "Inputs of other shapes are refused."
    rows = "\n".join(f"- {spelled(of_inputs(m))}" for m in specializations(manifest))
    return f"\n\nAbove is the first of the shapes that it runs at:\n\n{rows}\n\n{what}"


def _libc(target: Target, library: Path, runner: Path) -> str:
    if target.android:
        return f"libc and libm only (Android of API level {api_level(target)}, or later; 24 is Android 7.0)"
    return f"libc, libm and pthread only (glibc {_glibc(library)} or later; `bin/qc_run` needs {_glibc(runner)})"


def _glibc(path: Path) -> str:
    """The newest symbol version of glibc that the file asks for (their names stand in its dynamic string table)."""
    found = re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?=[.\0])", path.read_bytes())
    return ".".join(map(str, max(((int(a), int(b)) for a, b in found), default=(2, 0))))
