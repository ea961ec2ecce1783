"""CUDA on a machine with a GPU: exactness of every kernel row and of whole networks on the device, then speed against PyTorch and TensorRT.

    python benchmarks/cuda.py --prepare DIR --target cuda-sm90      # anywhere with nvcc: minutes of compiling that need no GPU
    python benchmarks/cuda.py --prepared DIR [--seconds 5] [--without SECTION]... [--json FILE]      # on the GPU: numpy and the runtime are enough
    python benchmarks/cuda.py [--network resnet50]... [--batch 1 32]      # both, on a machine that has everything

Rows: every case of tests/test_kernels_cuda*.py runs on the device and must equal numerics.py bit for bit. Networks: compiled for a CPU and for the GPU
from one plan; outputs must be byte-identical. Steps by the GPU's clock, with the percent of the card's int8 peak that each reaches. Speed: inputs and
outputs lie in device memory for everyone (without PyTorch, ours are page-locked), candidates take turns, a call returns when its result is there: ours
replays its CUDA graph; PyTorch runs float16, channels_last, as a CUDA graph, compiled and not; TensorRT runs float16, and int8 from what `export-onnx` writes.

Every section runs in a process of its own, at most --limit seconds, and what it found is in the results file before the next begins; one that fails is named
there and at the end. Results go to benchmarks/results/cuda-GPU.json unless --json names a file. Exit status 1 when anything differs by a bit or fails, 2
without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cuda_sections as sections
import networks
from cuda_prepare import WEIGHTS, prepare

from qcompiler.base.cuda_driver import Gpu, find_gpu

if TYPE_CHECKING:
    from qcompiler.base.targets import Target

HERE = Path(__file__).resolve().parent
LEAST = 5.0  # seconds that are worth beginning a section


def target_of(gpu: Gpu) -> Target:
    """The row of targets.yaml that fits a GPU best."""
    from qcompiler.base.host import host_architecture
    from qcompiler.base.targets import load_targets

    fitting = [t for t in load_targets().values() if t.gpu and t.host_architecture == host_architecture() and t.runs_on(gpu.capability)]
    if not fitting:
        raise SystemExit(f"no target of targets.yaml runs on {gpu.name} (compute capability {gpu.capability / 10})")
    return max(fitting, key=lambda t: (t.capability, not t.one_capability))


# -- in a section's process -----------------------------------------------------------------------------------------------------------------


def run_section(options: argparse.Namespace, gpu: Gpu) -> None:
    """Run the one that `--section` names; its result goes to the file that --json names."""
    folder, (kind, _, name) = options.prepared, options.section.partition(":")
    plan = json.loads((folder / "plan.json").read_text())
    if kind == "rows":
        return sections.check_rows(folder, plan["rows"], options.json)
    network = next(n for n in plan["networks"] if n["name"] == name)
    if kind == "exact":
        result = sections.check_network(folder, network)
    elif kind == "steps":
        result = sections.measure_steps(folder, network, gpu)
    else:
        result = sections.measure_speed(folder, network, options.seconds, set(options.without))
    options.json.write_text(json.dumps(result))


# -- the run --------------------------------------------------------------------------------------------------------------------------------


class Report:
    """The document, on disk whenever it has grown."""

    def __init__(self, path: Path, gpu: Gpu, plan: dict[str, Any]) -> None:
        self.path, self.wrong = path, False
        self.document: dict[str, Any] = {"gpu": gpu.name, "capability": gpu.capability, "target": plan["target"], "rows": []}
        self.document |= {"networks": [dict(n) for n in plan["networks"]], "failed": list(plan["failed"])}
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.document, indent=1) + "\n")
        part.replace(self.path)

    def fail(self, section: str, error: str) -> None:
        self.document["failed"].append({"section": section, "error": error})
        self.write()
        print(f"FAILED: {section}: {error}", flush=True)


def child(section: str, result: Path, options: argparse.Namespace, without: list[str]) -> str:
    """Run a section in a process of its own. Empty, or why it failed."""
    limit = min(options.limit, options.within - time.monotonic())  # `measure` made a moment of it
    if limit < LEAST:
        return "no time was left"
    command = [sys.executable, __file__, "--prepared", options.prepared, "--section", section, "--json", result, "--seconds", str(options.seconds)]
    for name in without:
        command += ["--without", name]
    status, said = bounded([str(c) for c in command], limit)
    if status is None:
        return f"took longer than {limit:.0f} s"
    if status == 0:
        sys.stderr.write("".join(line + "\n" for line in said.splitlines() if line.startswith("left out: ")))
        return ""
    lines = said.strip().splitlines()
    return (lines[-1][:600] if lines else "") or f"exit status {status}"


def bounded(command: list[str], limit: float) -> tuple[int | None, str]:
    """(exit status, what it wrote to stderr) of a command; None where it took longer. All processes that it left behind end with it: compilers that a peer
    started would hold its output open for ever. One that even SIGKILL does not end, as the driver may have it, is not waited for."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process, status = subprocess.Popen(command, stderr=said, start_new_session=True), None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LEAST)
        said.seek(0)
        return status, said.read()


def rows(report: Report, folder: Path, cases: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """All cases; one that breaks the device costs a process, not the cases after it."""
    results, broken = folder / "rows.jsonl", 0
    while True:
        before = len(results.read_text().splitlines()) if results.exists() else 0
        error = child("rows", results, options, [])
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        if error and len(lines) < len(cases):
            report.fail(f"rows, {cases[len(lines)]['case']} ({cases[len(lines)]['row']})", error)
            broken = broken + 1 if len(lines) == before else 1
            with results.open("a") as file:
                file.write(json.dumps({k: cases[len(lines)][k] for k in ("case", "row")} | {"error": error}) + "\n")
        report.document["rows"] = lines
        report.write()
        if not error or broken == 3 or len(lines) >= len(cases):  # three in a row: it is not the cases
            break
    wrong = [r for r in lines if "error" not in r and (r["wrong"] or r["outside"])]
    report.wrong |= bool(wrong)
    print(f"{len(lines)} of {len(cases)} cases of {len({r['row'] for r in lines})} rows on the device: {len(wrong)} differ", flush=True)
    for r in wrong:
        print(f"  {r['case']} ({r['row']}): {r['wrong']} elements{', and bytes outside its output' if r['outside'] else ''}", flush=True)


def network_section(report: Report, folder: Path, network: dict[str, Any], kind: str, section: str, options: argparse.Namespace) -> None:
    result = folder / f"{kind}.json"
    result.unlink(missing_ok=True)
    error = child(section, result, options, options.without)
    if error and kind == "speed":
        report.fail(section, error)
        error = child(section, result, options, ["torch", "tensorrt"])  # ours alone
    if error:
        return report.fail(section, error)
    network[kind] = json.loads(result.read_text())
    report.write()
    report.wrong |= kind == "exact" and any(network[kind]["outputs"].values())
    print("\n" + text_of(network, kind), flush=True)


def guarded(report: Report, section: str, work: Callable[[], None]) -> None:
    """What goes wrong with one section's result costs no other."""
    try:
        work()
    except Exception as error:
        report.fail(section, sections.why(error))


def listing(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table, without what draws those of the command line; a column whose name ends in "|" is aligned right."""
    cells = [[c.removesuffix("|") for c in columns], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    parts = [[c.rjust(w) if name.endswith("|") else c.ljust(w) for c, w, name in zip(row, widths, columns, strict=True)] for row in cells]
    return "\n".join([title, *("  ".join(row).rstrip() for row in parts)])


def text_of(network: dict[str, Any], kind: str) -> str:
    """What a section found, to read."""
    title, found = f"{network['network']}, batch {network['batch']}", network[kind]
    if kind == "exact":
        wrong = {name: count for name, count in found["outputs"].items() if count}
        verdict = (
            f"DIFFERS FROM THE CPU: {wrong}" if wrong else "the same bytes as on the CPU" if network["integer"] else "as on the CPU, to float32's rounding"
        )
        first, second, planned, left = (f"{found['memory'][k] / 1e6:.1f}" for k in ("first", "second", "planned", "left"))
        return f"{title}: {verdict}; a session takes {second} MB of the GPU's memory ({planned} planned), the first one {first}; {left} MB stay behind"
    if kind == "steps":
        steps = sorted(found["steps"], key=lambda s: -s["seconds"])
        cells = [[s["id"], s["op"], s["kernel"], f"{s['seconds'] * 1e6:.1f}", f"{100 * s['of_peak']:.1f} %" if s["of_peak"] else ""] for s in steps]
        return listing(f"{title}: steps by the GPU's clock", ("value", "operator", "kernel", "us|", "of int8 peak|"), cells)
    lines = [[name, f"{r['minimum'] * 1e3:.3f}", f"{r['median'] * 1e3:.3f}", f"{r['ratio']:.3f}"] for name, r in found["candidates"].items()]
    return listing(title, ("candidate", "minimum ms|", "median ms|", f"ratio to {found['base']}|"), lines)


def measure(options: argparse.Namespace, gpu: Gpu) -> int:
    """Run all sections of a prepared folder."""
    try:
        plan = json.loads((options.prepared / "plan.json").read_text())
    except (OSError, ValueError) as error:
        print(f"{options.prepared}: not a folder that --prepare wrote ({error})", file=sys.stderr)
        return 2
    if plan["capability"] > gpu.capability:
        print(f"{options.prepared} was prepared for {plan['target']}, and {gpu.name} has compute capability {gpu.capability / 10}", file=sys.stderr)
        return 2
    options.within += time.monotonic()
    path = options.json or HERE / "results" / f"cuda-{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.json"
    report = Report(path, gpu, plan)
    print(f"{gpu.name}, compute capability {gpu.capability / 10}, target {plan['target']}; results in {path}", flush=True)
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as name:
        if plan["rows"] and "rows" not in options.without:
            guarded(report, "rows", lambda: rows(report, Path(name), plan["rows"], options))
        for network in report.document["networks"]:
            for kind in (k for k in ("exact", "steps", "speed") if k not in options.without):
                section = f"{kind}:{network['name']}"
                guarded(report, section, lambda n=network, k=kind, s=section: network_section(report, Path(name), n, k, s, options))  # type: ignore[misc]
    failed = report.document["failed"]
    print(f"\n{path}: {'SOMETHING DIFFERS' if report.wrong else 'nothing differs'}, {len(failed)} sections failed")
    for f in failed:
        print(f"  {f['section']}: {f['error']}")
    return int(report.wrong or bool(failed))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=networks.default_data(), help="folder with models/ and imagenet/")
    parser.add_argument("--network", action="append", choices=[*networks.NAMES, *networks.GENERATED, "none"], help="default: the trained ones")
    parser.add_argument("--text", action="append", default=[], type=Path, metavar="FILE", help="with --prepare: a network that reads tokens (ONNX) too")
    parser.add_argument("--tokens", type=int, default=128, help="of each of --text")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring per network and batch")
    parser.add_argument("--without", action="append", default=[], choices=["rows", "weights", "exact", "steps", "speed", "torch", "tensorrt"])
    parser.add_argument("--json", type=Path, help="where the results go (default benchmarks/results/cuda-GPU.json)")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="compile into DIR and stop: needs --target and no GPU")
    parser.add_argument("--target", help="with --prepare: a GPU target of targets.yaml")
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="run what --prepare left in DIR")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that a section may take")
    parser.add_argument("--within", type=float, default=math.inf, metavar="SECONDS", help="for all sections; those without any are named as failed")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if bool(options.prepare) != bool(options.target):
        parser.error("--prepare and --target need each other")
    gpu = find_gpu()
    if not options.prepare and not isinstance(gpu, Gpu):
        print(f"benchmarks/cuda.py measures on a GPU, and this machine lacks {gpu}", file=sys.stderr)
        return 2
    if isinstance(gpu, Gpu) and options.section:
        try:
            return run_section(options, gpu) or 0
        except Exception as error:  # whatever it is, the caller wants it in one line
            print(sections.why(error), file=sys.stderr)
            return 1
    if isinstance(gpu, Gpu) and options.prepared:
        return measure(options, gpu)
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as name:
        from qcompiler.base.targets import find_target

        folder, target = options.prepare or Path(name), find_target(options.target) if options.target else target_of(gpu)  # type: ignore[arg-type]
        found = [networks.find(n, options.data, networks.default_cache()) for n in options.network or networks.NAMES if n != "none"]
        chosen = [n for n in found if n] + [networks.text_network(path, options.tokens, networks.default_cache(), True) for path in options.text]
        from qcompiler.base.progress import terminal_progress

        with terminal_progress() as progress:
            weights = () if "weights" in options.without else WEIGHTS
            parts = {"rows": "rows" not in options.without, "peers": "tensorrt" not in options.without}
            plan = prepare(folder, target, chosen, options.batch, weights=weights, **parts, progress=progress)
        if options.prepare:
            size = sum(p.stat().st_size for p in folder.iterdir())
            print(f"{folder}: {len(plan['rows'])} cases, {len(plan['networks'])} networks, {size / 1e6:.1f} MB; {len(plan['failed'])} parts failed")
            return int(bool(plan["failed"]))
        options.prepared = folder
        return measure(options, gpu)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
