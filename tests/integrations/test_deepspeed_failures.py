"""Steps of Conda under DeepSpeed that are skipped or fail: nothing has changed, on all ranks."""

import math
import os
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

import models
import ranks
import zero
from conda_dist.numerics import decomposition

os.environ["DS_ACCELERATOR"] = "cpu"

BAD: list[tuple[str, Any, str]] = [
    ("lr", math.nan, "parameter group 1: lr must be a number and finite, got nan"),
    ("lr", "0.1", "TypeError: parameter group 1: lr must be a number"),
    ("weight_decay", -0.1, "parameter group 1: weight_decay must be at least 0"),
    ("adamw_scale", -0.5, "parameter group 1: adamw_scale must be at least 0"),
    ("adamw_scale", "2", "TypeError: parameter group 1: adamw_scale must be a number"),
    ("betas", [0.9, 1.0], "parameter group 1: betas.1. must be at least 0 and below 1"),
    ("update_proj_gap", 0, "parameter group 1: update_proj_gap must be at least 1, got 0"),
    ("correct_bias", None, "TypeError: parameter group 1: correct_bias must be a bool"),
]


def _change(stage: int, bad: list[tuple[str, Any, str]]) -> list[tuple[str, list[str]]]:
    """What a step says of each bad value in a second group, and what it changed all the same."""
    ends = []
    for key, value, _ in bad:
        torch.manual_seed(0)
        model = models.Tiny()
        params = list(model.parameters())
        groups = [{"params": params[::2]}, {"params": params[1::2]}]
        engine = zero.build(zero.config(stage), model, model_parameters=groups)
        zero.train(engine, range(2))
        before = _held(engine)
        engine.optimizer.param_groups[1][key] = value
        said = models.attempt(zero.train, engine, range(2, 3))
        ends.append((said, models.unequal(before, _held(engine))))
    return ends


@pytest.mark.parametrize("stage", range(4))
def test_what_schedulers_set_is_checked_in_every_step(stage: int) -> None:
    """Each value at two stages."""
    bad = BAD[stage % 2 :: 2]
    for ends in ranks.run(2, _change, stage, bad, timeout=60):
        for (_, _, expected), (said, changed) in zip(bad, ends, strict=True):
            assert re.search(expected, said), said
            assert not changed


def _one_rank(stage: int) -> str:
    engine = zero.build(zero.config(stage))
    if dist.get_rank() == 1:
        engine.optimizer.param_groups[0]["lr"] = math.nan
    return models.attempt(zero.train, engine, range(1))


@pytest.mark.thorough
def test_a_bad_value_of_one_rank_at_the_first_step_is_told_to_all() -> None:
    for stage in (0, 2, 3):
        for said in ranks.run(2, _one_rank, stage, timeout=60):
            assert "rank 1: ValueError: parameter group 0: lr must be a number" in said


class _BrokenError(Exception):
    pass


def _inject(stage: int) -> str:
    """One rank's decompositions fail in the second refresh."""
    engine = zero.build(zero.config(stage))
    decompose = decomposition.decompose

    def broken(*args: Any) -> Any:
        raise _BrokenError("injected")

    zero.train(engine, range(3))
    if dist.get_rank() == 1:
        decomposition.decompose = broken
    try:
        return models.attempt(zero.train, engine, range(3, 4))
    finally:
        decomposition.decompose = decompose


@pytest.mark.parametrize("stage", range(4))
def test_a_rank_that_fails_ends_all(stage: int) -> None:
    for said in ranks.run(2, _inject, stage, timeout=60):
        assert "could not refresh its bases: rank 1: _BrokenError: injected" in said


def _autocast(stage: int) -> bool:
    """Whether steps inside autocast end where those outside do."""
    ends = []
    for inside in (False, True):
        engine = zero.build(zero.config(stage))
        for step in range(zero.STEPS):
            batch = zero.tokens(step).chunk(dist.get_world_size())[dist.get_rank()]
            engine.backward(zero.loss(engine, batch))
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                engine.step()
        ends.append(zero.weights(engine))
    return not models.unequal(*ends)


def test_steps_inside_autocast() -> None:
    for stage in (1, 3):
        assert ranks.run(2, _autocast, stage) == [True, True]


def _unchanged_at_the_start(stage: int) -> bool:
    """The engine's own steps, and ours with zero gradients, change and count nothing."""
    engine = zero.build(zero.config(stage, "bf16"))
    before = zero.weights(engine)
    value = zero.loss(engine, zero.tokens(0).chunk(dist.get_world_size())[dist.get_rank()])
    engine.backward(value * 0)
    engine.step()
    steps = [float(state["step"]) for state in engine.optimizer.optimizer.state.values()]
    return not models.unequal(before, zero.weights(engine)) and not any(steps)


def test_zero_gradients_count_for_nothing() -> None:
    for stage in range(4):
        assert all(ranks.run(2, _unchanged_at_the_start, stage))


OVERFLOWS = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 4, "hysteresis": 1}}
SKIPPED: list[tuple[int, str, dict[str, Any], float]] = [
    *((stage, "fp32", {}, math.nan) for stage in (1, 2, 3)),
    *((stage, "bf16", {}, math.nan) for stage in range(4)),
    *((stage, "fp16", OVERFLOWS, math.inf) for stage in range(4)),
]
"""Stage, dtype, other entries of a config and a factor of the loss with which DeepSpeed skips."""


def _held(engine: Any) -> dict[str, torch.Tensor]:
    """Copies of all that Conda updates."""
    steps = list(enumerate(engine.basic_optimizer._steps.values()))
    tensors = {f"{i} {j}": t for i, step in steps for j, t in enumerate(step.tensors)}
    for i, step in steps:
        for j, state in enumerate(step._states.values()):
            tensors |= {f"{i} {j} {key}": value for key, value in state.items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _skip() -> list[list[str]]:
    changed = []
    for stage, dtype, others, factor in SKIPPED:
        engine = zero.build(zero.config(stage, dtype, **others))
        zero.train(engine, range(3))
        before = _held(engine)
        zero.train(engine, range(3, 4), factor)  # when a refresh is due
        changed.append(models.unequal(before, _held(engine)))
        zero.train(engine, range(4, 6))
        if not models.unequal(before, _held(engine)):
            changed.append(["no step was taken any more"])
    return changed


@pytest.mark.thorough
def test_steps_that_deepspeed_skips_change_nothing() -> None:
    for changed in ranks.run(2, _skip):
        assert dict(zip(map(str, SKIPPED), changed, strict=True)) == {
            str(case): [] for case in SKIPPED
        }


def _poison() -> list[str]:
    """Where DeepSpeed lets NaN through, as plain PyTorch does."""
    said = []
    unchecked = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    for made in (zero.config(0), zero.config(2, **unchecked)):
        engine = zero.build(made)
        zero.train(engine, range(3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zero.train(engine, range(3, 4), math.nan)
            said.append(models.attempt(zero.train, engine, range(4, 9)))
    return said


def test_nan_that_deepspeed_lets_through_ends_the_run() -> None:
    for answers in ranks.run(2, _poison, timeout=60):
        for said in answers:
            assert "the basis could not be refreshed at step 5, because its momentum is n" in said
