"""Which runs a comparison makes: a search for each rule's two rates, other seeds, shorter runs.

All of it is a function of the losses of the runs that are finished: a comparison that was killed,
or is given another rule, seed or trial, knows by itself what is still to be run.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Point = tuple[int, int]
"""Exponents of two: the rates of matrices and rest are the first trial's, times 2 to these."""

LENGTHS = (1.0, 5 / 6, 2 / 3, 1 / 2)
"""Lengths of the runs at the best rates, as shares of all steps. The shorter ones say how soon
another rule's loss is reached."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the job: its rule, effective peak rates of matrices and rest, seed and steps."""

    rule: str
    matrices: float
    rest: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        rates = f"matrices{self.matrices:.4g}-rest{self.rest:.4g}"
        return f"{self.rule}-{rates}-seed{self.seed}-steps{self.steps}".replace("/", "_")


Losses = Mapping[Run, float]
"""Final validation losses of the finished runs; infinite where one diverged."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What is compared: an optimizer, the rates of its first trial, how many trials and seeds."""

    name: str
    matrices: float
    rest: float
    budget: int
    seeds: int


def search(losses: Mapping[Point, float], budget: int) -> tuple[list[Point], Point | None]:
    """Descends along the matrices' rate, then along the rest's, and so on until neither helps.

    Args:
        losses: The loss at each point that is measured.
        budget: The most points to measure.

    Returns:
        All points asked for so far; and the best one, or None while some are not measured.
    """
    points: list[Point] = []
    best, axis, settled = (0, 0), 0, 0
    while settled < 2:
        around = [best, _moved(best, axis, -1), _moved(best, axis, 1)]
        points += [point for point in around if point not in points][: budget - len(points)]
        if not losses.keys() >= {*points}:
            return points, None
        # Where all diverge, the lower rate is the better one.
        lowest = min((losses[point], point) for point in around if point in points)[1]
        if not {*points} >= {*around}:  # the budget is spent
            break
        if lowest == best:
            axis, settled = 1 - axis, settled + 1
        else:  # an edge of what is measured: further the same way
            best, settled = lowest, 0
    return points, min((losses[point], point) for point in points)[1]


def edges(points: Sequence[Point], best: Point) -> list[str]:
    """The neighbours of the best point that are no trials: one of them may be better."""
    return [
        f"{name} {side}"
        for axis, name in enumerate(("matrices", "rest"))
        for side, by in (("/ 2", -1), ("x 2", 1))
        if _moved(best, axis, by) not in points
    ]


def _moved(point: Point, axis: int, by: int) -> Point:
    return (point[0] + by, point[1]) if axis == 0 else (point[0], point[1] + by)


@dataclass(frozen=True, slots=True)
class Protocol:
    """The runs of a comparison."""

    rules: tuple[Rule, ...]
    seed: int
    """Rates are tuned on this seed; the other seeds are those after it."""
    steps: int

    @property
    def lengths(self) -> list[int]:
        """Steps of the runs at the best rates, the longest first."""
        return list(dict.fromkeys(max(1, round(share * self.steps)) for share in LENGTHS))

    def trial(self, rule: Rule, point: Point) -> Run:
        """The run of a rule's search at that point."""
        rates = rule.matrices * 2.0 ** point[0], rule.rest * 2.0 ** point[1]
        return Run(rule.name, *rates, self.seed, self.steps)

    def search(self, rule: Rule, losses: Losses) -> tuple[list[Point], Point | None]:
        """The points of a rule's search so far, and the best one; see `search`."""
        measured = {}
        for run, loss in losses.items():
            if (run.rule, run.seed, run.steps) == (rule.name, self.seed, self.steps):
                factors = run.matrices / rule.matrices, run.rest / rule.rest
                measured[round(math.log2(factors[0])), round(math.log2(factors[1]))] = loss
        return search(measured, rule.budget)

    def repeats(self, rule: Rule, losses: Losses, steps: int) -> list[Run]:
        """A rule's runs at its best rates on the other seeds; none before the rates are known."""
        _, best = self.search(rule, losses)
        if best is None or math.isinf(losses[self.trial(rule, best)]):
            return []
        found = self.trial(rule, best)
        seeds = range(self.seed + 1, self.seed + 1 + rule.seeds)
        return [Run(rule.name, found.matrices, found.rest, seed, steps) for seed in seeds]

    def mean(self, rule: Rule, losses: Losses, steps: int) -> float | None:
        """The mean loss of its `repeats`; None before all of them are finished."""
        runs = self.repeats(rule, losses, steps)
        complete = runs and losses.keys() >= {*runs}
        return statistics.fmean(losses[run] for run in runs) if complete else None

    def curve(self, rule: Rule, losses: Losses) -> list[tuple[int, float]]:
        """Steps, and the mean final loss of runs of so many steps; the longest first."""
        means = ((steps, self.mean(rule, losses, steps)) for steps in self.lengths)
        return [(steps, mean) for steps, mean in means if mean is not None]

    def ahead(self, losses: Losses) -> tuple[list[Run], int]:
        """The runs that can be made now, and the most steps that all runs to come can have."""
        found = [self._ahead(rule, losses) for rule in self.rules]
        # The longest first: then all rules have a final loss before any gets shorter runs.
        runs = sorted((run for runs, _ in found for run in runs), key=lambda run: -run.steps)
        return runs, sum(steps for _, steps in found)

    def _ahead(self, rule: Rule, losses: Losses) -> tuple[list[Run], int]:
        points, best = self.search(rule, losses)
        if best is None:
            trials = [self.trial(rule, point) for point in points]
            missing = [run for run in trials if run not in losses]
            left = rule.budget - len(points) + len(missing)
            return missing, left * self.steps + rule.seeds * sum(self.lengths)
        means = [self.mean(other, losses, self.steps) for other in self.rules if other != rule]
        highest = max((m for m in means if m is not None and m < math.inf), default=-math.inf)
        for index, steps in enumerate(self.lengths):
            runs = self.repeats(rule, losses, steps)
            if missing := [run for run in runs if run not in losses]:
                shorter = sum(self.lengths[index + 1 :]) * rule.seeds * (len(self.rules) > 1)
                return missing, len(missing) * steps + shorter
            mean = self.mean(rule, losses, steps)
            if mean is None or mean >= highest:  # no rule's loss is reached by a shorter run
                break
        return [], 0


def steps_to(loss: float, curve: Sequence[tuple[int, float]]) -> tuple[float, bool] | None:
    """How many steps a run needs that ends at this loss.

    Args:
        loss: A final loss, in nats per token.
        curve: Steps and final losses of runs of several lengths, the longest first.

    Returns:
        The steps, interpolated between two lengths in the loss's logarithm, and True. If even the
        shortest run ends lower: its steps, and False. If no run gets there: None.
    """
    if not curve or curve[0][1] > loss:
        return None
    for (long, low), (short, high) in itertools.pairwise(curve):
        if high > loss:
            share = 0.0 if math.isinf(high) else math.log(loss / low) / math.log(high / low)
            return long - share * (long - short), True
    return float(curve[-1][0]), curve[-1][1] == loss
