"""The optimizer a config names, built for a sharded model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from conda_dist import Conda, param_groups
from conda_dist.launch.job.config import AdamWConfig, CondaConfig, MuonConfig, OptimizerConfig
from conda_dist.launch.job.muon import ShardedMuon
from conda_dist.optimizer import ARGUMENTS
from conda_dist.options import DTYPES, OF_DTYPES


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """The optimizer of that name; two of them for Muon, which does matrices only.

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
        case MuonConfig() as settings:
            return _muon(model, settings)


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
    given = {name: getattr(settings, name, default) for name, default in ARGUMENTS.items()}
    return {name: (value or None) if name in OF_DTYPES else value for name, value in given.items()}


def _conda(model: nn.Module, settings: CondaConfig) -> Conda:
    arguments = conda_arguments(settings)
    dtypes = {name: DTYPES.get(arguments[name]) for name in OF_DTYPES}
    return Conda(param_groups(model), **{**arguments, **dtypes})


def _adamw(
    parameters: list[nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr, betas, eps, weight_decay, fused=True)


def _muon(model: nn.Module, settings: MuonConfig) -> list[Optimizer]:
    """Muon for exactly the matrices that Conda would project, AdamW for the rest."""
    split: dict[str, list[nn.Parameter]] = {"conda": [], "adamw": []}
    for group in param_groups(model):
        split[group["algorithm"]] += [parameter for _, parameter in group["params"]]
    muon = ShardedMuon(
        split["conda"],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        ns_steps=settings.ns_steps,
        adjust_lr_fn=settings.adjust_lr,
    )
    scale = settings.adamw_scale  # of the update alone: decay is lr * weight_decay in both
    adamw = _adamw(
        split["adamw"],
        settings.lr * scale,
        settings.adamw_betas,
        settings.adamw_eps,
        settings.weight_decay / scale,
    )
    return [muon, adamw]
