"""DeepSpeed's JSON from the job's config, and what a user's own may add to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from conda_dist import param_groups
from conda_dist.launch.cluster.process_group import World
from conda_dist.launch.job.config import Config
from conda_dist.launch.job.deepspeed_file import read_file
from conda_dist.launch.job.model import compute_dtype, empty_model
from conda_dist.launch.job.optimizers import rest_arguments


def build_settings(config: Config, world: World) -> dict[str, Any]:
    """DeepSpeed's whole configuration for this job, the user's file included."""
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
    return _merged(settings, read_file(config))


def _optimizer(config: Config) -> dict[str, Any]:
    params = config.optimizer.chosen.arguments
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


def _merged(ours: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` on top of `ours`, objects key by key."""
    merged = dict(ours)
    for key, value in given.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
