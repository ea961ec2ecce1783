"""A trial of other weights and biases: all samples walk through the integer network side by side, layer by layer, and its outputs decide.

Each layer is changed when its inputs are there in every sample, so it is fitted knowing the changes before it. The better of the two networks, judged by
the SQNR of its outputs, stays in force.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import tvm

from qcompiler.base.errors import DataError
from qcompiler.base.parallel import cores, side_by_side
from qcompiler.base.progress import Progress
from qcompiler.base.value_ids import Naming
from qcompiler.calibration.padding import Counted
from qcompiler.numerics.metrics import Parts
from qcompiler.passes.replace_operands import BIAS, WEIGHT
from qcompiler.refine.integer_layers import IntegerLayer, integer_layers
from qcompiler.refine.means import FloatMeans

MEMORY = 512 << 20  # bytes that the samples' contexts may take together
Result = TypeVar("Result")
EXACT = 200.0  # dB: beyond what float32 tells, as 24 bits are 150 dB; what outputs without any error count as


_ARRAYS = ("biases", "weights")  # of a Correction, by value id


class Context(Protocol):
    """One sample on its way through the integer network. Those of one lane don't run at the same time."""

    @property
    def lane(self) -> Hashable: ...
    def run(self, begin: int, end: int) -> None: ...
    def view(self, value_id: str) -> np.ndarray: ...
    def outputs(self) -> dict[str, np.ndarray]: ...


class _Counting:
    """A context that shows only what counts (`qcompiler/calibration/padding.py`)."""

    def __init__(self, context: Context, counted: Counted, naming: Naming) -> None:
        self._context, self._counted, self._naming = context, counted, naming

    @property
    def lane(self) -> Hashable:
        return self._context.lane

    def run(self, begin: int, end: int) -> None:
        self._context.run(begin, end)

    def view(self, value_id: str) -> np.ndarray:
        return self._counted.rows(self._naming.nearest(value_id, self._counted.kept), self._context.view(value_id))

    def outputs(self) -> dict[str, np.ndarray]:
        return self._counted.outputs(self._context.outputs())


class IntegerExecutor(Protocol):
    """steps: the value id that each step writes, in order. context_bytes: memory of one context.

    `view` of a context is a value in canonical int8, valid when the step that reads it is next. `set_bias` and `set_weight` act on all contexts.
    """

    @property
    def steps(self) -> Sequence[str]: ...
    @property
    def context_bytes(self) -> int: ...
    def new_context(self, inputs: Mapping[str, np.ndarray]) -> Context: ...
    def set_bias(self, value_id: str, bias: np.ndarray) -> None: ...
    def set_weight(self, value_id: str, weight: np.ndarray) -> None: ...


class SessionExecutor:
    """A `Session` on the library that is `built`, at its first shape: biases are packed again into the constants of all shapes, code stays as it is. counted:
    what counts of a sample; naming: of the network's values."""

    def __init__(self, session: Any, built: Any, counted: Callable[[Mapping[str, np.ndarray]], Counted], naming: Naming) -> None:
        self._counted, self._naming = counted, naming
        self.steps = [str(step["id"]) for step in session.manifest["steps"]]
        self.context_bytes = int(session.manifest["workspace"])
        session.set_constants(built.constants)
        self._session, self._built, self._made = session, built, 0
        self._lanes = session.alone(cores())

    def new_context(self, inputs: Mapping[str, np.ndarray]) -> Context:
        context: Context = self._lanes[self._made % len(self._lanes)].new_context(inputs)
        self._made += 1
        return _Counting(context, self._counted(inputs), self._naming)

    def set_bias(self, value_id: str, bias: np.ndarray) -> None:
        self._replace(value_id, BIAS, bias)

    def set_weight(self, value_id: str, weight: np.ndarray) -> None:
        self._replace(value_id, WEIGHT, weight)

    def _replace(self, value_id: str, operand: int, array: np.ndarray) -> None:
        self._built.replace_operand(value_id, operand, array)
        self._session.set_constants(self._built.constants)


@dataclass
class Correction:
    """What correction did. before, after: mean SQNR of the network's outputs in dB, over `samples` samples, without and with it; worst: that of the output
    that loses most, as the network is left.

    kept: whether the corrected biases (int32[O] by value id) are in force. shift: value id -> the largest correction in output steps, and
    skipped: value id -> why a layer was left alone. weights: int8 by value id, of layers that a rounder rounded anew; `before` and `after` are then over
    `held_out` samples that neither weights nor biases were fitted to. what: a name for people, where only biases changed.
    """

    samples: int
    before: float = math.nan
    after: float = math.nan
    kept: bool = False
    biases: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    held_out: int = 0
    worst: float = math.nan
    what: str = "bias correction"

    def operands(self) -> dict[int, dict[str, np.ndarray]]:
        """What changed, as `replace_operands` takes it."""
        return {WEIGHT: self.weights, BIAS: self.biases}

    def state(self) -> dict[str, np.ndarray]:
        """All of it as arrays, for `of_state`."""
        plain = {k: v for k, v in vars(self).items() if k not in _ARRAYS}
        arrays = {f"{kind}/{name}": array for kind in _ARRAYS for name, array in getattr(self, kind).items()}
        return {"plain": np.frombuffer(json.dumps(plain).encode(), np.uint8), **arrays}

    @staticmethod
    def of_state(state: Mapping[str, np.ndarray]) -> Correction:
        found = Correction(**json.loads(state["plain"].tobytes().decode()))
        for key, array in state.items():
            kind, _, name = key.partition("/")
            if kind in _ARRAYS:
                getattr(found, kind)[name] = array
        return found

    def summary(self) -> str:
        """One line for people."""
        verdict = "kept" if self.kept else "dropped"
        what = f"weight rounding of {len(self.weights)} layers" if self.weights else f"{self.what} of {len(self.biases)} layers"
        judged = f", judged on {self.held_out} others" if self.held_out else ""
        return f"{what} on {self.samples} sample{'s' * (self.samples != 1)}{judged}: {self.before:.2f} dB -> {self.after:.2f} dB, {verdict}"


class Trial:
    """Changes to the layers of `module`, which `executor` runs. fitted: contexts of the samples that decide a change; judges: those that decide whether
    changes are kept, the last third of the samples where `held_out`, else the same.

    what: a name of the changes. means: collected from the first of these `samples`, in the same order. Contexts of all samples live together and take at
    most `memory` bytes (one is always allowed). Raises DataError when there are no samples.
    """

    def __init__(
        self,
        module: tvm.IRModule,
        executor: IntegerExecutor,
        means: FloatMeans,
        samples: Iterable[Mapping[str, np.ndarray]],
        memory: int,
        *,
        held_out: bool = False,
        what: str = Correction.what,
    ) -> None:
        count = max(1, min(len(means.outputs), memory // max(executor.context_bytes, 1)))
        taken = [sample for sample, _ in zip(samples, range(count), strict=False)]
        if not taken or not means.outputs:
            raise DataError("bias correction needs at least one calibration sample")
        everyone = [executor.new_context(sample) for sample in taken]
        first = len(taken) - len(taken) // 3 if held_out else len(taken)
        self.fitted, self.judges = everyone[:first], everyone[first:] or everyone
        self._walking, self._worst_after = everyone, math.nan
        self._references = means.outputs[first if len(taken) > first else 0 :]
        self._executor, self._steps = executor, list(executor.steps)
        self._layers = [layer for layer in integer_layers(module) if layer.id in self._steps and layer.group in means.groups]
        self._found = Correction(first, held_out=len(taken) - first, what=what)

    def layers(self, stage: str, progress: Progress) -> Iterator[IntegerLayer]:
        """Each layer when all samples are about to run it. stage: what `progress` calls this."""
        self._run(self.judges, 0, len(self._steps))
        self._found.before, self._found.worst = self._score()
        done = 0
        for number, layer in enumerate(self._layers):
            at = self._steps.index(layer.id)
            self._run(self._walking, done, at)
            done = at
            yield layer
            progress(stage, number + 1, len(self._layers))
        self._run(self._walking, done, len(self._steps))
        self._found.after, self._worst_after = self._score()

    def skip(self, layer: IntegerLayer, reason: str) -> None:
        """The layer, or its weights, stay as they are."""
        self._found.skipped[layer.id] = reason

    def change(self, layer: IntegerLayer, weight: np.ndarray, bias: np.ndarray) -> None:
        """Run the layer with other weights and another bias from here on."""
        if (weight != layer.weight).any():
            self._found.weights[layer.id] = weight
            self._executor.set_weight(layer.id, weight)
        if (bias != layer.bias).any():
            self._found.biases[layer.id] = bias
            self._executor.set_bias(layer.id, bias)

    def outcome(self) -> Correction:
        """What was found, once all layers were walked: in force when the outputs gained, else taken back."""
        self._found.kept = self._found.after > self._found.before
        if self._found.kept:
            self._found.worst = self._worst_after
        if not self._found.kept:
            for layer in self._layers:
                if layer.id in self._found.biases:
                    self._executor.set_bias(layer.id, layer.bias)
                if layer.id in self._found.weights:
                    self._executor.set_weight(layer.id, layer.weight)
        return self._found

    def _run(self, contexts: Sequence[Context], begin: int, end: int) -> None:
        if begin < end:
            of_each(lambda context: context.run(begin, end), contexts)

    def _score(self) -> tuple[float, float]:
        return score(self.judges, self._references)


def of_each(function: Callable[[Context], Result], contexts: Sequence[Context]) -> list[Result]:
    """function(context) of each, in order; of different lanes at the same time."""
    return side_by_side(function, contexts, lambda context: context.lane)


def score(contexts: Sequence[Context], outputs: Sequence[Mapping[str, np.ndarray]]) -> tuple[float, float]:
    """(mean, least) over the network's float outputs, and the quantities in each, of 10 log10(sum reference^2 / sum error^2), in dB; at most `EXACT` each.
    0 without such an output."""
    parts = {name: Parts.of(wanted) for name, wanted in (outputs[0] if outputs else {}).items() if wanted.dtype == np.float32}
    power = {name: np.zeros(len(p.members)) for name, p in parts.items()}
    noise = {name: np.zeros(len(p.members)) for name, p in parts.items()}
    for context, wanted in zip(contexts, outputs, strict=False):
        actual = context.outputs()
        for name, p in parts.items():
            reference = wanted[name].astype(np.float64)
            power[name] += p.sums(np.square(reference))
            noise[name] += p.sums(np.square(actual[name] - reference))
    tiny = np.finfo(np.float64).tiny
    pairs = [pair for name in parts for pair in zip(power[name].tolist(), noise[name].tolist(), strict=True)]
    found = [min(EXACT, 10 * (math.log10(max(s, tiny)) - math.log10(max(n, tiny)))) for s, n in pairs] or [0.0]
    return float(np.mean(found)), min(found)
