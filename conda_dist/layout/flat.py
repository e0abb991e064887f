"""Layouts of ZeRO's flat partitions: each rank holds one range of a tensor's flattened elements.

A range may begin and end inside a row or a matrix, so a rank holds a few boxes, packed in a flat
local tensor. Many ranks may hold no element of a matrix; they take no part in its step. Pure.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from conda_dist.layout.layout import Block, Coordinate, Layout, Placement, Split
from conda_dist.layout.moves import Move, kept_dim


@dataclass(frozen=True, slots=True)
class Flat(Layout):
    """A tensor, flattened row by row, of which each rank of a 1-D mesh holds one range.

    ZeRO's partitions are such ranges. The local tensor is flat: shape ``(elements,)``.

    Attributes:
        bounds: rank i holds the elements [bounds[i], bounds[i + 1]); ascending, from 0 to the
            number of elements.
    """

    bounds: tuple[int, ...] = ()

    @classmethod
    def of(cls, shape: tuple[int, ...], bounds: tuple[int, ...]) -> "Flat":
        """The layout of a tensor cut at ``bounds``.

        Raises:
            ValueError: the bounds do not ascend from 0 to the number of elements.
        """
        if list(bounds) != sorted(bounds) or (bounds[0], bounds[-1]) != (0, math.prod(shape)):
            raise ValueError(
                f"ranges with the bounds {bounds} do not make up a tensor of shape {shape}: give "
                f"ascending bounds from 0 to {math.prod(shape)}"
            )
        return cls(shape, (len(bounds) - 1,), (Split(0),), bounds=bounds)

    def held(self, coordinate: Coordinate) -> tuple[int, int]:
        """The range held at a coordinate, as its first element and the one after its last."""
        return self.bounds[coordinate[0]], self.bounds[coordinate[0] + 1]

    def local_shape(self, coordinate: Coordinate) -> tuple[int, ...]:
        """Shape of the local tensor at a coordinate."""
        start, stop = self.held(coordinate)
        return (stop - start,)

    def blocks(self, coordinate: Coordinate) -> tuple[Block, ...]:
        """The boxes held at a coordinate, in order: end of a row, whole rows, start of a row."""
        return _flat_blocks(self.shape, *self.held(coordinate))

    @property
    def holding(self) -> list[bool]:
        """Whether each rank holds any element, in rank order."""
        return [start < stop for start, stop in itertools.pairwise(self.bounds)]

    @property
    def holder(self) -> int | None:
        """The rank that holds all elements; None if several ranks hold some."""
        return self.holding.index(True) if sum(self.holding) == 1 else None

    def with_placement(self, mesh_dim: int, placement: Placement) -> Layout:
        """The layout with this placement of the only mesh dimension; local tensors are not flat."""
        return Layout(self.shape, self.mesh, (placement,))

    def rows(self, rows: tuple[range, ...]) -> Layout:
        """Not supported: some rows of a flat weight are not one range of its elements.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "splits of a weight in flat partitions are not supported: remove splits from its group"
        )

    def __str__(self) -> str:
        return f"[Flat({','.join(map(str, self.bounds))})]"


@dataclass(frozen=True, slots=True)
class Held(Layout):
    """A tensor of which some ranks of a 1-D mesh hold a copy, and the others nothing.

    Attributes:
        holders: whether each rank holds a copy, in rank order.
    """

    holders: tuple[bool, ...] = ()

    def local_shape(self, coordinate: Coordinate) -> tuple[int, ...]:
        """Shape of the local tensor at a coordinate."""
        return self.shape if self.holders[coordinate[0]] else (0, *self.shape[1:])

    def blocks(self, coordinate: Coordinate) -> tuple[Block, ...]:
        """One block with all elements, or none."""
        origin = (0,) * len(self.shape)
        return (Block(origin, self.shape, origin),) if self.holders[coordinate[0]] else ()

    def __str__(self) -> str:
        where = ",".join(str(rank) for rank, holds in enumerate(self.holders) if holds)
        return f"[Replicate() at {where}]"


def flat_to_compute(storage: Flat, single: int | None = None) -> tuple[Layout, tuple[Move, ...]]:
    """The compute layout of a flat weight, and the move to it if any element has to move.

    A rank computes each row of a tall weight (m >= n), or each matrix of a batch, whose first
    element it holds. So only rows or matrices that a boundary cuts have to move. The columns of a
    wide weight are divided evenly between the ranks that hold any of its elements.

    Args:
        storage: the layout of the weight.
        single: the rank that computes all of a matrix (m, n), for rules that need whole matrices.
    """
    shape, bounds, dim = storage.shape, storage.bounds, kept_dim(storage.shape)
    if single is not None:
        stays = storage.holder == single
        compute = storage.with_placement(0, Split(dim, among=(single, 1)))
    elif len(shape) == 2 and dim == 1:
        stays = storage.holder is not None
        even = _even_bounds(shape[-1], storage.holding)
        compute = storage.with_placement(0, Split(1, bounds=even))
    else:
        inner = math.prod(shape[1:])
        cuts = tuple(-(-bound // inner) for bound in bounds)
        stays = all(cut * inner == bound for cut, bound in zip(cuts, bounds, strict=True))
        compute = storage.with_placement(0, Split(0, bounds=cuts))
    return compute, () if stays else (Move(0, storage, compute),)


def flat_basis(compute: Layout, shard: bool) -> Layout:
    """The layout of the basis (r, r) of a flat weight (m, n), on the ranks that compute it.

    Args:
        compute: the weight's compute layout.
        shard: whether these ranks split the basis by rows; else each of them has a copy.
    """
    r = min(compute.shape)
    holders = tuple(bool(compute.numel(coordinate)) for coordinate in compute.coordinates())
    if shard and sum(holders) > 1:
        return Layout((r, r), compute.mesh, (Split(0, bounds=_even_bounds(r, holders)),))
    if all(holders):
        return Layout((r, r), compute.mesh, (None,))
    return Held((r, r), compute.mesh, (None,), holders=holders)


def _even_bounds(count: int, holding: Sequence[bool]) -> tuple[int, ...]:
    """Bounds that divide ``count`` rows or columns evenly between the ranks in ``holding``."""
    before, holders = itertools.accumulate(holding, initial=0), sum(holding)
    return tuple(count * rank // holders for rank in before)


@lru_cache(maxsize=65536)
def _flat_blocks(shape: tuple[int, ...], start: int, stop: int) -> tuple[Block, ...]:
    """The elements [start, stop) of a flattened tensor as boxes; local offsets begin at 0."""
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    blocks: list[Block] = []

    def add(prefix: tuple[int, ...], first: int, last: int) -> None:
        """Adds the elements [first, last) of the subtensor at the leading indices ``prefix``."""
        if first >= last:
            return
        dim = len(prefix)
        inner = strides[dim]
        if -(-first // inner) > last // inner:  # all inside one index of this dimension
            index = first // inner
            add((*prefix, index), first - index * inner, last - index * inner)
            return
        if first % inner:
            add((*prefix, first // inner), first % inner, inner)
        whole = -(-first // inner), last // inner
        if whole[0] < whole[1]:
            begin = (*prefix, whole[0], *(0 for _ in shape[dim + 1 :]))
            extent = (*(1 for _ in prefix), whole[1] - whole[0], *shape[dim + 1 :])
            offset = sum(i * stride for i, stride in zip(begin, strides, strict=True)) - start
            blocks.append(Block(begin, extent, (offset,), strides))
        add((*prefix, last // inner), 0, last % inner)

    add((), start, stop)
    return tuple(blocks)
