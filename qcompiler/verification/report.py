"""`verify` with a page for a sign-off: evidence gathered, the page written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.base.files import check_writable, replacing
from qcompiler.base.progress import Progress
from qcompiler.calibration.data import load_labels, open_samples
from qcompiler.verification.evidence import HashedSamples, gather
from qcompiler.verification.parity import ParityReport, Thresholds, compare, float_session


def verify_report(
    library: str | Path,
    model: str | Path,
    data: Any,
    output: str | Path,
    *,
    labels: str | Path | Iterable[int] | None = None,
    thresholds: Thresholds = Thresholds(),
    preprocess: Any = None,
    layer_samples: int = 8,
    threads: int = 1,
    seconds: float = 2.0,
    progress: Progress | None = None,
) -> ParityReport:
    """`qcompiler.verify`, with the page written to `output`. `seconds`: for the latency of both networks.

    Raises OutputError, before any work, when `output` can't be written; else what `verify` raises.
    """
    from qcompiler.runtime.session import Session
    from qcompiler.verification.page import page

    path = check_writable(output)
    session = Session(library, threads=threads)
    samples = HashedSamples(open_samples(data, session.inputs, preprocess))
    classes = load_labels(labels, samples) if isinstance(labels, (str, Path)) else None if labels is None else np.asarray(labels, np.int64)
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        twin = float_session(model, session, Path(folder), threads)
        parity = compare(session, twin, samples, labels=classes, thresholds=thresholds, layer_samples=layer_samples, progress=progress)
        evidence = gather(session, twin, samples, parity, Path(model), classes, seconds, progress)
    given = {"evaluation data": data, "labels": labels, "preprocessing": preprocess}
    evidence.source.update({k: str(v) if isinstance(v, (str, Path)) else "given as arrays" for k, v in given.items() if v is not None})
    with replacing(path) as temporary:
        temporary.write_text(page(evidence, Path(library).name, Path(model).name), encoding="utf-8")
    return parity
