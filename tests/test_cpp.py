"""The C and C++ interface: built with warnings as errors, under sanitizers, valgrind and an emulator, and equal to Python's Session byte for byte."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tools import require_programs, require_target

from qcompiler.backend.artifact import _model_header, _with_checksum
from qcompiler.base.errors import ArtifactError
from qcompiler.base.host import host_architecture
from qcompiler.base.targets import Target, find_target, missing_features
from qcompiler.cli.demo import demo_data
from qcompiler.runtime.library import check_complete
from qcompiler.runtime.session import Session

CPP = Path(__file__).resolve().parent.parent / "qcompiler" / "runtime" / "cpp"
SOURCES = Path(__file__).resolve().parent / "cpp"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", f"-I{CPP / 'include'}"]
OTHER = "x86-avx2"  # every x86 machine that runs these tests, and valgrind, has it

pytestmark = pytest.mark.skipif(host_architecture() != "x86_64", reason="the C++ tests compile for x86-64 hosts")


def run(*command: str | Path, ok: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert done.returncode == ok, f"{' '.join(map(str, command))}\nexit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def sample() -> np.ndarray:
    return np.ascontiguousarray(demo_data()[1][0]["image"])


@pytest.fixture(scope="module")
def native(digits: Callable[[str], Path]) -> Path:
    return digits(find_target("native").name)


@pytest.fixture(scope="module")
def other(digits: Callable[[str], Path], native: Path) -> Path:
    if native.stem == OTHER:
        pytest.skip(f"two targets of one machine are needed; this one has {OTHER} only")
    return digits(OTHER)


@pytest.fixture(scope="module")
def files(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with input.raw and expected.raw, what Python's Session answers to it."""
    folder = tmp_path_factory.mktemp("cpp")
    sample().tofile(folder / "input.raw")
    Session(native).run({"image": sample()})["logits"].tofile(folder / "expected.raw")
    return folder


def broken_libraries(library: Path, folder: Path) -> list[Path]:
    """Files that no loader may execute: cut short, changed at many places, foreign, of another architecture, ABI or kind."""
    data = library.read_bytes()
    contents = {f"cut{size}": data[:size] for size in (0, 3, 40, 4096, len(data) // 2, len(data) - 24, len(data) - 1)}
    for at in np.linspace(4, len(data) - 1, 24).astype(int):
        contents[f"changed{at}"] = data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]
    contents["text"] = b"hello, this is no library"
    contents["longer"] = data + b"1234"
    contents["swapped"] = _with_checksum(data[:-24])[:-8] + bytes(8)
    contents["arm"] = data[:18] + struct.pack("<H", 183) + data[20:]
    paths = [folder / "nowhere.so", folder]
    for name, content in contents.items():
        paths.append(folder / f"{name}.so")
        paths[-1].write_bytes(content)
    for name, source in (("foreign", "int f(void) { return 1; }"), ("abi", "int qc_abi_version(void) { return 99; }")):
        (folder / f"{name}.c").write_text(source)
        run("gcc", "-shared", "-fPIC", folder / f"{name}.c", "-o", folder / f"{name}.so")
        paths.append(folder / f"{name}.checked.so")
        paths[-1].write_bytes(_with_checksum((folder / f"{name}.so").read_bytes()))
    return [*paths, folder / "foreign.so"]


def build(folder: Path, source: str, *flags: str | Path, name: str = "program") -> Path:
    compiler = ["gcc", "-std=gnu11"] if source.endswith(".c") else ["g++"]
    run(*compiler, "-g", "-O1", *STRICT, SOURCES / source, "-o", folder / name, *flags, "-lpthread", "-ldl")
    return folder / name


# -- C --------------------------------------------------------------------------------------------------------------------------------------


def test_c_client_with_sanitizers(native: Path, files: Path, tmp_path: Path) -> None:
    """Every error of the C interface; zero copy at every alignment, between pages that nobody may touch; fork; broken libraries."""
    client = build(tmp_path, "client.c", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    (tmp_path / "broken").mkdir()
    broken = broken_libraries(native, tmp_path / "broken")
    output = run(client, native, files / "input.raw", tmp_path / "out.raw", *broken).stdout
    assert (tmp_path / "out.raw").read_bytes() == (files / "expected.raw").read_bytes()
    assert "FAILED" not in output
    reasons = ["compiled for aarch64, this machine is x86_64", "has ABI version 99", "no symbol qc_", "no checksum", "its checksum does not match"]
    for part in [*reasons, "no ELF header", "can't be opened"]:
        assert part in output, part


def test_python_refuses_a_changed_library(native: Path, tmp_path: Path) -> None:
    data = native.read_bytes()
    at = len(data) // 3
    (tmp_path / "changed.so").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ArtifactError, match="its checksum does not match"):
        Session(tmp_path / "changed.so")
    check_complete(native.read_bytes(), native)


def test_c_client_without_leaks(digits: Callable[[str], Path], native: Path, files: Path, tmp_path: Path) -> None:
    """valgrind knows no AVX-512: there the library for AVX2 runs, and one for AVX-512 is refused in words."""
    require_programs("the C interface under valgrind", "valgrind")
    client = build(tmp_path, "client.c")
    kinds = "definite,indirect,possible"
    valgrind = ("valgrind", "--quiet", "--leak-check=full", f"--show-leak-kinds={kinds}", f"--errors-for-leak-kinds={kinds}", "--error-exitcode=9")
    run(*valgrind, client, digits(OTHER), files / "input.raw", tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == (files / "expected.raw").read_bytes()
    if "avx512f" in find_target("native").features:
        refused = run(*valgrind, client, native, files / "input.raw", tmp_path / "out.raw", ok=7)
        assert "needs the CPU feature avx512" in refused.stdout


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_pool_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    """The runtime itself instrumented, with a network made of parallel loops: 1e5 of them with 2, 3 and 4 threads each."""
    port = {"shape": [8], "dtype": "float32"}
    manifest = {
        "target": "none",
        "triple": "x86_64-linux-gnu",
        "features": [],
        "inputs": [{"name": 'x "?\\ é', "scale": 0.5, "zero_point": -3, **port}],
        "outputs": [{"name": "y", **port}],
        "workspace": 64,
        "constants": 64,
        "steps": [{}],
    }
    (tmp_path / "model.h").write_text(_model_header(manifest, find_target("native")))
    flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{tmp_path}", "-Wno-pedantic")
    program = build(tmp_path, "pool.c", *flags, *(CPP / f"qc_{part}.c" for part in ("model", "runtime", "threads")))
    assert run(program, "100000", TSAN_OPTIONS="halt_on_error=1").stdout == "ok\n"


# -- C++ ------------------------------------------------------------------------------------------------------------------------------------


def test_cpp_interface(native: Path, other: Path, tmp_path: Path) -> None:
    """C++17 with sanitizers; C++20 with designated initializers, and one network linked to the program while others are opened."""
    program = build(tmp_path, "api.cc", "-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", name="api17")
    output = run(program, native, other).stdout
    info = Session(native).manifest["inputs"][0]
    assert f"scale {np.float32(info['scale']):.9g} {info['zero_point']}\n" in output
    shutil.copy(native, tmp_path / "libnetwork.so")
    program = build(tmp_path, "api.cc", "-std=c++20", "-DLINKED", f"-L{tmp_path}", "-lnetwork", f"-Wl,-rpath,{tmp_path}", name="api20")
    run(program, native, other)


def test_only_the_interface_is_exported(native: Path) -> None:
    symbols = [line.split() for line in run("nm", "-D", "--defined-only", native).stdout.splitlines()]
    header = (CPP / "include" / "qcompiler" / "qcompiler.h").read_text()
    assert {s[-1] for s in symbols} == set(re.findall(r"^[\w *]*?\b(qc_\w+)\(", header, re.MULTILINE))
    needed = {line.split("[")[1].rstrip("]") for line in run("readelf", "-d", native).stdout.splitlines() if "(NEEDED)" in line}
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}


# The standard's home of every name of `std` that our C++ says.
HOMES = {
    "algorithm": "all_of max min sort transform",
    "cctype": "isalnum isdigit",
    "chrono": "chrono",
    "cmath": "ceil",
    "cstddef": "ptrdiff_t size_t",
    "cstdint": "int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t uintptr_t",
    "cstdio": "FILE fclose ferror fopen fprintf fputs fread fwrite printf remove rename sscanf",
    "cstdlib": "strtod",
    "cstring": "memcmp memcpy strchr strcmp strcspn strerror",
    "exception": "current_exception exception make_exception_ptr",
    "functional": "function",
    "future": "future promise",
    "map": "map",
    "memory": "make_shared make_unique shared_ptr unique_ptr",
    "mutex": "lock_guard mutex",
    "numeric": "accumulate",
    "optional": "optional",
    "set": "set",
    "stdexcept": "logic_error runtime_error",
    "string": "stoi stoll string to_string",
    "thread": "this_thread",
    "type_traits": "is_const_v is_same_v remove_cv_t",
    "utility": "exchange move pair",
    "vector": "vector",
}


def test_every_file_includes_what_it_names() -> None:
    """What one library's headers happen to bring along, the next version's don't."""
    home = {name: header for header, names in HOMES.items() for name in names.split()}
    for path in [*CPP.rglob("*.hpp"), *CPP.rglob("*.cc")]:
        text = path.read_text()
        wanted = {home[name] for name in re.findall(r"\bstd::(\w+)", text)}
        assert wanted <= set(re.findall(r"^#include <(\w+)>", text, re.MULTILINE)), path.name


# -- qc_run ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qc_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("run") / "qc_run"
    flags = ("-Wconversion", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    run("g++", "-std=c++17", "-g", "-O1", *STRICT, *flags, CPP / "qc_run.cc", "-o", program, "-ldl")
    return program


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_qc_run_equals_python(qc_run: Path, native: Path, tmp_path: Path, threads: str) -> None:
    session = Session(native)
    for index in range(3):
        image = demo_data()[1][index]["image"]
        np.save(tmp_path / "x.npy", image)
        run(qc_run, native, "--input", f"image={tmp_path / 'x.npy'}", "--output", tmp_path / "out", "--threads", threads)
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["logits.npy"]
        result, wanted = np.load(tmp_path / "out" / "logits.npy"), session.run({"image": image})["logits"]
        assert (result.dtype, result.shape, result.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


def test_qc_run_measures(qc_run: Path, native: Path) -> None:
    import json

    document = json.loads(run(qc_run, native, "--bench", "20", "--threads", "2").stdout)
    assert (document["threads"], document["iterations"], document["target"]) == (2, 20, native.stem)
    seconds = document["seconds"]
    assert 0 < seconds["minimum"] <= seconds["median"] <= seconds["p99"]


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_versions(qc_run: Path, native: Path, tmp_path: Path, version: tuple[int, int]) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, sample(), version=version)
    run(qc_run, native, "--input", f"image={tmp_path / 'x.npy'}", "--output", tmp_path / "out")
    assert np.load(tmp_path / "out" / "logits.npy").tobytes() == Session(native).run({"image": sample()})["logits"].tobytes()


def test_qc_run_refuses(qc_run: Path, native: Path, tmp_path: Path) -> None:
    """Each mistake: exit 2, one line on standard error that says what is wrong, nothing written."""
    good = sample()
    arrays = {"good": good, "double": good.astype(np.float64), "shape": good[:, :, :8], "big": good.astype(">f4"), "fortran": np.asfortranarray(good[0, 0])}
    arrays |= {"text": np.array(["a"]), "record": np.zeros(3, [("a", "f4")])}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    raw = (tmp_path / "good.npy").read_bytes()
    contents = {"short": raw[:-1], "longer": raw + b"1", "header": raw[:30], "version": raw[:6] + b"\x09" + raw[7:], "magic": b"x" + raw, "empty": b""}
    contents["huge"] = raw.replace(b"(1, 1, 16, 16)", b"(9999999, 16, 9)")[: len(raw)]
    contents["words"] = raw.replace(b"(1, 1, 16, 16)", b"(1, q, 16, 16)")
    for name, content in contents.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
    wrong = {
        "double": "elements of type f8, input 'image' wants f4",
        "shape": "has shape [1, 1, 8, 16], input 'image' wants [1, 1, 16, 16]",
        "big": "big-endian",
        "fortran": "Fortran order",
        "text": "not supported",
        "record": "structured",
        "short": "shape needs",
        "longer": "shape needs",
        "header": "cut short",
        "version": ".npy version 9",
        "magic": "not an .npy file",
        "empty": "not an .npy file",
        "huge": "shorter than its shape",
        "words": "a shape of (1, q, 16, 16)",
        "nowhere": "can't be opened",
    }
    out = ("--output", str(tmp_path / "out"))
    cases = [((str(native), "--input", f"image={tmp_path / name}.npy", *out), text) for name, text in wrong.items()]
    fine = f"image={tmp_path / 'good.npy'}"
    cases += [
        ((), "no library given"),
        ((str(native),), "--output DIR"),
        ((str(native), *out), "input 'image' is missing: give --input image=FILE.npy, f4 of shape [1, 1, 16, 16]"),
        ((str(native), "--input", "picture=x.npy", *out), "there is no input 'picture'; known: 'image'"),
        ((str(native), "--input", "image", *out), "expected NAME=FILE.npy"),
        ((str(native), "--input", fine, "--input", fine, *out), "given twice"),
        ((str(native), "--input", fine, "--threads", "0", *out), "expected a number from 1 to 1024"),
        ((str(native), "--bench", "many"), "expected a number"),
        ((str(native), "--fast"), "unknown option --fast"),
        ((str(native), "--output"), "--output wants a value"),
        ((str(native), str(native), *out), "two libraries"),
        ((str(tmp_path / "none.so"), *out), "can't be opened"),
        ((str(native), "--input", fine, "--output", str(tmp_path / "a" / "b")), "can't be made"),
        ((str(native), "--input", fine, "--output", str(tmp_path / "good.npy")), "can't be written"),
    ]
    for words, text in cases:
        done = run(qc_run, *words, ok=2)
        assert done.stdout == ""
        assert done.stderr.startswith("error: "), done.stderr
        assert text in done.stderr.splitlines()[0], (text, done.stderr)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# -- other architectures --------------------------------------------------------------------------------------------------------------------


def emulated(target: Target, program: Path, *arguments: str | Path, ok: int = 0, cpu: str = "max") -> subprocess.CompletedProcess[str]:
    return run(*target.emulator[:1], "-cpu", cpu, *target.emulator[1:], program, *arguments, ok=ok)


@pytest.mark.parametrize("name", ["arm64-dotprod", "armv7-neon"])
def test_c_client_on_arm(digits: Callable[[str], Path], native: Path, files: Path, tmp_path: Path, name: str) -> None:
    target = find_target(name)
    require_target(target)
    assert missing_features(target)
    client = tmp_path / "client"
    run(target.compiler[0], "-x", "c", "-std=gnu11", "-O1", *STRICT, SOURCES / "client.c", "-o", client, "-lpthread", "-ldl")
    library = digits(name)
    (tmp_path / "cut.so").write_bytes(library.read_bytes()[:-5000])
    output = emulated(target, client, library, files / "input.raw", tmp_path / "out.raw", native, tmp_path / "cut.so").stdout
    assert "FAILED" not in output
    assert "compiled for x86_64, this machine is" in output
    assert (tmp_path / "out.raw").read_bytes() == (files / "expected.raw").read_bytes()


def test_an_arm_cpu_that_lacks_a_feature(digits: Callable[[str], Path], files: Path, tmp_path: Path) -> None:
    target = find_target("arm64-dotprod")
    require_target(target)
    client = tmp_path / "client"
    run(target.compiler[0], "-x", "c", "-std=gnu11", "-O1", *STRICT, SOURCES / "client.c", "-o", client, "-lpthread", "-ldl")
    refused = emulated(target, client, digits(target.name), files / "input.raw", tmp_path / "out.raw", ok=7, cpu="cortex-a72")
    assert "needs the CPU feature asimddp" in refused.stdout
