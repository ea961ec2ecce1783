"""Trains the example network of `qcompiler demo`, in plain numpy, and writes qcompiler/cli/demo_data/digits.{onnx,npz}.

    pip install scikit-learn onnx && python examples/train_digits.py

A residual CNN on scikit-learn's handwritten digits (UCI "optical recognition of handwritten digits": 1,797 images of 8 x 8, scaled up to
16 x 16): a convolution stem, a basic residual block, a strided one with a projection, an inverted residual block with a depthwise
convolution and ReLU6, global average pooling, a dense layer. Batch normalization stays in the exported graph: something to fold.

Every layer is a small class with `forward`, `backward` and its parameters; arrays are NHWC float32. Trained by Adam on random shifts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray


class Layer:
    """`params` are trained; `grads` holds their gradients after `backward`, which returns the gradient of the input."""

    params: dict[str, Array]
    grads: dict[str, Array]

    def __init__(self) -> None:
        self.params, self.grads = {}, {}

    def parts(self) -> Sequence[Layer]:
        return [self]

    def forward(self, x: Array, training: bool) -> Array:
        raise NotImplementedError

    def backward(self, g: Array) -> Array:
        raise NotImplementedError


class Conv(Layer):
    """k x k convolution without bias, padding k // 2. Weights [k, k, I, O], or [k, k, C] when depthwise."""

    def __init__(self, rng: np.random.Generator, k: int, inputs: int, outputs: int, stride: int = 1, depthwise: bool = False) -> None:
        super().__init__()
        self.k, self.stride, self.depthwise = k, stride, depthwise
        shape = (k, k, inputs) if depthwise else (k, k, inputs, outputs)
        fan_in = k * k * (1 if depthwise else inputs)
        self.params["w"] = rng.normal(0, np.sqrt(2 / fan_in), shape).astype(np.float32)

    def taps(self, height: int, width: int) -> list[tuple[int, int, slice, slice]]:
        """(i, j, rows, columns) of the padded input that kernel element (i, j) reads."""
        s = self.stride
        rows, columns = (height - 1) // s * s + 1, (width - 1) // s * s + 1
        return [(i, j, slice(i, i + rows, s), slice(j, j + columns, s)) for i in range(self.k) for j in range(self.k)]

    def forward(self, x: Array, training: bool) -> Array:
        pad = self.k // 2
        self.x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        self.size = x.shape[1:3]
        w = self.params["w"]
        if self.depthwise:
            return np.asarray(sum(self.x[:, r, c] * w[i, j] for i, j, r, c in self.taps(*self.size)))
        self.columns = np.concatenate([self.x[:, r, c] for _, _, r, c in self.taps(*self.size)], -1)
        return np.asarray(self.columns @ w.reshape(-1, w.shape[-1]))

    def backward(self, g: Array) -> Array:
        w, dx = self.params["w"], np.zeros_like(self.x)
        if self.depthwise:
            self.grads["w"] = np.empty_like(w)
            for i, j, r, c in self.taps(*self.size):
                self.grads["w"][i, j] = (self.x[:, r, c] * g).sum((0, 1, 2))
                dx[:, r, c] += g * w[i, j]
        else:
            flat = g.reshape(-1, w.shape[-1])
            self.grads["w"] = (self.columns.reshape(len(flat), -1).T @ flat).reshape(w.shape)
            for i, j, r, c in self.taps(*self.size):
                dx[:, r, c] += g @ w[i, j].T
        pad = self.k // 2
        return dx[:, pad : pad + self.size[0], pad : pad + self.size[1]]


class BatchNorm(Layer):
    """Over the last axis; running statistics follow with momentum 0.9."""

    epsilon = np.float32(1e-5)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.params = {"scale": np.ones(channels, np.float32), "bias": np.zeros(channels, np.float32)}
        self.mean, self.var = np.zeros(channels, np.float32), np.ones(channels, np.float32)

    def forward(self, x: Array, training: bool) -> Array:
        axes = (0, 1, 2)
        mean, var = (x.mean(axes), x.var(axes)) if training else (self.mean, self.var)
        if training:
            self.mean += np.float32(0.1) * (mean - self.mean)
            self.var += np.float32(0.1) * (var - self.var)
        self.inverse = 1 / np.sqrt(var + self.epsilon)
        self.normal = (x - mean) * self.inverse
        return np.asarray(self.normal * self.params["scale"] + self.params["bias"])

    def backward(self, g: Array) -> Array:
        axes = (0, 1, 2)
        self.grads = {"scale": (g * self.normal).sum(axes), "bias": g.sum(axes)}
        count = np.float32(g.size // g.shape[-1])
        centred = g - self.grads["bias"] / count - self.normal * (self.grads["scale"] / count)
        return np.asarray(centred * (self.params["scale"] * self.inverse))


class Relu(Layer):
    """max(x, 0), or clipped to `limit` above."""

    def __init__(self, limit: float = np.inf) -> None:
        super().__init__()
        self.limit = np.float32(limit)

    def forward(self, x: Array, training: bool) -> Array:
        self.inside = (x > 0) & (x < self.limit)
        return np.clip(x, np.float32(0), self.limit)

    def backward(self, g: Array) -> Array:
        return np.asarray(g * self.inside)


class Chain(Layer):
    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.layers = layers

    def parts(self) -> Sequence[Layer]:
        return [part for layer in self.layers for part in layer.parts()]

    def forward(self, x: Array, training: bool) -> Array:
        for layer in self.layers:
            x = layer.forward(x, training)
        return x

    def backward(self, g: Array) -> Array:
        for layer in reversed(self.layers):
            g = layer.backward(g)
        return g


class Residual(Layer):
    """body(x) + shortcut(x); the identity when there is no shortcut."""

    def __init__(self, body: Chain, shortcut: Chain | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def parts(self) -> Sequence[Layer]:
        return [*self.body.parts(), *(self.shortcut.parts() if self.shortcut else [])]

    def forward(self, x: Array, training: bool) -> Array:
        return np.asarray(self.body.forward(x, training) + (self.shortcut.forward(x, training) if self.shortcut else x))

    def backward(self, g: Array) -> Array:
        return np.asarray(self.body.backward(g) + (self.shortcut.backward(g) if self.shortcut else g))


class Head(Layer):
    """Global average pooling, then a dense layer [C, classes]."""

    def __init__(self, rng: np.random.Generator, channels: int, classes: int) -> None:
        super().__init__()
        self.params = {
            "w": rng.normal(0, np.sqrt(1 / channels), (channels, classes)).astype(np.float32),
            "b": np.zeros(classes, np.float32),
        }

    def forward(self, x: Array, training: bool) -> Array:
        self.shape, self.pooled = x.shape, x.mean((1, 2))
        return np.asarray(self.pooled @ self.params["w"] + self.params["b"])

    def backward(self, g: Array) -> Array:
        self.grads = {"w": self.pooled.T @ g, "b": g.sum(0)}
        n, height, width, channels = self.shape
        pooled = (g @ self.params["w"].T / np.float32(height * width)).astype(np.float32)
        return np.broadcast_to(pooled[:, None, None], (n, height, width, channels))


def build(rng: np.random.Generator, width: int = 32, classes: int = 10) -> Chain:
    """The network for [N, 16, 16, 1] images."""
    wide = 2 * width
    return Chain(
        Conv(rng, 3, 1, width), BatchNorm(width), Relu(),
        Residual(Chain(Conv(rng, 3, width, width), BatchNorm(width), Relu(), Conv(rng, 3, width, width), BatchNorm(width))), Relu(),
        Residual(
            Chain(Conv(rng, 3, width, wide, stride=2), BatchNorm(wide), Relu(), Conv(rng, 3, wide, wide), BatchNorm(wide)),
            Chain(Conv(rng, 1, width, wide, stride=2), BatchNorm(wide)),
        ), Relu(),
        Residual(Chain(
            Conv(rng, 1, wide, 2 * wide), BatchNorm(2 * wide), Relu(6),
            Conv(rng, 3, 2 * wide, 2 * wide, depthwise=True), BatchNorm(2 * wide), Relu(6),
            Conv(rng, 1, 2 * wide, wide), BatchNorm(wide),
        )),
        Head(rng, wide, classes),
    )  # fmt: skip


def loss_gradient(logits: Array, labels: Array) -> tuple[float, Array]:
    """(mean cross entropy, its gradient by the logits)."""
    shifted = logits - logits.max(1, keepdims=True)
    probability = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    rows = np.arange(len(labels))
    loss = float(-np.log(probability[rows, labels] + 1e-12).mean())
    probability[rows, labels] -= 1
    return loss, (probability / len(labels)).astype(np.float32)


class Adam:
    """Kingma and Ba, "Adam: A Method for Stochastic Optimization" (2015), algorithm 1."""

    def __init__(self, network: Chain) -> None:
        self.layers, self.steps = network.parts(), 0
        self.moments = [{k: (np.zeros_like(p), np.zeros_like(p)) for k, p in layer.params.items()} for layer in self.layers]

    def step(self, rate: float) -> None:
        self.steps += 1
        correction = np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        for layer, moments in zip(self.layers, self.moments, strict=True):
            for key, (first, second) in moments.items():
                g = layer.grads[key]
                first += np.float32(0.1) * (g - first)
                second += np.float32(0.001) * (g * g - second)
                layer.params[key] -= np.float32(rate * correction) * first / (np.sqrt(second) + np.float32(1e-8))


def shift(images: Array, rng: np.random.Generator) -> Array:
    """Each image moved by up to two pixels each way."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    at = rng.integers(0, 5, (len(images), 2))
    return np.stack([p[i : i + 16, j : j + 16] for p, (i, j) in zip(padded, at, strict=True)])


def train(network: Chain, images: Array, labels: Array, epochs: int, batch: int, rng: np.random.Generator) -> None:
    """Adam with a rate that falls from 3e-3 to 0 along a cosine."""
    optimizer, step, steps = Adam(network), 0, epochs * (len(images) // batch)
    for epoch in range(epochs):
        order, losses = rng.permutation(len(images)), []
        for start in range(0, len(images) - batch + 1, batch):
            chosen = order[start : start + batch]
            loss, gradient = loss_gradient(network.forward(shift(images[chosen], rng), True), labels[chosen])
            network.backward(gradient)
            optimizer.step(1.5e-3 * (1 + np.cos(np.pi * step / steps)))
            step += 1
            losses.append(loss)
        print(f"epoch {epoch + 1:2}: loss {np.mean(losses):.4f}", flush=True)


class Exporter:
    """Writes the trained network as ONNX, NCHW."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.counts: dict[str, int] = {}

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        name = f"{kind.lower()}{self.counts[kind]}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: Array) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
        return name

    def layer(self, layer: Layer, x: str) -> str:
        if isinstance(layer, Chain):
            for part in layer.layers:
                x = self.layer(part, x)
            return x
        if isinstance(layer, Residual):
            return self.node("Add", [self.layer(layer.body, x), self.layer(layer.shortcut, x) if layer.shortcut else x])
        if isinstance(layer, Conv):
            w = layer.params["w"]
            kernel = w.transpose(2, 0, 1)[:, None] if layer.depthwise else w.transpose(3, 2, 0, 1)
            weight = self.constant(f"weight{len(self.constants)}", kernel)
            groups = len(kernel) if layer.depthwise else 1
            return self.node("Conv", [x, weight], kernel_shape=[layer.k] * 2, strides=[layer.stride] * 2, pads=[layer.k // 2] * 4, group=groups)
        if isinstance(layer, BatchNorm):
            values = {**layer.params, "mean": layer.mean, "var": layer.var}
            named = [self.constant(f"{key}{len(self.constants)}", value) for key, value in values.items()]
            return self.node("BatchNormalization", [x, *named], epsilon=float(layer.epsilon))
        if isinstance(layer, Relu):
            if np.isinf(layer.limit):
                return self.node("Relu", [x])
            bounds = [self.constant(f"bound{len(self.constants)}", np.float32(b)) for b in (0, layer.limit)]
            return self.node("Clip", [x, *bounds])
        assert isinstance(layer, Head)
        flat = self.node("Flatten", [self.node("GlobalAveragePool", [x])])
        operands = [flat, self.constant("dense.w", layer.params["w"]), self.constant("dense.b", layer.params["b"])]
        self.nodes.append(helper.make_node("Gemm", operands, ["logits"], name="dense"))
        return "logits"


def export(network: Chain, classes: int = 10) -> Any:
    """The ONNX model: input `image` float32 [N, 1, 16, 16] in 0..1, output `logits` [N, classes]."""
    exporter = Exporter()
    exporter.layer(network, "image")
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 16, 16])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])]
    graph = helper.make_graph(exporter.nodes, "digits", inputs, outputs, exporter.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="qcompiler examples")
    onnx.checker.check_model(model, full_check=True)
    return model


def enlarge(images: Array) -> Array:
    """[N, 8, 8] to [N, 16, 16], bilinear with half-pixel centres: the weights of every new pixel are 1/4 and 3/4 along each axis."""
    for axis in (1, 2):
        before = np.concatenate([images.take([0], axis), images.take(range(7), axis)], axis)
        after = np.concatenate([images.take(range(1, 8), axis), images.take([7], axis)], axis)
        pair = np.stack([0.25 * before + 0.75 * images, 0.75 * images + 0.25 * after], axis + 1)
        shape = list(images.shape)
        shape[axis] = 16
        images = pair.reshape(shape)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "qcompiler" / "cli" / "demo_data")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    images = enlarge(digits.reshape(-1, 8, 8) / 16.0)[..., None].astype(np.float32)
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(images))
    training, held_out = order[:-500], order[-500:]
    network = build(rng)
    train(network, images[training], labels[training], options.epochs, 64, rng)
    correct = (network.forward(images[held_out], False).argmax(1) == labels[held_out]).mean()
    print(f"accuracy on {len(held_out)} held-out digits: {correct:.4f}")
    options.output.mkdir(parents=True, exist_ok=True)
    onnx.save(export(network), options.output / "digits.onnx")
    planes = images.transpose(0, 3, 1, 2)
    np.savez_compressed(options.output / "digits.npz", calibration=planes[training[:100]], evaluation=planes[held_out], labels=labels[held_out])
    for name in ("digits.onnx", "digits.npz"):
        print(name, (options.output / name).stat().st_size, "bytes")


if __name__ == "__main__":
    main()
