"""The operators that `kernels.py` times: layers of public networks, and one or two shapes of every other kernel family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.numerics import constants as parameters
from qcompiler.numerics import recurrence
from qcompiler.numerics.spec import QParams
from qcompiler.schedules.table import Layout, OpCall

# (image size, input channels, output channels, kernel, stride, residual, how often the network has it)
CONVOLUTIONS: dict[str, list[tuple[int, int, int, int, int, bool, int]]] = {
    "resnet50": [
        (224, 3, 64, 7, 2, False, 1), (56, 64, 64, 1, 1, False, 1), (56, 64, 64, 3, 1, False, 3), (56, 64, 256, 1, 1, False, 1),
        (56, 64, 256, 1, 1, True, 3), (56, 256, 64, 1, 1, False, 2), (56, 256, 128, 1, 1, False, 1), (56, 128, 128, 3, 2, False, 1),
        (28, 128, 512, 1, 1, True, 4), (56, 256, 512, 1, 2, False, 1), (28, 512, 128, 1, 1, False, 3), (28, 128, 128, 3, 1, False, 3),
        (28, 512, 256, 1, 1, False, 1), (28, 256, 256, 3, 2, False, 1), (14, 256, 1024, 1, 1, True, 6), (28, 512, 1024, 1, 2, False, 1),
        (14, 1024, 256, 1, 1, False, 5), (14, 256, 256, 3, 1, False, 5), (14, 1024, 512, 1, 1, False, 1), (14, 512, 512, 3, 2, False, 1),
        (7, 512, 2048, 1, 1, True, 3), (14, 1024, 2048, 1, 2, False, 1), (7, 2048, 512, 1, 1, False, 2), (7, 512, 512, 3, 1, False, 2),
        (1, 2048, 1000, 1, 1, False, 1),
    ],
    "mobilenet_v2": [
        (224, 3, 32, 3, 2, False, 1), (112, 32, 16, 1, 1, False, 1), (112, 16, 96, 1, 1, False, 1), (56, 96, 24, 1, 1, False, 1),
        (56, 24, 144, 1, 1, False, 2), (56, 144, 24, 1, 1, True, 1), (28, 144, 32, 1, 1, False, 1), (28, 32, 192, 1, 1, False, 3),
        (28, 192, 32, 1, 1, True, 2), (14, 192, 64, 1, 1, False, 1), (14, 64, 384, 1, 1, False, 4), (14, 384, 64, 1, 1, True, 3),
        (14, 384, 96, 1, 1, False, 1), (14, 96, 576, 1, 1, False, 3), (14, 576, 96, 1, 1, True, 2), (7, 576, 160, 1, 1, False, 1),
        (7, 160, 960, 1, 1, False, 3), (7, 960, 160, 1, 1, True, 2), (7, 960, 320, 1, 1, False, 1), (7, 320, 1280, 1, 1, False, 1),
        (1, 1280, 1000, 1, 1, False, 1),
    ],
}  # fmt: skip
DEPTHWISE = [  # (image size, channels, kernel, stride, how often), MobileNetV2 and EfficientNet-Lite0
    (112, 32, 3, 1, 2), (112, 96, 3, 2, 2), (56, 144, 3, 1, 2), (56, 144, 3, 2, 1), (28, 192, 3, 1, 2), (28, 192, 3, 2, 1), (14, 384, 3, 1, 4),
    (14, 576, 3, 1, 2), (14, 576, 3, 2, 1), (7, 960, 3, 1, 3), (56, 144, 5, 2, 1), (28, 240, 5, 1, 1), (14, 480, 5, 1, 1), (14, 672, 5, 1, 2),
    (14, 672, 5, 2, 1), (7, 1152, 5, 1, 3),
]  # fmt: skip
UNTIMED = {  # operator: why it has no case
    "qc.reshape": "its output is its input's bytes",
    "qc.bitcast": "its output is its input's bytes",
    "qc.enter": "as qc.copy, or qc.transpose",
    "qc.leave": "as qc.copy, or qc.transpose",
    "qc.pixels": "its input is pixels; `qcompiler bench --layers` times it beside qc.quantize in a library of each kind",
    "qc.f32.dense": "as qc.f32.conv2d of one pixel, which networks end with",
    "qc.f32.conv2d_transpose": "as qc.f32.conv2d, phase by phase",
    "qc.resample": "its input is pixels, as that of qc.pixels",
    "qc.f32.recurrence": "sums of exponentials have no exact result; it is what qc.recurrence is compared with",
    "qc.f32.dense_weight_only": "weight_only.py times it",
}


@dataclass(frozen=True)
class Case:
    """One operator on random data, in dense layouts that the kernel's row may still change. `times`: how often the network has it."""

    label: str
    op: OpCall
    inputs: list[np.ndarray]  # canonical
    times: int = 1


def convolution(size: int, inputs: int, outputs: int, kernel: int, stride: int, residual: bool, times: int, storage: str, groups: int = 1) -> Case:
    """A convolution layer and its rectifier, in float32 when `storage` is."""
    rng, pad, is_float = np.random.default_rng(0), kernel // 2, storage == "float32"
    out = (size + 2 * pad - kernel) // stride + 1
    attrs: dict[str, Any] = {"strides": [stride] * 2, "padding": [pad] * 4, "dilation": [1, 1], "groups": groups}
    shape, image, output = (outputs, kernel, kernel, inputs // groups), (1, size, size, inputs), Layout((1, out, out, outputs), storage)
    bias = rng.integers(-5000, 5000, outputs).astype(np.float32 if is_float else np.int32)
    if is_float:
        attrs |= {"low": 0.0, "high": 3.4028234663852886e38}
        x, constants = [rng.standard_normal(image).astype(np.float32)], [rng.standard_normal(shape).astype(np.float32), bias]
    else:
        attrs |= {"x_zero_point": -128, "zero_point": -128, "low": -128, "high": 127, "out_dtype": "int8"}
        weight = np.clip(np.rint(rng.normal(0, 32, shape)), -127, 127).astype(np.int8)  # about as wide as trained layers
        x, constants = [integers(rng, image)], [weight, bias, np.full(outputs, 0.5 / (74 * np.sqrt(weight[0].size)), np.float32)]
        if residual:
            attrs |= {"residual_zero_point": 0, "residual_multiplier": 1000, "residual_shift": 11}
            x.append(integers(rng, output.shape))
    tensors: list[Any] = [Layout(image, storage), *constants, *([output] if residual and not is_float else [])]
    kind = "depthwise" if groups > 1 else f"{inputs}->{outputs}"
    label = f"{size}x{size} {f'{inputs} ' * (groups > 1)}{kind} {kernel}x{kernel}/{stride}{' + residual' * residual}"
    return Case(label, OpCall(f"qc.{'f32.' * is_float}conv2d", tensors, attrs, output), x, times)


def convolutions(network: str, storage: str) -> list[Case]:
    return [convolution(*layer, storage) for layer in CONVOLUTIONS[network]]


def depthwise(storage: str) -> list[Case]:
    return [convolution(size, c, c, kernel, stride, False, times, storage, groups=c) for size, c, kernel, stride, times in DEPTHWISE]


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(-128, 128, shape).astype(np.int8)


def others(storage: str) -> list[Case]:
    """Every family that is no convolution: tensors of the sizes that networks have."""
    rng = np.random.default_rng(0)
    bounds = {"zero_point": -20, "low": -128, "high": 127}
    add = {"a_zero_point": -128, "a_multiplier": 51234, "b_zero_point": 12, "b_multiplier": 40321, "shift": 17, **bounds}
    mul = {"a_zero_point": -128, "b_zero_point": 5, "multiplier": 0.0037, **bounds}
    pool = {"kernel": [3, 3], "strides": [2, 2], "padding": [1, 1, 1, 1]}
    mean = {"x_zero_point": -128, "ratio": 1.9, **bounds}
    half = [2 * i for i in range(28)]
    indices = {"iy0": sorted(half + half), "iy1": sorted(half + half), "wy": [256, 768] * 28}
    resize = {"size": [56, 56], "method": "linear", **indices, **{k.replace("y", "x"): v for k, v in indices.items()}}
    resize |= {k: [min(i // 2, 27) for i in range(56)] for k in ("iy0", "ix0")} | {k: [min(i // 2 + 1, 27) for i in range(56)] for k in ("iy1", "ix1")}
    dense = {"x_zero_point": -3, "out_dtype": "int8", **bounds}
    weight = np.clip(np.rint(rng.normal(0, 32, (1000, 1280))), -127, 127).astype(np.int8)
    bias, multiplier = np.zeros(1000, np.int32), np.full(1000, 1e-4, np.float32)
    transposed = [rng.integers(-127, 128, (32, 2, 2, 64)).astype(np.int8), np.zeros(32, np.int32), np.full(32, 1e-4, np.float32)]
    geometry = {"strides": [2, 2], "padding": [0] * 4, "output_padding": [0, 0], "dilation": [1, 1], "groups": 1}
    image, small = (1, 56, 56, 96), (1, 28, 28, 64)
    mirrored = [1, *range(56), 54]
    rows: list[tuple[str, list[tuple[int, ...]], list[np.ndarray], dict[str, Any], tuple[int, ...]]] = [
        ("qc.dense", [(1, 1280)], [weight, bias, multiplier], dense, (1, 1000)),
        ("qc.conv2d_transpose", [small], transposed, geometry | {"x_zero_point": -3, **bounds}, (1, 56, 56, 32)),
        ("qc.matmul", [(1, 12, 128, 64), (1, 12, 64, 128)], [], mul | {"out_dtype": "int8"}, (1, 12, 128, 128)),
        ("qc.matmul", [(1, 12, 128, 128), (1, 12, 128, 64)], [], mul | {"out_dtype": "int8"}, (1, 12, 128, 64)),
        ("qc.add", [image, image], [], add, image),
        ("qc.mul", [image, (1, 1, 1, 96)], [], mul, image),
        ("qc.lut", [image], [integers(rng, (256,))], {}, image),
        ("qc.max_pool2d", [(1, 112, 112, 64)], [], pool | {"dilation": [1, 1]}, (1, 56, 56, 64)),
        ("qc.avg_pool2d", [(1, 56, 56, 128)], [], pool | {"count_include_pad": True, **mean}, (1, 28, 28, 128)),
        ("qc.mean", [(1, 7, 7, 1280)], [], {"axes": [1, 2], "keepdims": False, **mean}, (1, 1280)),
        ("qc.concat", [(1, 28, 28, 128), (1, 28, 28, 32)], [], {"axis": 3}, (1, 28, 28, 160)),
        ("qc.resize2d", [small], [], resize, (1, 56, 56, 64)),
        ("qc.transpose", [(1, 128, 12, 64)], [], {"axes": [0, 2, 1, 3]}, (1, 12, 128, 64)),
        ("qc.slice", [image], [], {"begin": [0, 0, 0, 48], "end": list(image), "strides": [1] * 4}, (1, 56, 56, 48)),
        ("qc.pad", [image], [], {"pads": [[0, 0], [1, 1], [1, 1], [0, 0]], "value": -128}, (1, 58, 58, 96)),
        ("qc.select", [image], [], {"indices": [[], mirrored, mirrored, []]}, (1, 58, 58, 96)),
    ]
    cases = []
    for name, shapes, constants, attrs, output in rows:
        tensors = [Layout(s, storage) for s in shapes]
        label = " ".join("x".join(map(str, s)) for s in shapes)
        cases.append(Case(label, OpCall(name, [*tensors, *constants], attrs, Layout(output, storage)), [integers(rng, s) for s in shapes]))
    scale: dict[str, Any] = {"scale": 0.02, "zero_point": 3}
    x, image = rng.standard_normal((1, 3, 224, 224)).astype(np.float32), (1, 224, 224, 3)
    cases.append(Case("1x3x224x224", OpCall("qc.quantize", [Layout(x.shape, "float32")], {**scale, "axes": [0, 2, 3, 1]}, Layout(image, storage)), [x]))
    logits = integers(rng, (1, 1000))
    cases.append(Case("1x1000", OpCall("qc.dequantize", [Layout(logits.shape, storage)], scale, Layout(logits.shape, "float32")), [logits]))
    return [*cases, *of_transformers(storage), recurrent(storage), *ordered()]


def operator(name: str, operands: list[np.ndarray], constants: tuple[int, ...], attrs: dict[str, Any], output: Layout, storage: str) -> Case:
    """A case of tensors of any type; `constants`: which operands are fixed."""
    inputs = [x for i, x in enumerate(operands) if i not in constants]
    tensors = [x if i in constants else Layout(x.shape, storage if x.dtype == np.int8 else str(x.dtype)) for i, x in enumerate(operands)]
    label = " ".join("x".join(map(str, x.shape)) for x in inputs)
    return Case(label, OpCall(name, tensors, attrs, output), inputs)


def of_transformers(storage: str) -> list[Case]:
    """What transformers have besides products: sizes of BERT base with 128 tokens, its residual stream in int16; a rectifier with slopes of a face network."""
    rng, stream, y = np.random.default_rng(1), (1, 128, 768), QParams(1 / 64, -3)
    x, small, scores = rng.integers(-32768, 32768, stream).astype(np.int16), integers(rng, stream), rng.integers(-9000, 9000, (12, 128, 128)).astype(np.int16)
    norms = {}
    for name, make in (("qc.layer_norm", parameters.layer_norm_parameters), ("qc.rms_norm", parameters.rms_norm_parameters)):
        gain, shift, epsilon = make(rng.standard_normal(768), rng.standard_normal(768), 1e-5, 1e-3, 1 / 64)
        norms[name] = [gain, shift], {"epsilon": epsilon, "zero_point": -3, "out_dtype": "int8"} | ({"x_zero_point": 0} if name == "qc.rms_norm" else {})
    logits, outputs = parameters.attention_multipliers(1 / 8, 0.02, 0.02, 0.02, 0.01, 12)
    attention = {"heads": 12, "kv_heads": 12, "size": 64, "value_size": 64, "columns": [0, 0, 0], "zero_points": [3, -4, 5], "extra": [], "out_dtype": "int8"}
    table, lut16 = parameters.lut16(np.tanh, 2.0**-12, y)
    words, ids = integers(rng, (128, 768)), rng.permutation(128)[None]  # every row once, so that what is read is the table
    narrow = {"x_zero_point": 0, "zero_point": -3, "low": -128, "high": 127, "out_dtype": "int8"}
    slopes, image = rng.uniform(-0.3, 0.9, 64).astype(np.float32), integers(rng, (1, 56, 56, 64))
    prelu = {"multiplier": 0.7, "x_zero_point": -3, "zero_point": 2, "low": -128, "high": 127}
    rows: list[tuple[str, list[np.ndarray], tuple[int, ...], dict[str, Any], tuple[int, ...]]] = [
        *((name, [x, *fixed], (1, 2), attrs, stream) for name, (fixed, attrs) in norms.items()),
        ("qc.softmax", [scores], (), parameters.softmax_parameters(1e-3, QParams(1 / 256, -128)), scores.shape),
        ("qc.attention", [small, small[:, ::-1].copy(), small[..., ::-1].copy(), logits, outputs], (3, 4), attention, stream),
        ("qc.lut16", [x, table], (1,), lut16, stream),
        ("qc.requantize", [x, np.full(768, 0.003, np.float32)], (1,), narrow, stream),
        ("qc.gather", [words, ids], (0,), {}, stream),
        ("qc.prelu", [image, slopes], (1,), prelu, image.shape),
    ]
    return [operator(name, operands, fixed, attrs, Layout(shape, storage), storage) for name, operands, fixed, attrs, shape in rows]


def recurrent(storage: str) -> Case:
    """An LSTM of 256 hidden elements that takes 40 steps, as a text recognizer's."""
    rng, (steps, hidden) = np.random.default_rng(3), (40, 256)
    weight, units = rng.standard_normal((4 * hidden, hidden)) / 16, rng.standard_normal(4 * hidden)
    fixed = recurrence.recurrence_parameters(weight, units, 1e-3, None, QParams(1 / 128, 0))
    tables = np.stack([recurrence.table(f) for f in ("Sigmoid", "Tanh", "Tanh")])
    p, none = rng.integers(-6000, 6000, (steps, 1, 4 * hidden)).astype(np.int16), np.zeros((1, hidden), np.float32)
    attrs = {"cell": "lstm", "reverse": False, "linear_before_reset": False, "sequence": True, "finals": 0, **fixed[3]}
    operands = [p, *fixed[:3], tables, none, none, np.full(1, steps, np.int32)]
    return operator("qc.recurrence", operands, tuple(range(1, 8)), attrs, Layout((steps, 1, hidden), storage), storage)


def ordered() -> list[Case]:
    """Operators whose elements depend on one another in order, in float32: positions of a sequence, the best of 1000 classes, rows of a cache."""
    rng = np.random.default_rng(2)
    values, classes, rows = (rng.standard_normal(shape).astype(np.float32) for shape in ((128, 768), (8, 1000), (1024, 64)))
    running = {"axis": 0, "reduction": "add", "exclusive": False, "reverse": False}
    return [
        operator("qc.cumulative", [values], (), running, Layout(values.shape, "float32"), "int8"),
        operator("qc.top_k", [classes], (), {"axis": 1, "k": 5, "largest": True}, Layout((8, 5), "int64"), "int8"),
        operator("qc.scatter", [rows, rng.permutation(1024)[:128], rows[:128] + 1], (), {"reduction": "none"}, Layout(rows.shape, "float32"), "int8"),
    ]
