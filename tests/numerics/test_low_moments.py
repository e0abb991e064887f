"""Moments of fewer bits: bfloat16 rounded in proportion, second moments as 8-bit logarithms."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import models
import ranks
import toys
from conda_dist import Conda, param_groups
from conda_dist.numerics import arithmetic, low_precision
from conda_dist.numerics.adamw import Entry, adamw_
from conda_dist.rules.states import CODES
from models import FSDP2, PLAIN, Layout

CODED: dict[str, Any] = {"second_moment_dtype": torch.uint8}
ROUNDED: dict[str, Any] = {"state_dtype": torch.bfloat16, "stochastic_rounding": True}
BOTH: dict[str, Any] = {**CODED, **ROUNDED}
LAYOUTS: list[Layout] = [("fsdp", (3,)), ("hsdp", (2, 2)), ("grid", (2, 2))]
STEPS = 8
LEVEL = 2 ** (1 / low_precision.LEVELS_PER_OCTAVE)


def stored(values: Tensor, dtype: torch.dtype, rounding: float | None) -> Tensor:
    """What is read back of values that were stored."""
    kept = torch.empty_like(values, dtype=dtype)
    low_precision.store_(kept, values, rounding)
    return low_precision.decode(kept, values.dtype)


# Numbers


def test_every_code_stands_for_itself() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = low_precision.decode(codes, torch.float32)
    assert values[0] == 0
    assert torch.all(values[1:] > values[:-1])
    again = torch.empty_like(codes)
    low_precision.store_(again, values, None)
    assert torch.equal(again, codes)


@given(st.floats(-58, 109), st.floats(0, 0.999))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_code_is_next_to_its_value(octave: float, rounding: float) -> None:
    value = torch.tensor([2.0**octave])
    near, shifted = (stored(value, torch.uint8, r) / value for r in (None, rounding))
    assert LEVEL**-0.501 < near < LEVEL**0.501
    assert LEVEL**-1.001 < shifted < LEVEL**1.001


def test_what_has_no_code() -> None:
    """Too small is zero, too large (or no number, of which the first moment tells) the largest."""
    values = torch.tensor([0.0, 1e-30, 1e37, torch.inf, torch.nan])
    largest = low_precision.decode(torch.tensor(255, dtype=torch.uint8), torch.float32).item()
    for rounding in (None, 0.0, 0.99):
        assert stored(values, torch.uint8, rounding).tolist() == [0, 0, *[largest] * 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_rounding_is_fair_over_steps(dtype: torch.dtype) -> None:
    """The mean over steps is the value: of numbers for bfloat16, of logarithms for codes."""
    values = toys.random(1000).abs() + 0.01
    of = torch.log2 if dtype == torch.uint8 else torch.clone
    rounded = torch.stack([of(stored(values, dtype, low_precision.dither(t))) for t in range(1000)])
    step = 1 / low_precision.LEVELS_PER_OCTAVE if dtype == torch.uint8 else values * 2**-7
    assert ((rounded.mean(0) - of(values)).abs() < 0.01 * step).all()
    nearest = of(stored(values, dtype, None)) - of(values)
    assert (nearest.abs() > 0.01 * step).float().mean() > 0.8


def test_bfloat16_keeps_what_is_not_finite() -> None:
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000], dtype=torch.int32)
    kept = stored(bits.view(torch.float32), torch.bfloat16, 0.9)  # the NaNs of GPUs and CPUs
    assert kept[:3].isnan().all()
    assert kept[3].isinf()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_an_average_follows_where_nearest_would_stand_still(dtype: torch.dtype) -> None:
    """A change of 0.1 % a step is less than half of either's last digit."""
    beta = 0.999
    for rounding, arrives in ((low_precision.dither, True), (lambda _: None, False)):
        moment = torch.empty(500, dtype=dtype)
        low_precision.store_(moment, torch.full((500,), 1e-3) * (1 + toys.random(500).abs()), None)
        for t in range(5000):
            value = low_precision.decode(moment, torch.float32).mul_(beta).add_((1 - beta) * 3e-4)
            low_precision.store_(moment, value, rounding(t))
        reached = low_precision.decode(moment, torch.float32).log2().mean().exp2() / 3e-4
        assert bool(0.8 < reached < 1.25) is arrives


# Trajectories


def _run(layout: Layout, options: dict[str, Any], steps: int = STEPS) -> dict[str, Tensor]:
    model, optimizer = models.build(layout, **options)
    models.train(model, optimizer, range(steps))
    return models.snapshot(model, optimizer, models.whole)


@pytest.mark.parametrize(
    ("options", "most"), [(CODED, 0.15), (ROUNDED, 0.1), (BOTH, 0.15)], ids=str
)
def test_near_the_run_with_float32_moments(options: dict[str, Any], most: float) -> None:
    start = models.snapshot(*models.build(PLAIN))
    ended = _run(PLAIN, options)
    seconds = {v.dtype for k, v in ended.items() if k.endswith((":exp_avg_sq", f":{CODES}"))}
    assert seconds == {options.get("second_moment_dtype", torch.bfloat16)}
    expected = {k: v for k, v in _run(PLAIN, {}).items() if ":" not in k}
    assert 1e-4 < models.farthest(ended, expected, start) < most


def test_nearer_than_moments_rounded_to_nearest() -> None:
    start, expected = models.snapshot(*models.build(PLAIN)), _run(PLAIN, {})
    weights = {k: v for k, v in expected.items() if ":" not in k}
    rounded, nearest = (
        models.farthest(_run(PLAIN, {**ROUNDED, "stochastic_rounding": fair}), weights, start)
        for fair in (True, False)
    )
    assert rounded < 0.7 * nearest


@pytest.mark.parametrize("budget", [None, 0])
def test_on_shards(budget: int | None) -> None:
    """All layouts round with the same threshold; at the last bit of a sum they may part."""
    start, alone = models.snapshot(*models.build(PLAIN)), _run(PLAIN, BOTH)
    options = {**BOTH, "basis_budget": budget}
    for layout in LAYOUTS if budget == 0 else LAYOUTS[:1]:
        for ended in ranks.run(torch.Size(layout[1]).numel(), _run, layout, options):
            weights = {k: v for k, v in alone.items() if ":" not in k}
            assert models.farthest(ended, weights, start) < 0.02


def _fused(layout: Layout, options: dict[str, Any]) -> list[Tensor]:
    """Blocks of rows of which one is wide: it travels, whatever the dtype of its moments."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 14, bias=False))
    if layout != PLAIN:
        fully_shard(model)
    groups = param_groups(model, conda=["*"], splits={"*": (10, 4)})
    optimizer = Conda(groups, update_proj_gap=3, **options)
    models.train(model, optimizer, range(STEPS))
    return [models.whole(p.detach()) for p in model.parameters()]


def test_a_spike_of_the_gradient_is_divided_down() -> None:
    """In the steps after it as well, when its square is read back from a code."""
    whole, coded = (toys.parameters((6, 4), (4,)) for _ in range(2))
    grads = toys.gradients(whole, 6)
    grads[2] = [grad * 1e15 for grad in grads[2]]
    starts = toys.copies(whole)
    toys.take(Conda(whole, **toys.OPTIONS), whole, grads)
    toys.take(Conda(coded, **toys.OPTIONS, **CODED), coded, grads)
    for ours, theirs, start in zip(coded, whole, starts, strict=True):
        assert toys.error(ours, theirs, start) < 0.5


def test_parts_of_fused_weights() -> None:
    (alone,) = _fused(PLAIN, BOTH)
    (plain,) = _fused(PLAIN, {})
    assert not torch.equal(alone, plain)
    for (ended,) in ranks.run(2, _fused, FSDP2, BOTH):
        torch.testing.assert_close(ended, alone, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_adamw_path(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A step is that of float32 moments; what is kept of them is next to theirs."""
    monkeypatch.setattr(arithmetic, "FUSED_DEVICES", frozenset())  # the same kernels for both
    grad, start = toys.random(50), toys.random(50, seed=1)
    hyper = arithmetic.Hyper(0.1, 0.9, 0.99, 1e-8, 0.0, 1.0, True)
    whole, low = (
        Entry("w", start.clone(), grad, torch.zeros(50), torch.zeros(50, dtype=second))
        for second in (torch.float32, dtype)
    )
    for entry in (whole, low):
        adamw_([entry], 1, hyper, stochastic=True)
    assert torch.equal(whole.param, low.param)
    ratio = low_precision.decode(low.exp_avg_sq, torch.float32) / whole.exp_avg_sq
    assert ((ratio > LEVEL**-1.01) & (ratio < LEVEL**1.01)).all()


# State


def _bytes(options: dict[str, Any]) -> tuple[int, int]:
    _, optimizer = models.build(FSDP2, **options)
    optimizer.init_state()
    held = sum(
        models.local(value).nbytes for state in optimizer.state.values() for value in state.values()
    )
    return held, sum(row["state_bytes"] for row in optimizer.report(show=False))


def test_what_it_saves() -> None:
    for (held, said), (held32, _) in zip(
        ranks.run(2, _bytes, BOTH), ranks.run(2, _bytes, {}), strict=True
    ):
        assert held == said < held32


def _save(folder: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    model, optimizer = models.build(FSDP2, **options)
    models.train(model, optimizer, range(STEPS))
    models.save(folder, model, optimizer)
    models.train(model, optimizer, range(STEPS, STEPS + 3))
    return models.snapshot(model, optimizer, models.whole)


def _load(folder: Path, layout: Layout, options: dict[str, Any]) -> dict[str, Tensor]:
    model, optimizer = models.build(layout, seed=1, **options)
    models.load(folder, model, optimizer)
    models.train(model, optimizer, range(STEPS, STEPS + 3))
    return models.snapshot(model, optimizer, models.whole)


@pytest.mark.thorough
def test_checkpoints_go_on(tmp_path: Path) -> None:
    """Bit-identically on the same layout, codes and thresholds included; near it on another."""
    whole = ranks.run(2, _save, tmp_path, BOTH)[0]
    for ended in ranks.run(2, _load, tmp_path, FSDP2, BOTH):
        assert not models.unequal(ended, whole)
    start = models.snapshot(*models.build(PLAIN))
    weights = {k: v for k, v in whole.items() if ":" not in k}
    for ended in ranks.run(3, _load, tmp_path, ("fsdp", (3,)), BOTH):
        assert models.farthest(ended, weights, start) < 0.02


def _converted(there: dict[str, Any], back: dict[str, Any]) -> list[str]:
    """A state dict of one kind loaded by another kind, and what that saves by the first again."""
    model, first = models.build(FSDP2, **there)
    models.train(model, first, range(STEPS))
    _, second = models.build(FSDP2, **back)
    second.load_state_dict(first.state_dict())
    twin, third = models.build(FSDP2, **there)
    third.load_state_dict(second.state_dict())
    problems = []
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in first.state[param].items():
            ours, theirs = (
                low_precision.decode(models.local(v), torch.float32)
                for v in (value, third.state[other][key])
            )
            # Of numbers only what no code stands for may be lost.
            ratio = torch.where((ours < 2.0**-60) & (theirs == 0), 1.0, ours / theirs)
            if not torch.equal(ours, theirs) and not (
                "sq" in key and ((ratio > LEVEL**-0.51) & (ratio < LEVEL**0.51)).all()
            ):
                problems.append(f"{key} of a {tuple(param.shape)}")
    return problems


@pytest.mark.parametrize(("there", "back"), [(CODED, {}), ({}, CODED)], ids=["codes", "numbers"])
def test_state_dicts_are_converted(there: dict[str, Any], back: dict[str, Any]) -> None:
    for problems in ranks.run(2, _converted, there, back):
        assert not problems


def test_a_state_of_the_other_kind_is_refused() -> None:
    """As when the option is changed in a copy of an optimizer; numbers must not pass for codes."""
    params = toys.parameters()
    first, second = Conda(params), Conda(params, **CODED)
    toys.take(first, params, toys.gradients(params, 1))
    second.state = first.state
    with pytest.raises(ValueError, match="made with another second_moment_dtype"):
        second.step()
