"""Runs libraries for other architectures under an emulator, with `emulated_host.c` as the program that loads them."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.backend.artifact import Artifact
from qcompiler.base.host import host_architecture
from qcompiler.base.targets import Target

ROOT = Path(__file__).resolve().parent.parent
ARM = ("arm64-neon", "arm64-dotprod", "arm64-i8mm", "armv7-neon")


@dataclass(frozen=True)
class Host:
    """The test program, compiled for one architecture."""

    target: Target
    program: Path

    @staticmethod
    def build(target: Target, folder: Path) -> Host:
        program = folder / f"host-{target.architecture}"
        if not program.exists():
            include = ROOT / "qcompiler" / "runtime" / "cpp" / "include"
            source = Path(__file__).with_name("emulated_host.c")
            compiler = target.compiler[0]
            subprocess.run([compiler, "-x", "c", "-O1", "-Wall", "-Werror", f"-I{include}", str(source), "-o", str(program), "-ldl"], check=True)
        return Host(target, program)

    def command(self, library: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
        """Run it; `options` go to the emulator."""
        emulator = [] if self.target.architecture == host_architecture() else [*self.target.emulator, *options]
        return subprocess.run([*emulator, str(self.program), str(library), str(folder)], capture_output=True, text=True, timeout=600)

    def run(self, artifact: Artifact, inputs: Mapping[str, np.ndarray], folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(outputs, every value that lies in the workspace as its step leaves it: float, or canonical int8) of one run."""
        folder.mkdir()
        manifest = artifact.manifest
        library = artifact.save(folder / "model.so")
        for i, port in enumerate(manifest["inputs"]):
            inputs[port["name"]].tofile(folder / f"input{i}.bin")
        layouts = [manifest["layouts"].get(step["id"]) for step in manifest["steps"]]
        regions = [_region(layout) if layout and layout["space"] == "workspace" else (0, 0) for layout in layouts]
        (folder / "regions.txt").write_text("".join(f"{offset} {size}\n" for offset, size in regions))
        done = self.command(library, folder)
        assert done.returncode == 0, f"{self.target.name}: exit status {done.returncode}: {done.stderr}"
        outputs = {p["name"]: np.fromfile(folder / f"output{i}.bin", p["dtype"]).reshape(p["shape"]) for i, p in enumerate(manifest["outputs"])}
        trace, values, at = (folder / "trace.bin").read_bytes(), {}, 0
        for step, layout, (_, size) in zip(manifest["steps"], layouts, regions, strict=True):
            if size and not step.get("auxiliary"):
                values[step["id"]] = _decoded(trace[at : at + size], layout)
            at += size
        return outputs, values

    def run_workspace(self, library: Path, workspace: np.ndarray, folder: Path) -> np.ndarray:
        """All steps on the bytes `workspace`; returns what they become."""
        np.pad(workspace, (0, 64)).tofile(folder / "workspace.bin")  # qc_workspace_bytes() has 64 spare bytes
        done = self.command(library, folder)
        assert done.returncode == 0, f"{self.target.name}: exit status {done.returncode}: {done.stderr}"
        return np.fromfile(folder / "workspace.bin", np.uint8)[: workspace.size]


def _stored_shape(layout: Mapping[str, Any]) -> Sequence[int]:
    shape = layout["shape"]
    if "halo" not in layout:
        return list(shape)
    top, left, bottom, right = layout["halo"]
    return [shape[0], shape[1] + top + bottom, shape[2] + left + right, layout["pitch"]]


def _region(layout: Mapping[str, Any]) -> tuple[int, int]:
    return layout["offset"], math.prod(_stored_shape(layout)) * np.dtype(layout["storage"]).itemsize


def _decoded(data: bytes, layout: Mapping[str, Any]) -> np.ndarray:
    image = np.frombuffer(data, layout["storage"]).reshape(_stored_shape(layout))
    if "halo" in layout:
        shape, (top, left, _, _) = layout["shape"], layout["halo"]
        image = image[:, top : top + shape[1], left : left + shape[2], : shape[3]]
    return (image ^ 128).view(np.int8) if image.dtype == np.uint8 else image
