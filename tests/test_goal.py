"""Accuracy targets: what is judged, on which samples, with what confidence."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.base.errors import DataError
from qcompiler.pipeline.goal import FEWEST, Goal, Scores, decibel, held_out, judge, student95


def scores(count: int, noise: float = 1e-3, right: int | None = None) -> Scores:
    """`count` samples with signal power about 1 in two outputs; the second has a tenth of the noise. `right` of them agree with float."""
    rng = np.random.default_rng(count)
    power = 1 + rng.random((count, 2))
    agree = None if right is None else np.arange(count).reshape(-1, 1) < right
    return Scores(power, power * noise * [1, 0.1] * (0.5 + rng.random((count, 2))), agree)


def test_student95() -> None:
    """Against the usual table of the t distribution."""
    for freedom, value in {1: 6.3138, 2: 2.9200, 3: 2.3534, 4: 2.1318, 5: 2.0150, 10: 1.8125, 24: 1.7109, 100: 1.6602}.items():
        assert student95(freedom) == pytest.approx(value, rel=0.01 if freedom < 4 else 2e-3)


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Of many sets of 24 samples whose noise varies a lot, the true ratio lies below the bound in about 95 %."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        power = rng.gamma(4, 0.25, (24, 1))
        held += Scores(power, 0.01 * power * rng.gamma(3, 1 / 3, (24, 1))).noise_bound() >= 0.01
    assert 0.91 < held / 2000 < 0.97
    assert scores(1).noise_bound() == np.inf


def test_the_worst_output_counts() -> None:
    found = scores(400)
    assert decibel(found.relative_noise()) == pytest.approx(30, abs=0.3)
    assert found.of([3]).relative_noise() == pytest.approx(found.noise[3, 0] / found.power[3, 0])
    silent = Scores(np.zeros((9, 1)), np.ones((9, 1)))
    assert silent.relative_noise() > 1e6 and decibel(0) == np.inf


def test_held_out_samples_judge_the_sqnr() -> None:
    assert held_out(FEWEST - 1) == [] and held_out(8) == [3, 7] and len(held_out(100)) == 25
    count = 40
    good = scores(count)
    (finding,) = judge(Goal(min_sqnr=28), good, held_out(count))
    assert finding.met and finding.noise is not None and finding.noise > 1
    assert "10 held-out samples" in finding.found and "95 % confidence" in finding.found
    fitted_only = Scores(good.power, good.noise * np.where(np.isin(np.arange(count), held_out(count)), 100, 1)[:, None])
    (finding,) = judge(Goal(min_sqnr=28), fitted_only, held_out(count))
    assert not finding.met and finding.noise is not None and finding.noise < 0.1
    close = decibel(good.of(held_out(count)).relative_noise()) - 0.01  # reached on these ten, but not surely on others
    assert not judge(Goal(min_sqnr=close), good, held_out(count))[0].met


def test_without_samples_to_hold_out_it_says_so() -> None:
    (finding,) = judge(Goal(min_sqnr=20), scores(1), [])
    assert finding.met and "the 1 calibration sample themselves" in finding.found and "confidence" not in finding.found


def test_fractions_are_judged_on_all_samples_and_state_their_interval() -> None:
    agreement, drop = Goal(min_agreement=0.95), Goal(max_accuracy_drop=2)
    (met,), (missed,) = judge(agreement, scores(100, right=95), held_out(100)), judge(agreement, scores(100, right=94), held_out(100))
    assert met.met and not missed.met
    assert missed.found == "94.00 % on all 100 samples, 25 of them held out; 95 % interval 87.5 to 97.2 %"
    right = np.ones((100, 1), bool)
    for wrong, gained, ok in ((2, 0, True), (3, 0, False), (5, 3, True)):
        int8, float32 = right.copy(), right.copy()
        int8[:wrong], float32[50 : 50 + gained] = False, False
        (finding,) = judge(drop, Scores(np.ones((100, 1)), np.zeros((100, 1)), None, float32, int8), [])
        assert finding.met == ok and finding.found.startswith(f"{wrong - gained:.2f} points")


@pytest.mark.parametrize("wrong", [{"min_sqnr": float("nan")}, {"min_agreement": 1.1}, {"min_agreement": -0.1}, {"max_accuracy_drop": -1.0}])
def test_impossible_goals_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match=next(iter(wrong))):
        Goal(**wrong)
    assert not Goal() and str(Goal(25, 0.98)) == "--min-sqnr 25 --min-agreement 0.98"
