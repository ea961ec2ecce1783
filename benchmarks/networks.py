"""The real networks that the benchmarks run on: where their files, images and labels are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ("mobilenet_v2", "efficientnet_lite0", "resnet50")


@dataclass(frozen=True)
class Network:
    name: str
    model: Path
    preprocess: Path
    images: Path  # holds calibration/ and evaluation/ with a .tsv beside each


def default_data() -> Path:
    return Path(os.environ.get("QCOMPILER_DATA") or HERE.parent.parent / "shared" / "data")


def find(name: str, data: Path, cache: Path) -> Network | None:
    """A network by name, or None (and a line on standard error) when its file is neither there nor can be made.

    ResNet-50 is too large to ship: `make_resnet50.py` of the data directory writes it into `cache` once, which needs npm.
    """
    model = data / "models" / f"{name}.onnx"
    if not model.is_file():
        model = cache / f"{name}.onnx"
    if not model.is_file():
        script = data / f"make_{name}.py"
        if not script.is_file() or shutil.which("npm") is None:
            print(f"{name}: no {model}, and npm and {script} are needed to make it: left out", file=sys.stderr)
            return None
        cache.mkdir(parents=True, exist_ok=True)
        part = model.with_suffix(".part.onnx")
        subprocess.run([sys.executable, str(script), str(part)], check=True, stdout=subprocess.DEVNULL)
        part.replace(model)
    return Network(name, model, HERE / "preprocess" / f"{name}.yaml", data / "imagenet")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcompiler"
