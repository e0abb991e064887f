"""Which steps of a training loop to leave out, told from numbers that the loop reads anyway."""

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

_LEAST_SPREAD = 0.01
"""As a share of the median: numbers that are all alike would make any other one a jump."""


class BadSteps:
    """Judges steps by their loss and gradient norm, and counts the bad ones.

    A step is bad if a number is not finite. With ``factor`` it is bad also if a number is above
    ``median + factor * spread`` of the last ``window`` steps that were good. The spread is the
    median absolute deviation from that median, but at least 1 % of it. Nothing is a jump before
    there were that many good steps, or where the spread is 0: half of them were exactly 0 then.

    It communicates nothing: give it numbers that are equal on all ranks, and all ranks decide
    alike.

    Args:
        limit: bad steps in a row that may be skipped.
        factor: see above; 0: only numbers that are not finite are bad.
        window: good steps that a number is compared with.

    Attributes:
        in_a_row: bad steps since the last good one.
        total: bad steps so far.

    Raises:
        ValueError: an argument is out of bounds.
    """

    def __init__(self, limit: int = 3, factor: float = 0.0, window: int = 100) -> None:
        if limit < 0 or not factor >= 0 or window < 1:
            raise ValueError(
                f"limit={limit}, factor={factor}, window={window}: limit and factor must be at "
                "least 0, window at least 1."
            )
        self._limit, self._factor, self._window = limit, factor, window
        self._recent = dict[str, list[float]]()
        self.in_a_row = self.total = 0

    def judge(self, numbers: Mapping[str, float]) -> str:
        """Says what is wrong with a step, or returns an empty string if it is good.

        Args:
            numbers: what to judge it by, by name, such as ``{"the loss": 2.1}``. If a number is not
                finite, others need not be named.
        """
        wrong = next(filter(None, map(self._problem, numbers, numbers.values())), "")
        if wrong:
            self.in_a_row += 1
            self.total += 1
            return wrong
        self.in_a_row = 0
        for name, value in numbers.items() if self._factor else ():
            self._recent[name] = [*self._recent.get(name, ()), value][-self._window :]
        return ""

    @property
    def too_many(self) -> bool:
        """Whether there were more bad steps in a row than may be skipped."""
        return self.in_a_row > self._limit

    def describe(self) -> str:
        """How many bad steps in a row there were, and may be skipped, in words."""
        return f"{self.in_a_row} in a row; up to {self._limit} are skipped"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: JSON keeps it to the last bit."""
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"in_a_row": self.in_a_row, "total": self.total, "recent": recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a run stood; of a longer window, the last steps are kept."""
        self.in_a_row, self.total = state["in_a_row"], state["total"]
        recent = state["recent"] if self._factor else {}
        self._recent = {name: list(values)[-self._window :] for name, values in recent.items()}

    def _problem(self, name: str, value: float) -> str:
        """What is wrong with a number; empty if nothing is."""
        if not math.isfinite(value):
            return f"{name} is {value}"
        recent = self._recent.get(name, ())
        if not self._factor or len(recent) < self._window:
            return ""
        middle = median(recent)
        spread = max(median(abs(old - middle) for old in recent), _LEAST_SPREAD * abs(middle))
        most = middle + self._factor * spread
        if not spread or value <= most:
            return ""
        return (
            f"{name} is {value:.4g}, above {most:.4g}: the median of the last {self._window} good "
            f"steps, {middle:.4g}, plus {self._factor:g} times their spread, {spread:.4g}"
        )
