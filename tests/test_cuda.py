"""CUDA libraries without a GPU: built by nvcc, loaded with a clear line where there is no driver, and executed whole under a driver of ours."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeGpu, without_driver
from test_cpp import CPP, STRICT, run
from tools import require_nvcc, require_target

from qcompiler.backend import cuda
from qcompiler.backend.artifact import Artifact
from qcompiler.backend.build import Built, build
from qcompiler.backend.codegen import object_code
from qcompiler.base.errors import IncompatibleDevice, TargetError
from qcompiler.base.targets import Target, find_target
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.numerics import operators as numerics
from qcompiler.passes.graph import GraphBuilder, const, make_op
from qcompiler.pipeline.compile import compile_stages
from qcompiler.pipeline.library import Compilation
from qcompiler.runtime.elf import read_section
from qcompiler.runtime.session import Session
from qcompiler.verification.interpreter import run as interpret

SHAPE = (1, 5, 7, 3)
TABLE = ((np.arange(256) * 37 + 11) % 256 - 128).astype(np.int8)
ADD = {"a_zero_point": 3, "a_multiplier": 900, "b_zero_point": -5, "b_multiplier": -411, "shift": 10, "zero_point": 2, "low": -120, "high": 127}
QUANTIZE = {"scale": 0.05, "zero_point": 3}


@pytest.fixture(scope="module")
def built() -> Built:
    """Two float inputs, quantized, added, through a table; one int8 and one float output."""
    require_nvcc()
    builder = GraphBuilder()
    x, y = (builder.input(name, SHAPE, "float32") for name in ("x", "y"))
    qx, qy = (builder.emit(f"q{v.name}", make_op("qc.quantize", [v], QUANTIZE, SHAPE, "int8")) for v in (x, y))
    total = builder.emit("sum", make_op("qc.add", [qx, qy], ADD, SHAPE, "int8"))
    table = builder.emit("table", make_op("qc.lut", [total, const(TABLE)], {}, SHAPE, "int8"))
    real = builder.emit("real", make_op("qc.dequantize", [table], QUANTIZE, SHAPE, "float32"))
    return build(builder.finish([("int8", total), ("real", real)]), find_target("cuda-sm80"), "code")


@pytest.fixture(scope="module")
def artifact(built: Built) -> Artifact:
    return built.link()


@pytest.fixture(scope="module")
def library(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact.save(tmp_path_factory.mktemp("cuda") / "net.so")


@pytest.fixture(scope="module")
def gpu(built: Built, tmp_path_factory: pytest.TempPathFactory) -> FakeGpu:
    return FakeGpu.build(tmp_path_factory.mktemp("gpu"), built.program)


def images(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(0, 3, SHAPE).astype(np.float32) for name in ("x", "y")}


def expected(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    qx, qy = (numerics.OPERATORS["qc.quantize"](inputs[n], **QUANTIZE) for n in ("x", "y"))
    total = numerics.OPERATORS["qc.add"](qx, qy, **ADD)
    return {"qx": qx, "qy": qy, "int8": total, "real": numerics.OPERATORS["qc.dequantize"](numerics.OPERATORS["qc.lut"](total, TABLE), **QUANTIZE)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with in<seed>.npz and want<seed>.npz."""
    folder = tmp_path_factory.mktemp("files")
    for seed in range(3):
        np.savez(folder / f"in{seed}.npz", **images(seed))
        np.savez(folder / f"want{seed}.npz", **expected(images(seed)))
    return folder


# -- building -------------------------------------------------------------------------------------------------------------------------------


def test_the_same_inputs_give_the_same_bytes(built: Built, artifact: Artifact) -> None:
    again = Built(built.program, object_code(built.program)).link()
    assert again.library == artifact.library
    assert b"/tmp" not in artifact.library and b".cu\0" not in artifact.library


def images_of(fat_binary: bytes) -> list[tuple[int, int]]:
    """(kind, architecture) of the images in a fat binary: kind 1 is PTX, 2 is machine code (a header of 16 bytes, then entries)."""
    found, at = [], 16
    assert fat_binary[:4] == struct.pack("<I", 0xBA55ED50)
    while at < 16 + struct.unpack_from("<Q", fat_binary, 8)[0]:
        kind, _, header, size = struct.unpack_from("<HHIQ", fat_binary, at)
        found.append((kind, struct.unpack_from("<I", fat_binary, at + 28)[0]))
        at += header + size
    return found


def test_it_holds_machine_code_and_portable_code(library: Path) -> None:
    assert sorted(images_of(read_section(library, ".qc.device")[0])) == [(1, 80), (2, 80)]
    assert b"__global__" not in library.read_bytes()


def test_a_library_for_an_arm_host(built: Built, tmp_path: Path) -> None:
    """The same device code in a library that an Arm CPU loads."""
    target = find_target("cuda-sm87-arm64")
    require_target(replace(target, emulator=()))
    code = struct.pack("<I", 0xBA55ED50)
    program = replace(built.program, target=target)
    library = Built(program, object_code(program)).link().save(tmp_path / "arm.so")
    raw, architecture = read_section(library, ".qc.device")
    assert architecture == "aarch64" and raw[:4] == code and sorted(images_of(raw)) == [(1, 87), (2, 87)]
    with pytest.raises(IncompatibleDevice, match=r"compiled for aarch64 \(cuda-sm87-arm64\), this machine is x86_64"):
        Session(library)


def test_missing_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_candidates", lambda: iter([Path("/nowhere/nvcc")]))
    with pytest.raises(TargetError, match=r"'cuda-sm80' needs NVIDIA's compiler nvcc.*pip install nvidia-cuda-nvcc"):
        cuda.find_nvcc(find_target("cuda-sm80"))


def test_architectures() -> None:
    require_nvcc()
    with pytest.raises(TargetError, match="unknown target 'cuda-sm42'. Did you mean 'cuda-sm"):
        find_target("cuda-sm42")
    old = Target("cuda-old", "nvptx64-nvidia-cuda", {"kind": "cuda", "arch": "sm_42"}, ("sm_42",), ("cuda",), "int8")
    with pytest.raises(TargetError, match=r"'cuda-old': nvcc [\d.]+ \(.*\) has no architecture 'sm_42'.*It has sm_"):
        cuda.check_toolkit(old)


# -- no driver ------------------------------------------------------------------------------------------------------------------------------


def test_without_a_driver(library: Path, tmp_path: Path) -> None:
    environment = without_driver()
    line = f"{library}: this library was compiled for cuda-sm80 and needs an NVIDIA driver, and there is none here"
    with pytest.raises(IncompatibleDevice, match=re.escape(line)):
        Session(library)
    command = [sys.executable, "-m", "qcompiler", "run", str(library), "--input", "x=x.npy", "--output", str(tmp_path / "y.npz")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "needs an NVIDIA driver" in done.stderr
    run("g++", "-std=c++17", *STRICT, CPP / "qc_run.cc", "-o", tmp_path / "qc_run", "-ldl")
    done = run(tmp_path / "qc_run", library, "--bench", "1", ok=2)
    assert done.stderr.count("\n") == 1 and "needs an NVIDIA driver" in done.stderr


def test_code_of_one_architecture_runs_on_no_later_one(built: Built, gpu: FakeGpu, tmp_path: Path) -> None:
    target = find_target("cuda-sm90a")
    assert [target.runs_on(c) for c in (80, 90, 100)] == [False, True, False] and find_target("cuda-sm90").runs_on(100)
    program = replace(built.program, target=target)
    library = Built(program, object_code(program)).link().save(tmp_path / "net.so")
    done = gpu.python("import sys; from qcompiler.runtime.session import Session; Session(sys.argv[1])", library, switches="capability=100")
    line = "compiled for cuda-sm90a, which needs compute capability 9.0, and GPU 0 (Fake GPU) has 10.0"
    assert done.returncode == 1 and line in done.stderr
    passes(gpu.python("import sys; from qcompiler.runtime.session import Session; Session(sys.argv[1])", library))


def test_targets_are_listed() -> None:
    done = subprocess.run([sys.executable, "-m", "qcompiler", "targets"], capture_output=True, text=True, check=True, env=without_driver())
    assert re.search(r"cuda-sm80 .*needs an NVIDIA driver", done.stdout), done.stdout


# -- a driver -------------------------------------------------------------------------------------------------------------------------------

RUN = """
import sys, numpy as np
from qcompiler.runtime.session import Session
library, folder = sys.argv[1:]
session = Session(library)
for seed in (0, 1, 2, 0):
    want = np.load(f"{folder}/want{seed}.npz")
    outputs = session.run(dict(np.load(f"{folder}/in{seed}.npz")))
    assert all(outputs[k].tobytes() == want[k].tobytes() for k in ("int8", "real")), seed
"""

STEPS = """
import sys, numpy as np
from qcompiler.runtime.session import Session
library, folder = sys.argv[1:]
session, seen = Session(library), {}
session.trace(dict(np.load(f"{folder}/in1.npz")), lambda name, array: seen.update({name: array.copy()}))
want = np.load(f"{folder}/want1.npz")
for name, array in want.items():
    assert seen["sum" if name == "int8" else name].tobytes() == array.tobytes(), name
contexts = [session.new_context(dict(np.load(f"{folder}/in{seed}.npz"))) for seed in range(3)]
for step in range(len(session.manifest["steps"])):
    for context in contexts:
        context.run(step, step + 1)
for seed, context in enumerate(contexts):
    assert context.outputs()["real"].tobytes() == np.load(f"{folder}/want{seed}.npz")["real"].tobytes(), seed
times = session.profile(dict(np.load(f"{folder}/in1.npz")), 2)
assert [row[0] for row in times] == [s["id"] for s in session.manifest["steps"]] and all(0 < row[3] < 100 for row in times)
constants = np.zeros(session.manifest["constants"], np.uint8)
session.set_constants(constants)
changed = session.run(dict(np.load(f"{folder}/in1.npz")))
assert changed["int8"].tobytes() != want["int8"].tobytes()
"""

SEVERAL = """
import sys, threading, numpy as np
from qcompiler.runtime.session import Session
library, folder = sys.argv[1:]
failed = []
def work(seed):
    session, want = Session(library), np.load(f"{folder}/want{seed}.npz")
    for _ in range(5):
        if session.run(dict(np.load(f"{folder}/in{seed}.npz")))["real"].tobytes() != want["real"].tobytes(): failed.append(seed)
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
for t in threads: t.start()
for t in threads: t.join()
assert not failed, failed
"""


def passes(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("code", [RUN, STEPS, SEVERAL], ids=["run", "steps", "several"])
@pytest.mark.parametrize("switches", ["", "no-graphs"])
def test_results(gpu: FakeGpu, library: Path, files: Path, code: str, switches: str) -> None:
    """Bytes equal numerics.py's; graphs are replayed where the driver has them; nothing is left behind."""
    passes(gpu.python(code, library, files, switches=switches))
    log = gpu.log()
    assert (log["left"], log["contexts"], log["depth"]) == (0, 0, 0), log
    if code == RUN:
        assert (log["replays"], log["plain"]) == ((4, 0) if not switches else (0, 4 * 5)), log


def test_the_least_compute_capability_is_enough(gpu: FakeGpu, library: Path, files: Path) -> None:
    passes(gpu.python(RUN, library, files, switches="capability=80"))


LOAD = """
import sys
from qcompiler.cli.main import main
library, array, output = sys.argv[1:]
sys.exit(main(["run", library, "--input", f"x={array}", "--input", f"y={array}", "--output", output]))
"""


@pytest.mark.parametrize(
    ("switches", "line"),
    [
        ("no-device", "compiled for cuda-sm80, and there is no NVIDIA GPU here that the driver can use"),
        ("fail-init", "the GPU failed to start: unknown error (CUDA_ERROR_UNKNOWN, CUDA error 999)"),
        ("capability=75", "compiled for cuda-sm80, which needs compute capability 8.0 or later, and GPU 0 (Fake GPU) has 7.5"),
        ("bad-image", "the GPU failed to load the library's code (its driver supports CUDA 13.0): device kernel image is invalid"),
        ("memory=100", "out of memory on GPU 0 (Fake GPU): "),
        ("memory=1500", "are needed for a session's tensors"),
        ("fail-launch=3", "the GPU failed during a run: unspecified launch failure (CUDA_ERROR_LAUNCH_FAILED, CUDA error 719)"),
        ("no-graphs,fail-launch=3", "the GPU failed during a run: unspecified launch failure"),
    ],
)
def test_failures(gpu: FakeGpu, library: Path, tmp_path: Path, switches: str, line: str) -> None:
    """One clear line, exit status 2, nothing written, and nothing left on a device that still works."""
    np.save(tmp_path / "x.npy", images()["x"])
    done = gpu.python(LOAD, library, tmp_path / "x.npy", tmp_path / "out.npz", switches=switches)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: {library}: ") and line in done.stderr
    assert not (tmp_path / "out.npz").exists()
    log = gpu.log()
    assert "fail-launch" in switches or (log["left"], log["contexts"], log["depth"]) == (0, 0, 0), log


def test_device_code_cut_short(built: Built, gpu: FakeGpu, tmp_path: Path) -> None:
    """A library whose checksum is right and whose device code isn't."""
    at = built.code.index(struct.pack("<I", 0xBA55ED50))
    longer = bytearray(built.code)
    struct.pack_into("<Q", longer, at + 8, struct.unpack_from("<Q", longer, at + 8)[0] + 1000)
    library = Built(built.program, bytes(longer)).link().save(tmp_path / "cut.so")
    done = gpu.python("import sys; from qcompiler.runtime.session import Session; Session(sys.argv[1])", library)
    assert done.returncode == 1 and "device code is damaged or cut short" in done.stderr


def test_c_client(gpu: FakeGpu, library: Path, tmp_path: Path) -> None:
    """Status codes in C, device memory and page-locked buffers bound by the user, fork."""
    run("gcc", "-std=gnu11", "-g", *STRICT, Path(__file__).parent / "cpp" / "gpu.c", "-o", tmp_path / "gpu", "-ldl")
    (tmp_path / "in.raw").write_bytes(b"".join(v.tobytes() for v in images().values()))
    (tmp_path / "want.raw").write_bytes(expected(images())["real"].tobytes())
    done = gpu.run(tmp_path / "gpu", library, tmp_path / "in.raw", tmp_path / "want.raw")
    assert done.returncode == 0, done.stdout + done.stderr
    assert gpu.log()["left"] == 0


# -- a whole network ------------------------------------------------------------------------------------------------------------------------

DIGITS = """
import sys, numpy as np
from qcompiler.runtime.session import Session
library, images, folder = sys.argv[1:]
session = Session(library)
outputs = [session.run({"image": image})["logits"] for image in np.load(images)]
values = {}
session.trace({"image": np.load(images)[0]}, lambda name, array: values.update({name: array.copy()}))
np.savez(folder + "/outputs.npz", outputs=np.stack(outputs))
np.savez(folder + "/values.npz", **values)
"""


@pytest.fixture(scope="module")
def digits_on_gpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Compilation, Path, FakeGpu]:
    require_nvcc()
    folder = tmp_path_factory.mktemp("digits")
    compilation = compile_stages(MODEL, "cuda-sm80", demo_data()[0][:40], preset="fast")
    return compilation, compilation.artifact.save(folder / "digits.so"), FakeGpu.build(folder, compilation.program)


def test_the_example_network(digits_on_gpu: tuple[Compilation, Path, FakeGpu], digits: Callable[[str], Path], tmp_path: Path) -> None:
    """Every layer equals numerics.py and every output the CPU library's, byte for byte, in one graph replay per run."""
    compilation, library, gpu = digits_on_gpu
    assert set(compilation.artifact.manifest["compiler"]) == {"qcompiler", "tvm", "nvcc"}
    samples = [np.ascontiguousarray(s["image"]) for s in demo_data()[1][:8]]
    np.save(tmp_path / "images.npy", np.stack(samples))
    passes(gpu.python(DIGITS, library, tmp_path / "images.npy", tmp_path))
    outputs, values = np.load(tmp_path / "outputs.npz")["outputs"], np.load(tmp_path / "values.npz")
    on_cpu = Session(digits(find_target("native").name))
    for image, output in zip(samples, outputs, strict=True):
        assert output.tobytes() == on_cpu.run({"image": image})["logits"].tobytes()
    reference = interpret(compilation.integer, {"image": samples[0]}, keep="all")
    compared = [name for name in values if name in reference]
    assert len(compared) > 10
    for name in compared:
        assert values[name].tobytes() == np.ascontiguousarray(reference[name]).tobytes(), name
    log = gpu.log()
    assert (log["replays"], log["left"]) == (len(samples), 0), log


def test_verify_and_bench(digits_on_gpu: tuple[Compilation, Path, FakeGpu], tmp_path: Path) -> None:
    """They work on a library for a GPU as on any other; the float network runs on the CPU."""
    _, library, gpu = digits_on_gpu
    _, evaluation, labels = demo_data()
    np.save(tmp_path / "images.npy", np.concatenate([s["image"] for s in evaluation[:6]]))
    np.save(tmp_path / "labels.npy", labels[:6])
    command = ["verify", library, "--model", MODEL, "--data", tmp_path / "images.npy", "--labels", tmp_path / "labels.npy", "--min-agreement", "1", "--json"]
    done = gpu.run(sys.executable, "-m", "qcompiler", *command)
    passes(done)
    report = json.loads(done.stdout)
    assert report["passed"] and len(report["layers"]) > 8
    done = gpu.run(sys.executable, "-m", "qcompiler", "bench", library, "--layers", "--seconds", "0.1", "--json", switches="skip-repeats")
    passes(done)
    assert all(step["seconds"] > 0 for step in json.loads(done.stdout)["steps"])
