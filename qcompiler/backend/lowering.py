"""Lowering: a Relax module (integer, or float with scheduled groups) becomes a Program of kernels over planned memory.

    bindings --> OpCalls --> rows, layouts --> kernels --> offsets --> Program

Follows the passes that make an integer network or a float one (`passes/sequence.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler import schedules
from qcompiler.backend.images import choose_images, one_at_a_time, one_image, runs_of
from qcompiler.backend.in_place import join_in_place
from qcompiler.backend.node import Node, Taps, indexable
from qcompiler.backend.tails import with_tails
from qcompiler.backend.unread_taps import CONVOLUTIONS, read_of, without_unread_taps
from qcompiler.base.debug import Dump, no_dump
from qcompiler.base.errors import ModelError
from qcompiler.base.memory import Request, bytes_of, packed, plan_memory, united
from qcompiler.base.targets import Target
from qcompiler.passes.graph import Graph, arguments, const_value, dtype_of, is_const, match_op, relax_op, shape_of
from qcompiler.passes.sequence import CPU_KERNELS, LOWERABLE, run
from qcompiler.schedules.legalized import legalized_kernel
from qcompiler.schedules.table import FLAT, Kernel, Layout, Need, OpCall, Row, joined, satisfied, select

Params = Callable[[Row, OpCall], Mapping[str, Any] | None]  # tuned parameters for an operator, None for the row's own default


@dataclass(frozen=True)
class Place:
    """Where a value's bytes are: `space` is "workspace", "input" or "output" (then `offset` is the argument's index)."""

    space: str
    offset: int


@dataclass
class Value:
    """A tensor of the program. `id` is its value id; `root` names the value whose memory it shares (itself when it owns memory), `shift` bytes behind
    its start. `unsigned`: its bytes are numbers from 0 to 255 (pixels), not int8 as the target stores them."""

    id: str
    layout: Layout
    root: str
    place: Place | None = None
    shift: int = 0
    unsigned: bool = False


@dataclass
class Step:
    """One kernel call. `reads` and `writes` are value ids; `op` is kept so that its constants can be packed again. `op.value_id` is what it makes before its
    tail goes on, which may be written nowhere."""

    writes: str
    op: OpCall | None
    name: str
    kernel: Kernel
    reads: list[str]
    row: Row | None = None
    params: dict[str, Any] = field(default_factory=dict)
    constants: list[int] = field(default_factory=list)  # byte offsets in the constants blob
    scratch: int = 0  # byte offset in the workspace
    more: list[str] = field(default_factory=list)  # further values it writes
    auxiliary: bool = False  # made by lowering (halo, copy): no value of the model
    images: int = 1  # how many times the kernel is called, each time for the next image of all values
    taps: Taps | None = None  # see `Node`


@dataclass
class Port:
    """A network input or output: shape and dtype as the user sees them."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    value: str


@dataclass
class Program:
    """Kernels in order, the values they read and write, and the memory they need. Everything `artifact.build` wants."""

    target: Target
    steps: list[Step]
    values: dict[str, Value]
    inputs: list[Port]
    outputs: list[Port]
    workspace: int  # bytes
    constants: np.ndarray  # uint8, every array 64-byte aligned
    revision: int = 0  # how often constants were replaced
    near: dict[str, int] = field(default_factory=dict)
    """Of a run of all steps: where in the workspace roots lie then; of those that never leave a run of images, one image at a time."""

    def kernels(self) -> dict[str, Kernel]:
        """Every distinct kernel by its symbol, in order of first use."""
        return kernels_of(self.steps)

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """(begin, end, images): the steps in runs that go through so many images one after the other."""
        return runs_of(self.steps)

    def step_of(self, value_id: str) -> Step:
        """The step whose operator computes a value. Raises KeyError."""
        for step in self.steps:
            if value_id == (step.writes if step.op is None else step.op.value_id) and not step.auxiliary:
                return step
        raise KeyError(value_id)

    def held(self) -> list[list[tuple[int, int]]]:
        """Before each step, and behind the last: the byte ranges [begin, end) of the workspace that hold what was written and is still to be read."""
        first, last = _lifetimes(self.steps, self.values)
        ranges: dict[str, tuple[int, int]] = {}
        for value in self.values.values():
            if value.place is not None and value.place.space == "workspace":
                begin, end = ranges.get(value.root, (value.place.offset, 0))
                ranges[value.root] = min(begin, value.place.offset), max(end, value.place.offset + value.layout.bytes)
        return [united([r for v, r in ranges.items() if first[v] < step <= last[v]]) for step in range(len(self.steps) + 1)]

    def replace_operand(self, value_id: str, index: int, array: np.ndarray) -> None:
        """Pack the constants of one step again with operand `index` replaced; the kernel's code stays as it is. An operator that stays float
        has what is computed at run time first, then its constants."""
        step = self.step_of(value_id)
        for at, raw in self.packed_with(step, {index: array}).items():
            self.constants[step.constants[at] : step.constants[at] + raw.size] = raw
        if step.op is not None:
            step.op.operands[index] = np.asarray(read_of(index, array, step.taps), np.asarray(step.op.operands[index]).dtype)
        self.revision += 1

    def packed_with(self, step: Step, operands: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """{number of a constant of the step: its bytes}, with these operands in the place of its own, which stay. They are numbered as for
        `replace_operand`."""
        if step.op is None or step.row is None:
            at = {index - len(step.reads): array for index, array in operands.items()}
            return {i: bytes_of(np.asarray(array, step.kernel.constants[i].dtype)) for i, array in at.items()}
        own, operands = step.op.operands, {i: read_of(i, array, step.taps) for i, array in operands.items()}
        op = replace(step.op, operands=[np.asarray(operands[i], np.asarray(o).dtype) if i in operands else o for i, o in enumerate(own)])
        # Code that was made with some headroom serves these constants as long as they need no more than all of it, and code that trusts none serves any.
        tried = (replace(op, attrs={**op.attrs, **given}) for given in ({}, {"headroom": 1.0}, {"headroom": math.inf}))
        kernel = next((k for o in tried if (k := step.row.build(o, step.params, self.target)).key == step.kernel.key), None)
        assert kernel is not None, "constants must not decide a kernel's code"
        return {i: bytes_of(array) for i, array in enumerate(kernel.constants)}


def kernels_of(steps: Iterable[Step]) -> dict[str, Kernel]:
    """Every distinct kernel of some steps by its symbol, in order of first use."""
    found: dict[str, tuple[str, Kernel]] = {}
    for step in steps:
        if step.kernel.key not in found:
            found[step.kernel.key] = (f"k{len(found)}_" + re.sub(r"\W", "_", step.name), step.kernel)
    return dict(found.values())


def lower(module: tvm.IRModule, target: Target, params: Params | None = None, dump: Dump = no_dump) -> Program:
    """Lower a module for a target.

    `params` returns tuned parameters for an operator, or None where the row's heuristic shall decide.
    Raises ModelError, naming the operator, when no kernel can be made for one.
    """
    schedules.load(target)
    return _Lowering(module, target, params or (lambda row, op: None), dump).run()


class _Lowering:
    def __init__(self, module: tvm.IRModule, target: Target, params: Params, dump: Dump) -> None:
        self.target, self.params = target, params
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.module = run(LOWERABLE if target.gpu else CPU_KERNELS + LOWERABLE, module, dump=dump)
        self.graph = Graph.of(self.module)

    def run(self) -> Program:
        self.read()
        self.select_rows()
        if self.target.gpu:
            from qcompiler.backend.fused import with_fused  # not above: the schedules for GPUs, which no other target needs

            self.nodes = with_tails(self.nodes, self.values, self.output_values, self.op_call)
            self.nodes = with_fused(self.nodes, self.values, self.output_values)
        self.decide_layouts()
        steps = self.make_steps()
        workspace, near = self.place(steps)
        constants = pack_constants(steps)
        inputs = [Port(str(p.name), shape_of(p), dtype_of(p), str(p.name)) for p in self.graph.inputs]
        outputs = [Port(name, shape_of(v), dtype_of(v), value) for (name, v), value in zip(self.graph.outputs, self.output_values, strict=True)]
        return Program(self.target, steps, self.values, inputs, outputs, workspace, constants, near=near)

    # -- bindings --> nodes ---------------------------------------------------------------------------------------------------------

    def storage(self, dtype: str) -> str:
        return self.target.storage if dtype == "int8" else dtype

    def add_value(self, id: str, expr: Any, root: str | None = None) -> None:
        self.values[id] = Value(id, Layout(shape_of(expr), self.storage(dtype_of(expr))), root or id, unsigned=dtype_of(expr) == "uint8")

    def read(self) -> None:
        alias: dict[str, str] = {}  # names of TupleGetItem and plain-variable bindings -> value id
        tuples: dict[str, list[str]] = {}

        def operand(arg: Any) -> str | np.ndarray:
            return const_value(arg) if is_const(arg) else alias.get(str(arg.name), str(arg.name))

        for p in self.graph.inputs:
            self.add_value(str(p.name), p)
        fields = {(str(e.tuple_value.name), int(e.index)): n for n, e in self.graph.bindings if isinstance(e, relax.TupleGetItem)}
        for name, expr in self.graph.bindings:
            op = match_op(expr)
            if op is not None:
                self.add_value(name, expr)
                node = Node(name, op[0], [operand(a) for a in op[1]], op[2], [name])
                self.nodes.append(without_unread_taps(node, shape_of(op[1][0])) if op[0] in CONVOLUTIONS else node)
            elif relax_op(expr) == "relax.call_tir":
                types = expr.ty_args
                if len(types) == 1 and not hasattr(types[0], "fields"):
                    outputs = [name]
                    self.values[name] = Value(name, Layout(tuple(int(d) for d in types[0].shape), str(types[0].dtype)), name)
                else:
                    parts = list(types[0].fields) if len(types) == 1 else list(types)
                    outputs = [fields.get((name, i), self.graph.naming.made(name, i)) for i in range(len(parts))]
                    for output, ty in zip(outputs, parts, strict=True):
                        self.values[output] = Value(output, Layout(tuple(int(d) for d in ty.shape), str(ty.dtype)), output)
                    tuples[name] = outputs
                args = [operand(a) for a in arguments(expr.args[1])]
                self.nodes.append(Node(name, "legalized", args, {}, outputs, function=self.module[expr.args[0]]))
            elif isinstance(expr, relax.TupleGetItem):
                alias[name] = tuples[str(expr.tuple_value.name)][int(expr.index)]
            elif isinstance(expr, relax.Var):
                alias[name] = alias.get(str(expr.name), str(expr.name))
            elif is_const(expr):  # a constant result: an operand of a copy
                self.add_value(name, expr)
                self.nodes.append(Node(name, "qc.copy", [const_value(expr)], {}, [name]))
            else:
                raise ModelError(f"operator '{relax_op(expr) or type(expr).__name__}' of '{name}' has no kernel and no legalization; it can't be compiled")
        self.output_values = [alias.get(str(v.name), str(v.name)) for _, v in self.graph.outputs]
        for node in self.nodes:  # integers of the user's are stored as their type says, whatever the target's storage is
            raw = node.operands[0] if node.name == "qc.enter" else node.id
            if node.name in ("qc.enter", "qc.leave") and isinstance(raw, str):
                self.values[raw].layout = replace(self.values[raw].layout, dtype=node.attrs.get("dtype", "int8"))

    # -- rows and layouts -----------------------------------------------------------------------------------------------------------

    def op_call(self, node: Node) -> OpCall:
        return node.call(lambda value: self.layout(value, node.images))

    def layout(self, value: str, images: int) -> Layout:
        """A value's, or that of one of its images."""
        return self.values[value].layout if images == 1 else one_image(self.values[value].layout)

    def select_rows(self) -> None:
        for node in self.nodes:
            if node.name in ("legalized", "qc.reshape"):
                continue
            try:
                node.row = select(self.op_call(node), self.target)
            except LookupError as error:
                raise ModelError(f"'{node.id}': no kernel for {node.name} on {self.target.name}: {error}") from error

    def decide_layouts(self) -> None:
        """Give each value the halo and pitch its consumers need; where the producer can't write that, a copy does."""
        needs: dict[str, list[tuple[Need, Node]]] = {v: [] for v in self.values}
        for node in self.nodes:
            ids = [o for o in node.operands if isinstance(o, str)]
            wanted = node.row.needs(self.op_call(node), self.target) if node.row else [Need(dense=not node.parts)] * len(ids)
            for operand, need in zip(ids, wanted, strict=True):
                needs[operand].append((need, node))
        rigid = {str(p.name) for p in self.graph.inputs} | set(self.output_values)
        rigid |= {o for n in self.nodes if (n.row is None and not n.parts) or n.name in FLAT for o in n.written}
        ordered: list[Node] = []
        late: dict[str, list[Node]] = {}  # copies to insert after the producer of a value
        for value, asked in needs.items():
            layout = joined(self.values[value].layout, [n for n, _ in asked])
            if layout.dense:
                continue
            if value not in rigid and not any(n.dense for n, _ in asked):
                self.values[value].layout = layout
                continue
            copy = self.graph.naming.made(value, "padded")
            self.values[copy] = Value(copy, layout, copy)
            node = Node(copy, "qc.copy", [value], {}, [copy], auxiliary=True)
            node.row = select(self.op_call(node), self.target)
            late.setdefault(value, []).append(node)
            for need, consumer in asked:
                if not satisfied(self.values[value].layout, need):
                    consumer.operands = [copy if isinstance(o, str) and o == value else o for o in consumer.operands]
        for p in self.graph.inputs:
            ordered += late.get(str(p.name), [])
        for node in self.nodes:
            ordered.append(node)
            for output in node.written:
                ordered += late.get(output, [])
        self.nodes = ordered
        if not self.target.gpu:
            join_in_place(ordered, self.values, lambda v, layout: v not in rigid and all(satisfied(layout, n) for n, _ in needs.get(v, [])))
            first = next((shape_of(p) for p in self.graph.inputs), ())
            choose_images(ordered, self.values, first[0] if first else 1)
            for node in (n for n in ordered if n.images > 1):
                self.select_for_image(node)

    def select_for_image(self, node: Node) -> None:
        """The row of an operator that goes image by image; together after all, where that row asks for other layouts than were decided."""
        op = self.op_call(node)
        row, layouts = select(op, self.target), [o for o in op.operands if isinstance(o, Layout)]
        assert node.row is not None
        if row.own_channels >= node.row.own_channels and all(map(satisfied, layouts, row.needs(op, self.target))):
            node.row = row
        else:
            node.images = 1

    # -- kernels --------------------------------------------------------------------------------------------------------------------

    def make_steps(self) -> list[Step]:
        steps: list[Step] = []
        taken: set[str] = {str(p.name) for p in self.graph.inputs}
        zero_points = self.halo_values()
        for node in self.nodes:
            reads = [o for o in node.operands if isinstance(o, str)]
            if node.name == "qc.reshape" and reads:
                self.values[node.id].root, self.values[node.id].shift = self.values[reads[0]].root, self.values[reads[0]].shift
                continue
            if node.name == "legalized":
                steps += self.legalized(node, reads)
                continue
            for value in node.written:
                layout = self.layout(value, node.images)
                if any(layout.halo) and self.values[value].root == value:
                    steps.append(replace(self.fill_halo(value, layout, zero_points[value]), images=node.images))
            steps.append(self.fused(node, reads) if node.parts else self.step(node, reads))
        self.output_values = [self.own_output(steps, value, taken) for value in self.output_values]
        return steps

    def legalized(self, node: Node, reads: list[str]) -> list[Step]:
        """The steps of an operator that stays float: one on a CPU, one per loop nest on a GPU, with temporaries in a value of their own."""
        constants = [o if isinstance(o, np.ndarray) else None for o in node.operands]
        first, *more = node.outputs
        if not self.target.gpu:
            kernel = legalized_kernel(node.function, constants, [self.values[o].layout for o in node.outputs])
            return [Step(first, None, "float", kernel, reads, more=more)]
        from qcompiler.schedules.cuda.legalized import legalized_kernels

        kernels, scratch = legalized_kernels(node.function, constants)
        if scratch:
            name = self.graph.naming.made(first, "scratch")
            self.values[name] = Value(name, Layout((scratch,), "uint8"), name)
            more = [*more, name]
        steps = [Step(first, None, "float", kernel, reads, more=more, auxiliary=True) for kernel in kernels]
        steps[-1].auxiliary = False
        return steps

    def fused(self, node: Node, reads: list[str]) -> Step:
        from qcompiler.backend.fused import fused_kernel_of

        first, *more = node.outputs
        kernel = fused_kernel_of(node, lambda value: self.values[value].layout, self.target)
        return Step(first, None, "float", kernel, reads, more=more)

    def step(self, node: Node, reads: list[str]) -> Step:
        assert node.row is not None
        op = indexable(self.op_call(node))
        tuned = self.params(node.row, op)
        params = dict(tuned if tuned is not None else node.row.default(op, self.target))
        kernel = node.row.build(op, params, self.target)
        first, *more = node.written
        return Step(first, op, node.name, kernel, reads, node.row, params, more=more, auxiliary=node.auxiliary, images=node.images, taps=node.taps)

    def halo_values(self) -> dict[str, float]:
        """What the halo of each value holds: the zero point by which its consumers read it."""
        found: dict[str, float] = {}
        for node in self.nodes:
            for operand in node.operands:
                if isinstance(operand, str) and any(self.values[operand].layout.halo):
                    value = node.attrs.get("x_zero_point")
                    if value is not None or self.values[operand].layout.dtype == "float32":
                        found.setdefault(operand, 0 if value is None else value)
        return found

    def fill_halo(self, value: str, layout: Layout, zero_point: float) -> Step:
        op = OpCall("qc.fill_halo", [], {"value": zero_point}, layout, value)
        row = select(op, self.target)
        params = row.default(op, self.target)
        return Step(value, op, op.name, row.build(op, params, self.target), [], row, params, auxiliary=True)

    def own_output(self, steps: list[Step], value: str, taken: set[str]) -> str:
        """The value to write to the user's buffer: `value` itself when it owns its memory, else a copy of it."""
        if self.values[value].root == value and value not in taken:
            taken.add(value)
            return value
        copy, count = self.graph.naming.made(value, "output"), 0
        while copy in self.values:
            count += 1
            copy = self.graph.naming.made(value, f"output{count}")
        self.values[copy] = Value(copy, self.values[value].layout, copy)
        node = Node(copy, "qc.copy", [value], {}, [copy], auxiliary=True)
        node.row = select(self.op_call(node), self.target)
        steps.append(self.step(node, [value]))
        taken.add(copy)
        return copy

    # -- memory ---------------------------------------------------------------------------------------------------------------------

    def place(self, steps: list[Step]) -> tuple[int, dict[str, int]]:
        """Decide where every value and scratch buffer lies; returns the size of the workspace in bytes, and `Program.near`."""
        first, last = _lifetimes(steps, self.values)
        fixed = {str(p.name): Place("input", i) for i, p in enumerate(self.graph.inputs)}
        fixed |= {v: Place("output", i) for i, v in enumerate(self.output_values)}
        sizes = {v: self.values[v].layout.bytes for v in first}
        for held in self.values.values():  # what lies in its channels is read to its end as if it were alone
            if held.root in sizes:
                sizes[held.root] = max(sizes[held.root], held.shift + held.layout.bytes)
        requests = [Request(v, sizes[v], first[v], last[v]) for v in first if v not in fixed]
        requests += [Request(f"scratch {i}", s.kernel.scratch, i, i) for i, s in enumerate(steps) if s.kernel.scratch]
        offsets, size = plan_memory(requests)
        for held in self.values.values():
            held.place = fixed.get(held.root) or (Place("workspace", offsets[held.root] + held.shift) if held.root in offsets else None)
        for index, step in enumerate(steps):
            step.scratch = offsets.get(f"scratch {index}", 0)
        self.values = {k: v for k, v in self.values.items() if v.place is not None}
        if all(s.images == 1 for s in steps):
            return size, {}
        near, least = plan_memory(one_at_a_time(steps, self.values, requests))
        return max(size, least), near


def _lifetimes(steps: Iterable[Step], values: Mapping[str, Value]) -> tuple[dict[str, int], dict[str, int]]:
    """The first and the last step that touches the memory of each root."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        for value in [*step.reads, step.writes, *step.more]:
            root = values[value].root
            first.setdefault(root, index)
            last[root] = index
    return first, last


def pack_constants(steps: list[Step]) -> np.ndarray:
    """All kernels' constants in one blob; sets each step's offsets."""
    constants, offsets = packed([step.kernel.constants for step in steps])
    for step, at in zip(steps, offsets, strict=True):
        step.constants = at
    return constants
