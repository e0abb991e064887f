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

from conda_dist.layout.layout import Layout, Split
from conda_dist.layout.moves import Move, kept_dim, reverse, to_compute, to_whole
from conda_dist.layout.redistribution import gather_to, redistribution, send_from
from exchanges import Held, carry, everywhere, local

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


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_blocks_are_what_dtensor_holds(layout: Layout) -> None:
    tensor = torch.arange(math.prod(layout.shape)).view(layout.shape)
    for coordinate in layout.coordinates():
        theirs = _torch_local(layout, coordinate, tensor)
        # torch gives an empty chunk the shape (0,) in places: elements decide, then the shape.
        ours = local(layout, coordinate, tensor)
        assert ours.numel() == theirs.numel()
        if theirs.numel():
            assert torch.equal(ours, theirs)


@given(layouts())
@settings(max_examples=200, deadline=None)
def test_redistribution_carries_every_element(layout: Layout) -> None:
    tensor = torch.arange(math.prod(layout.shape)).view(layout.shape)
    moves = to_compute(layout)
    compute = moves[-1].target if moves else layout
    mixed = 2 * len(layout.shape) - 3 - kept_dim(layout.shape)
    assert not compute.splitting(mixed), "a rank would hold parts of rows"
    there = carry(layout, [redistribution(moves)], everywhere(layout, tensor))
    for coordinate, (held,) in there.items():
        assert held is not None
        assert torch.equal(held, local(compute, coordinate, tensor))
    back = carry(layout, [redistribution(reverse(moves))], there)
    for coordinate, (held,) in back.items():
        assert held is not None
        assert torch.equal(held, local(layout, coordinate, tensor))


@given(layouts(dims=(2,)), st.data())
@settings(max_examples=150, deadline=None)
def test_gather_and_scatter(layout: Layout, data: st.DataObject) -> None:
    tensor = torch.arange(math.prod(layout.shape)).view(layout.shape)
    owner = tuple(data.draw(st.integers(0, size - 1)) for size in layout.mesh)
    replicas = tuple(d for d, p in enumerate(layout.placements) if p is None)
    route = gather_to(layout, (0, 1), owner, replicas)
    gathered = carry(layout, [route], everywhere(layout, tensor))
    held = gathered[owner][0]
    assert held is not None
    assert torch.equal(held, tensor)

    back = send_from((3, 3), layout.mesh, owner, ())
    square = torch.arange(9).view(3, 3)
    start: Held = {c: [square.clone() if c == owner else None] for c in layout.coordinates()}
    for (held,) in carry(layout, [back], start).values():
        assert held is not None
        assert torch.equal(held, square)


@given(layouts())
@settings(max_examples=100, deadline=None)
def test_to_whole(layout: Layout) -> None:
    tensor = torch.arange(math.prod(layout.shape)).view(layout.shape)
    dims = tuple(range(len(layout.shape)))
    route = redistribution(to_whole(layout, dims))
    for (held,) in carry(layout, [route], everywhere(layout, tensor)).values():
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
    assert Move(1, layout, layout.with_placement(1, None)) in to_compute(layout)


def test_matrices() -> None:
    layout = Layout((2, 3, 4, 4), (2, 2), (Split(0), Split(1)))
    held = {c: layout.matrices(c) for c in product(range(2), range(2))}
    assert held == {(0, 0): (0, 1), (0, 1): (2,), (1, 0): (3, 4), (1, 1): (5,)}
