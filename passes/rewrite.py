"""What rewriting passes share: walk the bindings in order, replace some, keep the rest.

rewrite = Rewrite(module)
for name, expr in rewrite:            # operands already replaced
    rewrite.keep(name, expr)          # or rewrite.replace(name, a variable or constant), or nothing, when no one needs it any more
return rewrite.done()
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.graph import Graph, GraphBuilder, const, const_value, dtype_of, is_const, relax_op, shape_of, substitute
from qcompiler.passes.trained import ATTRIBUTE, Trained


class Rewrite:
    """`values`: value id -> expression in the new module, for the bindings kept so far. `uses`: value id -> readers in the old module."""

    def __init__(self, module: tvm.IRModule) -> None:
        self.graph = Graph.of(module)
        self.builder = GraphBuilder(self.graph.attrs)
        self.builder.reserve(name for name, _ in self.graph.bindings)
        self.uses = self.graph.consumers()
        self.old = self.graph.values()
        self.order = {name: i for i, (name, _) in enumerate(self.graph.bindings)}
        self.trained = Trained.of(self.graph.attrs)
        self.renamed: dict[str, str] = {}  # rounded value that vanished -> the one that holds its elements
        self.values: dict[str, Any] = {}
        self.made: dict[Any, Any] = {}  # of `once`
        self.env: dict[str, Any] = {str(p.name): self.builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in self.graph.inputs}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for name, _ in self.graph.bindings:
            yield name, self.current(name)

    def current(self, name: str) -> Any:
        """The old expression of `name` over what its operands have become."""
        return substitute(self.old[name], lambda v: self.env.get(str(v.name), v))

    def keep(self, name: str, expr: Any) -> Any:
        """Bind `expr` to `name` in the new module and return its variable."""
        self.values[name] = expr
        self.env[name] = self.builder.emit(name, expr)
        return self.env[name]

    def interior(self, id: str, what: str, expr: Any) -> Any:
        """Bind a value that the old module doesn't have, under the first free name for `what` beside the value `id`."""
        name = self.builder.made(id, what)
        self.values[name] = expr
        return self.builder.emit(name, expr)

    def once(self, id: str, what: str, expr: Any) -> Any:
        """`interior` for values that several rewrites need: the same expression under the same name is bound once."""
        operands = tuple(str(a.name) if isinstance(a, relax.Var) else const_value(a).tobytes() if is_const(a) else str(a) for a in expr.args)
        key = (id, what, str(relax_op(expr)), operands)
        if key not in self.made:
            self.made[key] = self.interior(id, what, expr)
        return self.made[key]

    def replace(self, name: str, by: Any) -> None:
        """Readers of `name` read `by` (a variable or constant) instead; a constant as the model file rounds that value."""
        if is_const(by) and name in self.trained.values:
            by = const(self.trained.values[name].rounded(const_value(by)))
        self.env[name] = by
        if isinstance(by, relax.Var):
            self.renamed[name] = str(by.name)
        else:
            self.trained = self.trained.without({name})

    def value(self, expr: Any) -> Any:
        """The new expression behind a variable; None for inputs, constants, everything else, and values that the model file states something of: what
        computes those is nobody else's."""
        return self.values.get(str(expr.name)) if isinstance(expr, relax.Var) and not self.is_stated(str(expr.name)) else None

    def is_stated(self, name: str) -> bool:
        """Does the model file round this value, or compute it for its own rounding?"""
        return name in self.trained.values or name in self.trained.exact

    def single_use(self, expr: Any) -> bool:
        """May the value of variable `expr` vanish into its reader: one binding reads it once, and it is neither an output of the network nor a value that
        the model file rounds to 8 bits?"""
        uses = self.uses.get(str(expr.name), []) if isinstance(expr, relax.Var) and not self.is_stated(str(expr.name)) else []
        return len(uses) == 1 and uses[0] != "<output>"

    def done(self) -> tvm.IRModule:
        results = []
        for name, var in self.graph.outputs:
            new = self.env.get(str(var.name), var)
            results.append((name, self.builder.emit(self.builder.fresh(str(var.name)), new) if is_const(new) else new))
        if self.trained:
            gone = {n: by for n, by in self.renamed.items() if n in self.trained.names()}
            self.builder.state(ATTRIBUTE, self.trained.renamed(gone).attribute())
        return self.builder.finish(results)


def channel_vector(expr: Any, axis: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """A floating constant that broadcasts to `shape` along `axis` only, as float64 of shape [shape[axis]] or [1]; else None."""
    if not is_const(expr):
        return None
    value = const_value(expr)
    if value.dtype.kind != "f" or value.ndim > len(shape):
        return None
    full = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
    if any(d != 1 for i, d in enumerate(full.shape) if i != axis) or full.shape[axis] not in (1, shape[axis]):
        return None
    return full.astype(np.float64).reshape(-1)
