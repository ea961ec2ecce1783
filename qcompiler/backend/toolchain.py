"""The C compilers of targets: cross compilers on PATH; for Android clang of the NDK, or any clang with a sysroot of Android's C library, bionic."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from qcompiler.base.debug import switch
from qcompiler.base.errors import TargetError
from qcompiler.base.host import host_architecture
from qcompiler.base.targets import Target

_NDK = ("ANDROID_NDK_HOME", "ANDROID_NDK_ROOT", "ANDROID_NDK_LATEST_HOME", "ANDROID_NDK")  # as Gradle, CMake and hosted runners name it
_SDK = ("ANDROID_HOME", "ANDROID_SDK_ROOT")
_BIN = "toolchains/llvm/prebuilt/*/bin"
_SYSROOT = "QCOMPILER_ANDROID_SYSROOT"


def find_compiler(target: Target) -> str:
    """The compiler that `compiler_words` begin with. Raises TargetError naming what to install."""
    return compiler_words(target)[0]


def compiler_words(target: Target) -> list[str]:
    """The C++ compiler of a target, the first of its list that is installed, and the options that every call of it has. Raises TargetError naming what to
    install."""
    if target.android:
        # Neither a helper function for atomic operations nor one of the compiler's own library: what a library needs is in libc and in our own sources.
        return [*_android(target), *(["-mno-outline-atomics"] if target.architecture == "aarch64" else [])]
    if found := _on_path(target):
        return [found]
    package = "g++" if target.host_architecture == host_architecture() else target.package
    install = f"; install one, on Debian or Ubuntu with: apt-get install {package}" if package else "; install one"
    raise TargetError(f"target '{target.name}' needs one of the compilers {', '.join(target.compiler)} to link, and none is on PATH{install}")


def _on_path(target: Target) -> str | None:
    """The first of a target's compilers that is on PATH."""
    return next((found for name in target.compiler if (found := shutil.which(name))), None)


def link_words(target: Target, *libraries: str) -> list[str]:
    """What a shared library or a program is linked with, behind its objects. libraries: of the system, such as "m"; bionic has those of POSIX in its libc.

    Android loads a file by pages, which are 4 or 16 kB (https://developer.android.com/guide/practices/page-sizes)."""
    if not target.android:
        return [f"-l{name}" for name in libraries]
    return [*(f"-l{n}" for n in libraries if n != "pthread"), "-lc", "-Wl,-z,max-page-size=16384", "-Wl,--hash-style=gnu", "-Wl,--no-undefined"]


def check_cplusplus(target: Target) -> None:
    """Raises TargetError where C++ can't be compiled for a target: a bare sysroot has no C++ runtime, nor what unwinds the stack."""
    if target.android and _sysroot(target):
        raise TargetError(
            f"target '{target.name}': qc_run is C++ and needs the Android NDK, of which {_SYSROOT} or the row's 'sysroot' replaces the C library alone; "
            "unset it, and set ANDROID_NDK_HOME to an NDK's folder"
        )


def _sysroot(target: Target) -> str:
    return switch(_SYSROOT) or target.sysroot


def _android(target: Target) -> list[str]:
    """The most specific that was asked for: a sysroot, an NDK, a compiler on PATH, the newest NDK in a folder of Android's SDK."""
    if _sysroot(target):
        return _clang_with(Path(_sysroot(target)), target)
    for variable in _NDK:
        folder = os.environ.get(variable)
        if folder:
            found = next(_in_ndk(Path(folder), target), None)
            if found is None:
                raise TargetError(f"target '{target.name}': {variable} is {folder}, where no {_BIN}/{target.compiler[0]} is; set it to the folder of an NDK")
            return [found]
    if found := _on_path(target):
        return [found]
    for variable in _SDK:
        versions = [p for p in Path(os.environ.get(variable) or "/nowhere").glob("ndk/*") if re.fullmatch(r"[\d.]+", p.name)]
        for version in sorted(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], reverse=True):
            for path in _in_ndk(version, target):
                return [path]
    raise TargetError(
        f"target '{target.name}' needs the Android NDK to link, and none was found: get it from https://developer.android.com/ndk/downloads or with Android "
        f"Studio's SDK Manager, and set ANDROID_NDK_HOME to its folder; or install clang and lld, and set {_SYSROOT} to the sysroot of an NDK"
    )


def _in_ndk(folder: Path, target: Target) -> Iterator[str]:
    return (str(p) for name in target.compiler for p in sorted(folder.glob(f"{_BIN}/{name}")) if os.access(p, os.X_OK))


def _clang_with(sysroot: Path, target: Target) -> list[str]:
    if not (sysroot / "usr" / "include").is_dir():
        raise TargetError(f"target '{target.name}': the sysroot {sysroot} has no usr/include; it is toolchains/llvm/prebuilt/*/sysroot of an NDK")
    clang = _clang(os.environ.get("PATH", ""))
    if clang is None:
        raise TargetError(f"target '{target.name}': linking with a sysroot takes clang and lld, and they are not on PATH; on Debian: apt-get install clang lld")
    triple = target.compiler[0].removesuffix("-clang")  # with the level of the API, as in aarch64-linux-android24
    return [clang, f"--target={triple}", f"--sysroot={sysroot.resolve()}", "-fuse-ld=lld", "-nodefaultlibs", "-Qunused-arguments"]


@functools.cache
def _clang(path: str) -> str | None:
    """The newest clang of the search path that has a linker for all architectures."""
    numbered = {p.name for folder in path.split(os.pathsep) if folder for p in Path(folder).glob("clang-*") if re.fullmatch(r"clang-\d+", p.name)}
    for name in ["clang", *sorted(numbered, key=lambda n: int(n[6:]), reverse=True)]:
        found = shutil.which(name, path=path)
        if found:
            done = subprocess.run([found, "-print-prog-name=ld.lld"], capture_output=True, text=True)
            if done.returncode == 0 and Path(done.stdout.strip()).is_absolute():
                return found
    return None
