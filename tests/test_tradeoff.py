"""The search for layers that stay float, on made-up numbers: no network, no TVM execution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qcompiler.plan.placement import Placement
from qcompiler.plan.tradeoff import LayerCost, Network, ValueCost, Wide, WideCost, first_below

FREE = frozenset[str]()


def chain(count: int, seed: int, conversion: float = 1.0) -> Network:
    """x -> l0 -> l1 -> ...; a value is stored in 8 bits where an int8 layer reads it; an int8 layer hands float32 to float readers at no cost."""
    rng = np.random.default_rng(seed)
    names = [f"l{i}" for i in range(count)]
    layers, values = {}, {"x": ValueCost(np.array([1e-4]), conversion, conversion)}
    for i, name in enumerate(names):
        int8, float32 = rng.uniform(1, 5), rng.uniform(2, 12)
        layers[name] = LayerCost(name, (names[i - 1] if i else "x",), rng.exponential(1e-3, 1), int8, float32, 100, 400, True)
        values[name] = ValueCost(rng.exponential(1e-3, 1), conversion, conversion)

    def place(keep: frozenset[str]) -> Placement:
        return Placement(dict.fromkeys(keep, "chosen"), tuple(layers[n].inputs[0] for n in names if n not in keep))

    return Network(layers, values, place, frozenset(names[-1:]))


def test_predictions_add_up() -> None:
    """Three layers, the middle one float: its weights and its input, which only it reads, are not rounded; its result is converted once."""
    network = chain(3, 0)
    layers, values = network.layers, network.values
    all_int8, middle = network.predict(FREE), network.predict(frozenset(["l1"]))
    assert all_int8.seconds == pytest.approx(sum(n.int8_seconds for n in layers.values()) + 1)  # the input is converted
    assert all_int8.noise == pytest.approx(float(sum(n.noise[0] for n in layers.values()) + sum(values[v].noise[0] for v in ("x", "l0", "l1"))))
    assert middle.noise == pytest.approx(all_int8.noise - layers["l1"].noise[0] - values["l0"].noise[0])
    assert middle.seconds == pytest.approx(all_int8.seconds - layers["l1"].int8_seconds + layers["l1"].float_seconds + 1)
    assert middle.bytes == 600
    gain, seconds = network.gain(middle, "l1")
    assert gain == pytest.approx(10 * np.log10(all_int8.noise / middle.noise)) and seconds == pytest.approx(middle.seconds - all_int8.seconds)


@pytest.mark.parametrize("seed", range(8))
def test_the_path_is_close_to_the_best_plans(seed: int) -> None:
    """Against all 2^9 plans: for several limits, the point that the search would take costs at most a few percent more than the best one."""
    network = chain(9, seed)
    path = network.path(FREE)
    assert path[0].keep == FREE and path[-1].keep == frozenset(network.layers)
    assert all(a.noise > b.noise and a.keep < b.keep for a, b in itertools.pairwise(path))
    every = [network.predict(frozenset(k)) for r in range(10) for k in itertools.combinations(network.layers, r)]
    lost = []
    for share in (0.7, 0.5, 0.3, 0.15, 0.05):
        limit = share * path[0].noise
        found = network.trimmed(path[first_below(path, limit)], limit, FREE)
        best = min(p.seconds for p in every if p.noise <= limit)
        assert found.noise <= limit
        lost.append(found.seconds / best - 1)
    assert np.mean(lost) < 0.08 and max(lost) < 0.25, lost


def test_what_saves_time_comes_first_and_what_was_asked_for_stays() -> None:
    network = chain(6, 3)
    fast = network.layers["l4"]
    network.layers = {**network.layers, "l4": LayerCost("l4", fast.inputs, fast.noise, 50.0, 1.0, 100, 400, True)}
    assert "l4" in network.path(FREE)[1].keep
    fixed = frozenset(["l1"])
    path = network.path(fixed)
    assert path[0].keep == fixed
    assert "l1" in network.trimmed(path[-1], np.inf, fixed).keep


def test_layers_that_may_not_move_do_not() -> None:
    network = chain(4, 1)
    network.layers = {n: LayerCost(n, v.inputs, v.noise, v.int8_seconds, v.float_seconds, 1, 4, n != "l2") for n, v in network.layers.items()}
    assert network.path(FREE)[-1].keep == {"l0", "l1", "l3"}


def test_first_below() -> None:
    path = chain(5, 0).path(FREE)
    assert first_below(path, np.inf) == 0 and first_below(path, -1.0) == len(path) - 1
    assert first_below(path, path[2].noise) == 2


def test_a_layer_that_carries_values_does_not_part_its_neighbours() -> None:
    """l0 -> l1 (moves data) -> l2: the value between l0 and l2 is rounded until both are float, so that is one step of the search."""
    network = chain(3, 0)
    rows = {n: LayerCost(n, v.inputs, v.noise, v.int8_seconds, v.float_seconds, 1, 4, n != "l1", n == "l1") for n, v in network.layers.items()}
    network.layers = rows
    assert frozenset(["l0", "l2"]) in network.moves()
    rows["l1"] = LayerCost("l1", rows["l1"].inputs, rows["l1"].noise, 1.0, 1.0, 1, 4, False)
    assert frozenset(["l0", "l2"]) not in network.moves()


def test_a_value_in_16_bits_takes_the_place_of_a_layer_in_float() -> None:
    """The input of l1 holds most of the noise: a second product is cheaper than a float layer, and costs nothing where l1 is float anyway."""
    network = chain(3, 0)
    noises = {"l0": 0.5, "x": 1e-6}
    network.values = {n: ValueCost(np.array([noises.get(n, 1e-4)]), 1.0, 1.0) for n in network.values}
    rows = {n: LayerCost(n, v.inputs, np.array([1e-4]), 2.0, 7.0, 100, 400, True) for n, v in network.layers.items()}
    network.layers, network.wide = rows, {"l0": WideCost(("l1",), 0.5)}
    first, second, *_ = network.path(FREE)
    assert second.keep == {Wide("l0")} and second.wide == {"l0"} and second.floats == FREE
    assert second.seconds - first.seconds == pytest.approx(2.5) and first.noise - second.noise == pytest.approx(0.5)
    gain, seconds = network.gain(second, Wide("l0"))
    assert gain > 25 and seconds == pytest.approx(2.5)
    assert network.predict(frozenset([Wide("l0"), "l1"])).seconds == network.predict(frozenset(["l1"])).seconds
    both = network.predict(frozenset([Wide("l0"), "l2"]))
    assert network.trimmed(both, 0.1, FREE).keep == {Wide("l0")}, "the float layer costs more, and the limit can spare it"
    assert network.trimmed(both, both.noise, FREE) is both
