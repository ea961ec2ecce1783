"""Attention as exporters write it: recognized, equal to ONNX Runtime on the file, and named where it is not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_nets import OnnxNet, agrees, operators

from qcompiler.base.errors import ModelError
from qcompiler.importers.model import FloatModel, load
from qcompiler.passes.graph import Graph, const_value, is_const, relax_op, shape_of
from qcompiler.passes.groups import find_groups

BATCH, ROWS, HEADS, DEPTH = 2, 8, 4, 6
WIDTH = HEADS * DEPTH
LOWEST = float(np.finfo(np.float32).min)
Parts = tuple[str, str, str]
Mask = Callable[[OnnxNet, str], str]  # (net, logits) -> masked logits


def heads(net: OnnxNet, x: str, perm: tuple[int, ...] = (0, 2, 1, 3)) -> str:
    return str(net.op("Transpose", net.op("Reshape", x, net.ints(BATCH, -1, HEADS, DEPTH)), perm=list(perm)))


def three_projections(net: OnnxNet, x: str) -> Parts:
    """Hugging Face's BERT, DistilBERT, RoBERTa, ViT, DeiT: k is permuted at once."""
    q, k, v = (net.op("Add", net.weight(WIDTH), net.op("MatMul", x, net.weight(WIDTH, WIDTH))) for _ in range(3))
    return heads(net, q), heads(net, k, (0, 2, 3, 1)), heads(net, v)


def packed(how: str) -> Callable[[OnnxNet, str], Parts]:
    """One projection, taken apart by Split (GPT-2), or as [3, B, H, S, D] by Gather or Slice (timm)."""

    def make(net: OnnxNet, x: str) -> Parts:
        y = net.op("Add", net.op("MatMul", x, net.weight(WIDTH, 3 * WIDTH)), net.weight(3 * WIDTH))
        if how == "Split":
            q, k, v = (heads(net, part) for part in net.op("Split", y, net.ints(WIDTH, WIDTH, WIDTH), outputs=3, axis=2))
        else:
            y = net.op("Transpose", net.op("Reshape", y, net.ints(BATCH, ROWS, 3, HEADS, DEPTH)), perm=[2, 0, 3, 1, 4])
            if how == "Gather":
                q, k, v = (net.op("Gather", y, net.const(i, "int64"), axis=0) for i in range(3))
            else:
                parts = [net.op("Slice", y, net.ints(i), net.ints(i + 1), net.ints(0)) for i in range(3)]
                q, k, v = (net.op("Squeeze", p, net.ints(0)) for p in parts)
        return q, str(net.op("Transpose", k, perm=[0, 1, 3, 2])), v

    return make


def exported_sdpa(net: OnnxNet, x: str) -> Parts:
    """The newer exporter of PyTorch: k is transposed as [B * H, S, D], and q and k both take the root of the scale."""
    q, _, v = three_projections(net, x)
    k = net.op("Reshape", heads(net, net.op("MatMul", x, net.weight(WIDTH, WIDTH))), net.ints(-1, ROWS, DEPTH))
    k = net.op("Reshape", net.op("Transpose", k, perm=[0, 2, 1]), net.ints(BATCH, HEADS, DEPTH, ROWS))
    root = net.const(DEPTH**-0.25)
    return str(net.op("Mul", q, root)), str(net.op("Mul", k, root)), v


def scaled_query(net: OnnxNet, x: str) -> Parts:
    """Whisper and OPT: the projection is scaled before it is taken apart into heads."""
    q = heads(net, net.op("Mul", net.op("Add", net.op("MatMul", x, net.weight(WIDTH, WIDTH)), net.weight(WIDTH)), net.const(DEPTH**-0.5)))
    _, k, v = three_projections(net, x)
    return q, k, v


def block(net: OnnxNet, x: str, parts: Parts, *middle: Mask, guard: bool = False) -> str:
    """The rest of an attention block; a residual and a dense layer follow."""
    q, k, v = parts
    logits = net.op("MatMul", q, k)
    for step in middle:
        logits = step(net, logits)
    p = net.op("Softmax", logits, axis=-1)
    if guard:
        p = net.op("Where", net.op("IsNaN", p), net.const(0.0), p)
    y = net.op("Reshape", net.op("Transpose", net.op("MatMul", p, v), perm=[0, 2, 1, 3], name="mixed"), net.ints(BATCH, ROWS, WIDTH))
    return str(net.op("Add", x, net.op("MatMul", y, net.weight(WIDTH, WIDTH))))


def times(value: float, op: str = "Mul") -> Mask:
    return lambda net, logits: net.op(op, logits, net.const(value))


def integers(net: OnnxNet) -> str:
    return net.input("attention_mask", BATCH, ROWS, dtype=onnx.TensorProto.INT64)


def added_from_integers(lowest: float) -> Mask:
    """(1 - attention_mask) * lowest, as BERT and its kin compute it."""

    def make(net: OnnxNet, logits: str) -> str:
        m = net.op("Cast", net.op("Unsqueeze", integers(net), net.ints(1, 2)), to=onnx.TensorProto.FLOAT)
        return str(net.op("Add", logits, net.op("Mul", net.op("Sub", net.const(1.0), m), net.const(lowest))))

    return make


def expanded(net: OnnxNet, logits: str) -> str:
    """The mask functions of Hugging Face: a boolean for every query, by a gather of the flattened mask and a logical and with what is always true."""
    flat = net.op("Reshape", net.op("Cast", integers(net), to=onnx.TensorProto.BOOL), net.ints(BATCH * ROWS))
    index = np.arange(BATCH * ROWS).reshape(BATCH, 1, 1, ROWS)
    everywhere = net.const(np.ones((1, 1, ROWS, 1)), "bool")
    m = net.op("And", everywhere, net.op("Gather", flat, net.const(index, "int64"), axis=0))
    return str(net.op("Add", logits, net.op("Where", m, net.const(0.0), net.const(LOWEST))))


def filled_in(fill: float) -> Mask:
    """masked_fill(mask == 0, fill), as DistilBERT has it."""

    def make(net: OnnxNet, logits: str) -> str:
        m = net.op("Unsqueeze", net.op("Equal", integers(net), net.const(0, "int64")), net.ints(1, 2))
        return str(net.op("Where", net.op("Expand", m, net.ints(BATCH, HEADS, ROWS, ROWS)), net.const(fill), logits))

    return make


def boolean(net: OnnxNet, logits: str) -> str:
    m = net.input("m", BATCH, 1, ROWS, ROWS, dtype=onnx.TensorProto.BOOL)
    return str(net.op("Add", logits, net.op("Where", m, net.const(0.0), net.const(-math.inf))))


def causal(net: OnnxNet, logits: str) -> str:
    keep = net.const(np.tri(ROWS, dtype=bool)[None, None], "bool")
    return str(net.op("Where", keep, logits, net.const(LOWEST)))


def windows(net: OnnxNet, logits: str) -> str:
    """Swin: relative positions per head, then a mask per window in a view of five axes."""
    logits = net.op("Add", logits, net.weight(1, HEADS, ROWS, ROWS))
    view = net.op("Reshape", logits, net.ints(1, BATCH, HEADS, ROWS, ROWS))
    mask = np.where(net.rng.random((1, BATCH, 1, ROWS, ROWS)) < 0.3, -100.0, 0.0)
    return str(net.op("Reshape", net.op("Add", view, net.const(mask)), net.ints(BATCH, HEADS, ROWS, ROWS)))


def of_heads(net: OnnxNet, logits: str) -> str:
    """Swin 2: a learned scale per head."""
    return str(net.op("Mul", logits, net.const(net.rng.uniform(1, 3, (HEADS, 1, 1)))))


SCALE = times(DEPTH**-0.5)
FORMS: dict[str, tuple[Callable[[OnnxNet, str], Parts], tuple[Mask, ...]]] = {
    "eager": (three_projections, (SCALE,)),
    "divided": (three_projections, (times(DEPTH**0.5, "Div"),)),
    "both scaled": (exported_sdpa, ()),
    "query scaled": (scaled_query, ()),
    "unscaled": (three_projections, ()),
    "split": (packed("Split"), (SCALE,)),
    "gather": (packed("Gather"), (SCALE,)),
    "slice": (packed("Slice"), (SCALE,)),
    "integer mask": (three_projections, (SCALE, added_from_integers(-1e4))),
    "float minimum": (three_projections, (SCALE, added_from_integers(LOWEST))),
    "expanded mask": (three_projections, (SCALE, expanded)),
    "filled in": (three_projections, (SCALE, filled_in(-1e9))),
    "filled with minus infinity": (three_projections, (SCALE, filled_in(-math.inf))),
    "boolean mask": (exported_sdpa, (boolean,)),
    "causal": (packed("Split"), (SCALE, causal)),
    "causal and integer mask": (packed("Split"), (SCALE, causal, added_from_integers(LOWEST))),
    "mask before scale": (three_projections, (added_from_integers(-1e5), SCALE)),
    "windows": (three_projections, (SCALE, windows)),
    "scale per head": (three_projections, (of_heads,)),
}


def only_attention(model: FloatModel) -> Any:
    found = [(n, e) for n, e in Graph.of(model.module).bindings if "attention" in str(relax_op(e))]
    assert len(found) == 1 and "softmax" not in operators(model), operators(model)
    return found[0]


@pytest.mark.parametrize("guard", [False, True], ids=["plain", "guarded"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: Path, form: str, guard: bool) -> None:
    net = OnnxNet(17)
    x = net.input("x", BATCH, ROWS, WIDTH)
    parts, middle = FORMS[form]
    model = agrees(net.save(tmp_path / "net.onnx", [block(net, x, parts(net, x), *middle, guard=guard)]))
    name, expr = only_attention(model)
    assert [shape_of(a) for a in expr.args[:3]] == [(BATCH, ROWS, HEADS, DEPTH)] * 3
    assert name.startswith("mixed"), "it is called as the tensor of the file that holds the same value"
    assert operators(model).count("permute_dims") <= (form in ("gather", "slice")) * 3, "heads are read where the projections leave them"
    group = next(g for g in find_groups(model.module) if g.id == name)
    assert group.kind == "attention" and group.reason is None


@pytest.mark.parametrize(("form", "shape"), [("integer mask", (BATCH, 1, 1, ROWS)), ("expanded mask", (BATCH, 1, 1, ROWS)), ("filled in", (BATCH, 1, 1, ROWS))])
def test_a_mask_of_keys_stays_one_row_and_is_computed_once(tmp_path: Path, form: str, shape: tuple[int, ...]) -> None:
    net = OnnxNet(17)
    x = net.input("x", BATCH, ROWS, WIDTH)
    parts, (scale, mask) = FORMS[form]
    kept: list[str] = []

    def shared(net: OnnxNet, logits: str) -> str:
        """The second layer reads what the first one added."""
        if not kept:
            masked = mask(net, logits)
            kept.extend(i for i in net.nodes[-1].input if i != logits)
            return masked
        node = next(n for n in net.nodes if n.op_type in ("Add", "Where") and set(kept) <= set(n.input))
        return str(net.op(node.op_type, *(i if i in kept else logits for i in node.input)))

    for _ in range(2):
        x = block(net, x, parts(net, x), scale, shared)
    model = agrees(net.save(tmp_path / "net.onnx", [x]))
    biases = [e.args[3] for _, e in Graph.of(model.module).bindings if "attention" in str(relax_op(e))]
    assert len(biases) == 2 and biases[0].same_as(biases[1]) and shape_of(biases[0]) == shape


def test_constant_masks_are_one_constant(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x = net.input("x", BATCH, ROWS, WIDTH)
    model = agrees(net.save(tmp_path / "net.onnx", [block(net, x, three_projections(net, x), SCALE, causal, windows)]))
    bias = only_attention(model)[1].args[3]
    assert is_const(bias) and const_value(bias).shape == (BATCH, HEADS, ROWS, ROWS)


@pytest.mark.parametrize("masked", [False, True])
def test_batches_and_heads_on_one_axis(tmp_path: Path, masked: bool) -> None:
    """nn.MultiheadAttention and BART: [B * H, S, D]; the mask is added in a view of four axes."""
    net = OnnxNet(17)
    x = net.input("x", BATCH, ROWS, WIDTH)
    q, k, v = (heads(net, net.op("MatMul", x, net.weight(WIDTH, WIDTH))) for _ in range(3))
    q, k, v = (net.op("Reshape", p, net.ints(BATCH * HEADS, ROWS, DEPTH)) for p in (q, k, v))
    logits = net.op("MatMul", net.op("Mul", q, net.const(0.4)), net.op("Transpose", k, perm=[0, 2, 1]))
    if masked:
        view = added_from_integers(LOWEST)(net, net.op("Reshape", logits, net.ints(BATCH, HEADS, ROWS, ROWS)))
        logits = net.op("Reshape", view, net.ints(BATCH * HEADS, ROWS, ROWS))
    y = net.op("MatMul", net.op("Softmax", logits, axis=2), v)
    y = net.op("Transpose", net.op("Reshape", y, net.ints(BATCH, HEADS, ROWS, DEPTH)), perm=[0, 2, 1, 3])
    model = agrees(net.save(tmp_path / "net.onnx", [net.op("Reshape", y, net.ints(BATCH, ROWS, WIDTH))]))
    _, expr = only_attention(model)
    assert shape_of(expr) == (BATCH, ROWS, HEADS, DEPTH) and "permute_dims" not in operators(model)


def test_softmax_of_old_operator_sets(tmp_path: Path) -> None:
    """Below set 13 an axis means all axes from there on."""
    net = OnnxNet(12)
    x = net.input("x", BATCH, ROWS, WIDTH)
    q, k, v = three_projections(net, x)
    p = net.op("Softmax", SCALE(net, net.op("MatMul", q, k)), axis=3)
    other = net.op("MatMul", net.op("Softmax", net.op("MatMul", q, k), axis=2), v)
    model = agrees(net.save(tmp_path / "net.onnx", [net.op("MatMul", p, v), other]))
    assert operators(model).count("softmax") == operators(model).count("attention") == 1


def test_images_without_a_batch_axis(tmp_path: Path) -> None:
    """One head over positions: q [S, D]."""
    net = OnnxNet(17)
    x = net.input("x", ROWS, WIDTH)
    q, k, v = (net.op("MatMul", x, net.weight(WIDTH, WIDTH)) for _ in range(3))
    p = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[1, 0])), axis=-1)
    only_attention(agrees(net.save(tmp_path / "net.onnx", [net.op("MatMul", p, v)])))


# -- ONNX Attention ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("attrs", [{}, {"is_causal": 1}, {"scale": 0.7}])
@pytest.mark.parametrize("mask", [None, "bool", "float32"])
@pytest.mark.parametrize("shared", [1, 2])
def test_operator_of_set_23(tmp_path: Path, packed: bool, attrs: dict[str, Any], mask: str | None, shared: int) -> None:
    net = OnnxNet(23)
    kv = HEADS // shared
    if packed:
        q, k, v = net.input("q", BATCH, ROWS, WIDTH), net.input("k", BATCH, 11, kv * DEPTH), net.input("v", BATCH, 11, kv * 5)
        attrs = {**attrs, "q_num_heads": HEADS, "kv_num_heads": kv}
    else:
        q, k, v = net.input("q", BATCH, HEADS, ROWS, DEPTH), net.input("k", BATCH, kv, 11, DEPTH), net.input("v", BATCH, kv, 11, 5)
    operands = [q, k, v]
    if mask is not None:
        value = net.rng.random((ROWS, 11)) < 0.7 if mask == "bool" else net.rng.standard_normal((ROWS, 11))
        value[:, 0] = 1
        operands.append(net.const(value, mask))
    only_attention(agrees(net.save(tmp_path / "net.onnx", [net.op("Attention", *operands, **attrs)])))


@pytest.mark.parametrize(("packed", "past"), [(True, 3), (False, 3), (False, 0)])
def test_a_past_stands_before_the_new_keys(tmp_path: Path, packed: bool, past: int) -> None:
    """Both are results too, and the attention is one operator still."""
    net, kv = OnnxNet(23), HEADS // 2
    counts = {"q": HEADS, "k": kv, "v": kv}
    operands = [net.input(n, BATCH, ROWS, count * DEPTH) if packed else net.input(n, BATCH, count, ROWS, DEPTH) for n, count in counts.items()]
    mask = net.const(net.rng.standard_normal((ROWS, past + ROWS)))
    cache = [net.input(n, BATCH, kv, past, DEPTH) for n in ("pk", "pv")] if past else []
    attrs = {"is_causal": 1, **({"q_num_heads": HEADS, "kv_num_heads": kv} if packed else {})}
    found = net.op("Attention", *operands, mask, *cache, outputs=3, **attrs)
    model = agrees(net.save(tmp_path / "net.onnx", [found[0], *(net.op("Neg", name) for name in found[1:])]))
    assert operators(model).count("attention_bias") == 1 and "softmax" not in operators(model)


@pytest.mark.parametrize(("q", "k"), [(0, 0), (4, 0), (-4, 2)])
def test_no_heads_are_refused_by_the_node_of_the_file(q: int, k: int, tmp_path: Path) -> None:
    net = OnnxNet(23)
    path = net.save(tmp_path / "net.onnx", [net.op("Attention", *(net.input(n, BATCH, ROWS, WIDTH) for n in "qkv"), q_num_heads=q, kv_num_heads=k)])
    with pytest.raises(ModelError, match=rf"\(Attention\): it states {q} query heads and {k} key heads; at least one of each is needed"):
        load(path)


def test_a_soft_cap_is_computed_and_named(tmp_path: Path) -> None:
    net = OnnxNet(23)
    operands = [net.input(n, BATCH, HEADS, ROWS, DEPTH) for n in "qkv"]
    model = agrees(net.save(tmp_path / "net.onnx", [net.op("Attention", *operands, softcap=3.0)]))
    assert "softmax" in operators(model)
    (reason,) = Graph.of(model.module).attrs["qc.near_misses"].values()
    assert reason == "no attention: operator 'tanh' stands between its softmax and the product of queries and keys"


# -- what is no attention ---------------------------------------------------------------------------------------------------------------


def not_last(net: OnnxNet, x: str) -> str:
    q, k, v = three_projections(net, x)
    return str(net.op("MatMul", net.op("Softmax", net.op("MatMul", q, k), axis=2), v))


def weighted(net: OnnxNet, x: str) -> str:
    q, k, v = three_projections(net, x)
    return str(net.op("MatMul", net.op("Mul", net.op("Softmax", net.op("MatMul", q, k), axis=-1), net.weight(HEADS, 1, 1)), v))


def pooled(net: OnnxNet, x: str) -> str:
    """Attention pooling with learned logits: a dense layer, no product of queries and keys."""
    p = net.op("Softmax", net.op("Transpose", net.op("Relu", net.op("MatMul", x, net.weight(WIDTH, 3))), perm=[0, 2, 1]), axis=-1)
    return str(net.op("MatMul", p, x))


def weakly_masked(net: OnnxNet, x: str) -> str:
    return block(net, x, three_projections(net, x), filled_in(-5.0))


def per_row(net: OnnxNet, x: str) -> str:
    return block(net, x, three_projections(net, x), lambda net, logits: net.op("Mul", logits, net.weight(ROWS, 1)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (not_last, "no attention: its softmax is over axis 2 of 4, not over the last one"),
        (weighted, "no attention: 'multiply' stands between its softmax and the product with the values"),
        (pooled, "no attention: operator 'permute_dims' stands between its softmax and the product of queries and keys"),
        (weakly_masked, "no attention: a mask fills in -5; supported: one value of at most -10000, or -inf"),
        (per_row, "no attention: its logits are multiplied by a constant that differs between rows or columns"),
    ],
)
def test_near_misses_say_why(tmp_path: Path, make: Callable[[OnnxNet, str], str], reason: str) -> None:
    net = OnnxNet(17)
    model = agrees(net.save(tmp_path / "net.onnx", [make(net, net.input("x", BATCH, ROWS, WIDTH))]))
    assert "attention" not in operators(model)
    (group,) = [g for g in find_groups(model.module) if g.kind == "softmax"]
    assert group.reason == f"operator 'softmax' has no int8 kernel ({reason})"
