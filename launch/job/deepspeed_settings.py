"""DeepSpeed's JSON from the job's config, and what a user's own may add to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conda_dist import param_groups
from conda_dist.launch.cluster.process_group import World, from_main
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.model import compute_dtype, empty_model
from conda_dist.launch.job.optimizers import arguments, rest_arguments

_OWNED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "managed_gradient_accumulation": "training.micro_batch_size",
    "optimizer": "[optimizer]",
    "scheduler": "[schedule]",
    "gradient_clipping": "optimizer.grad_clip",
    "bf16": "training.compute_dtype",
    "bfloat16": "training.compute_dtype",
    "fp16": "training.compute_dtype",
    "amp": "training.compute_dtype",
    "torch_autocast": "training.compute_dtype",
    "data_types": "training.compute_dtype",
}
"""Keys of the JSON that the job sets itself, with the job's keys that say what."""


def build_settings(config: Config, world: World) -> dict[str, Any]:
    """DeepSpeed's whole configuration for this job, the user's file included.

    Raises:
        ConfigError: On every rank: the file is not there, is no JSON object, or has keys that are
            the job's.
        JobError: On every rank: the file cannot be read.
    """
    training, stage = config.training, config.deepspeed.stage
    rows = -(-training.global_batch_size // world.size)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": -(-rows // training.micro_batch_size),
        "gradient_clipping": config.optimizer.chosen.grad_clip,
        "optimizer": _optimizer(config),
        "zero_optimization": {"stage": stage},
        "checkpoint": {"tag_validation": "Ignore"},  # the job's own folders are all alike
        "zero_allow_untested_optimizer": True,  # torch.optim.AdamW; Conda is known
    }
    if compute_dtype(training, world.device) == torch.bfloat16:
        # A gradient that is not finite must not reach the weights, in bfloat16 either.
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        # As under FSDP2, gradients of ranks are added up in float32; and of micro-batches, where
        # DeepSpeed can.
        settings["communication_data_type"] = "fp32"
        if stage >= 2:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if not config.deepspeed.config:
        return settings
    file = Path(config.deepspeed.config)
    given, problem = from_main(world, f"reading {file}", lambda: _read(file))
    problem = problem or _refusal(given, stage)
    if problem:
        raise ConfigError(f"deepspeed.config {file}: {problem}")
    return _merged(settings, given)


def _optimizer(config: Config) -> dict[str, Any]:
    params = arguments(config.optimizer.chosen)
    if config.optimizer.name == "conda":
        return {"type": "Conda", "params": params}
    del params["adamw_scale"]  # the rest has a group with a rate of its own
    return {"type": "AdamW", "params": {"torch_adam": True, "fused": True, **params}}


def parameter_groups(config: Config, model: nn.Module, vocab_size: int) -> list[dict[str, Any]]:
    """The model's matrices, and all the rest with the settings of the AdamW that steps it."""
    # Stage 3 has partitioned the model; its names are those of the empty one.
    *_, others = param_groups(empty_model(config.model, config.training, vocab_size))
    names = {name for name, _ in others["params"]}
    sides: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        sides[name in names].append(parameter)
    own = rest_arguments(config.optimizer)
    if config.optimizer.name == "conda":  # which multiplies by adamw_scale itself
        own = {key: own[key] for key in ("betas", "eps")}
    return [{"params": sides[False]}, {"params": sides[True], **own}]


def _read(file: Path) -> tuple[Any, str]:
    """What the file says, or what is wrong with it."""
    try:
        given = json.loads(file.read_text())
    except FileNotFoundError:
        return {}, "there is no such file"
    except OSError as error:
        return {}, f"it cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return {}, f"it is not valid JSON: {error}"
    return given, "" if isinstance(given, dict) else "an object is wanted, { ... }"


def _refusal(given: Mapping[str, Any], stage: int) -> str:
    """Why the user's settings cannot be taken; "" if they can."""
    owned = [f"{key!r} is set by {_OWNED[key]}" for key in given if key in _OWNED]
    if owned:
        return f"{'; '.join(owned)}, of the job's config: remove it from the file"
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return f"zero_optimization = {zero!r}: an object is wanted, {{ ... }}"
    if zero.get("compute_grad_norm") is False:
        return "zero_optimization.compute_grad_norm is false: the job needs the norm; remove it"
    if zero.get("stage", stage) != stage:
        return (
            f"zero_optimization.stage is {zero['stage']} there and deepspeed.stage is {stage}: "
            f"give --deepspeed.stage {zero['stage']}, or remove it from the file"
        )
    return ""


def _merged(ours: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` on top of `ours`, objects key by key."""
    merged = dict(ours)
    for key, value in given.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
