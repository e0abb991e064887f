"""Weights whose owners multiply for all: the same steps, and the traffic that was planned."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
import ranks
from conda_dist.delegate import delegate
from conda_dist.layout import Layout as Where
from conda_dist.layout import Split, Topology
from conda_dist.plan import plan_weight
from models import FSDP2, PLAIN, Layout
from test_layout_traffic import LAYOUTS as TRAFFIC
from test_layout_traffic import _sent, measure
from test_parallel_layouts import DENSE, EXPERTS, MATRICES, far, train

OWNER: dict[str, Any] = {"basis_placement": "owner"}
OTHERS: list[dict[str, Any]] = [
    {"bucket_bytes": 1, "refresh_bytes": 1},
    {"refresh": "async", "refresh_delay": 2},
    {"refresh_method": "orthogonal_iteration", "refresh_waves": 2},
]
STEPS = 8


@pytest.mark.parametrize("layout", DENSE, ids=str)
def test_follows_one_process(layout: Any) -> None:
    """Every 2-D layout, uneven and empty shards."""
    alone = train(None, MATRICES, {})
    world = torch.Size(layout[0]).numel()
    for ended in ranks.run(world, train, layout, MATRICES, {**OWNER, "bucket_bytes": 300}):
        assert far(ended, alone) < 1e-5


def test_batches_gather_as_ever() -> None:
    alone = train(None, EXPERTS, {})
    for ended in ranks.run(4, train, ((4,), [models.Shard(1)]), EXPERTS, OWNER):
        assert far(ended, alone) < 1e-5


def _run(layout: Layout, options: dict[str, Any]) -> tuple[list[str], dict[str, Tensor], Any]:
    """Two runs, which must be the same; the parameters and states; what this rank holds."""
    ended = []
    for _ in range(2):
        model, optimizer = models.build(layout, **options)
        models.train(model, optimizer, range(STEPS))
        ended.append(models.snapshot(model, optimizer, models.whole))
    assert any(" for its owner" in row["basis"] for row in optimizer.report(show=False))
    return models.unequal(*ended), ended[0], models.snapshot(model, optimizer)


@pytest.mark.parametrize("others", [{}, *OTHERS], ids=str)
def test_models_follow_one_process(others: dict[str, Any]) -> None:
    start = models.snapshot(*models.build(PLAIN))
    model, optimizer = models.build(PLAIN, **others)
    models.train(model, optimizer, range(STEPS))
    alone = models.snapshot(model, optimizer)
    for layout in [("fsdp", (2,)), ("fsdp", (4,)), ("hsdp", (2, 2)), ("grid", (2, 2))]:
        answers = ranks.run(torch.Size(layout[1]).numel(), _run, layout, {**OWNER, **others})
        for unequal, ended, _ in answers:
            assert not unequal
            assert models.farthest(ended, alone, start) < 1e-4
        if layout[0] == "hsdp":  # replicas are the same, bit for bit
            assert not models.unequal(answers[0][2], answers[2][2])
            assert not models.unequal(answers[1][2], answers[3][2])


@pytest.mark.parametrize("option", ["matmul_dtype", "basis_dtype"])
def test_fewer_bits_follow_shards_of_as_few(option: str) -> None:
    """Products are sent in the dtype they are made in: nothing is rounded once more."""
    start = models.snapshot(*models.build(PLAIN))
    options = {option: torch.bfloat16}
    gathered = {**options, "basis_placement": "replicate"}
    model, optimizer = models.build(PLAIN, **gathered)
    models.train(model, optimizer, range(2))  # before a second refresh tells the roundings apart
    alone = models.snapshot(model, optimizer)
    for ended in ranks.run(2, _two_steps, {**OWNER, **options}):
        assert models.farthest(ended, alone, start) < 2e-3


def _two_steps(options: dict[str, Any]) -> dict[str, Tensor]:
    model, optimizer = models.build(FSDP2, **options)
    models.train(model, optimizer, range(2))
    return models.snapshot(model, optimizer, models.whole)


def _save(folder: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    model, optimizer = models.build(FSDP2, **options)
    models.train(model, optimizer, range(5))
    models.save(folder, model, optimizer)
    models.train(model, optimizer, range(5, STEPS))
    return models.snapshot(model, optimizer)


def _load(folder: Path, layout: Layout, options: dict[str, Any]) -> Any:
    model, optimizer = models.build(layout, seed=1, **options)
    models.load(folder, model, optimizer)
    models.train(model, optimizer, range(5, STEPS))
    return models.snapshot(model, optimizer), models.snapshot(model, optimizer, models.whole)


def test_checkpoints(tmp_path: Path) -> None:
    """Bit-identical on resuming; and with any other placement, or number of ranks."""
    ended = ranks.run(2, _save, tmp_path, OWNER)
    resumed = ranks.run(2, _load, tmp_path, FSDP2, OWNER)
    for here, (there, _) in zip(ended, resumed, strict=True):
        assert not models.unequal(here, there)
    start = models.snapshot(*models.build(PLAIN))
    for layout, options in ((FSDP2, {}), (("fsdp", (3,)), OWNER), (("hsdp", (2, 2)), OWNER)):
        world = torch.Size(layout[1]).numel()
        for _, whole in ranks.run(world, _load, tmp_path, layout, options):
            assert models.farthest(whole, resumed[0][1], start) < 1e-4


def _broken(value: float) -> tuple[list[str], list[float]]:
    """A gradient that is not finite in one step, on one rank."""
    model, optimizer = models.build(FSDP2, **OWNER)
    models.train(model, optimizer, range(models.GAP))
    name = "blocks.0.q.weight"
    for n, param in model.named_parameters():
        param.grad = models.gradient(n, param, models.GAP)
        if n == name and torch.distributed.get_rank() == 1:
            param.grad.to_local()[0, 0] = value
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step()
    steps = [s["basis_step"].max().item() for s in optimizer.state.values() if "basis" in s]
    return [str(w.message) for w in said if "could not be refreshed" in str(w.message)], steps


def test_a_broken_momentum_gives_no_basis() -> None:
    answers = ranks.run(2, _broken, float("nan"))
    assert "blocks.0.q.weight: the basis could not be refreshed at step 3" in answers[0][0][0]
    for said, steps in answers[1:]:
        assert not said
        assert sorted(steps)[:2] == [0.0, 3.0]


@pytest.mark.parametrize("options", [{}, {"matmul_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize(
    "name", ["FSDP 4", "HSDP 2x2", "FSDP 2 x TP 2", "HSDP 2 x FSDP 2 x TP 2", "TP 4"]
)
def test_traffic_is_what_the_report_says(name: str, options: dict[str, Any]) -> None:
    world = torch.Size(TRAFFIC[name][0]).numel()
    for steady, refreshing, step_bytes, refresh_bytes in ranks.run(
        world, measure, name, {**OWNER, **options}
    ):
        assert _sent(steady) == step_bytes
        assert _sent(refreshing) == refresh_bytes


def test_four_shares_of_the_weight_and_one_of_the_basis() -> None:
    """What all ranks together send for LLaMA's projections."""
    answers = ranks.run(4, measure, "FSDP 4", OWNER)
    shapes = [shape for _, shape, _ in TRAFFIC["FSDP 4"][1]]
    elements = sum(4 * m * n + min(m, n) ** 2 for m, n in shapes) * 3 // 4
    assert sum(step for _, _, step, _ in answers) == 4 * elements
    assert len(answers[0][0]) == 4  # collectives


@pytest.mark.parametrize(
    ("shape", "count", "expected"),
    [((64, 64), 2, False), ((64, 64), 8, True), ((256, 64), 8, False), ((64, 256), 64, True)],
)
def test_auto_delegates_where_it_moves_less(
    shape: tuple[int, int], count: int, expected: bool
) -> None:
    topology = Topology((count,), tuple(range(count)))
    plan = plan_weight("w", topology, Where(shape, (count,), (Split(0),)), True)
    assert delegate(plan, "auto").delegated is expected
    assert delegate(plan, "owner").delegated
    assert not delegate(plan, "shard").delegated
    whole = plan_weight("w", topology, Where(shape, (count,), (Split(0),)), False)
    assert not delegate(whole, "auto").delegated
