"""What a plan costs: bytes of state and bytes sent, for any rank, without being it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conda_dist.delegate import plan_errand
from conda_dist.layout import Coordinate
from conda_dist.plan import WeightPlan, plan_bucket
from conda_dist.transfer import Hop
from conda_dist.waves import plan_launch, plan_wave, sums_grams

Sent = Mapping[int, int]
"""Bytes that a rank sends along each mesh dimension."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of an element.

    Attributes:
        param: of the parameter, its gradient and its update.
        moment: of the first moment.
        second: of the second moment.
        basis: of the basis.
        rotation: of what a refresh sends back.
        product: of the products of a step.
        gram: of a momentum's Gram matrix; None where a refresh needs the momentum itself.
    """

    param: int = 4
    moment: int = 4
    second: int = 4
    basis: int = 4
    rotation: int = 4
    product: int = 4
    gram: int | None = None


@dataclass(frozen=True, slots=True)
class Costs:
    """What one weight costs one rank.

    Attributes:
        state: bytes it keeps.
        step: bytes it sends in a step without a refresh.
        refresh: bytes it sends more for a refresh.
        collectives: how many a step without a refresh takes.
    """

    state: int
    step: Sent
    refresh: Sent
    collectives: int


def costs(plan: WeightPlan, coordinate: Coordinate, sizes: Sizes, is_async: bool) -> Costs:
    """What a weight costs the rank at a coordinate, all matrices of its batch refreshed at once."""
    plans, count = [plan], len(plan.owners)
    if plan.delegated:
        return _delegated(plan, coordinate, sizes, is_async)
    sums = sums_grams(plan, sizes.moment, sizes.gram)
    summed = [range(count if sums else 0)]
    size = sizes.gram if sums and sizes.gram else sizes.moment
    wave = plan_wave(plans, (0,), [range(count)], coordinate, summed=summed)
    bucket = plan_bucket(plans, (0,), coordinate)
    # Moments of a part or of a flat weight travel with its gradient.
    two = [sizes.moment, sizes.second]
    steady: list[Exchanged] = [
        (bucket.forward, [sizes.param, sizes.basis, *two]),
        (bucket.backward, [sizes.param, *two]),
    ]
    (scatter,) = wave.scatters
    moved = [(wave.gather, [size] * count), (scatter.hops, [sizes.rotation] * count)]
    kept, counts = sizes.moment + sizes.second, 4 + 4 * count
    if is_async:
        launch = plan_launch(plans, (0,), [range(count)], coordinate, summed)
        moved[0] = (launch.gather, [size] * count)
        moved.append((launch.forward, [sizes.moment]))
        kept, counts = kept + sizes.moment, 4 + 8 * count
    numel, basis = plan.moments.numel(coordinate), plan.basis.numel(coordinate)
    state = numel * kept + basis * sizes.basis + counts
    step, refresh = _sent(coordinate, *steady), _sent(coordinate, *moved)
    return Costs(state, step, refresh, _collectives(*steady))


def _delegated(plan: WeightPlan, coordinate: Coordinate, sizes: Sizes, is_async: bool) -> Costs:
    plans = [plan]
    steady, fresh = (plan_errand(plans, (0,), [which], coordinate) for which in ((), (0,)))
    back = [(steady.collect, [sizes.product]), (steady.backward, [sizes.param])]
    usual = [
        (steady.forward, [sizes.param, sizes.basis]),
        (steady.deal, [sizes.product]),
        *back,
    ]
    step = _sent(coordinate, *usual)
    moved = [
        (fresh.forward, [sizes.param, sizes.basis, sizes.moment]),
        (fresh.deal, [sizes.rotation, sizes.basis, sizes.moment]),
        *back,
    ]
    if is_async:
        launch = plan_launch(plans, (0,), [(0,)], coordinate)
        moved += [(launch.gather, [sizes.moment])]
    both = _sent(coordinate, *moved)
    refresh = {d: count - step.get(d, 0) for d, count in both.items()}
    numel, basis = plan.moments.numel(coordinate), plan.basis.numel(coordinate)
    firsts, counts = (2, 12) if is_async else (1, 8)
    kept = firsts * sizes.moment + sizes.second
    state = numel * kept + basis * sizes.basis + counts
    return Costs(state, step, refresh, _collectives(*usual))


Exchanged = tuple[Sequence[Hop], Sequence[int]]
"""Exchanges, and the bytes of an element of each of their items."""


def _collectives(*exchanges: Exchanged) -> int:
    """One for each dtype, by its bytes, of every exchange that is not silent."""
    return sum(
        len({itemsizes[transfer.item] for transfer in hop.transfers})
        for hops, itemsizes in exchanges
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


def refresh_flops(m: int, n: int, method: str, summed: bool = False) -> float:
    """Operations of one decomposition by its owner.

    Args:
        m: rows.
        n: columns.
        method: the SVD, or what takes a Gram matrix and its QR or eigenvectors.
        summed: whether it adds up the parts of the Gram matrix that the ranks have computed.
    """
    long, r = max(m, n), min(m, n)
    if method == "svd":
        return svd_flops(m, n)
    gram = 0.0 if summed else 2.0 * long * r**2
    return gram + (4.0 if method == "orthogonal_iteration" else 9.0) * r**3
