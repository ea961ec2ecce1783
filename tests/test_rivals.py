"""A costly recipe against the plan of `default`: what is judged, on what, and which network is kept."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from qcompiler.base.targets import find_target
from qcompiler.calibration.data import CheckedSamples
from qcompiler.cli.demo import MODEL, demo_data
from qcompiler.pipeline import rivals, stages
from qcompiler.pipeline.compile import compile_stages, compiled
from qcompiler.pipeline.job import opened
from qcompiler.pipeline.stages import Corrected
from qcompiler.plan.recipes import PRESETS, recipe


def samples(count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(demo_data()[0], count))


def test_only_steps_beyond_default_have_a_rival() -> None:
    assert recipe("fast").rival is None and recipe("default").rival is None
    other = recipe("accurate", disable=["equalize", "shift"]).rival
    assert other is not None and other.preset == "default" and other.steps == PRESETS["default"] - {"equalize", "shift"}
    assert other.samples == recipe("default").samples and other.judges == recipe("default").judges
    assert recipe("accurate", disable=["halves", "residuals", "mixed", "round-all"]).rival is None
    assert recipe("accurate").without_changes().rival is None, "a network that is quantized already"


SIXTEEN = ["residuals", "halves"]  # which measure a network of their own


def figures(said: str) -> tuple[float, float]:
    """dB of (accurate, default) in the manifest's sentence."""
    words = said.replace(",", "").split()
    return float(words[1]), float(words[4])


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_better_network_is_kept_and_both_figures_stated(spoilt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged on samples that calibration does not see. Spoilt: the costly recipe ends in biases that are off."""
    made: dict[str, Corrected] = {}
    finish = rivals.correct

    def correct(network: Any, built: Any) -> Corrected:
        result = finish(network, built)
        preset = network.job.recipe.preset
        made[preset] = result
        if spoilt and preset == "accurate":
            step = next(s for s in result.built.program.steps if s.name == "qc.conv2d")
            result.built.program.replace_operand(step.writes, 2, np.asarray(step.op.operands[2]) * 3 + 5000)  # type: ignore[union-attr]
        return result

    monkeypatch.setattr(rivals, "correct", correct)
    job = opened(MODEL, find_target("native"), samples(16), {"preset": "accurate", "disable": ["judge-ranges", "margins", "equalize", "shift", *SIXTEEN]})
    result = compiled(job)
    said = result.artifact.manifest["quantization"]["rivals"]
    accurate, default = figures(said)
    assert "on 4 samples that neither was fitted to" in said
    assert result.artifact.manifest["calibration_samples"] == 12, "the others were held out"
    kept = "default" if spoilt else "accurate"
    assert (accurate < default) == spoilt and f"the plan of {kept} kept" in said
    assert result.corrected.built is made[kept].built and result.artifact.manifest["preset"] == kept
    assert made["default"].network.measured.table is made["accurate"].network.measured.table, "one calibration"
    held = [s for i, s in enumerate(samples(16)) if i % 4 == 3]
    noise = rivals._scores(made["default"], CheckedSamples(held, job.model.inputs))
    assert len(noise) == 4 and default == pytest.approx(-10 * np.log10(noise.relative_noise()), abs=0.006)


def test_what_is_known_of_ranges_serves_both_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges that the first plan had judged are not judged again for the second, and what counts as a trifle is a part of the noise of all values."""
    asked: list[tuple[dict[str, Any], float]] = []
    judge = stages.output_noise

    def judged(twin: Any, proposals: Any, *rest: Any) -> Any:
        found = judge(twin, proposals, *rest)
        asked.append((found, rest[-1]))
        return found

    monkeypatch.setattr(stages, "output_noise", judged)
    job = opened(MODEL, find_target("native"), samples(12), {"preset": "accurate"})
    measured = stages.calibrate(stages.equalize(job.counted()))
    other = recipe("accurate").rival
    assert other is not None
    first = stages.integer_network(measured, {})
    second = stages.integer_network(measured.under(other), {})
    ((noise, beside),) = asked
    assert len(noise) > 5 and beside == 0 and first.plan.edges.keys() == second.plan.edges.keys()
    fewer = dict(list(noise.items())[:3])
    proposals = {name: stages.Proposals(p.params, p.members, p.low * 2, p.high * 2) for name, (p, _) in measured._noise.items()}
    measured.noise({name: proposals[name] if name in fewer else measured._noise[name][0] for name in noise})
    again, beside = asked[1]
    assert again.keys() == fewer.keys() and beside == pytest.approx(sum(min(h.noise.values()) for name, h in noise.items() if name not in fewer))


def test_few_samples_are_not_held_out() -> None:
    said = compile_stages(MODEL, calibration=samples(4), preset="accurate", disable=["judge-ranges", "margins", "equalize", "shift", "round-all"])
    manifest = said.artifact.manifest
    assert "on the calibration samples themselves (fewer than 8" in manifest["quantization"]["rivals"] and manifest["calibration_samples"] == 4
