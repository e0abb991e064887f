"""Packed exchanges: exact for any layouts and strides, in few copies, however many ranks."""

import math
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

import ranks
from conda_dist import Conda
from conda_dist.layout.flat import Flat, flat_to_compute
from conda_dist.layout.layout import Layout, Split
from conda_dist.layout.moves import reverse, to_compute, to_whole
from conda_dist.layout.redistribution import Leg, gather_to, plan_hops, redistribution, send_from
from exchanges import Held, carry, copies, everywhere, local

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))


@st.composite
def meshes(draw: st.DrawFn) -> tuple[int, ...]:
    """Most with more ranks along a dimension than rows to give them."""
    return tuple(draw(st.lists(st.integers(1, 10), min_size=1, max_size=2)))


@st.composite
def layouts(draw: st.DrawFn, mesh: tuple[int, ...]) -> Layout:
    """Even, uneven, empty, strided, bounded and replicated splits, and windows of rows."""
    batch = draw(st.lists(st.integers(1, 4), max_size=1))
    sizes = st.one_of(st.integers(1, 24), st.just(math.prod(mesh)), st.just(2 * math.prod(mesh)))
    shape = (*batch, draw(sizes), draw(sizes))
    dims = [draw(st.sampled_from([None, *range(len(shape))])) for _ in mesh]
    placements: list[Split | None] = []
    for i, dim in enumerate(dims):
        later = math.prod(mesh[j] for j in range(i + 1, len(mesh)) if dims[j] == dim)
        if dim is None:
            placements.append(None)
        elif later > 1 and draw(st.booleans()):
            placements.append(Split(dim, later))
        elif dims.count(dim) == 1 and draw(st.integers(0, 3)) == 0:
            cuts = draw(st.lists(st.integers(0, shape[dim]), min_size=mesh[i], max_size=mesh[i]))
            placements.append(Split(dim, bounds=(0, *sorted(cuts)[1:], shape[dim])))
        else:
            placements.append(Split(dim))
    layout = Layout(shape, mesh, tuple(placements))
    if draw(st.booleans()):
        return layout
    every, length = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rows = tuple(
        range(start, min(start + length, shape[-2]))
        for start in range(draw(st.integers(0, shape[-2] - 1)), shape[-2], length + every)
    )
    return layout.rows(rows)


@st.composite
def routes(
    draw: st.DrawFn, mesh: tuple[int, ...]
) -> tuple[Layout, Layout | None, tuple[Leg, ...], tuple[int, ...] | None]:
    """A route: layouts before and after, None for whole, and who has the tensor in the end."""
    layout = draw(layouts(mesh))
    owner = tuple(draw(st.integers(0, size - 1)) for size in mesh)
    kind = draw(st.sampled_from(["compute", "back", "gather", "whole", "send"]))
    moves = to_compute(layout)
    compute = moves[-1].target if moves else layout
    dims = tuple(range(len(layout.shape)))
    replicas = tuple(d for d, p in enumerate(layout.placements) if p is None)
    whole = Layout(layout.shape, mesh, (None,) * len(mesh))
    if kind == "compute":
        return layout, compute, redistribution(moves), None
    if kind == "back":
        return compute, layout, redistribution(reverse(moves)), None
    if kind == "gather" and len(replicas) < len(mesh):
        return layout, whole, gather_to(layout, dims, owner, replicas), owner
    if kind == "send":
        return whole, whole, send_from(layout.shape, mesh, owner, ()), None
    return layout, whole, redistribution(to_whole(layout, dims)), None


def _strided(tensor: Tensor, kind: int) -> Tensor:
    """The same elements with other strides, as gradients and views have."""
    if kind == 0 or not tensor.numel():
        return tensor
    if kind == 1:  # the storage of the transpose
        return tensor.mT.contiguous().mT
    if kind == 2:  # between other elements, behind an offset
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), -9, dtype=tensor.dtype)
        return wide[..., 3::2].copy_(tensor)
    return tensor.expand(2, *tensor.shape)[1]


@given(st.data())
@settings(max_examples=EXAMPLES)
def test_exchanges_equal_slices_of_the_whole(data: st.DataObject) -> None:
    """Several tensors of two dtypes in one exchange, each by its own route."""
    mesh = data.draw(meshes())
    chosen = [data.draw(routes(mesh)) for _ in range(data.draw(st.integers(1, 4)))]
    wholes: list[Tensor] = []
    for i, (before, *_) in enumerate(chosen):
        dtype = data.draw(st.sampled_from([torch.int64, torch.int32]))
        numbers = torch.arange(math.prod(before.shape), dtype=dtype) + 10000 * i
        wholes.append(numbers.view(before.shape))
    start: Held = {c: [] for c in chosen[0][0].coordinates()}
    for whole, (before, *_) in zip(wholes, chosen, strict=True):
        for c, (held,) in everywhere(before, whole).items():
            assert held is not None
            start[c].append(_strided(held, data.draw(st.integers(0, 3))))
    ended = carry(chosen[0][0], [legs for *_, legs, _ in chosen], start)
    for c, held_here in ended.items():
        for whole, held, (_, after, _, owner) in zip(wholes, held_here, chosen, strict=True):
            assert after is not None
            if owner is None or c == owner:
                assert held is not None
                assert torch.equal(held, local(after, c, whole))


@given(st.data())
@settings(max_examples=EXAMPLES)
def test_flat_ranges(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=3)))
    numel, world = math.prod(shape), data.draw(st.integers(1, 10))
    if data.draw(st.booleans()):
        bounds = tuple(numel * i // world for i in range(world + 1))
    else:
        cuts = data.draw(st.lists(st.integers(0, numel), min_size=world, max_size=world))
        bounds = (0, *sorted(cuts)[1:], numel)
    flat = Flat.of(shape, bounds)
    compute, moves = flat_to_compute(flat)
    tensor = torch.arange(numel).view(shape)
    if moves:
        there = carry(flat, [redistribution(moves)] * 2, everywhere(flat, tensor, tensor + numel))
        for c, held in there.items():
            for i, part in enumerate(held):
                assert part is not None
                assert torch.equal(part, local(compute, c, tensor + i * numel))
        back = carry(flat, [redistribution(reverse(moves))] * 2, there)
        for c, (part, _) in back.items():
            assert part is not None
            assert torch.equal(part, local(flat, c, tensor))


ROWS = tuple(range(start, start + 512) for start in range(0, 12288, 768))


@pytest.mark.parametrize(
    ("shape", "placements", "rows", "most"),
    [
        ((4096, 12288), (Split(0),), (), 2),  # even
        ((4001, 11007), (Split(0),), (), 4),  # one shorter piece, and empty ones
        ((300, 1000), (Split(0),), (), 4),  # fewer rows than ranks
        ((12288, 16384), (Split(0),), (range(4096),), 6),
        ((12288, 16384), (Split(0),), ROWS, 6),  # parts that repeat down the rows
        ((4096, 12288), (Split(0), Split(1)), (), 3),
        ((4096, 12288), (Split(0, 8), Split(0)), (), 6),  # strided shards
        ((4096, 11008), (Split(0, 8), Split(0)), (), 8),
        ((16, 512, 4096), (Split(1),), (), 2),
    ],
    ids=str,
)
def test_copies_do_not_grow_with_the_ranks(
    shape: tuple[int, ...], placements: tuple[Split, ...], rows: tuple[range, ...], most: int
) -> None:
    """Of a weight on its way to the compute layout, back, to an owner and to all."""
    for size in (64, 512, 4096):
        mesh = (size,) if len(placements) == 1 else (size // 8, 8)
        layout = Layout(shape, mesh, placements)
        layout = layout.rows(rows) if rows else layout
        moves = to_compute(layout)
        middle = tuple(n // 3 for n in mesh)
        dims = tuple(range(len(shape)))
        ways = [redistribution(moves), redistribution(reverse(moves))]
        ways += [gather_to(layout, dims, middle, ()), redistribution(to_whole(layout, dims))]
        for route in ways:
            legs = max(len(route), 1)
            assert copies(layout, [route], middle) <= most * legs, (size, route)


@pytest.mark.parametrize("size", [8, 64, 512])
def test_flat_ranges_of_many_ranks(size: int) -> None:
    """A weight that few of many ranks hold, and one that all hold."""
    for held in (3, size):
        shape, edges = (512, 768), [512 * 768 * i // held for i in range(held + 1)]
        bounds = (*edges, *[edges[-1]] * (size - held))
        flat = Flat.of(shape, bounds)
        _, moves = flat_to_compute(flat)
        for route in (redistribution(moves), redistribution(reverse(moves))):
            assert copies(flat, [route], (1,)) <= 12


def test_a_rank_of_thousands_plans_without_asking_each() -> None:
    layout = Layout((4096, 11008), (4096,), (Split(0),))
    (leg,) = redistribution(to_compute(layout))
    (hop,) = plan_hops([(leg,)], (17,))
    assert max(len(hop.transfers[0].sends), len(hop.transfers[0].receives)) <= 3


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


SHAPES = ((256, 384), (384, 256)) * 2


def _operators(places: Sequence[tuple[int, int]]) -> list[int]:
    """Operators of a steady step of a rank of a group of which no other rank exists.

    Args:
        places: numbers of ranks, and which of them this is.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    alone = _optimizer([torch.randn(shape) for shape in SHAPES])
    alone.step()
    dist.destroy_process_group()
    counts = []
    for world, rank in places:
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        mesh = init_device_mesh("cpu", (world,))
        optimizer = _optimizer([_sharded(shape, mesh, rank) for shape in SHAPES])
        optimizer.load_state_dict(alone.state_dict())
        optimizer.step()
        with _Counted() as counted:
            optimizer.step()
        counts.append(counted.operators)
        dist.destroy_process_group()
    return counts


def _sharded(shape: tuple[int, int], mesh: DeviceMesh, rank: int) -> DTensor:
    pieces = torch.randn(shape).chunk(mesh.size())
    rows = pieces[rank] if rank < len(pieces) else torch.empty(0, shape[1])
    size, stride = torch.Size(shape), (shape[1], 1)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=size, stride=stride)


def _optimizer(tensors: Sequence[Tensor]) -> Conda:
    params = [nn.Parameter(tensor) for tensor in tensors]
    for param in params:
        param.grad = torch.randn_like(param)
    return Conda([{"params": params, "algorithm": "conda"}], update_proj_gap=1000)


def test_operators_of_a_step_do_not_grow_with_the_ranks() -> None:
    """Two wide and two tall weights: each wide one is packed and unpacked twice, and flags once.

    Of 384 columns on 256 ranks the most are two on a rank, and the last 64 ranks have none: the
    flags, which all get, are packed in two copies, three operators more.
    """
    places = [(world, rank) for world in (8, 64, 256) for rank in (0, world // 2 - 1)]
    (counts,) = ranks.run(1, _operators, places)
    assert len(set(counts[:4])) == len(set(counts[4:])) == 1, counts
    assert counts[0] <= 128
    assert counts[4] <= counts[0] + 3
