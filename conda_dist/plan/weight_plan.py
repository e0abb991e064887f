"""The plan of one weight: its storage layout, its compute layout, and the moves between them.

Pure functions of layouts and numbers, without torch.distributed: every rank computes the same plan,
and one process can compute the plan of a mesh of thousands of ranks.
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
    """The plan of one weight (..., m, n) that a rule steps: a matrix, or a batch of matrices.

    Attributes:
        name: the weight's fully qualified name, or a generated one.
        topology: the ranks that share the weight.
        storage: layout of the weight and of its gradient.
        compute: layout of gradient, moments and update during the step: whole rows or columns.
        moves: stages from ``storage`` to ``compute``; empty if they are equal on every rank.
        basis: layout in which the basis (..., r, r) is kept, if the rule has one. Other copied
            states are placed in the same way, see :meth:`copied_layout`.
        part: index of the block of rows that this is, if the group's ``splits`` cut the stored
            weight into blocks; None if this is all of it.
        group: the compute group; None if all ranks compute that hold any rows (or columns).
        separate: whether the moments are plain tensors in compute layout, which checkpoints
            convert. Else they are DTensors like the parameter, or flat like its partition.
        extra_shape: shape, for one matrix, of the extra tensor that goes back with the update, see
            :meth:`conda_dist.rules.Rule.extra_shape`; None without one.
        bases: number of bases of each matrix, if the rule has any.
        owners: for each matrix of the batch, the coordinate of its owner, which decomposes it.
        turns: for each matrix of the batch, its place in its owner's queue.
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
    bases: int = 1
    owners: tuple[Coordinate, ...] = ()
    turns: tuple[int, ...] = ()

    @property
    def moments(self) -> Layout:
        """Layout in which the moments are kept.

        It is the compute layout, with two exceptions. Moments of a flat weight are partitioned like
        the parameter, because ZeRO's checkpoints have no other form. If nothing has to move, a part
        of a weight, or a kernel that is seen as a matrix, uses a view of the stored weight's
        moments.
        """
        viewed = self.part is not None or bool(self.storage.kernel)
        if isinstance(self.storage, Flat) or (viewed and not self.separate):
            return self.storage
        return self.compute

    def copied_layout(self, shape: tuple[int, ...]) -> Layout:
        """Layout of a copied state: one that every rank that computes any of a matrix has whole.

        Args:
            shape: shape of the state for one matrix, such as (r, r).
        """
        return replace(self.basis, shape=(*self.storage.shape[:-2], *shape))

    @property
    def seen_as_matrix(self) -> bool:
        """Whether it is a convolution kernel (out, in, ...) that is viewed as a matrix."""
        return bool(self.storage.kernel)

    @property
    def in_place(self) -> bool:
        """Whether a step works on one contiguous block of the stored weight's local rows.

        Then neither the gradient nor the update moves, and the rule may update the weight itself.
        """
        window = self.storage.window
        return not self.moves and (window is None or len(window[0]) == 1)

    @property
    def loads_moments(self) -> bool:
        """Whether a step works on copies of the moments, exchanged together with the gradient."""
        return isinstance(self.storage, Flat) and not self.in_place

    @property
    def right(self) -> bool:
        """Whether the basis is multiplied from the right (m >= n)."""
        return kept_dim(self.storage.shape) == len(self.storage.shape) - 2

    @property
    def basis_moves(self) -> tuple[Move, ...]:
        """Stages that gather a basis that is split over the ranks; empty if it is not split."""
        if not any(isinstance(p, Split) for p in self.basis.placements):
            return ()
        if isinstance(self.storage, Flat) and len(self.basis.shape) == 2:
            whole = flat_basis(self.compute, False)
            return () if self.basis == whole else (Move(0, self.basis, whole),)
        return to_whole(self.basis, (len(self.basis.shape) - 2, len(self.basis.shape) - 1))

    @property
    def whole_basis(self) -> Layout:
        """Layout of the basis after :attr:`basis_moves`."""
        moves = self.basis_moves
        return moves[-1].target if moves else self.basis

    @property
    def communicates(self) -> bool:
        """Whether a step without a refresh exchanges anything with other ranks."""
        return any(not leg.is_local for leg in redistribution(self.moves + self.basis_moves))

    @property
    def alone(self) -> bool:
        """Whether one rank of several computes the whole weight (in flat partitions)."""
        return isinstance(self.basis, Held) and sum(self.basis.holders) == 1

    @property
    def cost(self) -> int:
        """Cost of decomposing one matrix: r^2 max(m, n), proportional to its operations."""
        m, n = self.storage.shape[-2:]
        return min(m, n) ** 2 * max(m, n)

    @property
    def matrix_numel(self) -> int:
        """Number of elements of one matrix."""
        return math.prod(self.storage.shape[-2:])

    @property
    def share(self) -> int:
        """Number of elements that a step moves for this weight, per rank (rounded up)."""
        if not self.communicates and self.in_place:
            return 0
        moved = (3 if self.loads_moments else 1) * math.prod(self.storage.shape)
        return -(-moved // len(self.topology.ranks))

    def computing(self) -> Iterator[Coordinate]:
        """The coordinates that compute any of the weight."""
        return inside(self.compute)

    @property
    def gathered_basis(self) -> int:
        """Number of elements of the basis that every rank gathers for a step."""
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
    """The coordinates to which a layout gives a piece, even if that piece is empty."""
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
    bases: int = 1,
) -> WeightPlan:
    """The plan of a weight (..., m, n), still without owners.

    Args:
        name: the weight's fully qualified name.
        topology: the ranks that share the weight.
        storage: layout of the weight.
        group: the compute group; None if all ranks compute that hold any rows (or columns). Each
            rank that computes has a copy of the basis. In flat partitions a group is one rank.
        shard_basis: for a weight in flat partitions: whether the ranks that compute it split the
            basis, and gather it for each step, instead of having a copy each.
        part: see :class:`WeightPlan`.
        extra_shape: see :class:`WeightPlan`.
        bases: see :class:`WeightPlan`.
    """
    if isinstance(storage, Flat):
        compute, moves = flat_to_compute(storage, None if group is None else group.among[0])
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
    separate = group is not None and not isinstance(storage, Flat)
    return WeightPlan(
        name,
        topology,
        storage,
        compute,
        exchanged,
        basis,
        part,
        group,
        separate,
        extra_shape,
        bases,
    )


def copied_basis_bytes(plan: WeightPlan, itemsize: int) -> list[int]:
    """Bytes of the basis on each rank, for a weight with neither a group nor a split basis.

    If shards are uneven, every rank counts as much as the first one, which has the largest shard.
    """
    if not isinstance(plan.storage, Flat):
        count = len(plan.topology.ranks)
        return [plan.basis.numel((0,) * len(plan.basis.mesh)) * itemsize] * count
    return [plan.basis.numel(c) * itemsize for c in plan.basis.coordinates()]


def batch_mesh_dims(layout: Layout) -> tuple[int, ...]:
    """The mesh dimensions that split the batch: ranks along them hold different whole matrices."""
    batch_dims, placements = len(layout.shape) - 2, enumerate(layout.placements)
    return tuple(d for d, p in placements if isinstance(p, Split) and p.dim < batch_dims)


def copy_to_first(plan: WeightPlan, shape: tuple[int, ...]) -> tuple[Leg, ...]:
    """Route of a copied state of a flat weight to the first rank, which saves it."""
    copies, first = plan.copied_layout(shape), (0,) * len(plan.basis.mesh)
    if isinstance(copies, Held):
        everywhere = Layout(copies.shape, copies.mesh, (None,))
        sender = copies.holders.index(True)
        return (Leg(Move(0, copies, everywhere), sender, 0),) if sender else ()
    return gather_to(copies, tuple(range(len(copies.shape))), first, ())


def saved_copy(plan: WeightPlan, shape: tuple[int, ...]) -> Layout:
    """Layout in a checkpoint of a copied state of a weight with separate states.

    The ranks that split the weight split the state's first dimension (after the batch's). The batch
    is split as in the step.

    Args:
        plan: the weight's plan.
        shape: shape of the state for one matrix, such as (r, r) of a basis.
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
    """Route of a copied state from the ranks that compute to :func:`saved_copy`'s layout."""
    layout, target, legs = plan.copied_layout(shape), saved_copy(plan, shape), []
    for mesh_dim, (placement, wanted) in enumerate(
        zip(layout.placements, target.placements, strict=True)
    ):
        if placement != wanted:
            move = Move(mesh_dim, layout, layout.with_placement(mesh_dim, wanted))
            sender = placement.among[0] if isinstance(placement, Copies) else None
            legs.append(Leg(move, sender=sender))
            layout = move.target
    return tuple(legs)


def copy_from_saved(plan: WeightPlan, shape: tuple[int, ...]) -> tuple[Leg, ...]:
    """Route of a copied state from a checkpoint's layout to the ranks that compute."""
    return tuple(
        Leg(Move(leg.move.mesh_dim, leg.move.target, leg.move.source))
        for leg in reversed(copy_to_saved(plan, shape))
    )


def extra_to_storage(plan: WeightPlan) -> tuple[Leg, ...]:
    """Route of the extra tensor, (..., 1, n) or (..., 1, 1), to the ranks that get the update."""
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
    """Layout of the extra tensor if each rank holds the entries for its columns of ``layout``."""
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
    """Route of separate moments to the parameter's layout, which checkpoints use."""
    return redistribution(reverse(plan.moves))
