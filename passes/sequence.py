"""Every pass, in the order in which a module meets them, and the one way to run them.

    importer --IMPORTED--> module in the file's layout --CANONICAL--> canonical float module --WIDE--> the same, with copies of its streams
    canonical float module --REPLACE_WEIGHTS--> the same, equalized --RESIDUAL--> the same, sums in 16 bits --HALVED--> the same, some operands in halves
    canonical float module --INSERT_QDQ--> QDQ module --INTEGER--> integer module --REPLACE_OPERANDS--> the same, corrected
    integer module --PORTS--> the same with pixels or integers at its edges
    canonical float module --FLOAT--> float network of our kernels
    integer module, float network --CPU_KERNELS, but for GPUs--> --LOWERABLE--> what `qcompiler/backend/lowering.py` reads

After each pass the module is dumped and checked (`well_formed.py`). A pass that fails, or makes what is not well-formed, is a bug of ours and named by an
InternalError; errors that a user can mend pass as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm

from qcompiler.base.debug import Dump, no_dump
from qcompiler.base.errors import bugs_named
from qcompiler.passes.account import settle_account
from qcompiler.passes.common import common
from qcompiler.passes.fold_batch_norm import fold_batch_norm
from qcompiler.passes.fold_constants import fold_constants
from qcompiler.passes.fuse_edges import fuse_edges
from qcompiler.passes.halves import in_halves
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.integer_edges import integer_edges
from qcompiler.passes.layout import to_channels_last
from qcompiler.passes.legal_layouts import legal_layouts
from qcompiler.passes.legalize import legalize
from qcompiler.passes.merge_pad import merge_pad
from qcompiler.passes.ports import with_ports
from qcompiler.passes.products import products
from qcompiler.passes.realize import realize
from qcompiler.passes.recognise import recognise
from qcompiler.passes.replace_operands import replace_operands
from qcompiler.passes.replace_weights import replace_weights
from qcompiler.passes.select_float import select_float
from qcompiler.passes.select_kernels import select_kernels
from qcompiler.passes.simplify import simplify
from qcompiler.passes.streams import with_copies, with_wide_residuals
from qcompiler.passes.trained import lost, settled
from qcompiler.passes.unread_states import unread_states
from qcompiler.passes.views import views_to_reshape
from qcompiler.passes.volumes import volumes
from qcompiler.passes.well_formed import IllFormed, check

Pass = Callable[..., tvm.IRModule]

IMPORTED: tuple[Pass, ...] = (settled,)
CANONICAL: tuple[Pass, ...] = (
    fold_constants,
    simplify,
    recognise,
    unread_states,
    simplify,  # what is recognized is spelled with views of its own
    products,
    common,
    fold_batch_norm,
    merge_pad,
    to_channels_last,
)
WIDE: tuple[Pass, ...] = (with_copies,)
RESIDUAL: tuple[Pass, ...] = (with_wide_residuals,)
HALVED: tuple[Pass, ...] = (in_halves,)
REPLACE_WEIGHTS: tuple[Pass, ...] = (replace_weights,)
INSERT_QDQ: tuple[Pass, ...] = (insert_qdq,)
INTEGER: tuple[Pass, ...] = (realize, fuse_edges, integer_edges, volumes, legal_layouts, settle_account)
REPLACE_OPERANDS: tuple[Pass, ...] = (replace_operands,)
PORTS: tuple[Pass, ...] = (with_ports,)
FLOAT: tuple[Pass, ...] = (select_float, volumes, legal_layouts)
CPU_KERNELS: tuple[Pass, ...] = (select_kernels,)
LOWERABLE: tuple[Pass, ...] = (views_to_reshape, legalize)

PASSES = (*IMPORTED, *CANONICAL, *WIDE, *REPLACE_WEIGHTS, *RESIDUAL, *HALVED)
PASSES += (*INSERT_QDQ, *INTEGER, *REPLACE_OPERANDS, *PORTS, *FLOAT, *CPU_KERNELS, *LOWERABLE)


def run(passes: tuple[Pass, ...], module: tvm.IRModule, *arguments: Any, dump: Dump = no_dump) -> tvm.IRModule:
    """The module behind all of `passes`, each checked. arguments: what the first of them takes beside the module."""
    for each in passes:
        with bugs_named(f"pass '{each.__name__}'", module):
            made = each(module, *arguments)
        dump(each.__name__, made)
        with bugs_named(f"pass '{each.__name__}', whose result is not well-formed", made):
            check(made, types=each is passes[-1])
            if gone := lost(made):
                raise IllFormed(f"what the model file states of {', '.join(gone)} is lost")
        module, arguments = made, ()
    return module
