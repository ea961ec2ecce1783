"""The transformer's integer operators: against the exact definition of docs/numerics.md, one number at a time, and their accuracy against float64."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from exact import clip, each, fixed, float32, requantize, wrap
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.numerics import constants, spec
from qcompiler.numerics import operators as numerics
from qcompiler.numerics.metrics import sqnr_db
from qcompiler.numerics.spec import QParams

LIMITS = {"int8": (-128, 127), "int16": (-32768, 32767)}
DTYPE = st.sampled_from(["int8", "int16"])


def numbers(seed: int, dtype: str, *shape: int) -> np.ndarray:
    """Random integers of all magnitudes, one in eight an extreme."""
    rng, (low, high) = np.random.default_rng(seed), LIMITS[dtype]
    values = rng.integers(low, high, shape, endpoint=True) >> rng.integers(0, 12 if dtype == "int16" else 5, shape)
    return np.where(rng.random(shape) < 0.125, rng.choice([low, high], shape), values).astype(dtype)


def finished(acc: int, multiplier: float | Fraction, zero_point: int, dtype: str) -> int:
    return requantize(acc, multiplier, zero_point, *LIMITS[dtype])


def root(value: Fraction) -> Fraction:
    """The float32 square root of a positive float32: 60 bits of it decide, as it is no tie between two float32 (an exact one would have 48 bits)."""
    shift = 2 * (150 + value.denominator.bit_length())
    return float32(Fraction(math.isqrt((value.numerator << shift) // value.denominator), 1 << shift // 2))


# -- sixteen bits -----------------------------------------------------------------------------------------------------------------------


def test_parameters_of_16_bits() -> None:
    p = QParams.from_range(-1.0, 3.0, dtype="int16")
    assert (p.zero_point, p.dtype, p.scale) == (0, "int16", float(np.float32(6 / 65535)))
    assert p.range[1] >= 3.0 - 0.501 * p.scale and QParams.from_range(0, 0, dtype="int16") == QParams(1.0, 0, "int16")
    assert p.quantize(np.array([3.0, -9.0, 1.0])).tolist() == [32767, -32768, round(1 / p.scale)]
    assert p.quantize(np.zeros(1)).dtype == np.int16 and QParams(p.scale, 0) != p
    with pytest.raises(ValueError, match="zero point is 3; that of 16-bit numbers must be 0"):
        QParams(1.0, 3, "int16")
    with pytest.raises(ValueError, match="dtype is 'int4'; it must be one of int8, int16"):
        QParams(1.0, 0, "int4")


@given(DTYPE, DTYPE, DTYPE, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 999))
@fixed()
def test_sums_fit_int32_and_follow_the_formula(a: str, b: str, y: str, a_scale: float, b_scale: float, seed: int) -> None:
    y_scale = (a_scale * spec.magnitude(a) + b_scale * spec.magnitude(b)) / spec.magnitude(y)
    first, second, shift = spec.add_parameters(a_scale, b_scale, y_scale, a, b)
    assert spec.magnitude(a) * first + spec.magnitude(b) * second < 2**31
    zeros = [0 if d == "int16" else z for d, z in ((a, -128), (b, 127), (y, 5))]
    xs = numbers(seed, a, 30), numbers(seed + 1, b, 30)
    got = numerics.add(
        *xs, a_zero_point=zeros[0], a_multiplier=first, b_zero_point=zeros[1], b_multiplier=-second, shift=shift, zero_point=zeros[2], out_dtype=y
    )
    assert got.dtype == y
    for p, q, r in each(*xs, got):
        acc = (p - zeros[0]) * first - (q - zeros[1]) * second
        assert -(2**31) <= acc < 2**31 and r == finished(acc, 2.0**-shift, zeros[2], y)


@given(DTYPE, DTYPE, st.floats(1e-5, 1e2), st.integers(0, 999))
@fixed()
def test_a_dense_layer_with_a_residual(r: str, y: str, ratio: float, seed: int) -> None:
    multiplier, shift = spec.residual_parameters(ratio * spec.magnitude(y) / spec.magnitude(r), 1.0, r, y)
    assert spec.magnitude(r) * multiplier < 2**30 and shift <= (14 if y == "int16" else 20 if r == "int16" else 16)
    x, w, bias = numbers(seed, "int8", 3, 9), numbers(seed + 1, "int8", 4, 9), np.array([5, -700, 90000, 2**29], np.int32)
    scale = (np.array([1e-3, 0.02, 0.7, 1e-6]) * spec.magnitude(y) * 2.0 ** (shift - 8)).astype(np.float32)
    residual, z = numbers(seed + 2, r, 3, 4), 0 if r == "int16" else -7
    attributes: dict[str, Any] = {"residual_zero_point": z, "residual_multiplier": multiplier, "residual_shift": shift}
    got = numerics.dense(x, w, bias, scale, residual, x_zero_point=3, zero_point=0, out_dtype=y, **attributes)
    plain = numerics.dense(x, w, bias, scale, x_zero_point=3, out_dtype=y)
    acc = (x.astype(int) - 3) @ w.T.astype(int) + bias
    for a, m, s, value, alone in each(acc, scale, residual, got, plain):
        share = round(clip(float32(float32(a) * Fraction(m)), -(2**30), 2**30))
        assert value == finished(share + (s - z) * multiplier, 2.0**-shift, 0, y) and alone == finished(a, m, 0, y)


def test_requantization_has_a_multiplier_per_channel() -> None:
    x, m = numbers(3, "int16", 20, 3), np.array([0.004, 0.5, 3.7e-5], np.float32)
    got = numerics.rescale(x, m, x_zero_point=0, zero_point=-9, low=-100)
    assert all(y == requantize(a, f, -9, -100, 127) for a, f, y in each(x, m, got))
    wide = numerics.rescale(got, np.array([200.0], np.float32), x_zero_point=-9, zero_point=0, out_dtype="int16")
    assert wide.dtype == np.int16 and wide.tolist() == ((got.astype(int) + 9) * 200).tolist()


@given(st.integers(1, 12), DTYPE, st.integers(0, 99))
@fixed(24)
def test_interpolated_tables(bits: int, y: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table, width = numbers(seed, "int16", 2**bits + 1), 2 ** (16 - bits)
    x = np.append(numbers(seed, "int16", 50), [-32768, 32767, 0, *(rng.integers(0, 2**bits, 9) * width - 32768)]).astype(np.int16)
    shift = int(rng.integers(10, 20))
    got = numerics.lut16(x, table, shift=shift, zero_point=0 if y == "int16" else 3, out_dtype=y)
    for a, value in each(x, got):
        i, f = divmod(a + 32768, width)
        acc = int(table[i]) * (width - f) + int(table[i + 1]) * f
        assert abs(acc) < 2**31 and value == finished(acc, 2.0**-shift, 0 if y == "int16" else 3, y)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize("limit", [4.0, 20.0])
@pytest.mark.parametrize("dtype, least", [("int8", 0.02), ("int16", 2.5)])
def test_interpolated_gelu_is_nearly_as_good_as_rounding(limit: float, dtype: str, least: float) -> None:
    x = np.random.default_rng(0).normal(0, limit / 4, 20000).clip(-limit, limit)
    p = QParams.from_range(-limit, limit, dtype="int16")
    q = p.quantize(x)
    real = p.dequantize(q)
    y = QParams.from_range(-0.17, limit, dtype=dtype)
    table, attributes = constants.lut16(gelu, p.scale, y)
    got = y.dequantize(numerics.lut16(q, table, **attributes))
    assert sqnr_db(got, gelu(real)) > sqnr_db(y.dequantize(y.quantize(gelu(real))), gelu(real)) - least


def test_a_table_of_16_bits_saturates_and_replaces_nan() -> None:
    table, attributes = constants.lut16(np.log, 2.0**-12, QParams(1 / 16, 100), bits=8)
    got = numerics.lut16(np.array([-32768, -1, 0, 4096, 32767], np.int16), table, **attributes)
    assert got.tolist()[0] == 100 and got.tolist()[3:] == [100, 127] and got[2] == -128
    with pytest.raises(ValueError, match=r"a table of 2\^13 pieces; supported"):
        constants.lut16(np.tanh, 1.0, QParams(1.0, 0), bits=13)


# -- normalization ----------------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["layer", "rms"]), DTYPE, DTYPE, st.integers(1, 40), st.floats(0, 1e-2), st.integers(0, 9999))
@fixed(50)
def test_normalization(kind: str, source: str, y: str, n: int, eps: float, seed: int) -> None:
    rng, x = np.random.default_rng(seed), numbers(seed, source, 3, n)
    x[0] = x[0, 0]
    gamma, beta = rng.standard_normal(n) * 10.0 ** rng.integers(-2, 3), rng.standard_normal(n) * 10.0 ** rng.integers(-2, 7)
    make = constants.layer_norm_parameters if kind == "layer" else constants.rms_norm_parameters
    y_scale = rng.uniform(0.5, 2, n) * (2.0**-5 if y == "int8" else 2.0**-12)
    gain, shift, epsilon = make(gamma, beta, eps, 0.01, y_scale)
    z, zero_point = (0 if source == "int16" else 11), (0 if y == "int16" else -30)
    if kind == "layer":
        got = numerics.layer_norm(x, gain, shift, epsilon=epsilon, zero_point=zero_point, out_dtype=y)
    else:
        got = numerics.rms_norm(x, gain, shift, x_zero_point=z, epsilon=epsilon, zero_point=zero_point, out_dtype=y)
    assert got.dtype == y
    for row, result in zip(x.tolist(), got.tolist(), strict=True):
        total, d = sum(row), [a - z for a in row]
        square = n * sum(a * a for a in row) - total * total if kind == "layer" else sum(a * a for a in d)
        d = [n * a - total for a in row] if kind == "layer" else d
        r = float32(1 / root(float32(float32(square) + Fraction(epsilon))))
        for c, value in enumerate(result):
            u = round(clip(float32(float32(float32(d[c]) * r) * Fraction(float(gain[c]))), -(2**29), 2**29))
            assert abs(u + int(shift[c])) <= 2**30 and value == finished(u + int(shift[c]), 2.0**-8, zero_point, y)


@pytest.mark.parametrize("n", [1, 2, 8192, 32768])
def test_normalization_fits_int64_and_int32_at_the_extremes(n: int) -> None:
    """The greatest variance, half at each end of the range; one channel apart from all others; all equal."""
    x = np.full((3, n), -32768, np.int16)
    x[0, n // 2 :] = 32767
    x[1, 0] = 32767
    gain, shift, epsilon = constants.layer_norm_parameters(np.ones(n), np.zeros(n), 1e-6, 1e-3, 1 / 32)
    got = numerics.layer_norm(x, gain, shift, epsilon=epsilon)
    real = x.astype(np.float64) * 1e-3
    want = (real - real.mean(-1, keepdims=True)) / np.sqrt(real.var(-1, keepdims=True) + 1e-6) * 32
    assert np.abs(got - np.clip(want, -128, 127)).max() <= 0.51
    assert int(np.abs(n * x.astype(np.int64) - x.sum(-1, keepdims=True, dtype=np.int64)).max()) < 2**31


def test_more_channels_are_an_error() -> None:
    with pytest.raises(ValueError, match="a normalization over 32769 channels; supported: up to 32768"):
        constants.layer_norm_parameters(np.ones(32769), None, 1e-6, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype, most", [("int8", 0.1), ("int16", 0.5)])
@pytest.mark.parametrize("n", [64, 384, 1024])
def test_normalization_is_as_good_as_rounding(kind: str, per_channel: bool, dtype: str, most: float, n: int) -> None:
    """A few channels are 30 times larger, as in transformers."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((100, n)) * (1 + 30 * (np.arange(n) % 97 == 0))
    gamma, beta = 0.5 + rng.random(n), rng.standard_normal(n) * 0.2
    p = QParams.from_range(float(x.min()), float(x.max()), dtype="int16")
    q = p.quantize(x)
    real = p.dequantize(q)
    centered = real - real.mean(-1, keepdims=True) if kind == "layer" else real
    want = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-12) * gamma + beta
    high = 127 if dtype == "int8" else 32767
    out = np.abs(want).max(0) / high if per_channel else np.full(n, np.abs(want).max() / high)
    make = constants.layer_norm_parameters if kind == "layer" else constants.rms_norm_parameters
    gain, shift, epsilon = make(gamma, beta, 1e-12, p.scale, out)
    extra = {} if kind == "layer" else {"x_zero_point": 0}
    got = numerics.OPERATORS[f"qc.{kind}_norm"](q, gain, shift, epsilon=epsilon, out_dtype=dtype, **extra)
    assert sqnr_db(got * out, want) > sqnr_db(np.clip(np.rint(want / out), -high - 1, high) * out, want) - most


# -- exponentials -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponential, one", [(constants.ATTENTION, 255 * 128), (constants.SOFTMAX, 32766)])
def test_exponentials_fit_16_bits_and_fall(exponential: constants.Exponential, one: int) -> None:
    table = exponential.table
    assert table[0] == one and table[-1] == 0 and np.diff(table).max() <= (exponential is constants.SOFTMAX)  # one step of 2^-15, far behind the largest
    assert exponential.coarse.dtype == exponential.fine.dtype == np.int16 and exponential.fine.min() > 0 and exponential.coarse.min() == 0
    reach = len(exponential.fine) * (len(exponential.coarse) - 1)
    assert np.abs(table[:reach] - one * np.exp(-np.arange(reach) / exponential.steps)).max() < 1.6


def test_thresholds_are_every_odd_number_once() -> None:
    t = constants.thresholds(130)
    assert sorted(t[:64].tolist()) == list(range(1, 128, 2)) and (t[64:128] == t[:64]).all() and t[:4].tolist() == [1, 65, 33, 97]
    assert (constants.ATTENTION.table[0] + t).max() == 32767 and {int(p) for p in (constants.ATTENTION.table[0] + t) >> 7} == {255}


def exponential_of(e: constants.Exponential, distance: int, multiplier: float) -> int:
    index = round(clip(float32(float32(distance) * Fraction(multiplier)), 0, 2 ** (e.coarse_bits + e.fine_bits) - 1))
    return (int(e.coarse[index >> e.fine_bits]) * int(e.fine[index & (2**e.fine_bits - 1)]) + 2**14) >> 15


@given(DTYPE, DTYPE, st.integers(1, 30), st.floats(1e-6, 1.0), st.integers(0, 9999))
@fixed(40)
def test_softmax(source: str, y: str, n: int, scale: float, seed: int) -> None:
    x = numbers(seed, source, 2, n)
    output = QParams(1 / 256, -128) if y == "int8" else QParams(2.0**-15, 0, "int16")
    attributes = constants.softmax_parameters(scale, output)
    got = numerics.softmax(x, **attributes)
    for row, result in zip(x.tolist(), got.tolist(), strict=True):
        e = [exponential_of(constants.SOFTMAX, max(row) - a, float(np.float32(attributes["multiplier"]))) for a in row]
        factor = float32(Fraction(attributes["steps"]) / float32(sum(e)))
        assert result == [finished(a, factor, output.zero_point, y) for a in e]


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("n", [2, 10, 1000])
def test_softmax_is_close(n: int, spread: float) -> None:
    """Within a step of 8 bits, and with 16 bits to 40 dB, though of 1000 classes most have few steps."""
    logits = np.random.default_rng(n).standard_normal((50, n)) * spread
    p = QParams.from_range(float(logits.min()), float(logits.max()), dtype="int16")
    real = p.dequantize(p.quantize(logits))
    want = np.exp(real - real.max(-1, keepdims=True))
    want /= want.sum(-1, keepdims=True)
    narrow, wide = QParams(1 / 256, -128), QParams(2.0**-15, 0, "int16")
    assert (
        np.abs(narrow.dequantize(numerics.softmax(p.quantize(logits), **constants.softmax_parameters(p.scale, narrow))) - np.minimum(want, 255 / 256)).max()
        < 0.8 / 256
    )
    assert sqnr_db(wide.dequantize(numerics.softmax(p.quantize(logits), **constants.softmax_parameters(p.scale, wide))), want) > 40


# -- attention --------------------------------------------------------------------------------------------------------------------------


def exact_attention(c: dict[str, Any], extras: dict[str, np.ndarray]) -> np.ndarray:
    """Element by element, by the formulas."""
    a, (q, k, v, m, scale) = c["attrs"], c["operands"]
    (b, s, _), t = q.shape, k.shape[1]
    y = np.zeros((b, s, a["heads"] * a["value_size"]), int)
    zq, zk, zv = a["zero_points"]
    for row, h, i in np.ndindex(b, a["heads"], s):
        g = h * a["kv_heads"] // a["heads"]
        accs, counts = [], []
        for j in range(t):
            channels = range(a["size"])
            acc = sum((int(q[row, i, a["columns"][0] + h * a["size"] + d]) - zq) * (int(k[row, j, a["columns"][1] + g * a["size"] + d]) - zk) for d in channels)

            def at(tensor: np.ndarray, j: int = j, place: tuple[int, ...] = (row, h, i)) -> Any:
                row, h, i = place
                return tensor[row % tensor.shape[0], h % tensor.shape[1], i % tensor.shape[2], j]

            if "bias" in extras:
                factors = a["bias_multipliers"]
                acc += int(at(extras["bias"])) * factors[h % len(factors)]
            accs.append(acc)
            valid = "mask" not in extras or bool(at(extras["mask"]))
            valid &= "lengths" not in extras or j < extras["lengths"][row]
            counts.append(valid and (a["causal"] is None or j <= i + a["causal"]))
        if not any(counts):
            accs, counts = [0] * t, [True] * t
        top = max(x for x, n in zip(accs, counts, strict=True) if n)
        p = []
        for j, (x, n) in enumerate(zip(accs, counts, strict=True)):
            e = exponential_of(constants.ATTENTION, top - x, float(m[h])) if n else 0
            p.append((e + 2 * int(f"{j % 64:06b}"[::-1], 2) + 1) >> 7)
        factor = float32(Fraction(float(scale[h])) / float32(sum(p)))
        for d in range(a["value_size"]):
            total = sum(x * (int(v[row, j, a["columns"][2] + g * a["value_size"] + d]) - zv) for j, x in enumerate(p))
            y[row, i, h * a["value_size"] + d] = finished(wrap(total), factor, a["zero_point"], a["out_dtype"])
    return y


@given(st.data())
@fixed(40)
def test_attention(data: Any) -> None:
    draw, seed = data.draw, data.draw(st.integers(0, 9999))
    rng = np.random.default_rng(seed)
    b, s, t, groups, repeat = (draw(st.integers(1, n)) for n in (4, 4, 9, 2, 2))
    size, value_size, heads = draw(st.integers(1, 6)), draw(st.integers(1, 3)), groups * repeat
    columns = [draw(st.integers(0, 2)) for _ in range(3)]
    q, k, v = (
        numbers(seed + i, "int8", b, n, columns[i] + w + 1) for i, (n, w) in enumerate(((s, heads * size), (t, groups * size), (t, groups * value_size)))
    )
    extras: dict[str, np.ndarray] = {}
    rows = draw(st.sampled_from([n for n in range(1, b + 1) if b % n == 0]))
    shape = (rows, draw(st.sampled_from([1, heads])), draw(st.sampled_from([1, s])), t)
    bias_multipliers = [1] if draw(st.booleans()) else rng.integers(0, 900, heads).tolist()
    for name in draw(st.permutations(["bias", "mask", "lengths"]))[: draw(st.integers(0, 3))]:
        bias = rng.integers(-2000, 2000, shape).astype(draw(st.sampled_from([np.int16, np.int32])))
        extras[name] = {"bias": bias, "mask": rng.random(shape) < 0.6, "lengths": rng.integers(-1, t + 2, b).astype(np.int64)}[name]
    attrs = {
        **{"heads": heads, "kv_heads": groups, "size": size, "value_size": value_size, "columns": columns, "extra": list(extras)},
        **{"zero_points": rng.integers(-128, 128, 3).tolist(), "bias_multipliers": bias_multipliers, "causal": draw(st.sampled_from([None, 0, -2, t - s]))},
        **{"zero_point": 0, "out_dtype": draw(DTYPE)},
    }
    m, c = constants.attention_multipliers(0.3, rng.uniform(0.001, 0.1, heads), 0.05, 0.1, 0.1 * (1 if attrs["out_dtype"] == "int8" else 0.01), heads)
    case = {"attrs": attrs, "operands": (q, k, v, m, c)}
    got = numerics.attention(q, k, v, m, c, *extras.values(), **attrs)
    assert got.dtype == attrs["out_dtype"] and got.tolist() == exact_attention(case, extras).tolist()


def float_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """[B, S, H, D] each, float64."""
    logits = np.einsum("bshd,bthd->bhst", q, k) / math.sqrt(q.shape[-1]) + bias
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhst,bthd->bshd", e / e.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("spread, least", [(0.5, 42), (1.0, 33), (2.0, 26), (4.0, 34)])
@pytest.mark.parametrize("keys", [16, 128, 512, 2048])
def test_attention_weights(keys: int, spread: float, least: float) -> None:
    """The weights alone, read by an identity of values in pieces of 128 keys, in 16 bits."""
    rng = np.random.default_rng(keys)
    logits = rng.standard_normal((4, keys)) * spread
    bias = np.rint(logits / 1e-4).astype(np.int32)[None, None]
    want = np.exp(bias[0, 0] * 1e-4 - (bias[0, 0] * 1e-4).max(-1, keepdims=True))
    want /= want.sum(-1, keepdims=True)
    step, got = float(want.max()) / 32000, []
    m, c = constants.attention_multipliers(1.0, 1e-2, 1e-2, 1 / 127, step, heads=1)
    for first in range(0, keys, 128):
        v = np.zeros((1, keys, min(keys, 128)), np.int8)
        v[0, first + np.arange(v.shape[2]), np.arange(v.shape[2])] = 127
        y = numerics.attention(
            *(np.zeros((1, n, 1), np.int8) for n in (4, keys)),
            *(v, m, c, bias),
            **{"heads": 1, "kv_heads": 1, "size": 1, "value_size": v.shape[2], "columns": (0, 0, 0), "zero_points": (0, 0, 0), "extra": ["bias"]},
            bias_multipliers=[1],
            out_dtype="int16",
        )
        got.append(y[0] * step)
    assert sqnr_db(np.concatenate(got, 1), want) > least


def test_attention_of_real_numbers_with_masks() -> None:
    """A padded batch: the result is that of the float operator on what counts, and rows without a key have the mean of the values."""
    rng, (b, n, heads, size) = np.random.default_rng(5), (2, 50, 3, 16)
    real = [rng.standard_normal((b, n, heads, size)) * (1.5 if i < 2 else 1) for i in range(3)]
    params = [QParams.from_range(float(x.min()), float(x.max()), symmetric=True) for x in real]
    q, k, v = (p.quantize(x).reshape(b, n, -1) for p, x in zip(params, real, strict=True))
    exact = [p.dequantize(x).reshape(b, n, heads, size) for p, x in zip(params, (q, k, v), strict=True)]
    lengths = np.array([50, 0], np.int32)
    added = np.zeros((b, 1, 1, n))
    added[1] = np.finfo(np.float32).min
    want = float_attention(*exact, added).reshape(b, n, -1)
    out = np.abs(want).max() / 127
    m, c = constants.attention_multipliers(1 / math.sqrt(size), *(p.scale for p in params), out, heads)
    shape: dict[str, Any] = {"heads": heads, "kv_heads": heads, "size": size, "value_size": size, "columns": (0, 0, 0), "zero_points": (0, 0, 0)}
    got = numerics.attention(q, k, v, m, c, lengths, extra=["lengths"], **shape) * out
    assert sqnr_db(got[0], want[0]) > 30 and np.abs(want[1] - got[1]).max() <= 0.51 * out
    mask = np.arange(n) < np.array([30, 17])[:, None]
    want = float_attention(*exact, np.where(mask, 0.0, -1e4)[:, None, None])
    for extra, tensor in (
        ("mask", mask[:, None, None]),
        ("bias", np.repeat(constants.attention_bias(np.where(mask, 0.0, -np.inf)[:, None, None], m), 1, 1)),
        ("lengths", np.array([30, 17])),
    ):
        got = numerics.attention(q, k, v, m, c, tensor, extra=[extra], bias_multipliers=[1], **shape) * out
        assert sqnr_db(got, want.reshape(b, n, -1)) > 28


def test_biases_in_units_of_the_logits() -> None:
    m, _ = constants.attention_multipliers(1.0, np.array([0.1, 0.2]), 0.1, 1.0, 1.0, 2)
    bias = np.array([[[[1.0, -np.inf]], [[1.0, -1e4]]]])
    assert constants.attention_bias(bias, m).tolist() == [[[[100, -(2**29)]], [[50, -500000]]]]
    assert constants.bias_multipliers(0.5, 127, m) == [50, 25]
    with pytest.raises(ValueError, match="a bias for all heads needs one multiplier"):
        constants.attention_bias(bias[:, :1], m)
    with pytest.raises(ValueError, match="too large beside the logits"):
        constants.bias_multipliers(1e6, 32768, m)
    assert constants.attention_bound(64, (0, -128), 1000) == 64 * 128 * 255 + 1000


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k": (2, 9, 12)}, r"queries \[1, 5, 12\], keys \[2, 9, 12\] and values \[1, 9, 12\] must be"),
        ({"v": (1, 8, 12)}, "must be"),
        ({"kv_heads": 2}, "3 heads can't share 2 heads of keys"),
        ({"columns": [0, 1, 0]}, "keys are columns 1 to 12 of a tensor with 12"),
        ({"size": 5}, "queries are columns 0 to 14 of a tensor with 12"),
        ({"heads": 6, "kv_heads": 3, "size": 2}, r"multipliers have shapes \[3\] and \[3\]; there must be one per head, 6"),
        ({"k": (1, 40000, 12), "v": (1, 40000, 12)}, "40000 keys; supported: 1 to 32768"),
        ({"q": (1, 5, 30000), "k": (1, 9, 30000), "size": 9000, "zero_points": [127, 127, 0]}, "q . k of 9000 channels may leave int32; supported: up to 8256"),
        ({"mask": (1, 2, 5, 9)}, r"the operand 'mask' is \[1, 2, 5, 9\]; wanted: \['a divisor of the batch', '1 or 3', '1 or 5', 9\]"),
        ({"mask": (2, 1, 1, 9)}, "the operand 'mask' is"),
        ({"lengths": (2,)}, r"the operand 'lengths' is \[2\]; wanted: \[1\]"),
        ({"bias": (1, 1, 1, 9), "bias_multipliers": [1, 2]}, "a bias needs one multiplier, or one per head"),
        ({"padding": (1,)}, "supported: bias, mask, lengths"),
    ],
)
def test_an_attention_without_meaning_is_an_error(change: dict[str, Any], words: str) -> None:
    attrs: dict[str, Any] = {"heads": 3, "kv_heads": 3, "size": 4, "value_size": 4, "columns": [0, 0, 0], "zero_points": [0, 0, 0]}
    shapes = {"q": (1, 5, 12), "k": (1, 9, 12), "v": (1, 9, 12), "m": (3,), "c": (3,)}
    extra = [n for n in change if n in ("mask", "lengths", "bias", "padding")]
    shapes |= {n: s for n, s in change.items() if isinstance(s, tuple)}
    attrs |= {n: a for n, a in change.items() if not isinstance(a, tuple)} | {"extra": extra}
    arrays = [np.zeros(s, np.float32 if n in "mc" else np.int8) for n, s in shapes.items()]
    with pytest.raises(ValueError, match=words):
        numerics.attention(*arrays, **attrs)


# -- embeddings -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_gather(dtype: type) -> None:
    table = numbers(1, "int8", 7, 5)
    ids = np.array([[0, 6, 3], [-1, -7, -8], [7, np.iinfo(dtype).max, np.iinfo(dtype).min]], dtype)
    rows = [[0, 6, 3], [6, 0, 0], [6, 6, 0]]
    assert numerics.gather(table, ids).tolist() == table[rows].tolist()
    wide = numerics.gather(table, ids, np.linspace(0.3, 300, 7).astype(np.float32), table_zero_point=2, out_dtype="int16")
    factor = np.linspace(0.3, 300, 7).astype(np.float32)[rows][..., None]
    assert wide.dtype == np.int16 and all(y == finished(a - 2, f, 0, "int16") for a, f, y in each(table[rows], factor, wide))
    one = numerics.gather(table, ids, np.array([0.5], np.float32), zero_point=1)
    assert one.tolist() == [[[requantize(int(a), 0.5, 1) for a in table[r]] for r in row] for row in rows]
