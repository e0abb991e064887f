"""Where the elements of a tensor are in a packed buffer: progressions, each of which is one copy.

A rank that redistributes a tensor sends boxes of it to each peer. The boxes of peers that follow
each other have the same shape, and begin at constant steps in the tensor and in the buffer, so one
strided copy packs them all, however many peers there are. Pure, as ``layout`` is.
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


@dataclass(frozen=True, slots=True)
class Grid:
    """Elements of one tensor, and where they are in another tensor or in a buffer.

    Attributes:
        shape: how many there are along each axis of the grid; outer axes may count boxes or ranks.
        steps: for each axis the step of ``start``.
        start: indices of the first element in the one tensor, then those in the other.
    """

    shape: Vector
    steps: tuple[Vector, ...]
    start: Vector


@dataclass(slots=True)
class _Progression:
    """Grids of one shape at constant steps from each other."""

    first: Grid
    last: Vector
    step: Vector = ()
    count: int = 1

    def extend(self, start: Vector) -> bool:
        """Takes one more grid if its step is that of the others; no strided view goes back."""
        step = tuple(map(sub, start, self.last))
        if (self.step and step != self.step) or min(step) < 0:
            return False
        self.last, self.step, self.count = start, step, self.count + 1
        return True

    @property
    def grid(self) -> Grid:
        if self.count == 1:
            return self.first
        shape, steps = (self.count, *self.first.shape), (self.step, *self.first.steps)
        return Grid(shape, steps, self.first.start)


def merge(grids: Iterable[Grid]) -> tuple[Grid, ...]:
    """Joins grids that are alike and at constant steps from each other into one of more axes."""
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
    """Peers with alike boxes: what a rank sends to each of them, or receives from it.

    Attributes:
        first: the first of them.
        count: how many peers there are, one after another.
        step: by how much the boxes of a peer begin later in the local tensor than those of the
            peer before.
        grids: boxes of the first peer. Each starts in the local tensor, and in what the rank
            exchanges of this tensor with the peer.
        numel: elements for each peer.
    """

    first: int
    count: int
    step: Vector
    grids: tuple[Grid, ...]
    numel: int


def chunked_peers(
    mine: Layout, theirs: Layout, mesh_dim: int, coordinate: Coordinate, peers: range
) -> tuple[PeerRange, ...]:
    """The boxes that a rank shares with its peers, where both layouts are made of placements.

    Args:
        mine: layout of the rank's own local tensor.
        theirs: layout of the peers'.
        mesh_dim: the mesh dimension along which the peers are.
        coordinate: the rank.
        peers: the indices of those with which it exchanges anything.
    """
    placement = theirs.placements[mesh_dim]
    dims = range(len(mine.shape))
    ours = [dim_runs(mine, dim, coordinate) for dim in dims]
    # Whoever is asked, only the dimension that this mesh dimension splits has other indices.
    common = [_common(ours[d], dim_runs(theirs, d, coordinate)) for d in dims]
    if placement is None:
        grids, numel = _packed(common)
        if not numel:
            return ()
        return (PeerRange(peers.start, len(peers), (0,) * len(dims), grids, numel),)
    # Those that hold no copy have no index of the first dimension.
    dim, found = 0 if isinstance(placement, Copies) else placement.dim, []
    for peer, count, step, pieces in _shared(ours[dim], theirs, dim, mesh_dim, coordinate, peers):
        common[dim] = pieces
        grids, numel = _packed(common)
        if numel:
            steps = tuple(step if d == dim else 0 for d in dims)
            found.append(PeerRange(peer, count, steps, grids, numel))
    return tuple(found)


Pieces: TypeAlias = list[tuple[int, int]]
"""Runs of indices of one dimension: where each begins in the local tensor, and its length."""


def _common(ours: Sequence[range], theirs: Sequence[range]) -> Pieces:
    return [(begin, length) for begin, _, length in overlaps(ours, theirs)]


def _shared(
    ours: tuple[range, ...],
    theirs: Layout,
    dim: int,
    mesh_dim: int,
    coordinate: Coordinate,
    peers: range,
) -> Iterator[tuple[int, int, int, Pieces]]:
    """Peers, how many, their step and the pieces of one dimension shared with the first."""
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
    """The same where the peers from ``least`` on have pieces of ``whole``, ``size`` long each."""
    low = max(ours.start, whole.start) - whole.start
    high = min(ours.stop, whole.stop) - whole.start
    if low >= high:
        return
    # Part of a piece, whole pieces, part of a piece.
    edges = {low, min(-(-low // size) * size, high), max(high // size * size, low), high}
    for start, stop in itertools.pairwise(sorted(edges)):
        peer, count = least + start // size, max((stop - start) // size, 1)
        kept = range(max(peer, peers.start), min(peer + count, peers.stop))
        if kept:
            begin = start + whole.start - ours.start + (kept.start - peer) * size
            yield kept.start, len(kept), size, [(begin, min(stop - start, size))]


def _shift(before: Pieces, after: Pieces) -> int | None:
    """By how much pieces begin later than others of the same lengths; None if they are not so."""
    if len(before) != len(after):
        return None
    shifts = {(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)} or {(0, 0)}
    (shift, longer), *others = shifts
    return None if others or longer else shift


def _packed(dims: Sequence[Pieces]) -> tuple[tuple[Grid, ...], int]:
    """Boxes one after another in a buffer, and their elements; the boxes are all combinations."""
    units, offset, grids = _units(len(dims)), 0, []
    for box in itertools.product(*dims):
        shape = tuple(length for *_, length in box)
        strides = _contiguous(shape)
        steps = tuple((*unit, stride) for unit, stride in zip(units, strides, strict=True))
        grids.append(Grid(shape, steps, (*(start for start, _ in box), offset)))
        offset += math.prod(shape)
    return merge(grids), offset


def _units(count: int) -> tuple[Vector, ...]:
    """The step of each dimension of an array along itself."""
    return tuple(tuple(int(i == j) for j in range(count)) for i in range(count))


def _contiguous(shape: Vector) -> Vector:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def block_peers(pairs: Iterable[tuple[int, Sequence[Block]]]) -> tuple[PeerRange, ...]:
    """The same for boxes of any layouts.

    Args:
        pairs: peers, in order, and the boxes of this rank's local tensor that it exchanges with
            each.
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
    strides = _contiguous(block.shape)
    local = _local_steps(block)
    steps = tuple((*step, stride) for step, stride in zip(local, strides, strict=True))
    return Grid(block.shape, steps, (*block.local, offset))


def _local_steps(block: Block) -> tuple[Vector, ...]:
    """The step of each dimension of a box in the local tensor that it is in."""
    if block.strides is None:
        return _units(len(block.shape))
    return tuple((stride,) for stride in block.strides)


def _join(peers: PeerRange, new: PeerRange) -> PeerRange | None:
    """A range of peers and the next peer as one; None where that peer's boxes are not alike."""
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
    """What a rank has of a tensor in both layouts: from the old local tensor to the new one."""
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
    """The same for boxes of any layouts: each in the old local tensor and in the new one."""
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
    """Where the elements of a grid are in one tensor, whatever its strides.

    Attributes:
        start: indices of the first element.
        steps: for each axis of the grid the step of the indices.
        known: offset and strides in elements, by the strides of the tensor.
    """

    start: Vector
    steps: tuple[Vector, ...]
    known: dict[Vector, tuple[int, Vector]] = field(default_factory=dict, compare=False, repr=False)

    def elements(self, strides: Vector) -> tuple[int, Vector]:
        """Offset and strides of the grid in a tensor of these strides."""
        found = self.known.get(strides)
        if found is None:
            if len(self.known) >= 64:  # a view of another tensor in every step
                self.known.clear()
            offset = sum(map(mul, self.start, strides))
            found = offset, tuple(sum(map(mul, step, strides)) for step in self.steps)
            self.known[strides] = found
        return found


@dataclass(frozen=True, slots=True)
class Copy:
    """One strided copy.

    Attributes:
        shape: of both views.
        local: its place in a local tensor.
        other: its place in the packed buffer, or in the new local tensor.
    """

    shape: Vector
    local: Place
    other: Place

    @classmethod
    def of(cls, grid: Grid, dims: int) -> "Copy":
        """The copy of a grid of which the first ``dims`` indices are the local tensor's."""
        local = Place(grid.start[:dims], tuple(step[:dims] for step in grid.steps))
        other = Place(grid.start[dims:], tuple(step[dims:] for step in grid.steps))
        return cls(grid.shape, local, other)


def lay_out(
    tensors: Sequence[Sequence[PeerRange]], size: int, without: int | None
) -> tuple[list[int], list[tuple[Copy, ...]]]:
    """Lays tensors out in one buffer: what each peer gets is in one piece, tensor after tensor.

    Args:
        tensors: for each tensor the boxes exchanged with each peer.
        size: how many peers there are, this rank included.
        without: the peer that gets nothing; None for none.

    Returns:
        Elements for each peer, and for each tensor the copies between it and the buffer.
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
    # All peers between two bounds get as many elements of every tensor.
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
    """The boxes of some peers of a range, in a buffer of ``numel`` elements for each."""
    later = tuple((peer - peers.first) * step for step in peers.step)
    for grid in peers.grids:
        *local, offset = grid.start
        begin = (*map(add, local, later), start + offset)
        if count == 1:
            yield Grid(grid.shape, grid.steps, begin)
        else:
            step = (*peers.step, numel)
            yield Grid((count, *grid.shape), (step, *grid.steps), begin)
