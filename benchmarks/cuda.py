"""CUDA on a machine with a GPU: exactness of whole networks and of every kernel row on the device, and speed against PyTorch and TensorRT.

    python benchmarks/cuda.py --prepare gpu.tar.xz --target cuda-sm90a      # anywhere with nvcc: minutes of compiling that need no GPU
    python benchmarks/cuda.py --prepared gpu.tar.xz [--within 540] [--json FILE]      # on the GPU: numpy and the runtime are enough
    python benchmarks/cuda.py [--network resnet50]... [--batch 1 32]      # both, on a machine that has everything

In the order of what a short visit must not miss:

exact   networks compiled for a CPU and for the GPU from one plan: outputs must be byte-identical
speed   ours, by each of the targets that were prepared, and PyTorch: float16, channels_last, as a CUDA graph. Inputs and outputs lie in device memory for
        everyone (without PyTorch, ours are page-locked), candidates take turns, a call returns when its result is there; ours replays its CUDA graph
steps   by the GPU's clock, with the percent of the card's int8 peak that each reaches
rows    every case of tests/test_kernels_cuda*.py runs on the device and must equal numerics.py bit for bit; the kernels that networks run come first
peers   what takes long to make: PyTorch compiled; TensorRT in float16, and in int8 from what `export-onnx` writes

Every section runs in a process of its own for a limited time, and what it found is in the results file before the next begins; one that fails is named there
and at the end, and a library or a row of kernels that breaks the device is not run again. The same call with the same results file goes on where one that
was cut off ended: what was measured is kept, and only what had no time is done. Results go to benchmarks/results/cuda-GPU.json unless --json names a file.
Exit status 1 when anything differs by a bit or fails, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import lzma
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cuda_sections as sections
import networks
from cuda_prepare import WEIGHTS, pack, prepare, unpack

from qcompiler.base.cuda_driver import Gpu, find_gpu

if TYPE_CHECKING:
    from qcompiler.base.targets import Target

HERE = Path(__file__).resolve().parent
LEAST = 5.0  # seconds that are worth beginning a section
# Kinds of sections in their order, and seconds that one may take; all rows are one.
LIMITS = {"exact": 60.0, "speed": 90.0, "steps": 60.0, "rows": 240.0, "peers": 240.0}
PEERS = {"speed": ["torch float16"], "peers": ["torch float16 compiled", "tensorrt float16", "tensorrt int8"]}
STILL = 40.0  # seconds in which a case must end, the process's start included
OF_A_ROW, IN_TURN = 3, 12  # cases that break the device: of a row before it is given up, in turn before all are
SHOWN = 8  # steps of a network
WORDS = 4096  # of a network that reads text: more are weight to carry
NO_TIME = "no time was left"


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
    folder, (kind, name, targets) = options.prepared, options.section.split(":")
    plan = json.loads((folder / "plan.json").read_text())
    if kind == "rows":
        return sections.check_rows(folder, plan["rows"], options.json)
    network = next(n for n in plan["networks"] if n["name"] == name)
    if kind == "exact":
        result = sections.check_network(folder, network, targets)
    elif kind == "steps":
        result = sections.measure_steps(folder, network, targets, gpu)
    else:
        peers = [peer for peer in PEERS[kind] if peer.split()[0] not in options.without]
        result = sections.measure_speed(folder, network, targets.split(","), options.seconds, peers, alone=kind == "speed")
    options.json.write_text(json.dumps(result))


# -- the run --------------------------------------------------------------------------------------------------------------------------------


class Report:
    """The document, on disk whenever it has grown. One of the same plan and GPU that is there already is gone on with."""

    def __init__(self, path: Path, gpu: Gpu, plan: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps([gpu.name, gpu.capability, plan], sort_keys=True).encode()).hexdigest()
        self.path, self.rows_file = path, path.with_suffix(f".{key[:8]}.jsonl")  # the latter: rows as soon as they are known, one a line
        self.document: dict[str, Any] = {"gpu": gpu.name, "capability": gpu.capability, "targets": plan["targets"], "plan": key, "rows": []}
        self.document |= {"networks": [{k: n[k] for k in ("name", "network", "batch", "integer")} for n in plan["networks"]], "failed": list(plan["failed"])}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            earlier = json.loads(path.read_text())
        except (OSError, ValueError):
            earlier = {}
        if earlier.get("plan") == key:
            self.document = earlier | {"failed": [f for f in earlier["failed"] if not f["error"].startswith(NO_TIME)]}
            if len(sections.lines_of(self.rows_file)) < len(earlier["rows"]):
                self.rows_file.write_text("\n".join(map(json.dumps, earlier["rows"])))
        else:
            self.rows_file.unlink(missing_ok=True)
        self.document["rows"] = sections.lines_of(self.rows_file)
        self.write()

    @property
    def wrong(self) -> bool:
        """Whether anything differs."""
        exact = [found for network in self.document["networks"] for found in network.get("exact", {}).values()]
        return any(count for found in exact for count in found["outputs"].values()) or bool(differing(self.document["rows"]))

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.document, indent=1) + "\n")
        part.replace(self.path)

    def fail(self, section: str, error: str) -> None:
        self.document["failed"].append({"section": section, "error": error})
        self.write()
        print(f"FAILED: {section}: {error}", flush=True)

    def failed(self, section: str) -> bool:
        return any(f["section"] == section for f in self.document["failed"])


def differing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in lines if "error" not in r and (r["wrong"] or r["outside"])]


def child(section: str, result: Path, options: argparse.Namespace, without: list[str]) -> str:
    """Run a section in a process of its own. Empty, or why it failed."""
    limit = min(options.limit, LIMITS[section.partition(":")[0]], options.within - time.monotonic())  # `measure` made a moment of it
    if limit < LEAST:
        return NO_TIME
    command = [sys.executable, __file__, "--prepared", options.prepared, "--section", section, "--json", result, "--seconds", str(options.seconds)]
    for name in without:
        command += ["--without", name]
    status, said = bounded([str(c) for c in command], limit, result if section.startswith("rows") else None)
    if status is None:
        return NO_TIME if options.within - time.monotonic() < LEAST else f"took longer than {limit:.0f} s, or {STILL} s for one case"
    if status == 0:
        sys.stderr.write("".join(line + "\n" for line in said.splitlines() if line.startswith("left out: ")))
        return ""
    lines = said.strip().splitlines()
    return (lines[-1][:600] if lines else "") or f"exit status {status}"


def bounded(command: list[str], limit: float, growing: Path | None = None) -> tuple[int | None, str]:
    """(exit status, what it wrote to stderr) of a command; None where it took longer, or left the file `growing` as it was for STILL seconds. All processes
    that it left behind end with it: compilers that a peer started would hold its output open for ever. One that even SIGKILL does not end, as the driver may
    have it, is not waited for."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process, status = subprocess.Popen(command, stderr=said, start_new_session=True), None
        end, size, changed = time.monotonic() + limit, -1, time.monotonic()
        try:
            while status is None and (now := time.monotonic()) < end and now < changed + STILL:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(min(1.0, end - now))
                grown = growing.stat().st_size if growing is not None and growing.exists() else -2
                if growing is None or grown != size:
                    size, changed = grown, time.monotonic()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LEAST)
        said.seek(0)
        return status, said.read()


def rows(report: Report, cases: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """All cases; one that breaks the device costs a process, three of a row that row's others, and many in turn the rest: it is not the cases then. Those that
    the time of all of them does not suffice for are left to the next call."""
    results, broken, in_turn = report.rows_file, Counter[str](), 0
    options = argparse.Namespace(**vars(options) | {"within": min(options.within, time.monotonic() + LIMITS["rows"])})
    while True:
        before = len(sections.lines_of(results))
        error = child("rows::", results, options, [])
        lines = sections.lines_of(results)
        done = {line["case"] for line in lines}
        left = [case for case in cases if case["case"] not in done]
        if error == NO_TIME:
            report.fail("rows", f"{NO_TIME} for {len(left)} of {len(cases)} cases")
        elif error and left:
            row = left[0]["row"]
            broken[row] += 1
            in_turn = in_turn + 1 if len(lines) == before else 1
            report.fail(f"rows, {left[0]['case']} ({row})", error)
            out = [left[0] | {"error": error}]
            if broken[row] == OF_A_ROW:
                out += [case | {"error": f"left out: {OF_A_ROW} of {row} broke the device"} for case in left[1:] if case["row"] == row]
            with results.open("a") as file:
                file.write("".join("\n" + json.dumps({k: case[k] for k in ("case", "row", "error")}) for case in out))
            lines = sections.lines_of(results)
        report.document["rows"] = lines
        report.write()
        if not error or error == NO_TIME or in_turn == IN_TURN or len(lines) >= len(cases):
            break
    wrong = differing(lines)
    print(f"{len(lines)} of {len(cases)} cases of {len({r['row'] for r in lines})} rows on the device: {len(wrong)} differ", flush=True)
    for r in wrong:
        print(f"  {r['case']} ({r['row']}): {r['wrong']} elements{', and bytes outside its output' if r['outside'] else ''}", flush=True)


def network_section(report: Report, folder: Path, network: dict[str, Any], kind: str, targets: Sequence[str], options: argparse.Namespace) -> None:
    section, result = f"{kind}:{network['name']}:{','.join(targets)}", folder / f"{kind}.json"
    result.unlink(missing_ok=True)
    error = child(section, result, options, options.without)
    if error not in ("", NO_TIME) and kind == "speed" and "torch" not in options.without:
        report.fail(section, error)
        error = child(section, result, options, ["torch"])  # ours alone
    if error:
        return report.fail(section, error)
    found = json.loads(result.read_text())
    network[kind] = found if kind in PEERS else network.get(kind, {}) | {targets[0]: found}
    report.write()
    print("\n" + text_of(network, kind, found, targets), flush=True)


def network_sections(report: Report, folder: Path, kind: str, options: argparse.Namespace) -> None:
    """One kind, of all networks, but what was measured before, and libraries that did not run."""
    for network in report.document["networks"]:
        targets = report.document["targets"]
        if kind != "exact" and "exact" not in options.without:
            targets = [t for t in targets if t in network.get("exact", {})]
        groups = ([targets] if targets else []) if kind in PEERS else [[t] for t in targets]
        for group in groups:
            section = f"{kind}:{network['name']}:{','.join(group)}"
            known = kind in network if kind in PEERS else group[0] in network.get(kind, {})
            if not known and not report.failed(section):
                guarded(report, section, lambda n=network, g=group: network_section(report, folder, n, kind, g, options))  # type: ignore[misc]


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


def text_of(network: dict[str, Any], kind: str, found: dict[str, Any], targets: Sequence[str]) -> str:
    """What a section found, to read."""
    title = f"{network['network']}, batch {network['batch']}"
    if kind in PEERS:
        if not found["candidates"]:
            return f"{title}: no peer ran"
        lines = [[name, f"{r['minimum'] * 1e3:.3f}", f"{r['median'] * 1e3:.3f}", f"{r['ratio']:.3f}"] for name, r in found["candidates"].items()]
        return listing(title, ("candidate", "minimum ms|", "median ms|", f"ratio to {found['base']}|"), lines)
    title += f", {targets[0]}"
    if kind == "exact":
        wrong = {name: count for name, count in found["outputs"].items() if count}
        verdict = (
            f"DIFFERS FROM THE CPU: {wrong}" if wrong else "the same bytes as on the CPU" if network["integer"] else "as on the CPU, to float32's rounding"
        )
        first, second, planned, left = (f"{found['memory'][k] / 1e6:.1f}" for k in ("first", "second", "planned", "left"))
        return f"{title}: {verdict}; a session takes {second} MB of the GPU's memory ({planned} planned), the first one {first}; {left} MB stay behind"
    steps = sorted(found["steps"], key=lambda s: -s["seconds"])
    cells = [[s["id"], s["op"], s["kernel"], f"{s['seconds'] * 1e6:.1f}", f"{100 * s['of_peak']:.1f} %" if s["of_peak"] else ""] for s in steps[:SHOWN]]
    whole, rest = sum(s["seconds"] for s in steps), sum(s["seconds"] for s in steps[SHOWN:])
    cells += [[f"{len(steps) - SHOWN} others", "", "", f"{rest * 1e6:.1f}", ""]] if rest else []
    return listing(f"{title}: {whole * 1e6:.1f} us of steps by the GPU's clock", ("value", "operator", "kernel", "us|", "of int8 peak|"), cells)


def measure(options: argparse.Namespace, gpu: Gpu) -> int:
    """Run all sections of what was prepared."""
    options.within += time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as name, tempfile.TemporaryDirectory(prefix="qcompiler-") as unpacked:
        try:
            if not options.prepared.is_dir():
                unpack(options.prepared, Path(unpacked))
            folder = options.prepared if options.prepared.is_dir() else Path(unpacked)
            plan = json.loads((folder / "plan.json").read_text())
        except (OSError, EOFError, ValueError, lzma.LZMAError, tarfile.TarError) as error:
            print(f"{options.prepared}: not what --prepare wrote ({error})", file=sys.stderr)
            return 2
        if plan["capability"] > gpu.capability:
            what = f"was prepared for {', '.join(plan['targets'])}, and {gpu.name} has compute capability {gpu.capability / 10}"
            print(f"{options.prepared} {what}", file=sys.stderr)
            return 2
        options.prepared = folder
        path = options.json or HERE / "results" / f"cuda-{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.json"
        report = Report(path, gpu, plan)
        print(f"{gpu.name}, compute capability {gpu.capability / 10}, {', '.join(plan['targets'])}; results in {path}", flush=True)
        for kind in (k for k in LIMITS if k not in options.without):
            if kind != "rows":
                network_sections(report, Path(name), kind, options)
            elif len(report.document["rows"]) < len(plan["rows"]):
                guarded(report, "rows", lambda: rows(report, plan["rows"], options))
    print("\n" + summary(report))
    return int(report.wrong or bool(report.document["failed"]))


def summary(report: Report) -> str:
    """What is to be known, at the end of the output, where a cut log has it too."""
    cells = []
    for network in report.document["networks"]:
        exact = network.get("exact", {})
        for target in report.document["targets"]:
            verdict = "not known" if target not in exact else "DIFFERS" if any(exact[target]["outputs"].values()) else "exact"
            times = {k: v["minimum"] for kind in PEERS for k, v in network.get(kind, {}).get("candidates", {}).items()}
            ours, theirs = times.get(f"int8 {target}"), [times[k] for k in times if not k.startswith("int8")]
            ratio = f"{ours / min(theirs):.3f}" if ours and theirs else ""
            cells.append([f"{network['network']}, batch {network['batch']}", target, verdict, f"{ours * 1e3:.3f}" if ours else "", ratio])
    failed = report.document["failed"]
    lines = [listing("Networks", ("network", "target", "outputs", "ms|", "of the best peer|"), cells)] if cells else []
    lines += [f"\n{report.path}: {'SOMETHING DIFFERS' if report.wrong else 'nothing that ran differs'}, {len(failed)} sections failed"]
    return "\n".join(lines + [f"  {f['section']}: {f['error']}" for f in failed])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=networks.default_data(), help="folder with models/ and imagenet/")
    parser.add_argument("--network", action="append", choices=[*networks.NAMES, *networks.GENERATED, "none"], help="default: the trained ones")
    parser.add_argument("--text", action="append", default=[], type=Path, metavar="FILE", help="with --prepare: a network that reads tokens (ONNX) too")
    parser.add_argument("--tokens", type=int, default=128, help="of each of --text")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring per network and batch")
    parser.add_argument("--without", action="append", default=[], choices=["rows", "weights", "exact", "steps", "speed", "peers", "torch", "tensorrt"])
    parser.add_argument("--json", type=Path, help="where the results go (default benchmarks/results/cuda-GPU.json), and what is gone on with")
    parser.add_argument("--prepare", type=Path, metavar="FILE.tar.xz", help="compile into a file, or a folder, and stop: needs --target and no GPU")
    parser.add_argument("--target", action="append", default=[], help="with --prepare: a GPU target of targets.yaml; of several, kernel rows are the first's")
    parser.add_argument("--prepared", type=Path, metavar="FILE.tar.xz", help="run what --prepare left there")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds that a section may take, where it isn't fewer anyway")
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

        packed = options.prepare is not None and options.prepare.name.endswith(".tar.xz")
        folder = options.prepare if options.prepare and not packed else Path(name)
        targets = [find_target(t) for t in options.target] or [target_of(gpu)]  # type: ignore[arg-type]
        found = [networks.find(n, options.data, networks.default_cache()) for n in options.network or networks.NAMES if n != "none"]
        chosen = [n for n in found if n] + [networks.text_network(path, options.tokens, networks.default_cache(), True, WORDS) for path in options.text]
        from qcompiler.base.progress import terminal_progress

        with terminal_progress() as progress:
            weights = () if "weights" in options.without else WEIGHTS
            parts = {"rows": "rows" not in options.without, "peers": "tensorrt" not in options.without}
            plan = prepare(folder, targets, chosen, options.batch, weights=weights, **parts, progress=progress)
        if options.prepare:
            size = sum(p.stat().st_size for p in folder.iterdir())
            if packed:
                pack(folder, options.prepare)
            total = f"{options.prepare.stat().st_size / 1e6:.1f} MB of {size / 1e6:.1f}" if packed else f"{size / 1e6:.1f} MB"
            print(f"{options.prepare}: {len(plan['rows'])} cases, {len(plan['networks'])} networks, {total}; {len(plan['failed'])} parts failed")
            return int(bool(plan["failed"]))
        options.prepared = folder
        return measure(options, gpu)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
