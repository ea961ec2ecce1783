"""Operators of ONNX Runtime's own, as its optimizers write them: equal to it on the file, recognized like what they were fused from, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_nets import OnnxNet, execute, operators

from qcompiler.base.errors import ModelError
from qcompiler.importers.model import FloatModel, load
from qcompiler.passes.graph import Graph

BATCH, ROWS, HEADS, DEPTH = 2, 8, 4, 6
WIDTH = HEADS * DEPTH
INT32, INT64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64
Net = Callable[[OnnxNet], dict[str, str]]  # -> what an output shows -> its tensor


def ms(net: OnnxNet, op: str, *inputs: str, **more: Any) -> Any:
    return net.op(op, *inputs, domain="com.microsoft", **more)


def compared(path: Path, feeds: dict[str, np.ndarray] | None = None, names: dict[str, str] | None = None) -> FloatModel:
    """Every output against ONNX Runtime, at 110 dB at least. feeds: of inputs that are not random floats."""
    runtime = pytest.importorskip("onnxruntime")
    model, rng = load(path), np.random.default_rng(1)
    given = {i.name: (feeds or {}).get(i.name, rng.standard_normal(i.shape)).astype(i.dtype) for i in model.inputs}
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted, found = session.run(None, given), execute(model.module, given)
    assert list(found) == [o.name for o in session.get_outputs()]
    what = {tensor: name for name, tensor in (names or {}).items()}
    for (name, a), b in zip(found.items(), wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, what.get(name, name)
        noise, signal = (float((np.asarray(x, np.float64) ** 2).sum()) for x in (a.astype(np.float64) - b, b))
        assert noise <= 1e-11 * signal, f"{what.get(name, name)}: {10 * np.log10(signal / noise):.0f} dB"
    return model


def check(tmp_path: Path, make: Net, feeds: dict[str, np.ndarray] | None = None) -> FloatModel:
    net = OnnxNet(17)
    names = make(net)
    return compared(net.save(tmp_path / "net.onnx", list(names.values())), feeds, names)


# -- one element, one layer, one row ----------------------------------------------------------------------------------------------------


def pointwise(net: OnnxNet) -> dict[str, str]:
    x, skip = net.input("x", BATCH, ROWS, WIDTH), net.input("skip", ROWS, WIDTH)
    gamma, beta, bias = (net.weight(WIDTH, spread=1.0) for _ in range(3))
    both = ms(net, "SkipLayerNormalization", x, x, gamma, beta, bias, outputs=4, epsilon=1e-5)
    net.nodes[-1].output[1:3] = ["", ""]
    simple = ms(net, "SkipSimplifiedLayerNormalization", x, x, gamma, bias, outputs=4, epsilon=1e-6)
    net.nodes[-1].output[1:3] = ["", ""]
    return {
        "QuickGelu": ms(net, "QuickGelu", x),
        "SiLU": ms(net, "QuickGelu", x, alpha=1.0),
        "BiasGelu": ms(net, "BiasGelu", x, bias),
        "FastGelu": ms(net, "FastGelu", x),
        "no bias": ms(net, "SkipLayerNormalization", x, skip, gamma, beta),
        "no beta": ms(net, "SkipLayerNormalization", x, skip, gamma),
        "no beta, bias": ms(net, "SkipLayerNormalization", x, skip, gamma, "", bias, epsilon=1e-3),
        "normalized": both[0],
        "sum": both[3],
        "simplified, no bias": ms(net, "SkipSimplifiedLayerNormalization", x, x, gamma),
        "simplified": simple[0],
        "simplified sum": simple[3],
        "SimplifiedLayerNormalization": net.op("SimplifiedLayerNormalization", x, gamma, axis=-1, epsilon=1e-5),
    }


def test_normalizations_and_activations(tmp_path: Path) -> None:
    found = operators(check(tmp_path, pointwise))
    assert (found.count("layer_norm"), found.count("rms_norm")) == (4, 3) and {"gelu", "gelu_tanh", "silu"} <= set(found)


def products(net: OnnxNet) -> dict[str, str]:
    a, b, flat = net.input("a", 3, 2, 5, 4), net.input("b", 3, 2, 4, 6), net.input("flat", 5, 4)
    x, y = net.input("x", 1, 8, 9, 7), net.input("y", 1, 6, 9, 7)
    weights, bias = net.weight(6, 8, 3, 3), net.weight(6)
    window: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    found = {
        "scaled": ms(net, "FusedMatMul", a, b, alpha=0.3),
        "turned b": ms(net, "FusedMatMul", a, net.op("Transpose", b, perm=[0, 1, 3, 2]), transB=1),
        "turned a": ms(net, "FusedMatMul", net.op("Transpose", a, perm=[0, 1, 3, 2]), b, transA=1, alpha=2.0),
        "turned batch": ms(net, "FusedMatMul", net.op("Transpose", a, perm=[2, 0, 1, 3]), b, transBatchA=1),
        "turned all": ms(net, "FusedMatMul", net.op("Transpose", a, perm=[3, 0, 1, 2]), b, transA=1, transBatchA=1),
        "weights": ms(net, "FusedMatMul", a, net.weight(7, 4), transB=1, alpha=0.5),
        "Gemm": ms(net, "FusedGemm", flat, net.weight(7, 4), net.weight(7), transB=1, activation="Relu"),
        "leaky Gemm": ms(net, "FusedGemm", flat, net.weight(4, 7), net.weight(7), activation="LeakyRelu", activation_alpha=0.2),
        "sum": ms(net, "FusedConv", x, weights, bias, y, activation="Relu", **window),
    }
    for name, numbers in (("", []), ("Relu", []), ("LeakyRelu", [0.1]), ("Clip", [-0.5, 0.7]), ("HardSigmoid", [0.3, 0.4]), ("Tanh", []), ("Sigmoid", [])):
        more = {"activation": name, **({"activation_params": numbers} if numbers else {})} if name else {}
        found[f"Conv {name}"] = ms(net, "FusedConv", x, weights, bias, **more, **window)
    return found


def test_products_and_convolutions(tmp_path: Path) -> None:
    found = operators(check(tmp_path, products))
    assert found.count("conv2d") == 1 and "leakyrelu" in found


@pytest.mark.parametrize(("bits", "zeros"), [(4, "none"), (4, "packed"), (4, "float"), (8, "packed")])
def test_weights_of_few_bits(tmp_path: Path, bits: int, zeros: str) -> None:
    """Three blocks to a row, the last not full."""
    net, k, n, block = OnnxNet(17), 40, 6, 16
    packed = net.const(net.rng.integers(0, 256, (n, 3, block * bits // 8)), "uint8")
    operands = [net.input("x", 2, 5, k), packed, net.const(net.rng.uniform(0.01, 0.1, (n, 3)))]
    if zeros == "packed":
        operands.append(net.const(net.rng.integers(0, 256, (n, -(-3 * bits // 8))), "uint8"))
    elif zeros == "float":
        operands.append(net.const(net.rng.uniform(0, 2**bits, (n, 3))))
    y = ms(net, "MatMulNBits", *operands, *([""] * (5 - len(operands))), net.weight(n), K=k, N=n, bits=bits, block_size=block)
    compared(net.save(tmp_path / "net.onnx", [y]))


@pytest.mark.parametrize("segments", [False, True])
def test_embeddings(tmp_path: Path, segments: bool) -> None:
    net = OnnxNet(17)
    ids, mask, types = (net.input(name, BATCH, ROWS, dtype=INT32) for name in ("ids", "mask", "types"))
    words, places, kinds = (net.weight(rows, WIDTH, spread=1.0) for rows in (30, ROWS + 2, 2))
    norm = [net.weight(WIDTH, spread=1.0) for _ in range(2)]
    extra = [types, words, places, kinds] if segments else ["", words, places, ""]
    y = ms(net, "EmbedLayerNormalization", ids, *extra, *norm, mask, outputs=3 if segments else 2)
    if not segments:
        net.inputs.pop()
    feeds = {"ids": net.rng.integers(0, 30, (BATCH, ROWS)), "mask": net.rng.integers(0, 2, (BATCH, ROWS)), "types": net.rng.integers(0, 2, (BATCH, ROWS))}
    assert "layer_norm" in operators(compared(net.save(tmp_path / "net.onnx", y), feeds))


# -- attention --------------------------------------------------------------------------------------------------------------------------

MASKS = {"keys": (BATCH, ROWS), "pairs": (BATCH, ROWS, ROWS), "ends": (BATCH,), "both ends": (2 * BATCH,)}
VALID = {
    "keys": np.arange(ROWS) < np.array([[5], [8]]),
    "pairs": np.random.default_rng(0).random((BATCH, ROWS, ROWS)) < 0.7,
    "ends": np.array([3, 7]),
    "both ends": np.array([6, 8, 1, 4]),
}


def of_weights(net: OnnxNet) -> dict[str, str]:
    x, bias = net.input("x", BATCH, ROWS, WIDTH), net.input("bias", 1, HEADS, ROWS, ROWS)
    w, b = net.weight(WIDTH, 3 * WIDTH), net.weight(3 * WIDTH)
    found = {"plain": ms(net, "Attention", x, w, b, num_heads=HEADS), "no bias": ms(net, "Attention", x, w, num_heads=HEADS, scale=0.2)}
    for name, shape in MASKS.items():
        mask = net.input(name, *shape, dtype=INT32)
        for causal in (0, 1):
            found[f"{name} {causal}"] = ms(net, "Attention", x, w, b, mask, num_heads=HEADS, unidirectional=causal)
    found["causal"] = ms(net, "Attention", x, w, b, num_heads=HEADS, unidirectional=1)
    found["added"] = ms(net, "Attention", x, w, b, "keys", "", bias, num_heads=HEADS, mask_filter_value=-3e38)
    other = [net.weight(WIDTH, 2 * WIDTH + 8), net.weight(2 * WIDTH + 8)]
    found["own value size"] = ms(net, "Attention", x, *other, num_heads=HEADS, qkv_hidden_sizes=[WIDTH, WIDTH, 8])
    past = net.input("past", 2, BATCH, HEADS, 3, DEPTH)
    found["past"], found["present"] = ms(net, "Attention", x, w, b, "", past, num_heads=HEADS, unidirectional=1, outputs=2)
    return found


def of_heads(net: OnnxNet) -> dict[str, str]:
    q, k, v = net.input("q", BATCH, ROWS, WIDTH), net.input("k", BATCH, 5, WIDTH), net.input("v", BATCH, 5, WIDTH)
    bias, added = net.weight(3 * WIDTH), net.input("added", BATCH, 1, ROWS, 5)
    heads = [net.input(name, BATCH, HEADS, 5, DEPTH) for name in ("hk", "hv")]
    past = [net.input(name, BATCH, HEADS, 3, DEPTH) for name in ("pk", "pv")]
    masks = {"valid keys": net.input("valid", BATCH, 5, dtype=INT32), "ends": net.input("until", BATCH, dtype=INT32)}
    found = {
        "plain": ms(net, "MultiHeadAttention", q, k, v, num_heads=HEADS),
        "bias": ms(net, "MultiHeadAttention", q, k, v, bias, num_heads=HEADS),
        "added": ms(net, "MultiHeadAttention", q, k, v, "", "", added, num_heads=HEADS, scale=0.3),
        "heads": ms(net, "MultiHeadAttention", q, *heads, num_heads=HEADS),
        "causal": ms(net, "MultiHeadAttention", q, q, q, num_heads=HEADS, unidirectional=1),
    }
    for name, mask in masks.items():
        found[name] = ms(net, "MultiHeadAttention", q, k, v, bias, mask, num_heads=HEADS)
    found["past"], found["all keys"], found["all values"] = ms(net, "MultiHeadAttention", q, k, v, "", "", "", *past, num_heads=HEADS, outputs=3)
    return found


def grouped(net: OnnxNet) -> dict[str, str]:
    depth = 16  # ONNX Runtime turns heads of such a size
    q, k, v = (net.input(name, BATCH, ROWS, count * depth) for name, count in (("q", HEADS), ("k", 2), ("v", 2)))
    packed = net.input("packed", BATCH, ROWS, (HEADS + 4) * depth)
    ends, total = net.const([ROWS - 1] * BATCH, "int32"), net.const(ROWS, "int32")
    cos, sin = (net.const(f(np.arange(20)[:, None] * 0.4 ** np.arange(depth // 2))) for f in (np.cos, np.sin))
    same: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": 2}
    places, first = net.input("places", BATCH, ROWS, dtype=INT64), net.const([3], "int64")
    four = net.input("four", BATCH, HEADS, ROWS, depth)
    found = {
        "plain": ms(net, "GroupQueryAttention", q, k, v, "", "", ends, total, **same),
        "packed": ms(net, "GroupQueryAttention", packed, "", "", "", "", ends, total, cos, sin, do_rotary=1, **same),
        "neighbours": ms(net, "GroupQueryAttention", q, k, v, "", "", ends, total, cos, sin, do_rotary=1, rotary_interleaved=1, scale=0.3, **same),
        "places": ms(net, "RotaryEmbedding", q, places, cos, sin),
        "first place": ms(net, "RotaryEmbedding", four, first, cos, sin, interleaved=1),
        "part": ms(net, "RotaryEmbedding", net.input("wide", BATCH, ROWS, 48), places, cos, sin, num_heads=2, rotary_embedding_dim=depth),
    }
    found["present"], found["keys"], found["values"] = ms(net, "GroupQueryAttention", q, k, v, "", "", ends, total, cos, sin, do_rotary=1, outputs=3, **same)
    return found


@pytest.mark.parametrize("make", [of_weights, of_heads, grouped])
def test_attention(tmp_path: Path, make: Net) -> None:
    feeds = {**VALID, "valid": VALID["keys"][:, 2:7], "until": np.array([2, 5]), "places": np.random.default_rng(0).integers(0, 20, (BATCH, ROWS))}
    model = check(tmp_path, make, feeds)
    nodes = sum("Attention" in op for _, op in set(model.sources.values()))
    assert sum("attention" in op for op in operators(model)) == nodes > 3 and not Graph.of(model.module).attrs.get("qc.near_misses")


def test_what_onnx_runtime_has_on_gpus_alone(tmp_path: Path) -> None:
    """Equal to what it was fused from, in operators of the standard."""
    net = OnnxNet(20)
    x, y, image = net.input("x", BATCH, ROWS, WIDTH), net.input("y", BATCH, ROWS, WIDTH), net.input("image", 1, 9, 7, 8)
    packed, bias, weights = net.input("packed", BATCH, ROWS, HEADS, 3, DEPTH), net.weight(WIDTH), net.weight(6, 8, 3, 3)
    left, right = net.op("Split", net.op("Add", x, bias), outputs=2, axis=2, num_outputs=2)
    parts = [net.op("Reshape", p, net.ints(BATCH, ROWS, WIDTH)) for p in net.op("Split", packed, outputs=3, axis=3, num_outputs=3)]
    conv = net.op("Conv", net.op("Transpose", image, perm=[0, 3, 1, 2]), weights, strides=[2, 2])
    pairs = [
        (ms(net, "BiasAdd", x, bias, y), net.op("Add", net.op("Add", x, bias), y)),
        (ms(net, "BiasSplitGelu", x, bias), net.op("Mul", left, net.op("Gelu", right))),
        (ms(net, "MultiHeadAttention", packed, num_heads=HEADS), ms(net, "MultiHeadAttention", *parts, num_heads=HEADS)),
        (ms(net, "NhwcConv", image, weights, strides=[2, 2]), net.op("Transpose", conv, perm=[0, 2, 3, 1])),
    ]
    model = load(net.save(tmp_path / "net.onnx", [name for pair in pairs for name in pair]))
    found = execute(model.module, {i.name: net.rng.standard_normal(i.shape).astype(i.dtype) for i in model.inputs})
    for fused, spelled in pairs:
        np.testing.assert_allclose(found[fused], found[spelled], atol=1e-5)


@pytest.mark.parametrize("per_column", [False, True])
def test_attention_quantized_dynamically(tmp_path: Path, per_column: bool) -> None:
    """ONNX Runtime rounds x to 8 bits in every run; the network taken back does not."""
    runtime = pytest.importorskip("onnxruntime")
    net, columns = OnnxNet(17), [3 * WIDTH] if per_column else []
    q, scale, zero = net.op("DynamicQuantizeLinear", net.input("x", BATCH, ROWS, WIDTH), outputs=3)
    weights, zeros = net.const(net.rng.integers(-128, 128, (WIDTH, 3 * WIDTH)), "int8"), net.const(net.rng.integers(-3, 4, columns), "int8")
    scales, mask = net.const(net.rng.uniform(0.002, 0.003, columns)), net.const([5, 8], "int32")
    y = ms(net, "QAttention", q, weights, net.weight(3 * WIDTH, spread=0.1), scale, scales, mask, zero, zeros, num_heads=HEADS)
    path = net.save(tmp_path / "net.onnx", [y])
    model, x = load(path), net.rng.standard_normal((BATCH, ROWS, WIDTH)).astype(np.float32)
    (found,), (wanted,) = execute(model.module, {"x": x}).values(), runtime.InferenceSession(str(path)).run(None, {"x": x})
    assert ((found - wanted) ** 2).sum() < 1e-3 * (wanted**2).sum()
    assert set(operators(model)) <= {"matmul", "add", "reshape", "attention_bias", "attention"}


REFUSED: dict[str, tuple[Callable[[OnnxNet, str], str], str]] = {
    "mean": (lambda net, x: ms(net, "SkipLayerNormalization", x, x, net.weight(WIDTH), outputs=2)[1], "its result 1 .*, of training, is read"),
    "activation": (
        lambda net, x: ms(net, "FusedGemm", net.op("Reshape", x, net.ints(-1, WIDTH)), net.weight(WIDTH, 3), activation="Elu"),
        "its activation is 'Elu'",
    ),
    "mask": (
        lambda net, x: ms(net, "Attention", x, net.weight(WIDTH, 3 * WIDTH), "", net.const(np.ones((1, 1, 9, 9)), "int32"), num_heads=HEADS),
        r"its mask has shape \[1, 1, 9, 9\]; supported: \[2\]",
    ),
    "lengths": (
        lambda net, x: ms(
            net, "MultiHeadAttention", x, x, x, "", "", "", *(net.weight(BATCH, HEADS, 3, DEPTH) for _ in "kv"), net.const([3], "int32"), num_heads=HEADS
        ),
        r"operand 8 \('.*'\), the length of a shared buffer, is not supported",
    ),
    "unknown": (lambda net, x: ms(net, "LongformerAttention", x), "operator 'com.microsoft::LongformerAttention' is not one"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_named(tmp_path: Path, what: str) -> None:
    make, reason = REFUSED[what]
    net = OnnxNet(17)
    y = make(net, net.input("x", BATCH, ROWS, WIDTH))
    with pytest.raises(ModelError, match=reason):
        load(net.save(tmp_path / "net.onnx", [y]))


def test_layouts_of_one_machine_are_refused_with_the_way_back(tmp_path: Path) -> None:
    """The file that ONNX Runtime itself saves at its highest level, where that has blocks of channels for this processor."""
    runtime = pytest.importorskip("onnxruntime")
    net, options = OnnxNet(17), runtime.SessionOptions()
    y = net.op("Relu", net.op("Conv", net.input("x", 1, 16, 8, 8), net.weight(16, 16, 3, 3), pads=[1, 1, 1, 1]))
    path, saved = net.save(tmp_path / "net.onnx", [net.op("MaxPool", y, kernel_shape=[2, 2])]), tmp_path / "saved.onnx"
    for level in ("ORT_ENABLE_ALL", "ORT_ENABLE_EXTENDED"):
        options.optimized_model_filepath = str(saved)
        options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
        runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        if any(node.domain == "com.microsoft.nchwc" for node in onnx.load(saved).graph.node):
            assert level == "ORT_ENABLE_ALL"
            with pytest.raises(
                ModelError, match=r"nodes have images in a layout .* \(com.microsoft.nchwc\)\. .*save the optimized one at ORT_ENABLE_EXTENDED or below"
            ):
                load(saved)
        else:
            load(saved)
