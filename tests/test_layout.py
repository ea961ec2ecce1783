"""NHWC inside, conversions at the edges: how many data movements real structures need, and that values stay the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompiler.passes.axes import complete, matched, together
from qcompiler.passes.graph import Graph, relax_op, shape_of
from tests.onnx_nets import OnnxNet, agrees, operators

Build = Callable[[OnnxNet, str], str]


def channel_shuffle(n: OnnxNet, x: str) -> str:
    y = n.op("Conv", x, n.weight(8, 4, 3, 3))
    y = n.op("Reshape", n.op("Transpose", n.op("Reshape", y, n.ints(1, 2, 4, 6, 6)), perm=[0, 2, 1, 3, 4]), n.ints(1, 8, 6, 6))
    return n.op("Conv", y, n.weight(4, 8, 3, 3))


def squeeze_excite(n: OnnxNet, x: str) -> str:
    y = n.op("Conv", x, n.weight(8, 4, 3, 3))
    s = n.op("Relu", n.op("Conv", n.op("GlobalAveragePool", y), n.weight(2, 8, 1, 1)))
    return n.op("Conv", n.op("Mul", y, n.op("Sigmoid", n.op("Conv", s, n.weight(8, 2, 1, 1)))), n.weight(3, 8, 1, 1))


def squeeze_excite_dense(n: OnnxNet, x: str) -> str:
    y = n.op("Conv", x, n.weight(8, 4, 3, 3))
    s = n.op("Reshape", n.op("ReduceMean", y, axes=[2, 3], keepdims=0), n.ints(-1, 8))
    s = n.op("Sigmoid", n.op("Gemm", s, n.weight(8, 8)))
    return n.op("Conv", n.op("Mul", n.op("Unsqueeze", s, n.ints(2, 3)), y), n.weight(3, 8, 1, 1))


def convnext(n: OnnxNet, x: str) -> str:
    y = n.op("Conv", x, n.weight(4, 1, 3, 3), group=4, pads=[1, 1, 1, 1])
    t = n.op("LayerNormalization", n.op("Transpose", y, perm=[0, 2, 3, 1]), n.weight(4), n.weight(4))
    t = n.op("MatMul", n.op("Relu", n.op("Add", n.op("MatMul", t, n.weight(4, 8)), n.weight(8))), n.weight(8, 4))
    t = n.op("Transpose", n.op("Mul", n.weight(4), t), perm=[0, 3, 1, 2])
    return n.op("Conv", n.op("Add", x, t), n.weight(3, 4, 1, 1))


def pyramid(n: OnnxNet, x: str) -> str:
    y = n.op("Relu", n.op("Conv", x, n.weight(4, 4, 3, 3), pads=[1, 1, 1, 1], strides=[2, 2]))
    up = n.op("Resize", y, "", n.const([1, 1, 2, 2]), mode="linear")
    z = n.op("Concat", up, n.op("ConvTranspose", y, n.weight(4, 2, 2, 2), strides=[2, 2]), x, axis=1)
    a, b = n.op("Split", z, n.ints(3, 7), outputs=2, axis=1)
    z = n.op("Concat", n.op("Slice", b, n.ints(0), n.ints(8), n.ints(2), n.ints(2)), n.op("MaxPool", a, kernel_shape=[2, 1], strides=[2, 1]), axis=1)
    return n.op("Conv", n.op("Pad", z, n.ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"), n.weight(3, 10, 3, 3))


def space_to_depth_stem(n: OnnxNet, x: str) -> str:
    """YOLOv5's focus: strided slices, concatenated."""
    parts = [n.op("Slice", x, n.ints(i, j), n.ints(99, 99), n.ints(2, 3), n.ints(2, 2)) for i in (0, 1) for j in (0, 1)]
    return n.op("Conv", n.op("Concat", *parts, axis=1), n.weight(3, 16, 1, 1))


def channels_last_source(n: OnnxNet, x: str) -> str:
    """A TensorFlow export (x is NHWC): scaled, transposed around each convolution, NHWC output."""
    y = n.op("Transpose", n.op("Mul", x, n.weight(8)), perm=[0, 3, 1, 2])
    y = n.op("Transpose", n.op("Conv", y, n.weight(3, 8, 3, 3)), perm=[0, 2, 3, 1])
    y = n.op("Transpose", n.op("Add", y, n.weight(3)), perm=[0, 3, 1, 2])
    return n.op("Transpose", n.op("MaxPool", y, kernel_shape=[2, 2]), perm=[0, 2, 3, 1])


def pixel_shuffle(n: OnnxNet, x: str) -> str:
    y = n.op("DepthToSpace", n.op("Conv", x, n.weight(12, 4, 3, 3)), blocksize=2, mode="CRD")
    return n.op("Conv", n.op("PRelu", y, n.weight(3, 1, 1)), n.weight(3, 3, 1, 1))


def token_blocks(n: OnnxNet, x: str) -> str:
    """MobileViT's blocks: 2 x 2 patches become rows of tokens, normalizations beside a residual stream, and back to an image."""
    y = n.op("Reshape", n.op("Conv", x, n.weight(4, 4, 1, 1)), n.ints(16, 2, 4, 2))
    y = n.op("Reshape", n.op("Transpose", y, perm=[0, 2, 1, 3]), n.ints(1, 4, 16, 4))
    y = n.op("Reshape", n.op("Transpose", y, perm=[0, 3, 2, 1]), n.ints(4, 16, 4))
    for _ in range(3):
        y = n.op("Add", n.op("MatMul", n.op("LayerNormalization", y, n.weight(4), n.weight(4)), n.weight(4, 4)), y)
    y = n.op("Transpose", n.op("Reshape", y, n.ints(1, 4, 16, 4)), perm=[0, 3, 2, 1])
    y = n.op("Transpose", n.op("Reshape", y, n.ints(16, 4, 2, 2)), perm=[0, 2, 1, 3])
    return n.op("Conv", n.op("Reshape", y, n.ints(1, 4, 8, 8)), n.weight(3, 4, 1, 1))


# structure -> data movements (permute_dims) besides the two at the edges (-2: not even those)
STRUCTURES = [
    (squeeze_excite, 0), (squeeze_excite_dense, 0), (convnext, 0), (pyramid, 0), (space_to_depth_stem, 0), (channels_last_source, -2),
    (channel_shuffle, 1), (pixel_shuffle, 1), (token_blocks, 6),
]  # fmt: skip


@pytest.mark.parametrize(("build", "moves"), STRUCTURES, ids=lambda v: getattr(v, "__name__", ""))
def test_structures(build: Build, moves: int, tmp_path: Path) -> None:
    net = OnnxNet(17)
    y = build(net, net.input("x", 1, 4, 8, 8))
    model = agrees(net.save(tmp_path / "net.onnx", [y]))
    kinds = operators(model)
    assert kinds.count("permute_dims") == moves + 2, kinds
    if moves >= 0:
        assert (kinds[0], kinds[-1]) == ("permute_dims", "permute_dims")


@pytest.mark.parametrize("op", ["Softmax", "LayerNormalization"])
@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_goes_along_one_axis_finds_it_innermost(op: str, axis: int, transposed: bool, tmp_path: Path) -> None:
    """There alone it has an integer form; who reads the image beside it still finds it as it was."""
    net = OnnxNet(17)
    y = held = net.op("Conv", net.input("x", 1, 4, 6, 5), net.weight(4, 4, 1, 1))
    perm = [0, 3, 1, 2] if transposed else [0, 1, 2, 3]
    y = net.op("Transpose", held, perm=perm)
    sizes = [(1, 4, 6, 5)[a] for a in perm]
    if op == "Softmax":
        y = net.op(op, y, axis=axis)
    else:  # of the last axis: another is brought there and back
        there = [0, *(a for a in (1, 2, 3) if a != axis), axis]
        y = net.op(op, net.op("Transpose", y, perm=there), net.weight(sizes[axis]), net.weight(sizes[axis]))
        y = net.op("Transpose", y, perm=[there.index(a) for a in range(4)])
    y = net.op("Transpose", y, perm=[perm.index(a) for a in range(4)])
    model = agrees(net.save(tmp_path / "net.onnx", [net.op("Conv", net.op("Add", y, held), net.weight(3, 4, 1, 1)), net.op("Relu", held)]))
    found = [e for _, e in Graph.of(model.module).bindings if "softmax" in str(relax_op(e)) or "layer_norm" in str(relax_op(e))]
    assert [[int(a) % 4 for a in getattr(e.attrs, "axes", None) or [e.attrs.axis]] for e in found] == [[3]]


def test_classifier_ends_without_movement(tmp_path: Path) -> None:
    net = OnnxNet(17)
    y = net.op("GlobalAveragePool", net.op("Conv", net.input("x", 2, 4, 8, 8), net.weight(8, 4, 3, 3)))
    y = net.op("Gemm", net.op("Flatten", y), net.weight(8, 5), net.weight(5))
    assert operators(agrees(net.save(tmp_path / "net.onnx", [y]))) == ["permute_dims", "conv2d", "mean", "reshape", "matmul", "add"]


def test_flatten_before_dense_moves_the_weights(tmp_path: Path) -> None:
    """VGG, LeNet: the rows of the matrix are put in NHWC order instead of the image in NCHW order."""
    net = OnnxNet(17)
    y = net.op("Relu", net.op("Conv", net.input("x", 2, 4, 8, 8), net.weight(6, 4, 3, 3)))
    y = net.op("Gemm", net.op("Dropout", net.op("Flatten", y)), net.weight(216, 5), net.weight(5))
    assert operators(agrees(net.save(tmp_path / "net.onnx", [y]))) == ["permute_dims", "conv2d", "relu", "reshape", "matmul", "add"]


def test_flatten_that_others_read_moves_the_image(tmp_path: Path) -> None:
    net = OnnxNet(17)
    flat = net.op("Flatten", net.op("Conv", net.input("x", 2, 4, 8, 8), net.weight(6, 4, 3, 3)))
    model = agrees(net.save(tmp_path / "net.onnx", [net.op("MatMul", flat, net.weight(216, 5)), flat]))
    assert operators(model) == ["permute_dims", "conv2d", "permute_dims", "reshape", "matmul"]


def test_attention_has_the_movements_it_was_written_with(tmp_path: Path) -> None:
    """Tokens [1, 6, 8], 2 heads: none. A projection leaves its heads as attention reads them."""
    net = OnnxNet(17)
    x = net.input("x", 1, 6, 8)

    def heads(perm: list[int]) -> str:
        return str(net.op("Transpose", net.op("Reshape", net.op("MatMul", x, net.weight(8, 8)), net.ints(0, -1, 2, 4)), perm=perm))

    scores = net.op("Softmax", net.op("MatMul", heads([0, 2, 1, 3]), heads([0, 2, 3, 1])))
    y = net.op("Reshape", net.op("Transpose", net.op("MatMul", scores, heads([0, 2, 1, 3])), perm=[0, 2, 1, 3]), net.ints(1, 6, 8))
    assert operators(agrees(net.save(tmp_path / "net.onnx", [y]))).count("permute_dims") == 0


def test_vision_transformer_stem(tmp_path: Path) -> None:
    """Patches are convolved, flattened and transposed to tokens: NHWC data is that already."""
    net = OnnxNet(17)
    y = net.op("Conv", net.input("x", 1, 3, 8, 8), net.weight(5, 3, 2, 2), strides=[2, 2])
    y = net.op("Transpose", net.op("Reshape", y, net.ints(1, 5, 16)), perm=[0, 2, 1])
    assert operators(agrees(net.save(tmp_path / "net.onnx", [net.op("MatMul", y, net.weight(5, 4))]))) == ["permute_dims", "conv2d", "reshape", "matmul"]


def test_signal_network_is_one_row_of_an_image(tmp_path: Path) -> None:
    net = OnnxNet(17)
    x = net.input("x", 1, 4, 32)
    y = net.op("Relu", net.op("Conv", x, net.weight(6, 4, 3), net.weight(6), pads=[1, 1]))
    y = net.op("Add", y, net.op("Sigmoid", net.op("Conv", y, net.weight(6, 1, 5), group=6, pads=[2, 2])))
    y = net.op("MaxPool", net.op("Concat", y, x, axis=1), kernel_shape=[2], strides=[2])
    model = agrees(net.save(tmp_path / "net.onnx", [net.op("Softmax", net.op("ReduceMean", y, axes=[2], keepdims=0))]))
    kinds = operators(model)
    assert kinds.count("permute_dims") == 1
    assert "reshape" not in kinds[2:-2]
    convolutions = [e for n, e in Graph.of(model.module).bindings if "conv" in n and "conv2d" in str(e.op)]
    assert all(shape_of(e)[1] == 1 for e in convolutions)


def test_permuted_inputs_and_outputs_keep_the_users_layout(tmp_path: Path) -> None:
    net = OnnxNet(17)
    a, b = net.input("a", 1, 8, 8, 3), net.input("b", 1, 4, 6, 6)
    y = net.op("Conv", net.op("Transpose", a, perm=[0, 3, 1, 2]), net.weight(4, 3, 3, 3))
    z = net.op("Add", y, b)
    model = agrees(net.save(tmp_path / "net.onnx", [z, net.op("Transpose", y, perm=[0, 2, 3, 1]), y]))
    assert [i.shape for i in model.inputs] == [(1, 8, 8, 3), (1, 4, 6, 6)]
    assert [o.shape for o in model.outputs] == [(1, 4, 6, 6), (1, 6, 6, 4), (1, 4, 6, 6)]
    assert operators(model).count("permute_dims") == 3  # b in; two outputs out; a is NHWC already


# -- the arithmetic of axes -------------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)


@settings(max_examples=200, deadline=None)
@given(shapes, st.data())
def test_matched_axes_have_equal_sizes(shape: tuple[int, ...], data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(shape)), max_size=3).map(lambda c: sorted({0, len(shape), *c})))
    new = tuple(int(np.prod(shape[i:j])) for i, j in itertools.pairwise(cuts))
    for a, b in ((shape, new), (new, shape)):
        groups = matched(a, b)
        assert groups is not None
        for old, made in groups:
            assert np.prod([a[i] for i in old]) == np.prod([b[i] for i in made])
        assert sorted(i for old, _ in groups for i in old) == [i for i, d in enumerate(a) if d != 1]
        assert sorted(i for _, made in groups for i in made) == [i for i, d in enumerate(b) if d != 1]


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 3))
def testtogether(sequence: list[int], first: int) -> None:
    joined = [first, first + 1]
    for result in together(list(sequence), [joined, *[[a] for a in range(5) if a not in joined]]):
        assert sorted(result) == list(range(5))
        assert result.index(first + 1) == result.index(first) + 1


@settings(max_examples=100, deadline=None)
@given(shapes, st.data())
def test_complete_only_adds_axes_of_one(shape: tuple[int, ...], data: st.DataObject) -> None:
    full = data.draw(st.permutations(range(len(shape))))
    held = tuple(a for a in full if shape[a] != 1)
    order = complete(held, shape)
    assert sorted(a for a in order if a is not None) == list(range(len(shape)))
    assert [a for a in order if a in held] == list(held)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.permutations(range(4)), second=st.permutations(range(4)),
    shape=st.sampled_from([(1, 12, 4), (2, 2, 3, 4), (4, 3, 4), (48,), (1, 4, 12), (2, 24)]),
)  # fmt: skip
def test_random_movements(first: list[int], second: list[int], shape: tuple[int, ...], tmp_path: Path) -> None:
    """conv -> transpose -> add -> transpose -> reshape, in any order of axes."""
    net = OnnxNet(17)
    y = net.op("Conv", net.input("x", 1, 2, 4, 4), net.weight(3, 2, 1, 1))
    y = net.op("Transpose", y, perm=list(first))
    sizes = [(1, 3, 4, 4)[a] for a in first]
    y = net.op("Transpose", net.op("Add", y, net.weight(*sizes[2:])), perm=list(second))
    agrees(net.save(tmp_path / "net.onnx", [net.op("Reshape", y, net.ints(*shape)), net.op("Relu", y)]))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_a_frame_of_a_sequence_beside_constants(axis: int, tmp_path: Path) -> None:
    """A frame [1, C, H, W] of [1, T, C, H, W] is held without its axis of size 1: constants that it is joined with, along any axis, are moved alike."""
    n, sizes = OnnxNet(17), [2 if a == axis else d for a, d in enumerate((1, 4, 6, 5))]
    frame = n.op("Gather", n.input("x", 1, 3, 4, 6, 5), n.const(1, "int64"), axis=1)
    joined = n.op("Concat", n.weight(*sizes), frame, n.weight(*sizes), axis=axis)
    channels = 8 if axis == 1 else 4
    agrees(n.save(tmp_path / "net.onnx", [n.op("Conv", n.op("Add", joined, n.weight(channels, 1, 1)), n.weight(3, channels, 3, 3))]))
