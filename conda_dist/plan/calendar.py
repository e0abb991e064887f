"""In which steps the matrices of a weight take new bases: pure functions of step counts.

A weight counts its own steps. A refresh is due when that count is a multiple of the interval
(``update_proj_gap``), and stays due until it succeeds. With ``refresh_delay``, a snapshot of the
momentum is decomposed in the background. The matrix takes the new basis ``refresh_delay`` steps
after the snapshot, or ``update_proj_gap`` steps after it if that is earlier.

``taken`` has the "basis_step" of each matrix of the weight's batch: the step at which it took its
basis. ``snapshots`` has the "snapshot_step" of each: the step of its pending snapshot. Both are
``NO_BASIS`` if there is none.
"""

import math
from collections.abc import Sequence

NO_BASIS = -1.0
"""The ``basis_step`` of a matrix whose basis is still the identity, and the ``snapshot_step`` of a
matrix without a pending refresh."""


def due(taken: Sequence[float], step: int, interval: int, in_background: bool) -> tuple[int, ...]:
    """The matrices to decompose within this step.

    Args:
        taken: for each matrix the step at which it took its basis.
        step: number of steps that the weight has taken before this one.
        interval: number of steps between refreshes.
        in_background: whether refreshes after the first are decomposed in the background. Then only
            matrices without a basis are returned.
    """
    before = 0 if in_background else step - step % interval  # NO_BASIS is less than 0
    if min(taken, default=before) >= before:
        return ()
    return tuple(i for i, when in enumerate(taken) if when < before)


def pending(snapshots: Sequence[float]) -> tuple[int, ...]:
    """The matrices that have a snapshot and have not taken the new basis yet."""
    return tuple(i for i, when in enumerate(snapshots) if when != NO_BASIS)


def ready(snapshots: Sequence[float], step: int, interval: int, delay: int) -> tuple[int, ...]:
    """The matrices that take, in this step, the new basis of their snapshot.

    Args:
        snapshots: for each matrix the step of its snapshot.
        step: number of steps that the weight has taken before this one.
        interval: number of steps between refreshes.
        delay: number of steps from a snapshot to the new basis.
    """
    before = step - min(delay, interval)
    return tuple(i for i, when in enumerate(snapshots) if NO_BASIS != when <= before)


def to_start(taken: Sequence[float], step: int, interval: int) -> tuple[int, ...]:
    """The matrices to take a snapshot of, after a step in which a refresh was due.

    Args:
        taken: for each matrix the step at which it took its basis.
        step: number of steps that the weight had taken before that step.
        interval: number of steps between refreshes.
    """
    last = step - step % interval
    return tuple(i for i, when in enumerate(taken) if NO_BASIS < when < last)


def steps_to_next(
    taken: Sequence[float],
    snapshots: Sequence[float],
    step: int,
    interval: int,
    delay: int,
) -> float:
    """Number of steps before the next one in which a matrix takes a new basis.

    It is 0 if that is the current step, and infinite for a weight without matrices.

    Args:
        taken: for each matrix the step at which it took its basis.
        snapshots: for each matrix the step of its snapshot; () if refreshes are synchronous.
        step: number of steps that the weight has taken before this one.
        interval: number of steps between refreshes.
        delay: number of steps from a snapshot to the new basis.
    """
    if not taken:
        return math.inf
    if NO_BASIS in taken:
        return 0
    if waiting := [when for when in snapshots if when != NO_BASIS]:
        return max(0, int(min(waiting)) + min(delay, interval) - step)
    last = step - step % interval
    return 0 if min(taken) < last else last + interval - step
