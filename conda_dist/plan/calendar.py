"""When the matrices of a weight take new bases: pure functions of counts.

A weight counts its own steps. A refresh is due in each step whose count is a multiple of the
interval (``update_proj_gap``), and remains due until it has succeeded. With ``refresh_delay`` a
snapshot of the momentum is decomposed in the background, and the matrix takes the new basis that
many steps later, or at the next multiple if that comes first.

All functions take counts by matrix of the weight's batch, of ``basis_step`` or ``snapshot_step``.
"""

import math
from collections.abc import Sequence

NO_BASIS = -1.0
"""The ``basis_step`` of a matrix that still has the identity for a basis, and the
``snapshot_step`` of one that has no refresh pending."""


def due(taken: Sequence[float], step: int, interval: int, in_background: bool) -> tuple[int, ...]:
    """Matrices to decompose in this step. In the background, only first bases wait for it.

    Args:
        taken: for each matrix the step at which it took its basis.
        step: steps that the weight has taken before this one.
        interval: steps between refreshes.
        in_background: whether later refreshes are decomposed in the background.
    """
    before = 0 if in_background else step - step % interval  # NO_BASIS is before 0
    if min(taken, default=before) >= before:
        return ()
    return tuple(i for i, when in enumerate(taken) if when < before)


def pending(snapshots: Sequence[float]) -> tuple[int, ...]:
    """Matrices with a snapshot whose new bases they have not taken."""
    return tuple(i for i, when in enumerate(snapshots) if when != NO_BASIS)


def ready(snapshots: Sequence[float], step: int, interval: int, delay: int) -> tuple[int, ...]:
    """Matrices that take in this step the bases found from their snapshots."""
    before = step - min(delay, interval)
    return tuple(i for i, when in enumerate(snapshots) if NO_BASIS != when <= before)


def to_start(taken: Sequence[float], step: int, interval: int) -> tuple[int, ...]:
    """Matrices of which to take a snapshot after a step for which a refresh was due.

    Args:
        taken: see :func:`due`.
        step: steps before the one that has just been taken.
        interval: see :func:`due`.
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
    """Steps before the next one in which a refresh needs other ranks; 0 if it is this one.

    Args:
        taken: see :func:`due`.
        snapshots: for each matrix the step of its snapshot; () without a background.
        step: see :func:`due`.
        interval: see :func:`due`.
        delay: steps from a snapshot to the new basis.
    """
    if not taken:
        return math.inf
    if NO_BASIS in taken:
        return 0
    if waiting := [when for when in snapshots if when != NO_BASIS]:
        return max(0, int(min(waiting)) + min(delay, interval) - step)
    last = step - step % interval
    return 0 if min(taken) < last else last + interval - step
