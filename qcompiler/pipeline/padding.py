"""Rules by which a library pads inputs of lengths between its shapes, checked: what belongs to the input must come out as if nothing had been padded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.base.errors import ModelError, PlanError, closest
from qcompiler.calibration.ports import NO_PORTS, Ports
from qcompiler.importers.model import FloatModel
from qcompiler.pipeline.shapes import fitting_of
from qcompiler.runtime.session import Session
from qcompiler.runtime.shapes import REPEAT, Fitting, spelled

_CLOSE = 1e-4  # of the largest element: what the order of additions in float32 may change


def pad_rules(models: Sequence[FloatModel], given: Mapping[str, Any] | None, ports: Ports = NO_PORTS) -> dict[str, Any]:
    """{input: number or "repeat"} as a manifest has it; of an input of pixels the number is a pixel's.

    Raises ModelError for an input that there is not, or that is as long at every shape, or that varies and has no rule; for a value that is none of its
    type, or no repetition where the type is int8, whose scale calibration finds; and for an output that could not be cut back.
    """
    if not given:
        return {}
    first, fitting = models[0], fitting_of(models, {})
    names = [i.name for i in first.inputs]
    varying = [name for name in names if any(("inputs", name, axis) in fitting.kinds for axis in range(len(fitting.inputs[0][name])))]
    for name in given:
        if name not in names:
            raise ModelError(f"padding: there is no input '{name}'.{closest(name, names)} Inputs: {', '.join(names)}")
        if name not in varying:
            many = f"at all {len(models)} shapes" if len(models) > 1 else "at the one shape that is compiled"
            raise ModelError(f"padding: input '{name}' is {list(fitting.inputs[0][name])} {many}, so nothing of it can be padded; leave its rule out")
    for name in varying:
        if name not in given:
            raise ModelError(f"padding: input '{name}' varies too, and has no rule; say what it is padded with: a number, or {REPEAT}")
    known = {kind for (what, _, _), kind in fitting.kinds.items() if what == "inputs"}
    for (what, name, axis), kind in fitting.kinds.items():
        if what == "outputs" and kind not in known:
            lengths = [m["outputs"][[o.name for o in first.outputs].index(name)]["shape"][axis] for m in fitting.all]
            raise ModelError(
                f"padding: axis {axis} of output '{name}' has the lengths {lengths}, those of no input, so what belongs to a padded input can't be told; "
                "compile without padding"
            )
    for name in ports.integers:
        if name in varying and given[name] != REPEAT:
            raise ModelError(
                f"padding: input '{name}' takes int8 numbers, whose scale calibration finds, and can't be padded with {given[name]!r}; supported: {REPEAT}"
            )
    return {i.name: _rule(i.name, i.dtype, given[i.name]) for i in ports.given(first.inputs) if i.name in varying}


def _rule(name: str, dtype: str, value: Any) -> Any:
    if value == REPEAT:
        return REPEAT
    try:
        number = float(value)
        exact = np.dtype(dtype).kind == "f" or (number == int(number) and abs(number) <= 2**53 and int(np.asarray(int(number)).astype(dtype)) == int(number))
    except (TypeError, ValueError, OverflowError):
        exact, number = False, math.nan
    if not (exact and math.isfinite(number)):
        raise ModelError(f"padding: input '{name}' is {dtype}, and can't be padded with {value!r}; supported: a finite number of that type, or {REPEAT}")
    return number if np.dtype(dtype).kind == "f" else int(number)


def check_padding(session: Session, rules: Mapping[str, Any], sample: Mapping[str, np.ndarray], rounded: Container[str] = ()) -> list[str]:
    """Run the beginning of `sample` that two shapes have in common at both, padded where it must be, on the network at all shapes (`session`). rounded:
    outputs that are float32 numbers in 8 bits.

    Returns warnings where outputs differ by the rounding of float sums. Raises PlanError where they differ by more: the network does not look away from
    what is padded.
    """
    fitting = Fitting({**session.manifest, "padding": rules})
    warnings: list[str] = []
    by_size = sorted(range(len(fitting.all)), key=lambda shape: sum(map(math.prod, fitting.inputs[shape].values())))
    for pair in itertools.combinations(by_size, 2):
        common = {name: tuple(map(min, array.shape, *(fitting.inputs[shape][name] for shape in pair))) for name, array in sample.items()}
        part = {name: array[tuple(map(slice, common[name]))] for name, array in sample.items()}
        less, more = (session.run({name: fitting.pad(name, array, shape) for name, array in part.items()}) for shape in pair)
        for name in less:
            wanted, got = fitting.cut(name, less[name], common), fitting.cut(name, more[name], common)
            if got.tobytes() == wanted.tobytes():
                continue
            said = f"padding {spelled(common)} to {spelled(fitting.inputs[pair[1]])} changes what belongs to the input in output '{name}'"
            error = float(np.abs(got.astype(np.float64) - wanted).max())
            allowed = _CLOSE * float(np.abs(wanted).max()) if wanted.dtype.kind == "f" else float(name in rounded)
            if not error <= allowed:
                raise PlanError(
                    f"{said}, by up to {error:.3g}: the network does not look away from what it is padded with "
                    f"({', '.join(f'{n}={r}' for n, r in rules.items())}). Give other rules, or compile without padding"
                )
            warnings.append(f"{said}, by up to {error:.2g}: float sums of other lengths round differently")
    return list(dict.fromkeys(warnings))
