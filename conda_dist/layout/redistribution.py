"""Who sends which elements to whom: pure index arithmetic over layouts, no communication.

A :class:`Route` takes one tensor through several moves; :func:`plan_hops` packs the routes of many
tensors into as few exchanges as possible, one per mesh dimension crossed, and works out for one
rank which boxes of its local tensors go to each peer and come from it.
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
    """A move, perhaps by some ranks of the mesh only.

    Attributes:
        move: what changes along one mesh dimension.
        sender: the one index along ``move.mesh_dim`` that holds the tensor; None if all do.
        receiver: the one index along ``move.mesh_dim`` that shall hold it; None if all shall.
        only: ``{mesh dimension: index}`` of the ranks that take part; the others look on.
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
    """One tensor's part in one exchange, as one rank sees it.

    Attributes:
        item: which of the tensors exchanged together.
        shape: shape of the rank's local tensor afterwards; None where it holds none.
        sends: the boxes of the local tensor that each peer gets, this rank as well.
        receives: the boxes of the new local tensor that each peer fills, this rank as well.
        stays: what this rank has in both tensors.
        even: whether each rank sends as much to each, so that nobody has to say how much.
    """

    item: int
    shape: tuple[int, ...] | None
    sends: tuple[PeerRange, ...] = ()
    receives: tuple[PeerRange, ...] = ()
    stays: tuple[Copy, ...] = ()
    even: bool = False


@dataclass(frozen=True, slots=True)
class Packing:
    """How tensors of one dtype travel in one collective.

    Attributes:
        transfers: the tensors.
        send_sizes: elements for each peer.
        receive_sizes: elements from each peer.
        packs: for each tensor the copies into the buffer that is sent.
        unpacks: for each tensor the copies out of the buffer that is received.
        straight: whether what stays on this rank is copied from tensor to tensor. Else it is sent
            and received as the other parts are, which takes fewer copies.
        even: whether all sizes of all ranks are equal. All ranks know. Torch takes two
            microseconds for each size that it is given.
    """

    transfers: tuple[Transfer, ...]
    send_sizes: list[int]
    receive_sizes: list[int]
    packs: list[tuple[Copy, ...]]
    unpacks: list[tuple[Copy, ...]]
    straight: bool
    even: bool


SENT_TO_ITSELF = 8
"""Part of the elements that a rank may send to itself: an eighth, an even share of eight ranks.
That makes two copies of five. Where more of a tensor stays, as on few ranks or in flat partitions,
it is not packed, which would take memory for it twice."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One packed exchange along one mesh dimension; local if nothing leaves any rank.

    Attributes:
        mesh_dim: the mesh dimension.
        is_local: whether every rank finds what it needs in its own local tensors.
        transfers: the tensors.
        size: ranks along the mesh dimension.
        index: this rank's own index among them.
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
        """Elements of a tensor this rank sends to others; ``index`` is its own in ``mesh_dim``."""
        return sum(
            peers.numel * (peers.count - (peers.first <= index < peers.first + peers.count))
            for transfer in self.transfers
            if transfer.item == item
            for peers in transfer.sends
        )

    def packings(self, dtypes: tuple[Hashable, ...]) -> list[Packing]:
        """One collective for each dtype, nearly always one; planned once.

        Args:
            dtypes: of the transfers.
        """
        if dtypes not in self._packings:
            self._packings[dtypes] = [
                self._pack([t for t, other in pairs if other == dtype])
                for pairs in [list(zip(self.transfers, dtypes, strict=True))]
                for dtype in dict.fromkeys(dtypes)
            ]
        return self._packings[dtypes]

    def _pack(self, transfers: Sequence[Transfer]) -> Packing:
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
    """Packs the legs of all routes into hops, seen from one coordinate.

    Every coordinate of the mesh gets the same sequence of mesh dimensions, whatever it holds.

    Args:
        routes: for each tensor its legs, in order; empty for a tensor that stays.
        coordinate: the rank for which boxes are computed.
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
        # Local slicing first: it may line further routes up for the same exchange.
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
    mesh_dim = leg.move.mesh_dim
    if any(coordinate[dim] != index for dim, index in leg.only.items()):
        return Transfer(item, None)
    boxes = _boxes(leg.move, leg.sender, leg.receiver, coordinate)
    holds = leg.receiver is None or leg.receiver == coordinate[mesh_dim]
    shape = leg.move.target.local_shape(coordinate) if holds else None
    return Transfer(item, shape, *boxes, even=_is_even(leg))


@lru_cache(maxsize=4096)
def _cut_evenly(move: Move) -> bool:
    """Whether all ranks send as much to each, judged by the layouts, so that all ranks know."""
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
    """Whether all ranks have as much, each mesh dimension splitting a tensor dimension alone."""
    split = [
        (p.dim, size)
        for p, size in zip(layout.placements, layout.mesh, strict=True)
        if isinstance(p, Split) and not p.bounds and not p.among and p.stride == 1
    ]
    others = sum(p is not None for p in layout.placements) - len(split)
    alone = len({dim for dim, _ in split}) == len(split)
    return not others and alone and all(layout.shape[dim] % size == 0 for dim, size in split)


def _is_even(leg: Leg) -> bool:
    return leg.sender is None and leg.receiver is None and not leg.only and _cut_evenly(leg.move)


Boxes: TypeAlias = tuple[tuple[PeerRange, ...], tuple[PeerRange, ...], tuple[Copy, ...]]


@lru_cache(maxsize=65536)  # the layers of a model are alike
def _boxes(move: Move, sender: int | None, receiver: int | None, coordinate: Coordinate) -> Boxes:
    """What one rank sends to each peer, what it receives from each, and what it keeps."""
    source, target, mesh_dim = move.source, move.target, move.mesh_dim
    here, everyone = coordinate[mesh_dim], range(source.mesh[mesh_dim])
    own, nobody = range(here, here + 1), range(0)
    copied = sender is None and source.placements[mesh_dim] is None  # each has its own copy
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
    """The boxes of a rank's local tensor that each peer's has, too, in an order both agree on."""
    ours = mine.blocks(coordinate)
    for peer in _nearby(theirs, ours, peers) if ours else ():
        there = theirs.blocks((*coordinate[:mesh_dim], peer, *coordinate[mesh_dim + 1 :]))
        pairs = sorted(_pairs(ours, there), key=lambda both: both[0].start)
        yield peer, [box for box, _ in pairs]


def _nearby(layout: Layout, boxes: Sequence[Block], peers: range) -> Iterable[int]:
    """Those of the peers that may have some of the boxes: few of thousands of a flat weight."""
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
    pairs = (intersect(a, b) for a in ours for b in theirs)
    return [both for both in pairs if both is not None]


def redistribution(moves: tuple[Move, ...]) -> tuple[Leg, ...]:
    """The route of a tensor of which every rank has its part before and after."""
    return tuple(map(Leg, moves))


def gather_to(
    layout: Layout, dims: tuple[int, ...], owner: Coordinate, fixed: tuple[int, ...]
) -> tuple[Leg, ...]:
    """The route of a tensor to one owner.

    Args:
        layout: where its parts are.
        dims: tensor dimensions to gather.
        owner: coordinate that shall hold the whole.
        fixed: mesh dimensions along which other indices hold another tensor (the experts of a
            3-D weight), or a replica that is not needed.
    """
    only = {mesh_dim: owner[mesh_dim] for mesh_dim in fixed}
    legs = []
    for mesh_dim in reversed(range(len(layout.mesh))):
        placement = layout.placements[mesh_dim]
        if isinstance(placement, Split) and placement.dim in dims:
            move = Move(mesh_dim, layout, layout.move(mesh_dim, None))
            legs.append(Leg(move, receiver=owner[mesh_dim], only=dict(only)))
            layout, only = move.target, only | {mesh_dim: owner[mesh_dim]}
    return tuple(legs)


SPREAD_BEYOND = 4
"""Ranks to which an owner sends what all shall have itself. For more it would have to pack as many
copies: it deals the rows out instead, and all ranks send theirs to all."""


def send_from(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    owner: Coordinate,
    fixed: tuple[int, ...],
    target: Layout | None = None,
) -> tuple[Leg, ...]:
    """The route of a tensor from its owner to every rank along the mesh dimensions not fixed.

    Or, along those of which ``target`` has :class:`Copies`, to the indices that hold one; or, on a
    mesh of one dimension, to those that have it in ``target``.
    """
    layout = Layout(shape, mesh, (None,) * len(mesh))
    only = [None] * len(mesh) if target is None else list(target.placements)
    if target is not None and not any(isinstance(placement, Copies) for placement in only):
        return (Leg(Move(0, layout, target), sender=owner[0]),)
    ways = [d for d in range(len(mesh)) if d not in fixed]
    # Who has a copy along a mesh dimension, if not all have.
    among = {d: p.among for d, p in enumerate(only) if isinstance(p, Copies)}
    ways = [d for d in ways if among.get(d, (0, 2))[1] > 1]
    legs = []
    for i, mesh_dim in enumerate(ways):
        indices = {d: owner[d] for d in range(len(mesh)) if d not in ways[: i + 1]}
        sender, inside = owner[mesh_dim], among.get(mesh_dim)
        copies = None if inside is None else Copies(inside)
        if (mesh[mesh_dim] if inside is None else inside[1]) > SPREAD_BEYOND:
            rows = layout.move(mesh_dim, Split(0, among=inside))
            legs.append(Leg(Move(mesh_dim, layout, rows), sender=sender, only=indices))
            legs.append(Leg(Move(mesh_dim, rows, rows.move(mesh_dim, copies)), only=indices))
        else:
            move = Move(mesh_dim, layout, layout.move(mesh_dim, copies))
            legs.append(Leg(move, sender=sender, only=indices))
        layout = legs[-1].move.target
    return tuple(legs)
