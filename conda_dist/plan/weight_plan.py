"""The plan of one weight: where it is stored, where it is computed, and how it gets there.

Pure functions of layouts and numbers: the same on every rank, without torch.distributed, and the
same for a mesh of thousands of ranks that is only imagined.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from conda_dist.layout.flat import Flat, Held, flat_basis, flat_to_compute
from conda_dist.layout.layout import Coordinate, Copies, Layout, Placement, Split, Topology
from conda_dist.layout.moves import Group, Move, kept_dim, reverse, to_compute, to_whole
from conda_dist.layout.redistribution import Leg, gather_to, redistribution


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """The plan of one weight on the conda path: a matrix, or a batch of them.

    Attributes:
        name: its fully qualified name, or what stands for one.
        topology: the ranks that share it.
        storage: where its elements, and its gradient's, are.
        compute: where gradient, moments and update are during the step: whole rows or columns.
        moves: stages from storage to there; empty where they agree on every rank.
        basis: where the elements of its basis, shape (..., r, r), are kept, if its rule has one;
            as the other states are of which all that compute a matrix have a copy.
        part: which block of rows of a stored weight this is; None for a weight of its own.
        group: the ranks that compute it, where those are not all that store it.
        extra_shape: the shape, for one matrix, of the extra tensor; None without one.
        separate: whether its moments are tensors of their own in compute layout, which checkpoints
            convert; else they are DTensors like the parameter, or flat as its partition is.
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
    group: Group | None = None
    separate: bool = False
    extra_shape: tuple[int, int] | None = None
    owners: tuple[Coordinate, ...] = ()
    turns: tuple[int, ...] = ()

    @property
    def moments(self) -> Layout:
        """Where its moments are kept: where they are used, but for flat weights.

        ZeRO's checkpoints know moments only as partitions like the parameters'. Parts of a weight
        that are in place have views of the moments of the whole weight.
        """
        viewed = self.part is not None or bool(self.storage.kernel)
        if isinstance(self.storage, Flat) or (viewed and not self.separate):
            return self.storage
        return self.compute

    def copied_layout(self, shape: tuple[int, ...]) -> Layout:
        """Where a state is kept of which all that compute any of a matrix have a copy.

        Args:
            shape: its shape for one matrix.
        """
        return replace(self.basis, shape=(*self.storage.shape[:-2], *shape))

    @property
    def seen_as_matrix(self) -> bool:
        """Whether it is a convolution kernel, stored with more dimensions than a matrix has."""
        return bool(self.storage.kernel)

    @property
    def in_place(self) -> bool:
        """Whether the local rows of the stored weight are, in one piece, what a step works on."""
        window = self.storage.window
        return not self.moves and (window is None or len(window[0]) == 1)

    @property
    def loads_moments(self) -> bool:
        """Whether a step works on copies of the moments, which travel with the gradient."""
        return isinstance(self.storage, Flat) and not self.in_place

    @property
    def right(self) -> bool:
        """Whether the basis is multiplied from the right (m >= n)."""
        return kept_dim(self.storage.shape) == len(self.storage.shape) - 2

    @property
    def basis_moves(self) -> tuple[Move, ...]:
        """Stages that bring a basis that is split over the ranks to all who need it in a step."""
        if not any(isinstance(p, Split) for p in self.basis.placements):
            return ()
        if isinstance(self.storage, Flat) and len(self.basis.shape) == 2:
            whole = flat_basis(self.compute, False)
            return () if self.basis == whole else (Move(0, self.basis, whole),)
        return to_whole(self.basis, (len(self.basis.shape) - 2, len(self.basis.shape) - 1))

    @property
    def whole_basis(self) -> Layout:
        """Where the basis is after them."""
        moves = self.basis_moves
        return moves[-1].target if moves else self.basis

    @property
    def communicates(self) -> bool:
        """Whether a step needs other ranks even if nothing is refreshed."""
        return any(not leg.is_local for leg in redistribution(self.moves + self.basis_moves))

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
        if not self.communicates and self.in_place:
            return 0
        moved = (3 if self.loads_moments else 1) * math.prod(self.storage.shape)
        return -(-moved // len(self.topology.ranks))

    def computing(self) -> Iterator[Coordinate]:
        """The coordinates that compute any of it."""
        return inside(self.compute)

    @property
    def gathered_basis(self) -> int:
        """Elements that every rank gathers of its basis for a step."""
        if all(leg.is_local for leg in redistribution(self.basis_moves)):
            return 0
        split = math.prod(self.topology.sizes[d] for d in batch_mesh_dims(self.basis))
        return -(-math.prod(self.basis.shape) // split)

    def __str__(self) -> str:
        owners = ",".join(str(self.topology.rank_at(owner)) for owner in self.owners)
        return (
            f"{self.name} {self.storage.shape} stored {self.storage} computed {self.compute} "
            f"basis {self.basis} ranks {self.topology.ranks} refreshed by {owners}"
        )


def inside(layout: Layout) -> Iterator[Coordinate]:
    """The coordinates that hold a piece of a layout, if only an empty one."""
    held = [placement.among if placement else None for placement in layout.placements]
    return product(
        *(
            range(size) if among is None else range(among[0], sum(among))
            for size, among in zip(layout.mesh, held, strict=True)
        )
    )


def plan_weight(
    name: str,
    topology: Topology,
    storage: Layout,
    *,
    group: Group | None = None,
    shard_basis: bool = False,
    part: int | None = None,
    extra_shape: tuple[int, int] | None = None,
) -> WeightPlan:
    """The plan of a weight (..., m, n) before owners are dealt.

    Args:
        name: its fully qualified name.
        topology: the ranks that share it.
        storage: where its elements are.
        group: the ranks that compute it; None for all that hold any of its rows (or columns).
            Each has a copy of the basis.
        shard_basis: of a weight in flat partitions, whether those that compute it share the basis
            instead of having a copy each; it is then gathered for each step.
        part: which block of rows of a stored weight this is, if it is one.
        extra_shape: see :class:`WeightPlan`.
    """
    if isinstance(storage, Flat):
        compute, moves = flat_to_compute(storage)
    else:
        moves = to_compute(storage, group)
        compute = moves[-1].target if moves else storage
    batch_dims = len(storage.shape) - 2
    r = min(storage.shape[-2:])

    def place(placement: Placement) -> Placement:
        if not isinstance(placement, Split):
            return placement
        if placement.dim < batch_dims:
            return placement
        if placement.among is not None:
            return Copies(placement.among)
        return Split(batch_dims) if shard_basis else None

    placements = tuple(map(place, compute.placements))
    basis = Layout((*storage.shape[:-2], r, r), storage.mesh, placements)
    if isinstance(storage, Flat) and not batch_dims:
        basis = flat_basis(compute, shard_basis)
    exchanged = tuple(move for move in moves if storage.mesh[move.mesh_dim] > 1)
    separate = group is not None
    return WeightPlan(
        name, topology, storage, compute, exchanged, basis, part, group, separate, extra_shape
    )


def copied_basis_bytes(plan: WeightPlan, itemsize: int) -> list[int]:
    """Bytes each rank spends on the basis of a weight that has neither a group nor a split basis.

    Where shards are uneven, all are taken for the largest, the first.
    """
    if not isinstance(plan.storage, Flat):
        count = len(plan.topology.ranks)
        return [plan.basis.numel((0,) * len(plan.basis.mesh)) * itemsize] * count
    return [plan.basis.numel(c) * itemsize for c in plan.basis.coordinates()]


def is_batch_split(layout: Layout, mesh_dim: int) -> bool:
    """Whether a mesh dimension deals whole matrices out: along it each rank has others."""
    placement = layout.placements[mesh_dim]
    return isinstance(placement, Split) and placement.dim < len(layout.shape) - 2


def batch_mesh_dims(layout: Layout) -> tuple[int, ...]:
    """Mesh dimensions that deal whole matrices out."""
    return tuple(d for d in range(len(layout.mesh)) if is_batch_split(layout, d))


def basis_to_first(plan: WeightPlan) -> tuple[Leg, ...]:
    """Route of a flat weight's whole basis to the first rank, for checkpoints."""
    basis, first = plan.basis, (0,) * len(plan.basis.mesh)
    if isinstance(basis, Held):
        everywhere = Layout(basis.shape, basis.mesh, (None,))
        sender = basis.holders.index(True)
        return (Leg(Move(0, basis, everywhere), sender, 0),) if sender else ()
    return gather_to(basis, tuple(range(len(basis.shape))), first, ())


def saved_copy(plan: WeightPlan, shape: tuple[int, ...]) -> Layout:
    """Where the elements of a copied state of a separate weight are in a checkpoint.

    Its first dimension is split over the ranks that split the weight, its batch as in the step.

    Args:
        plan: the weight's plan.
        shape: the state's shape for one matrix, such as a basis's (r, r).
    """
    copies = plan.copied_layout(shape)
    dim = len(copies.shape) - len(shape)

    def place(basis: Placement, stored: Placement) -> Placement:
        if isinstance(basis, Split):
            return replace(basis, among=None)
        return None if basis is None and stored is None else Split(dim)

    pairs = zip(copies.placements, plan.storage.placements, strict=True)
    saved = tuple(place(basis, stored) for basis, stored in pairs)
    return Layout(copies.shape, copies.mesh, saved)


def copy_to_saved(plan: WeightPlan, shape: tuple[int, ...]) -> tuple[Leg, ...]:
    """Route of a copied state of a separate weight to its layout in a checkpoint."""
    layout, target, legs = plan.copied_layout(shape), saved_copy(plan, shape), []
    for mesh_dim, (placement, wanted) in enumerate(
        zip(layout.placements, target.placements, strict=True)
    ):
        if placement != wanted:
            move = Move(mesh_dim, layout, layout.move(mesh_dim, wanted))
            sender = placement.among[0] if isinstance(placement, Copies) else None
            legs.append(Leg(move, sender=sender))
            layout = move.target
    return tuple(legs)


def copy_from_saved(plan: WeightPlan, shape: tuple[int, ...]) -> tuple[Leg, ...]:
    """The way back of :func:`copy_to_saved`."""
    return tuple(
        Leg(Move(leg.move.mesh_dim, leg.move.target, leg.move.source))
        for leg in reversed(copy_to_saved(plan, shape))
    )


def extra_to_storage(plan: WeightPlan) -> tuple[Leg, ...]:
    """Route of what goes back beside the update, (..., 1, n) or (..., 1, 1), where that goes."""
    if plan.extra_shape is None:
        return ()
    legs = []
    for move in reverse(plan.moves):
        source, target = _of_one_row(plan, move.source), _of_one_row(plan, move.target)
        if source != target:
            held = source.placements[move.mesh_dim]
            sender = held.among[0] if isinstance(held, Copies) else None
            legs.append(Leg(Move(move.mesh_dim, source, target), sender=sender))
    return tuple(legs)


def _of_one_row(plan: WeightPlan, layout: Layout) -> Layout:
    """Where what goes beside an update is, if every rank has what belongs to its columns."""
    assert plan.extra_shape is not None
    batch_dims = len(layout.shape) - 2
    kept = (batch_dims + 1,) if plan.extra_shape[1] == layout.shape[-1] else ()

    def place(placement: Placement) -> Placement:
        if not isinstance(placement, Split) or placement.dim in (*range(batch_dims), *kept):
            return placement
        return None if placement.among is None else Copies(placement.among)

    shape = (*layout.shape[:-2], *plan.extra_shape)
    return Layout(shape, layout.mesh, tuple(map(place, layout.placements)))


def moments_to_saved(plan: WeightPlan) -> tuple[Leg, ...]:
    """Route of a separate weight's moments to the parameter's layout, as checkpoints have them."""
    return redistribution(reverse(plan.moves))
