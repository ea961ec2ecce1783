"""Programs for NVIDIA GPUs: nvcc, and the object file with device code and launch table that the runtime (runtime/cpp/qc_cuda.c) interprets."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from qcompiler.backend.artifact import RUNTIME
from qcompiler.backend.lowering import Program, Step, kernels_of
from qcompiler.backend.shared import Places
from qcompiler.backend.toolchain import find_compiler
from qcompiler.base.errors import TargetError, closest
from qcompiler.base.files import temporary_folder
from qcompiler.base.targets import Target

_DEVICE_CODE = r"""
__asm__(
    ".pushsection .qc.device,\"a\",%progbits\n"
    ".balign 64\n"
    ".globl launch_code\n.hidden launch_code\n"
    "launch_code:\n.incbin \"kernels.fatbin\"\n"
    ".globl launch_code_end\n.hidden launch_code_end\n"
    "launch_code_end:\n.byte 0\n"
    ".popsection\n");
"""


def _candidates() -> Iterator[Path]:
    """Where nvcc may be, best first."""
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    yield Path("/usr/local/cuda/bin/nvcc")
    package = importlib.util.find_spec("nvidia")  # the registry's nvidia-cuda-nvcc
    for folder in package.submodule_search_locations or [] if package else []:
        yield from sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)


def find_nvcc(target: Target) -> Path:
    """NVIDIA's compiler: on PATH, in CUDA_HOME, in /usr/local/cuda, or the Python package's. Raises TargetError saying how to get it."""
    for path in _candidates():
        if os.access(path, os.X_OK):
            return path
    raise TargetError(
        f"target '{target.name}' needs NVIDIA's compiler nvcc, and there is none on PATH, in CUDA_HOME, in /usr/local/cuda or in this Python's packages; "
        "install the CUDA toolkit, or: pip install nvidia-cuda-nvcc"
    )


@functools.cache
def _ask(nvcc: Path, option: str) -> str:
    done = subprocess.run([str(nvcc), option], capture_output=True, text=True)
    if done.returncode:
        raise TargetError(f"{nvcc} {option} failed: {done.stderr.strip()[:300]}")
    return done.stdout


def nvcc_version(nvcc: Path) -> str:
    """ "13.0.88"."""
    found = re.search(r"\bV(\d[\d.]*)", _ask(nvcc, "--version"))
    return found[1] if found else "unknown"


def check_toolkit(target: Target) -> Path:
    """nvcc, once it is certain that it can compile for the target. Raises TargetError otherwise."""
    nvcc, architecture = find_nvcc(target), str(target.tvm.get("arch"))
    known = re.findall(r"\bsm_\w+", _ask(nvcc, "--list-gpu-code"))
    if architecture.removesuffix("a") not in known:
        raise TargetError(
            f"target '{target.name}': nvcc {nvcc_version(nvcc)} ({nvcc}) has no architecture '{architecture}'.{closest(architecture, known)} "
            f"It has {', '.join(known)}; use another target, or another version of the CUDA toolkit"
        )
    return nvcc


def toolkit_versions(target: Target) -> dict[str, str]:
    """What else makes a target's code, for the manifest: nvcc's version, for a GPU. Raises as `check_toolkit`."""
    return {"nvcc": nvcc_version(check_toolkit(target))} if target.gpu else {}


def fat_binary(source: str, target: Target) -> bytes:
    """CUDA C compiled for the target's architecture, with PTX for later ones. The same source and toolkit give the same bytes.

    Raises TargetError when nvcc is missing, does not know the architecture, or fails.
    """
    nvcc, architecture = check_toolkit(target), str(target.tvm["arch"])
    virtual = architecture.replace("sm_", "compute_")
    with temporary_folder() as folder:
        (folder / "kernels.cu").write_text(source)
        command = [str(nvcc), "-std=c++17", "-O3", "-fatbin", f"-gencode=arch={virtual},code=[{architecture},{virtual}]", "-o", "kernels.fatbin", "kernels.cu"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"compiling for '{target.name}' with {nvcc} failed: {done.stderr.strip()[:600]}")
        return (folder / "kernels.fatbin").read_bytes()


def launch_table(programs: Sequence[Program], places: Places) -> str:
    """C source of the tables in runtime/cpp/qc_launches.h. programs: of a network at one or more shapes; places: of their constants."""
    target, every = programs[0].target, [step for program in programs for step in program.steps]
    symbols = {kernel.key: (index, symbol) for index, (symbol, kernel) in enumerate(kernels_of(every).items())}
    steps: list[str] = []
    arguments: list[str] = []
    starts = [0]
    for program, offsets in zip(programs, places.offsets, strict=True):
        for step, constants in zip(program.steps, offsets, strict=True):
            assert step.kernel.launch is not None, f"{step.kernel.row} is not a GPU kernel"
            blocks, threads = step.kernel.launch
            pointers = list(_arguments(program, step, constants))
            steps.append(f"{{{symbols[step.kernel.key][0]}, {blocks}u, {threads}u, {len(arguments)}, {len(pointers)}}}")
            arguments += [f"{{SPACE_{space.upper()}, {offset}u}}" for space, offset in pointers]
        starts.append(len(steps))
    return "\n".join(
        [
            '#include "qc_launches.h"',
            "const char* const launch_kernels[] = {" + "".join(f'"{symbol}", ' for _, symbol in symbols.values()) + "0};",
            f"const int32_t launch_kernel_count = {len(symbols)}, launch_argument_count = {len(arguments)};",
            f"const int32_t launch_capability = {target.capability}, launch_one_capability = {int(target.one_capability)};",
            f"const int32_t launch_counters = {max((step.kernel.counters for step in every), default=0)};",
            f"const int32_t launch_starts[] = {{{', '.join(map(str, starts))}}};",
            "const launch launches[] = {" + ", ".join([*steps, "{0, 0, 0, 0, 0}"]) + "};",
            "const launch_argument launch_arguments[] = {" + ", ".join([*arguments, "{0, 0}"]) + "};",
            _DEVICE_CODE,
        ]
    )


def _arguments(program: Program, step: Step, constants: Sequence[int]) -> Iterator[tuple[str, int]]:
    """(space, byte offset or port) of every pointer that a step's kernel takes, in order."""

    def place(value: str) -> tuple[str, int]:
        found = program.values[value].place
        assert found is not None, value
        return found.space, found.offset

    yield from (place(value) for value in step.reads)
    yield from (("constants", offset) for offset in constants)
    yield from (place(value) for value in [step.writes, *step.more])
    if step.kernel.scratch:
        yield "workspace", step.scratch
    if step.kernel.counters:
        yield "counters", 0


def gpu_object_code(programs: Sequence[Program], places: Places) -> bytes:
    """The object file of a network for a GPU, at one or more shapes: its device code and launch table, for the CPU that loads the library. places: of
    the constants.

    Raises TargetError when a compiler is missing or fails, InternalError when code generation does.
    """
    from qcompiler.backend.codegen_cuda import cuda_source  # not above: the schedules for GPUs, which no other target needs

    target = programs[0].target
    code = fat_binary(cuda_source(kernels_of(step for program in programs for step in program.steps), target), target)
    compiler = find_compiler(target)
    with temporary_folder() as folder:
        (folder / "kernels.fatbin").write_bytes(code)
        (folder / "launches.c").write_text(launch_table(programs, places))
        command = [compiler, "-c", "-fPIC", "-O2", "-std=gnu11", "-fvisibility=hidden", f"-I{RUNTIME}", "-x", "c", "launches.c", "-o", "launches.o"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise TargetError(f"compiling the launch table for '{target.name}' with {compiler} failed: {done.stderr.strip()[:600]}")
        return (folder / "launches.o").read_bytes()
