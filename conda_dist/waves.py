"""What is decomposed together: momenta to their owners, and rotations back to all.

Pure, as ``plan`` is.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from conda_dist.flat import Held
from conda_dist.layout import Coordinate, Layout, Split
from conda_dist.plan import ITEMSIZE, Bucket, WeightPlan, batch_mesh_dims, plan_bucket
from conda_dist.transfer import Hop, Leg, gather_to, plan_hops, redistribution, send_from


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
        summed: whether the owner is sent parts of its Gram matrix, which it adds up, and not the
            momentum.
        gives: whether this rank sends such a part.
    """

    position: int
    index: int
    local: int | None
    owner: Coordinate
    mine: bool
    launched: bool = False
    summed: bool = False
    gives: bool = False


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
        gather: exchanges that bring each projected momentum to its owner, or the parts (parts,
            ``packed_numel(r)``) of its Gram matrix. Items: ``matrices``, of which those launched
            stay where they are.
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


def plan_wave(
    plans: Sequence[WeightPlan],
    weights: tuple[int, ...],
    due: Sequence[Collection[int]],
    coordinate: Coordinate,
    launched: Sequence[Collection[int]] = (),
    summed: Sequence[Collection[int]] = (),
    limit: float = math.inf,
) -> Wave:
    """Plans the refresh of weights of one mesh, seen from one rank.

    Args:
        plans: all plans.
        weights: those of the wave.
        due: for each of them which matrices of its batch take new bases.
        coordinate: the rank for which boxes are computed.
        launched: for each of them which of these were launched in an earlier step; () for none.
        summed: for each of them of which the Gram matrices are summed up; () for none.
        limit: most bytes of rotations that travel together, and at least one of them.
    """
    matrices = tuple(plan_matrices(plans, weights, due, coordinate, launched, summed))
    chosen = [plans[weights[m.position]] for m in matrices]
    routes = list(zip(matrices, chosen, strict=True))
    return Wave(
        plan_bucket(plans, weights, coordinate),
        matrices,
        plan_hops([() if m.launched else _to_owner(p, m) for m, p in routes], coordinate),
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
    summed: Sequence[Collection[int]] = (),
) -> Launch:
    """Plans the way of kept momenta to their owners; arguments as of :func:`plan_wave`."""
    matrices = tuple(plan_matrices(plans, weights, due, coordinate, (), summed))
    chosen = [plans[i] for i in weights]
    forward = [redistribution(plan.moves) if plan.borrows else () for plan in chosen]
    gather = [_to_owner(chosen[m.position], m) for m in matrices]
    return Launch(weights, matrices, plan_hops(forward, coordinate), plan_hops(gather, coordinate))


def plan_matrices(
    plans: Sequence[WeightPlan],
    weights: tuple[int, ...],
    due: Sequence[Collection[int]],
    coordinate: Coordinate,
    launched: Sequence[Collection[int]] = (),
    summed: Sequence[Collection[int]] = (),
) -> Iterator[Matrix]:
    """The matrices of a wave; arguments as of :func:`plan_wave`."""
    for position, index in enumerate(weights):
        plan = plans[index]
        held = plan.compute.matrices(coordinate)
        before, parts = (of[position] if of else () for of in (launched, summed))
        for matrix in sorted(due[position]):
            owner = plan.owners[matrix]
            local = held.index(matrix) if matrix in held else None
            sums = matrix in parts
            gives = sums and shares_with(plan, owner, coordinate)
            mine, was_launched = owner == coordinate, matrix in before
            yield Matrix(position, matrix, local, owner, mine, was_launched, sums, gives)


def _matrix_placements(plan: WeightPlan) -> tuple[Split | None, ...]:
    """What splits each single matrix of the batch, in compute layout."""
    batch_dims = len(plan.compute.shape) - 2
    return tuple(
        replace(p, dim=p.dim - batch_dims) if p is not None and p.dim >= batch_dims else None
        for p in plan.compute.placements
    )


def _fixed(placements: Sequence[Split | None]) -> tuple[int, ...]:
    """Mesh dimensions along which ranks have a replica, of which one will do, or other matrices."""
    return tuple(d for d, placement in enumerate(placements) if placement is None)


def shares_with(plan: WeightPlan, owner: Coordinate, coordinate: Coordinate) -> bool:
    """Whether a rank has some rows or columns of the owner's copy of a matrix."""
    matrix = _matrix_layout(plan)
    beside = all(coordinate[d] == owner[d] for d in _fixed(matrix.placements))
    return beside and bool(matrix.numel(coordinate))


def _matrix_layout(plan: WeightPlan) -> Layout:
    """Where the elements of each single matrix of the batch are, in compute layout."""
    shape, placements = plan.compute.shape[-2:], _matrix_placements(plan)
    return Layout(shape, plan.compute.mesh, placements, plan.compute.window)


@lru_cache(maxsize=4096)
def _gram_layout(matrix: Layout) -> Layout:
    """Where the parts of a matrix's Gram matrix are, (parts, ``packed_numel(r)``).

    One for each rank that has any of it. Where several mesh dimensions split the matrix, one for
    each rank, empty or not.
    """
    splitting = [d for d, placement in enumerate(matrix.placements) if placement is not None]
    parts = math.prod(matrix.mesh[d] for d in splitting)
    placements = tuple(None if p is None else Split(0) for p in matrix.placements)
    if len(splitting) == 1:
        (mesh_dim,) = splitting
        origin = [0] * len(matrix.mesh)
        bounds = [0]
        for index in range(matrix.mesh[mesh_dim]):
            origin[mesh_dim] = index
            bounds.append(bounds[-1] + bool(matrix.numel(tuple(origin))))
        parts = bounds[-1]
        placements = tuple(
            None if p is None else Split(0, bounds=tuple(bounds)) for p in matrix.placements
        )
    return Layout((parts, packed_numel(min(matrix.shape))), matrix.mesh, placements)


def packed_numel(r: int) -> int:
    """Elements of a packed Gram matrix (r, r) with its scale, as ``decomposition`` makes it."""
    half = -(-r // 2)
    return (2 * half + 1) * half + 1


def sums_grams(plan: WeightPlan, moment_size: int, gram_size: int | None) -> bool:
    """Whether the parts of a weight's Gram matrices are fewer bytes than its momenta.

    They are where few ranks share long matrices: for fewer than 2 max(m, n) / r.

    Args:
        plan: its plan.
        moment_size: bytes of an element of the first moment.
        gram_size: bytes of an element of a Gram matrix; None where the momentum itself is needed.
    """
    if gram_size is None:
        return False
    parts, packed = _gram_layout(_matrix_layout(plan)).shape
    smaller = parts * packed * gram_size < plan.matrix_numel * moment_size
    return parts > 1 and not plan.alone and not plan.delegated and smaller


def _to_owner(plan: WeightPlan, matrix: Matrix) -> tuple[Leg, ...]:
    """Route of a projected momentum (m, n), or of the parts of its Gram matrix, to its owner."""
    if plan.alone:
        return ()
    layout = _matrix_layout(plan)
    fixed = _fixed(layout.placements)
    if matrix.summed:
        layout = _gram_layout(layout)
    return gather_to(layout, (0, 1), matrix.owner, fixed)


def _scatter_route(plan: WeightPlan, owner: Coordinate) -> tuple[Leg, ...]:
    """Route of one rotation, (r, r), from the owner to all who hold a part of its matrix."""
    if plan.alone:
        return ()
    r, whole = min(plan.compute.shape[-2:]), plan.whole_basis
    target = whole if isinstance(whole, Held) else None
    return send_from((r, r), plan.compute.mesh, owner, batch_mesh_dims(plan.compute), target)
