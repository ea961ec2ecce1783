"""Parity: what a compiled library computes, against the float network it came from, end to end and layer by layer.

Layers are joined by value id (docs/architecture.md): the float network's and the library's steps carry the names of the same tensors. An
integer value is compared as the real number it stands for, `scale * (q - zero_point)`, with the manifest's scale and zero point.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from qcompiler.backend.artifact import Artifact
from qcompiler.base.arguments import checks_arguments
from qcompiler.base.debug import plain_json
from qcompiler.base.errors import ArtifactError, DataError, DeviceFailure
from qcompiler.base.files import temporary_folder
from qcompiler.base.parallel import in_order
from qcompiler.base.progress import Progress, silent
from qcompiler.base.text import number, percent, table
from qcompiler.calibration.data import Samples, Source, load_labels, unused
from qcompiler.calibration.frames import open_streamed
from qcompiler.calibration.ports import OnReals
from qcompiler.calibration.preprocess import Preprocess
from qcompiler.importers.onnx_file import QUANTIZED, exactness, rounded
from qcompiler.importers.origin import AnyModel, Origin, origin_of
from qcompiler.pipeline.goal import check_labels, check_limits, check_thresholds, classifying
from qcompiler.pipeline.metric import Metric, MetricFunction, Scored, load_metric
from qcompiler.runtime.reference import ImportCheck, check_import, confirmed
from qcompiler.runtime.selftest import digest
from qcompiler.verification.compared import Compared, Runner, Tally
from qcompiler.verification.reach import Reach
from qcompiler.verification.twin import Twin, counted, fed_alike, float_session

DEFAULT_MIN_SQNR = 10.0
"""dB that every output must reach when no threshold is named: sound int8 networks have 14 to 22, broken ones less than 5."""

IMPORT_SAMPLES = 4
"""On so many samples the float network is compared with another runtime."""


@dataclass(frozen=True)
class Thresholds:
    """What must hold. min_sqnr: dB, for every output. min_agreement: fraction of samples with the float network's top-1 class.

    max_accuracy_drop: percentage points of top-1 accuracy below float (needs labels). max_channel_bias: quantization steps, for every layer
    (see `Metrics.channel_bias`): a kernel that is off by one in one channel shows here when nothing else does.
    max_metric_drop: of a metric of the user's own, below float, in its unit. None is not checked; with all None, min_sqnr is DEFAULT_MIN_SQNR.
    """

    min_sqnr: float | None = None
    min_agreement: float | None = None
    max_accuracy_drop: float | None = None
    max_channel_bias: float | None = None
    max_metric_drop: float | None = None

    def __post_init__(self) -> None:
        """Raises DataError for limits that nothing could reach or miss."""
        check_limits(**vars(self))

    def effective(self) -> Thresholds:
        return Thresholds(min_sqnr=DEFAULT_MIN_SQNR) if self == Thresholds() else self


@dataclass(frozen=True)
class Check:
    """One threshold, held against one output, one layer, or the network. threshold: its name in `Thresholds`, or "import". found: what was measured.
    missed: what a miss means, as a sentence."""

    threshold: str
    found: float
    met: bool
    missed: str


@dataclass(frozen=True)
class ParityReport:
    """The result of a comparison; accuracies and agreements are fractions of `samples`, layers are over `layer_samples`.

    hidden: positions of the samples that the network's masks hide, which don't count. `imported`: the float network itself against another runtime on the
    model file, where a file was given.
    """

    samples: int
    layer_samples: int
    outputs: list[Compared]
    layers: list[Compared]
    thresholds: Thresholds
    float_accuracy: float | None = None
    int8_accuracy: float | None = None
    checks: list[Check] = field(default_factory=list)
    imported: ImportCheck | None = None
    metric: Scored | None = None
    warnings: list[str] = field(default_factory=list)
    hidden: int = 0

    @property
    def passed(self) -> bool:
        return all(c.met for c in self.checks)

    @property
    def failures(self) -> list[str]:
        """One sentence per check that was missed."""
        return [c.missed for c in self.checks if not c.met]

    def checked(self, threshold: str) -> list[Check]:
        """The checks of one threshold, by its name in `Thresholds`."""
        return [c for c in self.checks if c.threshold == threshold]

    @property
    def agreement(self) -> float | None:
        """Top-1 agreement of the first output that has one."""
        return next((o.agreement for o in self.outputs if o.agreement is not None), None)

    @property
    def rows(self) -> int | None:
        """Over how many rows that is, and the accuracies: of all samples those that count."""
        return next((o.rows for o in self.outputs if o.rows is not None), None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; infinities and NaN are the strings "inf", "-inf" and "nan"."""
        own = {k: v for k, v in asdict(self).items() if k != "checks"}
        document: dict[str, Any] = plain_json({**own, "failures": self.failures, "passed": self.passed, "agreement": self.agreement})
        return document

    def worst_layers(self, count: int) -> list[Compared]:
        """The `count` layers of lowest SQNR, NaN first."""
        return sorted(self.layers, key=lambda row: (not np.isnan(row.metrics.sqnr_db), row.metrics.sqnr_db))[:count]

    def __str__(self) -> str:
        return parity_text(self)


_PARITY_COLUMNS = ("value", "dtype", "SQNR dB|", "max|", "median|", "mean|", "cosine|", "channel bias, steps|", "top-1 agreement|")


def _parity_rows(rows: Sequence[Compared]) -> list[list[str]]:
    cells = []
    for row in rows:
        m = row.metrics
        bias = "" if m.channel_bias is None else f"{m.channel_bias:+.2f} in {m.channel}"
        errors = [number(e, ".3g") for e in (m.max_error, m.median_error, m.mean_error)]
        cells.append([row.name, row.dtype, number(m.sqnr_db), *errors, number(m.cosine, ".5f"), bias, percent(row.agreement)])
    return cells


def parity_text(report: ParityReport, layers: int = 10) -> str:
    """The outputs, the `layers` worst layers (negative: all, in order), accuracy and the verdict."""
    parts = [table(f"Outputs, {report.samples} sample{'s' * (report.samples != 1)}", _PARITY_COLUMNS, _parity_rows(report.outputs))]
    for out in report.outputs:
        if out.metrics.parts:
            shares = "; ".join(f"{db:.2f} dB in {name}" for name, db in out.metrics.parts.items())
            parts.append(f"output '{out.name}' holds several quantities: {shares}")
    if report.layers and layers:
        shown = report.layers if layers < 0 else report.worst_layers(layers)
        title = f"Layers, {report.layer_samples} sample{'s' * (report.layer_samples != 1)}"
        title += "" if layers < 0 else f": the worst {len(shown)} of {len(report.layers)}"
        parts.append(table(title, _PARITY_COLUMNS[:-1], [cells[:-1] for cells in _parity_rows(shown)]))
    if report.float_accuracy is not None and report.int8_accuracy is not None:
        drop = 100 * (report.float_accuracy - report.int8_accuracy)
        parts.append(f"top-1 accuracy: float {percent(report.float_accuracy)}, int8 {percent(report.int8_accuracy)}, drop {drop:.2f} points")
    if report.hidden:
        parts.append(hidden_text(report))
    parts += [f"warning: {warning}" for warning in report.warnings]
    if report.metric is not None:
        parts.append(str(report.metric))
    if report.imported is not None:
        parts.append(str(report.imported))
    parts.append("PASSED" if report.passed else "\n".join(f"FAILED: {failure}" for failure in report.failures))
    return "\n\n".join(parts)


def hidden_text(report: ParityReport) -> str:
    """What a report with padding says of it."""
    return f"Padding does not count: the network's masks hide {report.hidden} positions of these samples."


@checks_arguments
def verify(
    library: str | os.PathLike[str] | Artifact | Runner,
    model: AnyModel | Runner,
    samples: Source | Samples,
    *,
    labels: str | os.PathLike[str] | Iterable[Any] | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    max_accuracy_drop: float | None = None,
    max_channel_bias: float | None = None,
    metric: str | MetricFunction | None = None,
    max_metric_drop: float | None = None,
    preprocess: str | os.PathLike[str] | Mapping[str, Any] | Preprocess | None = None,
    max_samples: int | None = None,
    expect_digest: str | None = None,
    layer_samples: int = 8,
    threads: int = 1,
    progress: Progress | None = None,
    example_inputs: Any = None,
) -> ParityReport:
    """Compare a compiled library with its float network on `samples`, and judge it by the thresholds (see `Thresholds`).

    `library`: path of the `.so`, an Artifact that `compile` returned, or a Session. `model`: what it was compiled from, or a Session of
    it in float. `samples`, `preprocess`, `max_samples`, `progress` and `example_inputs`: as in `qcompiler.compile`. `labels`: class indices, one per
    sample, or a file (see `qcompiler.calibration.data.load_labels`). `metric`: a function of ({output name: array, all samples}, labels), the higher the
    better, or "FILE.py:function"; it gets `labels` whatever they are, in an .npy of any shape or in JSON too.
    `expect_digest`: what `qcompiler digest` says of the same plan and data on any target; another one fails. A library with test vectors runs them, too.
    Positions that the network's own masks hide don't count, in no output and no layer; a metric finds zeros there. A `model` that is a Session does not show
    its masks: there every position counts.
    Layers are compared on the first `layer_samples` samples; 0 skips them. Where the runtime that the model was made for is installed (ONNX Runtime,
    LiteRT), the float network is compared with what that computes from it, too (`ParityReport.imported`): an operator that was imported wrongly would be
    wrong on both sides of every other comparison.

    Raises DataError for bad data, ModelError for a bad model, ArtifactError for a bad library or one of another model.
    """
    from qcompiler.runtime.session import Session

    thresholds = Thresholds(min_sqnr, min_agreement, max_accuracy_drop, max_channel_bias, max_metric_drop)
    if layer_samples < 0:
        raise DataError(f"layer_samples is {layer_samples}; 0 or more samples are compared layer by layer")
    if isinstance(library, Artifact):
        with temporary_folder() as folder:
            opened = Session(library.save(folder / "library.so"), threads=threads)
        library = opened  # which has its own copy of the file
    actual = Session(library, threads=threads) if isinstance(library, (str, os.PathLike)) else library
    twin: Any = None
    data = open_streamed(samples, actual, preprocess, max_samples, lambda: twin.run)
    options: dict[str, Any] = {"thresholds": thresholds, "layer_samples": layer_samples, "progress": progress or silent}
    options |= judges(labels, metric, data)
    if hasattr(model, "trace"):
        twin = fed_alike(model, actual)
        report = compare(actual, twin, data, **options)
        return replace(report, checks=[*report.checks, *bit_checks(actual, data, expect_digest)])
    origin = origin_of(model, actual.manifest.get("cut", ()), example_inputs)
    with temporary_folder() as folder:
        twin = float_session(origin, actual, folder, threads, data)
        report = with_import(compare(actual, twin, data, **options), origin, actual, twin, data)
        return replace(report, checks=[*report.checks, *bit_checks(actual, data, expect_digest)])


def bit_checks(actual: Any, data: Samples, expect_digest: str | None) -> list[Check]:
    """What can be said of a library's very bits: its test vectors, where it has some, and the digest of its results. Raises DataError for what is no digest."""
    found = []
    if "selftest" in actual.manifest and hasattr(actual, "selftest"):
        try:
            actual.selftest()
            found.append(Check("selftest", 1.0, True, ""))
        except DeviceFailure as error:
            found.append(Check("selftest", 0.0, False, str(error)))
    if expect_digest is not None:
        wanted = expect_digest.lower().removeprefix("sha256:")
        if not re.fullmatch("[0-9a-f]{64}", wanted):
            raise DataError(f"'{expect_digest}' is no digest; `qcompiler digest` prints 64 hexadecimal digits")
        own, count, _ = digest(actual, data)
        missed = f"the digest of {count} samples is {own}, expected was {wanted}: some result has other bits"
        found.append(Check("digest", float(own == wanted), own == wanted, missed))
    return found


def judges(labels: Any, metric: str | MetricFunction | None, data: Samples) -> dict[str, Any]:
    """What `compare` judges samples by: class indices, or with a metric that, and whatever labels it has."""
    if metric is not None:
        return {"metric": load_metric(metric, labels, data)}
    return {"labels": None if labels is None else load_labels(labels, data)}


def with_import(report: ParityReport, origin: Origin, actual: Any, twin: Twin, samples: Samples) -> ParityReport:
    """The report with the float network `twin` of `origin` compared with the runtime that it was made for as well, on the first samples; of a quantized
    file see `confirmed`."""
    model, fixed = origin.read()[0], twin.manifest.get("fixed_inputs", {})
    near, whole = exactness(model), rounded(model)

    def checked(network: Any) -> ImportCheck:
        first: Iterable[Mapping[str, np.ndarray]] = itertools.islice(samples, IMPORT_SAMPLES)
        return check_import(origin.elsewhere(), network, map(twin.real, first), near, fixed, whole)

    found = checked(twin.network)
    if near == QUANTIZED:
        found = confirmed(found, lambda: checked(OnReals(actual, actual.manifest)))
    verdict = [Check("import", min(o.sqnr_db for o in found.outputs), not found.failure, found.failure or "")] if found.outputs else []
    return replace(report, imported=found, checks=[*report.checks, *verdict])


def compare(
    actual: Runner,
    reference: Runner,
    samples: Samples | Iterable[Mapping[str, np.ndarray]],
    *,
    labels: np.ndarray | None = None,
    metric: Metric | None = None,
    thresholds: Thresholds = Thresholds(),
    layer_samples: int = 8,
    progress: Progress = silent,
) -> ParityReport:
    """`verify` on two sessions and checked samples. `labels`: int64, one per sample (per row of the batch). A library on several boards
    (`qcompiler.boards.several`) runs on all of them, to the same report."""
    if thresholds.max_metric_drop is not None and metric is None:
        raise DataError("max_metric_drop needs a metric: give FILE.py:function (--metric)")
    thresholds = thresholds.effective()
    names = [o.name for o in reference.outputs]
    if [o.name for o in actual.outputs] != names:
        raise ArtifactError(f"the library's outputs {[o.name for o in actual.outputs]} are not the float network's {names}")
    classified = [o.name for o in classifying(reference.outputs)]
    check_thresholds(thresholds, classified, labels is not None)
    reach, total = Reach(actual.manifest), getattr(samples, "count", None)
    tally = Tally(actual, reference, names, classified, metric is not None)

    def numbered() -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
        for numbered in enumerate(samples):
            reach.add(numbered[1])
            yield numbered

    def of_one(pair: tuple[Runner, Runner], item: tuple[int, Mapping[str, np.ndarray]]) -> Tally:
        number, sample = item
        try:
            counts = counted(pair[1], sample)
        except DataError as error:
            raise DataError(f"sample {number}: {error}") from None
        one = Tally(*pair, names, classified, metric is not None)
        one.add(sample, counts, number < layer_samples)
        return one

    pairs, stop = pairs_of(actual, reference)
    with contextlib.closing(in_order(of_one, pairs, numbered(), stop)) as tallies:
        for one in tallies:
            tally.merge(one)
            progress("verify", tally.samples, total)
    if not tally.samples:
        raise DataError("the data is empty: at least one sample is needed")
    report = _judged(tally, actual, reference, labels, layer_samples)
    scored = None if metric is None else Scored(metric.name, metric.of(e for _, e in tally.kept), metric.of(g for g, _ in tally.kept))
    report = replace(report, thresholds=thresholds, metric=scored, warnings=[*unused(samples), *reach.doubts(), *getattr(actual, "lost", ())])
    report.checks.extend(_checks(report))
    return report


def pairs_of(actual: Any, reference: Any) -> tuple[list[tuple[Any, Any]], Callable[[], None]]:
    """(pairs of sessions that may run samples at once, what ends their work): one pair but for a library on several boards, each with a float network
    of its own beside it. Where the reference can't be had twice, one pair too."""
    count = getattr(actual, "devices", 1)
    if count == 1 or not isinstance(reference, Twin):
        return [(actual, reference)], lambda: None
    return [(actual, reference.another()) for _ in range(count)], actual.interrupt


def _judged(tally: Tally, actual: Runner, reference: Runner, labels: np.ndarray | None, layer_samples: int) -> ParityReport:
    """The report without what needs no tally: thresholds, a metric, warnings."""
    top = {name: vote.result() for name, vote in tally.votes.items()}
    dtypes, outputs = {o.name: str(o.dtype) for o in actual.outputs}, []
    for name, accumulator in tally.outputs.items():
        agreement, rows = None, None
        if name in top:
            got, expected, counts = top[name]
            agreement, rows = float((got == expected)[counts].mean()), int(counts.sum())
        outputs.append(Compared(name, dtypes[name], accumulator.metrics(), agreement, rows))
    float_accuracy, int8_accuracy = None, None
    if labels is not None:
        got_top, float_top, judged = next(iter(top.values()))
        check_labels(labels, len(got_top), classifying(reference.outputs)[0])
        float_accuracy, int8_accuracy = (float((found == labels)[judged].mean()) for found in (float_top, got_top))
    layers = tally.layers.rows() if layer_samples else []
    compared = min(tally.samples, layer_samples)
    return ParityReport(tally.samples, compared, outputs, layers, Thresholds(), float_accuracy, int8_accuracy, hidden=tally.hidden)


def _checks(report: ParityReport) -> list[Check]:
    """Every threshold on everything that it is for. Comparisons are written so that NaN misses."""
    limits, found = report.thresholds, []
    for out in report.outputs:
        if limits.min_sqnr is not None:
            sqnr, parts = out.metrics.worst_db, out.metrics.parts
            which = f" in {min(parts, key=lambda p: parts[p])}" if parts else ""
            said = f"output '{out.name}': SQNR {sqnr:.2f} dB{which} is below {limits.min_sqnr:g} dB"
            found.append(Check("min_sqnr", sqnr, sqnr >= limits.min_sqnr, said))
        if limits.min_agreement is not None and out.agreement is not None:
            said = f"output '{out.name}': top-1 agreement {out.agreement:.4f} is below {limits.min_agreement:g}"
            found.append(Check("min_agreement", out.agreement, out.agreement >= limits.min_agreement, said))
    if limits.max_accuracy_drop is not None and report.float_accuracy is not None and report.int8_accuracy is not None:
        drop = 100.0 * (report.float_accuracy - report.int8_accuracy)
        said = f"top-1 accuracy dropped by {drop:.2f} points, more than {limits.max_accuracy_drop:g}"
        found.append(Check("max_accuracy_drop", drop, drop <= limits.max_accuracy_drop + 1e-9, said))  # the difference of two fractions is inexact
    if limits.max_metric_drop is not None and report.metric is not None:
        drop, name = report.metric.drop, report.metric.name
        said = f"{name} dropped by {drop:.4f}, more than {limits.max_metric_drop:g}"
        found.append(Check("max_metric_drop", drop, drop <= limits.max_metric_drop + 1e-9, said))
    if limits.max_channel_bias is not None:
        for layer in report.layers:
            if (bias := layer.metrics.channel_bias) is not None:
                said = f"layer '{layer.name}': channel {layer.metrics.channel} is off by {bias:+.2f} steps on average, more than {limits.max_channel_bias:g}"
                found.append(Check("max_channel_bias", abs(bias), abs(bias) <= limits.max_channel_bias, said))
    return found
