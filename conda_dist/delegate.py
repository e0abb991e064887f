"""Weights whose products of a step are computed by their owners, for all.

Gathering the basis of a weight for every rank moves r^2 elements to each. Where that is more than
the weight itself, the gradient goes to the owner instead, where the basis is gathered alone: the
owner projects it, deals the rows of the result out, every rank updates its moments and normalises
its rows, and the owner brings those back. Moments and bases stay split as ever.

Pure, as ``plan`` is.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from conda_dist.flat import Flat
from conda_dist.layout import Coordinate, Layout
from conda_dist.plan import WeightPlan
from conda_dist.transfer import Hop, Leg, deal_from, gather_to, plan_hops
from conda_dist.waves import Matrix, plan_matrices


def delegate(plan: WeightPlan, placement: str) -> WeightPlan:
    """Delegates a weight if its basis is split and the option ``basis_placement`` says so.

    "auto" does where it saves traffic. Only a single matrix that several ranks share can be, no
    part of a fused weight, batch or flat range.
    """
    alone = plan.part is None and not isinstance(plan.storage, Flat)
    can = alone and len(plan.storage.shape) == 2 and any(plan.basis.placements)
    wanted = placement == "owner" or (placement == "auto" and saves(plan))
    return replace(plan, delegated=can and _sharing(plan) > 1 and wanted)


def saves(plan: WeightPlan) -> bool:
    """Whether delegating a weight moves fewer elements than gathering its basis everywhere."""
    sharing, r, numel = _sharing(plan), min(plan.storage.shape[-2:]), plan.matrix_numel
    gathered = r * r * (sharing - 1) + (2 * numel * (sharing - 1) // sharing if plan.moves else 0)
    return (4 * numel + r * r) * (sharing - 1) // sharing < gathered


def _sharing(plan: WeightPlan) -> int:
    placed = zip(plan.compute.mesh, plan.compute.placements, strict=True)
    return math.prod(size for size, placement in placed if placement is not None)


@dataclass(frozen=True, slots=True)
class Errand:
    """Delegated weights of one mesh that step together.

    Attributes:
        weights: their indices.
        mine: positions among them of those that this rank owns.
        matrices: the matrices that take new bases; all of them, or none.
        forward: exchanges before the projection. Items: the gradients, storage layout to owners;
            the bases; of those that take new ones also the first moments.
        deal: exchanges after it. Items: the projected gradients, owners to compute layout; with
            new bases also the bases and the first moments, to where they are kept.
        collect: exchanges of the normalised steps to the owners. Items: ``weights``.
        backward: exchanges of the updates, owners to storage layout. Items: ``weights``.
    """

    weights: tuple[int, ...]
    mine: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    forward: tuple[Hop, ...]
    deal: tuple[Hop, ...]
    collect: tuple[Hop, ...]
    backward: tuple[Hop, ...]


def plan_errand(
    plans: Sequence[WeightPlan],
    weights: tuple[int, ...],
    due: Sequence[Collection[int]],
    coordinate: Coordinate,
    launched: Sequence[Collection[int]] = (),
    summed: Sequence[Collection[int]] = (),
) -> Errand:
    """Plans a step of delegated weights; arguments as of :func:`conda_dist.waves.plan_wave`."""
    chosen = [plans[i] for i in weights]
    matrices = tuple(plan_matrices(plans, weights, due, coordinate, launched, summed))
    fresh = bool(matrices)

    def to(layouts: Sequence[Layout]) -> list[tuple[Leg, ...]]:
        return [_to(where, p.owners[0]) for where, p in zip(layouts, chosen, strict=True)]

    def back(layouts: Sequence[Layout]) -> list[tuple[Leg, ...]]:
        return [_back(where, p.owners[0]) for where, p in zip(layouts, chosen, strict=True)]

    storage, bases = [p.storage for p in chosen], [p.basis for p in chosen]
    moments = [p.compute for p in chosen]
    return Errand(
        weights,
        tuple(i for i, plan in enumerate(chosen) if plan.owners[0] == coordinate),
        matrices,
        plan_hops(to(storage) + to(bases) + (to(moments) if fresh else []), coordinate),
        plan_hops(back(moments) + (back(bases) + back(moments) if fresh else []), coordinate),
        plan_hops(to(moments), coordinate),
        plan_hops(back(storage), coordinate),
    )


def _replicas(layout: Layout) -> tuple[int, ...]:
    return tuple(d for d, placement in enumerate(layout.placements) if placement is None)


def _to(layout: Layout, owner: Coordinate) -> tuple[Leg, ...]:
    return gather_to(layout, (0, 1), owner, _replicas(layout))


def _back(layout: Layout, owner: Coordinate) -> tuple[Leg, ...]:
    return deal_from(layout, (0, 1), owner, _replicas(layout))
