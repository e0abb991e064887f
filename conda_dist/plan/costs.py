"""What a plan costs: bytes of state and bytes sent, for any rank, without being it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conda_dist.layout import Coordinate
from conda_dist.plan.schedule import plan_async_refresh, plan_task
from conda_dist.plan.weight_plan import WeightPlan, basis_to_saved, moments_to_saved
from conda_dist.transfer import Hop, plan_hops

Sent = Mapping[int, int]
"""Bytes that a rank sends along each mesh dimension."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of an element.

    Attributes:
        param: of the parameter.
        travel: of its gradient and its update on their way.
        moment: of the first moment.
        second: of the second moment.
        basis: of the basis.
        rotation: of what a refresh sends back.
    """

    param: int = 4
    travel: int = 4
    moment: int = 4
    second: int = 4
    basis: int = 4
    rotation: int = 4


@dataclass(frozen=True, slots=True)
class Costs:
    """What one weight costs one rank.

    Attributes:
        state: bytes it keeps.
        step: bytes it sends in a step without a refresh.
        refresh: bytes it sends more for a refresh.
    """

    state: int
    step: Sent
    refresh: Sent


def costs(plan: WeightPlan, coordinate: Coordinate, sizes: Sizes, is_async: bool) -> Costs:
    """What a weight costs the rank at a coordinate, all matrices of its batch refreshed at once."""
    plans, count = [plan], len(plan.owners)
    task = plan_task(plans, (0,), [range(count)], coordinate)
    # Moments of a flat weight travel with its gradient, and with others' gradients their flags.
    two = [sizes.moment, sizes.second] if task.loading else []
    flags = [sizes.travel] * len(task.flags)
    steady: list[Exchanged] = [
        (task.forward, [sizes.travel, sizes.basis, *two, *flags]),
        (task.backward, [sizes.travel, *two]),
    ]
    moved = [(r.hops, [sizes.rotation] * count) for r in task.rotations]
    gather = task.gather
    kept, counts = sizes.moment + sizes.second, 4 + 4 * count
    if is_async:
        gather = plan_async_refresh(plans, (0,), [range(count)], coordinate).gather
        kept, counts = kept + sizes.moment, 4 + 8 * count
    moved.append((gather, [sizes.moment] * count))
    numel, basis = plan.moments.numel(coordinate), plan.basis.numel(coordinate)
    state = numel * kept + basis * sizes.basis + counts
    step, refresh = _sent(coordinate, *steady), _sent(coordinate, *moved)
    return Costs(state, step, refresh)


def save_costs(plan: WeightPlan, coordinate: Coordinate, sizes: Sizes, is_async: bool) -> Sent:
    """Bytes that the rank at a coordinate sends of a weight's state for ``state_dict()``."""
    if not plan.separate:
        return {}
    firsts = 2 if is_async else 1
    routes = [moments_to_saved(plan)] * (1 + firsts) + [basis_to_saved(plan)]
    itemsizes = [sizes.moment] * firsts + [sizes.second, sizes.basis]
    return _sent(coordinate, (plan_hops(routes, coordinate), itemsizes))


Exchanged = tuple[Sequence[Hop], Sequence[int]]
"""Exchanges, and the bytes of an element of each of their items."""


def collectives(plans: Sequence[WeightPlan], coordinate: Coordinate, sizes: Sizes) -> int:
    """How many collectives a step of weights takes that are in one task, and not refreshed."""
    # Weights whose routes cross the same mesh dimensions travel together.
    alike = {tuple(move.mesh_dim for move in plan.moves): plan for plan in plans}
    count = len(alike)
    task = plan_task(list(alike.values()), tuple(range(count)), [()] * count, coordinate)
    exchanged: list[Exchanged] = [
        (
            task.forward,
            [sizes.travel] * count + [sizes.basis] * count + [sizes.travel] * len(task.flags),
        ),
        (task.backward, [sizes.travel] * count),
    ]
    return sum(
        len({itemsizes[transfer.item] for transfer in hop.transfers})
        for hops, itemsizes in exchanged
        for hop in hops
        if not hop.silent
    )


def _sent(coordinate: Coordinate, *exchanges: Exchanged) -> Sent:
    sent: dict[int, int] = defaultdict(int)
    for hops, itemsizes in exchanges:
        for hop in hops:
            for item, itemsize in enumerate(itemsizes):
                sent[hop.mesh_dim] += hop.sent(coordinate[hop.mesh_dim], item) * itemsize
    return {mesh_dim: count for mesh_dim, count in sent.items() if count}


def svd_flops(m: int, n: int) -> float:
    """Operations of one thin SVD, 6 m r^2 + 20 r^3 (Golub and Van Loan 2013, section 8.6.3)."""
    long, r = max(m, n), min(m, n)
    return 6.0 * long * r**2 + 20.0 * r**3


def refresh_flops(m: int, n: int, method: str) -> float:
    """Operations of one decomposition by its owner.

    Args:
        m: rows.
        n: columns.
        method: the SVD, or what takes a Gram matrix and its QR or eigenvectors.
    """
    long, r = max(m, n), min(m, n)
    if method == "svd":
        return svd_flops(m, n)
    return 2.0 * long * r**2 + (4.0 if method == "orthogonal_iteration" else 9.0) * r**3
