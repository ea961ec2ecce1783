"""Two small transformers as exporters write them: a BERT (normalized behind each sum, token ids, a padding mask) and a ViT (normalized in front, a picture)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx_nets import OnnxNet

TOKENS, WIDTH, HEADS, LAYERS, VOCABULARY = 12, 32, 4, 2, 40
MOST = 64  # places of a `bert` for any number of tokens


class Transformer(OnnxNet):
    def __init__(self, seed: int) -> None:
        super().__init__(opset=17, seed=seed)

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        bias = self.const(0.1 * self.rng.standard_normal(outputs))
        return str(self.op("Add", self.op("MatMul", x, self.weight(inputs, outputs, spread=inputs**-0.5)), bias))

    def norm(self, x: str) -> str:
        """Some channels are much louder than the others, as in trained networks."""
        gamma = 0.5 + self.rng.random(WIDTH) + 3 * (np.arange(WIDTH) % 13 == 0)
        return str(self.op("LayerNormalization", x, self.const(gamma), self.const(0.2 * self.rng.standard_normal(WIDTH)), axis=-1, epsilon=1e-5))

    def heads(self, x: str, axes: list[int]) -> str:
        return str(self.op("Transpose", self.op("Reshape", x, self.ints(0, 0, HEADS, WIDTH // HEADS)), perm=axes))

    def attention(self, x: str, bias: str | None) -> str:
        q, k, v = (self.linear(x, WIDTH, WIDTH) for _ in range(3))
        logits = self.op("MatMul", self.heads(q, [0, 2, 1, 3]), self.heads(k, [0, 2, 3, 1]))
        logits = self.op("Div", logits, self.const((WIDTH // HEADS) ** 0.5))
        probabilities = self.op("Softmax", logits if bias is None else self.op("Add", logits, bias), axis=-1)
        summed = self.op("Transpose", self.op("MatMul", probabilities, self.heads(v, [0, 2, 1, 3])), perm=[0, 2, 1, 3])
        return self.linear(str(self.op("Reshape", summed, self.ints(0, 0, WIDTH))), WIDTH, WIDTH)

    def feed_forward(self, x: str) -> str:
        h = self.linear(x, WIDTH, 2 * WIDTH)
        cdf = self.op("Add", self.op("Erf", self.op("Div", h, self.const(2**0.5))), self.const(1.0))
        return self.linear(str(self.op("Mul", self.op("Mul", h, cdf), self.const(0.5))), 2 * WIDTH, WIDTH)


def bert(path: Path, seed: int = 0, tokens: int | str = TOKENS) -> Path:
    """ids, mask int64 [1, tokens] -> float32 [1, tokens, WIDTH], masked by the least float32. tokens: a symbol for any number up to MOST."""
    net = Transformer(seed)
    ids = net.input("ids", 1, tokens, dtype=onnx.TensorProto.INT64)
    mask = net.input("mask", 1, tokens, dtype=onnx.TensorProto.INT64)
    kept = net.op("Cast", net.op("Unsqueeze", mask, net.ints(1, 2)), to=onnx.TensorProto.FLOAT)
    bias = net.op("Mul", net.op("Sub", net.const(1.0), kept), net.const(float(np.finfo(np.float32).min)))
    words, places = (net.const(net.rng.standard_normal((n, WIDTH))) for n in (VOCABULARY, MOST if isinstance(tokens, str) else TOKENS))
    if isinstance(tokens, str):
        places = net.op("Slice", places, net.ints(0), net.op("Slice", net.op("Shape", ids), net.ints(1), net.ints(2)), net.ints(0))
    x = net.norm(net.op("Add", net.op("Gather", words, ids, axis=0), places))
    for _ in range(LAYERS):
        x = net.norm(net.op("Add", net.attention(x, bias), x))
        x = net.norm(net.op("Add", net.feed_forward(x), x))
    return net.save(path, [x])


def vit(path: Path, seed: int = 1) -> Path:
    """image float32 [1, 3, 16, 16] -> logits float32 [1, 10]."""
    net = Transformer(seed)
    image = net.input("image", 1, 3, 16, 16)
    patches = net.op("Conv", image, net.weight(WIDTH, 3, 4, 4), strides=[4, 4])
    x = net.op("Transpose", net.op("Reshape", patches, net.ints(1, WIDTH, 16)), perm=[0, 2, 1])
    x = net.op("Add", x, net.const(0.3 * net.rng.standard_normal((1, 16, WIDTH))))
    for _ in range(LAYERS):
        x = net.op("Add", net.attention(net.norm(x), None), x)
        x = net.op("Add", net.feed_forward(net.norm(x)), x)
    pooled = net.op("ReduceMean", net.norm(x), axes=[1], keepdims=0)
    return net.save(path, [net.linear(pooled, WIDTH, 10)])


def sentences(count: int, seed: int = 5, tokens: int = TOKENS) -> list[dict[str, np.ndarray]]:
    """Inputs of `bert`; the last tokens of each are padding."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        mask = (np.arange(tokens) < rng.integers(3, tokens + 1)).astype(np.int64)[None]
        found.append({"ids": rng.integers(1, VOCABULARY, (1, tokens)) * mask, "mask": mask})
    return found


def pictures(count: int, seed: int = 6) -> list[dict[str, np.ndarray]]:
    """Inputs of `vit`."""
    rng = np.random.default_rng(seed)
    return [{"image": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]
