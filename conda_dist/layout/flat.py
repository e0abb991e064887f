"""Flat ranges of elements, one for each rank, as a layout: ZeRO's partitions.

Rows and matrices are cut anywhere, so what a rank holds is a few boxes of its flat local tensor.
Many ranks may hold nothing of a matrix: they have no part in its step. Pure, as ``layout`` is.
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
    """A tensor, flattened row by row, of which each rank of one mesh dimension holds a range.

    ZeRO's partitions are such ranges. The local tensor is flat: shape ``(elements,)``.

    Attributes:
        bounds: rank i holds the elements [bounds[i], bounds[i + 1]); ascending, from 0 to all.
    """

    bounds: tuple[int, ...] = ()

    @classmethod
    def of(cls, shape: tuple[int, ...], bounds: tuple[int, ...]) -> "Flat":
        """The layout of a tensor cut at ``bounds``.

        Raises:
            ValueError: the bounds do not ascend from 0 to the number of elements.
        """
        if list(bounds) != sorted(bounds) or (bounds[0], bounds[-1]) != (0, math.prod(shape)):
            raise ValueError(f"ranges cut at {bounds} do not make up a tensor of shape {shape}")
        return cls(shape, (len(bounds) - 1,), (Split(0),), bounds=bounds)

    def held(self, coordinate: Coordinate) -> tuple[int, int]:
        """First element held at a coordinate, and the one after the last."""
        return self.bounds[coordinate[0]], self.bounds[coordinate[0] + 1]

    def local_shape(self, coordinate: Coordinate) -> tuple[int, ...]:
        """Shape of the local tensor at a coordinate."""
        start, stop = self.held(coordinate)
        return (stop - start,)

    def blocks(self, coordinate: Coordinate) -> tuple[Block, ...]:
        """The boxes held at a coordinate, in order: the rest of a row, whole rows, part of one."""
        return _flat_blocks(self.shape, *self.held(coordinate))

    def move(self, mesh_dim: int, placement: Placement) -> Layout:
        """A layout of shaped local tensors with this placement of the one mesh dimension."""
        return Layout(self.shape, self.mesh, (placement,))

    def rows(self, rows: tuple[range, ...]) -> Layout:
        """Not to be had: parts of a flat weight are no ranges.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("blocks of rows of a weight in flat partitions are not supported")

    def __str__(self) -> str:
        return f"[Flat({','.join(map(str, self.bounds))})]"


@dataclass(frozen=True, slots=True)
class Held(Layout):
    """A tensor that some ranks of one mesh dimension hold whole, and the others nothing of.

    Attributes:
        holders: for each rank whether it holds the tensor.
    """

    holders: tuple[bool, ...] = ()

    def local_shape(self, coordinate: Coordinate) -> tuple[int, ...]:
        """Shape of the local tensor at a coordinate."""
        return self.shape if self.holders[coordinate[0]] else (0, *self.shape[1:])

    def blocks(self, coordinate: Coordinate) -> tuple[Block, ...]:
        """All of it, or nothing."""
        origin = (0,) * len(self.shape)
        return (Block(origin, self.shape, origin),) if self.holders[coordinate[0]] else ()

    def __str__(self) -> str:
        where = ",".join(str(rank) for rank, holds in enumerate(self.holders) if holds)
        return f"[Replicate() at {where}]"


def flat_to_compute(storage: Flat) -> tuple[Layout, tuple[Move, ...]]:
    """The compute layout of a flat weight, and the move to it if any element has to move.

    Rows of a tall weight, and matrices of a batch, are computed where their first element is: so
    only those that a boundary cuts travel. The columns of a wide one are shared out evenly among
    those that hold any of it.
    """
    shape, bounds = storage.shape, storage.bounds
    holding = [start < stop for start, stop in itertools.pairwise(bounds)]
    if len(shape) == 2 and kept_dim(shape) == 1:
        stays = sum(holding) == 1
        compute = storage.move(0, Split(1, bounds=_share_out(shape[-1], holding)))
    else:
        inner = math.prod(shape[1:])
        cuts = tuple(-(-bound // inner) for bound in bounds)
        stays = all(cut * inner == bound for cut, bound in zip(cuts, bounds, strict=True))
        compute = storage.move(0, Split(0, bounds=cuts))
    return compute, () if stays else (Move(0, storage, compute),)


def flat_basis(compute: Layout, shard: bool) -> Layout:
    """Where the basis of a flat weight (m, n) is kept: with those who compute any of it.

    Args:
        compute: the weight's compute layout.
        shard: whether they share it instead of having all of it each.
    """
    r = min(compute.shape)
    holders = tuple(bool(compute.numel(coordinate)) for coordinate in compute.coordinates())
    if shard and sum(holders) > 1:
        return Layout((r, r), compute.mesh, (Split(0, bounds=_share_out(r, holders)),))
    if all(holders):
        return Layout((r, r), compute.mesh, (None,))
    return Held((r, r), compute.mesh, (None,), holders=holders)


def _share_out(count: int, holding: Sequence[bool]) -> tuple[int, ...]:
    """Where to cut rows or columns so that all ranks that hold something get about as many."""
    before, holders = itertools.accumulate(holding, initial=0), sum(holding)
    return tuple(count * rank // holders for rank in before)


@lru_cache(maxsize=65536)
def _flat_blocks(shape: tuple[int, ...], start: int, stop: int) -> tuple[Block, ...]:
    """The elements [start, stop) of a flattened tensor as boxes; offsets count from ``start``."""
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    blocks: list[Block] = []

    def add(prefix: tuple[int, ...], first: int, last: int) -> None:
        """Adds elements [first, last) of what ``prefix`` selects."""
        if first >= last:
            return
        dim = len(prefix)
        inner = strides[dim]
        if -(-first // inner) > last // inner:  # all inside one row
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
