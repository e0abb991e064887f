"""Conda, the optimizer that this package is for."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conda_dist.matrix_optimizer import MatrixOptimizer
from conda_dist.options import GROUP_OPTIONS, Options
from conda_dist.parameter_groups import UNSUPPORTED, check_hyperparameters
from conda_dist.rules.conda import CondaRule


class Conda(MatrixOptimizer):
    r"""Column-Normalized Adam (arXiv 2509.24218), on whatever shards there are.

    For a weight W (m, n) with gradient G and r = min(m, n), after t steps::

        M <- b1 M + (1 - b1) G
        every update_proj_gap steps: Q (r, r) <- right singular vectors of M if m >= n, else left
        v <- b2 v + (1 - b2) proj(G)^2                 proj(X) = X Q, or Q^T X if m < n
        W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) scale back(proj(M) / (sqrt(v) + eps))
        W <- W - lr weight_decay W

    Parameters may be plain tensors or DTensors of any layout of Shard and Replicate; plain
    parameters are taken to be whole and, in a distributed job, equal on all ranks with equal
    gradients (DDP). A weight of three or more dimensions is a batch of matrices in its last two,
    and with ``kernels=True`` in its group a convolution kernel, seen as a matrix (out, in * k * k).
    Groups may name their ``algorithm``, "conda" or "adamw"; in one that does not each parameter
    takes the path that :func:`conda_dist.routing.route` says for its name and shape, for which it
    should be given ``model.named_parameters()`` or the groups of :func:`conda_dist.param_groups`.
    Layouts and paths are resolved at the first step. On the adamw path an update is Adam's,
    times ``lr`` and ``adamw_scale``.

    State of a parameter, tensors like the parameter (DTensors on its mesh): ``step`` (0-d, on the
    CPU), ``exp_avg`` (m, n), projected on the conda path, ``exp_avg_sq`` (m, n) and there too
    ``basis`` (r, r) and ``basis_step`` (one number for each matrix of a batch, on the CPU: the
    step its basis was taken at, -1 before the first); with ``refresh_delay`` also ``snapshot``
    (m, n) and ``snapshot_step`` (the first moment that a pending refresh began with, and when; -1
    if none is pending). A weight that its group's ``splits`` cut into blocks of rows (see
    :func:`conda_dist.param_groups`) has counts with one entry more for each part in front, and
    ``basis_0``, ``basis_1``, ... in the place of ``basis``.

    Args:
        params: tensors, (name, tensor) pairs or group dicts.
        lr: learning rate of both paths; a number or a tensor of one element.
        betas: decay rates of the first and the second moment, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, applied after the update.
        scale: factor on the update of the conda path.
        adamw_scale: factor on the update of the adamw path. Neither factor changes the decay, which
            is ``lr * weight_decay`` on both paths.
        update_proj_gap: steps between two decompositions of the momentum.
        correct_bias: whether to divide out the moments' bias towards zero.
        refresh_method: how a basis is taken from the momentum. The first one is always taken by
            "svd", the paper's way. "orthogonal_iteration" takes one step of subspace iteration
            from the basis in use. It costs a fraction of the time, and is enough where
            ``update_proj_gap`` is small, because bases then move little. "eigh64" takes the
            eigenvectors of the momentum's Gram matrix in float64.
        refresh_delay: 0, the paper's timing: a step that is due for a refresh waits for it. N > 0:
            a snapshot of the momentum is decomposed in the background, and all ranks take the new
            bases together N steps later (at most one interval later). The first refresh waits in
            any case. The snapshot takes the memory of a third moment.
        matmul_dtype: precision of the two products of a step; None: the dtype of the bases.
            "bfloat16" is the fastest. "tf32" multiplies in float32, for which CUDA may round the
            operands to TF32; a CPU computes as with "float32". Decompositions and rotations do not
            follow this option.
        basis_dtype: dtype of the bases; None: the dtype of the moments, but at least float32.
            "bfloat16" halves their memory and what is sent of them. They are then orthogonal to 3
            digits, after every refresh anew.
        basis_budget: bytes that a rank may spend on bases of weights that all their ranks compute,
            each with a copy of the basis; None: no limit. Weights beyond the budget go to compute
            groups: few ranks, mostly one, gather the gradient, keep moments and basis, and send
            the update back.
        state_dtype: dtype of the moments; None: the dtype of the parameter, but at least float32.
            Bases are at least float32 in any case, unless ``basis_dtype`` says otherwise.
        second_moment_dtype: dtype of the second moments alone; None: ``state_dtype``. "uint8"
            stores the logarithm of each element in 8 bits, in a state ``exp_avg_sq_codes`` that
            replaces ``exp_avg_sq``. Codes are rounded up or down in proportion, step by step.
        stochastic_rounding: whether bfloat16 moments are rounded like that too, not to nearest, so
            that changes smaller than their last bit add up over steps. Nothing is random: the
            thresholds are the multiples of the golden ratio, the same in every run.
        buffer_bytes: half of the bytes that a step may hold beside state, gradients and
            parameters, in all its buffers together. A step holds more only where a single weight
            needs more: of weights that step without communication twice the largest shard, in
            float32.
        process_group: for plain parameters: ranks with equal gradients, which then share the
            decompositions out among them instead of each doing all, and cannot drift apart.
        fused: of no effect, as ``foreach``; scripts written for AdamW give them.
        foreach: see ``fused``.
        maximize: must be False, as the next three, which AdamW has.
        capturable: see ``maximize``.
        differentiable: see ``maximize``.
        amsgrad: see ``maximize``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one out of its range, a parameter that cannot be optimized, or a model of
            which no matrix would be on the conda path.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        scale: float = 0.25,
        adamw_scale: float = 1.0,
        update_proj_gap: int = 2000,
        correct_bias: bool = True,
        refresh_method: str = "svd",
        refresh_delay: int = 0,
        matmul_dtype: torch.dtype | str | None = None,
        basis_dtype: torch.dtype | str | None = None,
        basis_budget: int | None = 4 * 2**30,
        state_dtype: torch.dtype | str | None = None,
        second_moment_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        buffer_bytes: int = 512 * 2**20,
        process_group: dist.ProcessGroup | None = None,
        fused: bool | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        amsgrad: bool = False,
    ) -> None:
        given = dict(locals())  # all arguments, by name
        for name in UNSUPPORTED:
            if given[name]:
                raise TypeError(f"option {name!r} is not supported by Conda; leave it out.")
        defaults = {name: given[name] for name in GROUP_OPTIONS}
        check_hyperparameters(defaults)
        defaults |= {"algorithm": None, "splits": None}
        options = Options(**{field.name: given[field.name] for field in fields(Options)})
        super().__init__(params, defaults, CondaRule(options), options, process_group)
