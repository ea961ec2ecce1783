"""The verb `bench`: how fast a library is, alone, against its float network and against other runtimes."""

from __future__ import annotations

import argparse
import csv
import functools
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import qcompiler
from qcompiler.base.errors import DataError
from qcompiler.base.files import check_writable, replacing, temporary_folder
from qcompiler.base.shape_table import shape_rows
from qcompiler.cli import boards as cli_boards
from qcompiler.cli import throughput as cli_throughput
from qcompiler.cli.arguments import duration, once, positive, read_files, shape
from qcompiler.cli.process import complain, show, watched
from qcompiler.pipeline.options import DATA_HELP, OPTIONS
from qcompiler.runtime.peers import PEERS

QUANTIZING_SAMPLES = 100  # of --data, with which other runtimes quantize
_LOSERS = 5  # layers that a warning names


def add(verb: Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]) -> None:
    """Add the verb with `verb(name, run, summary, description)`, which makes its parser."""
    p = verb(
        "bench",
        _bench,
        "measure the latency of a library, alone or against its float model and other runtimes",
        "Measure FILE.so on random inputs, or on --data. With --model the same network in float, compiled for the same target (a GPU's: for this CPU), and "
        "with --against other runtimes take turns with it in one process; the ratios are what to read, times drift between runs.",
    )
    p.add_argument("library", metavar="FILE.so")
    p.add_argument("--threads", type=positive, default=1, metavar="N", help="threads of each candidate (default 1)")
    p.add_argument("--model", metavar="MODEL", help="the model it was compiled from: measure it in float too")
    p.add_argument(
        "--against",
        action="append",
        default=[],
        type=_peers,
        metavar="RUNTIME[,RUNTIME]",
        help=f"measure these on MODEL too, where they are installed: {', '.join(PEERS)}; in float, and with --data in int8 as their own quantizers make it. "
        "LiteRT takes a TFLite model, or a file of the same network: litert=FILE.tflite; PyTorch takes a .pt2",
    )
    p.add_argument("--input-shape", action="append", default=[], metavar="NAME=1,16", type=shape, help="of a library for several shapes: measure these only")
    p.add_argument("--batch", type=positive, metavar="N", help="of a library for several batches: measure this one only")
    p.add_argument("--data", metavar="DATA", help=f"measure on the first of these inputs, and let other runtimes quantize with them: {DATA_HELP}")
    p.add_argument("--preprocess", metavar="FILE.yaml", help=OPTIONS["preprocess"].help)
    p.add_argument("--duration", "--seconds", dest="seconds", type=duration, default=3.0, metavar="TIME", help="to spend on measuring: 10s, 1m (default 3s)")
    p.add_argument("--warmup", type=int, default=3, metavar="N", help="calls of each candidate before the first that counts (default 3)")
    p.add_argument("--layers", action="store_true", help="print the time of every step as well, with --model beside the float network's")
    p.add_argument("--csv", action="store_true", help="with --layers: print the steps as CSV and nothing else; times in microseconds")
    p.add_argument("--trace", metavar="FILE.json", help="write the steps of one run as a trace for chrome://tracing or ui.perfetto.dev")
    cli_throughput.add(p)
    cli_boards.add_board(p, "measure")
    p.add_argument("--footprint", action="store_true", help="measure memory as well, and energy where the machine has counters that may be read")


def _peers(text: str) -> list[tuple[str, str | None]]:
    """NAME[=FILE][,NAME...]"""
    found = []
    for part in text.split(","):
        name, equals, file = part.partition("=")
        if name not in PEERS or (equals and not file):
            raise argparse.ArgumentTypeError(f"{part!r}: expected one of {', '.join(PEERS)}, or litert=FILE.tflite")
        found.append((name, file or None))
    return found


def _bench(options: argparse.Namespace) -> int:
    from qcompiler.runtime.bench import random_inputs
    from qcompiler.runtime.shapes import spelled

    if cli_boards.on_board(options):
        return cli_boards.bench(options)
    cli_throughput.check(options)
    if any(options.against) and not options.model:
        raise DataError("--against needs --model: the other runtime runs the model itself")
    if options.csv and not options.layers:
        raise DataError("--csv prints the steps; it goes with --layers")
    if options.preprocess and not options.data:
        raise DataError("--preprocess is for the images of --data")
    trace = None if options.trace is None else check_writable(options.trace, read_files(options))
    session = qcompiler.load(options.library, threads=options.threads)
    picked = _picked(options, session)
    one = next((word for word in ("csv", "trace", "throughput") if getattr(options, word)), None)
    if len(picked) > 1 and one is not None:
        raise DataError(f"--{one} is of one shape, and this library has {len(picked)}; name one with --input-shape")
    if options.throughput:
        at, samples = picked[0]
        return cli_throughput.throughput(options, at.manifest, samples[0] if samples else random_inputs(at.inputs), show)
    found = [_measured(options, at, samples, trace) for at, samples in picked]
    if "shapes" in session.manifest:
        titles = [spelled({i.name: i.shape for i in at.inputs}) for at, _ in picked]
        found = [({"shape": t, **document}, text if options.csv else f"{t}\n\n{text}") for t, (document, text) in zip(titles, found, strict=True)]
    show(options, found[0][0] if len(found) == 1 else {"shapes": [document for document, _ in found]}, lambda: "\n\n".join(text for _, text in found))
    return 0


def _picked(options: argparse.Namespace, session: Any) -> list[tuple[Any, list[dict[str, Any]]]]:
    """(the session at a shape, samples of --data for it) of every shape that is to be measured: those asked for, else those of the data, else all."""
    from qcompiler.calibration.frames import open_kept
    from qcompiler.calibration.shaped import ShapedSamples
    from qcompiler.runtime.shapes import chosen_shapes

    most = QUANTIZING_SAMPLES if any(options.against) else 1
    if "shapes" not in session.manifest and not options.input_shape and not options.batch:
        return [(session, list(itertools.islice(open_kept(options.data, session, options.preprocess, most), most)) if options.data else [])]
    numbers = chosen_shapes(session.manifest, shape_rows(once(OPTIONS["input_shapes"], options.input_shape)))
    numbers = numbers if options.batch is None else _of_batch(options, session, numbers)
    data = open_kept(options.data, session, options.preprocess) if options.data else None
    if isinstance(data, ShapedSamples):
        numbers = [i for i in numbers if data.shapes[i]]
        if not numbers:
            raise DataError(f"{options.data}: holds no sample of the shapes to be measured")
        return [(session.specializations[i], list(itertools.islice(data.at(i), most))) for i in numbers]
    return [(session.specializations[i], []) for i in numbers]


def _of_batch(options: argparse.Namespace, session: Any, numbers: Sequence[int]) -> list[int]:
    """The shapes whose inputs all have the batch that is asked for. Raises DataError where there is none."""
    rows = {i: sorted({port.shape[0] for port in session.specializations[i].inputs if port.shape}) for i in numbers}
    if found := [i for i in numbers if rows[i] == [options.batch]]:
        return found
    known = ", ".join(dict.fromkeys(str(r[0]) for r in rows.values() if len(r) == 1))
    raise DataError(
        f"{options.library}: was not compiled for a batch of {options.batch}{f'; it has {known}' if known else ''}. Compile it for several: "
        f"--input-shape 'NAME={{1,{options.batch}}},...'"
    )


def _peer(
    name: str, file: str | None, options: argparse.Namespace, manifest: dict[str, Any], inputs: dict[str, Any], samples: list[dict[str, Any]], folder: Path
) -> dict[str, Callable[[], object]]:
    """Another runtime on the model: LiteRT on a TFLite file itself, PyTorch on a program, those that read ONNX on what is imported of either."""
    from qcompiler.importers.origin import origin_of
    from qcompiler.importers.tflite import TfliteFile
    from qcompiler.importers.torch_program import TorchProgram
    from qcompiler.runtime.peers import peer_calls, torch_call

    origin, model = origin_of(options.model), options.model
    if name == "torch" and isinstance(origin, TorchProgram):
        return torch_call(origin.elsewhere().open()[1], inputs, options.threads)
    if name == "litert":
        file = model if file is None and isinstance(origin, TfliteFile) else file
    elif isinstance(origin, (TfliteFile, TorchProgram)):
        model = folder / f"{origin.name}.onnx"
        model.write_bytes(origin_of(options.model, manifest.get("cut", ())).read()[0].SerializeToString())
    return peer_calls(name, model, inputs, options.threads, samples, folder, file)


def _measured(options: argparse.Namespace, session: Any, samples: list[dict[str, Any]], trace: Path | None) -> tuple[dict[str, Any], str]:
    """What `bench` finds of a library at one shape, as a document and as text."""
    from qcompiler.calibration.ports import real_inputs
    from qcompiler.cli.tables import footprint_text, profile_text, timing_text
    from qcompiler.runtime.bench import BUSY, Neighbours, interleave, random_inputs, ratios
    from qcompiler.verification.evidence import step_times
    from qcompiler.verification.footprint import joules, memory
    from qcompiler.verification.twin import float_session

    against = list(itertools.chain.from_iterable(options.against))
    inputs = samples[0] if samples else random_inputs(session.inputs)
    real = functools.partial(real_inputs, session.manifest)
    candidates: dict[str, Callable[[], object]] = {"int8": lambda: session.run(inputs)}
    float_twin = None
    with temporary_folder() as folder, watched(options) as progress:
        if options.model:
            float_twin = float_session(options.model, session, folder, options.threads)
            candidates["float"] = functools.partial(float_twin.run, inputs)
        for number, (name, file) in enumerate(against):
            place = folder / f"peer{number}"
            place.mkdir()
            candidates |= _peer(name, file, options, session.manifest, real(inputs), [real(s) for s in samples], place)
        neighbours = Neighbours()
        timings = interleave(candidates, seconds=options.seconds, warmup=max(0, options.warmup), progress=progress)
        busy = neighbours.cores()
        runs = int(min(50, max(3, 1.0 / timings[0].minimum)))
        steps = session.profile(inputs, runs) if options.layers or trace or float_twin is not None else []
        floats = [] if float_twin is None else float_twin.profile(inputs, runs)
        measured = {}
        for name, own in (("int8", session), ("float", float_twin)) if options.footprint else ():
            if own is not None:
                measured[name] = (memory(own.path, options.threads), joules(candidates[name], options.seconds / 2))
    base = "float" if options.model else "int8"
    batch = max((port.shape[0] for port in session.inputs if port.shape), default=1)
    notes = []
    if busy is not None and busy > BUSY:
        notes.append(f"other processes used {busy:.1f} cores while this was measured; repeat it on a quiet machine")
    if float_twin is not None and ratios(timings, "float")["int8"] >= 1:
        notes.append(_not_faster(ratios(timings, "float")["int8"], step_times(steps, floats)[0]))
    if trace is not None:
        with replacing(trace) as temporary:
            temporary.write_text(json.dumps(trace_of({"int8": steps, **({"float": floats} if floats else {})})))
    for note in notes:
        complain(f"warning: {note}")
    document = {
        "threads": options.threads,
        "seconds": {t.name: {k: v for k, v in vars(t).items() if k != "name"} | {"samples_per_second": batch / t.mean} for t in timings},
        f"ratio to {base}": ratios(timings, base),
        "busy_cores": busy,
        "warnings": notes,
        "steps": [dict(zip(("id", "op", "kernel", "seconds"), step, strict=True)) for step in steps] if options.layers else [],
        "footprint": {name: {**vars(used), "joules": energy} for name, (used, energy) in measured.items()},
    }
    if options.csv:
        return document, _csv(step_times(steps, floats)[0])
    parts = [timing_text(timings, base, batch, options.threads)]
    parts += [profile_text(steps, floats)] if options.layers else []
    parts += [footprint_text(measured)] if measured else []
    return document, "\n\n".join(parts)


def _not_faster(ratio: float, steps: Sequence[Any]) -> str:
    """What to know, and to do, when a library takes as long as the float network."""
    slower = sorted((s for s in steps if s.float32 is not None and s.int8 > s.float32), key=lambda s: s.float32 - s.int8)
    named = ", ".join(f"{s.name} ({s.int8 * 1e6:.1f} us, in float {s.float32 * 1e6:.1f})" for s in slower[:_LOSERS])
    lost = f"Layers that are slower in int8: {named}{' and others' if len(slower) > _LOSERS else ''}. --keep-float with these names may help" if slower else ""
    advice = lost or "No single layer is slower: conversions between int8 and float take the time; `qcompiler inspect` shows what stayed float, and why"
    return f"int8 is not faster than float here: it takes {ratio:.2f} of its time. {advice}; so may a target with 8-bit dot products, and `qcompiler tune`"


def _csv(steps: Sequence[Any]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("value", "operator", "kernel", "int8_us", "float_us"))
    rows.writerows([s.name, s.op, s.kernel, f"{s.int8 * 1e6:.2f}", "" if s.float32 is None else f"{s.float32 * 1e6:.2f}"] for s in steps)
    return text.getvalue().rstrip("\n")


def trace_of(networks: Mapping[str, Sequence[tuple[str, str, str, float]]]) -> dict[str, Any]:
    """Steps one after the other in the format of Chrome's tracing, a process per network; times in microseconds."""
    events: list[dict[str, Any]] = []
    for process, (name, steps) in enumerate(networks.items()):
        events.append({"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": name}})
        begin = 0.0
        for value, op, kernel, seconds in steps:
            events.append({"name": value, "cat": op, "ph": "X", "ts": begin * 1e6, "dur": seconds * 1e6, "pid": process, "tid": 0, "args": {"kernel": kernel}})
            begin += seconds
    return {"traceEvents": events, "displayTimeUnit": "ms"}
