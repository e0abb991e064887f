"""What Conda under DeepSpeed refuses, says and survives."""

import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import models
import ranks
import zero
from conda_dist import Conda, decomposition, param_groups

os.environ["DS_ACCELERATOR"] = "cpu"

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"params": {"updat_proj_gap": 3}}, "no param 'updat_proj_gap'; the nearest is 'update_proj_"),
    ({"params": {"conda_modules": []}}, "no param 'conda_modules'; the nearest is 'conda_params'"),
    ({"params": {"lr": "0.01"}}, "TypeError: lr must be a number, got '0.01'"),
    ({"params": {"update_proj_gap": 3.5}}, "TypeError: update_proj_gap must be an int"),
    ({"params": {"state_dtype": "bf16"}}, "state_dtype must be one of float32, bfloat16"),
    ({"params": {"basis_placement": "split"}}, "basis_placement must be one of auto"),
    ({"params": {"refresh": "async"}}, 'refresh "async" is not supported under DeepSpeed'),
    ({"params": {"refresh_waves": 2}}, "refresh_waves must be 1 under DeepSpeed"),
    ({"params": {"second_moment_dtype": "uint8"}}, "second_moment_dtype is not supported under"),
    ({"params": {"basis_placement": "owner"}}, 'basis_placement "owner" is not supported'),
    ({"compile": {"deepcompile": True}}, "DeepCompile was not tried"),
    ({"params": {"adamw_params": "*"}}, "TypeError: adamw_params must be a list of patterns"),
    (
        {"params": {"conda_params": ["*.kqv"]}},
        r"pattern '\*.kqv' matches no parameter; names look",
    ),
    ({"params": {"conda_params": ["*.norm.weight"]}}, "norm.weight: a parameter of shape"),
    ({"params": {"adamw_params": ["*"]}}, "no trainable matrix would reach the conda path"),
    ({"zero": {"elastic_checkpoint": True}}, "elastic_checkpoint saves moments without their base"),
    ({"zero": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}, "NVMe"),
    ({"zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio splits the step"),
    ({"zero": {"zero_quantized_weights": True}}, "quantized weights"),
]


def _refusals() -> list[str]:
    said = []
    for others, _ in REFUSED:
        stage = 3 if "zero" in others else 1
        said.append(models.attempt(lambda o=others, s=stage: zero.build(zero.config(s, **o))))
    return said


def test_what_is_refused_and_why() -> None:
    for (others, expected), said in zip(REFUSED, ranks.run(1, _refusals)[0], strict=True):
        assert re.search(expected, said), (others, said)


def _routes(stage: int) -> tuple[dict[str, str], list[str]]:
    """Paths by name, with a pattern for each side, and what was logged."""
    deepspeed = zero.settle()
    said: list[str] = []
    module = __import__("conda_dist.integrations.deepspeed.optimizer", fromlist=["log_dist"])
    before, module.log_dist = module.log_dist, lambda text, ranks: said.append(text)
    params = {"conda_params": ["head.weight"], "adamw_params": ["blocks.0.q.*"]}
    try:
        torch.manual_seed(0)
        made = zero.config(stage, params=params)
        if stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=made):
                model = models.Tiny()
        else:
            model = models.Tiny()
        engine = zero.build(made, model)
        zero.train(engine, range(2))
    finally:
        module.log_dist = before
    inner = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    return {row["name"]: row["path"] for row in inner.report()}, said


@pytest.mark.parametrize("stage", range(4))
def test_routes_are_by_name_and_shape(stage: int) -> None:
    conda = {"head.weight", "blocks.1.q.weight"}
    conda |= {f"blocks.{i}.{n}" for i in range(2) for n in ("up.weight", "down.weight", "experts")}
    for paths, said in ranks.run(2, _routes, stage):
        assert paths == {
            name: "conda" if name in conda else "adamw"
            for name, _ in models.Tiny().named_parameters()
        }
        assert any("8 weights of 15 are on the conda path" in text for text in said)
        assert any("blocks.*.down.weight" in text and "refreshed by" in text for text in said)


def _client(stage: int) -> tuple[list[str], float]:
    """An optimizer that the script makes, without names: the engine knows them."""
    zero.settle()
    from conda_dist.integrations.deepspeed import Conda

    torch.manual_seed(0)
    model = models.Tiny()
    made = zero.config(stage)
    del made["optimizer"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Conda got parameters without names")
        optimizer = Conda(model.parameters(), **zero.SETTINGS)
        engine = zero.build(made, model, optimizer=optimizer)
    zero.train(engine, range(zero.STEPS))
    names = [row["name"] for row in optimizer.report() if row["path"] == "conda"]
    return names, models.farthest(zero.weights(engine), zero.alone(), zero.start())


def test_a_script_may_make_the_optimizer() -> None:
    for stage in (0, 2, 3):
        for names, error in ranks.run(2, _client, stage):
            assert "blocks.0.q.weight" in names
            assert "embed.weight" not in names
            assert error < 1e-4


def _plain(stage: int) -> str:
    """What is said of conda_dist.Conda itself, handed to the engine."""
    zero.settle()
    model = models.Tiny()
    made = zero.config(stage, zero_allow_untested_optimizer=True)
    del made["optimizer"]
    optimizer = Conda(model.named_parameters())
    return models.attempt(lambda: zero.build(made, model, optimizer=optimizer))


def _partitioned() -> str:
    """What is said when it is made from parameters that ZeRO 3 has partitioned already."""
    deepspeed = zero.settle()
    made = zero.config(3)
    del made["optimizer"]
    with deepspeed.zero.Init(config_dict_or_path=made):
        model = models.Tiny()
    try:
        return models.attempt(lambda: Conda(model.named_parameters()))
    finally:
        deepspeed.zero.partition_parameters.shutdown_init_context()


def test_the_optimizer_for_whole_tensors_is_refused() -> None:
    """With the two ways that work; a partition in a group is in test_changed_parameters."""
    said = [ranks.run(1, _plain, stage)[0] for stage in (1, 2, 3)]
    for text in (*said, ranks.run(1, _partitioned)[0]):
        assert '"optimizer": {"type": "Conda"}' in text
        assert "import conda_dist.integrations.deepspeed" in text
        assert "conda_dist.integrations.deepspeed.Conda(model.named_parameters())" in text
    assert ranks.run(1, _plain, 0) == ["nothing was raised"]


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


def _groups_that_differ() -> list[str]:
    zero.settle()
    from conda_dist.integrations.deepspeed import Conda

    said = []
    for splits, adamw in (({"*.up.weight": 2}, ()), (None, ["*.up.weight"])):
        torch.manual_seed(0)
        model = models.Tiny()
        groups = param_groups(model, splits=splits or {}, adamw=list(adamw))
        said.append(models.attempt(lambda g=groups: Conda(g, **zero.SETTINGS)))
    return said


def test_groups_that_ask_for_something_else_are_refused() -> None:
    (split, path) = ranks.run(1, _groups_that_differ)[0]
    assert "blocks.0.up.weight: its group has splits=" in split
    assert "blocks.0.up.weight: its group's algorithm is 'adamw', its path 'conda'" in path


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


def _mismatches(folder: Path) -> list[str]:
    sharded = {"basis_placement": "shard"}
    engine = zero.build(zero.config(3, params=sharded))
    zero.train(engine, range(2))
    engine.save_checkpoint(str(folder))
    said = []
    for params in ({"adamw_params": ["blocks.0.up.weight"], **sharded}, {}):
        other = zero.build(zero.config(3, params=params))

        def load(other: Any = other) -> None:
            other.load_checkpoint(str(folder))
            zero.train(other, range(1))

        said.append(models.attempt(load))
    made = zero.config(3)
    made["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    adamw = zero.build(made)
    zero.train(adamw, range(1))
    adamw.save_checkpoint(str(folder / "adamw"))
    fresh = zero.build(zero.config(3))
    said.append(models.attempt(fresh.load_checkpoint, str(folder / "adamw")))
    return said


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    for routed, placed, foreign in ranks.run(2, _mismatches, tmp_path):
        assert "blocks.0.up.weight: the checkpoint has (22, 10) on the conda path, here" in routed
        assert re.search(r"rank 1: ValueError: .* the checkpoint's basis has shape", placed)
        assert "was not written by Conda under DeepSpeed" in foreign


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
    units = enumerate(engine.basic_optimizer._units.values())
    tensors = {f"{i} {j}": t for i, unit in units for j, t in enumerate(unit.tensors)}
    for i, unit in enumerate(engine.basic_optimizer._units.values()):
        for j, state in enumerate(unit._states.values()):
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
