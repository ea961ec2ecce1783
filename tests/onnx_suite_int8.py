"""The node cases of the ONNX backend suite in int8: hundreds of networks with one sample each, calibrated, quantized and linked as one.

What becomes of each case is in onnx_suite_int8.tsv; cases that have at least 25 dB in int8 are not listed. After a change that is meant:
`python -m tests.onnx_suite_int8`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qcompiler.backend.build import session_of
from qcompiler.base.targets import find_target
from qcompiler.base.tensor import TensorInfo
from qcompiler.calibration.data import open_samples
from qcompiler.importers.model import FloatModel
from qcompiler.importers.onnx_file import OnnxFile
from qcompiler.pipeline.float_code import float_code
from qcompiler.pipeline.job import Job
from qcompiler.pipeline.library import describe
from qcompiler.pipeline.stages import Equalized, FloatTwin, calibrate, correct, generate, integer_network
from qcompiler.plan.planner import observed_ids
from qcompiler.plan.recipes import recipe
from qcompiler.refine.equalization import Equalization
from tests.onnx_suite import FLOAT_TABLE, Case, cases, expected, feeds_of, imported, merged, write

TABLE = "onnx_suite_int8.tsv"
LEAST = 25.0  # dB
GOOD = "int8"


PARTS = 12
"""Into so many the cases are divided: those of a part are one network, so that what is a transformer among them decides for all of the part."""


def chosen() -> list[str]:
    """Cases that compile in float and have a float input, without those of expanded definitions."""
    refused = expected(FLOAT_TABLE)
    return [n for n, case in cases().items() if "_expanded" not in n and n not in refused and any(a.dtype.kind == "f" for a in case.feeds.values())]


def joined(models: dict[str, FloatModel]) -> FloatModel:
    """The networks side by side as one."""

    def ports(which: str) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(f"{name}/{i.name}", i.shape, i.dtype) for name, model in models.items() for i in getattr(model, which))

    sources = {f"{name}/{k}": v for name, model in models.items() for k, v in model.sources.items()}
    readers = {f"{name}/{k}": [f"{name}/{r}" for r in v] for name, model in models.items() for k, v in model.readers.items()}
    return FloatModel(merged(models), ports("inputs"), ports("outputs"), "suite", "", sources, readers, OnnxFile(Path("suite.onnx")), math.inf, frozenset())


def int8_verdicts(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Of each case one of these. "int8": at least 25 dB. "float": nothing of it is computed in int8, and every operator that stays float has a reason in the
    manifest. "not finite": an input, or a value that a plan would ask for, is infinite or NaN. "below 25 dB": a mean of squares in 8 bits, of which a root
    is taken. "wrong integers"."""
    found, models = dict[str, str](), dict[str, FloatModel]()
    for name in names:
        model = imported(cases()[name], folder)
        if isinstance(model, str):
            found[name] = model
        elif not all(np.isfinite(a).all() for a in cases()[name].feeds.values() if a.dtype.kind == "f"):
            found[name] = "not finite: an input"
        else:
            models[name] = model
    for name in _not_finite(models):
        found[name] = "not finite: a value inside"
        del models[name]
    model, feeds = joined(models), feeds_of(models)
    job = Job(model, open_samples([feeds], model.inputs), recipe("fast", (), ()), find_target("native"))
    network = integer_network(
        calibrate(Equalized(job, FloatTwin(job, float_code(model)), Equalization())), {}
    )  # as `compile` does, without a file to compare with
    corrected = correct(network, generate(network))
    artifact = corrected.built.link(**describe(corrected.integer, model))
    with session_of(artifact) as session:
        outputs = session.run(feeds)
    stored, reasons = artifact.manifest["values"], artifact.manifest["float_ops"]
    for name, model in models.items():
        if not any(v.startswith(f"{name}/") for v in stored):
            assert all(r["reason"] for r in reasons if r["id"].startswith(f"{name}/")), name
            found[name] = "float"
        else:
            found[name] = _judged(cases()[name], [outputs[f"{name}/{o.name}"] for o in model.outputs])
    return found


def _not_finite(models: dict[str, FloatModel]) -> set[str]:
    """The cases in which a value that the plan asks for is infinite or NaN."""
    model, bad = joined(models), set[str]()
    wanted = set(observed_ids(model))

    def visit(name: str, array: np.ndarray) -> None:
        if name in wanted and array.dtype == np.float32 and not np.isfinite(array).all():
            bad.add(name.split("/")[0])

    float_code(model).session().trace(feeds_of(models), visit)
    return bad


def _judged(case: Case, got: list[np.ndarray]) -> str:
    worst = np.inf
    for want, have in zip(case.wanted, got, strict=True):
        if want.dtype.kind in "iub":
            if not np.array_equal(want, have):
                return "wrong integers"
            continue
        want, have = want.astype(np.float64), have.astype(np.float64)
        noise, signal = float(((want - have) ** 2).sum()), float((want**2).sum())
        worst = min(worst, np.inf if noise == 0 else 10 * np.log10(signal / noise) if signal else -np.inf)
    return GOOD if worst >= LEAST else "below 25 dB"


def main() -> None:
    verdicts: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in range(PARTS):
            verdicts |= int8_verdicts(chosen()[part::PARTS], Path(folder))
    counts = {word: sum(v.startswith(word) for v in verdicts.values()) for word in (GOOD, "float", "not finite", "below", "wrong")}
    header = f"{len(verdicts)} cases with a float input: " + ", ".join(f"{n} {word}" for word, n in counts.items())
    write(TABLE, verdicts, header, GOOD)
    print(header)


if __name__ == "__main__":
    main()
