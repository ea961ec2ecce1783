"""Sequences of a tensor's parts, as PyTorch's exporter writes split and chunk, become the parts themselves.

SequenceAt(SplitToSequence(x, sizes), k)    -->    Slice(x), from the sum of the sizes before k on
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompiler.base.value_ids import Naming
from qcompiler.importers.control import reads


def without_sequences(model: onnx.ModelProto, naming: Naming) -> onnx.ModelProto:
    """The model with a Slice for each part at a constant place of a split of constant sizes; itself where there is none. Other sequences are left, and
    refused by name."""
    splits = {n.output[0]: n for n in model.graph.node if n.op_type == "SplitToSequence"}
    if not splits:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants = known(made.graph)
    nodes: list[onnx.NodeProto] = []
    for node in made.graph.node:
        split = splits.get(node.input[0]) if node.op_type == "SequenceAt" else None
        bounds = None if split is None else _bounds(split, constants, constants.get(node.input[1]))
        if split is None or bounds is None:
            nodes.append(node)
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in split.attribute}
        axis = int(attributes.get("axis", 0))
        names = [naming.made(node.output[0], what) for what in ("begin", "end", "axis")]
        for name, number in zip(names, (*bounds, axis), strict=True):
            made.graph.initializer.append(numpy_helper.from_array(np.array([number], np.int64), name))
        squeezed = len(split.input) < 2 and not attributes.get("keepdims", 1)
        part = naming.made(node.output[0], "part") if squeezed else node.output[0]
        nodes.append(helper.make_node("Slice", [split.input[0], *names], [part], name=node.name))
        if squeezed:
            nodes.append(helper.make_node("Squeeze", [part, names[2]], [node.output[0]], name=part))
    read = {name for n in nodes for name in reads(n)} | {o.name for o in made.graph.output}
    del made.graph.node[:]
    made.graph.node.extend(n for n in nodes if n.op_type != "SplitToSequence" or n.output[0] in read)
    return made


def known(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Initializers and Constant nodes by name."""
    found = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name in ("value", "value_int", "value_ints", "value_float"):
            value = helper.get_attribute_value(node.attribute[0])
            found[node.output[0]] = numpy_helper.to_array(value) if node.attribute[0].name == "value" else np.asarray(value)
    return found


def _bounds(split: onnx.NodeProto, constants: dict[str, np.ndarray], place: np.ndarray | None) -> tuple[int, int] | None:
    """[begin, end) of a part; None where the sizes or the place are computed, or the place counts from the end."""
    sizes = np.ones((), np.int64) if len(split.input) < 2 or not split.input[1] else constants.get(split.input[1])
    if sizes is None or place is None or place.size != 1 or int(place.reshape(())) < 0:
        return None
    k = int(place.reshape(()))
    if sizes.ndim == 0:
        return int(sizes) * k, int(sizes) * (k + 1)
    return (int(sizes[:k].sum()), int(sizes[: k + 1].sum())) if k < len(sizes) else None
