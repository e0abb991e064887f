"""Weights in compute groups: any size of group computes the same, and state dicts know none."""

import copy
import os
import socket
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import models
import ranks
from conda_dist import Conda
from conda_dist.plan import compute_groups
from conda_dist.runtime import collectives
from models import GAP, PLAIN, Layout

SAVED, LAST = GAP + 2, 2 * GAP + 2
GROUPS: dict[str, Any] = {"basis_budget": 0}
THREE: Layout = ("fsdp", (3,))


def _trained(layout: Layout, steps: int = SAVED, **options: Any) -> tuple[Any, Any]:
    model, optimizer = models.build(layout, **{**GROUPS, **options})
    models.train(model, optimizer, range(steps))
    return model, optimizer


def _all(model: Any, optimizer: Any) -> dict[str, Tensor]:
    return models.snapshot(model, optimizer, models.whole)


def _sharded(*shapes: tuple[int, ...], seed: int = 0) -> tuple[list[nn.Parameter], Any]:
    """Rows on all ranks; the first weights of one size are dealt to the first ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    example = DTensor.from_local(torch.zeros(1), mesh, [Shard(0)], run_check=False)
    torch.manual_seed(seed)
    params = [nn.Parameter(models.like(example, torch.randn(shape))) for shape in shapes]
    named = [(f"w{i}", param) for i, param in enumerate(params)]
    return params, Conda([{"params": named, "algorithm": "conda"}], update_proj_gap=2, **GROUPS)


def _train(params: list[nn.Parameter], optimizer: Conda, steps: range) -> None:
    for step in steps:
        for i, param in enumerate(params):
            param.grad = models.gradient(f"w{i}", param, step)
        optimizer.step()


def _values(params: list[nn.Parameter], optimizer: Conda) -> dict[str, Tensor]:
    model = nn.ParameterDict({f"w{i}": param for i, param in enumerate(params)})
    return _all(model, optimizer)


# The step

FORCED: list[tuple[int, Layout]] = [
    (1, ("fsdp", (4,))),
    (2, ("fsdp", (4,))),
    (4, ("fsdp", (4,))),
    (1, ("hsdp", (2, 2))),
    (1, ("grid", (2, 2))),
]


def _forced(
    size: int, layout: Layout, alone: dict[int, dict[str, Tensor]]
) -> list[tuple[int, float]]:
    """How far weights end from one process, by delay of a refresh; groups of `size` ranks each."""
    found = []
    with mock.patch.object(compute_groups, "group_size", lambda _, ranks: min(size, ranks)):
        for delay, expected in alone.items():
            model, optimizer = _trained(layout, LAST, refresh_delay=delay)
            sizes = {len(r["group"]) for r in optimizer.report(show=False) if len(r["shape"]) == 2}
            assert max(sizes) == size * (1 if layout[0] == "fsdp" else 2), sizes
            start = {n: models.whole(p) for n, p in models.build(PLAIN)[0].named_parameters()}
            found.append((delay, models.farthest(_all(model, optimizer), expected, start)))
    return found


@pytest.fixture(scope="module")
def alone() -> dict[int, dict[str, Tensor]]:
    """What one process comes to, by delay of a refresh."""
    return {delay: _all(*_trained(PLAIN, LAST, refresh_delay=delay)) for delay in (0, 2)}


@pytest.mark.parametrize(("size", "layout"), FORCED, ids=str)
def test_any_size_of_group_follows_one_process(
    size: int, layout: Layout, alone: dict[int, dict[str, Tensor]]
) -> None:
    for found in ranks.run(4, _forced, size, layout, alone, timeout=60):
        assert all(distance < 1e-3 for _, distance in found), found


def _outside() -> tuple[list[str], list[int], set[int]]:
    """One weight, which two ranks compute: what ranks have of it, and what becomes of it."""
    params, optimizer = _sharded((8, 6))
    _train(params, optimizer, range(5))
    (row,) = optimizer.report(show=False)
    held = optimizer.state[params[0]]
    (state,) = optimizer.state_dict()["state"].values()
    assert state.keys() == held.keys()
    assert all(isinstance(v, DTensor) for k, v in state.items() if "step" not in k)
    saved = _values(params, optimizer)
    again, loaded = _sharded((8, 6), seed=1)
    for ours, theirs in zip(again, params, strict=True):
        ours.data.copy_(theirs.data)
    loaded.load_state_dict(optimizer.state_dict())
    problems = models.unequal(_values(again, loaded), saved)
    _train(params, optimizer, range(5, 8))
    _train(again, loaded, range(5, 8))
    problems += models.unequal(_values(again, loaded), _values(params, optimizer))
    torch.manual_seed(0)
    alone = nn.Parameter(torch.randn(8, 6))
    plain = Conda([{"params": [("w0", alone)], "algorithm": "conda"}], update_proj_gap=2)
    _train([alone], plain, range(8))
    torch.testing.assert_close(models.whole(params[0]), alone.detach(), rtol=1e-4, atol=1e-4)
    return problems, row["group"], {held[key].numel() for key in ("exp_avg", "basis")}


def test_ranks_outside_every_group() -> None:
    for rank, (problems, group, numels) in enumerate(ranks.run(3, _outside)):
        assert not problems
        assert group == [0, 1]
        assert numels == ({0} if rank == 2 else {24, 36})


# State dicts


def _flattened(layout: Layout) -> list[str]:
    model, optimizer = _trained(layout)
    problems = []
    for full in (False, True):
        flat = StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=full)
        state = get_optimizer_state_dict(model, optimizer, options=flat)
        assert not any(isinstance(value, dict) for value in state.values())
        resumed, loaded = models.build(layout, seed=1, **GROUPS)
        resumed.load_state_dict(model.state_dict())
        # torch cannot load whole states into a dict that it flattens itself.
        into = StateDictOptions(full_state_dict=True) if full else flat
        set_optimizer_state_dict(resumed, loaded, state, options=into)
        problems += models.unequal(_all(resumed, loaded), _all(model, optimizer))
    return problems


def test_a_flattened_load() -> None:
    for problems in ranks.run(3, _flattened, THREE, timeout=60):
        assert not problems


def _copied() -> list[str]:
    params, optimizer = _sharded((8, 6), (6, 9), (5, 5))
    _train(params, optimizer, range(3))
    twins, other = copy.deepcopy((params, optimizer))
    ours, theirs = _values(params, optimizer), _values(twins, other)
    _train(twins, other, range(3, 6))
    unchanged = models.unequal(_values(params, optimizer), ours)
    _train(params, optimizer, range(3, 6))
    ended = models.unequal(_values(params, optimizer), _values(twins, other))
    return models.unequal(ours, theirs) + unchanged + ended


def test_a_copy_saves_and_goes_on() -> None:
    for problems in ranks.run(3, _copied):
        assert not problems


def _invalid(damage: str) -> tuple[str, list[str]]:
    model, optimizer = _trained(THREE)
    before, state = _all(model, optimizer), optimizer.state_dict()
    if dist.get_rank() == 1:
        state = {**state, "state": {k: dict(v) for k, v in state["state"].items()}}
        if damage == "gone":
            del next(iter(state["state"].values()))["basis"]
        elif damage == "none":
            state["state"].clear()
        else:
            state = {"model": state}
    said = models.attempt(optimizer.load_state_dict, state)
    return said, models.unequal(_all(model, optimizer), before)


@pytest.mark.parametrize("damage", ["gone", "none", "another"])
def test_an_invalid_dict_on_one_rank_raises_on_all(damage: str) -> None:
    for said, changed in ranks.run(3, _invalid, damage, timeout=30):
        assert said != "nothing was raised"
        assert "rank 1" in said
        assert not changed


def _across_a_step() -> list[str]:
    params, optimizer = _sharded((8, 6), (6, 9), (5, 5))
    _train(params, optimizer, range(3))
    held = optimizer.state_dict()["state"]
    before = copy.deepcopy(held)
    _train(params, optimizer, range(3, 6))
    return [
        f"{i} {key}"
        for i, state in held.items()
        for key, value in state.items()
        if not torch.equal(models.local(value), models.local(before[i][key]))
    ]


def test_a_state_dict_held_across_a_step_is_a_copy() -> None:
    for changed in ranks.run(3, _across_a_step):
        assert not changed


def _full(layout: Layout, broadcast: bool) -> list[str]:
    """Gathers whole states to all ranks, or to the first, and loads them."""
    model, optimizer = _trained(layout)
    given = StateDictOptions(full_state_dict=True, cpu_offload=broadcast)
    state = get_optimizer_state_dict(model, optimizer, options=given)
    taken = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    resumed, loaded = models.build(layout, seed=1, **GROUPS)
    resumed.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed, loaded, state, options=taken)
    return models.unequal(_all(resumed, loaded), _all(model, optimizer))


@pytest.mark.parametrize("broadcast", [False, True], ids=["all", "from rank 0"])
@pytest.mark.parametrize("layout", [THREE, ("hsdp", (2, 2))], ids=str)
def test_full_state_dicts(layout: Layout, broadcast: bool) -> None:
    world = torch.Size(layout[1]).numel()
    for problems in ranks.run(world, _full, layout, broadcast, timeout=60):
        assert not problems


# Checkpoints


def _write(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Saves, and goes on."""
    model, optimizer = _trained(THREE)
    models.save(folder, model, optimizer)
    saved = _all(model, optimizer)
    models.train(model, optimizer, range(SAVED, LAST))
    return saved, _all(model, optimizer)


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("three")
    return (folder, *ranks.run(3, _write, folder)[0])


def _resume(
    layout: Layout, options: dict[str, Any], folder: Path, saved: dict[str, Tensor]
) -> tuple[list[str], dict[str, Tensor]]:
    model, optimizer = models.build(layout, seed=1, **options)
    models.load(folder, model, optimizer)
    lost = models.unequal(_all(model, optimizer), saved)
    models.train(model, optimizer, range(SAVED, LAST))
    return lost, _all(model, optimizer)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (("fsdp", (2,)), GROUPS),
        (("fsdp", (1,)), GROUPS),
        (PLAIN, {}),
        (("fsdp", (4,)), {}),
        (("hsdp", (2, 2)), GROUPS),
    ],
    ids=str,
)
def test_saved_on_three_ranks(
    written: tuple[Path, dict[str, Tensor], dict[str, Tensor]],
    layout: Layout,
    options: dict[str, Any],
) -> None:
    folder, saved, ended = written
    world = torch.Size(layout[1]).numel()
    for lost, there in ranks.run(world, partial(_resume, layout, options, folder, saved)):
        assert not lost
        assert models.farthest(there, ended, saved) < 1e-4


def _in_a_process(rank: int, folder: Path, port: int) -> None:
    """torch starts a process for each rank, which find each other by the environment."""
    place = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, optimizer = _trained(("fsdp", (2,)))
    before = models.snapshot(model, optimizer)
    state = {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer),
    }
    future = dcp.async_save(
        state,
        checkpoint_id=str(folder / "saved"),
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        process_group=dist.new_group(),
    )
    models.train(model, optimizer, range(SAVED, LAST))
    future.result()
    resumed, loaded = models.build(("fsdp", (2,)), seed=1, **GROUPS)
    models.load(folder / "saved", resumed, loaded)
    differing = models.unequal(models.snapshot(resumed, loaded), before)
    (folder / f"{rank}").write_text(str(differing))


@pytest.mark.thorough
def test_async_save_in_a_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Those of ranks.py are daemons, which may have no processes of their own.
    torch.multiprocessing.start_processes(
        _in_a_process, (tmp_path, port), nprocs=2, start_method="forkserver"
    )
    assert [(tmp_path / f"{rank}").read_text() for rank in range(2)] == ["[]", "[]"]


# Ranks that do not take part


def _missing(who: int) -> tuple[str, float]:
    _, optimizer = _trained(THREE)
    begun = time.monotonic()
    said = ""
    with mock.patch.object(collectives, "ALL_CALL_WITHIN", timedelta(seconds=1.5)):
        if dist.get_rank() != who:
            said = models.attempt(optimizer.state_dict)
    took = time.monotonic() - begun
    time.sleep(max(0.0, 4 - took))  # nobody leaves before all have given up
    return said, took


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_does_not_call_state_dict(who: int) -> None:
    for rank, (said, took) in enumerate(ranks.run(3, _missing, who, timeout=60)):
        if rank != who:
            named = f"rank {who}" if 0 in (rank, who) else "a rank (which rank 0 names)"
            assert f"{named} has not called state_dict() within" in said
            assert "Call it on all ranks" in said
            assert took < 10


def _late() -> list[str]:
    """A rank that is only late is waited for."""
    model, optimizer = _trained(THREE)
    if dist.get_rank() == 1:
        time.sleep(0.5)
    state = optimizer.state_dict()
    resumed, loaded = models.build(THREE, seed=1, **GROUPS)
    resumed.load_state_dict(model.state_dict())
    loaded.load_state_dict(state)
    return models.unequal(_all(resumed, loaded), _all(model, optimizer))


def test_a_late_rank_is_waited_for() -> None:
    assert ranks.run(3, _late) == [[]] * 3
