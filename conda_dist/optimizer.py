"""The Conda optimizer: its arguments and their documentation."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conda_dist.matrix_optimizer import MatrixOptimizer
from conda_dist.options import Options, with_preset
from conda_dist.parameter_groups import UNSUPPORTED
from conda_dist.rules.gradient_bases import conda_rule


class Conda(MatrixOptimizer):
    r"""Column-Normalized Adam (arXiv 2509.24218) for plain and sharded parameters.

    For a weight W (m, n) with gradient G and r = min(m, n), after t steps::

        M <- b1 M + (1 - b1) G
        every update_proj_gap steps: Q (r, r) <- right singular vectors of M if m >= n, else left
        v <- b2 v + (1 - b2) proj(G)^2                 proj(X) = X Q, or Q^T X if m < n
        W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) scale back(proj(M) / (sqrt(v) + eps))
        W <- W - lr weight_decay W                     back(Y) = Y Q^T, or Q Y if m < n

    **Parameters** are plain tensors or DTensors with any placements of Shard and Replicate. In a
    distributed job, a plain parameter and its gradient must be equal on all ranks, as under DDP. A
    weight of three or more dimensions is a batch of matrices, which are its last two dimensions. A
    convolution kernel is one matrix (out, in * k * k) if its group has ``kernels=True``.

    **Paths.** A group's ``algorithm`` is "conda" or "adamw". In a group without one,
    :func:`conda_dist.routing.route` chooses a path for each parameter by its name and shape, so
    pass ``model.named_parameters()`` or the groups of :func:`conda_dist.param_groups`. The adamw
    path takes Adam's update times ``lr * adamw_scale``. Paths and layouts are found at the first
    step, because frameworks replace parameters before it.

    **State** of a parameter, as tensors with the parameter's mesh and placements:

    ===================  ========  ================================================================
    ``step``             ()        steps taken; on the CPU
    ``exp_avg``          (m, n)    first moment, projected on the conda path (see also
                                   ``basis_source``)
    ``exp_avg_sq``       (m, n)    second moment
    ``basis``            (r, r)    conda path only
    ``basis_step``       (batch,)  conda path only; on the CPU: for each matrix the step at which
                                   its basis was taken, -1 before the first one
    ``snapshot``         (m, n)    only with ``refresh_delay``: the first moment that a pending
                                   refresh decomposes
    ``snapshot_step``    (batch,)  only with ``refresh_delay``; on the CPU: for each matrix the
                                   step of its snapshot, -1 if no refresh is pending
    ===================  ========  ================================================================

    If a group's ``splits`` cut a weight into parts (see :func:`conda_dist.param_groups`), it has
    ``basis_0``, ``basis_1``, ... instead of ``basis``, and its counts have one more dimension, the
    parts, in front.

    Args:
        params: tensors, (name, tensor) pairs or group dicts.
        lr: learning rate of both paths; a number or a tensor with one element.
        betas: decay rates of the first and the second moment, each in [0, 1). None: the preset's,
            (0.9, 0.99) in the paper's.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay, applied after the update: both paths subtract
            ``lr * weight_decay`` times the weight.
        scale: multiplies the update of the conda path, not its decay.
        adamw_scale: multiplies the update of the adamw path, not its decay.
        update_proj_gap: steps between two refreshes of a basis. None: the preset's, 2000 in the
            paper's.
        correct_bias: whether to divide the moments by 1 - beta^t, as Adam does.
        nesterov: whether the conda path steps by N = b1 M + (1 - b1) G in place of M, with
            1 - b1^(t+1) in place of 1 - b1^t. This is not in the paper. None: the preset's.
        preset: gives values to those of ``betas``, ``update_proj_gap``, ``nesterov``,
            ``basis_source`` and ``refresh_method`` that are None: "paper", or a dated name of
            ``conda_dist.options.PRESETS``. Only a draft may change. Groups that are loaded from a
            checkpoint have the checkpoint's values.
        basis_source: "momentum", the paper's, or "gradients", where the bases are eigenvectors of
            averages of G^T G and G G^T, as in SOAP (arXiv 2409.11321): proj(X) = X V if m > n,
            U^T X if m < n, and U^T X V if m = n. The averages decay by b2. One rank steps the whole
            of a sharded matrix then: it gets the gradient, keeps the state and sends the update,
            and ``basis_budget`` has no effect. A matrix that all ranks hold is stepped by all of
            them. ``exp_avg`` is M, not projected, and the states ``left_basis`` and ``left_gram``
            (m, m), ``right_basis`` and ``right_gram`` (n, n) take the place of ``basis``.
            ``averaged`` (1,) counts the gradients in the moments. A matrix's first gradient gives
            its bases and is in no moment, so only weight decay moves the matrix in that step. None:
            the preset's.
        refresh_method: how to compute a basis from the momentum; None: the preset's. "svd" is the
            paper's way, and always computes the first basis. "orthogonal_iteration" takes one step
            of subspace iteration from the current basis. It costs a fraction of the SVD's time, and
            is accurate enough if ``update_proj_gap`` is small, because bases then change little.
            "eigh64" computes the eigenvectors of the momentum's Gram matrix in float64. With bases
            from gradients, "svd" means the same as "eigh64".
        refresh_delay: 0, the default and the paper's timing: a step waits for its refresh. N > 0:
            a background thread decomposes a snapshot of the momentum, and all ranks change to the
            new bases N steps later (at most one interval later). The first refresh always waits.
            The snapshot needs as much memory as a third moment.
        matmul_dtype: precision of the matrix products of a step (two; with bases from gradients
            four, or eight for a square weight); None: the dtype of the bases. "bfloat16" is the
            fastest. "tf32" multiplies float32 tensors and allows CUDA to round them to TF32; on a
            CPU it equals "float32". Decompositions and rotations always run in float32 or better.
        basis_dtype: dtype of the bases; None: the dtype of the moments, but at least float32.
            "bfloat16" halves their memory and traffic. Such bases are orthogonal to about 3
            digits; errors do not add up over refreshes.
        basis_budget: bytes that one rank may use for the bases of weights that all ranks of a mesh
            compute, where each rank has a copy of the basis; None: no limit. Weights beyond the
            budget go to compute groups: a few ranks, often one, receive the gradient, keep moments
            and basis, and send the update back.
        state_dtype: dtype of the moments; None: the parameter's dtype, but at least float32.
        second_moment_dtype: dtype of the second moment alone; None: ``state_dtype``. "uint8" stores
            the logarithm of each element in 8 bits, in a state ``exp_avg_sq_codes`` that replaces
            ``exp_avg_sq``. It is rounded as with ``stochastic_rounding``.
        stochastic_rounding: whether to round bfloat16 moments up or down in proportion instead of
            to nearest, so that changes below their last bit add up over the steps. The thresholds
            are multiples of the golden ratio, not random numbers, so runs are reproducible.
        buffer_bytes: half of the bytes that a step may use for all of its buffers together. A step
            uses more only if one weight needs more: a weight that needs no communication uses
            twice the size of its shard in float32.
        diagnostics_every: steps between two collections of diagnostics; 0: never. A step collects
            if its number is a multiple of this: it takes norms, copies one parameter's shard at a
            time, and adds one all-reduce along each mesh dimension. All other steps stay as they
            are. See :meth:`diagnostics`.
        process_group: for plain parameters: ranks whose parameters and gradients are equal. They
            then share the decompositions instead of each computing all of them, and so cannot
            diverge.
        fused: ignored; accepted because scripts written for AdamW pass it.
        foreach: ignored, like ``fused``.
        maximize: must be False; AdamW has it, Conda does not.
        capturable: must be False, like ``maximize``.
        differentiable: must be False, like ``maximize``.
        amsgrad: must be False, like ``maximize``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, a parameter cannot be optimized, or no matrix of
            the model would take the conda path.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        scale: float = 0.25,
        adamw_scale: float = 1.0,
        update_proj_gap: int | None = None,
        correct_bias: bool = True,
        nesterov: bool | None = None,
        preset: str = "paper",
        basis_source: str | None = None,
        refresh_method: str | None = None,
        refresh_delay: int = 0,
        matmul_dtype: torch.dtype | str | None = None,
        basis_dtype: torch.dtype | str | None = None,
        basis_budget: int | None = 4 * 2**30,
        state_dtype: torch.dtype | str | None = None,
        second_moment_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        buffer_bytes: int = 512 * 2**20,
        diagnostics_every: int = 0,
        process_group: dist.ProcessGroup | None = None,
        fused: bool | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        amsgrad: bool = False,
    ) -> None:
        given = with_preset(locals())  # all arguments, by name
        for name in UNSUPPORTED:
            if given[name]:
                raise TypeError(f"option {name!r} is not supported by Conda; leave it out.")
        options = Options(**{field.name: given[field.name] for field in fields(Options)})
        super().__init__(params, given, conda_rule(options), options, process_group)
