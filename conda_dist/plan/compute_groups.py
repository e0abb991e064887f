"""Which ranks compute a weight, and which of them decomposes its momentum (its owner).

Pure functions of layouts, costs and the budget: every rank computes the same.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from conda_dist.layout.flat import Flat
from conda_dist.layout.layout import Coordinate, Layout, Split, Topology, nested
from conda_dist.layout.moves import Group
from conda_dist.plan.weight_plan import WeightPlan, copied_basis_bytes, inside, plan_weight

LARGEST_GROUP = 16
"""The largest number of ranks in a compute group: each of them has a copy of the basis."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which ranks compute a weight, and how they hold its basis.

    Attributes:
        group: the compute group; None if all ranks compute that hold any rows (or columns).
        shard_basis: for a weight in flat partitions: whether the ranks split the basis.
    """

    group: Group | None = None
    shard_basis: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """A weight for which :func:`choose` makes a choice.

    Attributes:
        name: the weight's fully qualified name.
        topology: the ranks that share the weight.
        storage: layout of the weight.
        basis_itemsize: bytes of an element of the basis; 0 if the rule has none.
        whole: whether the rule needs whole matrices on one rank.
        known: the choice with which the weight's state was made; None without state.
    """

    name: str
    topology: Topology
    storage: Layout
    basis_itemsize: int
    whole: bool = False
    known: Choice | None = None


def choose(requests: Sequence[Request], budget: int | None) -> list[Choice]:
    """Chooses the ranks that compute each weight.

    Without a group, every rank that holds rows (or columns) of a weight computes them, and needs a
    copy of the basis. A weight gets no group if its copies still fit the budget. Weights are looked
    at one by one: on each mesh those that have state first, then those that step without
    communication. The other weights are assigned to groups. In flat partitions they split their
    bases instead, unless the rule needs whole matrices. A weight that has state keeps its choice.

    Args:
        requests: the weights.
        budget: bytes that a rank may spend on bases of weights without a group; None for no limit.
    """
    over = _over_budget(requests, budget)
    choices = [
        request.known
        or Choice(shard_basis=beyond and isinstance(request.storage, Flat) and not request.whole)
        for request, beyond in zip(requests, over, strict=True)
    ]
    grouped: dict[tuple[Topology, tuple[int, ...]], list[int]] = defaultdict(list)
    for index, (request, beyond) in enumerate(zip(requests, over, strict=True)):
        mesh_dims = _grouping_dims(request)
        if not mesh_dims:
            continue
        has_group = request.known is not None and request.known.group is not None
        if has_group or (beyond and request.known is None):
            grouped[request.topology, mesh_dims].append(index)
    for (_, mesh_dims), members in grouped.items():
        assign = _assign_groups if len(mesh_dims) == 1 else _assign_single_ranks
        for index, group in assign(requests, choices, members, mesh_dims).items():
            choices[index] = Choice(group)
    return choices


def _over_budget(requests: Sequence[Request], budget: int | None) -> list[bool]:
    """For each weight whether it exceeds the budget, or its rule needs whole matrices."""
    plans = [plan_weight("", request.topology, request.storage) for request in requests]
    over = [False] * len(requests)
    spent: dict[Topology, dict[int, int]] = {}
    for topology, containing in nested(request.topology for request in requests):
        before = {rank: sum(spent[t][rank] for t in containing) for rank in topology.ranks}
        used = dict(before)
        here = [i for i, request in enumerate(requests) if request.topology == topology]
        for i in sorted(here, key=lambda i: (requests[i].known is None, plans[i].communicates)):
            request = requests[i]
            sizes = copied_basis_bytes(plans[i], request.basis_itemsize)
            after = {r: used[r] + size for r, size in zip(topology.ranks, sizes, strict=True)}
            beyond = budget is not None and any(after[r] > max(budget, used[r]) for r in after)
            if request.known is not None:
                beyond = request.known != Choice()
            over[i] = beyond or request.whole
            used = used if over[i] else after
        spent[topology] = {rank: used[rank] - before[rank] for rank in topology.ranks}
    return over


def _grouping_dims(request: Request) -> tuple[int, ...]:
    """The mesh dimensions along which a group is chosen; () if nothing splits matrices.

    Of those that split matrices it is the largest. Along the others all ranks compute: so a group
    adds at most one mesh dimension to those that a step crosses. For rules that need whole
    matrices it is all of them, the largest first. In flat partitions only such rules have groups,
    because a rank has whole matrices of a batch anyway.
    """
    storage = request.storage
    if isinstance(storage, Flat):
        return (0,) if request.whole and len(storage.shape) == 2 and storage.mesh[0] > 1 else ()
    batch_dims = len(storage.shape) - 2
    splitting = [
        mesh_dim
        for mesh_dim, placement in enumerate(storage.placements)
        if isinstance(placement, Split)
        and placement.dim >= batch_dims
        and storage.mesh[mesh_dim] > 1
    ]
    splitting.sort(key=lambda d: (-storage.mesh[d], d))
    return tuple(splitting if request.whole else splitting[:1])


def group_size(matrices: int, ranks: int) -> int:
    """Number of ranks in each group: the smallest power of two that gives every rank work.

    Args:
        matrices: number of matrices to assign along a mesh dimension.
        ranks: number of ranks along it.
    """
    size = 1
    while size < LARGEST_GROUP and 2 * size <= ranks and matrices * size < ranks:
        size *= 2
    return size


def _assign_groups(
    requests: Sequence[Request],
    choices: Sequence[Choice],
    members: Sequence[int],
    mesh_dims: tuple[int, ...],
) -> dict[int, Group]:
    """Assigns weights of one mesh to groups along one mesh dimension, the most expensive first.

    A weight that one rank holds, in flat partitions, stays there.

    Args:
        requests: all weights.
        choices: the choices so far; groups of weights with state are kept.
        members: indices of the weights to assign.
        mesh_dims: the mesh dimension.

    Returns:
        The group of each member, by index.
    """
    (mesh_dim,) = mesh_dims
    ranks = requests[members[0]].topology.sizes[mesh_dim]
    single = [i for i in members if len(requests[i].storage.shape) == 2]
    size = group_size(len(single), ranks)
    loads = [0.0] * ranks
    assigned: dict[int, Group] = {}

    def take(index: int, among: tuple[int, int]) -> None:
        assigned[index] = Group(mesh_dim, among)
        first, count = among
        for place in range(first, first + count):
            loads[place] += _cost(requests[index]) / count

    new = []
    for index in members:
        group, storage = choices[index].group, requests[index].storage
        holder = storage.holder if isinstance(storage, Flat) else None
        if group is not None:
            take(index, group.among)
        elif holder is not None:
            take(index, (holder, 1))
        else:
            new.append(index)
    for index in sorted(new, key=lambda i: (-_cost(requests[i]), requests[i].name, i)):
        storage = requests[index].storage
        if len(storage.shape) > 2:  # a batch: the ranks of the group get whole matrices of it
            count = min(ranks, len(storage.matrices((0,) * len(storage.mesh))))
        else:
            count = 1 if requests[index].whole else size
        starts = range(0, ranks - count + 1, count)
        first = min(starts, key=lambda start: max(loads[start : start + count]))
        take(index, (first, count))
    return assigned


def _cost(request: Request) -> float:
    """Cost of a weight's step, proportional to the operations of its matrix products."""
    *batch, m, n = request.storage.shape
    return float(math.prod(batch) * m * n * min(m, n))


def _assign_single_ranks(
    requests: Sequence[Request],
    choices: Sequence[Choice],
    members: Sequence[int],
    mesh_dims: tuple[int, ...],
) -> dict[int, Group]:
    """Assigns matrices that several mesh dimensions split to single ranks.

    For rules that need whole matrices. A matrix goes to one rank. The matrices of a batch go to
    ranks along the first of the mesh dimensions, which have the same index along each other one.
    Arguments as in :func:`_assign_groups`.
    """
    first, *others = mesh_dims
    sizes = requests[members[0]].topology.sizes
    loads = dict.fromkeys(itertools.product(*(range(sizes[d]) for d in mesh_dims)), 0.0)
    assigned: dict[int, Group] = {}

    def places(at: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
        return [(at[0] + i, *at[1:]) for i in range(count)]

    def add(index: int, at: tuple[int, ...], count: int) -> None:
        assigned[index] = Group(first, (at[0], count), tuple(zip(others, at[1:], strict=True)))
        for place in places(at, count):
            loads[place] += _cost(requests[index]) / count

    for index in members:
        if (known := choices[index].group) is not None:
            add(index, (known.among[0], *(i for _, i in known.single)), known.among[1])
    new = [index for index in members if index not in assigned]
    for index in sorted(new, key=lambda i: (-_cost(requests[i]), requests[i].name, i)):
        storage, count = requests[index].storage, 1
        if len(storage.shape) > 2:
            count = min(sizes[first], len(storage.matrices((0,) * len(storage.mesh))))
        starts = (at for at in loads if at[0] % count == 0 and at[0] + count <= sizes[first])
        if count == 1:
            add(index, min(starts, key=loads.__getitem__), 1)
            continue
        most = {at: max(loads[place] for place in places(at, count)) for at in starts}
        add(index, min(most, key=most.__getitem__), count)
    return assigned


@dataclass(frozen=True, slots=True)
class Decomposition:
    """One matrix to decompose.

    Attributes:
        weight: index of its weight.
        matrix: its index in the weight's batch.
        candidates: the ranks that may decompose it, by their row-major position in the mesh.
    """

    weight: int
    matrix: int
    candidates: tuple[int, ...]


@lru_cache(maxsize=4096)  # the layers of a model are alike
def _holders(compute: Layout, basis: Layout) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Each matrix of a batch with the row-major mesh positions of the ranks that have its basis."""
    holders: dict[int, list[int]] = defaultdict(list)
    for coordinate in inside(compute):
        if basis.numel(coordinate):
            place = 0
            for size, index in zip(compute.mesh, coordinate, strict=True):
                place = place * size + index
            for matrix in compute.matrices(coordinate):
                holders[matrix].append(place)
    return tuple((matrix, tuple(places)) for matrix, places in sorted(holders.items()))


def assign_owners(plans: Sequence[WeightPlan]) -> list[WeightPlan]:
    """Assigns each decomposition to an owner: the most expensive first, to the least loaded rank.

    Only ranks that have a matrix's basis may own it. If these are all ranks, decompositions of
    equal cost are assigned round-robin. Ties are broken by name and by position in the mesh.
    Replicas count as ranks like any others. The load of a rank includes what it owns on larger
    meshes that contain this one, but on no others, so that all ranks of a mesh know the same loads.

    Returns:
        The plans with owners and turns.
    """
    loads: dict[Topology, dict[int, int]] = {}
    owners: dict[tuple[int, int], tuple[Coordinate, int]] = {}
    to_assign: dict[Topology, list[Decomposition]] = defaultdict(list)
    for index, plan in enumerate(plans):
        for matrix, candidates in _holders(plan.compute, plan.whole_basis):
            to_assign[plan.topology].append(Decomposition(index, matrix, candidates))

    def order(job: Decomposition) -> tuple[int, int, str, int]:
        # At equal costs first those that few ranks may take: the others fill the gaps.
        plan = plans[job.weight]
        return -plan.cost, len(job.candidates), plan.name, job.matrix

    for topology, containing in nested(plan.topology for plan in plans):
        ranks, queued = topology.ranks, [0] * len(topology.ranks)
        scores = [sum(loads[t][r] for t in containing) for r in ranks]
        own = [0] * len(ranks)
        for job in sorted(to_assign[topology], key=order):
            cost = plans[job.weight].cost
            if len(job.candidates) == len(ranks):
                place = scores.index(min(scores))
            else:
                place = min(job.candidates, key=scores.__getitem__)
            owners[job.weight, job.matrix] = _coordinate(topology, place), queued[place]
            scores[place] += cost
            own[place] += cost
            queued[place] += 1
        loads[topology] = dict(zip(ranks, own, strict=True))
    assigned = []
    for index, plan in enumerate(plans):
        count = math.prod(plan.storage.shape[:-2])
        who, turns = zip(*(owners[index, matrix] for matrix in range(count)), strict=True)
        assigned.append(replace(plan, owners=who, turns=turns))
    return assigned


def _coordinate(topology: Topology, place: int) -> Coordinate:
    """The coordinate at a row-major position in a mesh."""
    coordinate: list[int] = []
    for size in reversed(topology.sizes):
        place, index = divmod(place, size)
        coordinate.append(index)
    return tuple(reversed(coordinate))
