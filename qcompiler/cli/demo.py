"""The example network: handwritten digits, compiled, verified and measured on the machine it runs on.

`examples/train_digits.py` made the files in `demo_data/`: `digits.onnx`, and `digits.npz` with float32 [N, 1, 16, 16] images
`calibration` (from the training half) and `evaluation` (never trained on), and the class indices `labels` of the latter.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

import qcompiler
from qcompiler.base.files import temporary_folder
from qcompiler.base.progress import Progress, silent
from qcompiler.calibration.data import open_samples
from qcompiler.runtime.bench import Timing, interleave, ratios
from qcompiler.verification.parity import Thresholds, compare
from qcompiler.verification.twin import float_session

FOLDER = Path(__file__).resolve().parent / "demo_data"
MODEL = FOLDER / "digits.onnx"
THRESHOLDS = Thresholds(min_sqnr=15.0, min_agreement=0.98, max_accuracy_drop=1.0)


def demo_data() -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]], np.ndarray]:
    """(calibration samples, evaluation samples, labels int64 of the evaluation)."""
    with np.load(FOLDER / "digits.npz") as file:
        calibration, evaluation, labels = file["calibration"], file["evaluation"], file["labels"]
    return [{"image": x[None]} for x in calibration], [{"image": x[None]} for x in evaluation], labels.astype(np.int64)


def demo(output: Path, *, seconds: float = 2.0, progress: Progress = silent) -> dict[str, Any]:
    """Compile the example for this machine into `output`, verify it, and time int8 against float on one thread (`seconds` of measuring).

    Returns what `demo_text` prints: target, bytes, compile seconds, the `ParityReport` and the `Timing`s.
    """
    calibration, evaluation, labels = demo_data()
    start = time.perf_counter()
    artifact = qcompiler.compile(MODEL, target="native", calibration=calibration, progress=progress)
    compile_seconds = time.perf_counter() - start
    artifact.save(output)
    session = qcompiler.load(output)
    with temporary_folder() as folder:
        twin = float_session(MODEL, session, folder)
        samples = open_samples(evaluation, session.inputs)
        report = compare(session, twin, samples, labels=labels, thresholds=THRESHOLDS, progress=progress)
        sample = evaluation[0]
        timings = interleave({"int8": lambda: session.run(sample), "float": lambda: twin.run(sample)}, seconds=seconds, progress=progress)
    return {
        "output": str(output),
        "target": artifact.manifest["target"],
        "bytes": artifact.size,
        "model_bytes": MODEL.stat().st_size,
        "compile_seconds": compile_seconds,
        "parity": report,
        "timings": timings,
    }


def demo_text(result: dict[str, Any]) -> str:
    """The summary table of `demo`'s result."""
    from qcompiler.base.text import milliseconds, number, percent, size, table

    report, timings = result["parity"], {t.name: t for t in result["timings"]}
    int8, float32 = timings["int8"], timings["float"]
    rows = [
        ["size", size(result["model_bytes"]) + " (ONNX)", size(result["bytes"]), ""],
        ["top-1 accuracy", percent(report.float_accuracy), percent(report.int8_accuracy), f"{report.samples} held-out digits"],
        ["top-1 agreement", "", percent(report.agreement), "with float"],
        ["SQNR of the logits", "", number(report.outputs[0].metrics.sqnr_db) + " dB", ""],
        ["latency, minimum", milliseconds(float32.minimum) + " ms", milliseconds(int8.minimum) + " ms", _speed(int8, float32)],
    ]
    title = f"Handwritten digits on {result['target']}, compiled in {result['compile_seconds']:.1f} s, one thread"
    verdict = "PASSED" if report.passed else "\n".join(f"FAILED: {failure}" for failure in report.failures)
    left = f"{result['output']} is the library. Next: qcompiler inspect {result['output']}; qcompiler bench {result['output']} --layers"
    return "\n\n".join([table(title, ("", "float32|", "int8|", ""), rows), verdict, left])


def _speed(int8: Timing, float32: Timing) -> str:
    return f"{1 / ratios([int8, float32], 'float')['int8']:.2f} times as fast"
