"""Random small networks on emulated GPUs: every integer value is the reference's.

    python tests/random_nets.py [--count 100] [--first 0] [--target cuda-sm75 cuda-sm90] [--compiled]

Number n is always the same network: some layers of odd sizes, drawn from what importers can write; batches of one to three. Ranges are those of one sample;
--compiled: the pipeline's plan instead, 16-bit streams and recurrent layers included (seconds each), whose outputs are compared with the library for this CPU
too. What is refused is counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cuda_emulated import Emulated, EmulatedProgram
from onnx_nets import OnnxNet
from small_nets import TinyPlan

from qcompiler.backend.build import build
from qcompiler.backend.lowering import Program, lower
from qcompiler.base.errors import QCompilerError
from qcompiler.base.targets import find_target
from qcompiler.importers.model import load
from qcompiler.passes import sequence
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.pipeline.compile import quantize
from qcompiler.runtime.session import Session
from qcompiler.schedules.table import Kernel
from qcompiler.verification.interpreter import run

TOGETHER = 20  # networks that are compiled together
TARGETS = ("cuda-sm75", "cuda-sm75-dp4a", "cuda-sm90")
Values = dict[str, np.ndarray]


class RandomNet(OnnxNet):
    """A tensor and its shape grow layer by layer; `spatial`: axes behind batch and channels."""

    def __init__(self, seed: int) -> None:
        super().__init__(opset=19, seed=seed)
        self.batch = int(self.rng.choice([1, 1, 2, 3]))

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    # -- images, volumes and signals: [N, C, ...] ------------------------------------------------------------------------------------------------

    def convolution(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        channels, rank = shape[1], len(shape) - 2
        groups = self.pick(1, 1, 1, channels, *(g for g in (2, 3, 5) if channels % g == 0))
        outputs = groups * int(self.rng.integers(1, 6)) if groups > 1 else int(self.rng.integers(1, 40))
        kernel = [int(self.pick(*(k for k in (1, 2, 3, 5) if k <= extent))) for extent in shape[2:]]
        stride, dilation = [self.pick(1, 1, 2)] * rank, [self.pick(1, 1, 1, 2)] * rank
        pads = [int(self.rng.integers(0, k)) for k in kernel]
        dilation = [d if (k - 1) * d < e + 2 * p else 1 for k, d, e, p in zip(kernel, dilation, shape[2:], pads, strict=True)]
        y = self.op(
            "Conv",
            x,
            self.weight(outputs, channels // groups, *kernel),
            self.const(0.3 * self.rng.standard_normal(outputs)),
            strides=stride,
            dilations=dilation,
            group=groups,
            pads=[*pads, *pads],
        )
        sizes = [(e + 2 * p - (k - 1) * d - 1) // s + 1 for e, p, k, d, s in zip(shape[2:], pads, kernel, dilation, stride, strict=True)]
        return str(y), [shape[0], outputs, *sizes]

    def activation(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        kind = self.pick("Relu", "Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "Clip", "PRelu")
        if kind == "Clip":
            return str(self.op("Clip", x, self.const(-0.5), self.const(1.5))), shape
        if kind == "PRelu":
            return str(self.op("PRelu", x, self.const(self.rng.uniform(0, 0.5, (shape[1], *[1] * (len(shape) - 2)))))), shape
        return str(self.op(kind, x)), shape

    def pool(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        kernel = [int(self.pick(*(k for k in (1, 2, 3) if k <= e))) for e in shape[2:]]
        y = self.op(self.pick("MaxPool", "AveragePool"), x, kernel_shape=kernel, strides=[1] * len(kernel))
        return str(y), [*shape[:2], *(e - k + 1 for e, k in zip(shape[2:], kernel, strict=True))]

    def residual(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        w = self.weight(shape[1], shape[1], *[1] * (len(shape) - 2))
        return str(self.op(self.pick("Add", "Add", "Mul", "Sub"), self.op("Conv", x, w), x)), shape

    def padded(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        """Mirrored and repeated edges are selections."""
        mode, rank = self.pick("reflect", "edge", "constant"), len(shape)
        begin, end = ([0, 0, *(int(self.rng.integers(0, min(3, e))) for e in shape[2:])] for _ in (0, 1))
        y = self.op("Pad", x, self.ints(*begin, *end), mode=mode)
        return str(y), [shape[i] + begin[i] + end[i] for i in range(rank)]

    def selected(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        axis = int(self.rng.integers(1, len(shape)))
        indices = self.rng.integers(0, shape[axis], int(self.rng.integers(1, shape[axis] + 3)))
        return str(self.op("Gather", x, self.ints(*indices), axis=axis)), [*shape[:axis], indices.size, *shape[axis + 1 :]]

    def joined(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        y, other = self.convolution(x, shape)
        if other[2:] != shape[2:]:
            return y, other
        return str(self.op("Concat", x, y, axis=1)), [shape[0], shape[1] + other[1], *shape[2:]]

    def sliced(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        axis = int(self.rng.integers(1, len(shape)))
        begin = int(self.rng.integers(0, shape[axis]))
        return str(self.op("Slice", x, self.ints(begin), self.ints(shape[axis]), self.ints(axis))), [*shape[:axis], shape[axis] - begin, *shape[axis + 1 :]]

    def resized(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        if len(shape) != 4:
            return x, shape
        sizes = [shape[0], shape[1], *(int(self.rng.integers(1, 2 * e + 1)) for e in shape[2:])]
        mode, how = self.pick(("nearest", "asymmetric"), ("linear", "half_pixel"), ("linear", "align_corners"))
        more = {"nearest_mode": "floor"} if mode == "nearest" else {}
        return str(self.op("Resize", x, "", "", self.ints(*sizes), mode=mode, coordinate_transformation_mode=how, **more)), sizes

    def widened(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        if len(shape) != 4:
            return x, shape
        kernel, outputs = self.pick(2, 3), int(self.rng.integers(1, 9))
        y = self.op("ConvTranspose", x, self.weight(shape[1], outputs, kernel, kernel), strides=[2, 2])
        return str(y), [shape[0], outputs, *(2 * (e - 1) + kernel for e in shape[2:])]

    # -- rows: [N, T, C] ---------------------------------------------------------------------------------------------------------------------------

    def dense(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        outputs = int(self.rng.integers(1, 50))
        y = self.op("MatMul", x, self.const(self.rng.standard_normal((shape[-1], outputs)) * shape[-1] ** -0.5))
        return str(self.op("Add", y, self.const(0.2 * self.rng.standard_normal(outputs)))), [*shape[:-1], outputs]

    def norm(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        gamma = self.const(0.5 + self.rng.random(shape[-1]))
        return str(self.op("LayerNormalization", x, gamma, self.const(0.2 * self.rng.standard_normal(shape[-1])), axis=-1)), shape

    def feed_forward(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        h, wide = self.dense(*self.norm(x, shape))
        bent = self.op("Mul", h, self.op("Sigmoid", h))
        y = self.op("MatMul", bent, self.const(self.rng.standard_normal((wide[-1], shape[-1])) * wide[-1] ** -0.5))
        return str(self.op("Add", y, x)), shape

    def attention(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        heads, size = self.pick(1, 2, 3), self.pick(4, 8, 5)
        batch, tokens, width = shape

        def head(axes: list[int]) -> str:
            y = self.op("MatMul", x, self.const(self.rng.standard_normal((width, heads * size)) * width**-0.5))
            return str(self.op("Transpose", self.op("Reshape", y, self.ints(batch, tokens, heads, size)), perm=axes))

        logits = self.op("Mul", self.op("MatMul", head([0, 2, 1, 3]), head([0, 2, 3, 1])), self.const(size**-0.5))
        if self.rng.random() < 0.5:
            logits = self.op("Add", logits, self.const(np.where(np.tri(tokens) > 0, 0.0, -1e9)))
        y = self.op("Transpose", self.op("MatMul", self.op("Softmax", logits, axis=-1), head([0, 2, 1, 3])), perm=[0, 2, 1, 3])
        y, wide = self.dense(str(self.op("Reshape", y, self.ints(batch, tokens, heads * size))), [batch, tokens, heads * size])
        return y, wide

    def recurrent(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        batch, tokens, width = shape
        kind, hidden = self.pick("LSTM", "GRU", "RNN"), int(self.rng.integers(1, 20))
        gates, directions = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], self.pick(1, 2)
        w = self.const(self.rng.standard_normal((directions, gates * hidden, width)) * width**-0.5)
        r = self.const(self.rng.standard_normal((directions, gates * hidden, hidden)) * hidden**-0.5)
        b = self.const(0.1 * self.rng.standard_normal((directions, 2 * gates * hidden)))
        direction = "bidirectional" if directions == 2 else self.pick("forward", "reverse")
        more = {"linear_before_reset": 1} if kind == "GRU" else {}
        steps = self.op("Transpose", x, perm=[1, 0, 2])
        y = self.op(kind, steps, w, r, b, outputs=2, hidden_size=hidden, direction=direction, **more)[0]
        y = self.op("Transpose", y, perm=[2, 0, 1, 3])
        return str(self.op("Reshape", y, self.ints(batch, tokens, directions * hidden))), [batch, tokens, directions * hidden]

    def softmax(self, x: str, shape: list[int]) -> tuple[str, list[int]]:
        return str(self.op("Softmax", x, axis=-1)), shape


IMAGES = ("convolution", "convolution", "convolution", "activation", "pool", "residual", "padded", "selected", "joined", "sliced", "resized", "widened")
ROWS = ("dense", "dense", "activation", "norm", "feed_forward", "attention", "recurrent", "selected", "sliced", "softmax")


def network(seed: int, folder: Path, recurrent: bool) -> tuple[Path, list[Values]]:
    """A network in `folder`, and calibration samples. recurrent: whether it may have recurrent layers, which need the pipeline."""
    net = RandomNet(seed)
    images = net.rng.random() < 0.6
    if images:
        rank = net.pick(1, 2, 2, 2, 2, 3)
        shape = [net.batch, int(net.rng.integers(1, 20)), *(int(net.rng.integers(3, 5 if rank == 3 else 9)) for _ in range(rank))]
    else:
        shape = [net.batch, int(net.rng.integers(1, 9)), int(net.rng.integers(1, 30))]
    first, x = list(shape), net.input("x", *shape)
    kinds = IMAGES if images else ROWS if recurrent else [kind for kind in ROWS if kind != "recurrent"]
    for _ in range(int(net.rng.integers(2, 7))):
        layer: Callable[[str, list[int]], tuple[str, list[int]]] = getattr(net, net.pick(*kinds))
        if np.prod(shape) < 6000:
            x, shape = layer(x, shape)
    if images and net.rng.random() < 0.5:
        x = net.op("Flatten", net.op("GlobalAveragePool", x))
        x, shape = net.dense(x, [shape[0], shape[1]])
    x = net.op("Identity", x)
    return net.save(folder / f"net{seed}.onnx", [x]), [{"x": np.random.default_rng(i).standard_normal(first).astype(np.float32)} for i in range(3)]


@dataclass
class Subject:
    """A network, its programs, and what they must yield. exact: nothing in it is float."""

    seed: int
    programs: dict[str, Program]
    inputs: Values
    wanted: Values
    outputs: Values
    exact: bool


def prepared(seed: int, targets: Sequence[str], compiled: bool, folder: Path) -> Subject:
    """Raises QCompilerError where the network is refused."""
    model, samples = network(seed, folder, compiled)
    inputs = samples[0]
    if compiled:
        integer = quantize(model, "native", samples, preset="fast").integer
        outputs = Session(build(integer, find_target("native"), "code").link().save(folder / "cpu.so")).run(inputs)
    else:
        module = load(model).module
        integer = sequence.run(sequence.INTEGER, insert_qdq(module, TinyPlan(module, inputs)))
        outputs = run(integer, inputs)
    programs = {target: lower(integer, find_target(target)) for target in targets}
    exact = all(s.name.startswith("qc.") and not s.name.startswith("qc.f32.") for s in programs[targets[0]].steps)
    return Subject(seed, programs, inputs, run(integer, inputs, keep="all"), outputs, exact)


def check(subjects: Sequence[Subject], target: str, folder: Path, failed: Callable[[Subject, str], None]) -> int:
    """How many integer values of all subjects were compared. Their kernels are compiled together: the compiler's start takes longest."""
    kernels, symbols, compared = dict[str, Kernel](), dict[str, str](), 0
    for step in (s for subject in subjects for s in subject.programs[target].steps):
        kernels[symbols.setdefault(step.kernel.key, f"k{len(symbols)}")] = step.kernel
    emulated = Emulated(kernels, find_target(target), folder)
    for subject in subjects:
        program, got = subject.programs[target], Values()
        try:
            for step, value in EmulatedProgram(program, emulated, symbols).run(subject.inputs):
                got[step.writes] = value
                if subject.exact and step.writes in subject.wanted and value.dtype in (np.int8, np.int16) and not step.auxiliary:
                    np.testing.assert_array_equal(value, subject.wanted[step.writes], f"{step.writes} by {step.kernel.row}")
                    compared += 1
            for port in program.outputs:
                want = subject.outputs[port.name]
                if subject.exact:
                    np.testing.assert_array_equal(got[port.value], want, f"output {port.name}")
                else:  # float operators may move a rounding, and that the steps of a layer behind it
                    scale = float(np.abs(want).max(initial=0))
                    np.testing.assert_allclose(got[port.value], want, rtol=1e-2, atol=0.1 * scale + 1e-6, err_msg=f"output {port.name}")
        except Exception:
            failed(subject, traceback.format_exc(limit=-4))
    return compared


def attack(seeds: Sequence[int], targets: Sequence[str], compiled: bool) -> Counter[str]:
    """What became of the networks; what is wrong is printed."""
    found: Counter[str] = Counter()
    subjects, wrong = list[Subject](), set[int]()
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            place = Path(name) / str(seed)
            place.mkdir()
            try:
                subjects.append(prepared(seed, targets, compiled, place))
            except QCompilerError as error:
                found["refused"] += 1
                print(f"{seed}: refused: {error}", flush=True)
            except Exception:
                found["failed"] += 1
                print(f"{seed}: {traceback.format_exc(limit=-4)}", flush=True)
        for target in targets:
            place = Path(name) / target
            place.mkdir()

            def failed(subject: Subject, what: str, target: str = target) -> None:
                wrong.add(subject.seed)
                print(f"{subject.seed}, {target}: {what}", flush=True)

            found["values"] += check(subjects, target, place, failed) if subjects else 0
    return found + Counter(networks=len(subjects), exact=sum(s.exact for s in subjects), wrong=len(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--target", nargs="+", default=list(TARGETS))
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    found: Counter[str] = Counter()
    for first in range(options.first, options.first + options.count, TOGETHER):
        found += attack(range(first, min(first + TOGETHER, options.first + options.count)), options.target, options.compiled)
        print(f"{first}: {dict(found)}", flush=True)
    return int(found["wrong"] + found["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
