"""Kernels that fit this machine: search for a while, keep what was found in a log, compile with it. Results never change, only times do."""

import numpy as np

import qcompiler
from qcompiler.cli.demo import MODEL, demo_data


def main() -> None:
    calibration, evaluation, _ = demo_data()
    options = {"calibration": calibration[:16], "preset": "fast"}

    # A real search takes minutes to hours; it may be stopped at any time, and the same call goes on.
    run = qcompiler.tune(MODEL, log="tuned", trials=6, threads=1, **options)  # type: ignore[arg-type]
    print(f"{run.measured} variants measured, {run.stopped}; the tuned part takes {run.best_seconds / run.default_seconds:.3f} of its time before")

    plain = qcompiler.compile(MODEL, **options)  # type: ignore[arg-type]
    tuned = qcompiler.compile(MODEL, tuning_log="tuned", **options)  # type: ignore[arg-type]
    sessions = [qcompiler.load(artifact.save(name)) for artifact, name in ((plain, "plain.so"), (tuned, "tuned.so"))]
    equal = all(np.array_equal(*(s.run(sample)["logits"] for s in sessions)) for sample in evaluation[:20])
    print(f"the same results: {equal}")


if __name__ == "__main__":
    main()
