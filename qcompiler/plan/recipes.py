"""Recipes: which steps a quantization takes, and how much each spends. A preset is a recipe with a name; steps are switched on and off one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qcompiler.base.errors import PlanError, closest
from qcompiler.plan.weights import RATIOS

STEPS = {
    "streams": "16 bits for what normalizations read and all that adds up to it (residual streams); matrix products read 8-bit copies",
    "equalize": "scale channels against each other so that they share an 8-bit scale with less loss",
    "shift": "center channels around zero where biases can take the shift back (with equalize)",
    "ranges": "let observers compete for the range of every value; off: everything seen",
    "judge-ranges": "let these ranges compete once more, by the error of the network's outputs",
    "margins": "widen ranges beyond what few samples showed, and beyond all that was seen where the outputs lose next to nothing by it",
    "residuals": "16 bits for the residual streams of a convolutional network, where that is worth the work",
    "halves": "read in 16 bits, as two halves, the operands of convolutions and dense layers that lose most in 8, where that is worth the work",
    "mixed": "keep in float the layers that raise the accuracy most, for at most a fifth more work",
    "rescue": "bring outputs that lose too much back to 20 dB: operands in halves, layers in float, as either brings more for its work (not beside mixed)",
    "clip-weights": "try clipped weight scales; off: the largest weight of a channel",
    "analytic-bias": "undo what rounded weights do to the mean of every channel, by the float network's means",
    "correct-bias": "undo the mean shift of every channel on calibration samples",
    "round-narrow": "round the weights of layers with few inputs per output (depthwise) for the data",
    "round-all": "round the weights of all layers for the data",
}
"""Every step by name, in order of execution."""

_DEFAULT = frozenset(STEPS) - {"residuals", "mixed", "round-all"}
PRESETS = {"fast": frozenset({"streams", "analytic-bias"}), "default": _DEFAULT, "accurate": frozenset(STEPS)}


@dataclass(frozen=True)
class Recipe:
    """samples: how many calibration samples correction and rounding look at. positions: of each sample's outputs, how many decide a rounding.
    judges: of `ranges.output_noise`, half the samples that judge a value's ranges, the part of the network in which values are judged, and the work
    that this may take, in calibrations. halves: how many times its part in the work an operand's part in the noise has to be to be read in halves, and
    the work, as a part of the network's, that all of them may take; states: the same of results of recurrent layers, in networks without 16-bit streams."""

    preset: str
    steps: frozenset[str]
    samples: int
    positions: int
    judges: tuple[int, float, float]
    halves: tuple[float, float]
    states: tuple[float, float]

    @property
    def observers(self) -> tuple[str, ...]:
        from qcompiler.calibration.observers import OBSERVERS  # not above: it needs TVM, and the command line reads the names of steps

        return tuple(OBSERVERS) if "ranges" in self.steps else ("min-max",)

    @property
    def judges_ranges(self) -> bool:
        """Does it look at what ranges do to the outputs?"""
        return not self.steps.isdisjoint({"judge-ranges", "margins"})

    @property
    def ratios(self) -> tuple[float, ...]:
        """Candidate weight scales (`weights.RATIOS`)."""
        return RATIOS["accurate" if self.preset == "accurate" else "default"] if "clip-weights" in self.steps else RATIOS["fast"]

    @property
    def divides_anywhere(self) -> bool:
        """Does the step "halves" look at networks without 16-bit streams too?"""
        return self.preset == "accurate"

    @property
    def optimizes(self) -> bool:
        """Does it look at samples again after the plan?"""
        return not self.steps.isdisjoint({"correct-bias", "round-narrow", "round-all"})

    @property
    def rival(self) -> Recipe | None:
        """The recipe of `default`, where this one takes steps beyond it and so has to prove better; what is switched off here is off there."""
        beyond = self.steps - PRESETS["default"] if self.preset == "accurate" else frozenset()
        return recipe("default", disable=PRESETS["default"] - self.steps) if beyond else None

    def without_changes(self) -> Recipe:
        """Only the steps that leave weights and biases as they are: for a network whose file has them quantized, because it was trained so."""
        return replace(self, steps=self.steps & {"ranges", "judge-ranges", "margins", "clip-weights"})


_SAMPLES = {"fast": 32, "default": 32, "accurate": 64}
_POSITIONS = {"fast": 128, "default": 256, "accurate": 512}
_JUDGES = {"fast": (4, 0.5, 8.0), "default": (8, 0.5, 16.0), "accurate": (8, 1.0, 64.0)}
_HALVES = {"fast": (2.5, 1 / 16), "default": (2.5, 1 / 16), "accurate": (0.2, 1 / 3)}
_STATES = (0.5, 1.0)


def recipe(preset: str | Recipe = "default", enable: Iterable[str] = (), disable: Iterable[str] = ()) -> Recipe:
    """The recipe of a preset with steps switched on and off. Raises PlanError for an unknown preset or step, or one both on and off."""
    if isinstance(preset, Recipe):
        return preset
    if preset not in PRESETS:
        raise PlanError(f"unknown preset '{preset}'.{closest(preset, list(PRESETS))} Known: {', '.join(PRESETS)}")
    on, off = list(enable), list(disable)
    for step in [*on, *off]:
        if step not in STEPS:
            raise PlanError(f"unknown step '{step}'.{closest(step, list(STEPS))} Known: {', '.join(STEPS)}")
    if both := sorted(set(on) & set(off)):
        raise PlanError(f"step '{both[0]}' is both enabled and disabled; leave one out")
    return Recipe(preset, (PRESETS[preset] | set(on)) - set(off), _SAMPLES[preset], _POSITIONS[preset], _JUDGES[preset], _HALVES[preset], _STATES)
