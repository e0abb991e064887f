"""Which strided copies pack boxes of tensors into one buffer, and unpack them. Pure.

A rank that redistributes a tensor sends some boxes of it to each peer (another rank along the mesh
dimension). The boxes for consecutive peers mostly have the same shape, and begin at a constant step
in the tensor and in the buffer. A :class:`Grid` describes all of them at once, so a single strided
copy packs them, however many peers there are.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import add, mul, sub
from typing import TypeAlias

from conda_dist.layout.layout import (
    Block,
    Coordinate,
    Copies,
    Layout,
    dim_runs,
    even_pieces,
    overlaps,
)

Vector: TypeAlias = tuple[int, ...]
"""An index into a tensor, or a difference of two: one number for each dimension."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Elements of one tensor, and where the same elements are in a second tensor or in a buffer.

    Element (i, j, ...) of the grid is at ``start + i * steps[0] + j * steps[1] + ...``.

    Attributes:
        shape: how many elements there are along each axis of the grid. The inner axes are those of
            a box; outer axes may count boxes or peers.
        steps: for each axis the change of the index when the axis advances by one.
        start: the first element's index in the first tensor, followed by that in the second one (a
            buffer has one dimension).
    """

    shape: Vector
    steps: tuple[Vector, ...]
    start: Vector


@dataclass(slots=True)
class _Progression:
    """Grids of one shape and one set of steps, whose starts are at constant steps."""

    first: Grid
    last: Vector
    step: Vector = ()
    count: int = 1

    def extend(self, start: Vector) -> bool:
        """Adds a grid if its step is the common one and not negative (a stride cannot be)."""
        step = tuple(map(sub, start, self.last))
        if (self.step and step != self.step) or min(step) < 0:
            return False
        self.last, self.step, self.count = start, step, self.count + 1
        return True

    @property
    def grid(self) -> Grid:
        """All of them as one grid, with one more axis if there are several."""
        if self.count == 1:
            return self.first
        shape, steps = (self.count, *self.first.shape), (self.step, *self.first.steps)
        return Grid(shape, steps, self.first.start)


def merge(grids: Iterable[Grid]) -> tuple[Grid, ...]:
    """Joins grids of equal shape, whose starts are at constant steps, into one with more axes."""
    grids = tuple(grids)
    while True:
        found: list[_Progression] = []
        last: dict[tuple[Vector, tuple[Vector, ...]], _Progression] = {}
        for grid in grids:
            key = grid.shape, grid.steps
            if key not in last or not last[key].extend(grid.start):
                last[key] = _Progression(grid, grid.start)
                found.append(last[key])
        if len(found) == len(grids):
            return grids
        grids = tuple(progression.grid for progression in found)


@dataclass(frozen=True, slots=True)
class PeerRange:
    """What a rank exchanges with each of some consecutive peers: boxes of the same shapes.

    Attributes:
        first: index of the first peer along the mesh dimension.
        count: number of peers.
        step: from each peer to the next, the change of the boxes' index in the local tensor.
        grids: the boxes of the first peer: from the rank's local tensor to the elements of this
            tensor that it exchanges with the peer, packed from offset 0.
        numel: number of elements for each peer.
    """

    first: int
    count: int
    step: Vector
    grids: tuple[Grid, ...]
    numel: int


def chunked_peers(
    mine: Layout, theirs: Layout, mesh_dim: int, coordinate: Coordinate, peers: range
) -> tuple[PeerRange, ...]:
    """The boxes that a rank's local tensor shares with those of its peers.

    Args:
        mine: layout of the rank's local tensor; of placements only, neither Flat nor Held.
        theirs: layout of the peers' local tensors; of placements only, too.
        mesh_dim: the mesh dimension along which the peers differ.
        coordinate: the rank.
        peers: the indices along ``mesh_dim`` of the peers to consider.
    """
    placement = theirs.placements[mesh_dim]
    dims = range(len(mine.shape))
    ours = [dim_runs(mine, dim, coordinate) for dim in dims]
    # Peers differ only in the indices of the tensor dimension that mesh_dim splits: what all other
    # dimensions share is the same for every peer.
    common = [_common(ours[d], dim_runs(theirs, d, coordinate)) for d in dims]
    if placement is None:
        grids, numel = _packed(common)
        if not numel:
            return ()
        return (PeerRange(peers.start, len(peers), (0,) * len(dims), grids, numel),)
    # Under Copies, a rank without a copy has no index of dimension 0 (see dim_runs).
    dim, found = 0 if isinstance(placement, Copies) else placement.dim, []
    for peer, count, step, pieces in _shared(ours[dim], theirs, dim, mesh_dim, coordinate, peers):
        common[dim] = pieces
        grids, numel = _packed(common)
        if numel:
            steps = tuple(step if d == dim else 0 for d in dims)
            found.append(PeerRange(peer, count, steps, grids, numel))
    return tuple(found)


Pieces: TypeAlias = list[tuple[int, int]]
"""Ranges of indices of one dimension: ``(start in the local tensor, length)`` of each."""


def _common(ours: Sequence[range], theirs: Sequence[range]) -> Pieces:
    """The pieces of our local tensor that theirs has, too."""
    return [(begin, length) for begin, _, length in overlaps(ours, theirs)]


def _shared(
    ours: tuple[range, ...],
    theirs: Layout,
    dim: int,
    mesh_dim: int,
    coordinate: Coordinate,
    peers: range,
) -> Iterator[tuple[int, int, int, Pieces]]:
    """The pieces of dimension ``dim`` that a rank shares with its peers.

    Yields:
        ``(first peer, count, step, pieces shared with the first)`` for consecutive peers that share
        pieces of the same lengths at a constant step.
    """
    even = even_pieces(theirs, dim, mesh_dim, coordinate) if len(ours) == 1 else None
    if even is not None:
        yield from _shared_evenly(ours[0], *even, peers)
        return
    before: tuple[int, int, int, Pieces] | None = None
    for peer in peers:
        there = dim_runs(theirs, dim, (*coordinate[:mesh_dim], peer, *coordinate[mesh_dim + 1 :]))
        pieces = _common(ours, there)
        if before is not None:
            first, count, step, start = before
            shift = _shift(start, pieces)
            if shift is not None and (count == 1 or shift == step * count) and shift >= 0:
                before = (first, count + 1, shift if count == 1 else step, start)
                continue
            yield before
        before = (peer, 1, 0, pieces)
    if before is not None:
        yield before


def _shared_evenly(
    ours: range, whole: range, size: int, least: int, peers: range
) -> Iterator[tuple[int, int, int, Pieces]]:
    """:func:`_shared` if peers cut ``whole`` into pieces of ``size``, from peer ``least`` on."""
    low = max(ours.start, whole.start) - whole.start
    high = min(ours.stop, whole.stop) - whole.start
    if low >= high:
        return
    # Our run covers the end of one peer's piece, then whole pieces, then the start of a last one.
    edges = {low, min(-(-low // size) * size, high), max(high // size * size, low), high}
    for start, stop in itertools.pairwise(sorted(edges)):
        peer, count = least + start // size, max((stop - start) // size, 1)
        kept = range(max(peer, peers.start), min(peer + count, peers.stop))
        if kept:
            begin = start + whole.start - ours.start + (kept.start - peer) * size
            yield kept.start, len(kept), size, [(begin, min(stop - start, size))]


def _shift(before: Pieces, after: Pieces) -> int | None:
    """The distance from pieces ``before`` to pieces ``after``; None if it is not constant."""
    if len(before) != len(after):
        return None
    shifts = {(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)} or {(0, 0)}
    (shift, longer), *others = shifts
    return None if others or longer else shift


def _packed(dims: Sequence[Pieces]) -> tuple[tuple[Grid, ...], int]:
    """Grids that pack boxes one after another into a buffer, and their number of elements.

    Args:
        dims: the pieces of each dimension. Each combination of pieces is a box.
    """
    units, offset, grids = _units(len(dims)), 0, []
    for box in itertools.product(*dims):
        shape = tuple(length for *_, length in box)
        strides = _contiguous(shape)
        steps = tuple((*unit, stride) for unit, stride in zip(units, strides, strict=True))
        grids.append(Grid(shape, steps, (*(start for start, _ in box), offset)))
        offset += math.prod(shape)
    return merge(grids), offset


def _units(count: int) -> tuple[Vector, ...]:
    """The unit vectors: the step of an index when dimension i of an array advances by one."""
    return tuple(tuple(int(i == j) for j in range(count)) for i in range(count))


def _contiguous(shape: Vector) -> Vector:
    """Strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def block_peers(pairs: Iterable[tuple[int, Sequence[Block]]]) -> tuple[PeerRange, ...]:
    """Like :func:`chunked_peers`, for layouts of any kind, from boxes that were found before.

    Args:
        pairs: the peers in ascending order, each with the boxes of this rank's local tensor that it
            shares with that peer.
    """
    ranges: list[PeerRange] = []
    for peer, blocks in pairs:
        offset, grids = 0, []
        for block in blocks:
            grids.append(_block_grid(block, offset))
            offset += math.prod(block.shape)
        if offset:
            new = PeerRange(peer, 1, (0,) * len(blocks[0].local), merge(grids), offset)
            if not ranges or (joined := _join(ranges[-1], new)) is None:
                ranges.append(new)
            else:
                ranges[-1] = joined
    return tuple(ranges)


def _block_grid(block: Block, offset: int) -> Grid:
    """A box as a grid, from the local tensor to a buffer in which it begins at ``offset``."""
    strides = _contiguous(block.shape)
    local = _local_steps(block)
    steps = tuple((*step, stride) for step, stride in zip(local, strides, strict=True))
    return Grid(block.shape, steps, (*block.local, offset))


def _local_steps(block: Block) -> tuple[Vector, ...]:
    """The step of each dimension of a box in its local tensor, which may be flat."""
    if block.strides is None:
        return _units(len(block.shape))
    return tuple((stride,) for stride in block.strides)


def _join(peers: PeerRange, new: PeerRange) -> PeerRange | None:
    """A range of peers extended by ``new``, the next peer; None if its boxes do not fit."""
    if new.first != peers.first + peers.count or len(new.grids) != len(peers.grids):
        return None
    shifts = set()
    for before, after in zip(peers.grids, new.grids, strict=True):
        if (before.shape, before.steps) != (after.shape, after.steps):
            return None
        shifts.add(tuple(map(sub, after.start, before.start)))
    (*shift, packed), *others = shifts
    if others or packed or min(shift) < 0:
        return None
    step = tuple(shift) if peers.count == 1 else peers.step
    if tuple(shift) != tuple(peers.count * s for s in step):
        return None
    return PeerRange(peers.first, peers.count + 1, step, peers.grids, peers.numel)


def chunked_stay(source: Layout, target: Layout, coordinate: Coordinate) -> tuple[Grid, ...]:
    """The elements that a rank holds in both layouts: from its old local tensor to its new one."""
    dims = range(len(source.shape))
    both = [
        overlaps(dim_runs(source, d, coordinate), dim_runs(target, d, coordinate)) for d in dims
    ]
    steps = tuple(unit * 2 for unit in _units(len(dims)))
    return merge(
        Grid(
            tuple(length for *_, length in box),
            steps,
            (*(old for old, _, _ in box), *(new for _, new, _ in box)),
        )
        for box in itertools.product(*both)
    )


def block_stay(pairs: Iterable[tuple[Block, Block]]) -> tuple[Grid, ...]:
    """Like :func:`chunked_stay`, for layouts of any kind.

    Args:
        pairs: the same box in the old and in the new local tensor.
    """
    return merge(
        Grid(
            old.shape,
            tuple(a + b for a, b in zip(_local_steps(old), _local_steps(new), strict=True)),
            old.local + new.local,
        )
        for old, new in pairs
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where the elements of a grid are in one tensor of any strides.

    Attributes:
        start: index of the first element.
        steps: for each axis of the grid the change of the index.
        known: a cache: from the tensor's strides to the grid's ``(offset, strides)`` in elements.
    """

    start: Vector
    steps: tuple[Vector, ...]
    known: dict[Vector, tuple[int, Vector]] = field(default_factory=dict, compare=False, repr=False)

    def elements(self, strides: Vector) -> tuple[int, Vector]:
        """Offset and strides, in elements, of the grid in a tensor with these strides."""
        found = self.known.get(strides)
        if found is None:
            if len(self.known) >= 64:  # the caller may pass other strides in every step
                self.known.clear()
            offset = sum(map(mul, self.start, strides))
            found = offset, tuple(sum(map(mul, step, strides)) for step in self.steps)
            self.known[strides] = found
        return found


@dataclass(frozen=True, slots=True)
class Copy:
    """One strided copy between a local tensor and a packed buffer, or a new local tensor.

    Attributes:
        shape: shape of the two strided views.
        local: the place of the elements in the local tensor.
        other: their place in the packed buffer, or in the new local tensor.
    """

    shape: Vector
    local: Place
    other: Place

    @classmethod
    def of(cls, grid: Grid, dims: int) -> "Copy":
        """The copy of a grid; the first ``dims`` numbers of an index are the local tensor's."""
        local = Place(grid.start[:dims], tuple(step[:dims] for step in grid.steps))
        other = Place(grid.start[dims:], tuple(step[dims:] for step in grid.steps))
        return cls(grid.shape, local, other)


def lay_out(
    tensors: Sequence[Sequence[PeerRange]], size: int, without: int | None
) -> tuple[list[int], list[tuple[Copy, ...]]]:
    """Lays out tensors in one buffer: peer after peer, and for each peer tensor after tensor.

    Args:
        tensors: for each tensor the boxes that the rank exchanges with its peers.
        size: number of ranks along the mesh dimension, this one included.
        without: index of a rank that is left out of the buffer; None to leave out none.

    Returns:
        The number of elements for each peer, and for each tensor the copies between it and the
        buffer.
    """
    cuts = {0, size} | {
        edge
        for ranges in tensors
        for peers in ranges
        for edge in (peers.first, peers.first + peers.count)
    }
    if without is not None:
        cuts |= {without, without + 1}
    bounds = sorted(cuts)
    # All peers between two neighbouring bounds get the same number of elements of every tensor.
    place = {bound: i for i, bound in enumerate(bounds)}
    filled = [0] * (len(bounds) - 1)
    offsets = []
    for ranges in tensors:
        offsets.append(tuple(filled))
        for peers in ranges:
            for i in range(place[peers.first], place[peers.first + peers.count]):
                filled[i] += peers.numel
    if without is not None:
        filled[place[without]] = 0
    lengths = list(map(sub, bounds[1:], bounds))
    starts = list(itertools.accumulate(map(mul, filled, lengths), initial=0))
    sizes = [n for n, length in zip(filled, lengths, strict=True) for _ in range(length)]
    copies = []
    for ranges, before in zip(tensors, offsets, strict=True):
        grids: list[Grid] = []
        for peers in ranges:
            for i in range(place[peers.first], place[peers.first + peers.count]):
                if bounds[i] != without:
                    grids += _placed(peers, bounds[i], lengths[i], starts[i] + before[i], filled[i])
        dims = len(ranges[0].step) if ranges else 0
        copies.append(tuple(Copy.of(grid, dims) for grid in merge(grids)))
    return sizes, copies


def _placed(peers: PeerRange, peer: int, count: int, start: int, numel: int) -> Iterator[Grid]:
    """Grids from the local tensor to the buffer, for ``count`` peers of a range from ``peer`` on.

    Args:
        peers: the range.
        peer: the first peer to place.
        count: number of peers to place.
        start: offset of this tensor's elements for that peer in the buffer.
        numel: number of elements of all tensors that the buffer has for each peer.
    """
    later = tuple((peer - peers.first) * step for step in peers.step)
    for grid in peers.grids:
        *local, offset = grid.start
        begin = (*map(add, local, later), start + offset)
        if count == 1:
            yield Grid(grid.shape, grid.steps, begin)
        else:
            step = (*peers.step, numel)
            yield Grid((count, *grid.shape), (step, *grid.steps), begin)
