"""From what an importer yields to the canonical float module, still in the file's layout: the passes, in order."""

from __future__ import annotations

import tvm

from qcompiler.passes.fold_batch_norm import fold_batch_norm
from qcompiler.passes.fold_constants import fold_constants
from qcompiler.passes.merge_pad import merge_pad
from qcompiler.passes.recognise import recognise
from qcompiler.passes.simplify import simplify
from qcompiler.passes.trained import checked

PASSES = (fold_constants, simplify, recognise, simplify, fold_batch_norm, merge_pad)  # what is recognized is spelled with views of its own


def canonicalize(module: tvm.IRModule) -> tvm.IRModule:
    for step in PASSES:
        module = checked(step, module)
    return module
