"""Which rank sends which elements to which: pure index arithmetic over layouts.

The *route* of a tensor is a sequence of :class:`Leg`, each a move along one mesh dimension.
:func:`plan_hops` packs the legs of many tensors into as few :class:`Hop` as possible, each an
exchange along one mesh dimension. It finds, for one rank, which boxes of its local tensors go to
each peer, and which come from each.
"""

import math
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import mul
from typing import TypeAlias

from conda_dist.layout.flat import Flat, Held
from conda_dist.layout.layout import Block, Coordinate, Copies, Layout, Split, intersect
from conda_dist.layout.moves import Move
from conda_dist.layout.packing import (
    Copy,
    PeerRange,
    block_peers,
    block_stay,
    chunked_peers,
    chunked_stay,
    lay_out,
)


@dataclass(frozen=True, slots=True)
class Leg:
    """A move of one tensor, in which perhaps only some ranks of the mesh take part.

    Attributes:
        move: what changes along one mesh dimension.
        sender: the index along ``move.mesh_dim`` that alone holds the tensor before; None if the
            layout says who does.
        receiver: the index along ``move.mesh_dim`` that alone holds the tensor afterwards; None if
            the layout says who does.
        only: ``{mesh dimension: index}``: only ranks with these indices take part; {} if all do.
    """

    move: Move
    sender: int | None = None
    receiver: int | None = None
    only: dict[int, int] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """Whether every rank finds what it needs in its own local tensor."""
        placement = self.move.source.placements[self.move.mesh_dim]
        if self.move.source.mesh[self.move.mesh_dim] == 1:
            return True
        if placement is None:
            return self.sender is None
        return placement.among is not None and placement.among == (self.receiver, 1)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One tensor's part in one exchange, seen from one rank.

    Attributes:
        item: position of the tensor among those that are exchanged together.
        shape: shape of this rank's local tensor afterwards; None if it holds none.
        sends: the boxes of the local tensor for each peer, this rank included.
        receives: the boxes of the new local tensor from each peer, this rank included.
        stays: copies of the elements that this rank holds before and afterwards, from the old
            local tensor to the new one.
        even: whether every rank sends the same number of elements to every rank, so that the
            collective needs no list of sizes.
    """

    item: int
    shape: tuple[int, ...] | None
    sends: tuple[PeerRange, ...] = ()
    receives: tuple[PeerRange, ...] = ()
    stays: tuple[Copy, ...] = ()
    even: bool = False


@dataclass(frozen=True, slots=True)
class Packing:
    """The buffers of one collective, which carries tensors of one dtype.

    Attributes:
        transfers: the tensors.
        send_sizes: number of elements for each peer.
        receive_sizes: number of elements from each peer.
        packs: for each tensor the copies from it to the send buffer.
        unpacks: for each tensor the copies from the receive buffer to the new local tensor.
        straight: whether elements that stay on this rank are copied directly from the old local
            tensor to the new one. Else this rank sends them to itself in the buffers, which takes
            fewer copies.
        even: whether all sizes are equal on all ranks. All ranks know it from the layouts. Then
            torch gets no sizes, which saves two microseconds for each.
    """

    transfers: tuple[Transfer, ...]
    send_sizes: list[int]
    receive_sizes: list[int]
    packs: list[tuple[Copy, ...]]
    unpacks: list[tuple[Copy, ...]]
    straight: bool
    even: bool


SENT_TO_ITSELF = 8
"""A rank sends elements to itself if they are at most 1/8 of all that it sends, as in an even
exchange of eight ranks or more: that takes two strided copies instead of five. If more elements
stay, as on few ranks or in flat partitions, they are not packed: packing would hold them twice."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One packed exchange along one mesh dimension, or copies within every rank.

    Attributes:
        mesh_dim: the mesh dimension.
        is_local: whether every rank finds its new elements in its own local tensors, so that
            nothing is sent.
        transfers: the tensors.
        size: number of ranks along the mesh dimension.
        index: this rank's index along it.
    """

    mesh_dim: int
    is_local: bool
    transfers: tuple[Transfer, ...]
    size: int
    index: int
    _packings: dict[tuple[Hashable, ...], list[Packing]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def sent(self, index: int, item: int) -> int:
        """Number of elements of a tensor that this rank sends to others.

        Args:
            index: this rank's index along ``mesh_dim``.
            item: position of the tensor among those that are exchanged.
        """
        return sum(
            peers.numel * (peers.count - (peers.first <= index < peers.first + peers.count))
            for transfer in self.transfers
            if transfer.item == item
            for peers in transfer.sends
        )

    def packings(self, dtypes: tuple[Hashable, ...]) -> list[Packing]:
        """The collectives of this hop: one for each dtype, so nearly always one. Cached.

        Args:
            dtypes: the dtype of each transfer.
        """
        if dtypes not in self._packings:
            self._packings[dtypes] = [
                self._pack([t for t, other in pairs if other == dtype])
                for pairs in [list(zip(self.transfers, dtypes, strict=True))]
                for dtype in dict.fromkeys(dtypes)
            ]
        return self._packings[dtypes]

    def _pack(self, transfers: Sequence[Transfer]) -> Packing:
        """Lays out the buffers of one collective."""
        sends, receives = [t.sends for t in transfers], [t.receives for t in transfers]
        send_sizes, packs = lay_out(sends, self.size, None)
        receive_sizes, unpacks = lay_out(receives, self.size, None)
        straight = SENT_TO_ITSELF * send_sizes[self.index] > sum(send_sizes)
        if straight:
            send_sizes, packs = lay_out(sends, self.size, self.index)
            receive_sizes, unpacks = lay_out(receives, self.size, self.index)
        even = self.size >= SENT_TO_ITSELF and all(t.even for t in transfers)
        assert not even or (len({*send_sizes, *receive_sizes}) == 1 and not straight)
        return Packing(tuple(transfers), send_sizes, receive_sizes, packs, unpacks, straight, even)


def plan_hops(routes: Sequence[tuple[Leg, ...]], coordinate: Coordinate) -> tuple[Hop, ...]:
    """Packs the legs of all routes into hops, seen from one rank.

    All ranks of the mesh get hops along the same mesh dimensions in the same order, whatever
    elements they hold.

    Args:
        routes: the legs of each tensor, in order; () for a tensor that stays.
        coordinate: the rank whose boxes are computed.
    """
    progress = [0] * len(routes)
    hops = []

    def waiting() -> list[tuple[int, Leg]]:
        return [
            (item, route[progress[item]])
            for item, route in enumerate(routes)
            if progress[item] < len(route)
        ]

    while heads := waiting():
        # Local legs first: then more routes may wait for the same mesh dimension, and share a hop.
        local = [(item, leg) for item, leg in heads if leg.is_local]
        mesh_dim = (local or heads)[0][1].move.mesh_dim
        chosen = [(item, leg) for item, leg in (local or heads) if leg.move.mesh_dim == mesh_dim]
        transfers = tuple(_transfer(item, leg, coordinate) for item, leg in chosen)
        size = chosen[0][1].move.source.mesh[mesh_dim]
        hops.append(Hop(mesh_dim, bool(local), transfers, size, coordinate[mesh_dim]))
        for item, _ in chosen:
            progress[item] += 1
    return tuple(hops)


def _transfer(item: int, leg: Leg, coordinate: Coordinate) -> Transfer:
    """The part of a rank in a leg; an empty one if it does not take part."""
    mesh_dim = leg.move.mesh_dim
    if any(coordinate[dim] != index for dim, index in leg.only.items()):
        return Transfer(item, None)
    boxes = _boxes(leg.move, leg.sender, leg.receiver, coordinate)
    holds = leg.receiver is None or leg.receiver == coordinate[mesh_dim]
    shape = leg.move.target.local_shape(coordinate) if holds else None
    all_take_part = leg.sender is None and leg.receiver is None and not leg.only
    return Transfer(item, shape, *boxes, even=all_take_part and _cut_evenly(leg.move))


@lru_cache(maxsize=4096)
def _cut_evenly(move: Move) -> bool:
    """Whether every rank sends the same number of elements to every rank.

    Decided from the layouts alone, so that all ranks decide the same.
    """
    source, target = move.source, move.target
    if type(source) is not Layout or type(target) is not Layout or source.window:
        return False
    splits = source.placements[move.mesh_dim], target.placements[move.mesh_dim]
    if splits[1] is None:
        return _is_gathered_evenly(source)
    ranks = math.prod(source.mesh)
    return all(
        isinstance(split, Split)
        and not split.bounds
        and not split.among
        and source.shape[split.dim] % (ranks * split.stride) == 0
        for split in splits
    )


def _is_gathered_evenly(layout: Layout) -> bool:
    """Whether all ranks hold the same number of elements; False if two splits share a dimension."""
    split = [
        (p.dim, size)
        for p, size in zip(layout.placements, layout.mesh, strict=True)
        if isinstance(p, Split) and not p.bounds and not p.among and p.stride == 1
    ]
    others = sum(p is not None for p in layout.placements) - len(split)
    alone = len({dim for dim, _ in split}) == len(split)
    return not others and alone and all(layout.shape[dim] % size == 0 for dim, size in split)


Boxes: TypeAlias = tuple[tuple[PeerRange, ...], tuple[PeerRange, ...], tuple[Copy, ...]]


@lru_cache(maxsize=65536)  # the layers of a model are alike
def _boxes(move: Move, sender: int | None, receiver: int | None, coordinate: Coordinate) -> Boxes:
    """What one rank sends to each peer, what it receives from each, and what stays on it."""
    source, target, mesh_dim = move.source, move.target, move.mesh_dim
    here, everyone = coordinate[mesh_dim], range(source.mesh[mesh_dim])
    own, nobody = range(here, here + 1), range(0)
    copied = sender is None and source.placements[mesh_dim] is None  # every rank has a copy
    takers = everyone if receiver is None else range(receiver, receiver + 1)
    givers = everyone if sender is None else range(sender, sender + 1)
    if here not in takers:
        givers = nobody
    elif copied:
        givers = own
    if sender not in (None, here):
        takers = nobody
    elif copied:
        takers = own if here in takers else nobody
    chunked = type(source) is Layout and type(target) is Layout
    if chunked:
        sends = chunked_peers(source, target, mesh_dim, coordinate, takers)
        receives = chunked_peers(target, source, mesh_dim, coordinate, givers)
    else:
        sends = block_peers(_boxes_shared(source, target, mesh_dim, coordinate, takers))
        receives = block_peers(_boxes_shared(target, source, mesh_dim, coordinate, givers))
    if here not in takers or here not in givers:
        return sends, receives, ()
    if chunked:
        stays = chunked_stay(source, target, coordinate)
    else:
        stays = block_stay(_pairs(source.blocks(coordinate), target.blocks(coordinate)))
    dims = len(source.local_shape(coordinate))
    return sends, receives, tuple(Copy.of(grid, dims) for grid in stays)


def _boxes_shared(
    mine: Layout, theirs: Layout, mesh_dim: int, coordinate: Coordinate, peers: range
) -> Iterator[tuple[int, list[Block]]]:
    """The boxes that a rank's local tensor shares with each peer's, in an order both agree on."""
    ours = mine.blocks(coordinate)
    for peer in _nearby(theirs, ours, peers) if ours else ():
        there = theirs.blocks((*coordinate[:mesh_dim], peer, *coordinate[mesh_dim + 1 :]))
        pairs = sorted(_pairs(ours, there), key=lambda both: both[0].start)
        yield peer, [box for box, _ in pairs]


def _nearby(layout: Layout, boxes: Sequence[Block], peers: range) -> Iterable[int]:
    """The peers that may hold elements of the boxes: of a flat weight a few of thousands."""
    if isinstance(layout, Held):
        return (peer for peer in peers if layout.holders[peer])
    split = layout.placements[0]
    if isinstance(layout, Flat):
        inner = [math.prod(layout.shape[dim + 1 :]) for dim in range(len(layout.shape))]
        ends = [[start + n - 1 for start, n in zip(b.start, b.shape, strict=True)] for b in boxes]
        first = min(sum(map(mul, box.start, inner)) for box in boxes)
        last, bounds = max(sum(map(mul, end, inner)) for end in ends), layout.bounds
    elif isinstance(split, Split) and split.bounds:
        first = min(box.start[split.dim] for box in boxes)
        last = max(box.start[split.dim] + box.shape[split.dim] for box in boxes) - 1
        bounds = split.bounds
    else:
        return peers
    near = range(bisect_right(bounds, first) - 1, bisect_right(bounds, last))
    common = range(max(near.start, peers.start), min(near.stop, peers.stop))
    return (peer for peer in common if bounds[peer] < bounds[peer + 1])


def _pairs(ours: Sequence[Block], theirs: Sequence[Block]) -> list[tuple[Block, Block]]:
    """The boxes that any two blocks share, each as a part of both."""
    pairs = (intersect(a, b) for a in ours for b in theirs)
    return [both for both in pairs if both is not None]


def redistribution(moves: tuple[Move, ...]) -> tuple[Leg, ...]:
    """The route of a tensor between layouts of all ranks: a leg for each move."""
    return tuple(map(Leg, moves))


def gather_to(
    layout: Layout, dims: tuple[int, ...], owner: Coordinate, fixed: tuple[int, ...]
) -> tuple[Leg, ...]:
    """The route that gathers a tensor on one rank, its owner.

    Args:
        layout: the layout of the tensor.
        dims: tensor dimensions to gather.
        owner: coordinate of the owner.
        fixed: mesh dimensions to leave out: along them other ranks hold another tensor (other
            experts of a 3-D weight) or a replica.
    """
    only = {mesh_dim: owner[mesh_dim] for mesh_dim in fixed}
    legs = []
    for mesh_dim in reversed(range(len(layout.mesh))):
        placement = layout.placements[mesh_dim]
        if isinstance(placement, Split) and placement.dim in dims:
            move = Move(mesh_dim, layout, layout.with_placement(mesh_dim, None))
            legs.append(Leg(move, receiver=owner[mesh_dim], only=dict(only)))
            layout, only = move.target, only | {mesh_dim: owner[mesh_dim]}
    return tuple(legs)


SPREAD_BEYOND = 4
"""An owner sends whole copies itself to at most so many ranks. To more ranks it sends a part of the
rows each, and then all ranks send their rows to all: so the owner packs the tensor only once."""


def send_from(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    owner: Coordinate,
    fixed: tuple[int, ...],
    target: Layout | None = None,
) -> tuple[Leg, ...]:
    """The route that copies a tensor from one rank, its owner, to others.

    Args:
        shape: shape of the tensor.
        mesh: sizes of the mesh dimensions.
        owner: coordinate of the owner.
        fixed: mesh dimensions to leave out: only ranks with the owner's index along them take part.
        target: None to copy to every rank along the other mesh dimensions. Else the layout of the
            copies: with :class:`Copies` along some mesh dimensions, only those indices get one; a
            :class:`Held` layout (1-D mesh) names the ranks that get one.
    """
    layout = Layout(shape, mesh, (None,) * len(mesh))
    placements = [None] * len(mesh) if target is None else list(target.placements)
    if target is not None and not any(isinstance(placement, Copies) for placement in placements):
        return (Leg(Move(0, layout, target), sender=owner[0]),)
    # (first, count) of the indices that get a copy along a mesh dimension, if not all do.
    among = {d: p.among for d, p in enumerate(placements) if isinstance(p, Copies)}
    crossed = [d for d in range(len(mesh)) if d not in fixed and among.get(d, (0, 2))[1] > 1]
    legs = []
    for i, mesh_dim in enumerate(crossed):
        # Ranks that differ from the owner along a dimension not crossed yet do not take part.
        only = {d: owner[d] for d in range(len(mesh)) if d not in crossed[: i + 1]}
        sender, inside = owner[mesh_dim], among.get(mesh_dim)
        copies = None if inside is None else Copies(inside)
        if (mesh[mesh_dim] if inside is None else inside[1]) > SPREAD_BEYOND:
            rows = layout.with_placement(mesh_dim, Split(0, among=inside))
            legs.append(Leg(Move(mesh_dim, layout, rows), sender=sender, only=only))
            legs.append(Leg(Move(mesh_dim, rows, rows.with_placement(mesh_dim, copies)), only=only))
        else:
            move = Move(mesh_dim, layout, layout.with_placement(mesh_dim, copies))
            legs.append(Leg(move, sender=sender, only=only))
        layout = legs[-1].move.target
    return tuple(legs)
