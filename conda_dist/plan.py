"""What each weight gets: where it is computed, and what is exchanged together.

Pure functions of layouts and numbers: the same on every rank, without torch.distributed, and the
same for a mesh of thousands of ranks that is only imagined. Nothing here depends on which rank
asks but the boxes inside the hops.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from conda_dist.flat import Flat, Held, flat_basis, flat_to_compute
from conda_dist.layout import (
    Coordinate,
    Layout,
    Move,
    Split,
    Topology,
    kept_dim,
    reverse,
    to_compute,
    to_whole,
)
from conda_dist.transfer import Hop, Leg, gather_to, plan_hops, redistribution, send_from

ITEMSIZE = 4
"""Bytes of an element by which buckets, waves and their parts are filled, whatever its own are."""


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """The plan of one weight on the conda path: a matrix, or a batch of them.

    Attributes:
        name: its fully qualified name, or what stands for one.
        topology: the ranks that share it.
        storage: where its elements, and its gradient's, are.
        compute: where gradient, moments and update are during the step: whole rows or columns.
        moves: stages from storage to there; empty where they agree on every rank.
        basis: where the elements of its basis, shape (..., r, r), are kept.
        part: which block of rows of a stored weight this is; None for a weight of its own.
        wave: which of the waves that an interval between refreshes is divided into is its own.
        delegated: whether its owner computes the products of a step for all.
        owners: for each matrix of the batch the coordinate that decomposes its momentum.
        turns: for each matrix its place in its owner's queue.
    """

    name: str
    topology: Topology
    storage: Layout
    compute: Layout
    moves: tuple[Move, ...]
    basis: Layout
    part: int | None = None
    wave: int = 0
    delegated: bool = False
    owners: tuple[Coordinate, ...] = ()
    turns: tuple[int, ...] = ()

    @property
    def moments(self) -> Layout:
        """Where its moments are kept: where they are used, or else with the stored weight.

        No DTensor describes the compute layout of a block of rows, so its moments have the layout
        of the weight's rows, and travel with the gradient if that does. So do those of a flat
        weight: ZeRO's checkpoints know moments only as partitions like the parameters'.
        """
        return self.storage if self._moments_stay else self.compute

    @property
    def _moments_stay(self) -> bool:
        return self.part is not None or isinstance(self.storage, Flat)

    @property
    def in_place(self) -> bool:
        """Whether the local rows of the stored weight are, in one piece, what a step works on."""
        window = self.storage.window
        return not self.moves and (window is None or len(window[0]) == 1)

    @property
    def borrows(self) -> bool:
        """Whether a step works on copies of the moments."""
        return self._moments_stay and not self.in_place

    @property
    def right(self) -> bool:
        """Whether the basis is multiplied from the right (m >= n)."""
        return kept_dim(self.storage.shape) == len(self.storage.shape) - 2

    @property
    def basis_moves(self) -> tuple[Move, ...]:
        """Stages that bring the whole basis of a matrix to all who need it in a step."""
        if isinstance(self.storage, Flat) and len(self.basis.shape) == 2:
            whole = flat_basis(self.compute, False)
            return () if self.basis == whole else (Move(0, self.basis, whole),)
        return to_whole(self.basis, _matrix_dims(self.basis))

    @property
    def whole_basis(self) -> Layout:
        """Where the basis is after them."""
        moves = self.basis_moves
        return moves[-1].target if moves else self.basis

    @property
    def travels(self) -> bool:
        """Whether a step needs other ranks even if nothing is refreshed."""
        return self.delegated or any(
            not leg.silent for leg in redistribution(self.moves + self.basis_moves)
        )

    @property
    def alone(self) -> bool:
        """Whether one rank of several computes all of it, by itself."""
        return isinstance(self.basis, Held) and sum(self.basis.holders) == 1

    @property
    def cost(self) -> int:
        """Cost of decomposing one matrix, r^2 max(m, n), in the order of its operations."""
        m, n = self.storage.shape[-2:]
        return min(m, n) ** 2 * max(m, n)

    @property
    def matrix_numel(self) -> int:
        """Elements of one matrix."""
        return math.prod(self.storage.shape[-2:])

    @property
    def share(self) -> int:
        """Elements that every rank has of what a step moves of it, by an even split."""
        moved = (3 if self.borrows else 1) * math.prod(self.storage.shape)
        return -(-moved // len(self.topology.ranks))

    @property
    def gathered_basis(self) -> int:
        """Elements that every rank gathers of its basis for a step."""
        if self.delegated or all(leg.silent for leg in redistribution(self.basis_moves)):
            return 0
        split = math.prod(self.topology.sizes[d] for d in batch_mesh_dims(self.basis))
        return -(-math.prod(self.basis.shape) // split)

    @property
    def gathered(self) -> int:
        """Elements of one matrix that its owner gathers: the momentum, or all it multiplies."""
        r = min(self.storage.shape[-2:])
        return self.matrix_numel + (r * r if self.delegated else 0)

    def __str__(self) -> str:
        owners = ",".join(str(self.topology.rank_at(owner)) for owner in self.owners)
        return (
            f"{self.name} {self.storage.shape} stored {self.storage} computed {self.compute} "
            f"basis {self.basis} ranks {self.topology.ranks} refreshed "
            f"{'and multiplied ' if self.delegated else ''}by {owners} in wave {self.wave}"
        )


def plan_weight(
    name: str,
    topology: Topology,
    storage: Layout,
    shard_basis: bool,
    part: int | None = None,
    wave: int = 0,
) -> WeightPlan:
    """The plan of a weight (..., m, n) before owners are dealt.

    Args:
        name: its fully qualified name.
        topology: the ranks that share it.
        storage: where its elements are.
        shard_basis: whether to keep the basis split over the ranks that split the weight; it is
            then gathered for each step. A basis is replicated over replicas in either case, and
            the experts of a 3-D weight keep theirs with them. Of a flat weight only those have
            any of it that compute some of its rows or columns.
        part: which block of rows of a stored weight this is, if it is one.
        wave: in which part of an interval its basis is refreshed.
    """
    if isinstance(storage, Flat):
        compute, moves = flat_to_compute(storage)
    else:
        moves = to_compute(storage)
        compute = moves[-1].target if moves else storage
    batch_dims = len(storage.shape) - 2
    r = min(storage.shape[-2:])

    def place(placement: Split | None) -> Split | None:
        if placement is None or placement.dim < batch_dims:
            return placement
        return Split(batch_dims) if shard_basis else None

    placements = tuple(map(place, compute.placements))
    basis = Layout((*storage.shape[:-2], r, r), storage.mesh, placements)
    if isinstance(storage, Flat) and not batch_dims:
        basis = flat_basis(compute, shard_basis)
    exchanged = tuple(move for move in moves if storage.mesh[move.mesh_dim] > 1)
    return WeightPlan(name, topology, storage, compute, exchanged, basis, part, wave)


def _batch_placements(layout: Layout) -> tuple[Split | None, ...]:
    batch_dims = len(layout.shape) - 2
    return tuple(p if p is not None and p.dim < batch_dims else None for p in layout.placements)


def replicated_basis_bytes(plan: WeightPlan, itemsize: int) -> list[int]:
    """Bytes each rank spends on the basis of a weight whose plan is not to split it.

    Where shards are uneven, all are taken for the largest, the first.
    """
    if not isinstance(plan.storage, Flat):
        count = len(plan.topology.ranks)
        return [plan.basis.numel((0,) * len(plan.basis.mesh)) * itemsize] * count
    return [plan.basis.numel(c) * itemsize for c in plan.basis.coordinates()]


def batch_mesh_dims(layout: Layout) -> tuple[int, ...]:
    """Mesh dimensions that deal whole matrices out: along them each rank has others."""
    return tuple(d for d, p in enumerate(_batch_placements(layout)) if p is not None)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Weights of one mesh whose elements travel together.

    Attributes:
        weights: their indices.
        borrowers: positions among them of those that step on copies of their moments.
        forward: exchanges before the step. Items: the gradients of ``weights``, storage to
            compute layout; as many bases, kept to whole; first and second moment of each of
            ``borrowers``, storage to compute layout.
        backward: exchanges after it. Items: the updates, compute to storage layout; the moments
            of ``borrowers``.
    """

    weights: tuple[int, ...]
    borrowers: tuple[int, ...]
    forward: tuple[Hop, ...]
    backward: tuple[Hop, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a wave.

    Attributes:
        position: which weight of the bucket it belongs to.
        index: which matrix of that weight's batch it is.
        local: its place in this rank's local batch; None if this rank has nothing of it.
        owner: the coordinate that decomposes it.
        mine: whether that is this rank.
        launched: whether its decomposition was started in an earlier step.
    """

    position: int
    index: int
    local: int | None
    owner: Coordinate
    mine: bool
    launched: bool = False


@dataclass(frozen=True, slots=True)
class Scatter:
    """Rotations that travel together.

    Attributes:
        start: the first of their matrices in the wave.
        stop: the one after the last.
        hops: exchanges that bring each rotation to all. Items: these matrices.
    """

    start: int
    stop: int
    hops: tuple[Hop, ...]


@dataclass(frozen=True, slots=True)
class Wave:
    """Weights refreshed together.

    Attributes:
        bucket: their step.
        matrices: their matrices.
        gather: exchanges that bring each projected momentum to its owner. Items: ``matrices``, of
            which those launched stay where they are.
        scatters: how the rotations travel, in parts: all ranks get all of them.
    """

    bucket: Bucket
    matrices: tuple[Matrix, ...]
    gather: tuple[Hop, ...]
    scatters: tuple[Scatter, ...]


@dataclass(frozen=True, slots=True)
class Launch:
    """Weights whose momenta go to their owners ahead of the step that takes their new bases.

    Attributes:
        weights: their indices, all of one mesh.
        matrices: their matrices.
        forward: exchanges that bring each kept momentum to the compute layout. Items: ``weights``.
        gather: exchanges that bring each matrix from there to its owner. Items: ``matrices``.
    """

    weights: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    forward: tuple[Hop, ...]
    gather: tuple[Hop, ...]


def plan_bucket(
    plans: Sequence[WeightPlan], weights: tuple[int, ...], coordinate: Coordinate
) -> Bucket:
    """Plans the exchanges of weights of one mesh, seen from one rank."""
    chosen = [plans[i] for i in weights]
    grads = [redistribution(plan.moves) for plan in chosen]
    bases = [redistribution(plan.basis_moves) for plan in chosen]
    updates = [redistribution(reverse(plan.moves)) for plan in chosen]
    borrowers = tuple(i for i, plan in enumerate(chosen) if plan.borrows)
    there = [grads[i] for i in borrowers for _ in range(2)]
    back = [updates[i] for i in borrowers for _ in range(2)]
    return Bucket(
        weights,
        borrowers,
        plan_hops(grads + bases + there, coordinate),
        plan_hops(updates + back, coordinate),
    )


def _matrix_dims(layout: Layout) -> tuple[int, int]:
    return len(layout.shape) - 2, len(layout.shape) - 1


def plan_wave(
    plans: Sequence[WeightPlan],
    weights: tuple[int, ...],
    due: Sequence[Collection[int]],
    coordinate: Coordinate,
    launched: Sequence[Collection[int]] = (),
    limit: float = math.inf,
) -> Wave:
    """Plans the refresh of weights of one mesh, seen from one rank.

    Args:
        plans: all plans.
        weights: those of the wave.
        due: for each of them which matrices of its batch take new bases.
        coordinate: the rank for which boxes are computed.
        launched: for each of them which of these were launched in an earlier step; () for none.
        limit: most bytes of rotations that travel together, and at least one of them.
    """
    matrices = tuple(plan_matrices(plans, weights, due, coordinate, launched))
    chosen = [plans[weights[m.position]] for m in matrices]
    routes = list(zip(matrices, chosen, strict=True))
    return Wave(
        plan_bucket(plans, weights, coordinate),
        matrices,
        plan_hops([() if m.launched else _gather_route(p, m.owner) for m, p in routes], coordinate),
        tuple(_plan_scatters(routes, coordinate, limit)),
    )


def _plan_scatters(
    routes: Sequence[tuple[Matrix, WeightPlan]], coordinate: Coordinate, limit: float
) -> Iterator[Scatter]:
    start, size = 0, 0
    for stop, (_, plan) in enumerate(routes):
        rotation = ITEMSIZE * min(plan.storage.shape[-2:]) ** 2
        if stop > start and size + rotation > limit:
            yield _plan_scatter(routes, start, stop, coordinate)
            start, size = stop, 0
        size += rotation
    yield _plan_scatter(routes, start, len(routes), coordinate)


def _plan_scatter(
    routes: Sequence[tuple[Matrix, WeightPlan]], start: int, stop: int, coordinate: Coordinate
) -> Scatter:
    legs = [_scatter_route(plan, matrix.owner) for matrix, plan in routes[start:stop]]
    return Scatter(start, stop, plan_hops(legs, coordinate))


def plan_launch(
    plans: Sequence[WeightPlan],
    weights: tuple[int, ...],
    due: Sequence[Collection[int]],
    coordinate: Coordinate,
) -> Launch:
    """Plans the way of kept momenta to their owners; arguments as of :func:`plan_wave`."""
    matrices = tuple(plan_matrices(plans, weights, due, coordinate))
    chosen = [plans[i] for i in weights]
    forward = [redistribution(plan.moves) if plan.borrows else () for plan in chosen]
    gather = [_gather_route(chosen[m.position], m.owner) for m in matrices]
    return Launch(weights, matrices, plan_hops(forward, coordinate), plan_hops(gather, coordinate))


def plan_matrices(
    plans: Sequence[WeightPlan],
    weights: tuple[int, ...],
    due: Sequence[Collection[int]],
    coordinate: Coordinate,
    launched: Sequence[Collection[int]] = (),
) -> Iterator[Matrix]:
    """The matrices of a wave; arguments as of :func:`plan_wave`."""
    for position, index in enumerate(weights):
        plan = plans[index]
        held = plan.compute.matrices(coordinate)
        before = launched[position] if launched else ()
        for matrix in sorted(due[position]):
            owner = plan.owners[matrix]
            local = held.index(matrix) if matrix in held else None
            yield Matrix(position, matrix, local, owner, owner == coordinate, matrix in before)


def _gather_route(plan: WeightPlan, owner: Coordinate) -> tuple[Leg, ...]:
    """Route of one matrix of the projected momentum, (m, n), to its owner."""
    if plan.alone:
        return ()
    batch_dims = len(plan.compute.shape) - 2
    matrix = Layout(
        plan.compute.shape[-2:],
        plan.compute.mesh,
        tuple(
            replace(p, dim=p.dim - batch_dims) if p is not None and p.dim >= batch_dims else None
            for p in plan.compute.placements
        ),
        plan.compute.window,
    )
    fixed = tuple(d for d, placement in enumerate(matrix.placements) if placement is None)
    return gather_to(matrix, (0, 1), owner, fixed)


def _scatter_route(plan: WeightPlan, owner: Coordinate) -> tuple[Leg, ...]:
    """Route of one rotation, (r, r), from the owner to all who hold a part of its matrix."""
    if plan.alone:
        return ()
    r, whole = min(plan.compute.shape[-2:]), plan.whole_basis
    target = whole if isinstance(whole, Held) else None
    return send_from((r, r), plan.compute.mesh, owner, batch_mesh_dims(plan.compute), target)


def basis_to_first(plan: WeightPlan) -> tuple[Leg, ...]:
    """Route of a weight's whole basis to the first rank, for checkpoints."""
    basis, first = plan.basis, (0,) * len(plan.basis.mesh)
    if isinstance(basis, Held):
        everywhere = Layout(basis.shape, basis.mesh, (None,))
        sender = basis.holders.index(True)
        return (Leg(Move(0, basis, everywhere), sender, 0),) if sender else ()
    return gather_to(basis, tuple(range(len(basis.shape))), first, ())
