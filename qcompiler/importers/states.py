"""States that a model declares itself: inputs that a session keeps without being asked. They travel as metadata of the ONNX model that every file becomes.

{"input": {"output": the output that is its next value, "initial": what it is in the first call, a number or nested lists}, ...}
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from qcompiler.base.errors import ModelError

KEY = "qcompiler.states"


@dataclass(frozen=True)
class States:
    """`next`: input -> output; `initial`: of the inputs that begin with something else than zeros, a number or nested lists."""

    next: dict[str, str] = field(default_factory=dict)
    initial: dict[str, Any] = field(default_factory=dict)


def declare(model: onnx.ModelProto, states: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """States: input -> (output, value in the first call)."""
    if states:
        text = json.dumps({name: {"output": output, "initial": _plain(initial)} for name, (output, initial) in states.items()})
        model.metadata_props.add(key=KEY, value=text)


def take_states(where: str, model: onnx.ModelProto, fixed: Collection[str]) -> States:
    """The states that `model` declares, but for those that are constants (`fixed`): what their next values would be is no output any more. Raises ModelError
    for a declaration that can't be read."""
    found = next((p.value for p in model.metadata_props if p.key == KEY), "{}")
    try:
        declared = {str(name): (str(entry["output"]), entry["initial"]) for name, entry in json.loads(found).items()}
        initial = {name: value for name, (_, value) in declared.items() if np.asarray(value, np.float64).any()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{where}: its metadata '{KEY}' is damaged ({type(error).__name__}). Export the model again") from error
    gone = {output for name, (output, _) in declared.items() if name in fixed}
    kept = [o for o in model.graph.output if o.name not in gone]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    names = [name for name in declared if name not in fixed]
    return States({name: declared[name][0] for name in names}, {name: initial[name] for name in names if name in initial})


def _plain(array: np.ndarray) -> Any:
    """One number where all are the same."""
    first = array.reshape(-1)[:1]
    return first[0].item() if first.size and (array == first[0]).all() else array.tolist()
