"""A network whose constants are settled gets the inputs and outputs that its user has asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

from qcompiler.backend.build import build
from qcompiler.base.debug import no_dump
from qcompiler.base.errors import PlanError
from qcompiler.base.targets import find_target
from qcompiler.calibration.ports import Ports
from qcompiler.importers.model import FloatModel
from qcompiler.numerics.spec import QParams
from qcompiler.passes.ports import IntegerPort, PixelPort, quantizations, stored_output
from qcompiler.passes.sequence import PORTS, run
from qcompiler.pipeline.stages import Corrected, Measured, computed_outputs


def ported(corrected: Corrected) -> Corrected:
    """Integer module, Ports -> integer module, and its code; as it is where nothing is asked for. Raises PlanError for numbers whose range nothing tells."""
    job, measured = corrected.network.job, corrected.network.measured
    ports = job.ports
    if not ports:
        return corrected
    modules = [corrected.integer, *corrected.others]
    integer = modules[0]
    inputs: dict[str, PixelPort | IntegerPort] = {
        n: PixelPort(p.values, p.preprocess.channels, p.axes, p.source, p.resize.steps if p.resize else ()) for n, p in ports.pixels.items()
    }
    for name in ports.integers:
        found = quantizations(integer, name)
        inputs[name] = IntegerPort(found[0] if found else _seen(measured, "input", name, name))
    values = computed_outputs(job.model)
    made = []
    for number, module in enumerate(modules):
        outputs = {
            name: IntegerPort(None if stored_output(module, name) else _seen(measured, "output", name, values[name]), dtype)
            for name, dtype in ports.outputs.items()
        }
        made.append(run(PORTS, module, inputs, outputs, dump=no_dump if number else job.dump))
    first, *others = made
    built = build(first, job.target, "generate code for inputs and outputs", job.tuned, others=others, dump=job.dump, progress=job.progress)
    here = built if job.target == find_target("native") else None
    said = [_account(ports.at(model.inputs), model) for model in job.models]
    return dataclasses.replace(corrected, built=built, integer=first, others=others, here=here, ports=said)


def _account(ports: Ports, model: FloatModel) -> dict[str, Any]:
    """What the manifest says of the ports of the network at one shape."""
    shapes = {i.name: list(i.shape) for i in (*model.inputs, *model.outputs)}
    return {
        "inputs": {n: p.account() for n, p in ports.pixels.items()} | {n: {"shape": shapes[n]} for n in ports.integers},
        "outputs": {n: {"shape": shapes[n]} for n in ports.outputs},
    }


def _seen(measured: Measured, kind: str, name: str, value: str) -> QParams:
    """Parameters of the whole range that calibration saw."""
    seen = measured.table.values.get(value)
    if seen is None or not seen.count:
        raise PlanError(
            f"{kind} '{name}' is float32 inside the network, and without calibration data nothing tells its range; give calibration data, "
            "or leave its type as it is"
        )
    return QParams.from_range(seen.low, seen.high)
