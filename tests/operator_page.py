"""docs/operators.md, made from the code: what becomes of every operator of the ONNX standard, and of ONNX Runtime's own that are read.

The way into the compiler is asked of the importer's tables. What has an integer form is asked of the groups in the cases of the backend suite: each as it is,
with all operands constant but the first (weights are constants in networks, and inputs in the suite), and with all constant but those of integers (tables).
After a change that is meant: `python -m tests.operator_page`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx.defs
from onnx import numpy_helper
from tvm import relax

from qcompiler.importers.classical import CLASSICAL
from qcompiler.importers.classical import DOMAIN as CLASSICAL_DOMAIN
from qcompiler.importers.contributed import CONTRIBUTED
from qcompiler.importers.control import CONTROL
from qcompiler.importers.dynamic import TAKEN_BACK
from qcompiler.importers.model import FloatModel
from qcompiler.importers.nodes import RANDOM
from qcompiler.importers.onnx import NO_CONVERSION
from qcompiler.importers.operators import CONVERTERS, by_definition
from qcompiler.importers.qdq import PAIR
from qcompiler.importers.qlinear import ON_INTEGERS
from qcompiler.importers.relax_import import defined, known_to_relax
from qcompiler.passes.graph import Graph, dtype_of
from qcompiler.passes.groups import find_groups
from qcompiler.passes.kinds import KINDS, Kind
from tests.onnx_suite import BESIDE, FLOAT_TABLE, HERE, Case, cases, expected, imported

PAGE = HERE.parent / "docs" / "operators.md"
AGAIN = "python -m tests.operator_page"
FLOAT = "float"
OURS = "a converter of ours"
CONSTANT = "a constant"  # the reason of constants that float operators read
OPTIONAL = onnx.defs.OpSchema.FormalParameterOption.Optional
NONE = NO_CONVERSION.partition(";")[0]  # without the advice
TAKEN = "behind a DynamicQuantizeLinear, as a float product with int8 weights"
DYNAMIC = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")


@dataclass
class Seen:
    """What the suite's cases of one operator show. refusals: of the operator, its sentences. right, refused: cases. whole: kinds of the networks that are
    computed in integers alone -> were all operands given at run time in one of them? part: kinds beside float operators. reasons: why groups stayed float.
    left: is anything left to compute in one of the cases?"""

    right: int = 0
    refused: int = 0
    refusals: set[str] = field(default_factory=set)
    whole: dict[str, bool] = field(default_factory=dict)
    part: set[str] = field(default_factory=set)
    reasons: set[str] = field(default_factory=set)
    left: bool = False

    def add(self, model: FloatModel, running: bool) -> None:
        """The groups that compute float32 numbers; movements count where there is nothing else. running: no operand was made constant."""
        graph = Graph.of(model.module)
        types = {name: dtype_of(expr) for name, expr in graph.bindings if isinstance(expr.ty, relax.TensorType)}
        groups = find_groups(model.module)
        self.left |= running and any(g.reason != CONSTANT for g in groups)
        ours = [g for g in groups if types.get(g.id) == "float32" and g.reason != CONSTANT]
        results = {str(v.name) for _, v in graph.outputs}
        kinds = {g.kind for g in ours}
        working = {k for k in kinds if not KINDS[k].moves} or kinds
        self.reasons |= {_short(g.reason) for g in ours if g.kind == FLOAT and g.reason}
        if FLOAT in kinds or any(g.kind == FLOAT for g in groups if g.id in results):
            self.part |= working - {FLOAT}
        else:
            self.whole |= {kind: running or self.whole.get(kind, False) for kind in working}


def _short(reason: str) -> str:
    """Without the sizes of the case at hand."""
    return re.sub(r" of shape \[[\d, ]*\]| \(no .*\)$", "", reason)


def variants(case: Case) -> Iterator[Case]:
    """The case; with one operand, or those of integers, given at run time, all others constant, and results that may be left out left out."""
    yield case
    names = [n for n in case.feeds if n != BESIDE]
    integers = [n for n in names if case.feeds[n].dtype.kind == "i"]
    for kept in (names[:1], integers if len(integers) < len(names) and integers != names[:1] else []):
        if not kept:
            continue
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        for info in [i for i in model.graph.input if i.name in names and i.name not in kept]:
            model.graph.initializer.append(numpy_helper.from_array(case.feeds[info.name], info.name))
            model.graph.input.remove(info)
        node = model.graph.node[0]
        for i, formal in enumerate(onnx.defs.get_schema(node.op_type, case.model.opset_import[0].version, node.domain).outputs[: len(node.output)]):
            for info in [o for o in model.graph.output if formal.option == OPTIONAL and o.name == node.output[i]]:
                model.graph.output.remove(info)
                node.output[i] = ""
        if model != case.model:
            yield Case(case.name, model, {n: case.feeds[n] for n in kept}, case.wanted, case.rtol, case.atol)


def seen() -> dict[str, Seen]:
    """operator of the standard -> what its cases show; cases of expanded definitions are left out."""
    verdicts, found = expected(FLOAT_TABLE), dict[str, Seen]()
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases().items():
            node = case.model.graph.node[0]
            if "_expanded" in name or node.domain:
                continue
            here = found.setdefault(node.op_type, Seen())
            if name in verdicts:
                here.refused += 1
                sentence = verdicts[name].removeprefix("refused: ")
                here.refusals |= {sentence.split(f" ({node.op_type}): ", 1)[1]} if f" ({node.op_type}): " in sentence else set()
                continue
            here.right += 1
            for index, each in enumerate(variants(case)):
                model = imported(each, Path(folder))
                if isinstance(model, FloatModel):
                    here.add(model, index == 0)
    return found


def way(op: str, version: int) -> str:
    """How a node comes into the float network, by the importer's tables; empty where there is no way: what defines random numbers is random too."""
    if op in ON_INTEGERS:
        return "float operators between DequantizeLinear and QuantizeLinear"
    if op in RANDOM:
        return ""
    if op in CONTROL:
        return "decided when compiling, else both branches and a choice" if op == "If" else "unrolled when compiling"
    if op in CONVERTERS and CONVERTERS[op] is not by_definition:
        return OURS
    if op not in CONVERTERS and known_to_relax(op):
        return "Relax's importer"
    return "its definition" if defined(op, version, "") else ""


def in_integers(here: Seen, op: str) -> str:
    """The kinds of groups that compute it."""
    if op in (*PAIR, *ON_INTEGERS, *DYNAMIC):
        return "as a quantized file states it"
    if not here.whole:
        working = sorted(k for k in here.part if not KINDS[k].moves)
        return f"in part: {_kinds(working)}" if working else "-"
    constant = sorted(k for k in here.whole if not here.whole[k])
    running = sorted(here.whole.keys() - constant)
    return "; ".join([*([_kinds(running)] if running else []), *([f"with constant operands: {_kinds(constant)}"] if constant else [])])


def _kinds(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def row(op: str, version: int, here: Seen | None) -> str:
    """version: the operator set that defines it last. here: None where the suite has no case of tensors."""
    suite = f"{here.right} of {here.right + here.refused}" if here else "-"
    here, how = here or Seen(), way(op, version)
    refusals = "; ".join(sorted(here.refusals))
    if not here.right and (here.refusals or not how):
        return f"| {op} | - | refused: {refusals.replace(NO_CONVERSION, NONE) or NONE} | {suite} |"
    if here.right and not here.left and op not in CONTROL:
        return f"| {op} | - | folded: nothing of it is left to compute | {suite} |"
    return f"| {op} | {in_integers(here, op)} | {how or 'folded'}{f'; refused: {refusals}' if refusals else ''} | {suite} |"


def kind_row(kind: Kind) -> str:
    behind = [*(["one addition of a tensor"] if kind.residual else []), *(["clamps"] if kind.clamped else [])]
    wide = [*(["operands"] if kind.reads_wide else []), *(["result"] if kind.writes_wide else [])]
    alike = "its operands'" if kind.keeps else "its own"
    when = [
        *(["the network has 16-bit streams or attention"] if kind.alone else []),
        *(["an operand is in integers"] if kind.light else []),
        *(["a reader is in integers"] if kind.moves or kind.restates else []),
    ]
    where = f"where {' and '.join(when)}" if when else "everywhere"
    return f"| `{kind.name}` | `{kind.operator}` | {', '.join(behind) or '-'} | {' and '.join(wide) or '-'} | {alike} | {where} |"


def page() -> str:
    """The whole text, which is a function of the code, the table of the suite and the installed ONNX package."""
    found, latest = seen(), dict[str, int]()
    for schema in onnx.defs.get_all_schemas():
        if not schema.domain:
            latest[schema.name] = schema.since_version
    rows = [row(op, latest.get(op, onnx.defs.onnx_opset_version()), found.get(op)) for op in sorted(latest.keys() | found.keys(), key=str.lower)]
    floating = [f"| {op} | {'; '.join(sorted(s.reasons))} |" for op, s in sorted(found.items(), key=lambda item: item[0].lower()) if s.whole and s.reasons]
    theirs = dict.fromkeys([*CONTRIBUTED, *(CONVERTERS.keys() - latest.keys())], OURS)
    theirs |= dict.fromkeys(ON_INTEGERS, "as a quantized file states it") | dict.fromkeys(TAKEN_BACK, TAKEN)
    theirs["QAttention"] = "behind a DynamicQuantizeLinear, as Attention with the reals of its weights"
    theirs |= dict.fromkeys((f"{op} (`{CLASSICAL_DOMAIN}`)" for op in CLASSICAL), OURS)
    own = [f"| {op} | {what} |" for op, what in sorted(theirs.items(), key=lambda item: item[0].lower())]
    kinds = [kind_row(k) for k in KINDS.values() if k.operator]
    return TEXT.format(
        again=AGAIN,
        header=(HERE / FLOAT_TABLE).read_text().splitlines()[0].removeprefix("# ").partition(" (")[0],
        rows=_lines(rows),
        floating=_lines(floating),
        own=_lines(own),
        kinds=_lines(kinds),
        set=onnx.defs.onnx_opset_version(),
    )


def _lines(rows: Sequence[str]) -> str:
    return "\n".join(rows)


TEXT = """# Operators

Made from the code by `{again}`, and tested to be current. Operator sets up to {set} are read.

## The ONNX standard

*Integers* names the kinds of groups (below) that compute the operator where everything around it is in integers; a plan may leave it in float for accuracy, or
because it costs less there, and `explain` says so. *With constant operands*: only where what the network learned (weights, slopes, tables) stands in the file.
*In part*: its definition has steps in integers and steps in float. An activation behind a group that takes in clamps becomes part of that group.

*Float* is how a node comes into the float network, where it is computed unless a plan puts it in integers: by a converter of ours (which may leave a form that
it doesn't know to the other two), by Relax's importer, or by the operator's definition in the ONNX standard.

*Suite* counts the node cases of ONNX's backend suite that are computed as they state, of all that are about tensors of numbers ({header}).
Many of the others have inputs or outputs without elements; `tests/onnx_suite.tsv` has each with its sentence. Operators without a number have no such
case (sequences, strings, random numbers), and nothing tests them.

| operator | integers | float | suite |
|---|---|---|---|
{rows}

Operators of other domains are refused by name, but for those that the ONNX package defines by operators of the standard, and these of ONNX Runtime
(`com.microsoft`) and of the standard's second domain (`ai.onnx.ml`):

| operator | how |
|---|---|
{own}

## The kinds of integer groups

All are computed in 8 bits; *16 bits* says what may be 16 bits wide beside that (residual streams of transformers, step `streams`). *Takes in*: what is computed
in its registers behind it. *Quantization*: whether its result has a scale and zero point of its own. *In integers*: where a plan has it in
integers when nothing else speaks for float. [numerics.md](numerics.md) defines the operators.

| kind | operator | takes in | 16 bits | quantization | in integers |
|---|---|---|---|---|---|
{kinds}

## What stays float of these

| operator | reasons that the cases of the suite show |
|---|---|
{floating}
"""


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
