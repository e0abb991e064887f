"""The NAMO and NAMO-D optimizers, on the same engine as Conda, for fair comparisons."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from conda_dist.matrix_optimizer import MatrixOptimizer
from conda_dist.options import Options
from conda_dist.rules.namo import NAMODRule, NAMORule


class NAMO(MatrixOptimizer):
    """NAMO (arXiv 2602.17080) for the matrices of a model, and AdamW for the rest.

    For a weight W (m, n) with gradient G, b the ``momentum``, after t steps::

        M <- b M + (1 - b) G
        N = (1 - b) G + b M                            N = M without nesterov
        v <- beta2 v + (1 - beta2) |G|^2
        a = lr sqrt(1 - beta2^t) / (1 - b^t) |N| / (sqrt(v) + eps)
        W <- (1 - min(a, 1) weight_decay) W
        W <- W - min(scale sqrt(max(m, n)) a, 1) NewtonSchulz(N)

    Layouts, batches, parts and groups are as for :class:`conda_dist.Muon`, with
    ``param_groups(model, rule="namo")``.

    State of a matrix: ``step`` () on the CPU, ``momentum_buffer`` (m, n) in the parameter's dtype,
    and ``second_moment`` (1,) in at least float32.

    Args:
        params: tensors, (name, tensor) pairs or group dicts.
        lr: learning rate of both paths; a number or a tensor with one element.
        weight_decay: decoupled weight decay: ``lr * weight_decay`` times the weight on the adamw
            path, ``min(a, 1) * weight_decay`` times it on the other.
        momentum: decay rate of the momentum, in [0, 1).
        nesterov: whether to use Nesterov momentum.
        ns_coefficients: the three coefficients of the Newton-Schulz iteration.
        eps: added to the square root of the second moment.
        ns_steps: number of Newton-Schulz iterations.
        beta2: decay rate of the second moment, in [0, 1); mu2 in the paper.
        scale: factor on the update, beside sqrt(max(m, n)).
        betas: decay rates of the moments on the adamw path.
        adamw_eps: added to the square root of the second moment on the adamw path.
        adamw_scale: multiplies the update of the adamw path, not its decay.
        diagnostics_every: steps between two collections of diagnostics; 0: never. See
            :meth:`diagnostics`.
        process_group: for plain parameters: ranks whose parameters and gradients are equal.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, a parameter cannot be optimized, or no matrix of
            the model would take the namo path.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-8,
        ns_steps: int = 5,
        beta2: float = 0.99,
        scale: float = 0.2,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_scale: float = 1.0,
        diagnostics_every: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = Options(diagnostics_every=diagnostics_every)
        super().__init__(params, locals(), NAMORule(), options, process_group)


class NAMO_D(MatrixOptimizer):  # noqa: N801 (the paper's name)
    """NAMO-D (arXiv 2602.17080) for the matrices of a model, and AdamW for the rest.

    As :class:`NAMO`, with a rate a for each column j of the weight, c the ``clamp``::

        v_j <- beta2 v_j + (1 - beta2) |G_j|^2
        s_j = |N_j| / (sqrt(v_j) + eps), at least c mean(s), at most mean(s) / c
        a_j = lr sqrt(1 - beta2^t) / (1 - b^t) s_j

    ``param_groups(model, rule="namo_d")`` makes groups for it.

    State of a matrix: ``step`` () on the CPU, ``momentum_buffer`` (m, n) in the parameter's dtype,
    and ``second_moment`` (n,) in at least float32.

    Args:
        clamp: c in (0, 1]: the factor of a column stays between c times and 1 / c times the mean
            of all columns. All other arguments, and what is raised, are those of :class:`NAMO`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-8,
        ns_steps: int = 5,
        beta2: float = 0.99,
        scale: float = 0.2,
        clamp: float = 0.75,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_scale: float = 1.0,
        diagnostics_every: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = Options(diagnostics_every=diagnostics_every)
        super().__init__(params, locals(), NAMODRule(), options, process_group)
