"""The tasks of one step. A task is a bucket of weights of one mesh that are exchanged together.

    [gradients to the compute layout] -> [refresh, if due] -> update -> [updates back] -> apply

A weight that needs no other rank is in a task whose exchanges are empty. Pure: every rank plans the
same tasks, and one process can plan the step of any rank of any mesh.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from conda_dist.layout.flat import Flat, Held
from conda_dist.layout.layout import Coordinate, Copies, Layout, Placement, Split, Topology
from conda_dist.layout.moves import Move, reverse
from conda_dist.layout.redistribution import (
    Hop,
    Leg,
    gather_to,
    plan_hops,
    redistribution,
    send_from,
)
from conda_dist.plan.weight_plan import WeightPlan, batch_mesh_dims, extra_to_storage

ITEMSIZE = 4
"""Bytes that every element counts when tasks are filled, whatever its dtype."""

Which = Mapping[int, Collection[int]]
"""From the index of a weight to the indices of some matrices of its batch."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix that takes new bases.

    Attributes:
        position: position of its weight in the task.
        index: its index in that weight's batch.
        local: its index in this rank's local batch; None if this rank holds nothing of it.
        owner: coordinate of the rank that decomposes it.
        mine: whether this rank is the owner.
        in_background: whether its decomposition was started in an earlier step.
    """

    position: int
    index: int
    local: int | None
    owner: Coordinate
    mine: bool
    in_background: bool = False


@dataclass(frozen=True, slots=True)
class Rotations:
    """The broadcast of some rotations (r, r), from the owners to the ranks that compute.

    Attributes:
        start: index, in the task, of the first matrix whose rotation is sent.
        stop: index after the last one.
        hops: the exchanges. Items: the rotations of these matrices, one for each basis.
    """

    start: int
    stop: int
    hops: tuple[Hop, ...]


@dataclass(frozen=True, slots=True)
class Flags:
    """Flags that ranks exchange with gradients: whether a rank has a gradient of each weight.

    Attributes:
        dims: the mesh dimensions that the gradients cross. All ranks along them get all flags.
        positions: positions of the k weights in their task. Every rank sends one flag for each.
    """

    dims: tuple[int, ...]
    positions: tuple[int, ...]

    def route(self, mesh: tuple[int, ...]) -> tuple[Leg, ...]:
        """Route that gathers the flags (1, ..., 1, k) of all ranks along ``dims`` on each one."""
        placements: list[Placement] = [None] * len(mesh)
        for dim, mesh_dim in enumerate(self.dims):
            placements[mesh_dim] = Split(dim)
        shape = (*(mesh[d] for d in self.dims), len(self.positions))
        layout, legs = Layout(shape, mesh, tuple(placements)), []
        for mesh_dim in self.dims:
            move = Move(mesh_dim, layout, layout.with_placement(mesh_dim, None))
            legs.append(Leg(move))
            layout = move.target
        return tuple(legs)


@dataclass(frozen=True, slots=True)
class Task:
    """Weights of one mesh that step together.

    Attributes:
        weights: indices of the weights.
        loading: positions in ``weights`` of the weights whose moments are exchanged, too
            (:attr:`WeightPlan.loads_moments`).
        forward: exchanges before the update. Items, in this order: for each of ``weights`` the
            gradient, from storage to compute layout; for each of ``weights`` the basis, from the
            kept layout to a whole one; for each of ``loading`` the first and the second moment,
            from storage to compute layout; one tensor for each of ``flags``.
        refreshed: the matrices that take a new basis, in a refresh before the update; () if none.
        gather: exchanges of the refresh that bring each projected momentum (m, n) to its owner.
            Items: ``refreshed``; those in the background have nothing to send.
        rotations: the broadcasts of the rotations, a bounded number of bytes in each.
        backward: exchanges after the update. Items, in this order: for each of ``weights`` the
            update, from compute to storage layout; for each of ``loading`` the two moments; for
            each weight with an ``extra_shape`` the extra tensor.
        flags: the flags that are exchanged with the gradients.
        in_place: whether all weights are updated where they are stored, so that nothing is sent
            back.
    """

    weights: tuple[int, ...]
    loading: tuple[int, ...]
    forward: tuple[Hop, ...]
    refreshed: tuple[Matrix, ...]
    gather: tuple[Hop, ...]
    rotations: tuple[Rotations, ...]
    backward: tuple[Hop, ...]
    flags: tuple[Flags, ...] = ()
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class AsyncRefresh:
    """Weights whose momenta are decomposed in the background; a later step takes the bases.

    Attributes:
        weights: indices of the weights, all of one mesh.
        refreshed: the matrices to decompose.
        gather: exchanges that bring each projected momentum to its owner. Items: ``refreshed``.
    """

    weights: tuple[int, ...]
    refreshed: tuple[Matrix, ...]
    gather: tuple[Hop, ...]


def fill_tasks(
    plans: Sequence[WeightPlan], weights: Iterable[int], limit: int, *, refreshing: bool
) -> list[tuple[int, ...]]:
    """Groups weights into tasks, each of one mesh and of at most ``limit`` bytes on any rank.

    A rank holds its share of what each weight moves, what it computes for compute groups, and, in a
    refresh, the whole matrices that it decomposes. Matrices are taken in the order of their turns
    (their places in their owners' queues), so that in each refresh task all owners have work. The
    limit never keeps a rank from its first matrix, however large that is: the rank would be idle
    while others decompose.

    Args:
        plans: all plans.
        weights: indices of the weights.
        limit: bytes.
        refreshing: whether the weights' matrices are decomposed.
    """
    tasks: list[list[int]] = []
    current: dict[tuple[Topology, bool], _Filling] = {}
    # Mesh after mesh, on all ranks in the same order: otherwise ranks of several meshes could wait
    # for each other in a circle.
    for index in sorted(weights, key=lambda i: _task_order(plans[i], i)):
        plan = plans[index]
        key = plan.topology, plan.communicates or refreshing
        filling = current.get(key)
        if filling is None or not filling.add(index, plan, limit, refreshing):
            filling = current[key] = _Filling()
            filling.add(index, plan, limit, refreshing)
            tasks.append(filling.weights)
    return [tuple(sorted(task)) for task in tasks]


@dataclass(slots=True)
class _Filling:
    """A task that is being filled.

    Attributes:
        weights: indices of the weights in it.
        shares: bytes that every rank holds of what the weights move.
        bases: bytes of bases that every rank gathers.
        computed: by coordinate, bytes that the rank computes for compute groups.
        owned: by coordinate, bytes of whole matrices that the rank decomposes.
        largest: bytes of the largest matrix that is decomposed.
    """

    weights: list[int] = field(default_factory=list)
    shares: int = 0
    bases: int = 0
    computed: dict[Coordinate, int] = field(default_factory=dict)
    owned: dict[Coordinate, int] = field(default_factory=dict)
    largest: int = 0

    def add(self, index: int, plan: WeightPlan, limit: int, refreshing: bool) -> bool:
        """Adds a weight if it fits, and says whether it does. It always fits in an empty task."""
        shares = self.shares + plan.share * ITEMSIZE
        basis = plan.gathered_basis * ITEMSIZE
        matrix = plan.matrix_numel * ITEMSIZE if refreshing else 0
        largest = max(self.largest, matrix)
        computed: dict[Coordinate, int] = {}
        for coordinate in plan.computing() if plan.group is not None else ():
            size = plan.compute.numel(coordinate) * ITEMSIZE
            if before := self.computed.get(coordinate, 0):
                size += before
                if shares + size > max(limit, largest):
                    return False
            computed[coordinate] = size
        owned: dict[Coordinate, int] = defaultdict(int)
        for owner in plan.owners if refreshing else ():
            owned[owner] += matrix
        for owner, size in owned.items():
            if owner in self.owned:
                owned[owner] = size + self.owned[owner]
                if shares + owned[owner] > limit:
                    return False
        if self.weights and (plan.share or basis) and shares + self.bases + basis > limit:
            return False
        self.weights.append(index)
        self.shares, self.bases, self.largest = shares, self.bases + basis, largest
        self.computed |= computed
        self.owned |= owned
        return True


def _task_order(plan: WeightPlan, index: int) -> tuple[object, ...]:
    """Sort key of weights: by mesh, then by the turns of their matrices, then by index."""
    return (plan.topology.ranks, plan.topology.sizes, max(plan.turns, default=0), index)


def plan_step(
    plans: Sequence[WeightPlan],
    due: Which,
    ready: Which,
    coordinates: Mapping[Topology, Coordinate],
    limit: int,
    dtypes: Sequence[Hashable] = (),
) -> tuple[Task, ...]:
    """Plans a step.

    Args:
        plans: all plans.
        due: for each weight that steps, the matrices of its batch to decompose in this step.
        ready: for some weights, the matrices that take bases from earlier background
            decompositions.
        coordinates: the coordinate, on each mesh, of the rank whose boxes are computed.
        limit: bytes that a task may hold on a rank.
        dtypes: for each plan the dtype in which its gradient is exchanged; () if it is the same for
            all.
    """
    taking = {i: (*which, *ready.get(i, ())) for i, which in due.items()}
    steady = fill_tasks(
        plans, (i for i, which in taking.items() if not which), limit, refreshing=False
    )
    # Tasks without exchanges first: the first exchange of the others runs while they compute.
    steady.sort(key=lambda task: plans[task[0]].communicates)
    fresh = fill_tasks(plans, (i for i, which in taking.items() if which), limit, refreshing=True)
    return tuple(
        plan_task(
            plans,
            weights,
            [taking[i] for i in weights],
            coordinates[plans[weights[0]].topology],
            [ready.get(i, ()) for i in weights],
            limit,
            dtypes,
        )
        for weights in (*steady, *fresh)
    )


def plan_task(
    plans: Sequence[WeightPlan],
    weights: tuple[int, ...],
    taking: Sequence[Collection[int]],
    coordinate: Coordinate,
    in_background: Sequence[Collection[int]] = (),
    limit: float = math.inf,
    dtypes: Sequence[Hashable] = (),
) -> Task:
    """Plans a task: the exchanges of weights of one mesh, seen from one rank.

    Args:
        plans: all plans.
        weights: indices of the task's weights.
        taking: for each weight of the task, the matrices of its batch that take new bases.
        coordinate: the rank whose boxes are computed.
        in_background: for each weight of the task, those of ``taking`` whose decomposition was
            started in an earlier step; () if there are none.
        limit: bytes of rotations that are sent together; a single rotation may be larger.
        dtypes: see :func:`plan_step`.
    """
    chosen = [plans[i] for i in weights]
    grads = [redistribution(plan.moves) for plan in chosen]
    bases = [redistribution(plan.basis_moves) for plan in chosen]
    updates = [redistribution(reverse(plan.moves)) for plan in chosen]
    loading = tuple(i for i, plan in enumerate(chosen) if plan.loads_moments)
    there = [grads[i] for i in loading for _ in range(2)]
    back = [updates[i] for i in loading for _ in range(2)]
    back += [extra_to_storage(plan) for plan in chosen if plan.extra_shape is not None]
    flags = _plan_flags(chosen, [dtypes[i] for i in weights] if dtypes else [None] * len(weights))
    flagged = [f.route(chosen[0].storage.mesh) for f in flags]
    refreshed = tuple(plan_matrices(plans, weights, taking, coordinate, in_background))
    routes = [(matrix, chosen[matrix.position]) for matrix in refreshed]
    to_owners = [() if m.in_background else _to_owner(plan, m) for m, plan in routes]
    return Task(
        weights,
        loading,
        plan_hops(grads + bases + there + flagged, coordinate),
        refreshed,
        plan_hops(to_owners, coordinate),
        tuple(_plan_rotations(routes, coordinate, limit)),
        plan_hops(updates + back, coordinate),
        flags,
        all(plan.in_place for plan in chosen),
    )


def crossed_dims(plan: WeightPlan) -> tuple[int, ...]:
    """The mesh dimensions along which a step exchanges the gradient of a weight.

    () for a weight in flat partitions: an engine with partitions has a gradient on every rank, so
    flags are not needed.
    """
    if isinstance(plan.storage, Flat):
        return ()
    legs = redistribution(plan.moves)
    return tuple(dict.fromkeys(leg.move.mesh_dim for leg in legs if not leg.is_local))


def _plan_flags(plans: Sequence[WeightPlan], dtypes: Sequence[Hashable]) -> tuple[Flags, ...]:
    """The flags of a task: one tensor for all weights whose gradients share a collective."""
    together: dict[tuple[tuple[int, ...], Hashable], list[int]] = defaultdict(list)
    for position, (plan, dtype) in enumerate(zip(plans, dtypes, strict=True)):
        if dims := crossed_dims(plan):
            together[dims, dtype].append(position)
    return tuple(Flags(dims, tuple(positions)) for (dims, _), positions in together.items())


def _plan_rotations(
    routes: Sequence[tuple[Matrix, WeightPlan]], coordinate: Coordinate, limit: float
) -> Iterator[Rotations]:
    """Cuts the matrices of a task into broadcasts of at most ``limit`` bytes of rotations."""
    start, size = 0, 0
    for stop in range(len(routes) + 1):
        last = stop == len(routes)
        more = 0
        if not last:
            plan = routes[stop][1]
            more = ITEMSIZE * plan.bases * min(plan.storage.shape[-2:]) ** 2
        if stop > start and (last or size + more > limit):
            legs = [
                route
                for matrix, plan in routes[start:stop]
                for route in [_from_owner(plan, matrix.owner)] * plan.bases
            ]
            yield Rotations(start, stop, plan_hops(legs, coordinate))
            start, size = stop, 0
        size += more


def plan_async_refresh(
    plans: Sequence[WeightPlan],
    weights: tuple[int, ...],
    taking: Sequence[Collection[int]],
    coordinate: Coordinate,
) -> AsyncRefresh:
    """Plans the gather of projected momenta on their owners; arguments as in :func:`plan_task`."""
    refreshed = tuple(plan_matrices(plans, weights, taking, coordinate))
    routes = [_to_owner(plans[weights[m.position]], m) for m in refreshed]
    return AsyncRefresh(weights, refreshed, plan_hops(routes, coordinate))


def plan_matrices(
    plans: Sequence[WeightPlan],
    weights: tuple[int, ...],
    taking: Sequence[Collection[int]],
    coordinate: Coordinate,
    in_background: Sequence[Collection[int]] = (),
) -> Iterator[Matrix]:
    """The matrices of a task that take new bases; arguments as in :func:`plan_task`."""
    for position, index in enumerate(weights):
        plan = plans[index]
        held = plan.compute.matrices(coordinate) if plan.whole_basis.numel(coordinate) else ()
        before = in_background[position] if in_background else ()
        for matrix in sorted(taking[position]):
            owner = plan.owners[matrix]
            local = held.index(matrix) if matrix in held else None
            yield Matrix(position, matrix, local, owner, owner == coordinate, matrix in before)


def _matrix_layout(plan: WeightPlan) -> Layout:
    """The layout (m, n) of each single matrix of the batch, while the weight is computed."""
    batch_dims = len(plan.compute.shape) - 2

    def place(placement: Placement) -> Placement:
        if not isinstance(placement, Split) or placement.dim < batch_dims:
            return None
        return replace(placement, dim=placement.dim - batch_dims)

    placements = tuple(map(place, plan.compute.placements))
    return Layout(plan.compute.shape[-2:], plan.compute.mesh, placements, plan.compute.window)


def _to_owner(plan: WeightPlan, matrix: Matrix) -> tuple[Leg, ...]:
    """Route of a matrix's projected momentum (m, n) to its owner."""
    if plan.alone:
        return ()
    layout = _matrix_layout(plan)
    # Along these mesh dimensions other ranks hold a replica or other matrices: leave them out.
    fixed = tuple(d for d, placement in enumerate(layout.placements) if placement is None)
    return gather_to(layout, (0, 1), matrix.owner, fixed)


def _from_owner(plan: WeightPlan, owner: Coordinate) -> tuple[Leg, ...]:
    """Route of a rotation (r, r) from the owner to all ranks that compute a part of its matrix."""
    if plan.alone:
        return ()
    r, whole = min(plan.compute.shape[-2:]), plan.whole_basis
    fixed = batch_mesh_dims(plan.compute)
    if isinstance(whole, Held):
        return send_from((r, r), plan.compute.mesh, owner, fixed, whole)
    placements = tuple(p if isinstance(p, Copies) else None for p in whole.placements)
    target = Layout((r, r), plan.compute.mesh, placements)
    some = any(isinstance(p, Copies) for p in placements)
    return send_from((r, r), plan.compute.mesh, owner, fixed, target if some else None)
