"""Where a weight is computed, and the moves along single mesh dimensions that lead there. Pure."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from conda_dist.layout.layout import Copies, Layout, Placement, Split, dim_runs, overlaps


@dataclass(frozen=True, slots=True)
class Move:
    """One stage on the way between two layouts: what changes along one mesh dimension.

    Attributes:
        mesh_dim: the mesh dimension whose group exchanges elements.
        source: layout before.
        target: layout after. The ranks that differ in ``mesh_dim`` alone hold the same together.
    """

    mesh_dim: int
    source: Layout
    target: Layout


def kept_dim(shape: tuple[int, ...]) -> int:
    """The dimension of an (..., m, n) weight that the projection leaves alone.

    Rows for m >= n (``G Q``, the right side), columns for m < n (``Q^T G``, the left side).
    """
    return len(shape) - 2 if shape[-2] >= shape[-1] else len(shape) - 1


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that compute a weight, where those are not all that store it.

    Attributes:
        mesh_dim: the mesh dimension along which only some ranks do.
        among: their indices along it, ``(first, count)``.
        single: for a rule that needs whole matrices the other mesh dimensions that split them, each
            with the one index along it that computes. Along all others, all do.
    """

    mesh_dim: int
    among: tuple[int, int]
    single: tuple[tuple[int, int], ...] = ()


@lru_cache(maxsize=4096)
def to_compute(storage: Layout, group: Group | None = None) -> tuple[Move, ...]:
    """Stages from the storage layout of an (..., m, n) weight to its compute layout.

    In the compute layout each rank holds whole rows (m >= n) or whole columns (m < n). Every
    split of the mixed dimension moves to the kept one, the innermost cut first, and cuts inside
    the splits that are already there: so each stage stays within the ranks of a single mesh
    dimension and moves only the elements that must. Empty where nothing splits the mixed
    dimension; stages over a mesh dimension of one rank only rename the placement.

    A group's ranks share the rows or columns along its mesh dimension, or, of a batch, the
    matrices; the other ranks hold nothing. Along its ``single`` mesh dimensions the splits, of
    either dimension, are gathered by one index each.

    On meshes of several dimensions a few shapes that divide unevenly cannot be cut that way
    (``torch.chunk`` of a part is not a part of ``torch.chunk``); those are gathered and sliced.
    """
    kept = kept_dim(storage.shape)
    mixed = 2 * len(storage.shape) - 3 - kept
    dealt = 0 if len(storage.shape) > 2 else kept
    layout, moves = storage, []

    dims = list(reversed(storage.splitting(mixed)))
    if group is not None and group.mesh_dim not in dims:
        dims.append(group.mesh_dim)
    single = {} if group is None else dict(group.single)
    if group is not None and single:
        # Placements apply from left to right: undone from right to left, stages stay in groups.
        dims = sorted((group.mesh_dim, *single), reverse=True)
        if len(storage.shape) == 2:
            single[group.mesh_dim] = group.among[0]
    for mesh_dim in dims:
        if mesh_dim in single:
            target = layout.move(mesh_dim, Copies((single[mesh_dim], 1)))
        elif group is not None and mesh_dim == group.mesh_dim:
            target = _to_group(layout, group, dealt)
        else:
            later = [d for d in layout.splitting(kept) if d > mesh_dim]
            stride = math.prod(layout.mesh[d] for d in later)
            target = layout.move(mesh_dim, Split(kept, stride))
        moves.append(Move(mesh_dim, layout, target))
        layout = target
    return tuple(moves) if all(map(_stays_in_group, moves)) else _through_whole(storage, group)


def _to_group(layout: Layout, group: Group, dim: int) -> Layout:
    """A layout with the pieces that a mesh dimension makes of ``dim`` held by a group's ranks."""
    mesh_dim, (_, count) = group.mesh_dim, group.among
    present = layout.placements[mesh_dim]
    if not isinstance(present, Split) or present.dim != dim:
        later = [d for d in layout.splitting(dim) if d > mesh_dim]
        stride = math.prod(layout.mesh[d] for d in later)
        return layout.move(mesh_dim, Split(dim, stride, among=group.among))
    order = layout.splitting(dim)
    target = layout.move(mesh_dim, replace(present, among=group.among))
    # What was cut inside each of the pieces is cut inside as many, now that fewer ranks hold them.
    for inside in order[order.index(mesh_dim) + 1 :]:
        split = layout.placements[inside]
        if inside > mesh_dim and isinstance(split, Split):
            more = layout.mesh[mesh_dim] // count
            target = target.move(inside, replace(split, stride=split.stride * more))
    return target


def _through_whole(storage: Layout, group: Group | None) -> tuple[Move, ...]:
    """Stages to the compute layout by gathering both dimensions and slicing the kept one."""
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
        slices.append(Move(move.mesh_dim, layout, layout.move(move.mesh_dim, part)))
        layout = slices[-1].target
    return gather + tuple(slices)


def _stays_in_group(move: Move) -> bool:
    """Whether every rank finds all it needs on the ranks that differ in ``move.mesh_dim`` only."""
    source = move.source
    if math.prod(source.mesh) == source.mesh[move.mesh_dim]:
        return True
    return all(_dim_stays(move, dim) for dim in range(len(source.shape)))


def _dim_stays(move: Move, dim: int) -> bool:
    """The same for the indices of one dimension: what splits the others does not matter there."""
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
        if isinstance(placement, Split) and placement.dim in dims:
            moves.append(Move(mesh_dim, layout, layout.move(mesh_dim, None)))
            layout = moves[-1].target
    return tuple(moves)
