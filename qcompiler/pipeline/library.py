"""The last stage: a library, and what its manifest says of the network and of how it came about."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm

import qcompiler
from qcompiler.backend.artifact import Artifact, port_parameters, program_manifest
from qcompiler.backend.build import Built
from qcompiler.backend.cuda import toolkit_versions
from qcompiler.backend.kernel_cache import installation
from qcompiler.backend.lowering import Program
from qcompiler.base.errors import PlanError
from qcompiler.calibration.ports import OnReals, stored_inputs
from qcompiler.importers.model import FloatModel
from qcompiler.importers.onnx_file import QUANTIZED
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import SIXTEEN, find_groups
from qcompiler.passes.halves import HALVES
from qcompiler.pipeline.findings import Findings, remembered
from qcompiler.pipeline.goal import decibel
from qcompiler.pipeline.padding import check_padding
from qcompiler.pipeline.stages import Corrected, QuantizedNetwork
from qcompiler.plan.quant_plan import Quantized, count_operators
from qcompiler.plan.recipes import STEPS
from qcompiler.refine.trial import EXACT
from qcompiler.runtime.reference import ImportCheck, check_import, confirmed, installed_version
from qcompiler.runtime.selftest import probes, vectors


@dataclass
class Compilation:
    """A finished compilation: the artifact, and the integer module that it equals bit for bit."""

    artifact: Artifact
    corrected: Corrected

    @property
    def quantized(self) -> QuantizedNetwork:
        return self.corrected.network

    @property
    def integer(self) -> tvm.IRModule:
        return self.corrected.integer

    @property
    def built(self) -> Built:
        return self.corrected.built

    @property
    def program(self) -> Program:
        return self.built.program


def link(corrected: Corrected, searched: Mapping[str, str] = {}, **account: Any) -> Compilation:
    """Program -> Artifact. searched: what a choice between networks found, {name: sentence}. account: further entries of the manifest."""
    network, measured, job = corrected.network, corrected.network.measured, corrected.network.job
    warnings, attrs = [*measured.warnings, *corrected.warnings], Graph.of(corrected.integer).attrs
    if job.selftest:
        account["selftest"] = self_test(corrected, job.selftest)
    if job.pad:
        first = [stored_inputs(described_ports(corrected), sample) for sample in itertools.islice(job.alike, 1)]
        warnings += [w for sample in first for w in check_padding(corrected.host_code().session(), job.pad, sample, job.ports.outputs)]
        account["padding"] = dict(job.pad)
    imported = _imported(corrected)
    if imported is not None and imported.failure and job.model.exactness == QUANTIZED:
        warnings.append(imported.failure)
    artifact = corrected.built.link(
        **describe(corrected.integer, job.model),
        channels={k: c.to_json() for k, c in measured.equalized.equalization.channels.items()},
        compiler={"qcompiler": qcompiler.__version__, "tvm": tvm.__version__} | toolkit_versions(job.target),
        preset=network.plan.preset,
        calibration_samples=measured.table.samples,
        operators=count_operators(find_groups(job.model.module), attrs.get("qc.float_ops", {}).keys(), attrs.get(HALVES, {})),
        sqnr_db=expected_sqnr(corrected),
        quantization={**effects(network), **network.account} | {name: c.summary() for name, c in corrected.corrections.items()} | {**searched},
        warnings=warnings,
        notes=network.plan.notes,
        **({"ports": corrected.ports[0]} if corrected.ports else {}),
        digests={
            "model": job.model.digest,
            "calibration": measured.table.digest,
            "plan": network.plan.digest,
            "tuning_log": "" if job.tuned is None else job.tuned.digest,
            "constants": hashlib.sha256(corrected.built.constants.data).hexdigest(),
        },
        further=[
            described_further(module, model) | ({"ports": corrected.ports[number]} if corrected.ports else {})
            for number, (module, model) in enumerate(zip(corrected.others, job.others, strict=True), 1)
        ],
        **account,
    )
    return Compilation(dataclasses.replace(artifact, imported=imported), corrected)


def _imported(corrected: Corrected) -> ImportCheck | None:
    """The import beside another runtime; of a quantized file see `confirmed`."""
    network, job = corrected.network, corrected.network.job
    found, model, other = network.measured.equalized.imported, job.model, job.model.origin.elsewhere()
    if found is None or model.exactness != QUANTIZED:
        return found

    def checked() -> Findings:
        library = OnReals(corrected.host_code().session(), described_ports(corrected))
        return check_import(other, library, itertools.islice(job.alike, 1), model.exactness, model.fixed, model.rounded).state()

    decisive = [installation(), installed_version(other.package), network.plan.digest]
    return confirmed(found, lambda: remembered(job, "import by the library", decisive, checked, ImportCheck.of_state))


def described_ports(corrected: Corrected) -> dict[str, Any]:
    """What the manifest says of inputs and outputs at the first shape."""
    values = describe(corrected.integer, corrected.network.job.model)["values"]
    return {**port_parameters(corrected.built.program, values), **({"ports": corrected.ports[0]} if corrected.ports else {})}


def self_test(corrected: Corrected, count: int) -> dict[str, Any]:
    """The manifest's entry of that name: what this machine makes of `count` test vectors. Raises PlanError where nothing has the same bits on every CPU."""
    program = corrected.built.program
    manifest = program_manifest(program) | described_ports(corrected)
    wanted = probes(manifest, [(s.writes, s.reads) for s in program.steps])
    if not wanted:
        raise PlanError("a self-test is not possible: all of this network is computed in float, and no value has the same bits on every CPU")
    return vectors(corrected.host_code().session(1), manifest, wanted, count)


def expected_sqnr(corrected: Corrected) -> float | None:
    """dB of the worst output on calibration samples: as `judged`, else as the last correction measured it. None where no sample tells, or nothing is lost."""
    tried, noise = list(corrected.corrections.values()), corrected.noise
    found = decibel(noise) if noise is not None else tried[-1].worst if tried else None
    return round(found, 2) if found is not None and found < EXACT and math.isfinite(found) else None  # as many digits as every machine agrees on


def described_further(integer: tvm.IRModule, model: FloatModel) -> dict[str, Any]:
    """`describe` of the network at another shape of its library, and its digest."""
    described = describe(integer, model)
    return {"values": described["values"], "float_ops": described["float_ops"], "digests": {"model": model.digest}}


def effects(network: QuantizedNetwork) -> dict[str, str]:
    """What each step of the recipe did up to the integer module, for people: {step: sentence}, in order."""
    recipe, edges = network.job.recipe, [e for e in network.plan.edges.values() if isinstance(e, Quantized)]
    found = {"steps": ", ".join(s for s in STEPS if s in recipe.steps) or "none"}
    if "equalize" in recipe.steps:
        found["channel_equalization"] = network.measured.equalized.equalization.summary()
    if "ranges" in recipe.steps:
        found["ranges"] = f"outliers clipped in {sum(', clips ' in e.reason for e in edges)} of {len(edges)} values with a range of their own"
    return found


def describe(integer: tvm.IRModule, model: FloatModel) -> dict[str, Any]:
    """The manifest's account of quantization: every integer value with its parameters, every operator that stayed float with the
    reason, and values that got 16 bits with theirs."""
    attrs = Graph.of(integer).attrs
    wide = [{"id": value_id, "reason": reason} for value_id, reason in attrs.get(SIXTEEN, {}).items() if reason]
    sixteen = {"sixteen": wide} if wide else {}
    values = {name: {"scale": scale, "zero_point": zero_point} for name, (scale, zero_point) in attrs.get("qc.params", {}).items()}
    float_ops = []
    for value_id, reason in attrs.get("qc.float_ops", {}).items():
        node, op = model.source(value_id)
        float_ops.append({"id": value_id, "node": node, "op": op, "reason": reason})
    return {**model.account(), "values": values, "float_ops": float_ops, **sixteen}
