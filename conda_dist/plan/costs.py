"""What a plan costs: bytes of state and bytes sent, for any rank of any mesh."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conda_dist.layout.layout import Coordinate
from conda_dist.layout.redistribution import Hop, plan_hops
from conda_dist.plan.schedule import plan_async_refresh, plan_task
from conda_dist.plan.weight_plan import WeightPlan, copy_to_saved, moments_to_saved

EXTRA_ITEMSIZE = 4
"""Bytes of an element of the extra tensor that goes back with an update."""

Sent = Mapping[int, int]
"""Bytes that a rank sends, by mesh dimension."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of an element of what a rule keeps and sends.

    Attributes:
        gradient: of the gradient on its way to the compute layout.
        update: of the update on its way back to the storage layout.
        cut: of each state that is cut like the weight, (m, n).
        copied: for each copied state its shape for one matrix, and the bytes of an element.
        counts: number of counts (4 bytes each) that the rule keeps of each matrix.
        basis: of the state "basis", which a step may gather; 0 without it.
        rotation: of the rotations that a refresh sends to the ranks that compute; 0 without
            refreshes.
    """

    gradient: int = 4
    update: int = 4
    cut: tuple[int, ...] = (4, 4)
    copied: tuple[tuple[tuple[int, ...], int], ...] = ()
    counts: int = 0
    basis: int = 0
    rotation: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """What one weight costs one rank.

    Attributes:
        state: bytes of state that the rank keeps.
        step: bytes that it sends in a step without a refresh.
        refresh: bytes that a refresh adds to these.
    """

    state: int
    step: Sent
    refresh: Sent


def costs(plan: WeightPlan, coordinate: Coordinate, sizes: Sizes, is_async: bool) -> Costs:
    """What a weight costs the rank at a coordinate, if a refresh includes its whole batch."""
    plans, count = [plan], len(plan.owners)
    task = plan_task(plans, (0,), [range(count) if sizes.rotation else ()], coordinate)
    # Moments of a flat weight are exchanged with its gradient; other weights exchange flags.
    two = list(sizes.cut[:2]) if task.loading else []
    flags = [sizes.gradient] * len(task.flags)
    steady: list[Exchanged] = [
        (task.forward, [sizes.gradient, sizes.basis, *two, *flags]),
        (task.backward, [sizes.update, *two, EXTRA_ITEMSIZE]),
    ]
    moved = [(r.hops, [sizes.rotation] * count * plan.bases) for r in task.rotations]
    gather = task.gather
    if is_async and sizes.rotation:
        gather = plan_async_refresh(plans, (0,), [range(count)], coordinate).gather
    moved.append((gather, [sizes.cut[0]] * count))
    state = plan.moments.numel(coordinate) * sum(sizes.cut) + 4 + 4 * count * sizes.counts
    state += sum(plan.copied_layout(shape).numel(coordinate) * size for shape, size in sizes.copied)
    step, refresh = _sent(coordinate, *steady), _sent(coordinate, *moved)
    return Costs(state, step, refresh)


def save_costs(plan: WeightPlan, coordinate: Coordinate, sizes: Sizes) -> Sent:
    """Bytes of a weight's state that the rank at a coordinate sends in ``state_dict()``."""
    if not plan.separate:
        return {}
    routes = [moments_to_saved(plan)] * len(sizes.cut)
    routes += [copy_to_saved(plan, shape) for shape, _ in sizes.copied]
    itemsizes = [*sizes.cut, *(size for _, size in sizes.copied)]
    return _sent(coordinate, (plan_hops(routes, coordinate), itemsizes))


Exchanged = tuple[Sequence[Hop], Sequence[int]]
"""The hops of an exchange, and the bytes of an element of each of its items."""


def collectives(plans: Sequence[WeightPlan], coordinate: Coordinate, sizes: Sizes) -> int:
    """Number of collectives of a step without a refresh, if all weights are in one task."""
    # Weights whose routes cross the same mesh dimensions share collectives: one of each is enough.
    alike = {tuple(move.mesh_dim for move in plan.moves): plan for plan in plans}
    count = len(alike)
    task = plan_task(list(alike.values()), tuple(range(count)), [()] * count, coordinate)
    exchanged: list[Exchanged] = [
        (
            task.forward,
            [sizes.gradient] * count + [sizes.basis] * count + [sizes.gradient] * len(task.flags),
        ),
        (task.backward, [sizes.update] * count + [EXTRA_ITEMSIZE] * count),
    ]
    return sum(
        len({itemsizes[transfer.item] for transfer in hop.transfers})
        for hops, itemsizes in exchanged
        for hop in hops
        if not hop.is_local
    )


def _sent(coordinate: Coordinate, *exchanges: Exchanged) -> Sent:
    """Bytes that the rank at a coordinate sends in some exchanges."""
    sent: dict[int, int] = defaultdict(int)
    for hops, itemsizes in exchanges:
        for hop in hops:
            for item, itemsize in enumerate(itemsizes):
                sent[hop.mesh_dim] += hop.sent(coordinate[hop.mesh_dim], item) * itemsize
    return {mesh_dim: count for mesh_dim, count in sent.items() if count}


def svd_flops(m: int, n: int) -> float:
    """Floating-point operations of a thin SVD: 6 max(m, n) r^2 + 20 r^3, r = min(m, n).

    Golub and Van Loan 2013, section 8.6.3.
    """
    long, r = max(m, n), min(m, n)
    return 6.0 * long * r**2 + 20.0 * r**3


def refresh_flops(m: int, n: int, method: str) -> float:
    """Floating-point operations of the decomposition of one matrix (m, n).

    Args:
        m: number of rows.
        n: number of columns.
        method: ``refresh_method``: "svd", or one that decomposes a Gram matrix:
            "orthogonal_iteration" (QR) or "eigh64" (eigenvectors).
    """
    long, r = max(m, n), min(m, n)
    if method == "svd":
        return svd_flops(m, n)
    return 2.0 * long * r**2 + (4.0 if method == "orthogonal_iteration" else 9.0) * r**3
