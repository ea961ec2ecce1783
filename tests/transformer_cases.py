"""Operators of transformers, and int16 forms of others, on ragged shapes and extremes: what kernels of every target are tested on."""

from __future__ import annotations

from typing import Any

import numpy as np
from kernel_cases import HALO, Case, data

from qcompiler.numerics import constants, spec
from qcompiler.numerics.spec import QParams


def data16(seed: int, *shape: int) -> np.ndarray:
    """Random int16 of all magnitudes with both extremes among them."""
    rng = np.random.default_rng(seed)
    values = (rng.integers(-32768, 32768, shape) >> rng.integers(0, 12, shape)).astype(np.int16)
    values.reshape(-1)[:: max(1, values.size // 7)] = -32768
    values.reshape(-1)[1 :: max(2, values.size // 5)] = 32767
    return values


def of(dtype: str, seed: int, *shape: int) -> np.ndarray:
    return np.asarray(data(seed, *shape) if dtype == "int8" else data16(seed, *shape))


def zero(dtype: str, z: int) -> int:
    return z if dtype == "int8" else 0


def sums() -> dict[str, Case]:
    cases = {}
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "same": ((2, 5, 67), (2, 5, 67)),
        "row": ((3, 7, 64), (64,)),
        "scalar": ((300,), ()),
        "columns": ((2, 3, 4, 24), (2, 3, 4, 1)),
    }
    for (name, (a, b)), types in zip(
        shapes.items(), [("int16", "int16", "int16"), ("int16", "int8", "int16"), ("int16", "int16", "int8"), ("int8", "int8", "int16")], strict=True
    ):
        first, second, shift = spec.add_parameters(0.9 / spec.magnitude(types[0]), 0.8 / spec.magnitude(types[1]), 1.2 / spec.magnitude(types[2]), *types[:2])
        z = {"a_zero_point": zero(types[0], -128), "b_zero_point": zero(types[1], 127), "zero_point": zero(types[2], 3), "out_dtype": types[2]}
        operands = [of(types[0], 1, *a), of(types[1], 2, *b)]
        attrs = {"a_multiplier": first, "b_multiplier": -second, "shift": shift} | z
        cases[f"add-{name}"] = Case("qc.add", operands, attrs)
        cases[f"add-{name}-constant"] = Case("qc.add", operands, attrs | {"low": -90, "high": 101}, constants=(1,))
        product = {"multiplier": float(np.float32(150 / spec.magnitude(types[0])))} | z
        cases[f"mul-{name}"] = Case("qc.mul", operands, product)
    padded = {"layouts": {0: {"halo": HALO, "pitch": 28}}, "out": {"pitch": 30}}
    cases["add-padded"] = Case("qc.add", [of("int16", 1, 2, 3, 4, 24), of("int16", 2, 1, 3, 4, 24)], cases["add-same"].attrs, **padded)
    return cases


def conversions() -> dict[str, Case]:
    x = np.random.default_rng(1).standard_normal((2, 3, 5, 9)).astype(np.float32)
    x.reshape(-1)[:9] = [np.nan, np.inf, -np.inf, 0.5, 1.5, -0.0, 3e38, -1e-40, 32767.5]
    cases = {}
    for name, axes in (("", None), ("-axes", [0, 2, 3, 1])):
        extra = {"axes": axes} if axes else {}
        cases[f"quantize{name}"] = Case("qc.quantize", [x], {"scale": 2.0**-13, "zero_point": 0, "out_dtype": "int16"} | extra)
        cases[f"dequantize{name}"] = Case("qc.dequantize", [data16(2, 2, 3, 5, 9)], {"scale": 2.0**-13, "zero_point": 0} | extra)
    cases["quantize-clipped"] = Case("qc.quantize", [x], {"scale": 1.0, "zero_point": 0, "low": -2, "high": 30000, "out_dtype": "int16"})
    channels = np.random.default_rng(2).uniform(0.0005, 0.02, 37).astype(np.float32)
    narrow = {"x_zero_point": 0, "zero_point": -3, "low": -100, "high": 127}
    cases["requantize-channels"] = Case("qc.requantize", [data16(3, 4, 5, 37), channels], narrow, constants=(1,))
    cases["requantize-one"] = Case("qc.requantize", [data16(3, 400), channels[:1]], narrow, constants=(1,))
    cases["requantize-wide"] = Case(
        "qc.requantize", [data(3, 4, 37), channels * 20000], {"x_zero_point": -5, "zero_point": 0, "out_dtype": "int16"}, constants=(1,)
    )
    cases["requantize-same"] = Case(
        "qc.requantize", [data16(3, 4, 37), channels * 60], {"x_zero_point": 0, "zero_point": 0, "out_dtype": "int16"}, constants=(1,)
    )
    for bits, y in (
        (10, QParams(1 / 64, -30)),
        (4, QParams(2.0**-14, 0, "int16")),
        (12, QParams(1 / 256, -128)),
        (1, QParams(1 / 128, 0)),
        (2, QParams(1 / 128, 0)),
    ):
        table, attrs = constants.lut16(np.tanh if bits != 12 else lambda v: 1 / (1 + np.exp(-v)), 2.0**-12, y, bits)
        cases[f"lut16-{bits}"] = Case("qc.lut16", [data16(bits, 5, 53), table], attrs, constants=(1,))
    extreme = np.array([-32768, 32767] * 513, np.int16)[:1025]
    cases["lut16-extreme"] = Case(
        "qc.lut16", [np.arange(-32768, 32768, 7).astype(np.int16), extreme], {"shift": 6, "zero_point": 0, "out_dtype": "int16"}, constants=(1,)
    )
    mean = {"keepdims": True, "x_zero_point": 0, "ratio": 1.7, "zero_point": 0}
    for name, axes, dtype in (("rows", [1], "int16"), ("last", [-1], "int16"), ("all", [0, 1, 2], "int8")):
        cases[f"mean-{name}"] = Case("qc.mean", [data16(5, 3, 41, 28)], mean | {"axes": axes, "out_dtype": dtype, "ratio": 1.7 if dtype == "int16" else 0.01})
    cases["mean-wider"] = Case("qc.mean", [data(5, 3, 11, 28)], mean | {"axes": [1], "x_zero_point": 4, "ratio": 200.3, "out_dtype": "int16"})
    return cases


def movement() -> dict[str, Case]:
    x = data16(4, 2, 5, 6, 17)
    return {
        "transpose": Case("qc.transpose", [x], {"axes": [0, 2, 3, 1]}),
        "transpose-rows": Case("qc.transpose", [data16(4, 3, 40, 33)], {"axes": [2, 0, 1]}),
        "slice": Case("qc.slice", [x], {"begin": [0, 1, 0, 2], "end": [2, 5, 6, 17], "strides": [1, 2, 1, 3]}),
        "concat": Case("qc.concat", [x, data16(5, 2, 5, 6, 3)], {"axis": 3}),
        "concat-rows": Case("qc.concat", [data16(6, 1, 1, 19), data16(7, 1, 50, 19)], {"axis": 1}),
        "pad": Case("qc.pad", [x], {"pads": [[0, 0], [1, 2], [0, 0], [3, 0]], "value": -300}),
        "select": Case("qc.select", [x], {"indices": [[], [2, 1, *range(5), 3], [0, 0, 0, 5, 1], [*range(16, -1, -1), 3]]}),
        "reshape": Case("qc.reshape", [x], {"shape": [10, 102]}),
    }


def products() -> dict[str, Case]:
    """Accumulators that become int16, or meet an int16 residual."""
    cases = {}
    rng = np.random.default_rng(8)
    for name, residual, y, dtype in (
        ("plain", None, "int16", "int16"),
        ("stream", "int16", "int16", "int16"),
        ("joins", "int8", "int16", "int8"),
        ("leaves", "int16", "int8", "int16"),
    ):
        for kind, x, w, geometry in (
            ("dense", data(1, 2, 5, 37), rng.integers(-127, 128, (43, 37)).astype(np.int8), {}),
            ("dense-row", data(1, 1, 64), rng.integers(-127, 128, (96, 64)).astype(np.int8), {}),
            ("dense-wide", data(3, 2, 3, 40), rng.integers(-127, 128, (140, 40)).astype(np.int8), {}),
            ("conv2d-wide", data(1, 1, 14, 14, 32), rng.integers(-127, 128, (40, 3, 3, 32)).astype(np.int8), {"padding": [1, 1, 1, 1], "groups": 1}),
            ("conv2d", data(1, 1, 7, 6, 16), rng.integers(-127, 128, (24, 3, 3, 16)).astype(np.int8), {"padding": [1, 1, 1, 1], "groups": 1}),
            ("depthwise", data(1, 1, 7, 6, 16), rng.integers(-127, 128, (16, 3, 3, 1)).astype(np.int8), {"padding": [1, 1, 1, 1], "groups": 16}),
        ):
            attrs = ({"strides": [1, 1], "dilation": [1, 1]} | geometry if geometry else {}) | {"x_zero_point": -7, "zero_point": zero(y, 5), "out_dtype": y}
            multiplier, shift = spec.residual_parameters(1.1 / spec.magnitude(dtype), 1.0 / spec.magnitude(y), dtype, y) if residual else (0, 0)
            outputs = w.shape[0]
            typical = 70 * 74 * np.sqrt(w[0].size)
            scale = (rng.uniform(0.3, 1.4, outputs) * spec.magnitude(y) / typical / 2 * 2.0**shift).astype(np.float32)
            operands = [x, w, rng.integers(-9000, 9000, outputs).astype(np.int32), scale]
            shape = (*x.shape[:-1], outputs)
            if residual:
                operands.append(of(dtype, 9, *shape))
                attrs |= {"residual_zero_point": zero(dtype, -3), "residual_multiplier": multiplier, "residual_shift": shift}
            cases[f"{kind}-{name}"] = Case(f"qc.{'conv2d' if kind == 'depthwise' else kind.split('-')[0]}", operands, attrs, constants=(1, 2, 3))
    padded = cases["conv2d-stream"]
    layout = {"halo": HALO, "pitch": 28}
    cases["conv2d-padded"] = Case("qc.conv2d", padded.operands, padded.attrs | {"low": -9000, "high": 20000}, {4: layout}, layout, (1, 2, 3))
    x, w = data(1, 1, 5, 4, 6), rng.integers(-127, 128, (10, 3, 3, 6)).astype(np.int8)
    attrs = {"strides": [2, 2], "padding": [1, 1, 1, 1], "output_padding": [1, 0], "x_zero_point": -7, "out_dtype": "int16"}
    cases["transposed"] = Case("qc.conv2d_transpose", [x, w, np.zeros(10, np.int32), np.full(10, 0.3, np.float32)], attrs, constants=(1, 2, 3))
    cases["matmul"] = Case(
        "qc.matmul", [data(1, 2, 9, 21), data(2, 2, 21, 19)], {"a_zero_point": 3, "b_zero_point": -4, "multiplier": 0.11, "out_dtype": "int16"}
    )
    return cases


def normalizations() -> dict[str, Case]:
    cases = {}
    for i, (shape, source, y) in enumerate(
        [
            ((4, 1), "int16", "int8"),
            ((3, 7), "int16", "int16"),
            ((2, 5, 33), "int8", "int8"),
            ((2, 3, 128), "int16", "int8"),
            ((2, 3, 129), "int8", "int16"),
            ((1, 2, 3, 24), "int16", "int8"),
            ((60, 384), "int16", "int16"),
        ]
    ):
        rng, n = np.random.default_rng(i), shape[-1]
        x = of(source, i, *shape)
        x.reshape(-1, n)[0] = x.reshape(-1)[0]  # all channels equal
        gamma, beta = rng.standard_normal(n) * (1 + 30 * (np.arange(n) % 17 == 0)), rng.standard_normal(n)
        out = rng.uniform(0.5, 2.0, n) * (0.02 if y == "int8" else 1e-4)
        padded = {"layouts": {0: {"halo": HALO, "pitch": 26}}, "out": {"halo": HALO, "pitch": 29}} if len(shape) == 4 else {}
        for kind, extra in (("layer", {}), ("rms", {"x_zero_point": zero(source, 9)})):
            make = constants.layer_norm_parameters if kind == "layer" else constants.rms_norm_parameters
            gain, shift, epsilon = make(gamma, beta, 1e-5, 1e-3, out)
            attrs = {"epsilon": epsilon, "zero_point": zero(y, -4), "out_dtype": y} | extra
            cases[f"{kind}-{i}"] = Case(f"qc.{kind}_norm", [x, gain, shift], attrs, constants=(1, 2), **padded)
    for n in (8192, 32768):
        x = np.full((3, n), -32768, np.int16)
        x[0, n // 2 :], x[1, 0] = 32767, 32767
        gain, shift, epsilon = constants.layer_norm_parameters(np.ones(n), np.full(n, 1e9), 0.0, 1e-3, 1 / 32)
        attrs = {"epsilon": epsilon, "out_dtype": "int16"}
        cases[f"layer-extreme-{n}"] = Case("qc.layer_norm", [x, gain, np.where(np.arange(n) % 2, shift, 0).astype(np.int32)], attrs, constants=(1, 2))
        cases[f"rms-extreme-{n}"] = Case("qc.rms_norm", [x, gain, shift * 0], attrs | {"x_zero_point": 0}, constants=(1, 2))
    bytes_ = np.where(np.arange(32768) % 3, -128, 127).astype(np.int8)[None]
    gain, shift, epsilon = constants.rms_norm_parameters(np.ones(32768), None, 0.0, 1e-3, 1 / 32)
    cases["rms-bytes"] = Case("qc.rms_norm", [bytes_, gain, shift], {"epsilon": epsilon, "x_zero_point": 127}, constants=(1, 2))
    cases["layer-bytes"] = Case("qc.layer_norm", [bytes_, gain, shift], {"epsilon": epsilon}, constants=(1, 2))
    return cases


def softmaxes() -> dict[str, Case]:
    cases = {}
    for i, (shape, source, scale) in enumerate(
        [
            ((3, 1), "int16", 1e-3),
            ((4, 7), "int8", 0.1),
            ((2, 3, 33), "int16", 2e-4),
            ((1, 1000), "int8", 0.03),
            ((2, 2, 5, 24), "int16", 1.0),
            ((65, 400), "int16", 1e-4),
        ]
    ):
        x = of(source, i, *shape)
        x.reshape(-1, shape[-1])[-1] = x.reshape(-1)[0]
        padded = {"layouts": {0: {"halo": HALO, "pitch": 26}}, "out": {"pitch": 29}} if len(shape) == 4 else {}
        for y in (QParams(1 / 256, -128), QParams(2.0**-15, 0, "int16")):
            cases[f"softmax-{i}-{y.dtype}"] = Case("qc.softmax", [x], constants.softmax_parameters(scale, y), **padded)
    return cases


def attentions() -> dict[str, Case]:
    cases = {}

    def case(
        name: str,
        sizes: tuple[int, int, int],
        heads: tuple[int, int],
        size: tuple[int, int] = (16, 16),
        packed: bool = False,
        lead: int = 1,
        spread: float = 1.0,
        bias: Any = None,
        bias_multipliers: list[int] | None = None,
        mask: Any = None,
        lengths: Any = None,
        constant: tuple[str, ...] = (),
        **attrs: Any,
    ) -> None:
        (b, s, t), (h, g), (d, e), seed = sizes, heads, size, len(cases)
        rng, columns = np.random.default_rng(seed), [0, 0, 0]
        if packed:
            both = data(seed, b, s, h * d + g * d + g * e + lead)
            q, k, v, columns = both, both, both, [lead, lead + h * d, lead + h * d + g * d]
        else:
            q, k, v = data(seed, b, s, h * d), data(seed + 1, b, t, g * d), data(seed + 2, b, t, g * e)
        extras = {n: x for n, x in (("bias", bias), ("mask", mask), ("lengths", lengths)) if x is not None}
        logits = rng.uniform(0.5, 1.5, h) * spread / np.sqrt(d) / 5500
        m, c = constants.attention_multipliers(1.0, logits, 1.0, 1.0, 1.0 if attrs.get("out_dtype") != "int16" else 0.004, h)
        numbers = {"heads": h, "kv_heads": g, "size": d, "value_size": e, "columns": columns, "zero_points": [0, 0, 0], "extra": list(extras)}
        numbers |= {"bias_multipliers": bias_multipliers or [1]} if bias is not None else {}
        fixed = (3, 4, *(5 + i for i, n in enumerate(extras) if n in constant))
        cases[f"attention-{name}"] = Case("qc.attention", [q, k, v, m, c, *extras.values()], numbers | attrs, constants=fixed)

    rng = np.random.default_rng(99)
    case("plain", (2, 19, 19), (3, 3))
    case("packed", (2, 13, 13), (2, 2), (12, 12), packed=True, zero_points=[5, 5, 5], zero_point=-9)
    case("packed-words", (2, 37, 37), (4, 2), (20, 36), packed=True, lead=4, zero_points=[-128, 5, 127])
    case("wide", (1, 18, 50), (2, 2), (8, 256), zero_points=[127, -128, -128], zero_point=-1)
    case("cross", (1, 6, 37), (2, 2), (20, 7), zero_points=[-128, 127, -128])
    case("grouped", (2, 9, 11), (6, 2), packed=False)
    case("multi-query", (1, 5, 65), (4, 1), (8, 8))
    case("one-query", (3, 1, 70), (2, 2), (32, 32))
    case("one-key", (2, 7, 1), (2, 2), (5, 5))
    case("one-of-each", (1, 1, 1), (1, 1), (1, 1))
    case("long", (1, 9, 700), (1, 1), (64, 64), spread=3.0)
    case("peaked", (1, 8, 40), (2, 2), spread=1000.0)
    case("flat", (1, 8, 200), (2, 2), spread=0.0, out_dtype="int16")
    case("sixteen-bits", (2, 10, 45), (2, 2), out_dtype="int16", low=-20000, high=25000)
    case("causal", (2, 21, 21), (2, 2), causal=0)
    case("causal-behind", (1, 4, 30), (2, 2), causal=26)
    case("causal-nothing", (1, 9, 12), (2, 2), causal=-3)
    case("lengths", (4, 11, 23), (2, 2), lengths=np.array([23, 0, -5, 17], np.int32))
    case("lengths-64", (3, 6, 18), (2, 2), lengths=np.array([1, 100, 7], np.int64), causal=2)
    case("mask", (2, 9, 26), (2, 2), mask=rng.random((2, 1, 1, 26)) < 0.6)
    case("mask-bytes", (2, 9, 26), (2, 2), mask=(rng.random((1, 2, 9, 26)) < 0.3).astype(np.int8))
    case("mask-words", (2, 5, 9), (2, 2), mask=(rng.random((2, 2, 5, 9)) < 0.5).astype(np.int64) * 2**32)
    case("mask-constant", (4, 5, 40), (2, 2), mask=rng.random((2, 1, 5, 40)) < 0.5, constant=("mask",), causal=20)
    case("mask-nothing", (2, 6, 21), (2, 2), mask=np.arange(2)[:, None, None, None] > np.zeros((2, 1, 1, 21)))
    case("bias", (4, 10, 10), (3, 3), bias=rng.integers(-9000, 9000, (1, 3, 10, 10)).astype(np.int32), constant=("bias",))
    case("bias-minus-infinity", (2, 10, 33), (3, 3), bias=np.where(rng.random((2, 1, 10, 33)) < 0.5, -(2**29), 0).astype(np.int32))
    case("bias-windows", (6, 7, 7), (2, 2), bias=rng.integers(-99, 99, (3, 2, 7, 7)).astype(np.int16), bias_multipliers=[40, 300])
    case("bias-bytes", (2, 6, 35), (2, 2), bias=data(3, 1, 1, 1, 35), bias_multipliers=[-70])
    case(
        "all-masks",
        (2, 9, 40),
        (4, 2),
        bias=rng.integers(-5000, 5000, (2, 1, 9, 40)).astype(np.int32),
        mask=rng.random((2, 4, 1, 40)) < 0.7,
        lengths=np.array([31, 40], np.int32),
        causal=25,
    )
    blocks = {"bias": rng.integers(-3000, 3000, (1, 2, 13, 150)).astype(np.int32), "mask": rng.random((2, 1, 1, 150)) < 0.5, "causal": 100}
    case("blocks", (2, 13, 150), (2, 2), (24, 40), zero_points=[9, -8, 7], zero_point=3, **blocks)
    case("blocks-nothing", (1, 15, 200), (2, 1), (8, 80), causal=-9, spread=2.0)
    case("blocks-lengths", (3, 7, 192), (2, 2), (36, 64), lengths=np.array([0, 65, 128], np.int32), out_dtype="int16")
    extreme = [np.full((1, 3, 64), v, np.int8) for v in (-128, -128, -128)]
    m, c = constants.attention_multipliers(1.0, 1e-6, 1.0, 1.0, 1.0, 1)
    attrs = {"heads": 1, "kv_heads": 1, "size": 64, "value_size": 64, "columns": [0, 0, 0], "zero_points": [127, 127, 127], "out_dtype": "int16"}
    cases["attention-extreme"] = Case("qc.attention", [*extreme, m, c], attrs, constants=(3, 4))
    return cases


def gathers() -> dict[str, Case]:
    cases = {}
    ids = np.array([[0, 6, 3, -1], [-7, -8, 7, 2**31 - 1]])
    for name, dtype, constant in (("bytes", "int8", (0,)), ("words", "int16", (0,)), ("computed", "int8", ())):
        table = of(dtype, 3, 7, 35)
        cases[f"gather-{name}"] = Case("qc.gather", [table, ids.astype(np.int32)], {}, constants=constant)
        rows = np.random.default_rng(1).uniform(0.5, 300 if dtype == "int8" else 1.5, 7).astype(np.float32)
        attrs = {"table_zero_point": zero(dtype, 4), "out_dtype": "int16"}
        cases[f"gather-{name}-rows"] = Case("qc.gather", [table, ids * 2**31 * (ids > 6) + ids * (ids <= 6), rows], attrs, constants=(*constant, 2))
    narrow = {"table_zero_point": 0, "zero_point": 7, "low": -90}
    cases["gather-one"] = Case("qc.gather", [data16(3, 7, 64), np.int64([5, -3, 2**62, -(2**62)]), np.float32([0.004])], narrow, constants=(0, 2))
    cases["gather-scalar"] = Case("qc.gather", [data(3, 4, 9), np.array(2)], {}, constants=(0,))
    return cases


CASES = sums() | conversions() | movement() | products() | normalizations() | softmaxes() | attentions() | gathers()
