"""The layout that a weight is computed in, and the moves that lead there. Pure.

Each :class:`Move` changes the placement of one mesh dimension, so it needs communication only
between the ranks along that dimension.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from conda_dist.layout.layout import Copies, Layout, Placement, Split, dim_runs, overlaps


@dataclass(frozen=True, slots=True)
class Move:
    """One stage between two layouts: the placement of one mesh dimension changes.

    Attributes:
        mesh_dim: the mesh dimension whose ranks exchange elements.
        source: layout before.
        target: layout after. Ranks that differ only in ``mesh_dim`` together hold the same elements
            before and after.
    """

    mesh_dim: int
    source: Layout
    target: Layout


def kept_dim(shape: tuple[int, ...]) -> int:
    """The dimension of an (..., m, n) weight that the projection does not mix.

    Rows for m >= n (``G Q``, projected from the right), columns for m < n (``Q^T G``, from the
    left). The other one is called the mixed dimension.
    """
    return len(shape) - 2 if shape[-2] >= shape[-1] else len(shape) - 1


@dataclass(frozen=True, slots=True)
class Group:
    """A compute group: the ranks that compute a weight, if these are not all that store it.

    Attributes:
        mesh_dim: the mesh dimension along which only some ranks compute.
        among: ``(first, count)``: their indices along it.
        single: for a rule that needs whole matrices: pairs ``(mesh dimension, index)`` of the other
            mesh dimensions that split matrices. Along each of them only that index computes. Along
            all remaining mesh dimensions every rank computes.
    """

    mesh_dim: int
    among: tuple[int, int]
    single: tuple[tuple[int, int], ...] = ()


@lru_cache(maxsize=4096)
def to_compute(storage: Layout, group: Group | None = None) -> tuple[Move, ...]:
    """Stages from the storage layout of an (..., m, n) weight to its compute layout.

    In the compute layout each rank holds whole rows (m >= n) or whole columns (m < n). Each split
    of the mixed dimension becomes a split of the kept dimension, innermost cut first. It cuts
    inside the splits that the kept dimension already has. So each stage stays within the ranks
    along one mesh dimension, and moves only elements that must move. The result is empty if nothing
    splits the mixed dimension. A stage over a mesh dimension of one rank moves no element.

    With a group, its ranks share the rows or columns (of a batch: the matrices) along its mesh
    dimension, and the other ranks hold nothing. Along each of its ``single`` mesh dimensions, one
    index gathers what the mesh dimension splits, rows or columns.

    On meshes of several dimensions a few shapes that divide unevenly cannot be cut this way,
    because ``torch.chunk`` of a piece is not a piece of ``torch.chunk``. They are gathered first,
    and then sliced.
    """
    kept = kept_dim(storage.shape)
    mixed = 2 * len(storage.shape) - 3 - kept
    grouped_dim = 0 if len(storage.shape) > 2 else kept  # a group shares a batch by matrices
    layout, moves = storage, []

    dims = list(reversed(storage.splitting(mixed)))
    if group is not None and group.mesh_dim not in dims:
        dims.append(group.mesh_dim)
    single = {} if group is None else dict(group.single)
    if group is not None and single:
        # Placements apply from left to right, so each stage must undo the rightmost one that is
        # left: then it needs the ranks along its own mesh dimension only.
        dims = sorted((group.mesh_dim, *single), reverse=True)
        if len(storage.shape) == 2:
            single[group.mesh_dim] = group.among[0]
    for mesh_dim in dims:
        if mesh_dim in single:
            target = layout.with_placement(mesh_dim, Copies((single[mesh_dim], 1)))
        elif group is not None and mesh_dim == group.mesh_dim:
            target = _to_group(layout, group, grouped_dim)
        else:
            later = [d for d in layout.splitting(kept) if d > mesh_dim]
            stride = math.prod(layout.mesh[d] for d in later)
            target = layout.with_placement(mesh_dim, Split(kept, stride))
        moves.append(Move(mesh_dim, layout, target))
        layout = target
    if not all(map(_stays_along_mesh_dim, moves)):
        return _through_whole(storage, group)
    return tuple(moves)


def _to_group(layout: Layout, group: Group, dim: int) -> Layout:
    """The layout in which the ranks of a group, along its mesh dimension, split ``dim``."""
    mesh_dim, (_, count) = group.mesh_dim, group.among
    present = layout.placements[mesh_dim]
    if not isinstance(present, Split) or present.dim != dim:
        later = [d for d in layout.splitting(dim) if d > mesh_dim]
        stride = math.prod(layout.mesh[d] for d in later)
        return layout.with_placement(mesh_dim, Split(dim, stride, among=group.among))
    order = layout.splitting(dim)
    target = layout.with_placement(mesh_dim, replace(present, among=group.among))
    # Now each rank of the group holds several of the old pieces. A later mesh dimension that splits
    # each old piece must still do so: its stride counts the old pieces.
    for inside in order[order.index(mesh_dim) + 1 :]:
        split = layout.placements[inside]
        if inside > mesh_dim and isinstance(split, Split):
            more = layout.mesh[mesh_dim] // count
            target = target.with_placement(inside, replace(split, stride=split.stride * more))
    return target


def _through_whole(storage: Layout, group: Group | None) -> tuple[Move, ...]:
    """Stages that gather both matrix dimensions on every rank, and then slice the kept one."""
    kept = kept_dim(storage.shape)
    gather = to_whole(storage, (len(storage.shape) - 2, len(storage.shape) - 1))
    layout, slices = gather[-1].target, []
    single = {} if group is None else dict(group.single)
    for move in reversed(gather):
        inside = group is not None and move.mesh_dim == group.mesh_dim
        dim = 0 if inside and len(storage.shape) > 2 else kept
        part: Placement = Split(dim, among=group.among if group and inside else None)
        if move.mesh_dim in single:
            part = Copies((single[move.mesh_dim], 1))
        slices.append(Move(move.mesh_dim, layout, layout.with_placement(move.mesh_dim, part)))
        layout = slices[-1].target
    return gather + tuple(slices)


def _stays_along_mesh_dim(move: Move) -> bool:
    """Whether every rank finds all its new elements on ranks that differ in ``mesh_dim`` only."""
    source = move.source
    if math.prod(source.mesh) == source.mesh[move.mesh_dim]:
        return True
    return all(_dim_stays(move, dim) for dim in range(len(source.shape)))


def _dim_stays(move: Move, dim: int) -> bool:
    """The same for the indices of one tensor dimension, which is independent of the others."""
    source, target, mesh_dim = move.source, move.target, move.mesh_dim

    def cuts(layout: Layout, d: int) -> bool:
        placement = layout.placements[d]
        return isinstance(placement, Split) and placement.dim == dim

    cutting = [d for d in range(len(source.mesh)) if cuts(source, d) or cuts(target, d)]
    if mesh_dim not in cutting:
        return True
    placement = target.placements[mesh_dim]
    count = placement.among[1] if isinstance(placement, Split) and placement.among else 1
    even = source.split_shape[dim] % math.prod(source.mesh[d] for d in cutting) == 0
    if even and source.mesh[mesh_dim] % count == 0:
        return True
    peers = range(source.mesh[mesh_dim])
    choices = (range(n) if d in cutting else range(1) for d, n in enumerate(source.mesh))
    for coordinate in product(*(c if d != mesh_dim else (0,) for d, c in enumerate(choices))):
        group = [(*coordinate[:mesh_dim], peer, *coordinate[mesh_dim + 1 :]) for peer in peers]
        holders = group if cuts(source, mesh_dim) else group[:1]
        held = sorted((r for c in holders for r in dim_runs(source, dim, c)), key=lambda r: r.start)
        for taker in group if cuts(target, mesh_dim) else group[:1]:
            needed = dim_runs(target, dim, taker)
            if sum(n for *_, n in overlaps(held, needed)) != sum(map(len, needed)):
                return False
    return True


def reverse(moves: tuple[Move, ...]) -> tuple[Move, ...]:
    """The stages of the way back."""
    return tuple(Move(move.mesh_dim, move.target, move.source) for move in reversed(moves))


def to_whole(layout: Layout, dims: tuple[int, ...]) -> tuple[Move, ...]:
    """Stages that gather the given tensor dimensions on every rank.

    Placements apply from left to right. Undoing them from right to left keeps every stage within
    the ranks along one mesh dimension, however unevenly the shape divides.
    """
    moves = []
    for mesh_dim in reversed(range(len(layout.mesh))):
        placement = layout.placements[mesh_dim]
        if isinstance(placement, Split) and placement.dim in dims:
            moves.append(Move(mesh_dim, layout, layout.with_placement(mesh_dim, None)))
            layout = moves[-1].target
    return tuple(moves)
