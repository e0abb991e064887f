"""Weights in flat ranges, as ZeRO keeps them: index arithmetic, exchanges and whole steps."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import models
import ranks
from conda_dist import Conda
from conda_dist.layout.flat import Flat
from conda_dist.layout.layout import Topology
from conda_dist.layout.moves import reverse
from conda_dist.layout.redistribution import plan_hops, redistribution
from conda_dist.options import Options
from conda_dist.plan.compute_groups import Request, assign_owners, choose
from conda_dist.plan.schedule import plan_task
from conda_dist.plan.weight_plan import plan_weight
from conda_dist.rules.conda import CondaRule
from conda_dist.runtime.collectives import Mesh
from conda_dist.runtime.step import MatrixPath
from conda_dist.runtime.weight import Weight
from exchanges import Held, carry, local

SIZES = st.integers(1, 7)
GROUP: dict[str, Any] = {
    "lr": 0.02,
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "scale": 0.25,
    "correct_bias": True,
    "update_proj_gap": 3,
}
STEPS = 7


@st.composite
def flats(draw: st.DrawFn) -> Flat:
    """Tensors cut anywhere, empty ranges included."""
    shape = tuple(draw(st.lists(SIZES, min_size=2, max_size=4)))
    numel = math.prod(shape)
    cuts = draw(st.lists(st.integers(0, numel), max_size=4))
    return Flat.of(shape, (0, *sorted(cuts), numel))


@given(flats())
@settings(max_examples=300, deadline=None)
def test_blocks_are_the_ranges(flat: Flat) -> None:
    tensor = torch.arange(math.prod(flat.shape)).view(flat.shape)
    for coordinate in flat.coordinates():
        start, stop = flat.held(coordinate)
        assert torch.equal(local(flat, coordinate, tensor), torch.arange(start, stop))
        assert len(flat.blocks(coordinate)) <= 2 * len(flat.shape) - 1


@given(flats())
@settings(max_examples=300, deadline=None)
def test_exchanges_are_exact_both_ways(flat: Flat) -> None:
    """Every rank gets whole rows or columns of what it computes, and the ranges come back."""
    plan = plan_weight("weight", Topology(flat.mesh, tuple(range(*flat.mesh))), flat)
    tensor = torch.arange(math.prod(flat.shape)).view(flat.shape)
    held = {c: local(flat, c, tensor) for c in flat.coordinates()}
    if not plan.moves:
        for c, part in held.items():
            viewed = part.view(plan.compute.local_shape(c))
            assert torch.equal(viewed, local(plan.compute, c, tensor))
        return
    there: Held = {c: [part] for c, part in held.items()}
    for moves, target in ((plan.moves, plan.compute), (reverse(plan.moves), flat)):
        there = carry(flat, [redistribution(moves)], there)
        for c, (part,) in there.items():
            assert part is not None
            assert torch.equal(part, local(target, c, tensor))


def _sent(shape: tuple[int, ...], bounds: tuple[int, ...]) -> list[int]:
    """Elements each rank sends on the way to compute."""
    flat = Flat.of(shape, bounds)
    plan = plan_weight("weight", Topology(flat.mesh, tuple(range(*flat.mesh))), flat)
    routes = [redistribution(plan.moves)]
    return [
        sum(hop.sent(coordinate[0], 0) for hop in plan_hops(routes, coordinate))
        for coordinate in flat.coordinates()
    ]


@pytest.mark.parametrize(
    ("shape", "bounds", "sent"),
    [
        ((6, 4), (0, 8, 24), [0, 0]),  # between rows
        ((6, 4), (0, 9, 24), [0, 3]),  # the rest of the row that the first rank began
        ((6, 4), (0, 9, 10, 24), [0, 1, 2]),
        ((4, 6), (0, 0, 24, 24), [0, 0, 0]),  # wide, but in one partition
        ((4, 6), (0, 12, 24), [6, 6]),  # half of each half
        ((2, 4, 6), (0, 24, 48), [0, 0]),  # a matrix each
        ((2, 4, 6), (0, 20, 48), [0, 4]),
    ],
)
def test_only_what_must_travels(
    shape: tuple[int, ...], bounds: tuple[int, ...], sent: list[int]
) -> None:
    assert _sent(shape, bounds) == sent


@pytest.mark.parametrize(
    ("shape", "bounds", "held", "split", "sent"),
    [
        ((6, 4), (0, 24, 24, 24), [16, 0, 0], [16, 0, 0], [0, 0, 0]),  # in one partition
        ((6, 4), (0, 9, 10, 24), [16, 0, 16], [8, 0, 8], [16, 0, 12]),  # momentum, then rotation
        ((4, 6), (0, 0, 12, 24), [0, 16, 16], [0, 8, 8], [0, 16, 12]),
        ((2, 4, 6), (0, 24, 24, 48), [16, 0, 16], [16, 0, 16], [0, 0, 0]),  # a matrix each
        ((6, 4), (0, 8, 16, 24), [16, 16, 16], [4, 4, 8], [32, 8, 8]),
    ],
)
def test_who_computes_nothing_keeps_no_basis(
    shape: tuple[int, ...],
    bounds: tuple[int, ...],
    held: list[int],
    split: list[int],
    sent: list[int],
) -> None:
    """Elements of bases on each rank, and those that it sends to refresh them."""
    flat, world = Flat.of(shape, bounds), len(bounds) - 1
    for shard, expected in ((False, held), (True, split)):
        plan = plan_weight(
            "weight", Topology(flat.mesh, tuple(range(world))), flat, shard_basis=shard
        )
        (dealt,) = assign_owners([plan])
        assert [dealt.basis.numel((rank,)) for rank in range(world)] == expected
        for rank in range(world):
            task = plan_task([dealt], (0,), [range(len(dealt.owners))], (rank,))
            hops = [*task.gather, *(hop for part in task.rotations for hop in part.hops)]
            counted = sum(hop.sent(rank, item) for hop in hops for item in range(len(shape)))
            assert counted == sent[rank]


def test_rules_that_need_whole_matrices_compute_each_on_one_rank() -> None:
    """The rank that holds all of a matrix; those that are cut are dealt out to the others."""
    world = Topology((4,), tuple(range(4)))
    cut, held = (0, 10, 20, 30, 48), (0, 0, 48, 48, 48)
    storages = [Flat.of((8, 6), bounds) for bounds in (cut, held, cut, cut)]
    storages.append(Flat.of((6, 8), cut))
    requests = [Request(f"w{i}", world, s, 0, whole=True) for i, s in enumerate(storages)]
    choices = choose(requests, None)
    plans = [
        plan_weight(request.name, world, request.storage, group=choice.group)
        for request, choice in zip(requests, choices, strict=True)
    ]
    where = [[c[0] for c in plan.basis.coordinates() if plan.basis.numel(c)] for plan in plans]
    assert where[1] == [1]
    assert sorted(rank for i in (0, 2, 3) for rank in where[i]) == [0, 2, 3]
    for plan, ranks_of in zip(plans, where, strict=True):
        (rank,) = ranks_of
        assert [plan.compute.numel(c) for c in plan.compute.coordinates()] == [
            48 if at == rank else 0 for at in range(4)
        ]
        assert plan.communicates == (plan.name != "w1")
        assert [*plan.computing()] == [(rank,)]


def test_ranges_must_make_up_the_tensor() -> None:
    for bounds in ((0, 3, 5), (1, 6), (0, 4, 2, 6)):
        with pytest.raises(ValueError, match="do not make up a tensor of shape"):
            Flat.of((2, 3), bounds)


SHAPES = {"tall": (11, 5), "square": (6, 6), "wide": (5, 9), "experts": (3, 4, 6), "up": (2, 7, 3)}


def _start(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(SHAPES[name], generator=generator)


def _bounds(numel: int, world: int, kind: str) -> tuple[int, ...]:
    cuts = {
        "even": [numel * i // world for i in range(world + 1)],
        "ceil": [min(-(-numel // world) * i, numel) for i in range(world + 1)],
        "last": [0] * world + [numel],
        "lopsided": [0] + [min(7 * i * i, numel) for i in range(1, world)] + [numel],
    }
    return tuple(cuts[kind])


def _flat_run(kind: str, options: Options) -> dict[str, Tensor]:
    """Takes some steps; returns the whole weights, moments and bases put together again."""
    assert dist.group.WORLD is not None
    mesh = Mesh.of_group(dist.group.WORLD)
    rank, world = dist.get_rank(), dist.get_world_size()
    states: dict[Tensor, dict[str, Any]] = {}
    flats = {n: Flat.of(s, _bounds(math.prod(s), world, kind)) for n, s in SHAPES.items()}
    shard = options.basis_budget == 0
    plans = assign_owners(
        [plan_weight(n, mesh.topology, f, shard_basis=shard) for n, f in flats.items()]
    )
    pieces = {n: _start(n).flatten()[slice(*f.held((rank,)))].clone() for n, f in flats.items()}
    weights = []
    for (name, flat), plan in zip(flats.items(), plans, strict=True):
        states[pieces[name]] = {}
        weights.append(Weight(pieces[name], plan, mesh, GROUP, states, options, CondaRule(options)))
        weights[-1].init_state()
        assert states[pieces[name]]["exp_avg"].shape == flat.local_shape((rank,))
    path = MatrixPath(weights, options)
    for step in range(STEPS):
        grads = {n: models.gradient(n, _start(n), step).flatten() for n in SHAPES}
        path.step(
            {
                i: (grads[w.name][slice(*flats[w.name].held((rank,)))].clone())
                for i, w in enumerate(weights)
            }
        )
    whole = {}
    for name, shape in SHAPES.items():
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, pieces[name])
        whole[name] = torch.cat(parts).view(shape)
    return whole


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    params = {name: nn.Parameter(_start(name)) for name in SHAPES}
    optimizer = Conda([{"params": list(params.items()), "algorithm": "conda", **GROUP}])
    for step in range(STEPS):
        for name, param in params.items():
            param.grad = models.gradient(name, param, step)
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_steps_follow_one_process(world: int, alone: dict[str, Tensor]) -> None:
    start = {name: _start(name) for name in SHAPES}
    for kind in ("even", "ceil", "last", "lopsided") if world > 1 else ("even",):
        for budget in (None, 0):
            options = Options(basis_budget=budget, buffer_bytes=256)
            for ended in ranks.run(world, _flat_run, kind, options, timeout=60):
                assert models.farthest(ended, alone, start) < 1e-4, (kind, budget)
