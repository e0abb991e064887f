"""The optimizer a config names, built for a sharded model."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from conda_dist import param_groups
from conda_dist.launch.job.optimizer_config import OptimizerConfig
from conda_dist.matrix_optimizer import MatrixOptimizer


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """Optimizers that together hold every trainable parameter of a sharded model once.

    The first one's learning rate is the one to report.
    """
    settings = config.chosen
    kind = pkgutil.resolve_name(settings.built_by)
    given = settings.arguments
    if issubclass(kind, MatrixOptimizer):
        eps = "eps" if config.name == "conda" else "adamw_eps"
        own = {"betas": config.adamw_betas, eps: config.adamw_eps}
        return [kind(param_groups(model, rule=config.name, adamw_options=own), **given)]
    del given["adamw_scale"]
    if kind is torch.optim.AdamW:
        given["fused"] = True
    *groups, others = param_groups(model)
    held = [parameter for group in groups for _, parameter in group["params"]]
    rest = [parameter for _, parameter in others["params"]]
    matrices = kind(held, **given)
    if not settings.knows_shards:
        _step_copies(matrices)
    return [matrices, torch.optim.AdamW(rest, **rest_arguments(config), fused=True)]


def _step_copies(optimizer: Optimizer) -> None:
    """Makes an optimizer that knows no DTensors step this rank's copies of replicated ones.

    The state consists of plain tensors. Between steps it is kept under the parameters, where
    checkpoints look for it, and during a step under their copies.
    """
    held: list[list[Any]] = []

    def exchange(group: dict[str, Any], tensors: list[Any]) -> list[Any]:
        before: list[Any] = group["params"]
        group["params"] = tensors
        for old, new in zip(before, tensors, strict=True):
            if old in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(old)
        return before

    def before_step(*_: Any) -> None:
        for group in optimizer.param_groups:
            copies = [parameter.detach().to_local() for parameter in group["params"]]
            for parameter, copy in zip(group["params"], copies, strict=True):
                copy.grad = None if parameter.grad is None else parameter.grad.to_local()
            held.append(exchange(group, copies))

    def after_step(*_: Any) -> None:
        for group in optimizer.param_groups:
            exchange(group, held.pop(0))

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


def describe(optimizers: Sequence[Optimizer]) -> str:
    """What each optimizer got, in a few words."""
    parts = []
    for optimizer in optimizers:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        elements = sum(parameter.numel() for parameter in held)
        parts.append(f"{type(optimizer).__name__}, {len(held)} tensors of {elements:,} parameters")
    return "; ".join(parts)


def rest_arguments(config: OptimizerConfig) -> dict[str, Any]:
    """The arguments of AdamW for embeddings, head, norms and biases.

    Its decay is the matrices', `lr * weight_decay`, whatever its rate is.
    """
    settings = config.chosen
    return {
        "lr": settings.lr * settings.adamw_scale,
        "betas": config.adamw_betas,
        "eps": config.adamw_eps,
        "weight_decay": settings.weight_decay / settings.adamw_scale,
    }
