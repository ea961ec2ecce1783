"""The networks that the benchmarks run on: where their files are, and what they are calibrated with."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
NAMES = ("mobilenet_v2", "efficientnet_lite0", "resnet50")  # trained: these have images and labels
GENERATED = ("squeezenet", "densenet121", "mobilenet_v2_shifted", "efficientnet_lite4")  # see generated.py
RANDOM_IMAGES = 16  # enough for the ranges of random weights


@dataclass(frozen=True)
class Network:
    """`images` holds calibration/ and evaluation/ with a .tsv beside each, and `preprocess` says how they are read; both are None for made networks.
    `tokens`: how many words each input of integers takes its ids from, of a network that reads text."""

    name: str
    model: Path
    preprocess: Path | None
    images: Path | None
    tokens: Mapping[str, int] | None = None

    def calibration(self) -> Any:
        """What `qcompiler.compile` takes as `calibration`."""
        if self.images is not None:
            return self.images / "calibration"
        import onnx
        from generated import random_images

        ports = onnx.load(str(self.model), load_external_data=False).graph.input
        if self.tokens is not None:
            rng = np.random.default_rng(0)
            sizes = {p.name: tuple(max(1, d.dim_value) for d in p.type.tensor_type.shape.dim) for p in ports}
            return [{n: rng.integers(*_ids(self.tokens[n]), sizes[n], np.int64) for n in sizes} for _ in range(RANDOM_IMAGES)]
        port = ports[0]
        shape = tuple(max(1, d.dim_value) for d in port.type.tensor_type.shape.dim)
        return [{port.name: image} for image in random_images(shape, RANDOM_IMAGES)]


def _ids(words: int) -> tuple[int, int]:
    """Half-open range of the ids of an input: all words of its table, or 1 for a mask, which has no table."""
    return (0, words) if words else (1, 2)


def text_network(path: Path, length: int, cache: Path, any_batch: bool = False, most: int | None = None) -> Network:
    """A network that reads tokens, batch 1 (any_batch: of any size), in a copy of so many tokens. Its inputs are integers; those that index no table are masks,
    and all ones. most: words that are kept of a table, for a copy that is smaller and no quicker."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    tables = {t.name: t for t in graph.initializer if len(t.dims) == 2}
    gathered = [n for n in graph.node if n.op_type == "Gather" and n.input[0] in tables]
    for table in {n.input[0]: tables[n.input[0]] for n in gathered if most and any(n.input[1] == p.name for p in graph.input)}.values():
        table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:most], table.name))
    looked_up = [(n.input[1], tables[n.input[0]].dims[0]) for n in gathered]
    words = {p.name: min((size for name, size in looked_up if name == p.name), default=0) for p in graph.input}
    for port in graph.input:
        for dim, size in zip(port.type.tensor_type.shape.dim, (1, length), strict=True):
            dim.Clear()
            dim.dim_value = size
        if any_batch:
            port.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.value_info[:]
    cache.mkdir(parents=True, exist_ok=True)
    name = f"{path.stem}-{length}{'-any' if any_batch else ''}{f'-{most}' if most else ''}"
    target, part = cache / f"{name}.onnx", cache / f"{name}.{os.getpid()}.onnx"
    onnx.save(model, str(part))
    part.replace(target)
    return Network(f"{path.stem}, {length} tokens", target, None, None, words)


def default_data() -> Path:
    return Path(os.environ.get("QCOMPILER_DATA") or HERE.parent.parent / "shared" / "data")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcompiler"


def find(name: str, data: Path, cache: Path) -> Network | None:
    """A network by name, or None (and a line on standard error) when its file is neither there nor can be made.

    ResNet-50 is too large to ship: `make_resnet50.py` of the data directory writes it into `cache` once, which needs npm.
    """
    if name in GENERATED:
        return _generated(name, data, cache)
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


def _generated(name: str, data: Path, cache: Path) -> Network | None:
    """Made anew each time: that takes a second, and a file of an older recipe would go unnoticed."""
    import generated
    import onnx

    if name in generated.LIGHT:
        model = generated.with_random_weights(onnx.load(str(generated.light_path(name))))
    elif name == "efficientnet_lite4":
        model = generated.efficientnet_lite()
    else:
        source = find("mobilenet_v2", data, cache)
        if source is None:
            return None
        model = generated.with_shifted_channels(onnx.load(str(source.model)))
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{name}.onnx"
    part = cache / f"{name}.{os.getpid()}.onnx"
    onnx.save(model, str(part))
    part.replace(path)
    return Network(name, path, None, None)


def add_arguments(parser: argparse.ArgumentParser, names: tuple[str, ...] = (*NAMES, *GENERATED)) -> None:
    """--data, --cache and --network, for `chosen`."""
    parser.add_argument("--data", type=Path, default=default_data(), help="directory with models/ and imagenet/")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where networks that have to be made are kept")
    parser.add_argument("--network", action="append", choices=names, help=f"default: all of {', '.join(names)}")
    parser.set_defaults(networks=names)


def chosen(options: argparse.Namespace) -> list[Network]:
    """The networks that the command line asks for, as far as they are to be had."""
    candidates = [find(name, options.data, options.cache) for name in options.network or options.networks]
    return [network for network in candidates if network is not None]
