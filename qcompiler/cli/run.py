"""The verb `run`: a library on arrays, or on image files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import qcompiler
from qcompiler.base.errors import DataError
from qcompiler.base.files import check_writable, read_regular, replacing
from qcompiler.cli.arguments import pair, positive, read_files
from qcompiler.cli.boards import add_board, session_of
from qcompiler.cli.process import show
from qcompiler.pipeline.options import OPTIONS

TOP = 5


def add(verb: Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]) -> None:
    """Add the verb with `verb(name, run, summary, description)`, which makes its parser."""
    p = verb(
        "run",
        _run,
        "run a library on arrays or images",
        "Run FILE.so once on arrays, or once for every image, and print the five best classes of a classifier; write the outputs where --output says.",
    )
    p.add_argument("library", metavar="FILE.so")
    p.add_argument("images", nargs="*", metavar="IMAGE", help="image files, for a library with one input; needs --preprocess")
    p.add_argument("--input", action="append", default=[], metavar="NAME=X.npy", type=pair, help="one array per input; repeat for more inputs")
    p.add_argument("--preprocess", metavar="FILE.yaml", help=OPTIONS["preprocess"].help)
    p.add_argument("--labels-names", metavar="FILE", help="names of the classes, one per line, for what is printed")
    p.add_argument("-o", "--output", metavar="OUT.npz", help="file for the outputs, one array per output name; of images one after the other")
    p.add_argument("--threads", type=positive, default=1, metavar="N", help="threads of a run (default 1)")
    add_board(p, "run FILE.so")


def _run(options: argparse.Namespace) -> int:
    from qcompiler.calibration.ports import real_outputs

    output = None if options.output is None else check_writable(options.output, [*read_files(options), *options.images])
    if output is not None and output.suffix != ".npz":
        raise DataError(f"{output}: outputs are written as .npz; name a file that ends so")
    for image in options.images:
        if Path(image).suffix in (".npy", ".npz"):
            more = "an array for each input" if image.endswith(".npy") else "of an .npz, one .npy for each input"
            raise DataError(f"{image}: only image files stand alone; arrays are named: --input NAME=X.npy, {more}, and --output OUT.npz")
    if bool(options.images) == bool(options.input):
        raise DataError("give either image files or --input NAME=X.npy for every input")
    if options.input and output is None:
        raise DataError("--input needs --output: the outputs are arrays, and go to a file")
    if options.input and (options.preprocess or options.labels_names):
        raise DataError("--preprocess and --labels-names are for image files; arrays are taken as they are")
    names = [] if options.labels_names is None else _lines(options.labels_names)
    with session_of(options) as session:
        runs = [session.run(sample) for sample in (_images(options, session) if options.images else [_arrays(options)])]
    whole: dict[str, Any] = {name: np.concatenate([r[name] for r in runs]) if len(runs) > 1 else runs[0][name] for name in runs[0]}
    if output is not None:
        with replacing(output) as temporary:
            np.savez(temporary, **whole)
    described = {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in whole.items()}
    best = {image: _best(real_outputs(session.manifest, run), names) for image, run in zip(options.images, runs, strict=False)}
    lines = [f"{image}\n" + "\n".join(f"  {value:10.4f}  {name}" for name, value in rows) for image, rows in best.items() if rows]
    lines += [f"{output or 'outputs'}: " + ", ".join(f"{n} {d['dtype']}{d['shape']}" for n, d in described.items())]
    top = {image: [{"class": name, "value": value} for name, value in rows] for image, rows in best.items()}
    document = {"output": None if output is None else str(output), "arrays": described, **({"top": top} if top else {})}
    show(options, document, lambda: "\n".join(lines))
    return 0


def _arrays(options: argparse.Namespace) -> dict[str, np.ndarray]:
    from qcompiler.calibration.arrays import read_array

    inputs: dict[str, np.ndarray] = {}
    for name, path in options.input:
        if name in inputs:
            raise DataError(f"--input {name} is given twice")
        inputs[name] = read_array(path)
    return inputs


def _images(options: argparse.Namespace, session: qcompiler.Session) -> list[dict[str, np.ndarray]]:
    from qcompiler.calibration.ports import image_of
    from qcompiler.calibration.preprocess import load_preprocess

    if len(session.inputs) != 1:
        raise DataError(f"images are for a library with one input, this one has {len(session.inputs)}; give --input NAME=X.npy for each")
    if options.preprocess is None:
        raise DataError("image files need --preprocess FILE.yaml: how they become the network's input")
    prepared = load_preprocess(options.preprocess)
    return [{session.inputs[0].name: image_of(session.manifest, prepared, Path(image))} for image in options.images]


def _lines(path: str) -> list[str]:
    try:
        return read_regular(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as text: {getattr(error, 'strerror', None) or error}") from error


def _best(outputs: Mapping[str, np.ndarray], names: Sequence[str]) -> list[tuple[str, float]]:
    """(class, value) of the best classes of the first output of shape [1, classes]; nothing without one. Raises DataError where `names` are too few."""
    scores = next((a[0] for a in outputs.values() if a.ndim == 2 and a.shape[0] == 1 and a.shape[1] > 1), None)
    if scores is None:
        return []
    if names and len(names) != len(scores):
        raise DataError(f"--labels-names has {len(names)} lines, and the network {len(scores)} classes")
    order = np.argsort(-scores, kind="stable")[:TOP]
    return [(names[i] if names else str(i), float(scores[i])) for i in order]
