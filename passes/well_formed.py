"""What must hold of a module between any two passes: the form that `graph.py` describes, and what TVM itself asks of Relax."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from qcompiler.passes.graph import plain


class IllFormed(Exception):
    """A module breaks the rules of its form; the message says which, and where."""


def check(module: tvm.IRModule, types: bool = True) -> None:
    """Raises IllFormed for a module that is not one function `main` with at most one dataflow block, whose value ids are unique, whose tensors have static
    shapes, and whose outputs are values with as many names; or that TVM finds ill-formed (a value read before it is computed, say). types: infer those of all
    values once more too, which takes as long as a pass; `GraphBuilder.emit` did so when it wrote them."""
    functions = {str(v.name_hint): f for v, f in module.functions.items()}
    others = sorted(name for name, f in functions.items() if name != "main" and isinstance(f, relax.Function))
    if not isinstance(functions.get("main"), relax.Function) or others:
        raise IllFormed(f"one Relax function 'main' expected, found {', '.join(['main' if 'main' in functions else 'none of that name', *others])}")
    main = functions["main"]
    if not isinstance(main.body, relax.SeqExpr) or len(main.body.blocks) > 1:
        raise IllFormed("a sequence of at most one block expected as the body of 'main'")
    bindings: list[Any] = []
    for block in main.body.blocks:
        if not isinstance(block, relax.DataflowBlock):
            raise IllFormed("the block of 'main' is not a dataflow block")
        bindings += block.bindings
    seen: set[str] = set()
    for variable in [*main.params, *(b.var for b in bindings)]:
        if str(variable.name) in seen:
            raise IllFormed(f"value id '{variable.name}' is bound twice")
        seen.add(str(variable.name))
        _check_static(str(variable.name), variable.ty)
    results = list(main.body.body.fields) if isinstance(main.body.body, relax.Tuple) else [main.body.body]
    for result in results:
        if not isinstance(result, relax.Var) or str(result.name) not in seen:
            raise IllFormed(f"an output is no value of the module: {str(result)[:80]}")
    names = plain(main.attrs["qc.outputs"]) if main.attrs is not None and "qc.outputs" in main.attrs else []
    if names and len(names) != len(results):
        raise IllFormed(f"{len(results)} outputs have {len(names)} names")
    try:
        relax.analysis.well_formed(module, check_ty=types)
    except (ValueError, TypeError, RuntimeError) as error:
        raise IllFormed(str(error).strip()) from error


def _check_static(name: str, ty: Any) -> None:
    """Raises IllFormed unless all tensors of a type have a known shape."""
    if isinstance(ty, relax.TupleType):
        for part in ty.fields:
            _check_static(name, part)
    elif isinstance(ty, relax.TensorType) and (ty.shape is None or not all(isinstance(d, (int, tvm.tirx.IntImm)) for d in ty.shape)):
        raise IllFormed(f"value '{name}' has no static shape: {ty}")
