"""The Muon optimizer, on the same engine as Conda, for fair comparisons."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from conda_dist.matrix_optimizer import MatrixOptimizer
from conda_dist.options import Options
from conda_dist.rules.muon import MuonRule


class Muon(MatrixOptimizer):
    """torch.optim.Muon for the matrices of a model, plain or sharded, and AdamW for the rest.

    Its result for a matrix is that of torch.optim.Muon on the whole matrix, bit for bit, on every
    layout and number of ranks. One of the ranks that share a matrix computes it: that rank gathers
    the gradient and keeps the momentum. Each matrix of a batch, and each part of a weight that a
    group's ``splits`` cut, is computed separately. ``conda_dist.param_groups(model, rule="muon")``
    makes groups for it. In other groups the names and shapes of parameters choose their paths, as
    for :class:`conda_dist.Conda`.

    State of a matrix: ``step`` (), on the CPU, and ``momentum_buffer`` (m, n), in the parameter's
    dtype. A first step in which all gradients are zero changes nothing and is not counted.

    Args:
        params: tensors, (name, tensor) pairs or group dicts.
        lr: learning rate of both paths; a number or a tensor with one element.
        weight_decay: decoupled weight decay: both paths subtract ``lr * weight_decay`` times the
            weight.
        momentum: decay rate of the momentum, in [0, 1).
        nesterov: whether to use Nesterov momentum.
        ns_coefficients: the three coefficients of the Newton-Schulz iteration.
        eps: lower bound of the norm that the momentum is divided by.
        ns_steps: number of Newton-Schulz iterations.
        adjust_lr_fn: how the learning rate depends on a matrix's shape: "original",
            "match_rms_adamw" or "spectral_unclamped", as in torch.optim.Muon; None: "original".
        betas: decay rates of the moments on the adamw path.
        adamw_eps: added to the square root of the second moment on the adamw path.
        adamw_scale: multiplies the update of the adamw path, not its decay.
        diagnostics_every: steps between two collections of diagnostics; 0: never. See
            :meth:`diagnostics`.
        process_group: for plain parameters: ranks whose parameters and gradients are equal.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, a parameter cannot be optimized, or no matrix of
            the model would take the muon path.
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
        diagnostics_every: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = Options(diagnostics_every=diagnostics_every)
        super().__init__(params, locals(), MuonRule(), options, process_group)
