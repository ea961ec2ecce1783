"""Accuracy of int8 against float on a network of your own that takes arrays (sentences, lines of text, spectra): SQNR, cosine and agreement of each output.

    python benchmarks/accuracy_arrays.py --model encoder.onnx --calibration calibration.npz --evaluation others.npz
        [--preset accurate]... [--rivals] [--transformer] [--ctc BLANK] [--note TEXT]

One array per input name, first axis = samples. Outputs are judged where they count: positions that the network's own masks hide are left out, for every method
alike. Cosine: of each sample's whole output, mean and least. Agreement: how often the largest element of the last axis is in the same place; with --ctc, how
many samples have the same text (the classes of the largest elements, without repetitions and blanks).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcompiler.base.text import number, percent, table

Sample = Mapping[str, np.ndarray]
Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Network:
    """A model file, samples to calibrate with and others to judge by, and what counts of an output of a sample."""

    path: Path
    calibration: list[Sample]
    evaluation: list[Sample]
    counting: Callable[[Sample, Outputs], Outputs]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.calibration[0].items()}


def opened(path: Path, calibration: Path, evaluation: Path) -> Network:
    """The network at the shapes that the data has."""
    from qcompiler.calibration.padding import Padding
    from qcompiler.importers.model import load
    from qcompiler.pipeline.float_code import float_code

    def samples(file: Path) -> list[Sample]:
        with np.load(file, allow_pickle=False) as arrays:
            held = dict(arrays)
        return [{name: a[i : i + 1] for name, a in held.items()} for i in range(len(next(iter(held.values()))))]

    network = Network(path, samples(calibration), samples(evaluation), lambda s, o: o)
    model = load(path, network.shapes)
    padding = Padding(model.module)
    if not padding:
        return network
    twin = float_code(model).session()
    return Network(path, network.calibration, network.evaluation, lambda s, o: padding.of(twin, s).outputs(o))


def ours(network: Network, preset: str, folder: Path) -> Callable[[Sample], Outputs]:
    import qcompiler

    artifact = qcompiler.compile(network.path, calibration=network.calibration, preset=preset, input_shapes=network.shapes)
    for warning in artifact.manifest["warnings"]:
        print(f"{preset}: {warning}", file=sys.stderr)
    return qcompiler.load(artifact.save(folder / f"{preset}.so"), threads=2).run


def onnxruntime_of(path: Path) -> Callable[[Sample], Outputs]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    names = [o.name for o in session.get_outputs()]
    return lambda sample: dict(zip(names, session.run(None, dict(sample)), strict=True))


def nncf_of(network: Network, transformer: bool) -> Callable[[Sample], Outputs]:
    import openvino

    from qcompiler.runtime import peers

    model = peers.nncf_model(network.path, network.calibration, transformer=transformer)
    compiled = openvino.Core().compile_model(model, "CPU", peers.openvino_settings(2))
    names = list(onnxruntime_of(network.path)(network.evaluation[0]))
    return lambda sample: dict(zip(names, (np.array(a) for a in compiled(dict(sample)).to_tuple()), strict=True))


def text(scores: np.ndarray, blank: int) -> list[int]:
    """What a CTC network [positions, classes] reads: the best class of each position, once where it repeats, without blanks."""
    best = scores.argmax(-1).ravel()
    return [int(c) for i, c in enumerate(best) if c != blank and (i == 0 or c != best[i - 1])]


def rows(network: Network, method: str, run: Callable[[Sample], Outputs], seconds: float, blank: int | None = None) -> list[list[str]]:
    """A row for each float output that changes. blank: the class that means nothing, of a CTC network."""
    reference = onnxruntime_of(network.path)
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for sample in network.evaluation:
        wanted, got = (network.counting(sample, f(sample)) for f in (reference, run))
        for name, array in wanted.items():
            if array.dtype == np.float32:
                pairs.setdefault(name, []).append((array.astype(np.float64), got[name].reshape(array.shape).astype(np.float64)))
    found = []
    for name, both in pairs.items():
        noise, power = (sum(float(np.square(x).sum()) for x in xs) for xs in ([g - w for w, g in both], [w for w, _ in both]))
        if noise <= 1e-9 * power:
            continue  # an input that is handed out
        cosine = [float((w * g).sum() / max(np.sqrt(np.square(w).sum() * np.square(g).sum()), 1e-30)) for w, g in both]
        if blank is None:
            same = [(w.argmax(-1) == g.argmax(-1))[np.abs(w).max(-1) > 0] for w, g in both]
        else:
            same = [np.array([text(w, blank) == text(g, blank)]) for w, g in both]
        values = [number(10 * np.log10(power / noise)), number(float(np.mean(cosine)), ".5f"), number(min(cosine), ".5f")]
        found.append([network.path.stem, method, name, str(len(both)), *values, percent(float(np.concatenate(same).mean())), number(seconds, ".1f")])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "evaluation"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--preset", action="append", choices=["fast", "default", "accurate"], help="repeat for more (default: default)")
    parser.add_argument("--rivals", action="store_true", help="NNCF's and ONNX Runtime's quantization too, where they are installed")
    parser.add_argument("--transformer", action="store_true", help="tell NNCF that the network is a transformer")
    parser.add_argument("--ctc", type=int, metavar="BLANK", help="outputs are scores of a CTC network, whose class BLANK means nothing: compare texts")
    parser.add_argument("--note", default="", help="a line above the table")
    options = parser.parse_args()
    from qcompiler.runtime import peers

    network, found = opened(options.model, options.calibration, options.evaluation), []
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):  # the rivals print
        folder = Path(name)
        makers: dict[str, Callable[[], Callable[[Sample], Outputs]]] = {p: (lambda p=p: ours(network, p, folder)) for p in options.preset or ["default"]}
        if options.rivals and peers.installed("nncf", "openvino"):
            makers["NNCF, transformer" if options.transformer else "NNCF"] = lambda: nncf_of(network, options.transformer)
        if options.rivals and peers.installed("onnxruntime"):
            makers["ORT MinMax"] = lambda: onnxruntime_of(peers.onnxruntime_int8(network.path, network.calibration, folder))
        for method, make in makers.items():
            start = time.perf_counter()
            run = make()
            found += (new := rows(network, method, run, time.perf_counter() - start, options.ctc))
            print(*(" ".join(row) for row in new), sep="\n", file=sys.stderr)  # what comes first is known soon
    columns = ("network", "method", "output", "samples|", "SQNR dB|", "cosine|", "least|", "agreement|", "compile s|")
    print(table(options.note or f"{len(network.calibration)} samples for calibration, others to judge", columns, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
