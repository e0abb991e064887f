"""Who sends which elements to whom: pure index arithmetic over layouts, no communication.

A :class:`Route` takes one tensor through several moves; :func:`plan_hops` packs the routes of many
tensors into as few exchanges as possible, one per mesh dimension crossed, and works out for one
rank which boxes of its local tensors go to each peer and come from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

from conda_dist.layout import Block, Coordinate, Copies, Layout, Move, Split, intersect


@dataclass(frozen=True, slots=True)
class Leg:
    """A move, perhaps by some ranks of the mesh only.

    Attributes:
        move: what changes along one mesh dimension.
        sender: the one index along ``move.mesh_dim`` that holds the tensor; None if all do.
        receiver: the one index along ``move.mesh_dim`` that shall hold it; None if all shall.
        among: ``{mesh dimension: index}`` of the ranks that take part; the others look on.
    """

    move: Move
    sender: int | None = None
    receiver: int | None = None
    among: dict[int, int] = field(default_factory=dict)

    @property
    def silent(self) -> bool:
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
        sends: for each peer the boxes of the local tensor it is sent.
        receives: for each peer the boxes of the new local tensor it fills.
    """

    item: int
    shape: tuple[int, ...] | None
    sends: tuple[tuple[Block, ...], ...]
    receives: tuple[tuple[Block, ...], ...]


@dataclass(frozen=True, slots=True)
class Hop:
    """One packed exchange along one mesh dimension; ``silent`` if nothing leaves any rank."""

    mesh_dim: int
    silent: bool
    transfers: tuple[Transfer, ...]

    def sent(self, index: int, item: int) -> int:
        """Elements of a tensor this rank sends to others; ``index`` is its own in ``mesh_dim``."""
        return sum(
            math.prod(block.shape)
            for transfer in self.transfers
            for peer, blocks in enumerate(transfer.sends)
            for block in blocks
            if peer != index and transfer.item == item
        )


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
        silent = [(item, leg) for item, leg in heads if leg.silent]
        mesh_dim = (silent or heads)[0][1].move.mesh_dim
        chosen = [(item, leg) for item, leg in (silent or heads) if leg.move.mesh_dim == mesh_dim]
        transfers = tuple(_transfer(item, leg, coordinate) for item, leg in chosen)
        hops.append(Hop(mesh_dim, bool(silent), transfers))
        for item, _ in chosen:
            progress[item] += 1
    return tuple(hops)


def _transfer(item: int, leg: Leg, coordinate: Coordinate) -> Transfer:
    mesh_dim, size = leg.move.mesh_dim, leg.move.source.mesh[leg.move.mesh_dim]
    if any(coordinate[dim] != index for dim, index in leg.among.items()):
        return Transfer(item, None, ((),) * size, ((),) * size)
    sends, receives = _boxes(leg.move, leg.sender, leg.receiver, coordinate)
    holds = leg.receiver is None or leg.receiver == coordinate[mesh_dim]
    shape = leg.move.target.local_shape(coordinate) if holds else None
    return Transfer(item, shape, sends, receives)


Boxes: TypeAlias = tuple[tuple[Block, ...], ...]


@lru_cache(maxsize=65536)  # the layers of a model are alike
def _boxes(
    move: Move, sender: int | None, receiver: int | None, coordinate: Coordinate
) -> tuple[Boxes, Boxes]:
    """What one rank sends to each peer, and what it receives from each."""
    mesh_dim = move.mesh_dim
    peers = [
        (*coordinate[:mesh_dim], index, *coordinate[mesh_dim + 1 :])
        for index in range(move.source.mesh[mesh_dim])
    ]
    ends = (sender, receiver)
    sends = tuple(_common(move, coordinate, peer, *ends)[0] for peer in peers)
    receives = tuple(_common(move, peer, coordinate, *ends)[1] for peer in peers)
    return sends, receives


def _common(
    move: Move,
    sender: Coordinate,
    receiver: Coordinate,
    only_sender: int | None,
    only_receiver: int | None,
) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """Boxes that go from one rank to another: in the sender's tensor and in the receiver's."""
    mesh_dim, source, target = move.mesh_dim, move.source, move.target
    if only_receiver is not None and receiver[mesh_dim] != only_receiver:
        return (), ()
    if only_sender is not None:
        if sender[mesh_dim] != only_sender:
            return (), ()
    elif source.placements[mesh_dim] is None and sender != receiver:
        return (), ()  # the receiver has its own copy
    pairs = [
        both
        for ours in source.blocks(sender)
        for theirs in target.blocks(receiver)
        if (both := intersect(ours, theirs)) is not None
    ]
    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)


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
    among = {mesh_dim: owner[mesh_dim] for mesh_dim in fixed}
    legs = []
    for mesh_dim in reversed(range(len(layout.mesh))):
        placement = layout.placements[mesh_dim]
        if isinstance(placement, Split) and placement.dim in dims:
            move = Move(mesh_dim, layout, layout.move(mesh_dim, None))
            legs.append(Leg(move, receiver=owner[mesh_dim], among=dict(among)))
            layout, among = move.target, among | {mesh_dim: owner[mesh_dim]}
    return tuple(legs)


def deal_from(
    layout: Layout, dims: tuple[int, ...], owner: Coordinate, fixed: tuple[int, ...]
) -> tuple[Leg, ...]:
    """The way back of :func:`gather_to`, and on to the replicas along ``fixed``."""
    legs = [
        Leg(
            Move(leg.move.mesh_dim, leg.move.target, leg.move.source), leg.receiver, None, leg.among
        )
        for leg in reversed(gather_to(layout, dims, owner, fixed))
    ]
    for i, mesh_dim in enumerate(fixed):
        among = {d: owner[d] for d in fixed[i + 1 :]}
        legs.append(Leg(Move(mesh_dim, layout, layout), sender=owner[mesh_dim], among=among))
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
        beside = {d: owner[d] for d in range(len(mesh)) if d not in ways[: i + 1]}
        sender, inside = owner[mesh_dim], among.get(mesh_dim)
        copies = None if inside is None else Copies(inside)
        if (mesh[mesh_dim] if inside is None else inside[1]) > SPREAD_BEYOND:
            rows = layout.move(mesh_dim, Split(0, among=inside))
            legs.append(Leg(Move(mesh_dim, layout, rows), sender=sender, among=beside))
            legs.append(Leg(Move(mesh_dim, rows, rows.move(mesh_dim, copies)), among=beside))
        else:
            move = Move(mesh_dim, layout, layout.move(mesh_dim, copies))
            legs.append(Leg(move, sender=sender, among=beside))
        layout = legs[-1].move.target
    return tuple(legs)
