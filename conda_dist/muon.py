"""Muon beside Conda, on the same engine: for comparisons that are fair."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from conda_dist.matrix_optimizer import MatrixOptimizer
from conda_dist.options import Options
from conda_dist.parameter_groups import check_hyperparameters
from conda_dist.rules.muon import MuonRule


class Muon(MatrixOptimizer):
    """torch.optim.Muon for a model's matrices, on whatever shards there are, AdamW for the rest.

    What it makes of a matrix is torch.optim.Muon's result on the whole matrix, to the bit, on every
    layout and number of ranks. Each matrix is computed by one of the ranks that share it, which
    gathers its gradient and keeps its momentum. Of a batch, and of a weight that ``splits`` cut,
    each matrix is by itself. ``conda_dist.param_groups(model, rule="muon")`` makes its groups; else
    parameters take paths by their names and shapes, as those of :class:`conda_dist.Conda` do.

    State of a matrix: ``step`` (0-d, on the CPU) and ``momentum_buffer`` (m, n), in the parameter's
    dtype. A first step in which all gradients are zero changes nothing and is not counted.

    Args:
        params: tensors, (name, tensor) pairs or group dicts.
        lr: learning rate of both paths; a number or a tensor of one element.
        weight_decay: decoupled decay; ``lr * weight_decay`` on both paths.
        momentum: decay rate of the momentum, in [0, 1).
        nesterov: whether the momentum looks ahead.
        ns_coefficients: the three coefficients of the Newton-Schulz iteration.
        eps: least norm that a momentum is divided by.
        ns_steps: iterations.
        adjust_lr_fn: how the rate follows a matrix's shape: "original", "match_rms_adamw" or
            "spectral_unclamped"; None for the first.
        betas: decay rates of the moments on the adamw path.
        adamw_eps: added to the root of the second moment on the adamw path.
        adamw_scale: factor on the update of the adamw path. It does not change the decay.
        process_group: for plain parameters: ranks with equal gradients.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one out of its range, a parameter that cannot be optimized, or a model of
            which no matrix would be on the muon path.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_scale: float = 1.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        rule, options = MuonRule(), Options()
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "adamw_scale": adamw_scale,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "adamw_eps": adamw_eps,
            "algorithm": None,
            "splits": None,
        }
        check_hyperparameters(defaults)
        rule.check(defaults, "")
        super().__init__(params, defaults, rule, options, process_group)
