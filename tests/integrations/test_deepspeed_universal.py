"""Universal checkpoints of DeepSpeed: what was saved on some ranks goes on on others."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import models
import ranks
import zero
from conda_dist.options import Options
from conda_dist.rules.conda import CondaRule

os.environ["DS_ACCELERATOR"] = "cpu"

SAVED = 4
"""Steps before the checkpoint: one after a refresh."""
Config = tuple[int, str, dict[str, Any]]
"""Stage, dtype and other entries of a config."""
CONFIGS: list[Config] = [
    (1, "fp32", {}),
    (2, "fp32", {"params": {"basis_budget": 0}}),
    (3, "fp32", {}),
    (3, "fp32", {"zero": {"sub_group_size": 300}, "params": {"basis_budget": 0}}),
    (2, "fp32", {"params": {"basis_source": "gradients"}}),
    (3, "fp32", {"params": {"basis_source": "gradients", "nesterov": True}}),
]


def _states(engine: Any) -> dict[str, Tensor]:
    """Moments, counts and bases, whole, as the first rank's checkpoint has them."""
    from deepspeed.utils import safe_get_full_optimizer_state

    from conda_dist.integrations.deepspeed.engine import _saving

    states = {}
    for name, param in engine.module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            states[f"{name}:{key}"] = safe_get_full_optimizer_state(param, key).flatten().clone()
    token = _saving.set("")
    try:
        state = engine.optimizer.state_dict()
    finally:
        _saving.reset(token)
    kept = state.get("base_optimizer_state", state.get("optimizer_state_dict"))["conda"]
    for name, weight in kept["weights"].items():
        states |= {f"{name}:{key}": value.clone() for key, value in weight.items()}
    return states | {f"{n}:count": torch.tensor(count) for n, count in kept["counts"].items()}


Run = tuple[list[float], dict[str, Tensor]]
"""Losses over all ranks and weights at the end."""


def _ended(engine: Any, steps: range) -> Run:
    losses = torch.tensor(zero.train(engine, steps))
    dist.all_reduce(losses)
    return (losses / dist.get_world_size()).tolist(), zero.weights(engine)


def _save(folder: Path, configs: list[Config]) -> list[tuple[Run, Any]]:
    """Runs that save, and what they held then."""
    runs = []
    for i, (stage, dtype, others) in enumerate(configs):
        engine = zero.build(zero.config(stage, dtype, **others))
        zero.train(engine, range(SAVED))
        engine.save_checkpoint(f"{folder}/{i}", "saved")
        held = _states(engine)
        runs.append((_ended(engine, range(SAVED, zero.STEPS)), held))
        zero.convert(f"{folder}/{i}")
    return runs


def _load(folder: Path, configs: list[Config]) -> list[tuple[Run, Any]]:
    runs = []
    for i, (stage, dtype, others) in enumerate(configs):
        made = zero.config(stage, dtype, checkpoint={"load_universal": True}, **others)
        engine = zero.build(made)
        engine.load_checkpoint(f"{folder}/{i}")
        held = _states(engine)
        runs.append((_ended(engine, range(SAVED, zero.STEPS)), held))
    return runs


@pytest.mark.parametrize(
    ("before", "after", "configs"), [(2, 3, CONFIGS[1::2]), (3, 2, CONFIGS[::2])]
)
def test_goes_on_on_other_ranks(
    before: int, after: int, configs: list[Config], tmp_path: Path
) -> None:
    saved = ranks.run(before, _save, tmp_path, configs)[0]
    loaded = ranks.run(after, _load, tmp_path, configs)[0]
    start = zero.start()
    for config, (ours, held), (theirs, kept) in zip(configs, loaded, saved, strict=True):
        print(config, models.farthest(ours[1], theirs[1], start))
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
        assert models.farthest(ours[1], theirs[1], start) < 1e-5, config
        assert not models.unequal(held, kept), config


def _grouped(params: list[Any]) -> list[dict[str, Any]]:
    """Two groups of every second parameter."""
    return [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0, "lr": 5e-3}]


def _of_groups(stage: int, **others: Any) -> Any:
    torch.manual_seed(0)
    model = models.Tiny()
    made = zero.config(stage, **others)
    return zero.build(made, model, model_parameters=_grouped(list(model.parameters())))


def _save_groups(folder: Path) -> list[Run]:
    runs = []
    for stage in (1, 3):
        engine = _of_groups(stage)
        zero.train(engine, range(SAVED))
        engine.save_checkpoint(f"{folder}/{stage}", "saved")
        runs.append(_ended(engine, range(SAVED, zero.STEPS)))
        zero.convert(f"{folder}/{stage}")
    return runs


UNIVERSAL = {"checkpoint": {"load_universal": True}}


def _load_groups(folder: Path) -> list[tuple[Run, list[list[float]]]]:
    """Goes on; saves and loads again without a step in between."""
    runs = []
    for stage in (1, 3):
        engine = _of_groups(stage, **UNIVERSAL)
        engine.load_checkpoint(f"{folder}/{stage}")
        engine.save_checkpoint(f"{folder}/{stage}/again", "saved")
        zero.convert(f"{folder}/{stage}/again")
        engine = _of_groups(stage, **UNIVERSAL)
        engine.load_checkpoint(f"{folder}/{stage}/again", "universal")
        rates = [[g["lr"], g["weight_decay"]] for g in engine.basic_optimizer.param_groups]
        assert all("conda" not in group for group in engine.basic_optimizer.param_groups)
        runs.append((_ended(engine, range(SAVED, zero.STEPS)), rates))
    return runs


@pytest.mark.thorough
def test_groups_keep_their_hyperparameters(tmp_path: Path) -> None:
    saved = ranks.run(2, _save_groups, tmp_path)[0]
    for (ours, rates), theirs in zip(ranks.run(3, _load_groups, tmp_path)[0], saved, strict=True):
        assert rates == [[0.01, 0.1], [0.005, 0.0]]
        assert models.farthest(ours[1], theirs[1], zero.start()) < 1e-5


def _save_all(folder: Path) -> list[Run]:
    runs = _save(folder, [(stage, "fp32", {}) for stage in (1, 2)])
    foreign = zero.config(2)
    foreign["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    robin = zero.config(1, zero={"round_robin_gradients": True})
    engines = {"adamw": zero.build(foreign), "robin": zero.build(robin)}
    engines["other"] = zero.build(zero.config(2), models.Tiny(hidden=24))
    routed = zero.config(2, params={"adamw_params": ["blocks.0.up.weight"]})
    engines["routed"] = zero.build(routed)
    engines["groups"] = _of_groups(2)
    for name, engine in engines.items():
        zero.train(engine, range(1))
        engine.save_checkpoint(f"{folder}/{name}", "saved")
        zero.convert(f"{folder}/{name}")
    return [run for run, _ in runs]


def _load_others(folder: Path) -> tuple[dict[str, str], list[Run]]:
    """Errors, and runs at other stages than were saved."""
    said = {}
    for name in ("adamw", "robin", "other", "routed", "groups"):
        engine = zero.build(zero.config(2, **UNIVERSAL))
        said[name] = models.attempt(engine.load_checkpoint, f"{folder}/{name}")
    engine = zero.build(zero.config(2, **UNIVERSAL))
    said["unconverted"] = models.attempt(engine.load_checkpoint, f"{folder}/0", "saved")
    for stage, others in ((0, {}), (1, {"zero": {"round_robin_gradients": True}})):
        made = zero.config(stage, **UNIVERSAL, **others)
        said[f"config {stage}"] = models.attempt(zero.build, made)
    runs = []
    for saved, stage in ((0, 2), (1, 1)):
        engine = zero.build(zero.config(stage, **UNIVERSAL))
        engine.load_checkpoint(f"{folder}/{saved}")
        runs.append(_ended(engine, range(SAVED, zero.STEPS)))
    return said, runs


ERRORS = {
    "adamw": "cannot load the universal checkpoint: rank 0: ValueError: the checkpoint's optimizer "
    "state was not written by Conda.*; rank 1: ValueError",
    "robin": "wrong places with round_robin_gradients",
    "other": r"blocks.0.down.weight: the checkpoint has \(10, 24\) on the conda path, here it is "
    r"\(10, 22\)",
    "routed": "blocks.0.up.weight: the checkpoint has nothing on the conda path",
    "groups": "the checkpoint has 2 parameter groups, the optimizer 1",
    "unconverted": "is missing: .* is not what ds_to_universal makes",
    "config 0": "load_universal in this DeepSpeed config: it is for ZeRO 1 to 3; what stage 0",
    "config 1": "DeepSpeed takes parameters from wrong places with round_robin_gradients. Leave",
}


@pytest.mark.thorough
def test_other_stages_and_what_does_not_fit(tmp_path: Path) -> None:
    saved = ranks.run(2, _save_all, tmp_path)[0]
    for said, runs in ranks.run(2, _load_others, tmp_path):
        for name, expected in ERRORS.items():
            assert re.search(expected, said[name]), (name, said[name])
        for ours, theirs in zip(runs, saved, strict=True):
            assert models.farthest(ours[1], theirs[1], zero.start()) < 1e-5


def _model_alone(folder: Path) -> list[list[str]]:
    """What differs from a new optimizer on the loaded weights, for each way to load no states."""
    differing = []
    for stage in (1, 3):
        place = f"{folder}/{stage}"
        engine = zero.build(zero.config(stage))
        zero.train(engine, range(SAVED))
        engine.save_checkpoint(place, "saved")
        zero.convert(place)
        ends = []
        for universal, options in (
            (False, {"load_optimizer_states": False}),
            # DeepSpeed loads nothing that way at stage 3.
            *([(False, {"load_module_only": True})] if stage < 3 else []),
            (True, {"load_optimizer_states": False}),
            (True, {"load_module_only": True}),
        ):
            made = zero.config(stage, params={"lr": 0.02}, **(UNIVERSAL if universal else {}))
            engine = zero.build(made)
            engine.load_checkpoint(place, load_lr_scheduler_states=False, **options)
            zero.train(engine, range(2))
            ends.append(zero.weights(engine))
        differing += [models.unequal(end, ends[0]) for end in ends]
    return differing


@pytest.mark.thorough
def test_the_model_alone(tmp_path: Path) -> None:
    assert not any(ranks.run(2, _model_alone, tmp_path)[0])


def _save_stage0(folder: Path, configs: list[Config]) -> list[Run]:
    runs = []
    for i, (stage, dtype, others) in enumerate(configs):
        engine = zero.build(zero.config(stage, dtype, **others))
        zero.train(engine, range(SAVED))
        engine.save_checkpoint(f"{folder}/{i}")
        runs.append(_ended(engine, range(SAVED, zero.STEPS)))
    return runs


def _load_stage0(folder: Path, configs: list[Config]) -> list[Run]:
    runs = []
    for i, (stage, dtype, others) in enumerate(configs):
        engine = zero.build(zero.config(stage, dtype, **others))
        engine.load_checkpoint(f"{folder}/{i}")
        runs.append(_ended(engine, range(SAVED, zero.STEPS)))
    return runs


def test_stage_0_needs_no_conversion(tmp_path: Path) -> None:
    configs: list[Config] = [(0, "fp32", {}), (0, "bf16", {})]
    saved = ranks.run(2, _save_stage0, tmp_path, configs)[0]
    for world in (1, 3):
        loaded = ranks.run(world, _load_stage0, tmp_path, configs)[0]
        for (_, dtype, _), ours, theirs in zip(configs, loaded, saved, strict=True):
            error = models.farthest(ours[1], theirs[1], zero.start())
            assert error < (1e-5 if dtype == "fp32" else 0.01), dtype


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_what_is_kept_runs_no_code(tmp_path: Path) -> None:
    """What is read of a universal checkpoint here; the rest DeepSpeed unpickles by itself."""
    from conda_dist.integrations.deepspeed.checkpoint import read_universal

    target, file = tmp_path / "made by a pickle", tmp_path / "zero" / "optimizer_state.pt"
    file.parent.mkdir()
    torch.save({"param_groups": [{"conda": Payload(target)}]}, file)
    torch.load(file, weights_only=False)
    target.rmdir()  # so much for the payload: it works
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        read_universal(str(tmp_path), [], {}, CondaRule(Options()))
    assert not target.exists()
