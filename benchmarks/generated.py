"""Networks that are made, not trained: public architectures with seeded random weights, for speed on shapes that no trained file here has.

    squeezenet, densenet121   the graphs that the onnx package ships as test data without weights (`light_*.onnx`)
    mobilenet_v2_shifted      MobileNetV2 with 8 more channels in every layer: shapes that no tuning log has seen
    efficientnet_lite4        the largest EfficientNet-Lite, 300 x 300: its blocks by the published scaling, batch normalization folded

Weights are He-scaled, so that activations neither vanish nor explode and calibration finds ordinary ranges; results mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, version_converter

OPSET = 17  # quantizers want 13 or later
LIGHT = {"squeezenet": "light_squeezenet.onnx", "densenet121": "light_densenet121.onnx"}
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def he(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal weights [O, ...]: a rectified input keeps its mean square."""
    return rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))


def near_one(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(0.8, 1.2, shape)


def near_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape) * 0.1


ROLES: dict[tuple[str, int], Draw] = {  # (operator, which operand) -> how its constant is drawn
    ("Conv", 1): he, ("Conv", 2): near_zero, ("Mul", 1): near_one, ("Add", 1): near_zero,
    ("BatchNormalization", 1): near_one, ("BatchNormalization", 2): near_zero, ("BatchNormalization", 3): near_zero, ("BatchNormalization", 4): near_one,
}  # fmt: skip


def light_path(name: str) -> Path:
    return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / LIGHT[name]


def with_random_weights(light: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """A `light_*` graph with all its weights drawn, as initializers, at operator set `OPSET`.

    There, large weights are `ConstantOfShape` nodes; the small ones are those of the trained network, and don't fit random large ones.
    """
    rng, graph = np.random.default_rng(seed), light.graph
    shapes = {i.name: tuple(numpy_helper.to_array(i).tolist()) for i in graph.initializer if i.data_type == onnx.TensorProto.INT64}
    made = {n.output[0]: shapes[n.input[0]] for n in graph.node if n.op_type == "ConstantOfShape"}
    made |= {i.name: tuple(i.dims) for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    alias = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Unsqueeze" and n.input[0] in made}
    roles = {alias.get(x, x): (n.op_type, i) for n in graph.node if n.op_type != "Unsqueeze" for i, x in enumerate(n.input)}
    nodes = [n for n in graph.node if n.op_type != "ConstantOfShape"]
    weights = [numpy_helper.from_array(ROLES[roles[name]](rng, shape).astype(np.float32), name) for name, shape in made.items()]
    names = {i.name for i in graph.initializer}
    used = {x for n in nodes for x in n.input}
    kept = [i for i in graph.initializer if i.name in used and i.name not in made]
    inputs = [i for i in graph.input if i.name not in names]
    whole = onnx.helper.make_graph(nodes, graph.name, inputs, list(graph.output), [*kept, *weights])
    model = onnx.helper.make_model(whole, opset_imports=light.opset_import, ir_version=8)
    return version_converter.convert_version(model, OPSET)


def with_shifted_channels(model: onnx.ModelProto, shift: int = 8, seed: int = 0) -> onnx.ModelProto:
    """A chain of Conv, activations, residual Adds and a last Gemm with `shift` more channels everywhere but at its input and output; new weights.

    Raises ValueError for an operator whose channels don't shift as one (Concat, Reshape, ...).
    """
    rng, shifted = np.random.default_rng(seed), onnx.ModelProto()
    shifted.CopyFrom(model)
    graph = shifted.graph
    old = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    outside, new = {i.name for i in graph.input}, {}
    for node in graph.node:
        if node.op_type == "Conv":
            weight, groups = old[node.input[1]], next((a for a in node.attribute if a.name == "group"), None)
            outputs, inputs = weight.shape[0] + shift, weight.shape[1]
            if groups is not None and groups.i > 1:
                if inputs != 1 or groups.i != weight.shape[0]:
                    raise ValueError(f"{node.name}: a grouped convolution that is not depthwise")
                groups.i += shift
            elif node.input[0] not in outside:
                inputs += shift
            new[node.input[1]] = he(rng, (outputs, inputs, *weight.shape[2:]))
            if len(node.input) > 2:
                new[node.input[2]] = near_zero(rng, (outputs,))
        elif node.op_type == "Gemm":
            weight, transposed = old[node.input[1]], any(a.name == "transB" and a.i for a in node.attribute)
            outputs, inputs = weight.shape if transposed else weight.shape[::-1]
            drawn = he(rng, (outputs, inputs + shift))
            new[node.input[1]] = drawn if transposed else drawn.T
        elif node.op_type not in ("Constant", "Clip", "Relu", "Add", "ReduceMean", "GlobalAveragePool", "Flatten"):
            raise ValueError(f"{node.name}: channels of {node.op_type} can't be shifted")
    for initializer in graph.initializer:
        if initializer.name in new:
            initializer.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(new[initializer.name], np.float32), initializer.name))
    del graph.value_info[:]
    onnx.checker.check_model(shifted)
    return shifted


# Kernel, stride, expansion, channels, repeats of each stage of EfficientNet-B0, which all others scale (Tan, Le: EfficientNet, 2019, table 1).
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))


def efficientnet_lite(width: float = 1.4, depth: float = 1.8, size: int = 300, seed: int = 0) -> onnx.ModelProto:
    """EfficientNet-Lite4, or another of the family by its factors (2: 1.1, 1.2, 260; 3: 1.2, 1.4, 280). Against EfficientNet it has no squeeze-and-excitation,
    and ReLU6 for swish; stem, head, and the depth of the first and the last stage are not scaled."""
    rng, nodes, weights = np.random.default_rng(seed), [], []

    def convolved(x: str, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1, rectified: bool = True) -> str:
        at = len(nodes)
        drawn = {f"w{at}": he(rng, (outputs, inputs // groups, kernel, kernel)), f"b{at}": near_zero(rng, (outputs,))}
        weights.extend(numpy_helper.from_array(value.astype(np.float32), name) for name, value in drawn.items())
        side = {"strides": [stride] * 2, "pads": [kernel // 2] * 4, "group": groups}
        nodes.append(onnx.helper.make_node("Conv", [x, *drawn], [f"conv{at}"], f"conv{at}", **side))
        if rectified:
            nodes.append(onnx.helper.make_node("Clip", [f"conv{at}", "zero", "six"], [f"clip{at}"], f"clip{at}"))
        return str(nodes[-1].output[0])

    channels = 32
    x = convolved("image", 3, channels, 3, 2)
    for stage, (kernel, stride, expansion, base, repeats) in enumerate(STAGES):
        scaled = base * width
        outputs = max(8, int(scaled + 4) // 8 * 8)  # to the nearest 8, but not below 0.9 of it
        outputs += 8 * (outputs < 0.9 * scaled)
        for i in range(repeats if stage in (0, len(STAGES) - 1) else math.ceil(repeats * depth)):
            inside = channels * expansion
            y = convolved(x, channels, inside, 1, 1) if expansion > 1 else x
            y = convolved(y, inside, inside, kernel, stride if i == 0 else 1, inside)
            y = convolved(y, inside, outputs, 1, 1, rectified=False)
            if i:
                nodes.append(onnx.helper.make_node("Add", [x, y], [f"sum{len(nodes)}"], f"sum{len(nodes)}"))
                y = str(nodes[-1].output[0])
            x, channels = y, outputs
    x = convolved(x, channels, 1280, 1, 1)
    nodes.append(onnx.helper.make_node("GlobalAveragePool", [x], ["mean"]))
    nodes.append(onnx.helper.make_node("Flatten", ["mean"], ["flat"]))
    nodes.append(onnx.helper.make_node("Gemm", ["flat", "head", "bias"], ["logits"]))
    drawn = {"head": he(rng, (1000, 1280)).T, "bias": near_zero(rng, (1000,)), "zero": np.float32(0), "six": np.float32(6)}
    weights.extend(numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in drawn.items())
    ports = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("image", ("batch", 3, size, size)), ("logits", ("batch", 1000)))]
    graph = onnx.helper.make_graph(nodes, "efficientnet_lite", ports[:1], ports[1:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def random_images(shape: tuple[int, ...], count: int, seed: int = 0) -> list[np.ndarray]:
    """Normalized "photographs" [1, 3, H, W]: coarse random colours with finer noise on top, mean 0 and variance about 1."""
    rng, images = np.random.default_rng(seed), []
    for _ in range(count):
        coarse = rng.standard_normal((*shape[:2], 7, 7))
        blown = np.kron(coarse, np.ones((-(-shape[2] // 7), -(-shape[3] // 7))))[..., : shape[2], : shape[3]]
        images.append((0.9 * blown + 0.4 * rng.standard_normal(shape)).astype(np.float32))
    return images
