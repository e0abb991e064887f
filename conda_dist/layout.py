"""Where the elements of a tensor live: pure descriptions, no tensors and no communication.

A :class:`Layout` says which elements of a global tensor each coordinate of a device mesh holds.
DTensor placements, a plain tensor (no mesh) and DDP (replicated over one mesh dimension) are all
layouts. :func:`to_compute` derives the layout Conda computes in, as the :class:`Move` s along one
mesh dimension each that lead there.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TypeAlias

Coordinate: TypeAlias = tuple[int, ...]
"""A rank's position in a device mesh, one index per mesh dimension."""


@dataclass(frozen=True, slots=True)
class Topology:
    """The ranks that share a parameter, as a device mesh.

    Attributes:
        sizes: ranks along each mesh dimension; ``()`` for one process.
        ranks: the global rank at every coordinate, in row-major order.
    """

    sizes: tuple[int, ...] = ()
    ranks: tuple[int, ...] = (0,)

    def rank_at(self, coordinate: Coordinate) -> int:
        """Global rank at a coordinate."""
        index = 0
        for size, i in zip(self.sizes, coordinate, strict=True):
            index = index * size + i
        return self.ranks[index]


def nested(topologies: Iterable[Topology]) -> list[tuple[Topology, list[Topology]]]:
    """Every topology once, the largest first, with those before it that contain all its ranks.

    What is decided for a topology may depend on those only: its other ranks may not know more.
    """
    ordered = sorted(set(topologies), key=lambda t: (-len(t.ranks), t.ranks, t.sizes))
    return [
        (topology, [t for t in ordered[:i] if set(topology.ranks) <= set(t.ranks)])
        for i, topology in enumerate(ordered)
    ]


@dataclass(frozen=True, slots=True)
class Split:
    """A mesh dimension that splits a tensor dimension, as ``torch.chunk`` would or where told.

    Attributes:
        dim: the tensor dimension, not negative.
        stride: 1, or the number of equal pieces that later mesh dimensions cut the tensor
            dimension into before this one splits each piece: DTensor's ``_StridedShard``, whose
            ``split_factor`` this is. FSDP over tensor parallelism produces it.
        bounds: () for ``torch.chunk``'s pieces, else where they begin and the last one ends: one
            number more than there are ranks, ascending. Only with a stride of 1.
    """

    dim: int
    stride: int = 1
    bounds: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.stride > 1:
            return f"_StridedShard({self.dim}, sf={self.stride})"
        cuts = f" at {','.join(map(str, self.bounds))}" if self.bounds else ""
        return f"Shard({self.dim}{cuts})"


@dataclass(frozen=True, slots=True)
class Block:
    """A box of elements that one rank holds.

    Attributes:
        start: first index of the box in the global tensor.
        shape: extent of the box.
        local: first index of the box in the rank's local tensor; the offset of its first element
            where that tensor is flat.
        strides: None, or for a box in a flat tensor its strides there.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    local: tuple[int, ...]
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Which elements of a tensor each coordinate of a mesh holds.

    Attributes:
        shape: shape of the global tensor.
        mesh: sizes of the mesh dimensions; ``()`` for a tensor of one process.
        placements: for each mesh dimension what it splits, or None where it replicates. Applied
            from left to right, as DTensor does.
        window: for some rows (dimension -2) of a larger tensor, which is what the placements
            split: which rows, ascending, and how many there are in all.
        kernel: for a convolution kernel (out, in, ...) that is seen as a matrix
            (out, in * ...): the kernel's shape; else ().
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: tuple[Split | None, ...]
    window: tuple[tuple[range, ...], int] | None = None
    kernel: tuple[int, ...] = ()

    def rows(self, rows: tuple[range, ...]) -> "Layout":
        """Some rows of a tensor (..., m, n) as a tensor of their own, where they are."""
        shape = (*self.shape[:-2], sum(map(len, rows)), self.shape[-1])
        return replace(self, shape=shape, window=(rows, self.shape[-2]))

    @property
    def whole(self) -> "Layout":
        """The layout of the stored tensor of which this is a part or a view; else this one."""
        return replace(self, shape=self.kernel or self.split_shape, window=None, kernel=())

    def as_matrix(self) -> "Layout":
        """A kernel (out, in, ...) as the matrix (out, in * ...), where it is.

        Raises:
            ValueError: it is split in a dimension other than the first two, or unevenly in the
                second, so that some rank's elements are no even part of the matrix's columns.
        """
        ways = math.prod(self.mesh[d] for d in self.splitting(1))
        others = [p for p in self.placements if p is not None and p.dim > 1]
        if others or self.shape[1] % ways:
            raise ValueError(
                f"a kernel {self.shape} in the layout {self} cannot be seen as a matrix "
                "(out, in * k * k): shard dimension 0, or dimension 1 where it divides evenly"
            )
        shape = (self.shape[0], math.prod(self.shape[1:]))
        return replace(self, shape=shape, kernel=self.shape)

    @property
    def split_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that the placements split."""
        if self.window is None:
            return self.shape
        return (*self.shape[:-2], self.window[1], self.shape[-1])

    def spans(self, coordinate: Coordinate) -> tuple[tuple[int, int], ...]:
        """Where these rows are among those a coordinate holds of the larger tensor.

        Returns:
            First row in the local tensor and number of rows, of each run.
        """
        assert self.window is not None
        spans: list[tuple[int, int]] = []
        offset = 0
        for run in _split_runs(self, coordinate)[-2]:
            for rows in self.window[0]:
                if common := range(max(run.start, rows.start), min(run.stop, rows.stop)):
                    start = offset + common.start - run.start
                    if spans and sum(spans[-1]) == start:
                        spans[-1] = (spans[-1][0], spans[-1][1] + len(common))
                    else:
                        spans.append((start, len(common)))
            offset += len(run)
        return tuple(spans)

    def move(self, mesh_dim: int, placement: Split | None) -> "Layout":
        """This layout with the placement of one mesh dimension exchanged for another."""
        placements = list(self.placements)
        placements[mesh_dim] = placement
        return replace(self, placements=tuple(placements))

    def splitting(self, dim: int) -> tuple[int, ...]:
        """Mesh dimensions that split tensor dimension ``dim``, the outermost cut first.

        A strided split cuts inside the later mesh dimensions its stride counts, so it comes after
        them.
        """
        order: list[int] = []
        for mesh_dim in reversed(range(len(self.mesh))):
            placement = self.placements[mesh_dim]
            if placement is None or placement.dim != dim:
                continue
            outside, remaining = 0, placement.stride
            while remaining > 1 and outside < len(order):
                remaining //= self.mesh[order[outside]]
                outside += 1
            order.insert(outside, mesh_dim)
        return tuple(order)

    def local_shape(self, coordinate: Coordinate) -> tuple[int, ...]:
        """Shape of the local tensor at a coordinate."""
        return tuple(sum(map(len, runs)) for runs in _runs(self, coordinate))

    def blocks(self, coordinate: Coordinate) -> tuple[Block, ...]:
        """The boxes held at a coordinate, in the order of the local tensor; no empty ones."""
        return _blocks(self, coordinate)

    def numel(self, coordinate: Coordinate) -> int:
        """Elements held at a coordinate."""
        return math.prod(self.local_shape(coordinate))

    def matrices(self, coordinate: Coordinate) -> tuple[int, ...]:
        """Which matrices of the batch an (..., m, n) tensor is are held at a coordinate.

        Row-major indices over the leading dimensions, in the order of the local tensor; ``(0,)``
        for a tensor of two dimensions.
        """
        runs = _runs(self, coordinate)[:-2]
        indices: tuple[int, ...] = (0,)
        for size, held in zip(self.shape, runs, strict=False):
            indices = tuple(i * size + j for i in indices for run in held for j in run)
        return indices

    def coordinates(self) -> Iterator[Coordinate]:
        """Every coordinate of the mesh, in rank order."""
        return product(*map(range, self.mesh))

    def __str__(self) -> str:
        names = ["Replicate()" if split is None else str(split) for split in self.placements]
        return f"[{', '.join(names)}]" if names else "plain"


def _chunk(runs: tuple[range, ...], pieces: int, index: int) -> tuple[range, ...]:
    """Piece ``index`` of the concatenated runs, cut as ``torch.chunk`` cuts."""
    total = sum(map(len, runs))
    size = -(-total // pieces)
    return _slice(runs, min(index * size, total), min((index + 1) * size, total))


def _slice(runs: tuple[range, ...], start: int, stop: int) -> tuple[range, ...]:
    """Positions [start, stop) of the concatenated runs, neighbours merged."""
    result: list[range] = []
    offset = 0
    for run in runs:
        part = run[max(start - offset, 0) : max(stop - offset, 0)]
        offset += len(run)
        if part and result and result[-1].stop == part.start:
            result[-1] = range(result[-1].start, part.stop)
        elif part:
            result.append(part)
    return tuple(result)


@lru_cache(maxsize=65536)
def _runs(layout: Layout, coordinate: Coordinate) -> tuple[tuple[range, ...], ...]:
    """For each tensor dimension the runs of indices held at a coordinate."""
    runs = list(_split_runs(layout, coordinate))
    if layout.window is not None:
        parts = []
        for run in runs[-2]:
            offset = 0
            for rows in layout.window[0]:
                if common := range(max(run.start, rows.start), min(run.stop, rows.stop)):
                    shift = offset - rows.start
                    parts.append(range(common.start + shift, common.stop + shift))
                offset += len(rows)
        runs[-2] = _slice(tuple(parts), 0, sum(map(len, parts)))
    return tuple(runs)


def _split_runs(layout: Layout, coordinate: Coordinate) -> tuple[tuple[range, ...], ...]:
    runs: list[tuple[range, ...]] = [(range(size),) if size else () for size in layout.split_shape]
    for size, index, placement in zip(layout.mesh, coordinate, layout.placements, strict=True):
        if placement is None:
            continue
        if placement.bounds:
            start, stop = placement.bounds[index : index + 2]
            runs[placement.dim] = _slice(runs[placement.dim], start, stop)
            continue
        pieces = [_chunk(runs[placement.dim], placement.stride, i) for i in range(placement.stride)]
        parts = tuple(run for piece in pieces for run in _chunk(piece, size, index))
        runs[placement.dim] = _slice(parts, 0, sum(map(len, parts)))
    return tuple(runs)


@lru_cache(maxsize=65536)
def _blocks(layout: Layout, coordinate: Coordinate) -> tuple[Block, ...]:
    spans: list[list[tuple[range, int]]] = []
    for runs in _runs(layout, coordinate):
        offset, spans_of_dim = 0, []
        for run in runs:
            spans_of_dim.append((run, offset))
            offset += len(run)
        spans.append(spans_of_dim)
    return tuple(
        Block(
            start=tuple(run.start for run, _ in box),
            shape=tuple(len(run) for run, _ in box),
            local=tuple(offset for _, offset in box),
        )
        for box in product(*spans)
    )


def intersect(ours: Block, theirs: Block) -> tuple[Block, Block] | None:
    """The common box of two blocks, as a part of each, or None where they share no element."""
    start = tuple(map(max, ours.start, theirs.start))
    stop = (
        min(a + s, b + t)
        for a, s, b, t in zip(ours.start, ours.shape, theirs.start, theirs.shape, strict=True)
    )
    shape = tuple(e - s for s, e in zip(start, stop, strict=True))
    if min(shape, default=1) <= 0:
        return None

    def part(block: Block) -> Block:
        if block.strides is not None:
            steps = zip(start, block.start, block.strides, strict=True)
            offset = block.local[0] + sum((s - b) * stride for s, b, stride in steps)
            return Block(start, shape, (offset,), block.strides)
        local = (o + s - b for o, s, b in zip(block.local, start, block.start, strict=True))
        return Block(start, shape, tuple(local))

    return part(ours), part(theirs)


@dataclass(frozen=True, slots=True)
class Move:
    """One stage on the way between two layouts: what changes along one mesh dimension.

    Attributes:
        mesh_dim: the mesh dimension whose group exchanges elements.
        source: layout before.
        target: layout after; differs from ``source`` in ``mesh_dim`` alone.
    """

    mesh_dim: int
    source: Layout
    target: Layout


def kept_dim(shape: tuple[int, ...]) -> int:
    """The dimension of an (..., m, n) weight that the projection leaves alone.

    Rows for m >= n (``G Q``, the right side), columns for m < n (``Q^T G``, the left side).
    """
    return len(shape) - 2 if shape[-2] >= shape[-1] else len(shape) - 1


@lru_cache(maxsize=4096)
def to_compute(storage: Layout) -> tuple[Move, ...]:
    """Stages from the storage layout of an (..., m, n) weight to its compute layout.

    In the compute layout each rank holds whole rows (m >= n) or whole columns (m < n). Every
    split of the mixed dimension moves to the kept one, the innermost cut first, and cuts inside
    the splits that are already there: so each stage stays within the groups of a single mesh
    dimension and moves only the elements that must. Empty where nothing splits the mixed
    dimension; stages over a mesh dimension of one rank only rename the placement.

    On meshes of several dimensions a few shapes that divide unevenly cannot be cut that way
    (``torch.chunk`` of a part is not a part of ``torch.chunk``); those are gathered and sliced.
    """
    kept = kept_dim(storage.shape)
    mixed = 2 * len(storage.shape) - 3 - kept
    layout, moves = storage, []
    for mesh_dim in reversed(storage.splitting(mixed)):
        later = [d for d in layout.splitting(kept) if d > mesh_dim]
        stride = math.prod(layout.mesh[d] for d in later)
        moves.append(Move(mesh_dim, layout, layout.move(mesh_dim, Split(kept, stride))))
        layout = moves[-1].target
    return tuple(moves) if all(map(_stays_in_group, moves)) else _through_whole(storage)


def _through_whole(storage: Layout) -> tuple[Move, ...]:
    """Stages to the compute layout by gathering both dimensions and slicing the kept one."""
    kept = kept_dim(storage.shape)
    gather = to_whole(storage, (len(storage.shape) - 2, len(storage.shape) - 1))
    layout, slices = gather[-1].target, []
    for move in reversed(gather):
        slices.append(Move(move.mesh_dim, layout, layout.move(move.mesh_dim, Split(kept))))
        layout = slices[-1].target
    return gather + tuple(slices)


def _stays_in_group(move: Move) -> bool:
    """Whether every rank finds all it needs on the ranks that differ in ``move.mesh_dim`` only."""
    source, target, mesh_dim = move.source, move.target, move.mesh_dim
    if math.prod(source.mesh) == source.mesh[mesh_dim]:
        return True
    if all(size % math.prod(source.mesh) == 0 for size in source.split_shape[-2:]):
        return True

    def found(coordinate: Coordinate) -> int:
        group = (
            (*coordinate[:mesh_dim], peer, *coordinate[mesh_dim + 1 :])
            for peer in range(source.mesh[mesh_dim])
        )
        pairs = product((b for c in group for b in source.blocks(c)), target.blocks(coordinate))
        common = (intersect(ours, theirs) for ours, theirs in pairs)
        return sum(math.prod(both[0].shape) for both in common if both)

    return all(found(c) == target.numel(c) for c in target.coordinates())


def reverse(moves: tuple[Move, ...]) -> tuple[Move, ...]:
    """The way back."""
    return tuple(Move(move.mesh_dim, move.target, move.source) for move in reversed(moves))


def to_whole(layout: Layout, dims: tuple[int, ...]) -> tuple[Move, ...]:
    """Stages that gather the given tensor dimensions on every rank.

    Placements apply from left to right, so undoing them from right to left keeps every stage
    within its group, however unevenly the shape divides.
    """
    moves = []
    for mesh_dim in reversed(range(len(layout.mesh))):
        placement = layout.placements[mesh_dim]
        if placement is not None and placement.dim in dims:
            moves.append(Move(mesh_dim, layout, layout.move(mesh_dim, None)))
            layout = moves[-1].target
    return tuple(moves)
