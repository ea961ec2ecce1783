"""Gives what exporters spell out the operator that Relax has for it: one list of patterns.

A pattern looks at a binding as the end of what it knows, and answers with the expression that stands for it, with a `Miss` where it looks like the
pattern and isn't (the sentence says why), or with None. What a miss says is kept in the module's attribute `qc.near_misses`, {value id: why}; the group of that
value carries it, so that `explain` shows it. Follows simplify; before fold_batch_norm, which would take the factors of normalizations away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm

from qcompiler.passes.recognise.activations import bent, constant_slope, spelled_out
from qcompiler.passes.recognise.attention import attention, attention_in_rows
from qcompiler.passes.recognise.miss import NEAR_MISSES, Miss
from qcompiler.passes.recognise.normalizations import group_norm, layer_norm, rms_norm
from qcompiler.passes.rewrite import Rewrite


@dataclass(frozen=True)
class Pattern:
    """`match(rewrite, name, expression)`: `expression` is what `name` is bound to, over what its operands have become."""

    before: str
    after: str
    match: Callable[[Rewrite, str, Any], Any]


PATTERNS = (
    Pattern("prelu(x, one slope)", "leakyrelu(x, slope)", constant_slope),
    Pattern("max(x, slope * x); relu(x) - slope * relu(-x); where(x > 0, x, slope * x); ...", "leakyrelu(x, slope), prelu(x, slopes)", bent),
    Pattern("x * sigmoid(x); 0.5 * x * (1 + erf(x / sqrt(2))); ... with tanh; x * (clip(x + 3, 0, 6) / 6)", "silu, gelu, gelu_tanh, hard-swish", spelled_out),
    Pattern("d = x - mean(x); d / sqrt(mean(d^2) + epsilon) * gamma + beta", "layer_norm(x, gamma, beta)", layer_norm),
    Pattern("x / sqrt(mean(x^2) + epsilon) * gamma", "rms_norm(x, gamma)", rms_norm),
    Pattern("reshape(group_norm(reshape(x), groups as channels)) * gamma + beta", "group_norm(x, gamma, beta)", group_norm),
    Pattern("softmax(scale * q @ k' + bias) @ v", "attention(q, k, v, bias)", attention),
    Pattern("permute_dims(attention over [batch, head, row, channel])", "attention over [batch, row, head, channel]", attention_in_rows),
)


def recognise(module: tvm.IRModule) -> tvm.IRModule:
    """The module in which every pattern of `PATTERNS` is replaced, the first that matches at each binding."""
    rewrite = Rewrite(module)
    misses: dict[str, str] = {}
    for name, expr in rewrite:
        for pattern in PATTERNS:
            found = pattern.match(rewrite, name, expr)
            if isinstance(found, Miss):
                misses[found.at] = found.reason
            elif found is not None:
                expr = found
                break
        rewrite.keep(name, expr)
    result = rewrite.done()
    return tvm.IRModule({"main": result["main"].with_attr(NEAR_MISSES, misses)}) if misses else result
