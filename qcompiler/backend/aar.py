"""A library as an Android archive (.aar), which an app's Gradle build takes as one dependency, for Java, Kotlin and native code.

    AndroidManifest.xml
    classes.jar                   qcompiler.Network, where a Java compiler and the NDK's jni.h are there
    jni/ABI/libNAME.so            the network, which Gradle puts into the app
    jni/ABI/libqc_jni.so          the native half of the class
    prefab/                       package qcompiler_NAME with the module `model`: headers and the network, for CMake's find_package and for ndk-build

The package is of version 2 of Prefab's schema (https://google.github.io/prefab), which Gradle's Android plugin reads from 7.0 on. The same library and tools
give the same bytes.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path

import qcompiler
from qcompiler.backend.artifact import RUNTIME
from qcompiler.backend.static_library import identifier
from qcompiler.backend.toolchain import compiler_words, link_words
from qcompiler.base.errors import TargetError
from qcompiler.base.files import temporary_folder
from qcompiler.base.targets import Target

ABIS = {"aarch64": "arm64-v8a", "armv7a": "armeabi-v7a"}
"""Android's names of architectures."""

JAVA = "8"  # of the class: what every version of Android's tools takes
_JNI = RUNTIME / "bundle" / "jni"


def api_level(target: Target) -> int:
    """Of Android, from which on libraries run: the compiler has it in its name (aarch64-linux-android24-clang)."""
    found = re.search(r"\d+(?=-clang)", target.compiler[0])
    return int(found[0]) if found else 24


def write_aar(path: Path, library: Path, target: Target, headers: Path) -> bool:
    """Write the archive of a complete library `libNAME.so`. headers: a folder that has them in its folder `qcompiler`.

    Returns whether it has the Java class. Raises TargetError where the native half can't be built.
    """
    abi, api = ABIS[target.architecture], api_level(target)
    name, symbol = library.name, identifier(library.stem.removeprefix("lib"))
    model = "prefab/modules/model"
    files = {
        "AndroidManifest.xml": _manifest(symbol, api),
        f"jni/{abi}/{name}": library.read_bytes(),
        "prefab/prefab.json": _json({"schema_version": 2, "name": f"qcompiler_{symbol}", "version": _version(), "dependencies": []}),
        f"{model}/module.json": _json({"export_libraries": [], "library_name": library.stem, "android": {}}),
        f"{model}/libs/android.{abi}/abi.json": _json({"abi": abi, "api": api, "ndk": _ndk(target), "stl": "none", "static": False}),
        f"{model}/libs/android.{abi}/{name}": library.read_bytes(),
    }
    files |= {f"{model}/include/{p.relative_to(headers)}": p.read_bytes() for p in (headers / "qcompiler").glob("*.h*")}
    java = _java(library, target, headers)
    if java is not None:
        files |= {"classes.jar": java[0], f"jni/{abi}/libqc_jni.so": java[1]}
    path.write_bytes(zipped(files))
    return java is not None


def zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip archive, without the time of its making."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return made.getvalue()


def java_class() -> dict[str, bytes] | None:
    """qcompiler.Network, compiled, as the files of a jar; None without a Java compiler. Raises TargetError where that fails."""
    compiler = shutil.which("javac")
    if compiler is None:
        return None
    with temporary_folder() as folder:
        command = [compiler, "--release", JAVA, "-Xlint:-options", "-g:none", "-d", str(folder), str(_JNI / "Network.java")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"compiling the Java class with {compiler} failed: {done.stderr.strip()[:600]}")
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.class")}


def _java(library: Path, target: Target, headers: Path) -> tuple[bytes, bytes] | None:
    """(classes.jar, the class's native half linked with the network `library`); None where one of them can't be made here."""
    words = compiler_words(target)
    has_header = subprocess.run([*words, "-E", "-include", "jni.h", "-x", "c", "/dev/null"], capture_output=True).returncode == 0
    classes = java_class() if has_header else None
    if classes is None:
        return None
    with temporary_folder() as folder:
        path = folder / "libqc_jni.so"
        command = [*words, "-shared", "-fPIC", "-O2", f"-I{headers}", str(_JNI / "qc_jni.c"), f"-L{library.parent}", f"-l:{library.name}", "-o", str(path)]
        done = subprocess.run([*command, "-Wl,-soname,libqc_jni.so", "-Wl,--build-id=none", "-s", *link_words(target)], capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"building libqc_jni.so for '{target.name}' with {words[0]} failed: {done.stderr.strip()[:600]}")
        return zipped(classes), path.read_bytes()


def _manifest(name: str, api: int) -> bytes:
    android = "http://schemas.android.com/apk/res/android"
    text = f'<manifest xmlns:android="{android}" package="qcompiler.{name.lower()}">\n    <uses-sdk android:minSdkVersion="{api}" />\n</manifest>\n'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}'.encode()


def _json(document: Mapping[str, object]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _version() -> str:
    """Of this program, as CMake compares versions: numbers alone."""
    found = re.match(r"\d+(\.\d+){0,3}", qcompiler.__version__)
    return found[0] if found else "0"


def _ndk(target: Target) -> int:
    """The major version of the NDK whose compiler links for the target; 0 for another compiler."""
    for folder in Path(compiler_words(target)[0]).parents:
        properties = folder / "source.properties"
        if properties.is_file() and (found := re.search(r"Pkg\.Revision\s*=\s*(\d+)", properties.read_text())):
            return int(found[1])
    return 0
