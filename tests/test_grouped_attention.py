"""GroupQueryAttention with a cache, as decoders of ONNX Runtime's generator have it: equal to ONNX Runtime, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from onnx_nets import OnnxNet, execute, operators

import qcompiler
from qcompiler.base.errors import ModelError
from qcompiler.importers.model import load
from qcompiler.passes.graph import Graph

HEADS, GROUPS, DEPTH = 4, 2, 16
INT32, INT64 = TensorProto.INT32, TensorProto.INT64
Feeds = dict[str, np.ndarray]


def ms(net: OnnxNet, op: str, *inputs: str, **more: Any) -> Any:
    return net.op(op, *inputs, domain="com.microsoft", **more)


def tables(net: OnnxNet, depth: int = DEPTH) -> list[str]:
    return [net.const(f(np.arange(40)[:, None] * 0.4 ** np.arange(depth // 2))) for f in (np.cos, np.sin)]


def session_of(path: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def attended(
    net: OnnxNet, batch: int, rows: int, past: int, total: int, ends: list[int], feeds: Feeds, packed: bool = False, known: bool = False,
    bias: bool = False, sink: bool = False, places: bool = False, **attrs: Any,
) -> Any:  # fmt: skip
    """ends: the last key of each sequence; known: they are a constant. The results of the node."""
    tag = f"{len(net.nodes)}"
    q = net.input(f"q{tag}", batch, rows, ((HEADS + 2 * GROUPS) if packed else HEADS) * DEPTH)
    k, v = ("", "") if packed else (net.input(f"{what}{tag}", batch, rows, GROUPS * DEPTH) for what in "kv")
    cache = [net.input(f"past-{what}{tag}", batch, GROUPS, past, DEPTH) for what in "kv"]
    if known:
        end = net.const(ends, "int32")
    else:
        end = net.input(f"ends{tag}", batch, dtype=INT32)
        feeds[end] = np.array(ends, np.int32)
    own = ""
    if places:
        own = net.input(f"places{tag}", batch, rows, dtype=INT64)
        feeds[own] = np.array(ends)[:, None] + 1 - rows + np.arange(rows)
    more = [own, net.input(f"bias{tag}", 1, HEADS, rows, total) if bias else "", net.weight(HEADS, spread=1.0) if sink else ""]
    angles = tables(net) if attrs.get("do_rotary") else ["", ""]
    return ms(
        net, "GroupQueryAttention", q, k, v, *cache, end, net.const(total, "int32"), *angles, *more, outputs=3, num_heads=HEADS, kv_num_heads=GROUPS, **attrs
    )


# batch, rows, past, keys in all, last keys, and the rest
CASES: dict[str, list[tuple[Any, ...]]] = {
    "growing": [
        (2, 1, 5, 6, [5, 3], {"do_rotary": 1}),
        (2, 1, 5, 6, [5, 3], {"known": True, "packed": True}),
        (2, 1, 5, 6, [5, 5], {"known": True, "do_rotary": 1, "rotary_interleaved": 1, "packed": True}),
    ],
    "a buffer": [
        (2, 1, 16, 9, [7, 8], {"do_rotary": 1, "packed": True, "places": True}),
        (2, 1, 16, 16, [10, 2], {"do_rotary": 1, "local_window_size": 3}),
        (1, 4, 16, 4, [3], {"local_window_size": 1}),
        (1, 4, 16, 9, [8], {"known": True, "bias": True}),
    ],
    "logits": [
        (1, 3, 8, 11, [10], {"bias": True, "scale": 0.3}),
        (1, 3, 8, 11, [10], {"causal": 0}),
        (1, 3, 8, 11, [10], {"smooth_softmax": 1, "bias": True}),
        (1, 3, 8, 11, [10], {"sink": True, "local_window_size": 4}),
    ],
    "cap": [(1, 3, 8, 11, [10], {"softcap": 1.5, "sink": True, "bias": True, "local_window_size": 3})],
}


@pytest.mark.parametrize("what", CASES)
def test_every_form_is_what_onnx_runtime_computes(tmp_path: Path, what: str) -> None:
    """Presents are compared as far as a sequence reaches: what is behind it, ONNX Runtime leaves open."""
    net, feeds, ports, rng = OnnxNet(17), Feeds(), list[Any](), np.random.default_rng(0)
    for batch, rows, past, total, ends, more in CASES[what]:
        ports.append((ends, attended(net, batch, rows, past, total, ends, feeds, **more)))
    path = net.save(tmp_path / "net.onnx", [name for _, names in ports for name in names])
    model, session = load(path), session_of(path)
    feeds |= {i.name: rng.standard_normal(i.shape).astype(np.float32) for i in model.inputs if i.name not in feeds}
    found = execute(model.module, feeds)
    wanted = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    for i, (ends, (result, *presents)) in enumerate(ports):
        np.testing.assert_allclose(found[result], wanted[result], atol=2e-6, err_msg=str(CASES[what][i]))
        for name in presents:
            assert found[name].shape == wanted[name].shape
            for row, end in enumerate(ends):
                np.testing.assert_allclose(found[name][row, :, : end + 1], wanted[name][row, :, : end + 1], atol=1e-6, err_msg=str(CASES[what][i]))
    assert sum("attention" in op for op in operators(model)) == (0 if what == "cap" else len(CASES[what]))


def test_norms_of_queries_and_keys(tmp_path: Path) -> None:
    """ONNX Runtime has them on GPUs alone: equal to the normalizations that they were fused from."""
    net = OnnxNet(17)
    q, k, v = (net.input(name, 1, 3, count * DEPTH) for name, count in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)))
    cache, end, norms = [net.input(f"past-{w}", 1, GROUPS, 5, DEPTH) for w in "kv"], net.const([7], "int32"), [net.weight(DEPTH, spread=1.0) for _ in "qk"]
    rest, same = [*cache, end, net.const(8, "int32"), *tables(net)], {"num_heads": HEADS, "kv_num_heads": GROUPS, "do_rotary": 1, "outputs": 3}

    def normed(x: str, gamma: str, heads: int) -> str:
        y = net.op("SimplifiedLayerNormalization", net.op("Reshape", x, net.ints(1, 3, heads, DEPTH)), gamma, axis=-1, epsilon=1e-5)
        return net.op("Reshape", y, net.ints(1, 3, heads * DEPTH))

    fused = ms(net, "GroupQueryAttention", q, k, v, *rest, "", "", "", "", "", *norms, qk_norm_epsilon=1e-5, **same)
    spelled = ms(net, "GroupQueryAttention", normed(q, norms[0], HEADS), normed(k, norms[1], GROUPS), v, *rest, **same)
    model = load(net.save(tmp_path / "net.onnx", [*fused, *spelled]))
    found = execute(model.module, {i.name: net.rng.standard_normal(i.shape).astype(np.float32) for i in model.inputs})
    for a, b in zip(fused, spelled, strict=True):
        np.testing.assert_allclose(found[a], found[b], atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "total": ({"total": 20}, "it has 20 keys in all, and 8 places of the past beside 1 new ones"),
    "window": ({"local_window_size": 0}, "it has a window of 0 keys"),
    "cache": ({"sliding_window_cache": 1}, "sliding_window_cache 1 is not supported"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_named(tmp_path: Path, what: str) -> None:
    more, reason = REFUSED[what]
    net = OnnxNet(17)
    path = net.save(tmp_path / "net.onnx", attended(net, 1, 1, 8, **{"total": 9, "ends": [8], "feeds": {}, **more}))
    with pytest.raises(ModelError, match=reason):
        load(path)


def test_a_count_of_keys_that_is_an_input_is_fixed_by_its_value(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x, total = net.input("x", 1, 1, HEADS * DEPTH), net.input("total", dtype=INT32)
    operands = [x, x, x, *(net.input(f"past-{w}", 1, HEADS, 8, DEPTH) for w in "kv"), net.input("ends", 1, dtype=INT32), total]
    path = net.save(tmp_path / "net.onnx", [ms(net, "GroupQueryAttention", *operands, num_heads=HEADS, kv_num_heads=HEADS)])
    with pytest.raises(ModelError, match=r"its count of all keys, .* \(operand 'total'\) is computed at run time"):
        load(path)
    assert "attention_bias" in operators(load(path, input_values={"total": 8}))


# -- a decoder --------------------------------------------------------------------------------------------------------------------------

WORDS, WIDTH, LAYERS = 50, 32, 2


def decoder(path: Path) -> Path:
    """Two layers as ONNX Runtime's generator writes them; lengths are symbolic, and follow from the mask."""
    net = OnnxNet(17)
    ids, mask = net.input("input_ids", 1, "rows", dtype=INT64), net.input("attention_mask", 1, "all", dtype=INT64)
    ends = net.op("Cast", net.op("Sub", net.op("ReduceSum", mask, net.ints(1), keepdims=0), net.const(1, "int64")), to=INT32)
    total = net.op("Cast", net.op("Gather", net.op("Shape", mask), net.const(1, "int64"), axis=0), to=INT32)
    x, skip, presents = net.op("Gather", net.weight(WORDS, WIDTH, spread=1.0), ids), "", list[str]()
    angles = tables(net, DEPTH)
    for layer in range(LAYERS):
        gamma = net.const(net.rng.uniform(0.8, 1.2, WIDTH))
        if layer == 0:
            y = net.op("SimplifiedLayerNormalization", x, gamma, axis=-1, epsilon=1e-5)
        else:
            y, _, _, x = ms(net, "SkipSimplifiedLayerNormalization", x, skip, gamma, outputs=4, epsilon=1e-5)
            net.nodes[-1].output[1:3] = ["", ""]
        qkv = net.op("MatMul", y, net.weight(WIDTH, (2 + 2) * DEPTH, spread=WIDTH**-0.5))
        past = [net.input(f"past_key_values.{layer}.{what}", 1, 1, "past", DEPTH) for what in ("key", "value")]
        y, *_ = ms(
            net, "GroupQueryAttention", qkv, "", "", *past, ends, total, *angles, outputs=3, num_heads=2, kv_num_heads=1, do_rotary=1
        )  # fmt: skip
        presents += (own := [f"present.{layer}.{what}" for what in ("key", "value")])
        net.nodes[-1].output[1:] = own
        y = net.op("MatMul", y, net.weight(WIDTH, WIDTH, spread=WIDTH**-0.5))
        y, _, _, x = ms(net, "SkipSimplifiedLayerNormalization", x, y, net.const(net.rng.uniform(0.8, 1.2, WIDTH)), outputs=4, epsilon=1e-5)
        net.nodes[-1].output[1:3] = ["", ""]
        gate, up = (net.op("MatMul", y, net.weight(WIDTH, 48, spread=WIDTH**-0.5)) for _ in range(2))
        skip = net.op("MatMul", net.op("Mul", net.op("Mul", gate, net.op("Sigmoid", gate)), up), net.weight(48, WIDTH, spread=48**-0.5))
    last = ms(net, "SkipSimplifiedLayerNormalization", x, skip, net.const(np.ones(WIDTH)), epsilon=1e-5)
    logits = net.op("MatMul", last, net.weight(WIDTH, WORDS, spread=WIDTH**-0.5))
    return net.save(path, [logits, *presents])


CACHE = [f"{layer}.{what}" for layer in range(LAYERS) for what in ("key", "value")]


def shapes(rows: int, past: int, total: int) -> dict[str, tuple[int, ...]]:
    return {"input_ids": (1, rows), "attention_mask": (1, total), **{f"past_key_values.{c}": (1, 1, past, DEPTH) for c in CACHE}}


def first(rows: int, room: int, words: np.ndarray, done: int, cache: list[np.ndarray]) -> Feeds:
    """`rows` words from place `done` on, and a mask that is `room` long."""
    feeds = {"input_ids": words[None, done : done + rows], "attention_mask": (np.arange(room) < done + rows).astype(np.int64)[None]}
    return feeds | {f"past_key_values.{c}": x for c, x in zip(CACHE, cache, strict=True)}


def test_a_decoder_keeps_its_cache_in_a_buffer(tmp_path: Path) -> None:
    """Every step is of the same shapes, so the cache is a state like any other; ONNX Runtime runs the same steps."""
    room, rows, steps, rng = 12, 3, 4, np.random.default_rng(0)
    path, words = decoder(tmp_path / "net.onnx"), rng.integers(0, WORDS, 20)
    session, model = session_of(path), load(path, shapes(rows, room, room), state={f"past_key_values.{c}": f"present.{c}" for c in CACHE})
    caches = [[np.zeros((1, 1, room, DEPTH), np.float32)] * len(CACHE)] * 2
    for step in range(steps):
        for which, run in enumerate((lambda f: list(execute(model.module, f).values()), lambda f: session.run(None, f))):
            logits, *caches[which] = run(first(rows, room, words, step * rows, caches[which]))
            if which == 0:
                mine = logits
        np.testing.assert_allclose(mine, logits, atol=1e-4)
    assert not Graph.of(model.module).attrs.get("qc.near_misses") and operators(model).count("attention_bias") == LAYERS


def test_a_cache_that_grows(tmp_path: Path) -> None:
    path, rng = decoder(tmp_path / "net.onnx"), np.random.default_rng(0)
    feeds = first(1, 5, rng.integers(0, WORDS, 20), 4, [rng.standard_normal((1, 1, 4, DEPTH)).astype(np.float32) for _ in CACHE])
    found = execute(load(path, shapes(1, 4, 5)).module, feeds)
    for a, b in zip(found.values(), session_of(path).run(None, feeds), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_decoder_in_int8_follows_its_float_form(tmp_path: Path) -> None:
    """Over steps that each go on from the cache that the library itself has left."""
    room, rng = 12, np.random.default_rng(0)
    path, words = decoder(tmp_path / "net.onnx"), rng.integers(0, WORDS, (12, room))
    session, samples = session_of(path), list[Feeds]()
    for row in words:
        cache = [np.zeros((1, 1, room, DEPTH), np.float32)] * len(CACHE)
        for done in range(room - 2):
            samples.append(first(1, room, row, done, cache))
            _, *cache = session.run(None, samples[-1])
    artifact = qcompiler.compile(path, calibration=samples, input_shapes=shapes(1, room, room), preset="fast")
    library, near = qcompiler.Session(artifact.save(tmp_path / "net.so")), list[float]()
    caches = [[np.zeros((1, 1, room, DEPTH), np.float32)] * len(CACHE)] * 2
    for done in range(8):
        found = library.run(first(1, room, words[0], done, caches[0]))
        wanted, *caches[1] = session.run(None, first(1, room, words[0], done, caches[1]))
        mine, caches[0] = found[artifact.manifest["outputs"][0]["name"]], [found[f"present.{c}"] for c in CACHE]
        near.append(float(((mine - wanted) ** 2).sum() / (wanted**2).sum()))
    assert max(near) < 0.05, near
