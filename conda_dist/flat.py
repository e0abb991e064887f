"""Flat ranges of elements, one for each rank, as a layout: ZeRO's partitions.

Rows and matrices are cut anywhere, so what a rank holds is a few boxes of its flat local tensor.
Pure, as ``layout`` is.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from conda_dist.layout import Block, Coordinate, Layout, Split


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
        return cls(shape, (len(bounds) - 1,), (Split(0),), None, bounds)

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

    def move(self, mesh_dim: int, placement: Split | None) -> Layout:
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
