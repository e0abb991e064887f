"""Collectives and bytes, counted in real steps and held to the formulas of the design.

For a weight (m, n) on p ranks, r = min(m, n), float32: a tall or square weight under Shard(0)
moves nothing in a step; a wide one is transposed, mn/p elements each way, of which 1/p stays; a
refresh gathers the mn/p of each rank to one owner and sends r^2 to the p - 1 others. Beside a
gradient that moves, each rank tells the p - 1 others in one element whether it has one.
"""

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import models
import ranks
from conda_dist import Conda
from conda_dist.layout import redistribution
from traffic import Call, recorded

WIDTH, MLP, LAYERS = 32, 88, 2


def _llama(width: int, mlp: int, layers: int) -> list[tuple[str, tuple[int, int]]]:
    """The projections of LLaMA blocks, by name."""
    return [
        (f"layers.{layer}.{name}", shape)
        for layer in range(layers)
        for name, shape in [
            *((f"{proj}_proj", (width, width)) for proj in "qkvo"),
            *((f"{proj}_proj", (mlp, width)) for proj in ("gate", "up")),
            ("down_proj", (width, mlp)),
        ]
    ]


LLAMA = _llama(WIDTH, MLP, LAYERS)
TALL = [(name, shape) for name, shape in LLAMA if shape[0] >= shape[1]]
WIDE = [(name, shape) for name, shape in LLAMA if shape[0] < shape[1]]
F32 = 4


def _run(
    weights: list[tuple[str, tuple[int, ...]]],
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    options: dict[str, Any],
) -> tuple[list[Call], list[Call], list[Any]]:
    """Traffic of a step that refreshes everything, of one that refreshes nothing; the report."""
    mesh = init_device_mesh("cpu", mesh_shape)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return distribute_tensor(torch.randn(shape), mesh, placements)

    named = [(name, nn.Parameter(random(shape))) for name, shape in weights]
    optimizer = Conda([{"params": named, "algorithm": "conda"}], update_proj_gap=1000, **options)
    traffic = []
    for _ in range(2):
        for _, param in named:
            param.grad = random(tuple(param.shape))
        with recorded() as calls:
            optimizer.step()
        traffic.append(list(calls))
    return traffic[0], traffic[1], optimizer.report(show=False)


def _names(calls: list[Call]) -> list[str]:
    return [call.name for call in calls]


START = ["all_reduce", "all_reduce"]
"""The first step compares plans and looks for a gradient that is not zero."""


@pytest.mark.parametrize("p", [2, 3, 4])
def test_rows_of_tall_weights_never_move(p: int) -> None:
    for first, steady, report in ranks.run(p, _run, TALL, (p,), (Shard(0),), {}):
        assert _names(first) == [*START, "all_to_all", "all_reduce", "all_to_all"]
        assert steady == []
        assert all(row["step_bytes"] == 0 for row in report)


@pytest.mark.parametrize("p", [1, 4])
def test_columns_of_wide_weights_never_move(p: int) -> None:
    for _, steady, _ in ranks.run(p, _run, WIDE, (p,), (Shard(1),), {}):
        assert steady == []


def test_llama_on_four_ranks() -> None:
    p = 4
    wide = sum(m * n for _, (m, n) in WIDE)
    answers = ranks.run(p, _run, LLAMA, (p,), (Shard(0),), {})
    for rank, (first, steady, report) in enumerate(answers):
        # One packed all-to-all for the bucket and direction, mn/p elements of which 1/p stays.
        one_way = F32 * wide // p * (p - 1) // p
        flags = F32 * len(WIDE) * (p - 1)
        there, back = Call("all_to_all", one_way + flags), Call("all_to_all", one_way)
        assert steady == [there, back]
        assert sum(row["step_bytes"] for row in report) == 2 * one_way + flags

        owned = [row for row in report if row["owners"] == [rank]]
        others = [row for row in report if row["owners"] != [rank]]
        gathered = sum(F32 * row["shape"][0] * row["shape"][1] // p for row in others)
        returned = sum(F32 * min(row["shape"]) ** 2 * (p - 1) for row in owned)
        assert first[len(START) :] == [
            there,
            Call("all_to_all", gathered),
            Call("all_reduce", 8 * len(LLAMA)),  # what came of each decomposition
            Call("all_to_all", returned),
            back,
        ]
        planned = 2 * one_way + flags + gathered + returned
        assert sum(row["refresh_bytes"] for row in report) == planned
    # Over all ranks and a refresh: each matrix is gathered once and each rotation sent to all.
    total = sum(call.sent for first, _, _ in answers for call in (first[3], first[5]))
    assert total == F32 * sum(
        m * n * (p - 1) // p + min(m, n) ** 2 * (p - 1) for _, (m, n) in LLAMA
    )


def test_owners_are_balanced() -> None:
    p = 4
    report = ranks.run(p, _run, LLAMA, (p,), (Shard(0),), {})[0][2]
    load = dict.fromkeys(range(p), 0)
    for row in report:
        load[row["owners"][0]] += min(row["shape"]) ** 2 * max(row["shape"])
    heaviest = max(min(s) ** 2 * max(s) for _, s in LLAMA)
    assert max(load.values()) - min(load.values()) <= heaviest


def test_replicas_share_the_refreshes_and_nothing_else() -> None:
    """HSDP: the exchanges stay in the shard groups, rotations cross to the other replica."""
    for first, steady, report in ranks.run(4, _run, LLAMA, (2, 2), (Replicate(), Shard(0)), {}):
        one_way = F32 * sum(m * n for _, (m, n) in WIDE) // 2 // 2
        there = one_way + F32 * len(WIDE)
        assert steady == [Call("all_to_all", there), Call("all_to_all", one_way)]
        assert {row["owners"][0] for row in report} == {0, 1, 2, 3}
        assert _names(first[len(START) * 2 :]) == [
            "all_to_all",  # gradients
            "all_to_all",  # momenta
            "all_reduce",
            "all_reduce",
            "all_to_all",  # rotations to the other replica
            "all_to_all",  # and to the other shards
            "all_to_all",  # updates
        ]


def _in_parts(layout: models.Layout) -> tuple[list[str], list[str]]:
    """What differs where rotations travel one by one, their rows passed on by all ranks."""
    ended = []
    for beyond, options in ((4, {}), (1, {}), (1, {"buffer_bytes": 1})):
        with mock.patch.object(redistribution, "SPREAD_BEYOND", beyond):
            model, optimizer = models.build(layout, basis_budget=None, **options)
            models.train(model, optimizer, range(8))
            ended.append(models.snapshot(model, optimizer))
    return models.unequal(ended[0], ended[1]), models.unequal(ended[0], ended[2])


@pytest.mark.parametrize("layout", [("fsdp", (3,)), ("hsdp", (2, 2)), ("fsdp", (4,))], ids=str)
def test_rotations_arrive_alike_by_any_way(layout: models.Layout) -> None:
    world = math.prod(layout[1])
    for differing in ranks.run(world, _in_parts, layout):
        assert differing == ([], [])


def test_many_ranks_pass_rotations_on() -> None:
    """No owner packs a rotation for each of many ranks."""
    p, (name, (m, n)) = 6, TALL[0]
    answers = ranks.run(p, _run, [(name, (m, n))], (p,), (Shard(0),), {})
    rotations = [call.sent for first, _, _ in answers for call in first[-2:]]
    assert all(first[-1].name == first[-2].name == "all_to_all" for first, _, _ in answers)
    assert sum(rotations) == F32 * (n * n - -(-n // p) * n + n * n * (p - 1))
    assert max(rotations) <= F32 * n * n


def test_row_wise_tensor_parallel_moves_along_one_dimension() -> None:
    """[Shard(0), Shard(1)]: one of the two is moved, the other stays where it cuts."""
    placements = (Shard(0), Shard(1))
    for _, steady, _ in ranks.run(4, _run, LLAMA, (2, 2), placements, {}):
        wide = sum(m * n for _, (m, n) in WIDE)
        tall = sum(m * n for _, (m, n) in TALL)
        back = [F32 * wide // 4 // 2, F32 * tall // 4 // 2]
        there = [back[0] + F32 * len(WIDE), back[1] + F32 * len(TALL)]
        assert sorted(call.sent for call in steady) == sorted(there + back)


def test_groups_send_each_gradient_once_and_each_update_once() -> None:
    """Beyond the budget a step moves 2mn/p of each matrix, and no basis and no moment."""
    p = 4
    for rank, (_, steady, report) in enumerate(
        ranks.run(p, _run, LLAMA, (p,), (Shard(0),), {"basis_budget": 0})
    ):
        whole = {name: m * n for name, (m, n) in LLAMA}
        mine = [row["name"] for row in report if row["group"] == [rank]]
        assert all(len(row["group"]) == 1 for row in report)
        given = sum(numel for name, numel in whole.items() if name not in mine) // p
        given += len(LLAMA) * (p - 1)  # flags
        returned = sum(whole[name] for name in mine) * (p - 1) // p
        assert [call.name for call in steady] == ["all_to_all"] * 2
        assert [call.sent for call in steady] == [F32 * given, F32 * returned]
        assert sum(row["step_bytes"] for row in report) == F32 * (given + returned)


def test_buckets_bound_what_is_exchanged_at_once() -> None:
    p, limit = 2, F32 * WIDTH * MLP // 2
    for _, steady, _ in ranks.run(p, _run, LLAMA, (p,), (Shard(0),), {"buffer_bytes": limit}):
        assert len(steady) == 2 * len(WIDE)
        assert max(call.sent for call in steady) <= limit


def _model(width: int, mlp: int, layers: int, vocabulary: int) -> list[tuple[str, Any]]:
    """The matrices of a LLaMA, by name."""
    embeddings = [(name, (vocabulary, width)) for name in ("embed_tokens", "lm_head")]
    return _llama(width, mlp, layers) + embeddings


MODELS = {"tiny": _model(WIDTH, MLP, LAYERS, 256), "60M": _model(512, 1376, 8, 32000)}


def _state_bytes(p: int, model: str, budget: int | None) -> tuple[int, int]:
    mesh = init_device_mesh("cpu", (p,))

    def zeros(shape: tuple[int, ...]) -> torch.Tensor:
        return distribute_tensor(torch.zeros(shape), mesh, [Shard(0)], src_data_rank=None)

    named = [(f"{name}.weight", nn.Parameter(zeros(shape))) for name, shape in MODELS[model]]
    optimizer = Conda(named, basis_budget=budget)
    optimizer.init_state()
    small = ("step", "basis_step")
    held = sum(
        (value.to_local() if isinstance(value, DTensor) else value).nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if key not in small
    )
    reported = sum(row["state_bytes"] for row in optimizer.report(show=False))
    return held, reported - sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key in small
    )


@pytest.mark.parametrize("budget", [0, None], ids=["groups", "all ranks"])
@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_state_is_sharded(p: int, model: str, budget: int | None) -> None:
    """With groups each basis is kept once, without on all ranks; either way no rank has most."""
    n = sum(m * k for _, (m, k) in MODELS[model])
    bases = sum(min(shape) ** 2 for name, shape in MODELS[model] if name.endswith("_proj"))
    answers = ranks.run(p, _state_bytes, p, model, budget)
    assert all(held == reported for held, reported in answers)
    total, most = sum(held for held, _ in answers), max(held for held, _ in answers)
    assert total == F32 * (2 * n + bases * (1 if budget == 0 else p))
    assert most <= 1.3 * total / p


def test_auto_keeps_to_the_budget() -> None:
    def count(budget: int) -> tuple[list[Any], int]:
        options = {"basis_budget": budget}
        report = ranks.run(2, _run, LLAMA, (2,), (Shard(0),), options)[0][2]
        kept = [row for row in report if not row["group"]]
        return kept, F32 * sum(min(row["shape"]) ** 2 for row in kept)

    one = F32 * WIDTH**2
    for budget, expected in [(0, 0), (5 * one, 5), (10**9, len(LLAMA))]:
        kept, used = count(budget)
        assert len(kept) == expected
        assert used <= budget
    # The first to be replicated are those that then need no other rank for a step.
    assert all(row["step_bytes"] == 0 for row in count(5 * one)[0])


def _default_group_is_not_used() -> bool:
    """Another half of the job that trains nothing is never waited for, as in pipelines."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))["dp"]
    if dist.get_rank() >= 2:
        return True
    param = nn.Parameter(distribute_tensor(torch.randn(4, 8), mesh, [Shard(0)]))
    optimizer = Conda([{"params": [param], "algorithm": "conda"}])
    for _ in range(2):
        param.grad = distribute_tensor(torch.randn(4, 8), mesh, [Shard(0)])
        optimizer.step()
    return int(optimizer.state[param]["step"]) == 2


def test_only_groups_of_the_mesh_communicate() -> None:
    assert all(ranks.run(4, _default_group_is_not_used))
