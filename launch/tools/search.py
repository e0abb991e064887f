"""Which runs a comparison makes: a search for each rule's two rates, other seeds, shorter runs.

Everything here is a function of the losses that finished runs have had, so that a comparison which
is killed, or given another rule, seed or trial, knows by itself what is still to be run.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Point = tuple[int, int]
"""Factors of two, as exponents, on the rates that a search begins at: matrices, rest."""

AXES = ("matrices", "rest")
LENGTHS = (1.0, 5 / 6, 2 / 3, 1 / 2)
"""Shares of the steps that runs take from which the steps to a baseline's loss are found."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the job, at the effective peak rates of the matrices and of the rest."""

    rule: str
    matrices: float
    rest: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Of its folder."""
        rates = f"matrices{self.matrices:.4g}-rest{self.rest:.4g}"
        return f"{self.rule}-{rates}-seed{self.seed}-steps{self.steps}"


Losses = Mapping[Run, float]
"""Final validation losses of finished runs; infinite if they diverged."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a comparison gives one optimizer."""

    name: str
    matrices: float
    """The rate that its search begins at, and"""
    rest: float
    """the same of everything else."""
    budget: int
    """Trials of the search."""
    seeds: int
    """Seeds at the rates that it finds."""


@dataclass(frozen=True, slots=True)
class Search:
    """How far a search has come."""

    points: tuple[Point, ...]
    """What it has asked for, in that order, within its budget."""
    missing: tuple[Point, ...]
    """Those not measured yet: to be run next."""
    best: Point | None
    """Where the loss is lowest, once the search is over."""

    @property
    def edges(self) -> list[str]:
        """Sides of the best point on which the budget left no trial: a better one may be there."""
        if self.best is None:
            return []
        sides = [("below", -1), ("above", 1)]
        return [
            f"{side} in {AXES[axis]}"
            for axis in (0, 1)
            for side, by in sides
            if _moved(self.best, axis, by) not in self.points
        ]


def search(loss: Callable[[Point], float | None], budget: int) -> Search:
    """Descends along one rate, then along the other, by factors of two, until neither helps.

    Args:
        loss: Of a point; None: not measured yet.
        budget: Most points.
    """
    points: list[Point] = []
    best, axis, settled = (0, 0), 0, 0
    while settled < 2:
        around = [best, _moved(best, axis, -1), _moved(best, axis, 1)]
        points += [point for point in around if point not in points]
        del points[budget:]
        missing = tuple(point for point in points if loss(point) is None)
        if missing:
            return Search(tuple(points), missing, None)
        # Where all diverge, the lower rate is the better one.
        lowest = min((_known(loss, p), p) for p in around if p in points)[1]
        if lowest == best:
            axis, settled = 1 - axis, settled + 1
        else:  # on along the same axis
            best, settled = lowest, 0
        if not all(point in points for point in around):  # the budget is spent
            break
    return Search(tuple(points), (), min((_known(loss, p), p) for p in points)[1])


def _known(loss: Callable[[Point], float | None], point: Point) -> float:
    found = loss(point)
    assert found is not None
    return found


def _moved(point: Point, axis: int, by: int) -> Point:
    return (point[0] + by, point[1]) if axis == 0 else (point[0], point[1] + by)


@dataclass(frozen=True, slots=True)
class Protocol:
    """The runs of a comparison."""

    rules: tuple[Rule, ...]
    seed: int
    """On which rates are tuned; the other seeds follow it."""
    steps: int

    @property
    def lengths(self) -> list[int]:
        """Steps of the runs at the best rates, the longest first."""
        return list(dict.fromkeys(max(1, round(share * self.steps)) for share in LENGTHS))

    def trial(self, rule: Rule, point: Point) -> Run:
        """The run of a rule's search at that point."""
        rates = rule.matrices * 2.0 ** point[0], rule.rest * 2.0 ** point[1]
        return Run(rule.name, *rates, self.seed, self.steps)

    def search(self, rule: Rule, losses: Losses) -> Search:
        """How far a rule's search has come."""
        return search(lambda point: losses.get(self.trial(rule, point)), rule.budget)

    def chosen(self, rule: Rule, losses: Losses) -> Run | None:
        """The best trial of a rule's search, once that is over."""
        best = self.search(rule, losses).best
        return None if best is None else self.trial(rule, best)

    def repeats(self, rule: Rule, losses: Losses, steps: int) -> list[Run]:
        """The runs of a rule on the seeds that were not tuned on; none until rates are known."""
        best = self.chosen(rule, losses)
        if best is None or math.isinf(losses[best]):
            return []
        seeds = range(self.seed + 1, self.seed + 1 + rule.seeds)
        return [Run(rule.name, best.matrices, best.rest, seed, steps) for seed in seeds]

    def mean(self, rule: Rule, losses: Losses, steps: int) -> float | None:
        """The mean loss of these runs, once all are finished."""
        runs = self.repeats(rule, losses, steps)
        found = [losses[run] for run in runs if run in losses]
        return statistics.fmean(found) if runs and len(found) == len(runs) else None

    def wanted(self, losses: Losses) -> list[Run]:
        """What can be run now, given the losses so far; nothing: the comparison is complete."""
        return [run for rule in self.rules for run in self._next(rule, losses)[0]]

    def steps_left(self, losses: Losses) -> int:
        """Steps of all runs that are not finished, at the most."""
        return sum(self._next(rule, losses)[1] for rule in self.rules)

    def _next(self, rule: Rule, losses: Losses) -> tuple[list[Run], int]:
        """A rule's next runs, and the most steps of all its runs to come."""
        state, lengths = self.search(rule, losses), self.lengths
        if state.missing:
            trials = rule.budget - len(state.points) + len(state.missing)
            left = trials * self.steps + rule.seeds * sum(lengths)
            return [self.trial(rule, point) for point in state.missing], left
        others = [self.mean(each, losses, self.steps) for each in self.rules if each != rule]
        finite = (mean for mean in others if mean is not None and math.isfinite(mean))
        target = max(finite, default=-math.inf)
        for index, length in enumerate(lengths):
            runs = self.repeats(rule, losses, length)
            missing = [run for run in runs if run not in losses]
            if missing:
                shorter = sum(lengths[index + 1 :]) * rule.seeds * (len(self.rules) > 1)
                return missing, len(missing) * length + shorter
            mean = self.mean(rule, losses, length)
            if mean is None or mean >= target:  # a shorter run would not reach any baseline's loss
                break
        return [], 0

    def curve(self, rule: Rule, losses: Losses) -> Iterator[tuple[int, float]]:
        """Steps, and the mean final loss of the runs that take so many; the longest first."""
        for length in self.lengths:
            if (mean := self.mean(rule, losses, length)) is not None:
                yield length, mean


def steps_to(loss: float, curve: Sequence[tuple[int, float]]) -> tuple[float, bool] | None:
    """The steps of a run that ends at this loss.

    Args:
        loss: A final loss, in nats per token.
        curve: Steps and final losses of runs of several lengths, the longest first.

    Returns:
        The steps, interpolated in the loss's logarithm between two lengths, and whether that is
        all there is to it: not if the shortest run is below the loss. None: no run gets there.
    """
    reached = [(steps, found) for steps, found in curve if found <= loss]
    if not curve or curve[0] not in reached:
        return None
    for (long, low), (short, high) in itertools.pairwise(curve):
        if high > loss:
            if math.isinf(high) or low == loss:
                return float(long), True
            share = math.log(loss / low) / math.log(high / low)
            return long - share * (long - short), True
    return float(curve[-1][0]), curve[-1][1] == loss
