"""The NorMuon optimizer, on the same engine as Conda, for fair comparisons."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from conda_dist.matrix_optimizer import MatrixOptimizer
from conda_dist.options import Options
from conda_dist.rules.normuon import NorMuonRule


class NorMuon(MatrixOptimizer):
    """NorMuon (arXiv 2510.05491) for the matrices of a model, and AdamW for the rest.

    For a weight W (m, n) with gradient G, b the ``momentum``, row by row over the m rows::

        M <- b M + (1 - b) G
        N = (1 - b) G + b M                            N = M without nesterov
        O = NewtonSchulz(N)
        v <- beta2 v + (1 - beta2) mean(O^2)           one number for each row
        U = O / (sqrt(v) + eps)
        W <- (1 - lr weight_decay) W - lr c U |O| / |U|

    c is the factor of ``adjust_lr_fn``, sqrt(max(1, m / n)) by default. Layouts, batches, parts and
    groups are as for :class:`conda_dist.Muon`, with ``param_groups(model, rule="normuon")``.

    State of a matrix: ``step`` () on the CPU, ``momentum_buffer`` (m, n) in the parameter's dtype,
    and ``second_moment`` (m, 1) in at least float32.

    Args:
        params: tensors, (name, tensor) pairs or group dicts.
        lr: learning rate of both paths; a number or a tensor with one element.
        weight_decay: decoupled weight decay: both paths subtract ``lr * weight_decay`` times the
            weight.
        momentum: decay rate of the momentum, in [0, 1).
        nesterov: whether to use Nesterov momentum.
        ns_coefficients: the three coefficients of the Newton-Schulz iteration.
        eps: added to the square root of the second moment, and to the norm that the update is
            divided by.
        ns_steps: number of Newton-Schulz iterations.
        adjust_lr_fn: how the learning rate depends on a matrix's shape, see
            :class:`conda_dist.Muon`. "match_rms_adamw" comes near the paper's own way.
        beta2: decay rate of the second moment, in [0, 1).
        betas: decay rates of the moments on the adamw path.
        adamw_eps: added to the square root of the second moment on the adamw path.
        adamw_scale: multiplies the update of the adamw path, not its decay.
        diagnostics_every: steps between two collections of diagnostics; 0: never. See
            :meth:`diagnostics`.
        process_group: for plain parameters: ranks whose parameters and gradients are equal.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, a parameter cannot be optimized, or no matrix of
            the model would take the normuon path.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-10,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        beta2: float = 0.95,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_scale: float = 1.0,
        diagnostics_every: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = Options(diagnostics_every=diagnostics_every)
        super().__init__(params, locals(), NorMuonRule(), options, process_group)
