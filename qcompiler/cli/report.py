"""The verbs `explain` and `export-onnx`, and `verify --report`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from qcompiler.base.errors import DataError
from qcompiler.base.progress import terminal_progress
from qcompiler.cli.tuning import duration
from qcompiler.plan.recipes import PRESETS, STEPS

Verb = Callable[..., argparse.ArgumentParser]
Show = Callable[[argparse.Namespace, Any, Callable[[], str]], None]
KEEP_FLOAT_HELP = "do not quantize this layer, named by its node or its output in the model file; repeat for more layers"
VALUE_HELP = "make an input that is the same in every call a constant (sr=16000): a number for all its elements, or all of them; repeat for more"
REQUANTIZE_HELP = "of a model that is quantized already, quantize also what its file leaves in float or in 16 bits"
GOAL = ("min_sqnr", "min_agreement", "max_accuracy_drop", "labels", "time_budget")


def add_goal(p: argparse.ArgumentParser) -> None:
    """The options of `compile` that ask for an accuracy."""
    g = p.add_argument_group(
        "accuracy target",
        "Keep those layers in float that reach the target at the least measured time. Every fourth calibration sample (of 8 or more) is held out to judge. "
        "When the target is missed, the most accurate library found is written and the exit status is 1.",
    )
    g.add_argument("--min-sqnr", type=float, metavar="DB", help="signal-to-quantization-noise ratio that every output reaches, with 95 %% confidence")
    g.add_argument("--min-agreement", type=float, metavar="FRACTION", help="fraction of samples that get the float model's top-1 class (0 to 1)")
    g.add_argument("--max-accuracy-drop", type=float, metavar="POINTS", help="percentage points of top-1 accuracy that may be lost; needs --labels")
    g.add_argument("--labels", metavar="TSV", help="of the calibration data. For images: columns file and class_index; for arrays: an .npy of class indices")
    g.add_argument("--time-budget", type=duration, metavar="TIME", help="for the whole compilation: 90s, 20m, 1.5h (default 10m)")


def add_weights(p: argparse.ArgumentParser) -> None:
    """The options of `compile` and `explain` for weights in few bits beside float activations."""
    g = p.add_argument_group(
        "weights alone",
        "For networks whose time goes into reading the weights of matrix products: activations stay float32, weights become float32 again in registers. "
        "No calibration data is needed.",
    )
    g.add_argument("--weights", metavar="TYPE", help="store the weights of Gemm and MatMul as int8 or int4")
    g.add_argument("--group-size", type=int, metavar="N", help="weights of a row that share a scale: a multiple of 8 (default 64)")
    g.add_argument("--asymmetric", action="store_true", help="a zero point beside each scale")


def weights_of(options: argparse.Namespace) -> dict[str, Any]:
    """Those options, as `compile` takes them."""
    given = {"weights": options.weights, "group_size": options.group_size, "asymmetric": options.asymmetric}
    return {k: v for k, v in given.items() if v is not None and v is not False}


def add(verb: Verb, show: Show, texts: Mapping[str, str], shape: Any) -> None:
    """Add the verbs. `texts`: help of the options that `compile` has too; `shape`: the type of --input-shape."""
    p = verb(
        "explain",
        lambda options: _explain(options, show),
        "show how a model would be quantized, and why, without compiling it",
        "Measure MODEL on the calibration data and print the plan: for every value how it is stored, under which range, with what estimated error, and "
        "why; for every operator that stays float the reason. With --weights: how the weights would be stored, with what error.",
    )
    _quantization(p, texts, shape)
    add_weights(p)
    p.add_argument("--sensitivity", action="store_true", help="measure what rounding each layer alone does to the outputs as well (about a minute)")
    p = verb(
        "export-onnx",
        lambda options: _export(options, show),
        "write the quantized network as an ONNX QDQ model for other runtimes",
        "Quantize MODEL as `compile` does, bias correction included, and write it with QuantizeLinear and DequantizeLinear: the library's scales, zero points, "
        "int8 weights and int32 biases. Sums that lie between two 8-bit steps may round to the other one in another runtime.",
    )
    _quantization(p, texts, shape)
    p.add_argument("--output", required=True, metavar="FILE.onnx", help="the model to write; it appears only when it is complete")


def _quantization(p: argparse.ArgumentParser, texts: Mapping[str, str], shape: Any) -> None:
    p.add_argument("model", metavar="MODEL.onnx", help="float32 ONNX model")
    p.add_argument("--calibration", metavar="DATA", help=texts["data"])
    p.add_argument("--target", default="native", metavar="T", help="the target to quantize for (default native)")
    add_recipe(p)
    p.add_argument("--keep-float", action="append", default=[], metavar="LAYER", help=KEEP_FLOAT_HELP)
    p.add_argument("--requantize", action="store_true", help=REQUANTIZE_HELP)
    p.add_argument("--input-shape", action="append", default=[], metavar="NAME=1,3,224,224", type=shape, help=texts["shape"])
    p.add_argument("--input-value", action="append", default=[], metavar="NAME=VALUE", type=input_value, help=VALUE_HELP)
    p.add_argument("--preprocess", metavar="FILE.yaml", help=texts["preprocess"])


def input_value(text: str) -> tuple[str, str]:
    """What --input-value names, and its value as text."""
    name, equals, value = text.rpartition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=16000 or NAME=1,2,3")
    return name, value


def add_recipe(p: argparse.ArgumentParser) -> None:
    """How to quantize: --preset, --enable, --disable."""
    p.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="default",
        help="how much to spend on choosing the quantization: fast compiles soonest, accurate loses least",
    )
    steps = "; ".join(f"{name}: {what}" for name, what in STEPS.items())
    p.add_argument("--enable", action="append", default=[], metavar="STEP", help=f"take a step that the preset leaves out; repeat for more. {steps}")
    p.add_argument("--disable", action="append", default=[], metavar="STEP", help="leave out a step of the preset; repeat for more")


def recipe_arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {"preset": options.preset, "enable": options.enable, "disable": options.disable}


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "input_shapes": dict(options.input_shape) or None, "input_values": dict(options.input_value) or None, **recipe_arguments(options),
        "keep_float": options.keep_float,
        "requantize": options.requantize, "preprocess": options.preprocess,
    }  # fmt: skip


def _explain(options: argparse.Namespace, show: Show) -> int:
    import json

    from qcompiler.cli.tables import noise_text, weights_text
    from qcompiler.passes.graph import Graph
    from qcompiler.passes.groups import find_groups
    from qcompiler.pipeline.compile import quantize, quantize_weights
    from qcompiler.pipeline.survey import layer_noise

    if options.weights is not None:
        if options.sensitivity:
            raise DataError("--sensitivity is of 8-bit activations; it does not go with --weights, which leaves them float")
        given: Any = {**_arguments(options), **weights_of(options)}
        _, module = quantize_weights(options.model, options.calibration, given)
        account = Graph.of(module).attrs["qc.weights"]
        show(options, {"weights": account}, lambda: weights_text(account))
        return 0

    if options.sensitivity and options.calibration is None:
        raise DataError("--sensitivity needs --calibration: what rounding does to the outputs is measured on those samples")
    with terminal_progress() as progress:
        quantized = quantize(options.model, options.target, options.calibration, **_arguments(options), progress=progress)
        noise = layer_noise(quantized) if options.sensitivity else None
    groups = find_groups(quantized.model.module)
    # insert_qdq refuses what would overflow on the actual weights; those reasons belong to the answer too.
    refused = {k: v for k, v in Graph.of(quantized.qdq).attrs.get("qc.float_ops", {}).items() if k not in quantized.plan.reasons}
    notes = [f"'{value}' stays float after all: {reason}" for value, reason in refused.items()]
    document = json.loads(quantized.plan.to_json())
    document |= {"operators": {g.id: g.kind for g in groups}, "refused": refused, "samples": quantized.measured.table.samples, "digest": quantized.plan.digest}
    parts = [*notes, quantized.plan.explain(groups).rstrip()]
    if noise is not None:
        samples, estimate, rows = noise
        document["sensitivity"] = {"samples": samples, "sqnr_db": estimate, "layers": [vars(row) for row in rows]}
        parts += ["", noise_text(samples, estimate, rows)]
    show(options, document, lambda: "\n".join(parts))
    return 0


def _export(options: argparse.Namespace, show: Show) -> int:
    from qcompiler.base.text import size
    from qcompiler.exporters.export_onnx import export_onnx

    with terminal_progress() as progress:
        export = export_onnx(options.model, options.output, options.calibration, options.target, **_arguments(options), progress=progress)
    count = export.model.ByteSize()
    document = {"output": options.output, "bytes": count, "weighted": export.weighted, "values": export.values, "kept_float": export.kept_float}
    lines = [f"{options.output}: {size(count)}, {len(export.values)} 8-bit values, {export.weighted} operators with int8 weights"]
    lines += [f"'{name}' keeps float weights and operators: {reason}" for name, reason in export.kept_float.items()]
    show(options, document, lambda: "\n".join(lines))
    return 0


def verify(options: argparse.Namespace, show: Show) -> int:
    """`verify` with --report: the same result and exit status, and the page."""
    from qcompiler.verification.parity import Thresholds, parity_text
    from qcompiler.verification.report import verify_report

    with terminal_progress() as progress:
        report = verify_report(
            options.library,
            options.model,
            options.data,
            options.report,
            labels=options.labels,
            thresholds=Thresholds(options.min_sqnr, options.min_agreement, options.max_accuracy_drop, options.max_channel_bias),
            preprocess=options.preprocess,
            layer_samples=options.layer_samples,
            threads=options.threads,
            progress=progress,
        )
    show(options, report, lambda: parity_text(report, options.layers) + f"\n\n{options.report}: the report")
    return 0 if report.passed else 1
