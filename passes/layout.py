"""From ONNX's layout (channels first) to the canonical one: images NHWC inside, conversions at the edges only. Follows merge_pad.

    conv2d NCHW/OIHW  -->  conv2d NHWC/OHWI, and everything between convolutions works on NHWC data, with its axes and constants renumbered

A value is *held* in some order of its axes: `Held(var, order)` says that axis k of the variable is axis `order[k]` of the value in the file. So a
`permute_dims` costs nothing: it renames axes. So does a reshape that only adds or drops axes of size 1. Data is moved only where an operator
needs an order that a value isn't held in: at the network's edges, and where the network itself mixes axes (a flatten of an image, a channel shuffle).
1-D convolutions and poolings become 2-D ones of height 1: the unit axis is there in the variable (`order[k]` is None) and not in the value.
"""

from __future__ import annotations

import tvm

from qcompiler.passes.graph import Graph
from qcompiler.passes.held_values import HeldValues
from qcompiler.passes.layout_rules import IMAGE, KEEPS_AXES, RULES


def to_channels_last(module: tvm.IRModule) -> tvm.IRModule:
    """The canonical module. Inputs and outputs keep the file's layout."""
    return HeldValues(Graph.of(module), IMAGE, KEEPS_AXES).run(RULES)
