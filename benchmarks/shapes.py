"""One library for several shapes against libraries for each alone, made with the same plan: equal outputs, size, and latency side by side.

    python benchmarks/shapes.py MODEL.onnx --input-shape ids=1,{16,32,64} [--calibration DATA] [--threads 1] [--seconds 3]

Without data a normal distribution (floats), or random integers below --vocabulary with masks of ones, calibrates. Prints a row per shape: bytes of the
library for it alone, whether all outputs are equal bit for bit, and the ratio of the minimum latencies.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.backend.build import build
from qcompiler.base.shape_table import parse_shape
from qcompiler.pipeline.compile import compile_stages
from qcompiler.runtime.bench import interleave
from qcompiler.runtime.session import Session


def random_sample(inputs: Any, vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sample = {}
    for i in inputs:
        if np.dtype(i.dtype).kind == "f":
            sample[i.name] = rng.standard_normal(i.shape).astype(i.dtype)
        else:
            sample[i.name] = (np.ones(i.shape) if "mask" in i.name else np.zeros(i.shape) if "type" in i.name else rng.integers(1, vocabulary, i.shape)).astype(
                i.dtype
            )
    return sample


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--input-shape", action="append", default=[], type=parse_shape)
    p.add_argument("--calibration")
    p.add_argument("--preset", default="fast")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seconds", type=float, default=3.0)
    p.add_argument("--vocabulary", type=int, default=1000)
    p.add_argument("--target", default="native")
    given = p.parse_args()
    shapes = dict(given.input_shape)
    calibration: Any = given.calibration
    if calibration is None:
        from qcompiler.base.shape_table import shape_rows
        from qcompiler.pipeline.shapes import load_all

        first = load_all(given.model, shape_rows(shapes)[:1])[0]
        calibration = [random_sample(first.inputs, given.vocabulary, seed) for seed in range(8)]
    made = compile_stages(given.model, given.target, calibration, input_shapes=shapes, preset=given.preset)
    network = made.quantized
    with tempfile.TemporaryDirectory() as folder:
        path = made.artifact.save(Path(folder) / "all.so")
        several = Session(path, given.threads)
        print(f"{made.artifact.size} bytes for {len(several.specializations)} shapes")
        for at, module in zip(several.specializations, [network.integer, *network.others], strict=True):
            alone = build(module, made.program.target, "one shape")
            for found in made.corrected.corrections.values():
                for operand, arrays in found.operands().items() if found.kept else ():
                    for value_id, array in arrays.items():
                        alone.replace_operand(value_id, operand, array)
            kept = {k: v for k, v in made.artifact.manifest.items() if k in ("values", "float_ops", "model", "digests", "channels", "quantization")}
            single = Session(alone.link(**kept).save(Path(folder) / f"{at.shape}.so"), given.threads)
            equal = True
            for seed in range(4):
                sample = random_sample(at.inputs, given.vocabulary, 100 + seed)
                one, other = several.run(sample), single.run(sample)
                equal &= all(one[name].tobytes() == other[name].tobytes() for name in other)
            a, b = interleave({"several": lambda: several.run(sample), "alone": lambda: single.run(sample)}, seconds=given.seconds)  # noqa: B023
            size = single.path.stat().st_size
            print(
                f"{[list(i.shape) for i in at.inputs]}: alone {size} bytes, ratio of all {made.artifact.size / size:.3f}; equal {equal}; "
                f"{a.minimum * 1e3:.3f} ms, alone {b.minimum * 1e3:.3f} ms, ratio {a.minimum / b.minimum:.3f}; "
                f"constants added {at.manifest.get('constants_added', 0)}, digest {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
