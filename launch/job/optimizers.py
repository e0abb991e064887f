"""The optimizer a config names, built for a sharded model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from conda_dist import Conda, Muon, param_groups
from conda_dist.launch.job.config import AdamWConfig, CondaConfig, MuonConfig, OptimizerConfig
from conda_dist.options import OPTIONS


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """The optimizer of that name.

    Args:
        model: The sharded model.
        config: The optimizer's name and settings.

    Returns:
        Optimizers that together hold every trainable parameter once; the first one's learning
        rate is the one to report.
    """
    match config.chosen:
        case CondaConfig() as settings:
            return [_conda(model, settings)]
        case AdamWConfig() as settings:
            parameters = list(model.parameters())
            return [
                _adamw(parameters, settings.lr, settings.betas, settings.eps, settings.weight_decay)
            ]
    return [_muon(model, config.muon)]


def describe(optimizers: list[Optimizer]) -> str:
    """What each optimizer got, in a few words."""
    parts = []
    for optimizer in optimizers:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        elements = sum(parameter.numel() for parameter in held)
        parts.append(f"{type(optimizer).__name__}, {len(held)} tensors of {elements:,} parameters")
    return "; ".join(parts)


def conda_arguments(settings: CondaConfig) -> dict[str, Any]:
    """Conda's arguments, but for its groups; dtypes by name."""
    return {name: getattr(settings, name) for name in OPTIONS}


def _conda(model: nn.Module, settings: CondaConfig) -> Conda:
    return Conda(param_groups(model), **conda_arguments(settings))


def _adamw(
    parameters: list[nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr, betas, eps, weight_decay, fused=True)


def _muon(model: nn.Module, settings: MuonConfig) -> Muon:
    return Muon(
        param_groups(model, rule="muon"),
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        ns_steps=settings.ns_steps,
        adjust_lr_fn=settings.adjust_lr,
        betas=settings.adamw_betas,
        adamw_eps=settings.adamw_eps,
        adamw_scale=settings.adamw_scale,
        diagnostics_every=settings.diagnostics_every,
    )
