"""Libraries for Android, linked with a sysroot of declarations and symbols (bionic.py): what they need, that they compute the bytes of this machine, and the
bundle with its JNI example. No phone, and no NDK."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from bionic import Sysroot, make_sysroot
from emulated import Host
from tools import require_programs, require_target

from qcompiler.backend import aar, toolchain
from qcompiler.backend import bundle as bundle_module
from qcompiler.backend.aar import write_aar
from qcompiler.backend.artifact import RUNTIME
from qcompiler.backend.bundle import Bundle, make_bundle
from qcompiler.backend.programs import build_measurer, build_runner
from qcompiler.backend.toolchain import compiler_words
from qcompiler.base.errors import TargetError
from qcompiler.base.targets import find_target, load_targets
from qcompiler.boards.board import Board
from qcompiler.boards.check import probe
from qcompiler.boards.transports import Answer
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.runtime.library import read_manifest
from qcompiler.runtime.session import Session

NAMES = ("arm64-android", "armv7-android")
LIKE = {"arm64-android": "arm64-neon", "armv7-android": "armv7-neon"}
SOURCES = Path(__file__).parent / "cpp"
VARIABLES = (*toolchain._NDK, *toolchain._SDK, toolchain._SYSROOT)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sysroot:
    return make_sysroot(tmp_path_factory.mktemp("sysroot"), [find_target(name) for name in NAMES])


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what may be set on this machine."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sysroot(bare: None, made: Sysroot, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sysroot]:
    monkeypatch.setenv("QCOMPILER_ANDROID_SYSROOT", str(made.folder))
    yield made


def undefined(path: Path) -> set[str]:
    table = run("readelf", "--dyn-syms", "--wide", path)
    assert "@" not in table  # no version of glibc's
    return {words[7] for words in map(str.split, table.splitlines()) if len(words) > 7 and words[6] == "UND"}


def check_loadable(path: Path, machine: str, beside: Sequence[str] = ()) -> None:
    """What Android's loader asks of a file: the machine, libraries that it has, no relocations in code, segments that pages of 16 kB hold."""
    header, dynamic, segments = run("readelf", "-h", path), run("readelf", "-d", path), run("readelf", "-lW", path)
    assert re.search(rf"Machine: +{machine}$", header, re.MULTILINE)
    assert set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)) <= {"libc.so", "libm.so", "libdl.so", *beside}
    assert "TEXTREL" not in dynamic and "(GNU_HASH)" in dynamic and "(HASH)" not in dynamic
    loaded = [line.split() for line in segments.splitlines() if line.lstrip().startswith("LOAD ")]
    assert loaded and {words[-1] for words in loaded} == {"0x4000"}


@pytest.mark.parametrize("name", NAMES)
def test_a_library_needs_what_bionic_has(sysroot: Sysroot, digits: Callable[[str], Path], name: str) -> None:
    target, library = find_target(name), digits(name)
    check_loadable(library, {"aarch64": "AArch64", "armv7a": "ARM"}[target.architecture])
    assert undefined(library) <= sysroot.wanted(target)
    assert (read_manifest(library)["target"], read_manifest(library)["triple"]) == (name, target.triple)
    if target.architecture == "armv7a":
        assert "hard-float" not in run("readelf", "-h", library)


@pytest.mark.parametrize("name", NAMES)
def test_what_measures_candidates_needs_libc_only(sysroot: Sysroot, tmp_path: Path, name: str) -> None:
    target = find_target(name)
    build_measurer(tmp_path / "qc_measure", target)
    check_loadable(tmp_path / "qc_measure", {"aarch64": "AArch64", "armv7a": "ARM"}[target.architecture])
    assert undefined(tmp_path / "qc_measure") <= sysroot.wanted(target)


SHIM = "#include <errno.h>\nint* __errno(void) { return &errno; }\n"


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_this_machine(sysroot: Sysroot, digits: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """The library as it is, in a program of glibc under an emulator: what it calls has the same meaning there, but for the name of errno."""
    gnu = find_target(LIKE[name])
    require_target(gnu)
    compiler, (port,) = gnu.compiler[0], read_manifest(digits(name))["inputs"]
    (tmp_path / "shim.c").write_text(SHIM)
    for library, more in (("libc.so", ["shim.c"]), ("libm.so", []), ("libdl.so", [])):
        run(compiler, "-x", "c", "-shared", "-fPIC", *more, *([] if more else ["/dev/null"]), f"-Wl,-soname,{library}", "-o", library, cwd=tmp_path)
    image = demo_data()[1][3][port["name"]]
    image.tofile(tmp_path / "input0.bin")
    library = bytearray(digits(name).read_bytes())
    if gnu.architecture == "armv7a":  # glibc's loader takes no file that says it passes floats in core registers; no float passes between the two
        assert int.from_bytes(library[36:40], "little") == 0x5000200  # e_flags: EABI 5, soft
        library[36:40] = (0x5000000).to_bytes(4, "little")
    (tmp_path / "model.so").write_bytes(library)
    done = Host.build(gnu, tmp_path).command(tmp_path / "model.so", tmp_path, "-E", f"LD_LIBRARY_PATH={tmp_path}")
    assert done.returncode == 0, done.stderr
    expected = Session(digits(find_target("native").name)).run({port["name"]: image})
    (output,) = expected.values()
    assert np.fromfile(tmp_path / "output0.bin", np.float32).tobytes() == output.tobytes()


def test_arithmetic_of_32_bits_needs_no_library_of_the_compiler(sysroot: Sysroot, tmp_path: Path) -> None:
    """Divisions and conversions of 64 bits in code of Android, through the functions that clang calls for them."""
    require_programs("libraries for Android", "qemu-arm-static")
    words = compiler_words(find_target("armv7-android"))
    words += ["-x", "c", "-std=gnu11", "-nostdlib", "-static", "-fno-builtin", f"-I{RUNTIME}", str(SOURCES / "arithmetic32.c")]
    for level in ("-O0", "-O2"):
        run(*words, level, "-o", tmp_path / "check")
        run("qemu-arm-static", "-cpu", "cortex-a8", tmp_path / "check")  # a core that has no division


# -- toolchains ------------------------------------------------------------------------------------------------------------------------------


def write_ndk(folder: Path, made: Sysroot) -> Path:
    """An NDK of one compiler, which is a script as the NDK's own are."""
    path = folder / "toolchains" / "llvm" / "prebuilt" / "linux-x86_64" / "bin" / "aarch64-linux-android24-clang"
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\nexec {made.clang} --target=aarch64-linux-android24 --sysroot={made.folder} -fuse-ld=lld -nodefaultlibs "$@"\n')
    path.chmod(0o755)
    return path


def test_where_an_ndk_is_looked_for(bare: None, made: Sysroot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = find_target("arm64-android")
    old, new = (write_ndk(tmp_path / "sdk" / "ndk" / version, made) for version in ("9.1.2", "27.0.1"))
    monkeypatch.setenv("ANDROID_HOME", str(tmp_path / "sdk"))
    assert compiler_words(target)[0] == str(new)
    monkeypatch.setenv("PATH", f"{old.parent}:{new.parent.parent}")
    assert compiler_words(target)[0] == str(old)
    named = write_ndk(tmp_path / "named", made)
    monkeypatch.setenv("ANDROID_NDK_ROOT", str(tmp_path / "named"))
    assert compiler_words(target)[0] == str(named)
    monkeypatch.setenv("ANDROID_NDK_HOME", str(tmp_path))
    with pytest.raises(TargetError, match=r"arm64-android': ANDROID_NDK_HOME is .*, where no toolchains/llvm/prebuilt/\*/bin/aarch64-linux-android24-clang is"):
        compiler_words(target)


def test_an_ndk_links_as_a_sysroot_does(sysroot: Sysroot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = find_target("arm64-android")
    build_measurer(tmp_path / "a", target)
    monkeypatch.delenv("QCOMPILER_ANDROID_SYSROOT")
    write_ndk(tmp_path / "ndk", sysroot)
    monkeypatch.setenv("ANDROID_NDK_HOME", str(tmp_path / "ndk"))
    build_measurer(tmp_path / "b", target)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_row_may_name_its_sysroot(bare: None, made: Sysroot, tmp_path: Path) -> None:
    row = "triple: aarch64-linux-android, tvm: {kind: llvm}, features: [asimd], rows: [arm64-neon], storage: int8"
    (tmp_path / "mine.yaml").write_text(f"targets: {{mine: {{{row}, compiler: [aarch64-linux-android29-clang], sysroot: {made.folder}}}}}")
    words = compiler_words(find_target("mine", tmp_path / "mine.yaml"))
    assert words[:3] == [made.clang, "--target=aarch64-linux-android29", f"--sysroot={made.folder}"]


def test_without_a_toolchain(bare: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", **{name: value[None] for name, value in demo_data()[0][0].items()})
    monkeypatch.setenv("PATH", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    words = ["compile", str(MODEL), "--calibration", str(tmp_path / "data.npz"), "-o", str(tmp_path / "x.so"), "--target"]
    assert main([*words, "arm64-android"]) == 2
    said = capsys.readouterr().err
    assert "target 'arm64-android' needs the Android NDK" in said
    assert "set ANDROID_NDK_HOME to its folder; or install clang and lld, and set QCOMPILER_ANDROID_SYSROOT" in said
    monkeypatch.setenv("QCOMPILER_ANDROID_SYSROOT", str(tmp_path))
    assert main([*words, "armv7-android"]) == 2
    assert f"the sysroot {tmp_path} has no usr/include" in capsys.readouterr().err
    (tmp_path / "usr" / "include").mkdir(parents=True)
    with pytest.raises(TargetError, match="takes clang and lld, and they are not on PATH"):
        compiler_words(find_target("arm64-android"))
    shutil.rmtree(tmp_path / "usr")
    assert sorted(tmp_path.iterdir()) == before


def test_rows_of_android_run_on_no_other_linux() -> None:
    rows = {name: target for name, target in load_targets().items() if target.android}
    assert set(rows) == {*NAMES, "arm64-android-dotprod", "arm64-android-i8mm"}
    for name, target in rows.items():
        twin = find_target(name.replace("-android", "") if name.count("-") > 1 else LIKE[name])
        assert (target.rows, target.features, target.storage, target.tvm["mattr"]) == (twin.rows, twin.features, twin.storage, twin.tvm["mattr"])
    assert not find_target("native").android


@pytest.mark.parametrize(("features", "missing"), [("half thumb neon", ()), ("fp asimd evtstrm", ()), ("half thumb vfpv3", ("neon",))])
def test_a_phone_of_64_bits_runs_libraries_of_32(features: str, missing: tuple[str, ...]) -> None:
    said = Answer(0, f"machine=aarch64\nlibc=bionic\nfeatures= {features}\n", "", {})
    device = SimpleNamespace(board=Board("phone", find_target("armv7-android"), "adb"), run=lambda *words, **files: said)
    found = probe(device)  # type: ignore[arg-type]
    assert (found.machine, found.libc, found.missing) == ("aarch64", "bionic", missing)


# -- bundles ---------------------------------------------------------------------------------------------------------------------------------


def write_something(path: Path, target: object) -> None:
    path.write_bytes(b"in the place of qc_run")


@pytest.fixture
def bundle(sysroot: Sysroot, digits: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr(bundle_module, "build_runner", write_something)
    return make_bundle(digits("arm64-android"), tmp_path / "device", static=True)


def test_a_bundle_has_a_library_of_java(bundle: Bundle, sysroot: Sysroot, tmp_path: Path) -> None:
    """qc_jni.c links with the network, by its file's name, and with nothing else; the archive has one symbol."""
    assert {"jni/qc_jni.c", "jni/Network.java", "jni/CMakeLists.txt", "arm64-android.aar"} <= set(bundle.files)
    readme = (bundle.folder / "README.md").read_text()
    assert "@" not in readme and "minSdk = 24" in readme and '"arm64-v8a"' in readme and "glibc" not in readme
    includes = [f"-I{SOURCES / 'jni'}", f"-I{bundle.folder / 'include'}"]
    words = [*compiler_words(find_target("arm64-android")), "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *includes, bundle.folder / "jni" / "qc_jni.c"]
    run(*words, f"-L{bundle.folder / 'lib'}", "-larm64-android", "-lc", "-Wl,--no-undefined", "-o", tmp_path / "libqc_jni.so")
    assert set(re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", tmp_path / "libqc_jni.so"))) == {"libarm64-android.so", "libc.so"}
    exported = {w.split()[-1] for w in run("nm", "-D", "--defined-only", tmp_path / "libqc_jni.so").splitlines()}
    natives = re.findall(r"native [\w\[\]]+ (\w+)\(", (bundle.folder / "jni" / "Network.java").read_text())
    assert exported == {f"Java_qcompiler_Network_{name}" for name in natives} and len(natives) == 3
    archive = run("nm", "--extern-only", "--defined-only", bundle.folder / "lib" / "libarm64-android.a").split()
    assert [w for w in archive if w.startswith("qc_library")] == ["qc_library_arm64_android"] and "__emutls_get_address" not in archive


def test_the_library_of_java_with_cmake(bundle: Bundle, sysroot: Sysroot, tmp_path: Path) -> None:
    require_programs("bundles with CMake", "cmake")
    system = ("-DCMAKE_SYSTEM_NAME=Android", "-DCMAKE_SYSTEM_VERSION=1", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")  # version 1: CMake looks for no NDK
    tools = (f"-DCMAKE_C_COMPILER={write_ndk(tmp_path, sysroot)}", f"-DCMAKE_C_FLAGS=-I{SOURCES / 'jni'}", "-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY")
    run("cmake", "-S", bundle.folder / "jni", "-B", tmp_path / "build", *system, *tools)
    run("cmake", "--build", tmp_path / "build")
    check_loadable(tmp_path / "build" / "libqc_jni.so", "AArch64", ["libarm64-android.so"])


PREFAB = "prefab/modules/model"
ABI = f"{PREFAB}/libs/android.arm64-v8a"
JAVA_MAIN = """
public class Main {
  public static void main(String[] words) {
    float[] image = new float[256];
    for (int i = 0; i < 256; ++i) image[i] = (i % 17) / 16f;
    try (qcompiler.Network network = new qcompiler.Network(2)) {
      try {
        network.run(new float[3]);
      } catch (IllegalArgumentException refused) {
        System.out.println("refused");
      }
      for (float value : network.run(image)[0]) System.out.println(Float.floatToIntBits(value));
    }
  }
}
"""


def test_an_archive_for_gradle(bundle: Bundle, sysroot: Sysroot, tmp_path: Path) -> None:
    """The parts of an .aar; the class, its native half and the network are of one kind; what Prefab reads is of its schema; the same again, byte for byte."""
    require_programs("classes of Java", "javac")
    target, path = find_target("arm64-android"), bundle.folder / "arm64-android.aar"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
        assert archive.testzip() is None and archive.namelist() == sorted(archive.namelist())
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    xml = ElementTree.parse(tmp_path / "AndroidManifest.xml").getroot()
    assert xml.get("package") == "qcompiler.arm64_android" and xml[0].get("{http://schemas.android.com/apk/res/android}minSdkVersion") == "24"
    with zipfile.ZipFile(tmp_path / "classes.jar") as jar:
        assert jar.namelist() == ["qcompiler/Network.class"]
        assert jar.read("qcompiler/Network.class")[:8] == b"\xca\xfe\xba\xbe\0\0\0\x34"  # of Java 8
    network = (bundle.folder / "lib" / "libarm64-android.so").read_bytes()
    for name in ("jni/arm64-v8a/libarm64-android.so", f"{PREFAB}/libs/android.arm64-v8a/libarm64-android.so"):
        assert (tmp_path / name).read_bytes() == network
        check_loadable(tmp_path / name, "AArch64")
    check_loadable(tmp_path / "jni" / "arm64-v8a" / "libqc_jni.so", "AArch64", ["libarm64-android.so"])
    exported = {w.split()[-1] for w in run("nm", "-D", "--defined-only", tmp_path / "jni/arm64-v8a/libqc_jni.so").splitlines()}
    assert exported == {f"Java_qcompiler_Network_{name}" for name in ("open", "destroy", "run")}
    write_aar(tmp_path / "again.aar", bundle.folder / "lib" / "libarm64-android.so", target, bundle.folder / "include")
    assert (tmp_path / "again.aar").read_bytes() == path.read_bytes()


def test_what_prefab_reads(bundle: Bundle, sysroot: Sysroot, tmp_path: Path) -> None:
    """Version 2 of its schema: every key it knows, of its type, and no other; a program compiles and links with what it points to."""
    with zipfile.ZipFile(bundle.folder / "arm64-android.aar") as archive:
        archive.extractall(tmp_path)
    package, module, abi = (json.loads((tmp_path / n).read_text()) for n in ("prefab/prefab.json", f"{PREFAB}/module.json", f"{ABI}/abi.json"))
    assert package == {"schema_version": 2, "name": "qcompiler_arm64_android", "version": package["version"], "dependencies": []}
    assert re.fullmatch(r"\d+(\.\d+(\.\d+(\.\d+)?)?)?", package["version"])
    assert module == {"export_libraries": [], "library_name": "libarm64-android", "android": {}}
    assert abi == {"abi": "arm64-v8a", "api": 24, "ndk": 0, "stl": "none", "static": False}
    assert {p.name for p in (tmp_path / ABI).iterdir()} == {"abi.json", f"{module['library_name']}.so"}
    (tmp_path / "user.c").write_text('#include "qcompiler/qcompiler.h"\nint ports(void) { return qc_input_count() + qc_output_count(); }\n')
    words = [*compiler_words(find_target("arm64-android")), "-shared", "-fPIC", "-Wall", "-Werror", f"-I{tmp_path / PREFAB / 'include'}"]
    run(*words, "user.c", str(tmp_path / ABI / "libarm64-android.so"), "-lc", "-Wl,--no-undefined", "-o", "libuser.so", cwd=tmp_path)
    assert "libarm64-android.so" in run("readelf", "-d", tmp_path / "libuser.so")


def test_an_archive_without_a_java_compiler(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the class nor its native half, and the README says so."""
    monkeypatch.setattr(aar.shutil, "which", lambda name: None if name == "javac" else shutil.which(name))
    library = bundle.folder / "lib" / "libarm64-android.so"
    assert not write_aar(tmp_path / "x.aar", library, find_target("arm64-android"), bundle.folder / "include")
    with zipfile.ZipFile(tmp_path / "x.aar") as archive:
        names = archive.namelist()
    assert "classes.jar" not in names and not any("qc_jni" in n for n in names) and f"{PREFAB}/module.json" in names
    assert "It has no Java class" in bundle_module._expand("android-no-class.md.in", {})


def test_the_class_runs_the_network(digits: Callable[[str], Path], tmp_path: Path) -> None:
    """qcompiler.Network and its native half for this machine, in a Java machine."""
    require_programs("classes of Java", "javac", "java")
    classes, library = aar.java_class(), digits(find_target("native").name)
    assert classes is not None
    for name, content in classes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    shutil.copy(library, tmp_path / "libnetwork.so")
    home = Path(shutil.which("javac") or "").resolve().parents[1] / "include"
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{home}", f"-I{home / 'linux'}", f"-I{RUNTIME / 'include'}", RUNTIME / "bundle/jni/qc_jni.c"]
    run(*command, "-L.", "-lnetwork", "-Wl,-rpath,$ORIGIN", "-o", "libqc_jni.so", cwd=tmp_path)
    (tmp_path / "Main.java").write_text(JAVA_MAIN)
    run("javac", "--release", "8", "-Xlint:-options", "-cp", tmp_path, "-d", tmp_path, tmp_path / "Main.java")
    words = run("java", "-cp", tmp_path, f"-Djava.library.path={tmp_path}", "Main").split()
    image = (np.arange(256) % 17 / 16).astype(np.float32).reshape(1, 1, 16, 16)
    assert words[0] == "refused" and np.array(words[1:], np.int64).astype(np.int32).tobytes() == Session(library).run({"image": image})["logits"].tobytes()


def test_cmake_refuses_another_system(bundle: Bundle, tmp_path: Path) -> None:
    require_programs("bundles with CMake", "cmake")
    (tmp_path / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.13)\nproject(p NONE)\nfind_package(qcompiler CONFIG REQUIRED)\n")
    command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build"), f"-DCMAKE_PREFIX_PATH={bundle.folder}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "this bundle is for another system (target arm64-android) than Linux" in " ".join(done.stderr.split())


def test_a_runner_needs_an_ndk(sysroot: Sysroot, digits: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"qc_run is C\+\+ and needs the Android NDK.*set ANDROID_NDK_HOME"):
        build_runner(tmp_path / "qc_run", find_target("arm64-android"))
    with pytest.raises(TargetError, match="qc_run"):
        make_bundle(digits("arm64-android"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_native_half_runs_the_network(digits: Callable[[str], Path], tmp_path: Path) -> None:
    """qc_jni.c linked to the network of this machine, in the place of a Java machine a table of the functions that it calls."""
    library = digits(find_target("native").name)
    shutil.copy(library, tmp_path / "libnetwork.so")
    command = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES / 'jni'}", f"-I{RUNTIME / 'include'}", SOURCES / "jni" / "machine.c"]
    run(*command, RUNTIME / "bundle" / "jni" / "qc_jni.c", "-L.", "-lnetwork", "-Wl,-rpath,$ORIGIN", "-o", "machine", cwd=tmp_path)
    threads, count, size, *values = run(tmp_path / "machine").splitlines()
    assert threads.startswith("java/lang/IllegalStateException: qc_session_create") and count.endswith("another number of inputs than the network's")
    assert size == "java/lang/IllegalArgumentException: an input has another number of elements than the network's"
    image = (np.arange(256) % 17 / 16).astype(np.float32).reshape(1, 1, 16, 16)
    assert np.array(values, np.float64).astype(np.float32).tobytes() == Session(library).run({"image": image})["logits"].tobytes()
