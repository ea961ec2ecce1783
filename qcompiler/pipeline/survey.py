"""What the search for mixed precision starts from: a quantized network's roundings measured one by one, and its layers with what they cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tvm

from qcompiler.base.parallel import in_order, worker_count
from qcompiler.numerics.metrics import Parts
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import Group
from qcompiler.passes.kinds import KINDS
from qcompiler.pipeline.findings import Findings
from qcompiler.pipeline.goal import decibel
from qcompiler.pipeline.stages import Measured, QuantizedNetwork
from qcompiler.plan.placement import Placer
from qcompiler.plan.quant_plan import Derived
from qcompiler.plan.ranges import SampleEnds
from qcompiler.plan.sensitivity import Sensitivity, Walk, layer_seconds, measure_sensitivity
from qcompiler.plan.together import without_sample
from qcompiler.plan.tradeoff import LayerCost, Network, ValueCost, WideCost
from qcompiler.refine.analytic import bias_for, shapes_of
from qcompiler.refine.integer_layers import integer_layers
from qcompiler.runtime.session import Session

_FLOAT = 3  # a float32 multiplication costs as much as so many in 8 bits: 2 on AVX2, 4 with dot products in hardware
SAMPLES = 8  # that tell what outputs lose
_WORK = 2.0**42  # float multiplications that one survey may take: a minute or two; behind it fewer samples tell
BEYOND_NOTICE = 40.0  # dB, from which on no step spends work on accuracy
_DOT = 4  # 8-bit multiplications of a dot step
ELEMENT = 16  # so does writing an element of 8 bits, with all that is done to it


class Survey:
    """Of a quantized network and the integer module that it became, weights rounded and biases corrected or not."""

    def __init__(self, quantized: QuantizedNetwork, integer: tvm.IRModule) -> None:
        self._quantized, self._integer = quantized, integer
        self._module = quantized.model.module
        self._placer = Placer(self._module, quantized.job.target)
        self._kept = {k: v for k, v in quantized.plan.reasons.items() if k in self._placer.made_by}
        self._placement = self._placer.place(self._kept)
        self._owner = {member: g.id for g in self._placer.groups for member in g.members}

    def sensitivity(self, twin: Session, most: int = 16, seconds: float = math.inf) -> Sensitivity:
        """twin: the float network. Samples are those of the calibration; `most` and `seconds` as in `measure_sensitivity`."""
        measured, plan = self._quantized.measured, self._quantized.plan
        copies = {g.id for g in self._placer.groups if g.traits.keeps and g.id not in self._placement.reasons}
        values = [v for v in self._placement.stored if v not in copies and not isinstance(plan.edges[v], Derived)]
        params = {v: p for v in values if (p := plan.params(v)) is not None}
        rounded, layers = self._rounded(twin.threads)
        job, padding = measured.job, measured.padding
        found = measure_sensitivity(twin, rounded, layers, params, job.alike, most=most, seconds=seconds, work=_WORK, padding=padding, progress=job.progress)
        return replace(found, weights={self._owner[name]: noise for name, noise in found.weights.items()})

    def value_noise(self, twin: Session, values: Collection[str], most: int) -> Sensitivity:
        """Of `values` alone, rounded as the plan has them."""
        job, padding = self._quantized.job, self._quantized.measured.padding
        params = {v: p for v in values if (p := self._quantized.plan.params(v)) is not None}
        return measure_sensitivity(twin, twin, (), params, job.alike, most=most, seconds=math.inf, work=_WORK, padding=padding, progress=job.progress)

    def noise(self, twin: Session, samples: Iterable[Mapping[str, np.ndarray]]) -> np.ndarray:
        """Noise over power of each float output; see `errors`."""
        power, noise = (sums.sum(axis=0) for sums in self.errors(twin, samples))
        result: np.ndarray = np.divide(noise, power, out=np.zeros_like(power), where=power > 0)
        return result

    def errors(
        self, twin: Session, samples: Iterable[Mapping[str, np.ndarray]], unseen: Sequence[SampleEnds | None] = (None,), numbers: Iterable[int] | None = None
    ) -> tuple[np.ndarray, ...]:
        """float64[S, outputs] each: sums of squares of the float outputs, and (for each of `unseen`) of their errors with all roundings at once: the float
        network `twin` runs with the int8 weights, and every value that the plan stores is rounded before its readers see it. No code is generated. An output
        that holds several quantities counts as several. unseen: the ends of all samples of the calibration, where each is to meet the ranges that the others
        alone would have led to. numbers: which of them `samples` are; None: the first."""
        plan, padding, parts = self._quantized.plan, self._quantized.measured.padding, list[Parts]()
        params = {v: p for v in self._placement.stored if (p := plan.params(v)) is not None}
        rounded, _ = self._rounded(twin.threads)
        numbered = list(zip(itertools.count() if numbers is None else numbers, samples, strict=False))

        def walked(sessions: tuple[Session, Session], numbered: tuple[int, Mapping[str, np.ndarray]]) -> list[np.ndarray]:
            index, sample = numbered
            walk = Walk(sessions[0], sample, sessions[1], parts, padding)
            return [walk.power, *(walk.errors_of_plan(params if ends is None else without_sample(plan, params, ends, index)) for ends in unseen)]

        parts += Walk(twin, numbered[0][1], padding=padding).parts if numbered else []
        count = worker_count(twin.manifest["workspace"])
        found = list(in_order(walked, list(zip(twin.alone(count), rounded.alone(count), strict=True)), numbered))
        return tuple(np.array([sums[i] for sums in found]) for i in range(1 + len(unseen)))

    def _rounded(self, threads: int) -> tuple[Session, set[str]]:
        """The float network with rounded weights, and the values of the kernels that have such."""
        measured, rounded = self._quantized.measured, set[str]()

        def operands() -> Iterator[tuple[str, dict[int, np.ndarray]]]:  # one layer at a time
            for name, arrays in rounded_layers(self._integer, measured):
                rounded.add(name)
                yield name, dict(enumerate(arrays, 1))

        session = measured.twin.session(threads)
        session.set_constants(measured.twin.constants_with(operands()))
        return session, rounded

    def kind(self, group_id: str) -> str:
        return self._placer.made_by[group_id].kind

    def seconds(self, session: Session, sample: Mapping[str, np.ndarray]) -> dict[str, float]:
        """group id -> seconds in a network, conversions left out."""
        return layer_seconds(session, sample, self._owner, self._quantized.model.naming)

    def work(self) -> tuple[dict[str, float], dict[str, float]]:
        """(int8, float32): group id -> work, in 8-bit multiplications. Unlike seconds the same on every machine."""

        def counted() -> Findings:  # by the float twin, which a stored calibration spares
            macs = {v: s.kernel.macs for s in self._quantized.measured.twin.program.steps if not s.auxiliary for v in (s.writes, *s.more)}
            return {"macs": np.array([macs.get(g.front.id, 0) for g in self._placer.groups], np.int64)}

        macs = self._quantized.remembered("work", counted, lambda state: state["macs"].tolist())
        own = {g.id: (m, math.prod(g.shape), _padded(g)) for g, m in zip(self._placer.groups, macs, strict=True)}
        return {k: p * m + ELEMENT * n for k, (m, n, p) in own.items()}, {k: _FLOAT * m + 2 * ELEMENT * n for k, (m, n, _) in own.items()}

    def network(
        self,
        found: Sensitivity,
        int8: Mapping[str, float] = {},
        float32: Mapping[str, float] = {},
        conversion: tuple[float, float] = (0.0, 0.0),
        wide: Mapping[str, WideCost] = {},
    ) -> Network:
        """int8, float32: seconds by group id. conversion: seconds per element, to int8 and to float. Without these only noise is predicted. wide: what may be
        read in halves."""
        none = np.zeros(len(next(iter([*found.weights.values(), *found.values.values()]), np.zeros(1))))
        layers, model = {}, self._quantized.model
        for g in self._placer.groups:
            size = 0 if g.weight is None else g.weight.size
            movable = g.id not in self._placement.reasons and not g.traits.moves
            times = int8.get(g.id, 0.0), float32.get(g.id, 0.0)
            layers[g.id] = LayerCost(g.id, g.operands, found.weights.get(g.id, none), *times, size, 4 * size, movable, g.traits.moves)
        elements = {**{i.name: math.prod(i.shape) for i in model.inputs}, **{g.id: math.prod(g.shape) for g in self._placer.groups}}
        values = {v: ValueCost(found.values.get(v, none), n * conversion[0], n * conversion[1]) for v, n in elements.items()}
        outputs = frozenset(str(v.name) for _, v in Graph.of(self._module).outputs)
        return Network(layers, values, lambda keep: self._placer.place({**dict.fromkeys(keep, "chosen"), **self._kept}), outputs, wide)


def estimate(network: QuantizedNetwork) -> np.ndarray:
    """float64[outputs], noise over power on a few samples: what the outputs of a network lose by its plan (`Survey.errors`)."""

    def found() -> Findings:
        return {"noise": Survey(network, network.integer).noise(network.measured.twin.session(), first_samples(network))}

    return network.remembered("estimate", found, lambda state: state["noise"])


def worst_estimate(network: QuantizedNetwork) -> float:
    """`estimate` of the worst output."""
    return float(estimate(network).max())


def first_samples(network: QuantizedNetwork) -> Iterator[Mapping[str, np.ndarray]]:
    """The samples that tell what outputs lose."""
    return itertools.islice(network.job.alike, SAMPLES)


def _padded(group: Group) -> float:
    """How many 8-bit multiplications a layer takes for each of its own: dot steps multiply four channels of a pixel at once, and fewer are padded to four (a
    waveform has one; depthwise kernels take four taps instead)."""
    if group.weight is None or not group.traits.gathers or group.attrs.get("groups", 1) != 1:
        return 1.0
    channels = int(group.weight.shape[-1])
    return -(-channels // _DOT) * _DOT / channels


def rounded_layers(integer: tvm.IRModule, measured: Measured) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """What kernels of the float twin write, each with (the float32 weights that the int8 weights of an integer module stand for, the float32 bias with which
    they keep the layer's mean), of layers whose operands the float twin has as constants. The integer module's own biases also undo what the layers before
    did, which is not there here.
    """
    ours = {f"qc.f32.{kind.name}" for kind in KINDS.values() if kind.float_kernel}
    known = {s.writes for s in measured.twin.program.steps if s.name in ours}
    shapes = shapes_of(measured.model.module)
    for layer in integer_layers(integer):
        group = measured.means.groups[layer.group]
        if group.front.id in known:
            weight = layer.weight * (layer.unit / layer.x_scale).reshape(-1, *[1] * (layer.weight.ndim - 1))
            bias = bias_for(group, weight, measured.table, shapes)
            if bias is None:
                bias = np.zeros(len(weight)) if group.bias is None else group.bias
            yield group.front.id, (weight.astype(np.float32), bias.astype(np.float32))


@dataclass(frozen=True)
class LayerNoise:
    """id, kind: of a group. sqnr_db: of the outputs when its weights and its result alone are rounded to 8 bits. gain_db: by how much the estimated
    SQNR of the whole plan rises when it alone stays float. work: how much more work the network then is, as a fraction of all (a float32 multiplication
    counts as three in 8 bits). inf: nothing is lost."""

    id: str
    kind: str
    sqnr_db: float
    gain_db: float
    work: float


def layer_noise(quantized: QuantizedNetwork, seconds: float = 60.0) -> tuple[int, float, list[LayerNoise]]:
    """(samples looked at, SQNR of the plan in dB were all roundings independent, the layers that could stay float, those first that gain most)."""
    survey = Survey(quantized, quantized.integer)
    found = survey.sensitivity(quantized.measured.twin.session(), seconds=seconds)
    network = survey.network(found, *survey.work(), (ELEMENT, ELEMENT))
    plan = network.predict(frozenset())
    rows = []
    for group_id, layer in network.layers.items():
        if layer.movable:
            alone = float((layer.noise + network.values[group_id].noise).max())
            kept = network.predict(frozenset([group_id]))
            gain, work = decibel(kept.noise) - decibel(plan.noise), kept.seconds / plan.seconds - 1
            rows.append(LayerNoise(group_id, survey.kind(group_id), decibel(alone), gain, work))
    return found.samples, decibel(plan.noise), sorted(rows, key=lambda r: (-r.gain_db, r.sqnr_db))
