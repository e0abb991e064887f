"""Who decomposes what. Pure functions of plans: the same on every rank."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from conda_dist.flat import Held
from conda_dist.layout import Coordinate, Layout, Topology, nested
from conda_dist.plan import WeightPlan


@dataclass(frozen=True, slots=True)
class Seat:
    """One matrix of one weight, and those who may decompose it, by their order in the mesh."""

    weight: int
    matrix: int
    candidates: tuple[int, ...]


def _seats(plans: Sequence[WeightPlan]) -> Iterator[Seat]:
    for index, plan in enumerate(plans):
        for matrix, candidates in _holders(plan.compute, plan.whole_basis):
            yield Seat(index, matrix, candidates)


@lru_cache(maxsize=256)  # the layers of a model are alike
def _holders(compute: Layout, basis: Layout) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Every matrix of a batch with the ranks that hold any of it, by their order in the mesh.

    Of a flat weight only those that have its basis in a step, to which the new one is held.
    """
    holders: dict[int, list[int]] = defaultdict(list)
    for place, coordinate in enumerate(compute.coordinates()):
        if isinstance(basis, Held) and not basis.holders[coordinate[0]]:
            continue
        for matrix in compute.matrices(coordinate):
            holders[matrix].append(place)
    return tuple((matrix, tuple(places)) for matrix, places in sorted(holders.items()))


def deal_waves(shared: Sequence[tuple[Topology, int]], waves: int) -> list[tuple[int, int]]:
    """Deals weights out to the waves of an interval, in their order.

    Mesh by mesh, whose ranks may have different weights on other meshes.

    Args:
        shared: for each weight the ranks that share it, and how many matrices it is.
        waves: how many waves there are; 0: as many as give each rank one matrix in each, or where
            batches of matrices, which stay together, are fewer than that, one for each weight.

    Returns:
        For each weight its wave, and how many waves its mesh has.
    """
    matrices: dict[Topology, int] = defaultdict(int)
    weights: dict[Topology, int] = defaultdict(int)
    for topology, count in shared:
        matrices[topology] += count
        weights[topology] += 1
    before: dict[Topology, int] = defaultdict(int)
    dealt = []
    for topology, _ in shared:
        wanted = -(-matrices[topology] // len(topology.ranks))
        many = waves or max(1, min(wanted, weights[topology]))
        dealt.append((before[topology] % many, many))
        before[topology] += 1
    return dealt


def deal_owners(plans: Sequence[WeightPlan]) -> list[WeightPlan]:
    """Deals the decompositions of each wave out: the costliest first, to the least loaded rank.

    Equal costs so go round-robin. Ties are broken by what a rank has of the other waves, by name
    and by order in the mesh, replicas of a weight count as ranks like any others, and experts stay
    with the ranks that hold them. A rank's load counts what it owns on meshes that contain the one
    at hand, of which all ranks there know.
    """
    loads: dict[tuple[Topology, int], dict[int, int]] = {}
    owners: dict[tuple[int, int], tuple[Coordinate, int]] = {}
    waves = sorted({plan.wave for plan in plans})
    everything = 1 + sum(plan.cost * math.prod(plan.storage.shape[:-2]) for plan in plans)
    seats: dict[Topology, dict[int, list[Seat]]] = defaultdict(lambda: defaultdict(list))
    for seat in _seats(plans):
        seats[plans[seat.weight].topology][plans[seat.weight].wave].append(seat)

    def key(seat: Seat) -> tuple[int, str, int]:
        return -plans[seat.weight].cost, plans[seat.weight].name, seat.matrix

    for topology, containing in nested(plan.topology for plan in plans):
        ranks, queued = topology.ranks, [0] * len(topology.ranks)
        before = {w: [sum(loads[t, w][r] for t in containing) for r in ranks] for w in waves}
        total = [sum(column) for column in zip(*before.values(), strict=True)]
        for wave in waves:
            own = [0] * len(ranks)
            # First what a rank has in this wave, then what it has in all.
            scores = [w * everything + t for w, t in zip(before[wave], total, strict=True)]
            for seat in sorted(seats[topology][wave], key=key):
                cost = plans[seat.weight].cost
                if len(seat.candidates) == len(ranks):
                    place = scores.index(min(scores))
                else:
                    place = min(seat.candidates, key=scores.__getitem__)
                owners[seat.weight, seat.matrix] = _coordinate(topology, place), queued[place]
                scores[place] += cost * (everything + 1)
                total[place] += cost
                own[place] += cost
                queued[place] += 1
            loads[topology, wave] = dict(zip(ranks, own, strict=True))
    dealt = []
    for index, plan in enumerate(plans):
        count = math.prod(plan.storage.shape[:-2])
        who, turns = zip(*(owners[index, matrix] for matrix in range(count)), strict=True)
        dealt.append(replace(plan, owners=who, turns=turns))
    return dealt


def _coordinate(topology: Topology, place: int) -> Coordinate:
    coordinate: list[int] = []
    for size in reversed(topology.sizes):
        place, index = divmod(place, size)
        coordinate.append(index)
    return tuple(reversed(coordinate))
