"""The command line: one verb per stage. Results go to standard output, progress and errors to standard error.

Exit status: 0 done, 1 parity below a threshold or an accuracy target missed, 2 usage or bad input, 3 a bug of ours, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import qcompiler
from qcompiler.base.debug import SWITCHES, switch
from qcompiler.base.errors import DataError
from qcompiler.base.files import check_writable
from qcompiler.cli import bench as cli_bench
from qcompiler.cli import boards as cli_boards
from qcompiler.cli import bundle as cli_bundle
from qcompiler.cli import digest as cli_digest
from qcompiler.cli import farm as cli_farm
from qcompiler.cli import report as cli_report
from qcompiler.cli import run as cli_run
from qcompiler.cli.arguments import add_model, add_options, chosen, common_options, positive, read_files
from qcompiler.cli.boards import add_board, session_of
from qcompiler.cli.node_data import add_node_data, node_data_path, write_node_data
from qcompiler.cli.process import MISSED, complain, guarded, show, watched
from qcompiler.cli.sheets import add_format
from qcompiler.cli.tuning import add_verbs
from qcompiler.pipeline.options import DATA_HELP, GROUPS, OPTIONS

Verb = Callable[[str, Callable[[argparse.Namespace], int] | None, str, str], argparse.ArgumentParser]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Prints an error on one line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(words)
    return guarded(lambda: int(options.run(options)), words, getattr(options, "dump_dir", None) or switch("QCOMPILER_DUMP_DIR"))


def build_parser() -> argparse.ArgumentParser:
    table = "\n".join(f"  {name:20} {meaning}" for name, meaning in SWITCHES.items())
    parser = argparse.ArgumentParser(
        prog="qcompiler",
        description="Compile a trained network (ONNX, TFLite) into a small, fast int8 library, and prove what it computes.",
        epilog="exit status: 0 done, 1 parity below a threshold or an accuracy target missed, 2 usage or bad input, 3 a bug of qcompiler, "
        "130 interrupted, 143 terminated\n\n"
        f"environment:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qcompiler {qcompiler.__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int] | None, summary: str, description: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=summary, description=description)
        sub.set_defaults(run=run)
        common_options(sub)
        return sub

    _add_compile(verb)
    add_verbs(verb, show)
    cli_report.add(verb, show)
    _add_verify(verb)
    cli_bench.add(verb)
    cli_run.add(verb)
    _add_looks(verb)
    cli_bundle.add(verb)
    cli_boards.add(verb)
    cli_farm.add(verb)
    cli_digest.add(verb)
    _add_completion(verb, parser)
    return parser


def _add_compile(verb: Verb) -> None:
    p = verb(
        "compile",
        _compile,
        "make an int8 library from an ONNX or TFLite model",
        "Import MODEL, measure the range of every tensor on the calibration data, choose the quantization, and write a shared library "
        "(code, weights and manifest in one file). The same inputs give the same bytes.",
    )
    add_model(p)
    p.add_argument("-o", "--output", required=True, metavar="FILE.so", help="the library to write; it appears only when it is complete")
    add_options(p, GROUPS)


def _add_verify(verb: Verb) -> None:
    p = verb(
        "verify",
        _verify,
        "compare a library with its float model; exit 1 when it misses a threshold",
        "Run FILE.so and its float MODEL on DATA, and report for every output and every layer: signal-to-quantization-noise ratio, "
        "maximum, median and mean signed error, cosine, largest bias of a channel; top-1 agreement of classifiers; accuracy with labels. "
        "Without any threshold every output must reach an SQNR of 10 dB.",
    )
    p.add_argument("library", metavar="FILE.so", help="a library that `qcompiler compile` wrote")
    p.add_argument("--model", required=True, metavar="MODEL", help="the model it was compiled from")
    p.add_argument("--data", required=True, metavar="DATA", help=f"evaluation inputs, other than those of the calibration: {DATA_HELP}")
    p.add_argument("--preprocess", metavar="FILE.yaml", help=OPTIONS["preprocess"].help)
    p.add_argument("--samples", dest="max_samples", type=positive, metavar="N", help="evaluate on at most N samples: evenly spread images, or the first arrays")
    p.add_argument("--labels", metavar="TSV", help="for images: tab-separated columns file and class_index; for arrays: an .npy of class indices")
    p.add_argument("--min-sqnr", type=float, metavar="DB", help="fail when an output has a lower signal-to-quantization-noise ratio")
    p.add_argument("--min-agreement", type=float, metavar="FRACTION", help="fail when fewer samples have the float model's top-1 class (0 to 1)")
    p.add_argument("--max-accuracy-drop", type=float, metavar="POINTS", help="fail when top-1 accuracy falls by more percentage points; needs --labels")
    p.add_argument(
        "--max-channel-bias",
        type=float,
        metavar="STEPS",
        help="fail when a channel of an int8 layer is off by more quantization steps on average",
    )
    p.add_argument(
        "--metric",
        metavar="METRIC",
        help="measure both networks by top5, f1, miou or map (extra metrics), or by FILE.py:FUNCTION, a function of ({output: array, all samples}, labels), "
        "the higher the better; --labels may then be any .npy or .json",
    )
    p.add_argument("--max-metric-drop", type=float, metavar="X", help="fail when the metric falls by more than X")
    p.add_argument("--layers", type=int, default=10, metavar="N", help="print the N worst layers (default 10; -1: all, in order; 0: none)")
    p.add_argument("--layer-samples", type=int, default=8, metavar="N", help="compare layers on the first N samples (default 8)")
    p.add_argument("--threads", type=positive, default=1, metavar="N", help="threads of both networks (default 1)")
    p.add_argument("--expect-digest", metavar="HEX", help="fail when `qcompiler digest` would print another digest of FILE.so and DATA")
    add_board(p, "run FILE.so, every layer of it,", several=True)
    add_node_data(p, "the measured SQNR of every layer")
    p.add_argument("--report", metavar="FILE.html", help="write one self-contained page for a sign-off: figures, charts, latency, digests")


def _add_looks(verb: Verb) -> None:
    """The verbs that show what there is, and the demonstration."""
    p = verb(
        "inspect",
        _inspect,
        "show what is inside a library",
        "Read the manifest of FILE.so without executing it (it may be for another CPU): inputs, outputs, what the quantization did, and for every operator "
        "the type and scale of its result, its kernel, and why it is not int8 when it is not.",
    )
    p.add_argument("library", metavar="FILE.so")
    add_format(p)

    verb(
        "targets",
        _targets,
        "list the targets, and what this machine is",
        "List the rows of targets.yaml and which of them this machine can run.",
    )

    p = verb(
        "demo",
        _demo,
        "compile, verify and measure the example network on this machine",
        "Compile the built-in network (handwritten digits) for this machine, verify it against float on labelled images it never saw, "
        "measure int8 against float, and leave the library.",
    )
    p.add_argument("-o", "--output", default="digits.so", metavar="FILE.so", help="the library to leave (default digits.so)")


def _add_completion(verb: Verb, parser: argparse.ArgumentParser) -> None:
    p = verb(
        "completion",
        lambda options: _completion(options, parser),
        "print a script that completes commands and options in a shell",
        "Print a script for SHELL, made by shtab. For bash: qcompiler completion bash > ~/.local/share/bash-completion/completions/qcompiler",
    )
    p.add_argument("shell", choices=["bash", "zsh", "tcsh"], metavar="SHELL", help="bash, zsh or tcsh")


def _compile(options: argparse.Namespace) -> int:
    from qcompiler.cli.tables import compiled_text
    from qcompiler.runtime.shapes import specializations

    output = check_writable(options.output, read_files(options))
    with watched(options) as progress:
        artifact = qcompiler.compile(options.model, options.target, options.calibration, **chosen(options), progress=progress)
    artifact.save(output)
    manifest = artifact.manifest
    for warning in manifest.get("warnings", []):
        complain(f"warning: {warning}")
    account = manifest.get("mixed_precision")
    document = {"output": str(output), "bytes": artifact.size, **{k: manifest.get(k) for k in ("target", "operators", "sqnr_db", "float_ops", "notes")}}
    document |= {k: v for k, v in (("import", artifact.imported), ("mixed_precision", account), ("weights", manifest.get("weights"))) if v is not None}
    if "shapes" in manifest:
        document["shapes"] = [{k: m[k] for k in ("inputs", "code_added", "constants_added", "workspace")} for m in specializations(manifest)]
    show(options, document, lambda: compiled_text(output, artifact, options.model, options.verbose))
    return 0 if account is None or account["met"] else MISSED


def _verify(options: argparse.Namespace) -> int:
    from qcompiler.verification.parity import parity_text

    path = node_data_path(options)
    if path is not None and options.layer_samples == 0:
        raise DataError("--node-data is of layers, and --layer-samples 0 compares none")
    if path is not None and options.report:
        raise DataError("--report has every layer on its page; run verify once more with --node-data alone")
    if options.report:
        return cli_report.verify(options, show)
    with session_of(options) as session, watched(options) as progress:
        report = qcompiler.verify(
            session,
            options.model,
            options.data,
            labels=options.labels,
            min_sqnr=options.min_sqnr,
            min_agreement=options.min_agreement,
            max_accuracy_drop=options.max_accuracy_drop,
            max_channel_bias=options.max_channel_bias,
            metric=options.metric,
            max_metric_drop=options.max_metric_drop,
            preprocess=options.preprocess,
            max_samples=options.max_samples,
            expect_digest=options.expect_digest,
            layer_samples=options.layer_samples,
            threads=options.threads,
            progress=progress,
        )
    write_node_data(path, {row.name: row.metrics.sqnr_db for row in report.layers})
    show(options, report, lambda: parity_text(report, options.layers))
    return 0 if report.passed else MISSED


def _inspect(options: argparse.Namespace) -> int:
    from qcompiler.cli.sheets import present
    from qcompiler.cli.tables import manifest_sheets, manifest_text, step_rows
    from qcompiler.runtime.library import read_manifest

    manifest = read_manifest(options.library)
    count = Path(options.library).stat().st_size
    document = {"bytes": count, "operators": step_rows(manifest), "manifest": manifest}
    present(options, options.library, document, lambda: manifest_text(manifest, count), manifest_sheets(manifest, count))
    return 0


def _targets(options: argparse.Namespace) -> int:
    from qcompiler.base.cuda_driver import Gpu, find_gpu
    from qcompiler.base.host import host_architecture
    from qcompiler.base.targets import find_target, load_targets, missing_features
    from qcompiler.base.text import table

    targets = list(load_targets().values())
    missing = {t.name: missing_features(t) for t in targets}
    native = find_target("native").name if any(not t.gpu and not missing[t.name] for t in targets) else None
    gpu = find_gpu()
    graphics = f"{gpu.name}, compute capability {gpu.capability / 10}" if isinstance(gpu, Gpu) else f"none that CUDA could use ({gpu.replace('an ', 'no ', 1)})"
    rows = [
        [
            t.name + (" *" if t.name == native else ""),
            t.triple,
            ", ".join(t.features),
            ", ".join(t.rows),
            t.storage,
            t.tested,
            "runs here" if not missing[t.name] else f"needs {', '.join(missing[t.name])}",
        ]
        for t in targets
    ]
    document = {
        "architecture": host_architecture(),
        "native": native,
        "gpu": graphics,
        "targets": [{"name": t.name, "triple": t.triple, "features": t.features, "rows": t.rows, "missing": missing[t.name]} for t in targets],
    }
    title = f"This machine: {host_architecture()}, native = {native or 'none of these'}; GPU: {graphics}"
    columns = ("target", "triple", "features", "kernel rows", "storage", "note", "here")
    show(options, document, lambda: table(title, columns, rows, width=180))
    return 0


def _completion(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        import shtab
    except ImportError as error:
        raise DataError("completion needs shtab: pip install 'qcompiler[completion]'") from error
    script = shtab.complete(parser, options.shell)
    show(options, {"script": script}, lambda: script)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from qcompiler.cli.demo import demo, demo_text

    with watched(options) as progress:
        result = demo(check_writable(options.output), progress=progress)
    show(options, result, lambda: demo_text(result))
    return 0 if result["parity"].passed else MISSED
