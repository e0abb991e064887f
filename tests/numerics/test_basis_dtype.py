"""Bases of fewer bits: half the bytes, orthogonal enough, near the float32 run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import models
import ranks
import toys
from conda_dist import Conda
from models import FSDP2, PLAIN, Layout

BF16: dict[str, Any] = {"basis_dtype": torch.bfloat16}
FLOAT_PRODUCTS: dict[str, Any] = {**BF16, "matmul_dtype": torch.float32}
LAYOUTS: list[Layout] = [("fsdp", (3,)), ("hsdp", (2, 2)), ("grid", (2, 2))]
STEPS = 8


def _run(layout: Layout, options: dict[str, Any]) -> dict[str, Tensor]:
    model, optimizer = models.build(layout, **options)
    models.train(model, optimizer, range(STEPS))
    return models.snapshot(model, optimizer, models.whole)


@pytest.mark.parametrize(("options", "most"), [(BF16, 0.1), (FLOAT_PRODUCTS, 0.03)], ids=str)
def test_near_the_run_with_float32_bases(options: dict[str, Any], most: float) -> None:
    """Rounding a basis turns directions by 0.2 %, and the update with them; products more so."""
    start = models.snapshot(*models.build(PLAIN))
    ended = _run(PLAIN, options)
    assert {v.dtype for k, v in ended.items() if k.endswith(":basis")} == {torch.bfloat16}
    assert {v.dtype for k, v in ended.items() if k.endswith(":exp_avg")} == {torch.float32}
    assert 1e-4 < models.farthest(ended, _run(PLAIN, {}), start) < most


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.thorough
def test_on_shards(budget: int | None) -> None:
    """All ranks round the same bases, but at the last bit of a sum they may differ."""
    start, alone = models.snapshot(*models.build(PLAIN)), _run(PLAIN, FLOAT_PRODUCTS)
    for layout in LAYOUTS:
        world = torch.Size(layout[1]).numel()
        options = {**FLOAT_PRODUCTS, "basis_budget": budget}
        for ended in ranks.run(world, _run, layout, options):
            assert models.farthest(ended, alone, start) < 1e-2


@pytest.mark.parametrize("method", ["svd", "orthogonal_iteration"])
def test_bases_stay_orthogonal(method: str) -> None:
    """Rounding does not add up over refreshes."""
    (param,) = toys.parameters((40, 24))
    optimizer = Conda(
        [{"params": [param], "algorithm": "conda"}],
        update_proj_gap=1,
        refresh_method=method,
        **BF16,
    )
    errors = []
    for row in toys.gradients([param], 60):
        toys.take(optimizer, [param], [row])
        basis = optimizer.state[param]["basis"].float()
        errors.append((basis.mT @ basis - torch.eye(24)).abs().max().item())
    assert max(errors[-5:]) < 1.5 * max(errors[:5]) < 1e-2


def _bytes(options: dict[str, Any]) -> tuple[int, int, int]:
    _, optimizer = models.build(("fsdp", (2,)), basis_budget=0, **options)
    optimizer.init_state()
    report = [row for row in optimizer.report(show=False) if row["path"] == "conda"]
    held = sum(
        (v.to_local() if isinstance(v, DTensor) else v).nbytes
        for state in optimizer.state.values()
        for key, v in state.items()
        if key == "basis"
    )
    state = sum(row["state_bytes"] for row in report)
    return held, state, sum(row["step_bytes"] for row in report)


def test_half_the_bytes() -> None:
    whole = ranks.run(2, _bytes, {})
    for (held, state, step), (held32, state32, step32) in zip(
        ranks.run(2, _bytes, BF16), whole, strict=True
    ):
        assert 2 * held == held32
        assert state32 - state == held
        assert step32 > step


def _save(folder: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    model, optimizer = models.build(FSDP2, **options)
    models.train(model, optimizer, range(STEPS))
    models.save(folder, model, optimizer)
    models.train(model, optimizer, range(STEPS, STEPS + 3))
    return models.snapshot(model, optimizer)


def _load(folder: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    model, optimizer = models.build(FSDP2, **options)
    models.load(folder, model, optimizer)
    models.train(model, optimizer, range(STEPS, STEPS + 3))
    return models.snapshot(model, optimizer)


def test_checkpoints(tmp_path: Path) -> None:
    """Bit-identical; and a float32 run goes on with bfloat16 bases, rounded."""
    for here, there in zip(
        ranks.run(2, _save, tmp_path / "a", BF16),
        ranks.run(2, _load, tmp_path / "a", BF16),
        strict=True,
    ):
        assert not models.unequal(here, there)
    whole = ranks.run(2, _save, tmp_path / "b", {})
    for ended, expected in zip(ranks.run(2, _load, tmp_path / "b", BF16), whole, strict=True):
        assert ended["blocks.0.q.weight:basis"].dtype == torch.bfloat16
        for name in (name for name in expected if ":" not in name):
            distance = (ended[name] - expected[name]).norm() / expected[name].norm()
            assert distance < 1e-2, name


def test_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="basis_dtype must be one of float64, float32, bfloat16"):
        Conda(toys.parameters(), basis_dtype=torch.float16)
