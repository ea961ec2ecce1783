"""`verify` with a page for a sign-off: evidence gathered, the page written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.base.files import check_writable, replacing, temporary_folder
from qcompiler.base.progress import Progress, silent
from qcompiler.calibration.frames import open_streamed
from qcompiler.importers.origin import AnyModel, files_of, origin_of
from qcompiler.pipeline.metric import MetricFunction
from qcompiler.verification.evidence import HashedSamples, Measurer, gather, measured_here
from qcompiler.verification.parity import ParityReport, Thresholds, bit_checks, compare, judges, with_import
from qcompiler.verification.twin import float_session


@np.errstate(over="ignore", invalid="ignore")  # as `verify`
def verify_report(
    library: Any,
    model: AnyModel,
    data: Any,
    output: str | Path,
    *,
    labels: str | Path | Iterable[int] | None = None,
    thresholds: Thresholds = Thresholds(),
    metric: str | MetricFunction | None = None,
    preprocess: Any = None,
    max_samples: int | None = None,
    layer_samples: int = 8,
    threads: int = 1,
    seconds: float = 2.0,
    progress: Progress = silent,
    measure: Measurer = measured_here,
    expect_digest: str | None = None,
) -> ParityReport:
    """`qcompiler.verify`, with the page written to `output`. `seconds`: for the latency of both networks. measure: what times them, for a session that is not
    of this machine.

    Raises OutputError, before any work, when `output` can't be written; else what `verify` raises.
    """
    from qcompiler.runtime.session import Session
    from qcompiler.verification.page import page

    file = library if isinstance(library, (str, Path)) else library.path
    path = check_writable(output, [file, *files_of(model), data, labels, preprocess])
    session: Any = Session(library, threads=threads) if isinstance(library, (str, Path)) else library
    origin = origin_of(model, session.manifest.get("cut", ()))
    twin: Any = None
    samples = HashedSamples(open_streamed(data, session, preprocess, max_samples, lambda: twin.run))
    given = judges(labels, metric, samples)
    with temporary_folder() as folder:
        twin = float_session(origin, session, folder, threads, samples.source)
        parity = compare(session, twin, samples, thresholds=thresholds, layer_samples=layer_samples, progress=progress, **given)
        parity = with_import(parity, origin, session, twin, samples)
        parity = replace(parity, checks=[*parity.checks, *bit_checks(session, samples, expect_digest)])
        evidence = gather(session, twin, samples, parity, origin, given.get("labels"), seconds, progress, measure)
    sources = {"evaluation data": data, "labels": labels, "preprocessing": preprocess, "metric": metric}
    evidence.source.update({k: str(v) if isinstance(v, (str, Path)) else "given in Python" for k, v in sources.items() if v is not None})
    with replacing(path) as temporary:
        temporary.write_text(page(evidence, Path(file).name, origin.files[0].name if origin.files else origin.name), encoding="utf-8")
    return parity
