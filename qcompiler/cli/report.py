"""The verbs `explain` and `export-onnx`, and `verify --report`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from qcompiler.base.errors import DataError
from qcompiler.cli.arguments import QUANTIZING, add_model, add_options, chosen
from qcompiler.cli.boards import on_board, session_of
from qcompiler.cli.node_data import EXACT, add_node_data, node_data_path, write_node_data
from qcompiler.cli.process import MISSED, complain, watched
from qcompiler.cli.sheets import add_format
from qcompiler.pipeline.options import DATA_HELP, OPTIONS

Verb = Callable[..., argparse.ArgumentParser]
Show = Callable[[argparse.Namespace, Any, Callable[[], str]], None]


def add(verb: Verb, show: Show) -> None:
    """Add the verbs."""
    p = verb(
        "calibrate",
        lambda options: _calibrate(options, show),
        "run a model over its calibration data once, into a file that the other commands take in the place of data",
        "Measure MODEL on DATA, and store what was seen together with the samples. compile, explain, export-onnx, tune and verify take the file for "
        "--calibration (or --data), make the same of it as of the data, and refuse it for another model.",
    )
    add_model(p, "model")
    p.add_argument("--data", "--calibration", dest="calibration", required=True, metavar="DATA", help=f"typical inputs: {DATA_HELP}")
    p.add_argument("-o", "--output", required=True, metavar="FILE.qcal", help="the file to write; it appears only when it is complete")
    add_options(p, ["network", "recipe", "work"])
    p = verb(
        "explain",
        _explain,
        "show how a model would be quantized, and why, without compiling it",
        "Measure MODEL on the calibration data and print the plan: for every value how it is stored, under which range, with what estimated error, and "
        "why; for every operator that stays float the reason. With --weights: how the weights would be stored, with what error.",
    )
    add_model(p)
    add_options(p, [*QUANTIZING, "weights"], without=["tuning_log", "core", "selftest"])
    add_format(p)
    p.add_argument("--sensitivity", action="store_true", help="measure what rounding each layer alone does to the outputs as well (about a minute)")
    add_node_data(p, "the SQNR that each value is estimated to have, or with --sensitivity the outputs' when the layer alone is in 8 bits,")
    p = verb(
        "export-onnx",
        lambda options: _export(options, show),
        "write the quantized network as an ONNX QDQ model for other runtimes",
        "Quantize MODEL as `compile` does, bias correction included, and write it with QuantizeLinear and DequantizeLinear: the library's scales, zero points, "
        "int8 weights and int32 biases. Sums that lie between two 8-bit steps may round to the other one in another runtime.",
    )
    add_model(p)
    add_options(p, QUANTIZING, without=["tuning_log", "core", "selftest"])
    p.add_argument("-o", "--output", required=True, metavar="FILE.onnx", help="the model to write; it appears only when it is complete")


def _calibrate(options: argparse.Namespace, show: Show) -> int:
    import qcompiler
    from qcompiler.base.text import size

    with watched(options) as progress:
        made = qcompiler.calibrate(options.model, options.output, options.calibration, **chosen(options), progress=progress)
    for warning in made.warnings:
        complain(f"warning: {warning}")
    count = made.path.stat().st_size
    document = {"output": str(made.path), "bytes": count, "samples": made.samples, "values": len(made.table.values), "warnings": made.warnings}
    text = f"{made.path}: {size(count)}, {made.samples} samples, statistics of {len(made.table.values)} values. Next: qcompiler compile {options.model} "
    again = ", ".join(OPTIONS[name].flag for name in chosen(options) if name not in ("samples", "preprocess"))
    show(options, document, lambda: f"{text}--calibration {made.path} -o FILE.so{again and f' (and {again} as here)'}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    import qcompiler
    from qcompiler.base.text import count_text
    from qcompiler.cli.sheets import Sheet, present
    from qcompiler.pipeline.explain import Explanation
    from qcompiler.pipeline.texts import NOISE_COLUMNS, WEIGHT_COLUMNS, noise_rows, noise_title, weight_rows

    path = node_data_path(options)
    with watched(options) as progress:
        found = qcompiler.explain(options.model, options.target, options.calibration, sensitivity=options.sensitivity, **chosen(options), progress=progress)
    if not isinstance(found, Explanation):
        write_node_data(path, {r["id"]: EXACT if r["sqnr_db"] is None else r["sqnr_db"] for r in found.account["layers"]})
        present(options, options.model, found.to_json(), lambda: str(found), [Sheet("Weights", WEIGHT_COLUMNS, weight_rows(found.account))])
        return 0
    sheets = [Sheet(f"{options.model}: {count_text(found.count)}, preset {found.plan.preset}", found.plan.COLUMNS, found.plan.rows(found.groups))]
    if found.sensitivity is not None:
        samples, estimate, rows = found.sensitivity
        sheets.append(Sheet(noise_title(samples, estimate), NOISE_COLUMNS, noise_rows(rows)))
        write_node_data(path, {row.id: row.sqnr_db for row in rows})
    else:
        write_node_data(path, [(name, sqnr) for name, edge in found.plan.edges.items() if (sqnr := getattr(edge, "sqnr", None)) is not None])
    present(options, options.model, found.to_json(), lambda: str(found), sheets)
    return 0


def _export(options: argparse.Namespace, show: Show) -> int:
    import qcompiler
    from qcompiler.base.text import size

    with watched(options) as progress:
        export = qcompiler.export_onnx(options.model, options.output, options.calibration, options.target, **chosen(options), progress=progress)
    count = export.model.ByteSize()
    document = {"output": options.output, "bytes": count, "weighted": export.weighted, "values": export.values, "kept_float": export.kept_float}
    lines = [f"{options.output}: {size(count)}, {len(export.values)} 8-bit values, {export.weighted} operators with int8 weights"]
    lines += [f"'{name}' keeps float weights and operators: {reason}" for name, reason in export.kept_float.items()]
    show(options, document, lambda: "\n".join(lines))
    return 0


def verify(options: argparse.Namespace, show: Show) -> int:
    """`verify` with --report: the same result and exit status, and the page."""
    from qcompiler.boards.evidence import measured_there
    from qcompiler.verification.evidence import measured_here
    from qcompiler.verification.parity import Thresholds, parity_text
    from qcompiler.verification.report import verify_report

    here = not on_board(options)
    with contextlib.nullcontext(options.library) if here else session_of(options) as library, watched(options) as progress:
        if getattr(library, "devices", 1) > 1:
            raise DataError("--report has the times of one board; name one with --board, or leave --report out")
        report = verify_report(
            library,
            options.model,
            options.data,
            options.report,
            labels=options.labels,
            thresholds=Thresholds(options.min_sqnr, options.min_agreement, options.max_accuracy_drop, options.max_channel_bias, options.max_metric_drop),
            metric=options.metric,
            preprocess=options.preprocess,
            max_samples=options.max_samples,
            layer_samples=options.layer_samples,
            threads=options.threads,
            progress=progress,
            measure=measured_here if here else measured_there(options.model),
            expect_digest=options.expect_digest,
        )
    show(options, report, lambda: parity_text(report, options.layers) + f"\n\n{options.report}: the report")
    return 0 if report.passed else MISSED
