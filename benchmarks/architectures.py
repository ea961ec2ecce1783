"""Architectures of networks as PyTorch exports them, small and with random weights: compiled or refused, and what int8 makes of them.

    python benchmarks/architectures.py [--only NAME]... [--preset default] [--dynamo] [--results FILE.md]

architectures.yaml lists classes of the transformers package and their settings; torch.onnx writes each, with its older exporter or with --dynamo its newer
one. Inputs are normal numbers or random words: figures say what becomes of an architecture's operators, not how accurate trained weights are.
SQNR: of the worst output against ONNX Runtime, over samples that did not calibrate; NNCF: of its network in OpenVINO, where installed. float: operators
that stay float32. of float: ratio of the least times to ONNX Runtime float on one thread, in turns. Needs torch, transformers, onnxscript, onnxruntime.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from soak import machine, markdown

import qcompiler
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.runtime import peers
from qcompiler.runtime.bench import interleave
from qcompiler.runtime.session import Session

LIST = Path(__file__).resolve().parent / "architectures.yaml"
WORDS, LENGTH = 50, 12
CALIBRATION, EVALUATION = 8, 6  # samples


def with_tensors(network: Any, names: list[str]) -> Any:
    """The network with tensors in and one tensor out."""
    import torch

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *tensors: Any) -> Any:
            found = network(**dict(zip(names, tensors, strict=True))) if names else network(*tensors)
            logits = getattr(found, "logits", None)
            return found[0] if logits is None else logits

    return Wrapped()


def made(entry: dict[str, Any], small: dict[str, Any]) -> tuple[Any, tuple[Any, ...], list[str]]:
    """(the network, example inputs, their names)."""
    import torch
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, entry["class"])
    network = cls(cls.config_class(**(small if entry.get("small") else {}), **entry["settings"]))
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="linear")
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    shape = entry.get("values") or ([1, 3, entry["image"], entry["image"]] if "image" in entry else None)
    if shape is not None:
        whole = with_tensors(network, [])
        if norms:  # statistics of what comes, so that a signal neither dies nor grows on its way
            for norm in norms:
                norm.momentum = 1.0
            with torch.no_grad():
                whole.train()(torch.randn(8, *shape[1:]))
        return whole.eval(), (torch.randn(*shape),), ["values"]
    names = ["input_ids", "attention_mask"]
    return with_tensors(network, names).eval(), (torch.randint(3, WORDS, (1, LENGTH)), torch.ones(1, LENGTH, dtype=torch.int64)), names


def sample(session: Any, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {}
    for port in session.get_inputs():
        if "int64" in port.type:
            found[port.name] = np.ones(port.shape, np.int64) if "mask" in port.name else rng.integers(3, WORDS, port.shape)
        else:
            found[port.name] = rng.standard_normal(port.shape).astype(np.float32)
    return found


def row(path: Path, preset: str, transformer: bool) -> list[str]:
    """SQNR, that of NNCF's network, operators in float, and the time of float."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    peer = onnxruntime.InferenceSession(str(path), options)
    samples = [sample(peer, seed) for seed in range(CALIBRATION)]
    artifact = qcompiler.compile(path, calibration=samples, preset=preset)
    session = Session(artifact.save(path.with_suffix(".so")))
    names = [o.name for o in peer.get_outputs()]
    feeds = [sample(peer, 100 + i) for i in range(EVALUATION)]
    wanted = [peer.run(None, feed) for feed in feeds]

    def worst(results: list[list[np.ndarray]]) -> str:
        pairs = zip(zip(*results, strict=True), zip(*wanted, strict=True), strict=True)  # per output
        return f"{min(sqnr_db(np.stack(a), np.stack(b)) for a, b in pairs):.1f}"

    ours = worst([[found[n] for n in names] for found in map(session.run, feeds)])
    theirs = ""
    if peers.installed("openvino", "nncf"):
        try:
            quantized = peers.nncf_model(path, samples, transformer=transformer)
            theirs = worst([list(peers.openvino_call(quantized, feed, 1)().values()) for feed in feeds])
        except Exception as error:  # of many kinds, and NNCF's affair
            theirs = type(error).__name__
    a, b = interleave({"ours": lambda: session.run(feeds[0]), "float": lambda: peer.run(None, feeds[0])}, seconds=0.5)
    return [ours, theirs, str(len(artifact.manifest["float_ops"])), f"{a.minimum / b.minimum:.2f}"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", action="append", default=[])
    p.add_argument("--preset", default="default")
    p.add_argument("--dynamo", action="store_true")
    p.add_argument("--results", type=Path)
    given = p.parse_args()
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    listed = yaml.safe_load(LIST.read_text("utf-8"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only or listed["models"]:
            entry = listed["models"][name]
            network, inputs, names = made(entry, listed["small"])
            path = Path(folder) / f"{name}.onnx"
            try:
                torch.onnx.export(network, inputs, path, input_names=names, dynamo=given.dynamo, verbose=False, opset_version=20 if given.dynamo else 17)
            except Exception as error:  # of many kinds, and torch's affair
                rows.append([name, "not exported: " + str(error).split("\n", 1)[0][:100], "", "", ""])
                continue
            try:
                rows.append([name, *row(path, given.preset, transformer=bool(entry.get("small")) or any("heads" in key for key in entry["settings"]))])
            except qcompiler.QCompilerError as error:
                rows.append([name, f"refused: {error}", "", "", ""])
            print(*rows[-1], flush=True)
    table = markdown(["network", "SQNR dB", "NNCF", "operators in float", "of float"], rows)
    print(table)
    if given.results:
        given.results.write_text(f"{table}\n\n{machine()}; transformers {transformers.__version__}, torch {torch.__version__}\n", "utf-8")


if __name__ == "__main__":
    main()
