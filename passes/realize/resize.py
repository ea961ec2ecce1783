"""resize2d: which pixels and weights each output pixel takes is decided here, at compile time.

q(image.resize2d(dq(x)))   -->   qc.resize2d(x, iy0, iy1, wy, ix0, ix1, wx)       the output keeps the input's parameters
"""

from __future__ import annotations

from typing import Any

from qcompiler.numerics.spec import resize_indices
from qcompiler.passes.graph import shape_of
from qcompiler.passes.realize.site import Site


def resize2d(site: Site) -> Any:
    attrs = site.group.attrs
    x = site.requantized(site.inputs[0], site.quantized)
    height, width = shape_of(x.expr)[1:3]
    call = {"size": attrs["size"], "method": attrs["method"]}
    for axis, (old, new) in zip("yx", [(height, attrs["size"][0]), (width, attrs["size"][1])], strict=True):
        first, second, weight = resize_indices(old, new, attrs["method"], attrs["transformation"], attrs["rounding"])
        call |= {f"i{axis}0": first, f"i{axis}1": second, f"w{axis}": weight}
    return site.call("qc.resize2d", [x.expr], call)
