"""Ranks that differ in which gradients they have: an error on all of them, and no message lost.

What all ranks lack is skipped, as in one process, and costs nothing.
"""

import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import models
import ranks
from conda_dist import Conda, Muon
from conda_dist.runtime import agreement
from models import GAP, Layout
from traffic import recorded

Missing = Mapping[int, Collection[str]]
"""By step the ends of the names of parameters that have no gradient in it."""


def _step(model: nn.Module, optimizer: Conda, step: int, missing: Collection[str]) -> None:
    for name, param in model.named_parameters():
        lacks = any(name.endswith(end) for end in missing)
        param.grad = None if lacks else models.gradient(name, param, step)
    optimizer.step()


def _held(model: nn.Module, optimizer: Conda) -> dict[str, Tensor]:
    """What this rank has of parameters and states."""
    held = {}
    for name, param in model.named_parameters():
        held[name] = models.local(param)
        for key, value in optimizer.state[param].items() if param in optimizer.state else ():
            held[f"{name}:{key}"] = models.local(value)
    return held


def _differ(
    layout: Layout, options: dict[str, Any], missing: Missing, steps: int
) -> tuple[int, str, list[str], list[str]]:
    """Has the last rank lack gradients.

    Returns:
        The step that raised, what it said, what that changed, and what had been warned of.
    """
    model, optimizer = models.build(layout, **options)
    mine = dist.get_rank() == dist.get_world_size() - 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            before = _held(model, optimizer)
            said = models.attempt(_step, model, optimizer, step, missing.get(step, ()) * mine)
            if said != "nothing was raised":
                break
    warned = [str(w.message) for w in caught if "gradient of it" in str(w.message)]
    return step, said, models.unequal(before, _held(model, optimizer)), warned


ASYNC = {"refresh_delay": 3}
GROUPS = {"basis_budget": 0}
WIDE, TALL, BATCH = ("blocks.1.down.weight",), ("blocks.0.up.weight",), ("blocks.1.experts",)
ADAMW = ("blocks.0.norm.weight",)
EXCHANGED: list[tuple[Layout, dict[str, Any], Missing]] = [
    (("fsdp", (2,)), {}, {4: WIDE}),
    (("fsdp", (3,)), {}, {4: (*WIDE, *TALL)}),
    (("fsdp", (3,)), GROUPS, {4: TALL}),
    (("fsdp", (2,)), {**GROUPS, **ASYNC}, {4: ("weight",)}),
    (("fsdp", (2,)), {"buffer_bytes": 1}, {4: WIDE}),
    (("grid", (2, 2)), {}, {4: ("blocks.0.q.weight",)}),
]


@pytest.mark.parametrize(("layout", "options", "missing"), EXCHANGED, ids=str)
def test_exchanged_gradients_are_missed_one_step_later(
    layout: Layout, options: dict[str, Any], missing: Missing
) -> None:
    world, lacking = math.prod(layout[1]), missing[4][0]
    for step, said, changed, warned in ranks.run(
        world, _differ, layout, options, missing, 20, timeout=30
    ):
        name = lacking if lacking != "weight" else "blocks.0."
        known = "had no gradient of it in the last step, 1 step ago" in said
        # On a grid some ranks know of it only, and warn; all raise at the next refresh.
        assert (step == 5 and known) or (layout[0] == "grid" and step == 6)
        assert name in said
        assert f"rank {world - 1} " in said
        assert not changed
        assert not warned or layout[0] == "grid"


LOCAL: list[tuple[Layout, dict[str, Any], Missing, int]] = [
    (("ddp", (2,)), {}, {4: WIDE}, 6),
    (("ddp", (3,)), {}, {4: ADAMW, 5: ADAMW}, 6),
    (("ddp", (2,)), ASYNC, {4: (*TALL, *BATCH)}, 6),
    (("ddp", (2,)), {"update_proj_gap": 50}, {4: ("",), 7: ("",)}, 50),
    (("fsdp", (2,)), {}, {4: TALL}, 6),
    (("fsdp", (2,)), ASYNC, {5: BATCH}, 6),
    (("hsdp", (2, 2)), {}, {4: ADAMW}, 6),
    (("hsdp", (2, 2)), {}, {4: WIDE}, 6),
    (("fsdp", (2,)), {"update_proj_gap": 1}, {4: TALL}, 4),
    (("fsdp", (2,)), {}, {0: BATCH}, 0),
    (("ddp", (2,)), {}, {0: WIDE}, 0),
    (("fsdp", (2,)), {}, {6: (*TALL, *WIDE)}, 6),
]


@pytest.mark.parametrize(("layout", "options", "missing", "when"), LOCAL, ids=str)
def test_others_are_missed_at_the_next_refresh(
    layout: Layout, options: dict[str, Any], missing: Missing, when: int
) -> None:
    """Before anything is changed."""
    world = math.prod(layout[1])
    for rank, (step, said, changed, warned) in enumerate(
        ranks.run(world, _differ, layout, options, missing, 60, timeout=30)
    ):
        assert step == when, said
        assert "Ranks differ in which gradients they have" in said
        assert next(iter(missing.values()))[0] in said
        assert f"rank {world - 1} " in said
        last, first = max(missing), min(missing)
        if first < when:
            since = when - min(int(options.get("update_proj_gap", GAP)), when)
            assert f"of the {when - since} steps since step {since}" in said
            assert f"rank {world - 1} took {when - since - (last > first) - 1}" in said
        else:
            assert f"rank {world - 1} had no gradient of it" in said
        assert not changed
        exchanged = missing.get(4) == WIDE and layout[0] == "hsdp" and rank > 1
        assert bool(warned) == exchanged


def _after_a_save(layout: Layout, options: dict[str, Any]) -> str:
    model, optimizer = models.build(layout, **options)
    for step in range(2):
        _step(model, optimizer, step, WIDE if step and dist.get_rank() else ())
    return models.attempt(optimizer.state_dict)


@pytest.mark.parametrize("options", [{}, GROUPS], ids=["all ranks", "groups"])
def test_no_state_is_saved_that_ranks_differ_in(options: dict[str, Any]) -> None:
    for said in ranks.run(2, _after_a_save, ("fsdp", (2,)), options, timeout=30):
        assert f"{WIDE[0]}: rank 1 had no gradient" in said


OFTEN_MISSING: Missing = {
    0: (*BATCH, *WIDE, "blocks.0.q.weight"),
    1: BATCH,
    2: (*BATCH, *TALL),
    3: (*BATCH, *ADAMW),
    5: (*TALL, *WIDE, *ADAMW),
    6: WIDE,
    7: ("weight", "experts", "bias"),
}


def _all_lack(layout: Layout, options: dict[str, Any]) -> list[str]:
    """Parameters that end elsewhere than in one process."""
    ended = []
    for where in (models.PLAIN, layout):
        model, optimizer = models.build(where, **options)
        for step in range(10):
            _step(model, optimizer, step, OFTEN_MISSING.get(step, ()))
        optimizer.zero_grad()
        ended.append({name: models.whole(param) for name, param in model.named_parameters()})
    close = {n: torch.allclose(p, ended[1][n], rtol=1e-4, atol=1e-4) for n, p in ended[0].items()}
    return [name for name, alike in close.items() if not alike]


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (("fsdp", (2,)), {}),
        (("fsdp", (3,)), GROUPS),
        (("fsdp", (2,)), ASYNC),
        (("hsdp", (2, 2)), GROUPS),
        (("ddp", (2,)), {}),
    ],
    ids=str,
)
def test_what_all_ranks_lack_is_skipped(layout: Layout, options: dict[str, Any]) -> None:
    for differing in ranks.run(math.prod(layout[1]), _all_lack, layout, options, timeout=60):
        assert not differing


def _unused() -> list[list[str]]:
    """Collectives of steps of tall weights, one of which is not used before the last steps."""
    mesh = init_device_mesh("cpu", (2,))
    example = DTensor.from_local(torch.zeros(1), mesh, [Shard(0)], run_check=False)
    torch.manual_seed(0)
    named = [(f"w{i}", nn.Parameter(models.like(example, torch.randn(6, 4)))) for i in range(3)]
    optimizer = Conda([{"params": named, "algorithm": "conda"}], update_proj_gap=6)
    called = []
    for step in range(12):
        for name, param in named:
            unused = (name == "w1" and step < 10) or (name == "w2" and 6 <= step < 9)
            param.grad = None if unused else models.gradient(name, param, step)
        with recorded() as calls:
            optimizer.step()
        called.append([call.name for call in calls])
    return called


def test_what_all_ranks_lack_costs_no_collective() -> None:
    """Neither a weight without a basis nor one whose refresh is due."""
    for called in ranks.run(2, _unused):
        assert [step for step, calls in enumerate(called) if calls] == [0, 6, 9, 10]
        assert called[9][0] == "all_reduce"


def _partial(who: int) -> tuple[str, str]:
    """A gradient that is yet to be summed up is missing on a rank, on none (-1) or on all (2)."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    params = [DTensor.from_local(torch.randn(6, 4), mesh, [Replicate()], run_check=False)]
    weight = nn.Parameter(params[0])
    optimizer = Conda([{"params": [("w", weight)], "algorithm": "conda"}], update_proj_gap=3)
    said = []
    for step in range(4):
        part = DTensor.from_local(torch.ones(6, 4) + step, mesh, [Partial()], run_check=False)
        lacks = step == 1 and who in (dist.get_rank(), 2)
        weight.grad = None if lacks else part
        said.append(models.attempt(optimizer.step))
    taken = int(optimizer.state[weight]["step"])
    return f"{[s for s in said if s != 'nothing was raised']}", f"{taken}"


def test_partial_gradients() -> None:
    assert set(ranks.run(2, _partial, -1)) == {("[]", "4")}
    assert set(ranks.run(2, _partial, 2)) == {("[]", "3")}
    for said, _ in ranks.run(2, _partial, 1, timeout=30):
        assert "of the 3 steps since step 0" in said
        assert "rank 1 took 2" in said


def _replicas(source: str | None) -> tuple[int, str]:
    """The call that raised where rank 1 lacks a gradient in one, and what it said.

    The rule is Muon; or Conda with bases from ``source``, whose one matrix never has a gradient.
    """
    usual, agreement.COMPARED_EVERY = agreement.COMPARED_EVERY, 4
    try:
        param, matrix = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
        world = dist.group.WORLD
        optimizer: Conda | Muon = Muon([("w", param)], process_group=world)
        if source:
            groups = [
                {"params": [("matrix", matrix)], "algorithm": "conda"},
                {"params": [("w", param)], "algorithm": "adamw"},
            ]
            optimizer = Conda(groups, basis_source=source, process_group=world)
        for call in range(12):
            lacks = call == 2 and dist.get_rank() == 1
            param.grad = None if lacks else torch.ones(4, 6)
            if (said := models.attempt(optimizer.step)) != "nothing was raised":
                return call, said
        return -1, ""
    finally:
        agreement.COMPARED_EVERY = usual


@pytest.mark.parametrize("source", [None, "momentum", "gradients"])
def test_ranks_without_refreshes_compare_now_and_then(source: str | None) -> None:
    for call, said in ranks.run(2, _replicas, source):
        assert call == 4
        assert "w: of the 4 steps since step 0, when the ranks last compared, rank 1 took 3" in said
