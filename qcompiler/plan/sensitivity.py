r"""Sensitivity: how much noise each rounding to 8 bits, alone, adds to the network's outputs; and what each layer costs in either type.

The float network runs step by step. Before a layer's step the memory of the run is kept; the layer runs once with its weights rounded to int8,
or its output is rounded to int8, then the rest of the network follows as float, and the memory is put back. No code is generated for a variant,
and only the steps behind it run again:

    x0 -> step 1 -> step 2 -> ... -> y         power(y)
              \-> rounded -> ... -> y + e      noise(e), of the weights or of the output of step 2
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from qcompiler.base.parallel import in_order, worker_count
from qcompiler.base.progress import Progress, silent
from qcompiler.base.value_ids import Naming
from qcompiler.calibration.padding import ALL, Padding
from qcompiler.numerics.metrics import Parts
from qcompiler.numerics.spec import LIMITS, QParams
from qcompiler.passes.graph import GraphBuilder, make_op
from qcompiler.runtime.session import Session

_CONVERTED = 1 << 18  # elements of the conversion that is timed
_ITERATIONS = 20  # of each step, for its least time
_KINDS = ("weights", "values")  # of roundings
FIRST = 2  # samples, of those that tell about every rounding


@dataclass(frozen=True)
class Sensitivity:
    """weights, values: id -> float64[outputs], noise power over signal power when that alone is rounded. Only float outputs count."""

    samples: int
    weights: dict[str, np.ndarray]
    values: dict[str, np.ndarray]

    def state(self) -> dict[str, np.ndarray]:
        """All of it as arrays, for `of_state`."""
        return {"samples": np.array(self.samples)} | {f"{kind}/{name}": noise for kind in _KINDS for name, noise in getattr(self, kind).items()}

    @staticmethod
    def of_state(state: Mapping[str, np.ndarray]) -> Sensitivity:
        found = Sensitivity(int(state["samples"]), {}, {})
        for key, noise in state.items():
            kind, _, name = key.partition("/")
            if kind in _KINDS:
                getattr(found, kind)[name] = noise
        return found


def measure_sensitivity(
    plain: Session,
    rounded: Session,
    layers: Collection[str],
    params: Mapping[str, QParams],
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    most: int = 16,
    seconds: float = 60.0,
    work: float = math.inf,
    padding: Padding | None = None,
    progress: Progress = silent,
) -> Sensitivity:
    """plain: the float network. rounded: the same library with int8 weights, dequantized, in the constants of `layers`. params: 8-bit parameters by
    value id. Looks at up to `most` samples; after the first, only as long as another one fits in `seconds`, and in `work`
    multiplications of the float network. Behind the first `FIRST` of them only roundings count that have the noise of the average one: others are little,
    whatever further samples would say. padding: positions that don't count."""
    begin = time.monotonic()
    written = {v for s in plain.manifest["steps"] for v in values_of(s)}
    wanted = {(True, n) for n in written & set(layers)} | {(False, v) for v in params.keys() & (written | {i.name for i in plain.inputs})}
    most = max(1, int(min(work / max(_work(plain, layers, params), 1.0), most)))
    noise, found, power = dict[tuple[bool, str], np.ndarray](), dict[tuple[bool, str], np.ndarray](), np.zeros(1)
    parts, further, done, count, late = list[Parts](), iter(samples), 0, 0, False

    def walked(sessions: tuple[Session, Session], sample: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[tuple[bool, str, np.ndarray]]]:
        walk = Walk(sessions[0], sample, sessions[1], parts, padding)
        return walk.power, list(_variants(walk, {n for of_weights, n in wanted if of_weights}, {v: params[v] for of_weights, v in wanted if not of_weights}))

    def taken(number: int) -> Iterator[Mapping[str, np.ndarray]]:
        for sample in itertools.islice(further, number):
            parts[:] = parts or Walk(plain, sample, padding=padding).parts
            yield sample

    workers = worker_count(plain.manifest["workspace"])
    lanes = list(zip(plain.alone(workers), rounded.alone(workers), strict=True))
    for number in (min(FIRST, most), most - min(FIRST, most)):
        total = done + number * len(wanted)
        if late or not wanted:
            break
        with contextlib.closing(in_order(walked, lanes, taken(number))) as results:
            for own, errors_of in results:
                power = power + own
                for of_weights, name, errors in errors_of:
                    noise[of_weights, name] = noise.get((of_weights, name), np.zeros(len(errors))) + errors
                    done += 1
                    progress("sensitivity of layers", done, total)
                count += 1
                if late := (time.monotonic() - begin) * (count + 1) > seconds * count:
                    break
        found |= {rounding: noise[rounding] / np.maximum(power, np.finfo(np.float64).tiny) for rounding in noise if rounding in wanted}
        wanted = _felt(found)
    progress("sensitivity of layers", done, done)
    return Sensitivity(count, *({name: n for (of_weights, name), n in found.items() if of_weights == kind} for kind in (True, False)))


def _felt(noise: Mapping[tuple[bool, str], np.ndarray]) -> set[tuple[bool, str]]:
    """The roundings with the average's noise or more, at any of the outputs."""
    every = np.array([*noise.values()])
    least = np.where(np.isfinite(every), every, 0.0).mean(axis=0) if noise else 0.0
    return {rounding for rounding, own in noise.items() if not (own < least).all()}


def work_behind(twin: Session) -> dict[str, float]:
    """value id -> the part of the network's multiplications that is still to come when the value is at hand."""
    steps = twin.manifest["steps"]
    total = sum(step["macs"] for step in steps)
    left, found = total, {i.name: 1.0 for i in twin.inputs}
    for step in steps:
        left -= step["macs"]
        found |= dict.fromkeys(values_of(step), left / max(total, 1))
    return found


def _work(twin: Session, layers: Collection[str], params: Collection[str]) -> float:
    """Multiplications of one sample's variants: each runs what is behind it."""
    behind, whole = work_behind(twin), float(sum(step["macs"] for step in twin.manifest["steps"]))
    return whole * sum(behind.get(name, 0.0) for name in [*layers, *params])


def values_of(step: Mapping[str, Any]) -> list[str]:
    """The model's values that a step of the manifest computes."""
    return [] if step.get("auxiliary") else [step["id"], *step.get("more", [])]


def _variants(walk: Walk, layers: Collection[str], params: Mapping[str, QParams]) -> Iterator[tuple[bool, str, np.ndarray]]:
    """(are weights rounded, not a value? id, sums of squared errors of the float outputs) of each variant. All of them must be computed by the network."""
    left = len(layers) + len(params)
    for new, following in walk.advance():
        for name in new:
            if name in params:
                left -= 1
                yield False, name, walk.errors_with_value(name, params[name])
        for name in following:
            if name in layers:
                left -= 1
                yield True, name, walk.errors_with_weights()
        if not left:
            return


class Walk:
    """One sample on its way through the float network, and back to where it was after each variant. `rounded`: the same library with other constants.

    power: float64[outputs], sums of squares of the float outputs, of which one that holds several quantities counts as several: `parts` of each, found in this
    sample where they are not given. padding: positions of the outputs that don't count. stops: numbers of steps, behind which the run is kept for `return_to`.
    """

    def __init__(
        self,
        plain: Session,
        sample: Mapping[str, np.ndarray],
        rounded: Session | None = None,
        parts: Sequence[Parts] = (),
        padding: Padding | None = None,
        stops: Iterable[int] = (),
    ) -> None:
        self._counted = padding.of(plain, sample) if padding else ALL
        self._context = plain.new_context({name: array.copy() for name, array in sample.items()})
        self._rounded = None if rounded is None else self._context.on(rounded)
        self._steps = plain.manifest["steps"]
        self._inputs = [i.name for i in plain.inputs]
        self._floats = [o.name for o in plain.outputs if o.dtype == "float32"]
        self._done, self._kept = 0, dict[int, list[np.ndarray]]()
        with self._restored():
            done = 0
            for stop in sorted(set(stops)):
                self._context.run(done, stop)
                self._kept[stop], done = [array.copy() for array in self._context.memory(stop)], stop
            self._reference = self._finished(done)
        self.parts = list(parts) or [Parts.of(r) for r in self._reference]
        self.power = self._sums(self._reference)

    def advance(self) -> Iterator[tuple[list[str], list[str]]]:
        """(the values that are new, those that the next step will compute), first of all the inputs, then step by step."""
        values = [self._inputs, *map(values_of, self._steps), []]
        for new, following in itertools.pairwise(values):
            yield new, following
            if self._done < len(self._steps):
                self._context.run(self._done, self._done + 1)
                self._done += 1

    def return_to(self, stop: int) -> None:
        """Be where so many steps have run: one of `stops`."""
        for array, before in zip(self._context.memory(stop), self._kept[stop], strict=True):
            array[...] = before
        self._done = stop

    def errors_with_value(self, name: str, params: QParams) -> np.ndarray:
        """float64[outputs]: the outputs' squared errors when a value that is at hand is rounded to 8 bits."""
        return self.errors_with_each(name, [params])[0]

    def errors_with_each(self, name: str, params: Iterable[QParams]) -> list[np.ndarray]:
        """The same for one rounding after the other."""
        errors = []
        with self._restored() as restore:
            for number, p in enumerate(params):
                if number:
                    restore()
                self._round(name, p)
                errors.append(self._errors(self._done))
        return errors

    def errors_with_weights(self) -> np.ndarray:
        """The same when the next step runs with the other constants."""
        assert self._rounded is not None
        with self._restored():
            self._rounded.run(self._done, self._done + 1)
            return self._errors(self._done + 1)

    def errors_of_plan(self, params: Mapping[str, QParams]) -> np.ndarray:
        """The same of a whole plan, from the inputs on: every step with the other constants, every value of `params` rounded as soon as it is there."""
        assert self._rounded is not None and self._done == 0
        with self._restored():
            for index, new in enumerate([self._inputs, *map(values_of, self._steps)]):
                if index:
                    self._rounded.run(index - 1, index)
                for name in new:
                    if name in params:
                        self._round(name, params[name])
            return self._errors(len(self._steps))

    def _round(self, name: str, params: QParams) -> None:
        view = np.atleast_1d(self._context.view(name))  # of a number too
        least, most = LIMITS[params.dtype]
        with np.errstate(over="ignore", invalid="ignore"):  # in float32, as kernels do, and many times as fast as by way of integers
            stored = view * np.float32(1 / params.scale)
            np.rint(stored, out=stored)
        np.fmin(stored, np.float32(most - params.zero_point), out=stored)
        np.fmax(stored, np.float32(least - params.zero_point), out=stored)  # a rounded operand can make a logarithm NaN: the least
        np.multiply(stored, np.float32(params.scale), out=view)

    def _finished(self, begin: int) -> list[np.ndarray]:
        self._context.run(begin, len(self._steps))
        outputs = self._counted.outputs(self._context.outputs())
        return [outputs[name].astype(np.float64) for name in self._floats]

    def _errors(self, step: int) -> np.ndarray:
        return self._sums([a - r for a, r in zip(self._finished(step), self._reference, strict=True)])

    def _sums(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([p.sums(np.square(a)) for p, a in zip(self.parts, arrays, strict=True)] or [np.zeros(0)])

    @contextlib.contextmanager
    def _restored(self) -> Iterator[Callable[[], None]]:
        """What is done inside is undone at its end, and by calling what is given."""
        memory = self._context.memory(self._done)
        kept = [array.copy() for array in memory]

        def restore() -> None:
            for array, before in zip(memory, kept, strict=True):
                array[...] = before

        yield restore
        restore()


# -- time -----------------------------------------------------------------------------------------------------------------------------------


def layer_seconds(session: Session, inputs: Mapping[str, np.ndarray], owner: Mapping[str, str], naming: Naming) -> dict[str, float]:
    """Least seconds per layer, conversions left out. owner: value id -> layer; what lowering adds to a value ("<id>~padded") belongs to its layer."""
    spent: dict[str, float] = {}
    for name, op, _, seconds in session.profile(inputs, _ITERATIONS):
        name = naming.nearest(name, owner)
        if name in owner and op not in ("qc.quantize", "qc.dequantize"):
            spent[owner[name]] = spent.get(owner[name], 0.0) + seconds
    return spent


def conversion_module() -> tvm.IRModule:
    """float32 -> int8 -> float32 of `_CONVERTED` elements, to be timed."""
    builder, attrs = GraphBuilder(), {"scale": 0.05, "zero_point": 0}
    x = builder.input("x", (1, _CONVERTED), "float32")
    q = builder.emit("q", make_op("qc.quantize", [x], {**attrs, "low": -128, "high": 127}, (1, _CONVERTED), "int8"))
    return builder.finish([("y", builder.emit("y", make_op("qc.dequantize", [q], attrs, (1, _CONVERTED), "float32")))])


def conversion_seconds(session: Session) -> tuple[float, float]:
    """Seconds per element of (quantize, dequantize), from a session of `conversion_module`."""
    found = {op: seconds for _, op, _, seconds in session.profile({"x": np.zeros((1, _CONVERTED), np.float32)}, _ITERATIONS)}
    return found["qc.quantize"] / _CONVERTED, found["qc.dequantize"] / _CONVERTED
