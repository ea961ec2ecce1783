"""Bundles: what is in them, that they build and run with CMake and without, natively and for ARM, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tools import require_programs, require_target

import qcompiler
from qcompiler.backend import bundle as bundle_module
from qcompiler.backend.artifact import _with_checksum
from qcompiler.backend.bundle import Bundle, make_bundle
from qcompiler.backend.static_library import identifier
from qcompiler.base.errors import ArtifactError, OutputError, TargetError
from qcompiler.base.host import host_architecture
from qcompiler.base.targets import find_target
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.cli.main import main
from qcompiler.runtime.session import Session

FILES = {
    "README.md",
    "bin/qc_run",
    "example/CMakeLists.txt",
    "example/main.cc",
    "include/qcompiler/loader.h",
    "include/qcompiler/pool.h",
    "include/qcompiler/pool.hpp",
    "include/qcompiler/qcompiler.h",
    "include/qcompiler/qcompiler.hpp",
    "lib/cmake/qcompiler/qcompiler-config.cmake",
}


def run(*command: str | Path, ok: int = 0, cwd: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == ok, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def library(digits: Callable[[str], Path]) -> Path:
    return digits(find_target("native").name)


@pytest.fixture(scope="module")
def bundle(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(library, tmp_path_factory.mktemp("bundle") / "device files")


@pytest.fixture
def ready_runner(bundle: Bundle, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles made here get the `bin/qc_run` of `bundle` instead of building their own."""
    monkeypatch.setattr(bundle_module, "build_runner", lambda path, target: shutil.copy(bundle.folder / "bin" / "qc_run", path))


def pattern_answer(library: Path) -> np.ndarray:
    """What the network answers to the example's made-up input."""
    session = Session(library)
    (port,) = session.inputs
    values = (np.arange(np.prod(port.shape)) % 17 / 16).astype(np.float32)
    (output,) = session.run({port.name: values.reshape(port.shape)}).values()
    return output.reshape(-1)


def check_example(printed: str, library: Path, target: str) -> None:
    lines = printed.splitlines()
    assert lines[0] == f"target {target}"
    assert lines[1].startswith("input image [1, 1, 16, 16] scale ")
    assert lines[2] == "output logits [1, 10]"
    assert np.array(lines[3:], np.float64).astype(np.float32).tobytes() == pattern_answer(library).tobytes()  # nine digits give a float32 exactly


def test_contents(bundle: Bundle, library: Path) -> None:
    assert set(bundle.files) == FILES | {f"lib/lib{library.name}"}
    assert bundle.size == sum(p.stat().st_size for p in bundle.folder.rglob("*") if p.is_file())
    assert (bundle.folder / "lib" / f"lib{library.name}").read_bytes() == library.read_bytes()
    readme = (bundle.folder / "README.md").read_text()
    assert "@" not in readme.replace("apt@", "")
    info = Session(library).manifest["inputs"][0]
    assert f"| input | `image` | float32 | [1, 1, 16, 16] | {info['scale']:.6g} | {info['zero_point']} |" in readme
    assert "| output | `logits` | float32 | [1, 10] | none | none |" in readme
    assert "@" not in (bundle.folder / "lib" / "cmake" / "qcompiler" / "qcompiler-config.cmake").read_text()


def test_everything_in_it_needs_libc_only(bundle: Bundle) -> None:
    for path in (bundle.folder / "bin" / "qc_run", *(bundle.folder / "lib").glob("*.so")):
        needed = {line.split("[")[1].rstrip("]") for line in run("readelf", "-d", path).splitlines() if "(NEEDED)" in line}
        assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"} | {p for p in needed if p.startswith("ld-linux")}, path


def test_the_same_library_gives_the_same_bundle(bundle: Bundle, library: Path, tmp_path: Path) -> None:
    again = make_bundle(library, tmp_path / "again")
    assert again.files == bundle.files
    for name in again.files:
        assert (again.folder / name).read_bytes() == (bundle.folder / name).read_bytes(), name


def test_qc_run_in_the_bundle(bundle: Bundle, library: Path, tmp_path: Path) -> None:
    image = demo_data()[1][7]["image"]
    np.save(tmp_path / "x.npy", image)
    model = bundle.folder / "lib" / f"lib{library.name}"
    run(bundle.folder / "bin" / "qc_run", model, "--input", f"image={tmp_path / 'x.npy'}", "--output", tmp_path / "out")
    assert np.load(tmp_path / "out" / "logits.npy").tobytes() == Session(library).run({"image": image})["logits"].tobytes()


def test_example_with_the_compiler_alone(bundle: Bundle, library: Path, tmp_path: Path) -> None:
    """The commands of the README."""
    include, main_cc = f"-I{bundle.folder / 'include'}", bundle.folder / "example" / "main.cc"
    warnings = ("-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
    run("g++", *warnings, include, main_cc, "-o", tmp_path / "example", "-ldl")
    check_example(run(tmp_path / "example", bundle.folder / "lib" / f"lib{library.name}"), library, library.stem)
    link = (f"-L{bundle.folder / 'lib'}", f"-l{library.stem}", "-Wl,-rpath,$ORIGIN/lib", "-ldl")
    run("g++", *warnings, "-DEXAMPLE_LINKED", include, main_cc, "-o", bundle.folder / "linked", *link)
    check_example(run(bundle.folder / "linked"), library, library.stem)
    (bundle.folder / "linked").unlink()


def test_example_with_cmake(bundle: Bundle, library: Path, tmp_path: Path) -> None:
    require_programs("bundles with CMake", "cmake")
    run("cmake", "-S", bundle.folder / "example", "-B", tmp_path)
    run("cmake", "--build", tmp_path)
    check_example(run(tmp_path / "example", bundle.folder / "lib" / f"lib{library.name}"), library, library.stem)
    check_example(run(tmp_path / "example_linked"), library, library.stem)


def test_cmake_refuses_another_architecture(bundle: Bundle, tmp_path: Path) -> None:
    require_programs("bundles with CMake", "cmake")
    options = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=riscv64")
    printed = run("cmake", "-S", bundle.folder / "example", "-B", tmp_path, *options, ok=1)
    assert f"this bundle is for {host_architecture()}" in " ".join(printed.split())


@pytest.mark.parametrize("name", ["arm64-dotprod", "armv7-neon"])
def test_bundle_for_arm(digits: Callable[[str], Path], library: Path, tmp_path: Path, name: str) -> None:
    """The bundle of a library for another architecture, with a cross compiler and CMake, under an emulator: the bytes of this machine."""
    target = find_target(name)
    require_target(target)
    require_programs("bundles with CMake", "cmake")
    made = make_bundle(digits(name), tmp_path / "device", static=True)
    model = made.folder / "lib" / f"lib{name}.so"
    emulator = [*target.emulator[:1], "-cpu", "max", *target.emulator[1:]]
    image = demo_data()[1][3]["image"]
    np.save(tmp_path / "x.npy", image)
    run(*emulator, made.folder / "bin" / "qc_run", model, "--input", f"image={tmp_path / 'x.npy'}", "--output", tmp_path / "out", "--threads", "2")
    assert np.load(tmp_path / "out" / "logits.npy").tobytes() == Session(library).run({"image": image})["logits"].tobytes()
    compiler = shutil.which(target.compiler[0])
    processor = {"aarch64": "aarch64", "armv7a": "armv7l"}[target.architecture]
    options = ("-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={processor}", f"-DCMAKE_CXX_COMPILER={compiler}")
    run("cmake", "-S", made.folder / "example", "-B", tmp_path / "build", *options)
    run("cmake", "--build", tmp_path / "build")
    check_example(run(*emulator, tmp_path / "build" / "example", model), library, name)
    check_example(run(*emulator, tmp_path / "build" / "example_linked"), library, name)
    check_example(run(*emulator, tmp_path / "build" / "example_static"), library, name)


TWO_NETWORKS = """
#include <stdlib.h>
#include "qcompiler/model/first.h"
#include "qcompiler/model/second_one.h"

static int answer(qc_library model, const char* path) {
  qc_session* session;
  void *image, *output;
  if (model.session_create(1, &session) || model.session_input_buffer(session, model.input_info(0)->name, &image)) return puts(model.last_error()), 1;
  float* values = image;
  for (size_t i = 0; i < model.input_info(0)->bytes / sizeof(float); ++i) values[i] = (float)(i % 17) / 16;
  if (model.session_output_buffer(session, model.output_info(0)->name, &output) || model.session_run(session)) return puts(model.last_error()), 1;
  FILE* file = fopen(path, "wb");
  fwrite(output, 1, model.output_info(0)->bytes, file);
  fclose(file);
  model.session_destroy(session);
  qc_library_close(&model); /* nothing to close, and allowed */
  return 0;
}

int main(void) { return answer(qc_library_first(), "first.raw") || answer(qc_library_second_one(), "second.raw"); }
"""


@pytest.mark.usefixtures("ready_runner")
def test_two_static_networks_in_one_static_program(library: Path, tmp_path: Path) -> None:
    """Two archives define one name each, and a program without any shared library gives the bytes of both networks."""
    shutil.copy(library, tmp_path / "first.so")
    qcompiler.compile(MODEL, calibration=demo_data()[0][60:63], preset="fast").save(tmp_path / "second-one.so")  # other ranges: other answers
    bundles = [make_bundle(tmp_path / name, tmp_path / name[:5], static=True).folder for name in ("first.so", "second-one.so")]
    archives = [bundles[0] / "lib" / "libfirst.a", bundles[1] / "lib" / "libsecond-one.a"]
    for archive, symbol in zip(archives, ("qc_library_first", "qc_library_second_one"), strict=True):
        defined = [line.split()[-1] for line in run("nm", "--extern-only", "--defined-only", archive).splitlines() if " " in line]
        assert defined == [symbol]
    (tmp_path / "main.c").write_text(TWO_NETWORKS)
    includes = [f"-I{b / 'include'}" for b in bundles]
    run("gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-static", *includes, tmp_path / "main.c", *archives, "-lpthread", "-lm", "-o", tmp_path / "main")
    run(tmp_path / "main", cwd=tmp_path)
    answers = [(tmp_path / f"{name}.raw").read_bytes() for name in ("first", "second")]
    assert answers == [pattern_answer(tmp_path / name).tobytes() for name in ("first.so", "second-one.so")]
    assert answers[0] != answers[1]


@pytest.mark.usefixtures("ready_runner")
def test_static_bundle(library: Path, bundle: Bundle, tmp_path: Path) -> None:
    require_programs("bundles with CMake", "cmake")
    name = identifier(library.stem)
    made, again = (make_bundle(library, tmp_path / folder, static=True) for folder in ("a", "b"))
    extra = {f"lib/lib{library.stem}.a", f"include/qcompiler/model/{name}.h", f"lib/cmake/qcompiler_{name}/qcompiler_{name}-config.cmake"}
    assert set(made.files) == set(bundle.files) | extra
    assert all((made.folder / f).read_bytes() == (again.folder / f).read_bytes() for f in made.files)
    readme = (made.folder / "README.md").read_text()
    assert f"qc_library_{name}()" in readme and "@" not in readme.replace("apt@", "")
    run("cmake", "-S", made.folder / "example", "-B", tmp_path / "build")
    run("cmake", "--build", tmp_path / "build", "--target", "example_static")
    check_example(run(tmp_path / "build" / "example_static"), library, library.stem)


def test_a_library_without_object_code_has_no_archive(library: Path, tmp_path: Path) -> None:
    run("objcopy", "--remove-section=.qc.code", library, tmp_path / "old.so")
    whole = _with_checksum((tmp_path / "old.so").read_bytes())
    (tmp_path / "old.so").write_bytes(whole)
    with pytest.raises(ArtifactError, match=r"old\.so: holds no object code .* compile the model again"):
        make_bundle(tmp_path / "old.so", tmp_path / "out", static=True)
    assert not (tmp_path / "out").exists()


def test_the_verb(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", str(library), "--output", str(tmp_path / "a"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"] == sum(document["files"].values())
    (tmp_path / "b").mkdir()  # an empty folder is fine
    assert main(["bundle", str(library), "--output", str(tmp_path / "b"), "--static"]) == 0
    assert (tmp_path / "b" / "lib" / f"lib{library.stem}.a").exists()
    assert "kB for" in " ".join(capsys.readouterr().out.split())
    assert main(["bundle", str(library), "--output", str(tmp_path / "b")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_refusals_leave_nothing(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = library.read_bytes()
    (tmp_path / "changed.so").write_bytes(data[:-2000] + b"X" + data[-1999:])
    (tmp_path / "text.so").write_text("hello")
    (tmp_path / "file").write_text("")
    (tmp_path / "m.so").write_bytes(data)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArtifactError, match="checksum|damaged|cut short"):
        make_bundle(tmp_path / "changed.so", tmp_path / "out")
    with pytest.raises(ArtifactError, match="not a compiled library"):
        make_bundle(tmp_path / "text.so", tmp_path / "out")
    with pytest.raises(OutputError, match="does not exist"):
        make_bundle(library, tmp_path / "none" / "out")
    with pytest.raises(OutputError, match="exists already"):
        make_bundle(library, tmp_path / "file")
    with pytest.raises(OutputError, match="would be libm.so, a name of the system's own; rename the file"):
        make_bundle(tmp_path / "m.so", tmp_path / "out")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match="needs one of the compilers"):
        make_bundle(library, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
