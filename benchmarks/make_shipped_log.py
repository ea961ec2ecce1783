"""Makes qcompiler/backend/shipped_log: tuned kernels for the shapes of public networks, which every compilation uses.

    python benchmarks/make_shipped_log.py --data ../shared/data --log LOG [--network resnet50]... [--time-limit 1800]

For each network: tunes it into LOG (going on where an earlier run stopped; --time-limit 0 takes LOG as it is), compiles it with and without the
result, and times every step of both libraries in turns. A record is shipped only if its steps are more than 2 % faster there, in the network, than
the default's on one thread. A record that divides work otherwise must also be no slower on all threads, at a moment when those are free. Records of
other workloads stay as they are. Times are of this machine, and two runs differ a little; the selection is what the script fixes.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import networks

PUBLIC = (*networks.NAMES, "squeezenet", "densenet121", "efficientnet_lite4")  # mobilenet_v2_shifted stays unseen, to measure what that costs
GAIN = 0.98  # a record must be at least so much faster


def step_seconds(libraries: list[Path], inputs: dict[str, Any], threads: int, rounds: int) -> list[list[float]]:
    """Least seconds of each step of each library, the libraries taking turns."""
    import qcompiler

    sessions = [qcompiler.load(library, threads=threads) for library in libraries]
    least = [[math.inf] * len(s.manifest["steps"]) for s in sessions]
    for turn in range(rounds):
        for i in (range(len(sessions)), reversed(range(len(sessions))))[turn % 2]:
            for at, step in enumerate(sessions[i].profile(inputs, 10)):
                least[i][at] = min(least[i][at], step[3])
    return least


def confirmed(quantized: Any, target: Any, log: Path, threads: int, rounds: int) -> tuple[set[str], list[Any]]:
    """The workloads of this network, and the records of `log` that make its steps faster by more than `GAIN` says: with the ratios found here."""
    import dataclasses

    from qcompiler.backend.build import build
    from qcompiler.backend.tuning_log import Tuned, key_of, workload_of

    tuned = Tuned(target, log, None)
    plain, fast = build(quantized.integer, target, "default"), build(quantized.integer, target, "tuned", tuned)
    inputs = next(iter(quantized.job.samples))
    with tempfile.TemporaryDirectory() as name:
        libraries = [built.link().save(Path(name) / f"{i}.so") for i, built in enumerate((plain, fast))]
        ways = [step_seconds(libraries, inputs, count, rounds) for count in sorted({1, threads})]
    keys = [key_of(s.row.name, workload_of(s.op)) if s.row is not None and s.op is not None else "" for s in plain.program.steps]
    defaults = {k: s.row.default(s.op, target) for k, s in zip(keys, plain.program.steps, strict=True) if k and s.row is not None and s.op is not None}
    kept = []
    for key, record in sorted(tuned.used.items()):
        sums = [[sum(t for t, k in zip(library, keys, strict=True) if k == key) for library in way] for way in ways]
        (old, new), (old_all, new_all) = sums[0], sums[-1]
        ratio = new / old
        if any(record.params[k] != v for k, v in defaults[key].items() if k.endswith("tasks")):  # work is divided otherwise: worth it only if it is
            parallel = old_all < 0.75 * old  # the cores were free
            ratio = math.sqrt(ratio * new_all / old_all) if parallel and new_all <= old_all else 1.0
        print(f"  {record.row} {record.params}: {record.ratio:.3f} alone, {ratio:.3f} in the network", file=sys.stderr)
        if ratio < GAIN:
            kept.append(dataclasses.replace(record, ratio=ratio, seconds=tuple(new / keys.count(key) for _, new in sums), threads=threads))
    return set(keys), kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks.add_arguments(parser, PUBLIC)
    parser.add_argument("--log", type=Path, required=True, help="folder of the full tuning log")
    parser.add_argument("--target", default="native")
    parser.add_argument("--time-limit", type=float, default=1800.0, help="seconds of tuning per network; 0: none")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=30, help="of timing each library")
    parser.add_argument("--output", type=Path, help="default: qcompiler/backend/shipped_log of the checkout")
    options = parser.parse_args()

    from qcompiler.backend.tuning_log import SHIPPED, best_of, isa_of, opened, read_file, read_log, write_log
    from qcompiler.base.targets import find_target
    from qcompiler.pipeline.compile import quantize
    from qcompiler.tuning.search import check_arguments, tune_modules

    target = find_target(options.target)
    check_arguments(target, 1, None, options.threads)
    output = options.output or SHIPPED
    covered: set[str] = set()
    kept: list[Any] = []
    for network in networks.chosen(options):
        print(network.name, file=sys.stderr)
        quantized = quantize(network.model, target, network.calibration(), preprocess=network.preprocess, preset="fast")
        if options.time_limit > 0:
            with opened(options.log, isa_of(target)) as writer:
                state = tune_modules([quantized.integer], target, writer, read_file(writer.path), 10**9, options.time_limit, options.threads)
            print(f"  {state.measured} variants measured; {state.stopped}", file=sys.stderr)
            assert not state.wrong, state.wrong
        workloads, records = confirmed(quantized, target, options.log, options.threads, options.rounds)
        covered |= workloads
        kept += records
    before = read_log(output) if any(output.glob("*.jsonl")) else []
    others = [r for r in before if r.isa != isa_of(target) or r.key not in covered]
    write_log(output, [*others, *best_of(kept).values()])
    print(f"{output}: {len(best_of(kept))} records kept, {len(others)} left as they were", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
