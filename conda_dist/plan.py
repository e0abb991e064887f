"""What each weight gets: where it is computed, and what is exchanged together.

Pure functions of layouts and numbers: the same on every rank, without torch.distributed, and the
same for a mesh of thousands of ranks that is only imagined. Nothing here depends on which rank
asks but the boxes inside the hops.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
from conda_dist.transfer import Hop, Leg, gather_to, plan_hops, redistribution

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
        waves: how many those are.
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
    waves: int = 1
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
        return self.part is not None or isinstance(self.storage, Flat) or self.seen_as_matrix

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
        """Most elements of one matrix that its owner gathers: momentum, or all it multiplies."""
        r = min(self.storage.shape[-2:])
        return self.matrix_numel + (r * r if self.delegated else 0)

    def __str__(self) -> str:
        owners = ",".join(str(self.topology.rank_at(owner)) for owner in self.owners)
        what = "refreshed and multiplied" if self.delegated else "refreshed"
        return (
            f"{self.name} {self.storage.shape} stored {self.storage} computed {self.compute} "
            f"basis {self.basis} ranks {self.topology.ranks} {what} by {owners} "
            f"in wave {self.wave} of {self.waves}"
        )


def plan_weight(
    name: str,
    topology: Topology,
    storage: Layout,
    shard_basis: bool,
    part: int | None = None,
    wave: tuple[int, int] = (0, 1),
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
        wave: in which part of an interval its basis is refreshed, and of how many.
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
    return WeightPlan(name, topology, storage, compute, exchanged, basis, part, *wave)


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


def basis_to_first(plan: WeightPlan) -> tuple[Leg, ...]:
    """Route of a weight's whole basis to the first rank, for checkpoints."""
    basis, first = plan.basis, (0,) * len(plan.basis.mesh)
    if isinstance(basis, Held):
        everywhere = Layout(basis.shape, basis.mesh, (None,))
        sender = basis.holders.index(True)
        return (Leg(Move(0, basis, everywhere), sender, 0),) if sender else ()
    return gather_to(basis, tuple(range(len(basis.shape))), first, ())
