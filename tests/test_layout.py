"""Index arithmetic: layouts against DTensor's own splitting, moves against what they must carry."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from conda_dist.layout import Layout, Move, Split, kept_dim, reverse, to_compute, to_whole
from conda_dist.transfer import Hop, Leg, gather_to, plan_hops, redistribution, send_from

SIZES = st.integers(1, 9)


@st.composite
def layouts(draw: st.DrawFn, dims: tuple[int, ...] = (2, 3)) -> Layout:
    """Layouts as FSDP, HSDP, tensor and expert parallelism make them, of any sizes."""
    shape = tuple(draw(SIZES) for _ in range(draw(st.sampled_from(dims))))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    choice = st.sampled_from([None, *range(len(shape))])
    dims_split = [draw(choice) for _ in mesh]
    placements: list[Split | None] = []
    for i, dim in enumerate(dims_split):
        later = math.prod(mesh[j] for j in range(i + 1, len(mesh)) if dims_split[j] == dim)
        strided = dim is not None and later > 1 and draw(st.booleans())
        placements.append(None if dim is None else Split(dim, later if strided else 1))
    return Layout(shape, mesh, tuple(placements))


def _torch_local(layout: Layout, coordinate: tuple[int, ...], tensor: Tensor) -> Tensor:
    for size, index, split in zip(layout.mesh, coordinate, layout.placements, strict=True):
        if split is not None:
            placement = (
                Shard(split.dim)
                if split.stride == 1
                else _StridedShard(split.dim, split_factor=split.stride)
            )
            pieces, _ = placement._split_tensor(tensor, size, with_padding=False, contiguous=False)
            tensor = pieces[index]
    return tensor


def _ours(layout: Layout, coordinate: tuple[int, ...], tensor: Tensor) -> Tensor:
    local = torch.full(layout.local_shape(coordinate), -1)
    for block in layout.blocks(coordinate):
        there = tuple(slice(a, a + n) for a, n in zip(block.start, block.shape, strict=True))
        here = tuple(slice(a, a + n) for a, n in zip(block.local, block.shape, strict=True))
        local[here] = tensor[there]
    return local


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_blocks_are_what_dtensor_holds(layout: Layout) -> None:
    tensor = torch.arange(math.prod(layout.shape)).view(layout.shape)
    for coordinate in layout.coordinates():
        theirs = _torch_local(layout, coordinate, tensor)
        # torch gives an empty chunk the shape (0,) in places: elements decide, then the shape.
        ours = _ours(layout, coordinate, tensor)
        assert ours.numel() == theirs.numel()
        if theirs.numel():
            assert torch.equal(ours, theirs)


def _simulate(
    layout: Layout,
    routes: list[tuple[Leg, ...]],
    tensors: dict[tuple[int, ...], list[Tensor | None]],
) -> dict[tuple[int, ...], list[Tensor | None]]:
    """Executes planned hops for all ranks of a mesh in one process, as written."""
    hops: dict[tuple[int, ...], tuple[Hop, ...]] = {
        c: plan_hops(routes, c) for c in layout.coordinates()
    }
    shapes = {tuple((hop.mesh_dim, hop.silent) for hop in planned) for planned in hops.values()}
    assert len(shapes) == 1, "ranks would call different collectives"
    for k in range(len(next(iter(hops.values())))):
        after: dict[tuple[int, ...], list[Tensor | None]] = {c: list(t) for c, t in tensors.items()}
        for coordinate, planned in hops.items():
            for part in planned[k].transfers:
                after[coordinate][part.item] = (
                    None if part.shape is None else torch.full(part.shape, -1)
                )
        for sender, planned in hops.items():
            for receiver, theirs in hops.items():
                mesh_dim = planned[k].mesh_dim
                if sender[:mesh_dim] + sender[mesh_dim + 1 :] != (
                    receiver[:mesh_dim] + receiver[mesh_dim + 1 :]
                ):
                    continue
                pairs = zip(planned[k].transfers, theirs[k].transfers, strict=True)
                for sends, receives in pairs:
                    out = sends.sends[receiver[mesh_dim]]
                    into = receives.receives[sender[mesh_dim]]
                    assert [b.shape for b in out] == [b.shape for b in into]
                    if planned[k].silent:
                        assert sender == receiver or not out
                    for a, b in zip(out, into, strict=True):
                        source, target = tensors[sender][sends.item], after[receiver][sends.item]
                        assert source is not None
                        assert target is not None
                        ours = tuple(slice(s, s + n) for s, n in zip(a.local, a.shape, strict=True))
                        to = tuple(slice(s, s + n) for s, n in zip(b.local, b.shape, strict=True))
                        target[to] = source[ours]
        tensors = after
    return tensors


def _everywhere(layout: Layout, tensor: Tensor) -> dict[tuple[int, ...], list[Tensor | None]]:
    return {c: [_ours(layout, c, tensor)] for c in layout.coordinates()}


@given(layouts())
@settings(max_examples=200, deadline=None)
def test_redistribution_carries_every_element(layout: Layout) -> None:
    tensor = torch.arange(math.prod(layout.shape)).view(layout.shape)
    moves = to_compute(layout)
    compute = moves[-1].target if moves else layout
    mixed = 2 * len(layout.shape) - 3 - kept_dim(layout.shape)
    assert not compute.splitting(mixed), "a rank would hold parts of rows"
    there = _simulate(layout, [redistribution(moves)], _everywhere(layout, tensor))
    for coordinate, (held,) in there.items():
        assert held is not None
        assert torch.equal(held, _ours(compute, coordinate, tensor))
    back = _simulate(layout, [redistribution(reverse(moves))], there)
    for coordinate, (held,) in back.items():
        assert held is not None
        assert torch.equal(held, _ours(layout, coordinate, tensor))


@given(layouts(dims=(2,)), st.data())
@settings(max_examples=150, deadline=None)
def test_gather_and_scatter(layout: Layout, data: st.DataObject) -> None:
    tensor = torch.arange(math.prod(layout.shape)).view(layout.shape)
    owner = tuple(data.draw(st.integers(0, size - 1)) for size in layout.mesh)
    replicas = tuple(d for d, p in enumerate(layout.placements) if p is None)
    route = gather_to(layout, (0, 1), owner, replicas)
    gathered = _simulate(layout, [route], _everywhere(layout, tensor))
    held = gathered[owner][0]
    assert held is not None
    assert torch.equal(held, tensor)

    back = send_from((3, 3), layout.mesh, owner, ())
    square = torch.arange(9).view(3, 3)
    start: dict[tuple[int, ...], list[Tensor | None]] = {
        c: [square.clone() if c == owner else None] for c in layout.coordinates()
    }
    for (held,) in _simulate(layout, [back], start).values():
        assert held is not None
        assert torch.equal(held, square)


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_to_whole(layout: Layout) -> None:
    tensor = torch.arange(math.prod(layout.shape)).view(layout.shape)
    dims = tuple(range(len(layout.shape)))
    route = redistribution(to_whole(layout, dims))
    for (held,) in _simulate(layout, [route], _everywhere(layout, tensor)).values():
        assert held is not None
        assert torch.equal(held, tensor)


@pytest.mark.parametrize(
    ("shape", "splits", "expected"),
    [
        ((8, 4), [Split(0)], [Split(0)]),  # tall under FSDP: nothing moves
        ((4, 8), [Split(0)], [Split(1)]),  # wide under FSDP: transposed
        ((4, 8), [Split(1)], [Split(1)]),
        ((4, 8), [None, Split(0)], [None, Split(1)]),  # HSDP
        ((4, 8), [Split(0), Split(1)], [Split(1, 2), Split(1)]),  # FSDP x TP, row-wise
        ((8, 4), [Split(0), Split(1)], [Split(0), Split(0)]),
        ((4, 8), [Split(0, 2), Split(0)], [Split(1), Split(1)]),  # FSDP x TP, column-wise
        ((4, 4, 8), [Split(0), Split(1)], [Split(0), Split(2)]),  # experts
    ],
)
def test_compute_layout(
    shape: tuple[int, ...], splits: list[Split | None], expected: list[Split | None]
) -> None:
    layout = Layout(shape, (2,) * len(splits), tuple(splits))
    moves = to_compute(layout)
    assert list((moves[-1].target if moves else layout).placements) == expected


def test_moves_that_leave_the_group_are_not_made() -> None:
    """FSDP x TP over 7 columns: chunks of chunks are not chunks, so it goes through the whole."""
    layout = Layout((2, 7), (3, 2), (Split(0), Split(1)))
    assert Move(1, layout, layout.move(1, None)) in to_compute(layout)


def test_matrices() -> None:
    layout = Layout((2, 3, 4, 4), (2, 2), (Split(0), Split(1)))
    held = {c: layout.matrices(c) for c in product(range(2), range(2))}
    assert held == {(0, 0): (0, 1), (0, 1): (2,), (1, 0): (3, 4), (1, 1): (5,)}
