"""Runs CUDA kernels without a GPU: their source is compiled by g++ against tests/cuda_emulation and executed, thread by thread."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qcompiler.backend.codegen_cuda import cuda_source
from qcompiler.backend.lowering import Program, Step
from qcompiler.base.targets import Target, find_target
from qcompiler.schedules.harness import aligned, fetch
from qcompiler.schedules.table import Kernel, Layout

TARGET = find_target("cuda-sm80")
HEADERS = Path(__file__).parent / "cuda_emulation"
FLAGS = ["-O0", "-std=c++17", "-fPIC", "-shared", "-w", "-fwrapv", "-fno-strict-aliasing"]  # compiling takes longer than running


def arity(kernel: Kernel) -> int:
    return len(kernel.func.params)


def emulated_source(source: str) -> str:
    """C++ of a host library that exports `qc_emulate` and `qc_emulated_kernels` (see emulation.h) for the kernels of a CUDA source."""
    kernels = re.findall(r'^extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\) \{', source, re.MULTILINE)
    rows = [f'  {{"{symbol}", (void*){symbol}, {parameters.count(",") + 1}}},' for symbol, parameters in kernels]
    table = "\n".join(['extern "C" const qc_emulated_kernel qc_emulated_kernels[] = {', *rows, "  {nullptr, nullptr, 0}};", ""])
    return f'#include "emulation.h"\n{source}\n{table}'


def compile_emulated(source: str, path: Path) -> Path:
    """Compile a CUDA source to the shared library `path`."""
    file = path.with_suffix(".cc")
    file.write_text(emulated_source(source))
    done = subprocess.run(["g++", *FLAGS, f"-I{HEADERS}", str(file), "-o", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return path


class Emulated:
    """Kernels as one library. Compile many at once: most of the time is the compiler's start."""

    def __init__(self, kernels: Mapping[str, Kernel], target: Target, folder: Path, fault: Callable[[str], str] = str) -> None:
        """fault: what a test does to the source."""
        self.kernels = dict(kernels)
        self.library = ctypes.CDLL(str(compile_emulated(fault(cuda_source(kernels, target)), folder / "kernels.so")))

    def launch(self, symbol: str, arrays: Sequence[np.ndarray], order: int = 1) -> None:
        """Run a kernel on pointers to `arrays`; `order` seeds the order in which threads run."""
        kernel = self.kernels[symbol]
        assert kernel.launch is not None and len(arrays) == arity(kernel)
        pointers = (ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])
        self.library.qc_emulate_order(ctypes.c_uint64(order))
        self.library.qc_emulate(self.library[symbol], len(arrays), *kernel.launch, pointers)

    def run(self, symbol: str, inputs: Sequence[np.ndarray], output: Layout, canary: int = 0xA5) -> np.ndarray:
        """As `harness.run_kernel`, in two orders of threads: raises AssertionError when results differ or bytes around the output change."""
        return self.run_all(symbol, inputs, [output], canary)[0]

    def run_all(self, symbol: str, inputs: Sequence[np.ndarray], outputs: Sequence[Layout], canary: int = 0xA5) -> list[np.ndarray]:
        """`run` of a kernel with several outputs."""
        kernel, results, guard = self.kernels[symbol], [], 4096
        for order in (1, 2):
            raws = [aligned(output.bytes + 2 * guard, "uint8") for output in outputs]
            for raw in raws:
                raw[:] = canary
            flat = [raw[guard : guard + output.bytes].view(output.dtype) for raw, output in zip(raws, outputs, strict=True)]
            scratch = aligned(max(kernel.scratch, 1), "uint8")
            constants = []
            for constant in kernel.constants:
                constants.append(aligned(constant.size, str(constant.dtype)))
                constants[-1][:] = constant.reshape(-1)
            counters = np.zeros(kernel.counters, np.int32)
            self.launch(symbol, [*inputs, *constants, *flat, *([scratch] if kernel.scratch else []), *([counters] if kernel.counters else [])], order)
            assert not counters.any(), "counters are not 0 afterwards"
            for raw, output in zip(raws, outputs, strict=True):
                assert (raw[:guard] == canary).all() and (raw[guard + output.bytes :] == canary).all(), "kernel wrote outside its output"
            results.append([f.copy() for f in flat])
        for first, second in zip(*results, strict=True):
            assert first.tobytes() == second.tobytes(), "the result depends on the order of threads"
        return results[0]


class EmulatedProgram:
    """A whole network on the emulated GPU, step by step."""

    def __init__(self, program: Program, emulated: Path | Emulated, symbols: Mapping[str, str] | None = None) -> None:
        """emulated: a folder to compile the kernels in, or kernels of many programs, and then their symbols by `Kernel.key`."""
        self.program, self.symbols = program, dict(symbols or {})
        if isinstance(emulated, Path):
            kernels = {self.symbols.setdefault(s.kernel.key, f"k{len(self.symbols)}"): s.kernel for s in program.steps}
            emulated = Emulated(kernels, program.target, emulated)
        self.emulated = emulated
        self.values: dict[str, np.ndarray] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[Step, np.ndarray]]:
        """Every step and the value that it has just written. `self.values` then has all values that are written, `more` of a step too."""
        program = self.program
        spaces = {"workspace": [aligned(program.workspace + 64, "uint8")], "input": [], "output": []}
        spaces["workspace"][0][:] = 0xA5
        for space, ports in (("input", program.inputs), ("output", program.outputs)):
            for port in ports:
                spaces[space].append(aligned(program.values[port.value].layout.bytes, "uint8"))
                if space == "input":
                    spaces[space][-1][:] = np.ascontiguousarray(inputs[port.name]).view(np.uint8).reshape(-1)
        constants = aligned(program.constants.size, "uint8")
        constants[:] = program.constants
        counters = np.zeros(max(step.kernel.counters for step in program.steps), np.int32)

        def memory(value: str) -> np.ndarray:
            place = program.values[value].place
            assert place is not None
            return spaces["workspace"][0][place.offset :] if place.space == "workspace" else spaces[place.space][place.offset]

        for step in program.steps:
            arrays = [memory(v) for v in step.reads] + [constants[o:] for o in step.constants] + [memory(v) for v in [step.writes, *step.more]]
            arrays += [spaces["workspace"][0][step.scratch :]] if step.kernel.scratch else []
            arrays += [counters] if step.kernel.counters else []
            self.emulated.launch(self.symbols[step.kernel.key], arrays)
            for value in [step.writes, *step.more]:
                layout = program.values[value].layout
                self.values[value] = fetch(memory(value)[: layout.bytes].view(layout.dtype), layout).copy()
            yield step, self.values[step.writes]
