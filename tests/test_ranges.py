"""Ranges judged at the network's outputs, and their margins."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrated import watch

from qcompiler.base.targets import find_target
from qcompiler.calibration.data import open_samples
from qcompiler.calibration.headroom import MANY, MOST, headroom, unseen
from qcompiler.calibration.table import calibrate
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.numerics.spec import QParams
from qcompiler.passes import sequence
from qcompiler.pipeline import stages
from qcompiler.pipeline.compile import compile_stages, quantize
from qcompiler.pipeline.library import Compilation
from qcompiler.pipeline.stages import QuantizedNetwork
from qcompiler.plan import ranges
from qcompiler.plan.quant_plan import Proposals
from qcompiler.plan.quant_plan import Quantized as Edge
from qcompiler.plan.ranges import LEAST_COUNTED, LITTLE, PREMIUM, REACH, TRIFLE, SampleEnds, choose, output_noise, premium, widened
from qcompiler.plan.sensitivity import Walk, work_behind
from qcompiler.plan.together import noise_together, without_sample
from qcompiler.runtime.session import Session
from qcompiler.verification.interpreter import run


def samples(count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(demo_data()[0], count))


@pytest.fixture(scope="module")
def network() -> QuantizedNetwork:
    return quantize(MODEL, find_target("native"), samples(12))


# -- which samples judge --------------------------------------------------------------------------------------------------------------------


def ends_of(arrays: list[np.ndarray]) -> SampleEnds:
    ends = SampleEnds(["v"])
    for number, array in enumerate(arrays):
        watch(ends, number, "v", array.astype(np.float32))
        watch(ends, number, "other", array)
    return ends


def test_the_samples_that_reach_furthest_judge_for_themselves() -> None:
    arrays = [np.array([-0.1, 1 + 0.01 * i]) for i in range(40)]
    arrays[7], arrays[23] = np.array([0.0, 9.0]), np.array([-5.0, 0.5])
    weights = ends_of(arrays).weights("v", 40, 4, 2)
    assert {i: w for i, w in weights.items() if w == 1.0} == {7: 1.0, 23: 1.0}
    assert len(weights) == 6 and sum(weights.values()) == pytest.approx(40)
    assert len({i // 10 for i in weights if i not in (7, 23)}) == 4, "spread over all"


@pytest.mark.parametrize("count", [1, 3, 8])
def test_few_samples_judge_all(count: int) -> None:
    ends = ends_of([np.arange(3.0) + i for i in range(count)])
    assert ends.weights("v", count, 4, 4) == dict.fromkeys(range(count), 1.0)
    assert ends.weights("unknown", count, 1, 1) == dict.fromkeys(range(count), 1.0)


def test_a_value_without_one_sign_reaches_with_the_other() -> None:
    negative = ends_of([np.array([-1.0 - i, 0.0]) for i in range(10)])
    assert 9 in {i for i, w in negative.weights("v", 10, 2, 1).items() if w == 1.0}
    assert sum(ends_of([np.zeros(2)] * 10).weights("v", 10, 2, 1).values()) == pytest.approx(10)


# -- noise at the outputs -------------------------------------------------------------------------------------------------------------------


def test_noise_is_that_of_the_reference_arithmetic(network: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first value, every sample judging: the network run by the reference with its input rounded."""
    monkeypatch.setattr(ranges, "_BEHIND", math.inf)
    monkeypatch.setattr(ranges, "TRIFLE", -1.0)
    twin, few = Session(network.measured.twin.link().save(tmp_path / "twin.so")), samples(3)
    params = {"wide": QParams.from_range(-4.0, 4.0), "clipped": QParams.from_range(-0.2, 0.4)}
    found = output_noise(twin, {"image": Proposals(params, ("image",), -4.0, 4.0)}, SampleEnds(["image"]), open_samples(few, twin.inputs), 3, 8)
    module = sequence.run(sequence.FLOAT, network.model.module)
    for name, p in params.items():
        error = power = 0.0
        for sample in few:
            wanted = run(module, sample)["logits"].astype(np.float64)
            rounded = {"image": p.dequantize(p.quantize(sample["image"])).astype(np.float32)}
            error += np.square(run(module, rounded)["logits"] - wanted).sum()
            power += np.square(wanted).sum()
        assert found["image"].noise[name] == pytest.approx(error / power, rel=0.01)
    assert found["image"].noise["clipped"] > 2 * found["image"].noise["wide"]


def test_what_is_hopeless_after_a_few_samples_stays_out(network: QuantizedNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranges that are left have the noise that they have when all ranges are tried on all samples; one that isn't stays as far behind as it was."""
    twin, many = network.measured.twin.session(1), samples(12)
    judges = open_samples(many, twin.inputs)
    params = {"wide": QParams.from_range(-4.0, 4.0), "close": QParams.from_range(-3.8, 3.9), "clipped": QParams.from_range(-0.2, 0.4)}
    proposals, ends = {v: Proposals(params, (v,), -4.0, 4.0) for v in ("image", "relu5")}, ends_of_values(network, many)
    steps = list[int]()
    monkeypatch.setattr(ranges, "TRIFLE", -1.0)
    found = output_noise(twin, proposals, ends, judges, 12, 3, progress=lambda stage, done, total: steps.append(done - (total or 0)))
    assert steps[-1] == 0
    monkeypatch.setattr(ranges, "_BEHIND", math.inf)
    everything = output_noise(twin, proposals, ends, judges, 12, 3)
    for value in proposals:
        best = min(everything[value].noise.values())
        same = {name for name, noise in everything[value].noise.items() if found[value].noise[name] == noise}
        assert {name for name, noise in everything[value].noise.items() if noise < 1.2 * best} <= same
        assert all(found[value].noise[name] > 1.4 * best for name in params if name not in same)
    assert any(found[v].noise["clipped"] != everything[v].noise["clipped"] for v in proposals)


@pytest.mark.parametrize(
    ("trifle", "beside", "little", "judges"), [(math.inf, 0.0, 1.0, 2), (math.inf, 0.0, LITTLE, 4), (-1.0, 0.0, 1.0, 6), (TRIFLE, 1e9, 1.0, 2)]
)
def test_a_value_on_which_little_depends_is_settled_by_few_samples(
    network: QuantizedNetwork, monkeypatch: pytest.MonkeyPatch, trifle: float, beside: float, little: float, judges: int
) -> None:
    """One of each kind, of three, or two where more is no work; what is a trifle depends on what is judged elsewhere too."""
    monkeypatch.setattr(ranges, "TRIFLE", trifle)
    monkeypatch.setattr(ranges, "LITTLE", little)
    params, reports = {"wide": QParams.from_range(-4.0, 4.0), "close": QParams.from_range(-3.8, 3.9)}, list[int]()
    proposals, ends = {"image": Proposals(params, ("image",), -4.0, 4.0)}, ends_of_values(network, samples(12))
    twin = network.measured.twin.session(1)
    many = open_samples(samples(12), twin.inputs)
    output_noise(twin, proposals, ends, many, 12, 3, progress=lambda stage, done, total: reports.append(done), beside=beside)
    assert reports == [*range(2, 2 * judges + 1, 2), *([12] if judges < 6 else [])], "in the end all is said to be done"


def test_pieces_of_what_a_sample_judges_say_the_same(network: QuantizedNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, and in more goes than there are samples."""
    twin, many, found = network.measured.twin.session(2), open_samples(samples(4), network.model.inputs), []
    params = {"wide": QParams.from_range(-4.0, 4.0), "close": QParams.from_range(-3.8, 3.9)}
    proposals, ends = {v: Proposals(params, (v,), -4.0, 4.0) for v in ("image", "relu5")}, ends_of_values(network, samples(4))
    monkeypatch.setattr(ranges, "TRIFLE", -1.0)
    judge, goes = ranges._Judges.judge, list[int]()

    def counted(self: Any, session: Any, item: Any) -> Any:
        goes.append(item[0])
        return judge(self, session, item)

    monkeypatch.setattr(ranges._Judges, "judge", counted)
    for piece in (1e9, 1e-9):
        monkeypatch.setattr(ranges, "_PIECE", piece)
        goes.clear()
        found.append(output_noise(twin, proposals, ends, many, 4, 2))
    assert found[0] == found[1] and len(goes) > len(set(goes)) == 4


def ends_of_values(network: QuantizedNetwork, many: list[dict[str, np.ndarray]]) -> SampleEnds:
    ends = SampleEnds(["image", "relu5"])
    calibrate(network.measured.twin.session(1), many, ids=(), watchers=[ends])
    return ends


def test_values_far_from_the_outputs_can_be_left_out(network: QuantizedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Session(network.measured.twin.link().save(tmp_path / "twin.so"))
    behind, one = work_behind(twin), open_samples(samples(1), twin.inputs)
    order = [s["id"] for s in twin.manifest["steps"] if not s.get("auxiliary")]
    assert behind["image"] == 1.0 and behind[order[-1]] == 0.0
    assert [behind[v] for v in order] == sorted((behind[v] for v in order), reverse=True)
    proposals = {v: Proposals({"a": QParams(0.1, 0)}, (v,), -1.0, 1.0) for v in ("image", "relu5", "no such value")}
    assert 0 < behind["relu5"] < 1
    assert set(output_noise(twin, proposals, SampleEnds(()), one, 1, 1, part=behind["relu5"])) == {"image", "relu5"}, "judging both takes little"
    monkeypatch.setattr(ranges, "LITTLE", 1.0)
    assert set(output_noise(twin, proposals, SampleEnds(()), one, 1, 1, part=behind["relu5"])) == {"relu5"}
    assert set(output_noise(twin, proposals, SampleEnds(()), one, 1, 1)) == {"image", "relu5"}
    reports: list[tuple[str, int, int | None]] = []
    enough = (1 + behind["relu5"]) / LEAST_COUNTED
    for work, judged in ((enough, {"image", "relu5"}), (enough * 0.99, {"relu5"}), (0.0, set())):
        assert set(output_noise(twin, proposals, SampleEnds(()), one, 1, 1, 1.0, work, lambda *a: reports.append(a))) == judged
    assert reports == [("judge ranges", 1, 2), ("judge ranges", 2, 2), ("judge ranges", 1, 1)], "a step for each range that is tried"


@pytest.mark.parametrize("known", [True, False])
def test_a_walk_leaves_everything_as_it_was(network: QuantizedNetwork, tmp_path: Path, known: bool) -> None:
    """Whether it is known which memory is in use, and so all that has to be kept, or not."""
    twin = network.measured.twin.session(1) if known else Session(network.measured.twin.link().save(tmp_path / "twin.so"))
    (sample,) = samples(1)
    walk, coarse = Walk(twin, sample), QParams(1.0, 0)
    everything = twin.manifest["workspace"]
    kept = [sum(a.nbytes for a in walk._context.memory(i)) for i in range(len(twin.manifest["steps"]))]
    assert (max(kept) < everything) if known else (min(kept) > everything)
    errors = [walk.errors_with_value(v, coarse)[0] for new, _ in walk.advance() for v in new if v in ("image", "relu2", "relu5")]
    again = Walk(twin, sample)
    assert errors == [again.errors_with_value(v, coarse)[0] for new, _ in again.advance() for v in new if v in ("image", "relu2", "relu5")]
    assert len(errors) == 3 and min(errors) > 0
    walk = Walk(twin, sample)
    next(walk.advance())
    first, other, third = walk.errors_with_each("image", [coarse, QParams(0.1, 0), coarse])
    assert first[0] == third[0] == errors[0] > other[0]


# -- the choice -----------------------------------------------------------------------------------------------------------------------------


def proposals(**ranges: tuple[float, float]) -> Proposals:
    params = {name: QParams.from_range(*r) for name, r in ranges.items()}
    return Proposals(params, ("v",), min(r[0] for r in ranges.values()), max(r[1] for r in ranges.values()))


def test_least_noise_wins_and_near_equals_stay() -> None:
    p = proposals(first=(-1.0, 1.0), second=(-2.0, 2.0))
    assert choose({"v": p}, {"v": {"first": 1.0, "second": 0.5}}, 0.0)["v"].observer == "second"
    assert choose({"v": p}, {"v": {"first": 1.0, "second": 0.99}}, 0.0)["v"].observer == "first"
    wide = Proposals({"first": QParams(0.1, 0), "second": QParams(0.2, 0)}, ("v",), -1.0, 1.0)
    for others, observer in ((200.0, "second"), (20.0, "first")):  # half a unit more, beside those of other values
        assert choose({"v": wide, "w": p}, {"v": {"first": 1.0, "second": 1.5}, "w": {"first": others, "second": others}}, PREMIUM)["v"].observer == observer
    assert choose({"v": p}, {}, PREMIUM) == {}
    judged = choose({"v": p.only_first()}, {"v": {"first": 1.0}}, 0.0)["v"]
    assert judged.params == p.params["first"] and judged.reason == "least estimated error"


def test_margins_cost_what_they_may_and_end_at_one_level() -> None:
    """Rounding noise grows with the square of the step: predicted growth keeps within the premium, quiet values get all they could use."""
    rng = np.random.default_rng(0)
    noise = {f"v{i}": float(10 ** rng.uniform(-8, -3)) for i in range(30)}
    p = {name: proposals(chosen=(-1.0, 1.0), seen=(-1.2, 1.5)) for name in noise}
    chosen = {name: (p[name].params["chosen"], n) for name, n in noise.items()}
    wider = widened(chosen, p, PREMIUM)
    ratio = {n: wider[n].scale / chosen[n][0].scale if n in wider else 1.0 for n in noise}
    added = sum(noise[n] * (ratio[n] ** 2 - 1) for n in noise)
    assert 0.5 * PREMIUM * sum(noise.values()) < added <= 1.05 * PREMIUM * sum(noise.values())
    limit = (1.2 + 1.5) * REACH / 2
    assert max(ratio.values()) == pytest.approx(limit, rel=0.01)
    level = [noise[n] * r**2 for n, r in ratio.items() if 1.05 < r < 0.98 * limit]
    assert level and max(level) < 1.05 * min(level)
    assert all(noise[n] > 0.9 * max(level) for n, r in ratio.items() if r == 1.0)
    for name, params in wider.items():
        assert params.range[0] <= chosen[name][0].range[0] and params.range[1] >= chosen[name][0].range[1]


def test_a_clamp_ends_a_margin() -> None:
    free = Proposals({"a": QParams.from_range(0.0, 4.0)}, ("v",), 0.0, 5.0)
    clamped = Proposals(free.params, ("w",), 0.0, 5.0, bound=6.0)
    noisy = Proposals(free.params, ("x",), 0.0, 5.0)
    wider = widened({"v": (free.params["a"], 1e-9), "w": (free.params["a"], 0.0), "x": (free.params["a"], 1.0)}, {"v": free, "w": clamped, "x": noisy}, PREMIUM)
    assert wider["v"].range[1] == pytest.approx(10.0, rel=0.01) and wider["w"].range[1] == pytest.approx(6.0, rel=0.01) and "x" not in wider
    assert wider["v"].range[0] == 0.0
    assert widened({}, {}, PREMIUM) == {}


# -- few samples ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 12, 100])
def test_headroom_is_for_the_next_sample(count: int) -> None:
    """Of lognormal extremes the next one fits in clearly more often than without headroom, where samples are few; a hundred are enough as they are."""
    rng = np.random.default_rng(0)
    reach = np.exp(0.3 * rng.standard_normal((count + 1, 2000)))
    seen, new = reach[:-1], reach[-1]
    factor = headroom(count, seen.max(axis=0), seen.mean(axis=0), seen.var(axis=0))
    assert (factor >= 1).all() and (factor <= MOST).all()
    before, after = (float(np.mean(new > f * seen.max(axis=0))) for f in (1.0, factor))
    assert before == pytest.approx(1 / (count + 1), abs=0.05)
    assert after < 0.5 * before if count <= 3 else factor.mean() < 1.1


def test_an_end_that_all_samples_reach_alike_is_a_bound() -> None:
    one, none = np.ones(3), np.zeros(3)
    np.testing.assert_array_equal(headroom(5, one, one, none), one)
    np.testing.assert_array_equal(headroom(5, none, none, none), one)
    assert (headroom(1, one, one, none) > 1).all(), "one sample can't tell"


def test_few_samples_leave_room() -> None:
    """A value that varies gets wider ranges, up to its clamp; one that is always alike keeps its own."""
    ends = ends_of([np.array([-1.0, 2.0 * factor]) for factor in (1.0, 0.5, 0.7)])
    p = replace(proposals(a=(-1.0, 2.0)), members=("v",))
    wider = ends.with_room({"v": p}, {})["v"]
    low, high = wider.params["a"].range
    assert low == pytest.approx(-1.0, rel=0.02) and 2.5 < high <= 2 * MOST * 1.01 and wider.room[0] == 1 < wider.room[1]
    assert ends.with_room({"v": replace(p, size=1e7)}, {})["v"].params["a"].range[1] < 0.9 * high, "one clipped number of many is little beside their rounding"
    assert ends.with_room({"v": replace(p, bound=2.2)}, {})["v"].params["a"].range[1] == pytest.approx(2.2, rel=0.02)
    assert ends.with_room({"v": p}, {"v": np.array([1.5, 1.0])})["v"].room[0] == 1.5, "what is known of its channels counts too"
    assert choose({"v": wider}, {}, PREMIUM)["v"].params == wider.params["a"], "also where nothing was judged"
    assert premium(3) > premium(12) > premium(100) == PREMIUM


def test_what_lies_beyond_all_samples_is_what_the_next_one_loses() -> None:
    """Of greatest elements as theory has them, with ends below and beyond all that was seen; nothing where all samples are alike."""
    rng = np.random.default_rng(0)
    drawn, next_ones = rng.gumbel(3.0, 0.4, (200, 40)), rng.gumbel(3.0, 0.4, 1_000_000)
    furthest, deviation = drawn.max(axis=1), 0.4 * np.pi / math.sqrt(6)
    for end in (4.2, 5.5, 6.5):
        lost = [float((np.square(np.maximum(next_ones - end, 0)) * (next_ones > f)).mean()) for f in furthest]
        found = unseen(np.full(200, end), furthest, np.full(200, 3.0 + 0.4 * np.euler_gamma), np.full(200, deviation))
        assert found.mean() == pytest.approx(np.mean(lost), rel=0.1)
    assert unseen(np.ones(1), np.full(1, 2.0), np.full(1, 2.0), np.zeros(1)) == 0


def test_few_samples_take_the_range_that_the_next_one_needs(network: QuantizedNetwork) -> None:
    """Where clipping costs the outputs something, further than all that was seen, and the less so the more the value's rounding costs; as it is with many."""
    twin, many = network.measured.twin.session(1), samples(12)
    ends = ends_of_values(network, many)
    low, high = (of(e[i] for e in ends.ends["relu5"]) for i, of in enumerate((min, max)))
    p = Proposals({"seen": QParams.from_range(low, high), "clipped": QParams.from_range(0.5 * low, 0.5 * high)}, ("relu5",), low, high)
    found = output_noise(twin, {"relu5": p}, ends, open_samples(many, twin.inputs), 12, 8)
    beyond = ends.beyond({"relu5": p}, found)
    assert found["relu5"].cut > 0 and beyond["relu5"](p.params["clipped"]) > beyond["relu5"](p.params["seen"]) > 0
    widths = [choose({"v": p}, {"v": {o: f * n for o, n in found["relu5"].noise.items()}}, 1e-9, {"v": beyond["relu5"]})["v"] for f in (1e-3, 1.0, 1e9)]
    assert widths[0].params.scale > 1.2 * p.params["seen"].scale and widths[0].params.scale >= widths[1].params.scale > widths[2].params.scale * 0.99
    ends.ends = {name: seen * MANY for name, seen in ends.ends.items()}
    last = ends.beyond({"relu5": p}, found)["relu5"](p.params["seen"])
    assert 0 < last < beyond["relu5"](p.params["seen"]), "many samples leave something to come too"


# -- in a compilation -----------------------------------------------------------------------------------------------------------------------


def test_the_plan_takes_the_judges_word(network: QuantizedNetwork) -> None:
    plan, measured = network.plan, network.measured
    heard = measured.noise(plan.proposals)
    noise, beyond = {v: h.noise for v, h in heard.items()}, measured.ends.beyond(plan.proposals, heard)
    judged = [v for v in noise if isinstance(plan.edges[v], Edge)]
    assert len(judged) > 3 and set(heard) == set(plan.proposals), "all of so small a network"
    for value in judged:
        edge = plan.edges[value]
        assert (isinstance(edge, Edge) and "least error at the network's outputs" in edge.reason) or len(plan.proposals[value].params) == 1
        if "widened" not in edge.reason and value not in beyond:
            assert noise[value][edge.observer] <= min(noise[value].values()) + TRIFLE * sum(min(n.values()) for n in noise.values())
        assert math.isfinite(edge.sqnr)


def test_ranges_that_clip_have_to_be_better_together(network: QuantizedNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plans with every value rounded: the one that clips loses more, as it says itself; and a plan that loses clearly more is not taken."""
    measured, narrow = network.measured, copy.deepcopy(network.plan)
    for value, edge in narrow.edges.items():
        if isinstance(edge, Edge):
            narrow.edges[value] = replace(edge, params=replace(edge.params, scale=edge.params.scale / 4))
    twin, job = measured.twin.session(), measured.job
    noise = noise_together(twin, [narrow, network.plan, narrow], measured.ends, job.alike, 12, 4)
    params = {v: p for v in narrow.edges if (p := narrow.params(v)) is not None}
    walks = [Walk(twin, sample, twin) for sample in job.alike]
    lost = [w.errors_of_plan(without_sample(narrow, params, measured.ends, i)) for i, w in enumerate(walks)]
    weights = measured.ends.standing(12, 4, 4)
    wanted = sum(w * lost[i] for i, w in weights.items()) / sum(w * walks[i].power for i, w in weights.items())
    assert noise[0] == noise[2] == pytest.approx(float(np.mean(wanted))) and noise[0] > 2 * noise[1] > 0
    assert len(weights) == 8 and sum(weights.values()) == pytest.approx(12)

    told = {"better": 0}
    monkeypatch.setattr(stages, "noise_together", lambda twin, plans, *rest: np.array([1.0 if i == told["better"] else 2.0 for i, _ in enumerate(plans)]))
    whole = []
    for told["better"] in (0, 1):
        edges = quantize(MODEL, find_target("native"), samples(12)).plan.edges.values()
        whole.append(sum(isinstance(e, Edge) and "everything seen" in e.reason for e in edges))
    assert whole[0] == 0 < whole[1], "ranges that clip nothing are one plan, taken as a whole"


def test_steps_switch_off() -> None:
    plain = quantize(MODEL, find_target("native"), samples(12), disable=["judge-ranges", "margins"])
    assert not any("outputs" in getattr(e, "reason", "") and isinstance(e, Edge) for e in plain.plan.edges.values())
    only = quantize(MODEL, find_target("native"), samples(12), disable=["judge-ranges"])
    assert any("widened" in e.reason for e in only.plan.edges.values())
    for value, edge in only.plan.edges.items():
        if isinstance(edge, Edge):
            before = plain.plan.edges[value]
            assert isinstance(before, Edge) and edge.observer == before.observer and edge.params.scale >= before.params.scale


# -- layers in float ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple[Compilation, Compilation]:
    """The accurate preset without and with the step `mixed`, and little else."""
    off = ["equalize", "shift", "judge-ranges", "margins", "correct-bias", "round-narrow", "round-all"]
    without, with_ = (compile_stages(MODEL, calibration=samples(12), preset="accurate", disable=[*off, *more]) for more in (["mixed"], []))
    return without, with_


def test_layers_worth_it_stay_float(pair: tuple[Compilation, Compilation]) -> None:
    without, with_ = pair
    assert without.artifact.manifest["float_ops"] == [] and "mixed" not in without.artifact.manifest["quantization"]
    kept = [f["id"] for f in with_.artifact.manifest["float_ops"] if "(step mixed)" in f["reason"]]
    assert kept and with_.artifact.manifest["quantization"]["mixed"].startswith(f"{len(kept)} layer")
    few = samples(12)
    module = sequence.run(sequence.FLOAT, without.quantized.model.module)

    def noise(c: Compilation) -> float:
        return float(sum(np.square(run(c.integer, s)["logits"].astype(np.float64) - run(module, s)["logits"]).sum() for s in few))

    assert noise(with_) < noise(without)


def test_the_same_layers_every_time(pair: tuple[Compilation, Compilation]) -> None:
    again = compile_stages(MODEL, calibration=samples(12), preset="accurate",
        disable=["equalize", "shift", "judge-ranges", "margins", "correct-bias", "round-narrow", "round-all"])  # fmt: skip
    assert again.artifact.manifest["float_ops"] == pair[1].artifact.manifest["float_ops"]
