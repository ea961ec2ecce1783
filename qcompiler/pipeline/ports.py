"""A network whose constants are settled gets the inputs and outputs that its user has asked for."""

from __future__ import annotations

import dataclasses

from qcompiler.backend.build import build
from qcompiler.base.errors import PlanError
from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import Graph
from qcompiler.passes.ports import IntegerPort, PixelPort, quantizations, stored_output
from qcompiler.passes.sequence import PORTS, run
from qcompiler.pipeline.stages import Corrected, Measured


def ported(corrected: Corrected) -> Corrected:
    """Integer module, Ports -> integer module, and its code; as it is where nothing is asked for. Raises PlanError for numbers whose range nothing tells."""
    job, measured = corrected.network.job, corrected.network.measured
    ports = job.ports
    if not ports:
        return corrected
    integer = corrected.integer
    inputs: dict[str, PixelPort | IntegerPort] = {n: PixelPort(p.values, p.preprocess.channels, p.axes) for n, p in ports.pixels.items()}
    for name in ports.integers:
        found = quantizations(integer, name)
        inputs[name] = IntegerPort(found[0] if found else _seen(measured, "input", name, name))
    values = {name: str(var.name) for name, var in Graph.of(job.model.module).outputs}
    outputs = {
        name: IntegerPort(None if stored_output(integer, name) else _seen(measured, "output", name, values[name]), dtype)
        for name, dtype in ports.outputs.items()
    }
    module = run(PORTS, integer, inputs, outputs, dump=job.dump)
    built = build(module, job.target, "generate code for inputs and outputs", job.tuned, dump=job.dump, progress=job.progress)
    shapes = {i.name: list(i.shape) for i in (*job.model.inputs, *job.model.outputs)}
    said = {
        "inputs": {n: p.account() for n, p in ports.pixels.items()} | {n: {"shape": shapes[n]} for n in ports.integers},
        "outputs": {n: {"shape": shapes[n]} for n in ports.outputs},
    }
    return dataclasses.replace(corrected, built=built, integer=module, here=None, ports=said)


def _seen(measured: Measured, kind: str, name: str, value: str) -> QParams:
    """Parameters of the whole range that calibration saw."""
    seen = measured.table.values.get(value)
    if seen is None or not seen.count:
        raise PlanError(
            f"{kind} '{name}' is float32 inside the network, and without calibration data nothing tells its range; give calibration data, "
            "or leave its type as it is"
        )
    return QParams.from_range(seen.low, seen.high)
