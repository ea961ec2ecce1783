"""Values held in another order of axes than the file's, while `layout.py` rewrites a module: what its rules work with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.axes import DHWC, N1WC, NHWC, Held, Order, complete, transposed
from qcompiler.passes.graph import Graph, GraphBuilder, arguments, const, const_value, dtype_of, is_const, relax_op, shape_of, substitute
from qcompiler.passes.trained import ATTRIBUTE, Trained

_IMAGES = {3: N1WC, 4: NHWC, 5: DHWC}  # rank of a value -> the order in which image operators read it


def _key(held: Held, order: Order) -> tuple[str, Order]:
    return str(held.var.name) + "/" + "/".join(map(str, held.order)), order


class HeldValues:
    """The module being made, and how each of its values is held. `image`: operators that want images in NHWC; `keeps_axes`: operators whose result has
    its operand's axes."""

    def __init__(self, graph: Graph, image: Collection[str], keeps_axes: Collection[str]) -> None:
        self.graph, self.image, self.keeps_axes = graph, image, keeps_axes
        self.builder = GraphBuilder(graph.attrs)
        self.builder.reserve(name for name, _ in graph.bindings)
        self.held: dict[str, Held] = {}
        self.made: dict[tuple[str, Order], Any] = {}  # (variable, order) -> the variable that holds it so
        self.used: set[str] = set()
        self.exprs, self.uses = graph.values(), graph.consumers()
        self.features: dict[str, np.ndarray] = {}  # flattened image -> the feature in the file that each of its columns is

    def run(self, rules: Mapping[str, Callable[[HeldValues, str, Any], bool]]) -> tvm.IRModule:
        """The module with every operator rewritten by the rule of its Relax name. Without one, or where it returns False, they work in the file's order."""
        for p in self.graph.inputs:
            name, shape = str(p.name), shape_of(p)
            self.used.add(name)
            self.hold(name, self.builder.input(name, shape, dtype_of(p)), tuple(range(len(shape))), shape)
        for held in list(self.held.values()):
            order = self.wanted(held.id, len(held.shape)) if len(held.shape) in (4, 5) and dtype_of(held.var) == "float32" else None
            if order is not None:  # converted at the very edge
                self.held[held.id] = Held(held.id, self.ordered(held, order), order, held.shape)
        for name, expr in self.graph.bindings:
            rule = rules.get(str(relax_op(expr))) if not isinstance(expr, relax.TupleGetItem) else None
            if isinstance(expr, relax.TupleGetItem):
                whole = self.held[str(expr.tuple_value.name)]
                self.bind(name, relax.TupleGetItem(whole.var, expr.index), whole.order or tuple(range(len(shape_of(expr)))), shape_of(expr))
            elif rule is None or not rule(self, name, expr):
                self.plain(name, expr)
        results = [(name, self.ordered(self.held[str(v.name)])) for name, v in self.graph.outputs]
        if trained := Trained.of(self.graph.attrs):  # what became another order of axes takes along what the file states of it
            moved = {name: str(held.var.name) for name, held in self.held.items() if name in trained.names() and name not in self.used}
            self.builder.state(ATTRIBUTE, trained.renamed(moved).attribute())
        return self.builder.finish(results)

    # -- for rules ----------------------------------------------------------------------------------------------------------------------

    def hold(self, name: str, var: Any, order: Order, shape: tuple[int, ...]) -> None:
        self.held[name] = Held(name, var, order, shape)

    def bind(self, name: str, expr: Any, order: Order, shape: tuple[int, ...]) -> bool:
        """Emit the value `name`, held in `order`. Returns True: the rule has done its work."""
        self.used.add(name)
        self.hold(name, self.builder.emit(name, expr), order, shape)
        return True

    def of(self, expr: Any) -> Held:
        """How an operand (a variable of the old module) is held."""
        return self.held[str(expr.name)]

    def ordered(self, held: Held, order: Order | None = None) -> Any:
        """A variable that holds the value in `order` (the file's own when left out), made when there is none yet."""
        order = tuple(range(len(held.shape))) if order is None else order
        if held.order == order:
            return held.var
        key = _key(held, order)
        if key not in self.made:
            self.made[key] = self._move(held, order)
        return self.made[key]

    def constant(self, expr: Any, order: Order, rank: int) -> Any:
        """A constant operand that broadcasts with a value held in `order`; `rank` is the value's."""
        value = const_value(expr)
        if value.size == 1 and value.ndim <= rank:
            return const(value.reshape(()))
        return const(transposed(value.reshape((1,) * (rank - value.ndim) + value.shape), order))

    def full(self, held: Held) -> Held:
        """`held` with every axis of the value present (extra axes kept): what an operator that names axes needs."""
        order = complete(held.order, held.shape)
        return Held(held.id, self.ordered(held, order), order, held.shape)

    def moved(self, name: str, order: Order) -> Held:
        """Hold the value `name` in `order` from here on. The variable that held it before still serves who asks for that order."""
        before = self.held[name]
        now = Held(before.id, self.ordered(before, order), order, before.shape)
        self.made[_key(now, before.order)] = before.var
        self.held[name] = now
        return now

    def plain(self, name: str, expr: Any) -> bool:
        """Emit an operator as it is, on operands in the file's order."""
        for arg in arguments(expr):
            if isinstance(arg, relax.Var):
                self.ordered(self.of(arg))
        expr = substitute(expr, lambda v: self.ordered(self.of(v)))
        typed = expr if isinstance(expr, relax.Var) else relax.BlockBuilder().normalize(expr)
        shape = shape_of(typed) if isinstance(typed.ty, relax.TensorType) else ()
        return self.bind(name, expr, tuple(range(len(shape))), shape)

    def wanted(self, name: str, rank: int) -> Order | None:
        """The order of axes that the nearest image operator behind a value wants it in; None when there is none.

        Looks through operators that keep a value's axes, and through permutations.
        """
        queue, seen = [(name, tuple(range(rank)))], {name}  # axis j of what is looked at is axis axes[j] of the value
        while queue:
            value, axes = queue.pop(0)
            for user in self.uses[value]:
                expr: Any = self.exprs.get(user)
                op = relax_op(expr)
                if op in self.image:
                    order = _IMAGES.get(rank) if rank < 5 or shape_of(expr)[0] == 1 else None
                    return tuple(None if a is None else axes[a] for a in order) if order else None
                if user in seen:
                    continue
                seen.add(user)
                if op == "relax.permute_dims":
                    queue.append((user, tuple(axes[int(a)] for a in expr.attrs.axes)))
                elif isinstance(expr, relax.TupleGetItem) or op == "relax.split" or (op in self.keeps_axes and len(shape_of(expr)) == rank):
                    queue.append((user, axes))
        return None

    def only_feeds_matrices(self, name: str) -> bool:
        """Is a value read only as the left operand of products with constant matrices?"""
        readers: list[Any] = [self.exprs.get(user) for user in self.uses[name]]
        return all(relax_op(r) == "relax.matmul" and is_const(r.args[1]) and len(shape_of(r.args[1])) == 2 for r in readers)

    # -- moving -------------------------------------------------------------------------------------------------------------------------

    def _move(self, held: Held, order: Order) -> Any:
        shape = tuple(1 if a is None else held.shape[a] for a in order)
        wanted = [a for a in order if a is not None and held.shape[a] != 1]
        var = held.var
        if held.moving == wanted:
            if shape_of(var) == shape:
                return var
            return self._emit(held, order, relax.op.reshape(var, shape))
        kept = [a for a in order if a is not None]
        present = [a for a in held.order if a is not None]
        source = [a for a in present if a in kept] + [a for a in kept if a not in present]
        arranged = tuple(held.shape[a] for a in source)
        if shape_of(var) != arranged:
            var = self.builder.emit(self.builder.made(held.id, "ranked"), relax.op.reshape(var, arranged))
        axes = [source.index(a) for a in kept]
        permuted = relax.op.permute_dims(var, axes)
        if len(kept) == len(order):
            return self._emit(held, order, permuted)
        return self._emit(held, order, relax.op.reshape(self.builder.emit(self.builder.made(held.id, "moved"), permuted), shape))

    def _emit(self, held: Held, order: Order, expr: Any) -> Any:
        """A value in the file's order takes its id if nothing has it; others are `<id>~nhwc`, `<id>~nchw` or `<id>~moved`."""
        name = held.id
        if order != tuple(range(len(held.shape))) or name in self.used:
            suffix = {NHWC: "nhwc", N1WC: "nhwc", DHWC: "nhwc", (0, 1, 2, 3): "nchw"}.get(order, "moved")
            name = self.builder.made(held.id, suffix)
        self.used.add(name)
        return self.builder.emit(name, expr)
