"""Which weights step together: buckets that travel at once, waves that are refreshed at once.

Pure, as ``plan`` is: every rank fills them alike.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from conda_dist.layout import Topology
from conda_dist.plan import ITEMSIZE, WeightPlan


def fill_buckets(
    plans: Sequence[WeightPlan], weights: Iterable[int], limit: int
) -> list[tuple[int, ...]]:
    """Cuts weights into buckets of at most ``limit`` bytes on a rank, each of one mesh.

    A weight larger than the limit has a bucket of its own.
    """
    buckets: list[list[int]] = []
    current: dict[Topology, tuple[list[int], int]] = {}
    for index in weights:
        plan = plans[index]
        size = (plan.share + plan.gathered_basis) * ITEMSIZE
        bucket, used = current.get(plan.topology, (None, 0))
        if bucket is None or used + size > limit:
            bucket, used = [], 0
            buckets.append(bucket)
        bucket.append(index)
        current[plan.topology] = bucket, used + size
    return [tuple(bucket) for bucket in buckets]


def _wave_order(plan: WeightPlan, index: int) -> tuple[object, ...]:
    # Mesh after mesh: ranks that share one of several must not wait for each other in a circle.
    return (plan.topology.ranks, plan.topology.sizes, max(plan.turns), index)


def fill_waves(
    plans: Sequence[WeightPlan], weights: Iterable[int], limit: int
) -> list[tuple[int, ...]]:
    """Cuts weights due for a refresh into waves, each of one mesh.

    Waves take the owners' queues in turn, so that all owners have work in each, and end when one
    owner would have more than ``limit`` bytes: of its matrices, and of what every rank has of
    each weight. But every owner may have one matrix in each, however large: all others would wait
    for it. Bases that all ranks gather are bounded in any case.
    """
    waves: list[list[int]] = []
    current: dict[Topology, tuple[list[int], int, int, dict[int, int]]] = {}
    for index in sorted(weights, key=lambda i: _wave_order(plans[i], i)):
        plan = plans[index]
        added: dict[int, int] = defaultdict(int)
        for owner in plan.owners:
            added[plan.topology.rank_at(owner)] += plan.gathered * ITEMSIZE
        share, basis = plan.share * ITEMSIZE, plan.gathered_basis * ITEMSIZE
        wave, shares, bases, used = current.get(plan.topology, (None, 0, 0, {}))
        second = any(
            rank in used and shares + share + used[rank] + more > limit
            for rank, more in added.items()
        )
        if wave is None or second or (basis and bases + basis > limit):
            wave, shares, bases, used = [], 0, 0, {}
            waves.append(wave)
        wave.append(index)
        for rank, more in added.items():
            used[rank] = used.get(rank, 0) + more
        current[plan.topology] = wave, shares + share, bases + basis, used
    return [tuple(sorted(wave)) for wave in waves]
