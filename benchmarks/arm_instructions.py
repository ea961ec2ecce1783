"""Instructions that one inference executes on 64-bit Arm, beside LiteRT's (XNNPACK) for the same network: counted, under qemu.

    python benchmarks/arm_instructions.py --data ../shared/data [--network mobilenet_v2]... [--target arm64-dotprod]... [--steps 10] [--check]

The network is quantized once, with a few calibration images; its integer module is compiled for each target, and written as an int8 LiteRT model
(tflite_model.py): same weights, scales and bounds. Each runs on one thread under qemu's user mode, whose plugin interface counts the instructions of
the second run (instructions/). XNNPACK chooses its kernels by the features of the emulated core, as on a device; the core of arm64-i8mm has neither SVE
(XNNPACK's count is the same with it) nor SME (for which we have no kernels). A count is no time: it says how much work is left to a core.

--steps N prints our N longest steps. --check exits with 1 when ours executes more than LiteRT.

Needs: pip install '.[peers]'; apt-get install qemu-user g++-aarch64-linux-gnu (qemu-user-static has no plugins; --qemu names another program). The
wheel of LiteRT for aarch64 is downloaded with pip and kept in the cache folder; --litert names one, or a libLiteRt.so.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networks
import numpy as np
from tflite_model import tflite_model

from qcompiler.backend.artifact import RUNTIME
from qcompiler.backend.build import build
from qcompiler.backend.toolchain import find_compiler
from qcompiler.base.targets import find_target
from qcompiler.base.text import table
from qcompiler.calibration.data import open_samples
from qcompiler.importers.model import load
from qcompiler.pipeline.compile import compile_stages
from qcompiler.pipeline.library import Compilation

HERE = Path(__file__).resolve().parent / "instructions"
CALIBRATION_IMAGES = 16  # counts do not depend on the values
SYSROOT = Path("/usr/aarch64-linux-gnu")  # of Debian's cross compiler


@dataclass(frozen=True)
class Core:
    """What qemu emulates, and what /proc/cpuinfo says there (LiteRT reads it; qemu would show this machine's own)."""

    emulated: str
    part: int
    features: str


_BASE = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_DOT = f"{_BASE} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
CORES = {
    "arm64-neon": Core("cortex-a72", 0xD08, _BASE),
    "arm64-dotprod": Core("neoverse-n1", 0xD0C, _DOT),
    "arm64-i8mm": Core("max,sve=off,sme=off", 0xD40, f"{_DOT} i8mm bf16"),
}


def find_qemu(named: str | None) -> str:
    """A qemu-aarch64 with plugins. Exits when there is none."""
    for name in [named] if named else ["qemu-aarch64", "qemu-aarch64-static"]:
        found = shutil.which(name)
        if found and "-plugin" in subprocess.run([found, "-help"], capture_output=True, text=True).stdout:
            return found
    sys.exit(f"{named or 'qemu-aarch64'}: not found, or built without plugins (apt-get install qemu-user)")


def find_litert(named: Path | None, cache: Path) -> Path:
    """libLiteRt.so for aarch64: the file named, or one unpacked from the wheel, which is downloaded when none is named. Exits when there is none."""
    if named is not None and named.suffix == ".so":
        return named
    if named is None:
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28)]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.11", *platforms]
        wheels = sorted(cache.glob("ai_edge_litert-*aarch64.whl"))
        if not wheels:
            cache.mkdir(parents=True, exist_ok=True)
            if subprocess.run([*pip, f"--dest={cache}", "ai-edge-litert"]).returncode:
                sys.exit("the wheel of ai-edge-litert for aarch64 can't be downloaded; name one with --litert")
            wheels = sorted(cache.glob("ai_edge_litert-*aarch64.whl"))
        named = wheels[-1]
    with zipfile.ZipFile(named) as wheel:
        return Path(wheel.extract("ai_edge_litert/libLiteRt.so", named.with_suffix("")))


class Counter:
    """Runs programs under qemu with the counting plugin, on one emulated core."""

    def __init__(self, qemu: str, core: Core, folder: Path) -> None:
        self.folder = folder
        root = folder / f"root-{core.part:x}"
        (root / "proc").mkdir(parents=True, exist_ok=True)
        (root / "lib").unlink(missing_ok=True)
        (root / "lib").symlink_to(SYSROOT / "lib")
        text = f"processor\t: 0\nFeatures\t: {core.features}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x1\n"
        (root / "proc" / "cpuinfo").write_text(f"{text}CPU part\t: 0x{core.part:x}\nCPU revision\t: 1\n\n")
        plugin = self.built("plugin", [find_compiler(find_target("native")), "-shared", "-fPIC"])
        self.command = [qemu, "-cpu", core.emulated, "-L", str(root), "-U", "LD_LIBRARY_PATH", "-plugin", str(plugin)]

    def built(self, name: str, compiler: Sequence[str]) -> Path:
        program = self.folder / name
        if not program.exists():
            options = ["-x", "c", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{RUNTIME / 'include'}"]
            subprocess.run([*compiler, *options, str(HERE / f"{name}.c"), "-o", str(program), "-ldl"], check=True)
        return program

    def counts(self, name: str, *arguments: Path) -> list[int]:
        """Instructions between each pair of markers. Exits when the program fails."""
        program = self.built(name, [find_compiler(find_target("arm64-neon"))])
        done = subprocess.run([*self.command, str(program), *map(str, arguments)], capture_output=True, text=True)
        marks = [int(m) for m in re.findall(r"^instructions (\d+)$", done.stderr, re.MULTILINE)]
        if done.returncode or len(marks) < 4:
            sys.exit(f"{name} failed under {' '.join(self.command[:3])} (status {done.returncode}): {done.stderr[-600:]}")
        return [b - a for a, b in zip(marks[::2], marks[1::2], strict=True)]


def litert_file(compilation: Compilation, sample: Any) -> bytes:
    """The integer network as a LiteRT model; the scale of its output holds that of `sample`."""
    session = compilation.built.session()
    (output,) = session.run(sample).values()
    return tflite_model(compilation.integer, float(np.abs(output).max()) * 1.25 / 127)


def longest(manifest: Any, steps: Sequence[int], count: int) -> list[list[str]]:
    order = sorted(range(len(steps)), key=lambda i: -steps[i])[:count]
    described = [(manifest["steps"][i], steps[i]) for i in order]
    return [[s["id"], s["op"], s["kernel"], f"{n / 1e6:.3f}", f"{s['macs'] / n:.1f}" if s["macs"] else ""] for s, n in described]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=networks.default_data())
    parser.add_argument("--cache", type=Path, default=networks.default_cache())
    parser.add_argument("--network", action="append", choices=networks.NAMES)
    parser.add_argument("--target", action="append", choices=list(CORES))
    parser.add_argument("--steps", type=int, default=0, metavar="N")
    parser.add_argument("--qemu", metavar="PROGRAM")
    parser.add_argument("--litert", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    qemu, litert = find_qemu(options.qemu), find_litert(options.litert, options.cache)
    rows, failed = [], False
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as name:
        folder = Path(name)
        for network in filter(None, (networks.find(n, options.data, options.cache) for n in options.network or ("mobilenet_v2", "resnet50"))):
            inputs = load(network.model).inputs
            samples = list(itertools.islice(open_samples(network.images / "calibration", inputs, network.preprocess), CALIBRATION_IMAGES))
            compilation = compile_stages(network.model, "native", samples, preset="fast")
            model = folder / f"{network.name}.tflite"
            model.write_bytes(litert_file(compilation, samples[0]))
            for target in options.target or CORES:
                artifact = build(compilation.integer, find_target(target), "generate code").link()  # one integer network serves every target
                library = artifact.save(folder / f"{network.name}-{target}.so")
                counter = Counter(qemu, CORES[target], folder)
                _, ours, *steps = counter.counts("library", library)
                _, theirs = counter.counts("litert", litert, model)
                rows.append([network.name, target, f"{ours / 1e6:.2f}", f"{theirs / 1e6:.2f}", f"{ours / theirs:.3f}"])
                failed |= ours > theirs
                if options.steps:
                    title = f"{network.name}, {target}: instructions by step"
                    print(table(title, ("step", "operator", "kernel", "millions|", "MAC/instruction|"), longest(artifact.manifest, steps, options.steps)))
    print(table("Millions of instructions per inference", ("network", "target", "ours|", "LiteRT|", "ratio|"), rows))
    return 1 if failed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
