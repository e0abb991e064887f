"""Planned exchanges of all ranks of a mesh, carried out in one process as ``Exchange`` does."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from conda_dist.layout.layout import Coordinate, Layout
from conda_dist.layout.redistribution import Hop, Leg, Packing, plan_hops
from conda_dist.runtime.collectives import keep, pack, unpack

Held = dict[Coordinate, list[Tensor | None]]
"""By coordinate the local tensors; None where it holds none."""


def local(layout: Layout, coordinate: Coordinate, tensor: Tensor) -> Tensor:
    """What a coordinate holds of a tensor, by the layout's blocks."""
    held = torch.full(layout.local_shape(coordinate), -1, dtype=tensor.dtype)
    for block in layout.blocks(coordinate):
        there = tuple(slice(a, a + n) for a, n in zip(block.start, block.shape, strict=True))
        if block.strides is None:
            here = tuple(slice(a, a + n) for a, n in zip(block.local, block.shape, strict=True))
            held[here] = tensor[there]
        else:
            held.as_strided(block.shape, block.strides, block.local[0]).copy_(tensor[there])
    return held


def everywhere(layout: Layout, *tensors: Tensor) -> Held:
    """What every coordinate holds of tensors."""
    return {c: [local(layout, c, tensor) for tensor in tensors] for c in layout.coordinates()}


def carry(layout: Layout, routes: Sequence[tuple[Leg, ...]], tensors: Held) -> Held:
    """Takes tensors through their routes on all ranks.

    Args:
        layout: any layout on their mesh.
        routes: for each tensor its legs.
        tensors: the local tensors.
    """
    planned = {c: plan_hops(routes, c) for c in layout.coordinates()}
    calls = {tuple((hop.mesh_dim, hop.is_local) for hop in hops) for hops in planned.values()}
    assert len(calls) == 1, "ranks would call different collectives"
    dtypes = [
        next(t.dtype for t in held if t is not None) for held in zip(*tensors.values(), strict=True)
    ]
    for k in range(len(next(iter(planned.values())))):
        tensors = _hop({c: hops[k] for c, hops in planned.items()}, tensors, dtypes)
    return tensors


def _hop(hops: Mapping[Coordinate, Hop], tensors: Held, dtypes: Sequence[torch.dtype]) -> Held:
    after = {c: list(held) for c, held in tensors.items()}
    for c, hop in hops.items():
        for transfer in hop.transfers:
            shape, old = transfer.shape, tensors[c][transfer.item]
            new = None if shape is None else torch.full(shape, -1, dtype=dtypes[transfer.item])
            after[c][transfer.item] = new
            if hop.is_local and new is not None:
                if old is not None and old.shape == new.shape:
                    after[c][transfer.item] = old
                else:
                    keep(transfer, old, new)
        assert not hop.is_local or all(
            hop.sent(hop.index, item) == 0 for item in range(len(dtypes))
        )
    if not next(iter(hops.values())).is_local:
        packings = {
            c: hop.packings(tuple(dtypes[t.item] for t in hop.transfers)) for c, hop in hops.items()
        }
        for i in range(len(next(iter(packings.values())))):
            _collective(hops, {c: p[i] for c, p in packings.items()}, tensors, after, dtypes)
    return after


def _collective(
    hops: Mapping[Coordinate, Hop],
    packings: Mapping[Coordinate, Packing],
    tensors: Held,
    after: Held,
    dtypes: Sequence[torch.dtype],
) -> None:
    """An all-to-all along one mesh dimension, of all its groups."""
    parts: dict[Coordinate, list[Tensor]] = {}
    for c, packing in packings.items():
        dtype = dtypes[packing.transfers[0].item]
        buffer = torch.full((sum(packing.send_sizes),), -2, dtype=dtype)
        pack(packing, tensors[c], buffer)
        parts[c] = list(buffer.split(packing.send_sizes))
        sent = sum(n for peer, n in enumerate(packing.send_sizes) if peer != hops[c].index)
        assert sent == sum(hops[c].sent(hops[c].index, t.item) for t in packing.transfers)
    for c, packing in packings.items():
        d, here = hops[c].mesh_dim, hops[c].index
        arrived = [parts[(*c[:d], peer, *c[d + 1 :])][here] for peer in range(hops[c].size)]
        assert [part.numel() for part in arrived] == packing.receive_sizes
        sizes = {*packing.send_sizes, *packing.receive_sizes}
        assert len({p.even for p in packings.values()}) == 1
        assert not packing.even or len(sizes) == 1
        kept = [tensors[c][t.item] for t in packing.transfers]
        outputs = {t.item: out for t in packing.transfers if (out := after[c][t.item]) is not None}
        unpack(packing, torch.cat(arrived), kept, outputs)


def copies(layout: Layout, routes: Sequence[tuple[Leg, ...]], coordinate: Coordinate) -> int:
    """Strided copies that one rank needs for its exchanges, tensors of one dtype."""
    return sum(
        len(made)
        for hop in plan_hops(routes, coordinate)
        if not hop.is_local
        for packing in hop.packings((0,) * len(hop.transfers))
        for made in (*packing.packs, *packing.unpacks)
    )
