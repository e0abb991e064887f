"""Who decomposes what. Pure functions of plans: the same on every rank."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from conda_dist.layout import Coordinate, Topology, nested
from conda_dist.plan import WeightPlan


@dataclass(frozen=True, slots=True)
class Seat:
    """One matrix of one weight, and those who may decompose it."""

    weight: int
    matrix: int
    candidates: tuple[Coordinate, ...]


def _seats(plans: Sequence[WeightPlan]) -> Iterator[Seat]:
    for index, plan in enumerate(plans):
        holders: dict[int, list[Coordinate]] = defaultdict(list)
        for coordinate in plan.compute.coordinates():
            for matrix in plan.compute.matrices(coordinate):
                holders[matrix].append(coordinate)
        for matrix, candidates in sorted(holders.items()):
            yield Seat(index, matrix, tuple(candidates))


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

    def key(seat: Seat) -> tuple[int, int, str, int]:
        plan = plans[seat.weight]
        return plan.wave, -plan.cost, plan.name, seat.matrix

    for topology, containing in nested(plan.topology for plan in plans):
        load = {
            wave: {r: sum(loads[t, wave][r] for t in containing) for r in topology.ranks}
            for wave in waves
        }
        total = {rank: sum(load[wave][rank] for wave in waves) for rank in topology.ranks}
        queued = dict.fromkeys(topology.ranks, 0)
        own = {wave: dict.fromkeys(topology.ranks, 0) for wave in waves}
        seats = (s for s in _seats(plans) if plans[s.weight].topology == topology)
        for seat in sorted(seats, key=key):
            plan = plans[seat.weight]
            there = load[plan.wave]
            ranks = {c: topology.rank_at(c) for c in seat.candidates}
            owner = min(seat.candidates, key=lambda c: (there[ranks[c]], total[ranks[c]]))
            rank = ranks[owner]
            owners[seat.weight, seat.matrix] = owner, queued[rank]
            for costs in (there, total, own[plan.wave]):
                costs[rank] += plan.cost
            queued[rank] += 1
        loads.update({(topology, wave): own[wave] for wave in waves})
    dealt = []
    for index, plan in enumerate(plans):
        count = math.prod(plan.storage.shape[:-2])
        who, turns = zip(*(owners[index, matrix] for matrix in range(count)), strict=True)
        dealt.append(replace(plan, owners=who, turns=turns))
    return dealt
