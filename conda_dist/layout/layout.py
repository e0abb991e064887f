"""Which elements of a tensor each rank holds: pure descriptions, without tensors or communication.

A :class:`Layout` describes a global tensor that is spread over a device mesh. DTensor placements, a
plain tensor (no mesh) and DDP (copies along one mesh dimension) are all layouts. For a coordinate
of the mesh, a layout gives the *runs* (ranges of consecutive indices) of each tensor dimension that
the rank holds, and from these the *blocks*: the boxes of elements in its local tensor.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
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
    """Every distinct topology, largest first, with the earlier ones that contain all its ranks.

    A decision for a topology may depend on these larger topologies only. All ranks of the topology
    are in them, so all ranks decide the same. Other topologies are not known to all ranks.
    """
    ordered = sorted(set(topologies), key=lambda t: (-len(t.ranks), t.ranks, t.sizes))
    return [
        (topology, [t for t in ordered[:i] if set(topology.ranks) <= set(t.ranks)])
        for i, topology in enumerate(ordered)
    ]


@dataclass(frozen=True, slots=True)
class Split:
    """A mesh dimension that splits one tensor dimension into pieces, one for each index along it.

    Attributes:
        dim: the tensor dimension, not negative.
        stride: 1, or the ``split_factor`` of DTensor's ``_StridedShard``: later mesh dimensions cut
            the tensor dimension into so many equal pieces first, then this one splits each piece.
            FSDP over tensor parallelism produces it.
        bounds: () to split as ``torch.chunk`` does. Else piece i is [bounds[i], bounds[i + 1]):
            ascending, one number more than there are pieces. Only with a stride of 1.
        among: ``(first, count)``: the indices along the mesh dimension that hold a piece each. The
            others hold nothing. None: every index holds a piece.
    """

    dim: int
    stride: int = 1
    bounds: tuple[int, ...] = ()
    among: tuple[int, int] | None = None

    def __str__(self) -> str:
        where = "" if self.among is None else f" on {_span(self.among)}"
        if self.stride > 1:
            return f"_StridedShard({self.dim}, sf={self.stride}{where})"
        cuts = f" at {','.join(map(str, self.bounds))}" if self.bounds else ""
        return f"Shard({self.dim}{cuts}{where})"


@dataclass(frozen=True, slots=True)
class Copies:
    """A mesh dimension along which some indices hold a copy of the tensor, and the others nothing.

    Attributes:
        among: ``(first, count)``: the indices that hold a copy.
    """

    among: tuple[int, int]

    def __str__(self) -> str:
        return f"Replicate(on {_span(self.among)})"


Placement: TypeAlias = Split | Copies | None
"""How the indices along one mesh dimension hold a tensor. None: each holds a copy."""


def _span(among: tuple[int, int]) -> str:
    first, count = among
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def holds(among: tuple[int, int] | None, index: int) -> bool:
    """Whether an index along a mesh dimension is in ``among``; always if that is None."""
    return among is None or among[0] <= index < among[0] + among[1]


@dataclass(frozen=True, slots=True)
class Block:
    """A box of elements that one rank holds.

    Attributes:
        start: index of the box's first element in the global tensor.
        shape: shape of the box.
        local: index of the first element in the rank's local tensor: one number for each dimension,
            or a single offset if the local tensor is flat (1-D).
        strides: the strides of the box in a flat local tensor; None if it is not flat.
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
        placements: one for each mesh dimension, applied from left to right, as DTensor does.
        window: None, or, if this tensor consists of some rows (dimension -2) of a larger one:
            ``(rows, total)``, ascending ranges of the larger tensor's rows, and how many rows it
            has. The placements then split the larger tensor.
        kernel: (), or, if this tensor is a convolution kernel (out, in, ...) viewed as a matrix
            (out, in * ...): the kernel's shape.
    """

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]
    window: tuple[tuple[range, ...], int] | None = None
    kernel: tuple[int, ...] = ()

    def rows(self, rows: tuple[range, ...]) -> "Layout":
        """The layout of some rows of this tensor (..., m, n); every element stays where it is.

        Args:
            rows: ascending ranges of rows.
        """
        shape = (*self.shape[:-2], sum(map(len, rows)), self.shape[-1])
        return replace(self, shape=shape, window=(rows, self.shape[-2]))

    @property
    def whole(self) -> "Layout":
        """The layout of the stored tensor: without the window, and in the kernel's shape."""
        return replace(self, shape=self.kernel or self.split_shape, window=None, kernel=())

    def as_matrix(self) -> "Layout":
        """The layout of a kernel (out, in, ...) viewed as a matrix (out, in * ...).

        Raises:
            ValueError: a dimension other than the first two is split, or the second one unevenly.
                Then some rank's elements are not a contiguous range of the matrix's columns.
        """
        ways = math.prod(self.mesh[d] for d in self.splitting(1))
        others = [p for p in self.placements if isinstance(p, Split) and p.dim > 1]
        if others or self.shape[1] % ways:
            raise ValueError(
                f"a kernel {self.shape} in the layout {self} cannot be seen as a matrix "
                "(out, in * k * k): shard dimension 0, or dimension 1 if it divides evenly"
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
        """Where the rows of the window are in a coordinate's local tensor of the larger tensor.

        Returns:
            ``(first row in the local tensor, number of rows)`` of each contiguous range.
        """
        assert self.window is not None
        spans: list[tuple[int, int]] = []
        offset = 0
        for run in _split_runs(self, len(self.shape) - 2, coordinate):
            for rows in self.window[0]:
                if common := range(max(run.start, rows.start), min(run.stop, rows.stop)):
                    start = offset + common.start - run.start
                    if spans and sum(spans[-1]) == start:
                        spans[-1] = (spans[-1][0], spans[-1][1] + len(common))
                    else:
                        spans.append((start, len(common)))
            offset += len(run)
        return tuple(spans)

    def with_placement(self, mesh_dim: int, placement: Placement) -> "Layout":
        """This layout with another placement for one mesh dimension."""
        placements = list(self.placements)
        placements[mesh_dim] = placement
        return replace(self, placements=tuple(placements))

    def splitting(self, dim: int) -> tuple[int, ...]:
        """The mesh dimensions that split tensor dimension ``dim``, outermost cut first.

        A strided split comes after the later mesh dimensions that its stride counts, because it
        cuts inside their pieces.
        """
        order: list[int] = []
        for mesh_dim in reversed(range(len(self.mesh))):
            placement = self.placements[mesh_dim]
            if not isinstance(placement, Split) or placement.dim != dim:
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
        """The non-empty boxes held at a coordinate, in the order of the local tensor."""
        return _blocks(self, coordinate)

    def numel(self, coordinate: Coordinate) -> int:
        """Number of elements held at a coordinate."""
        return math.prod(self.local_shape(coordinate))

    def matrices(self, coordinate: Coordinate) -> tuple[int, ...]:
        """The matrices of an (..., m, n) tensor of which a coordinate holds elements.

        Returns:
            Row-major indices over the leading dimensions, in the order of the local tensor;
            ``(0,)`` for a 2-D tensor.
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
    """Piece ``index`` of the concatenated runs, cut into ``pieces`` as ``torch.chunk`` does."""
    total = sum(map(len, runs))
    size = -(-total // pieces)
    if len(runs) == 1:
        part = runs[0][index * size : (index + 1) * size]
        return (part,) if part else ()
    return _slice(runs, min(index * size, total), min((index + 1) * size, total))


@lru_cache(maxsize=4096)  # all ranks along a mesh dimension ask for the same
def _chunks(runs: tuple[range, ...], pieces: int) -> tuple[tuple[range, ...], ...]:
    return tuple(_chunk(runs, pieces, index) for index in range(pieces))


def _slice(runs: tuple[range, ...], start: int, stop: int) -> tuple[range, ...]:
    """Positions [start, stop) of the concatenated runs; adjacent runs are merged."""
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
    """The runs of indices held at a coordinate, for each tensor dimension."""
    return tuple(dim_runs(layout, dim, coordinate) for dim in range(len(layout.shape)))


def dim_runs(layout: Layout, dim: int, coordinate: Coordinate) -> tuple[range, ...]:
    """The runs of indices of one tensor dimension that are held at a coordinate, ascending."""
    runs = _split_runs(layout, dim, coordinate)
    if layout.window is None or dim != len(layout.shape) - 2:
        return runs
    parts = []
    for run in runs:
        offset = 0
        for rows in layout.window[0]:
            if common := range(max(run.start, rows.start), min(run.stop, rows.stop)):
                shift = offset - rows.start
                parts.append(range(common.start + shift, common.stop + shift))
            offset += len(rows)
    return _slice(tuple(parts), 0, sum(map(len, parts)))


def _split_runs(layout: Layout, dim: int, coordinate: Coordinate) -> tuple[range, ...]:
    """Like :func:`dim_runs`, but indices of the tensor that the placements split (no window)."""
    size = layout.split_shape[dim]
    runs: tuple[range, ...] = (range(size),) if size else ()
    for pieces, index, placement in zip(layout.mesh, coordinate, layout.placements, strict=True):
        if isinstance(placement, Copies):
            if dim == 0 and not holds(placement.among, index):
                runs = ()
            continue
        if placement is None or placement.dim != dim:
            continue
        if placement.among is not None:
            if not holds(placement.among, index):
                return ()
            first, pieces = placement.among
            index -= first
        if placement.bounds:
            runs = _slice(runs, *placement.bounds[index : index + 2])
        elif placement.stride == 1:
            runs = _chunk(runs, pieces, index)
        else:
            outer = _chunks(runs, placement.stride)
            parts = tuple(run for piece in outer for run in _chunk(piece, pieces, index))
            runs = _slice(parts, 0, sum(map(len, parts)))
    return runs


def even_pieces(
    layout: Layout, dim: int, mesh_dim: int, coordinate: Coordinate
) -> tuple[range, int, int] | None:
    """How a mesh dimension cuts one run of indices into equal pieces, if it does.

    Args:
        layout: the layout.
        dim: the tensor dimension that ``mesh_dim`` splits.
        mesh_dim: the mesh dimension.
        coordinate: of any rank along the mesh dimension.

    Returns:
        ``(run, size, first)``: the run that is cut, which may be longer than the window; the length
        of every piece but the last ones; and the index along the mesh dimension that holds the
        first piece. None if ``mesh_dim`` does not cut a single run as ``torch.chunk`` does.
    """
    placement = layout.placements[mesh_dim]
    if not isinstance(placement, Split) or placement.bounds or placement.stride > 1:
        return None
    later = layout.placements[mesh_dim + 1 :]
    if any(isinstance(p, Split) and p.dim == dim for p in later):
        return None
    before = (*layout.placements[:mesh_dim], *(None for _ in layout.placements[mesh_dim:]))
    runs = _split_runs(replace(layout, placements=before), dim, coordinate)
    window = layout.window[0] if layout.window and dim == len(layout.shape) - 2 else (range(1),)
    if len(runs) != 1 or len(window) != 1:
        return None
    (whole,), first = runs, window[0].start
    least, count = placement.among or (0, layout.mesh[mesh_dim])
    return range(whole.start - first, whole.stop - first), -(-len(whole) // count), least


def overlaps(ours: Sequence[range], theirs: Sequence[range]) -> list[tuple[int, int, int]]:
    """The runs that two ascending lists of runs have in common, ascending.

    Returns:
        For each common run: its position in the concatenation of ``ours``, its position in the
        concatenation of ``theirs``, and its length.
    """
    found = []
    i = j = our_offset = their_offset = 0
    while i < len(ours) and j < len(theirs):
        a, b = ours[i], theirs[j]
        start, stop = max(a.start, b.start), min(a.stop, b.stop)
        if start < stop:
            begin = our_offset + start - a.start, their_offset + start - b.start
            found.append((*begin, stop - start))
        if a.stop <= b.stop:
            our_offset += len(a)
            i += 1
        else:
            their_offset += len(b)
            j += 1
    return found


@lru_cache(maxsize=65536)
def _blocks(layout: Layout, coordinate: Coordinate) -> tuple[Block, ...]:
    """See :meth:`Layout.blocks`: one block for each combination of runs."""
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
    """The box that two blocks share, once as a part of each; None if they share no element."""
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
