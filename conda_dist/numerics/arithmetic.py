"""The mathematics of a Conda step as functions of tensors: no parallelism, no optimizer state.

Everything works on a slice of a weight along its kept dimension (rows for m >= n, "right";
columns for m < n, "left") exactly as on the whole of it, because the projection commutes with
such slicing; leading dimensions are batches of matrices. Notation: G gradient, M first moment,
Q basis (r, r) with r = min(m, n), and proj(X) = X Q (right) or Q^T X (left). The first moment is
stored projected, where it obeys its own recursion: proj(M) <- b1 proj(M) + (1 - b1) proj(G).
Arithmetic is done in float32, or float64 if the basis is, whatever the moments' and bases' dtype.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from conda_dist.numerics.low_precision import decode, store_
from conda_dist.numerics.precision import exact_product


@dataclass(frozen=True, slots=True)
class Hyper:
    """Hyperparameters of one step; see :class:`conda_dist.Conda` for their meaning."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: float
    correct_bias: bool

    def step_size(self, step: int) -> float | Tensor:
        """Factor on the normalised step; ``step`` counts this one, from 1."""
        factor = self.scale
        if self.correct_bias:
            factor *= math.sqrt(1 - self.beta2**step) / (1 - self.beta1**step)
        return self.lr * factor

    @property
    def keep(self) -> float | Tensor:
        """What decoupled weight decay leaves of a weight."""
        return 1 - self.lr * self.weight_decay


def matrices(tensor: Tensor) -> Tensor:
    """A tensor's last two dimensions, the others as one batch: (..., m, n) as (b, m, n)."""
    return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.flatten(0, -3)


def project(
    x: Tensor,
    basis: Tensor,
    right: bool,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``x Q`` or ``Q^T x``, multiplied in ``dtype`` (None: the basis's).

    In at least float32, or written to ``out``, of x's shape.
    """
    Q = basis.to(dtype or basis.dtype)
    x = x.to(Q.dtype)
    a, b = (x, Q) if right else (Q.mT, x)
    if out is None:
        return (a @ b).to(torch.promote_types(basis.dtype, torch.float32))
    return torch.matmul(a, b, out=out) if out.dtype == Q.dtype else out.copy_(a @ b)


def project_back(y: Tensor, basis: Tensor, right: bool, dtype: torch.dtype | None = None) -> Tensor:
    """``y Q^T`` or ``Q y``: the inverse of :func:`project`."""
    return project(y, basis.mT, right, dtype)


FUSED_DEVICES = frozenset(_get_fused_kernels_supported_devices())
FUSED_DTYPES = frozenset({torch.float32, torch.float64})


def can_fuse(first: Tensor, *others: Tensor) -> bool:
    """Whether torch's fused kernel takes these tensors: of one shape and dtype, in one order.

    The kernel compares none of that, and would read and write beyond the end of the shorter ones.
    """
    dtype, shape, device = first.dtype, first.shape, first.device
    if dtype not in FUSED_DTYPES or device.type not in FUSED_DEVICES or not first.numel():
        return False
    for tensor in others:
        if tensor.dtype is not dtype or tensor.shape != shape or tensor.device != device:
            return False
        if not tensor.is_contiguous():
            return False
    return first.is_contiguous()


def check_alike(name: str, parts: Mapping[str, Tensor]) -> None:
    """Refuses tensors that a kernel would broadcast, or read or write beyond the end of.

    Args:
        name: of the parameter.
        parts: what belongs to it and must be of one shape on one device, by what it is.

    Raises:
        ValueError: two of them differ.
    """
    (what, first), *others = parts.items()
    for key, tensor in others:
        if tensor.shape != first.shape or tensor.device != first.device:
            raise ValueError(
                f"{name}: its {key} has shape {tuple(tensor.shape)} on {tensor.device}, but its "
                f"{what} {tuple(first.shape)} on {first.device}; drop the state "
                "(del optimizer.state[param]) of a parameter that is resized or moved."
            )


def average_and_normalise_(
    projected_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Hyper,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`average_` and :func:`normalise_` in one pass, for tensors that :func:`can_fuse`.

    Args:
        projected_grad: proj(G), (..., m, n) as all of them.
        exp_avg: projected first moment, updated in place.
        exp_avg_sq: second moment, updated in place.
        hyper: hyperparameters of the step.
        out: takes the result; contiguous, and of no memory that the others have.

    Where the square of an element overflows, a CPU makes an update of 0 of it as :func:`normalise_`
    does; torch's kernel for CUDA, which adds as fma(-b2, g^2, g^2), makes NaN.
    """
    result = torch.zeros_like(projected_grad) if out is None else out.zero_()
    # AdamW's step of rate -1 from zero, after so many that no correction of bias is left.
    fused_adamw_([result], [projected_grad], [exp_avg], [exp_avg_sq], math.inf, -1.0, hyper)
    return result


def fused_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: float,
    lr: float | Tensor,
    hyper: Hyper,
) -> None:
    """A step without decay in one kernel, which holds nothing beside.

    Args:
        params: parameters of any shapes, updated in place; on one device, each with its gradient
            and moments of one dtype, float32 or float64, and contiguous (:func:`can_fuse`).
        grads: their gradients.
        exp_avgs: their first moments, updated in place.
        exp_avg_sqs: their second moments, updated in place.
        step: how many they have taken with this one; infinitely many: no bias is corrected.
        lr: the learning rate.
        hyper: the betas, and eps, which is added to the uncorrected root of the second moment:
            torch's adds it to the corrected one, so that eps over the correction is that.
    """
    taken = torch.full((), step, dtype=torch.float32, device=params[0].device)
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [taken] * len(params),
        lr=lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=0.0,
        eps=hyper.eps / math.sqrt(1 - hyper.beta2**step),
        amsgrad=False,
        maximize=False,
    )


def average_(
    exp_avg: Tensor,
    projected_grad: Tensor,
    beta1: float,
    rounding: float | None = None,
) -> None:
    """Updates the projected first moment in place.

    Args:
        exp_avg: the moment.
        projected_grad: proj(G).
        beta1: its decay rate.
        rounding: as of :func:`store_`.
    """
    if exp_avg.dtype == projected_grad.dtype:
        exp_avg.lerp_(projected_grad, 1 - beta1)
    else:  # moments of fewer bits are rounded once, not at every operation
        average = exp_avg.to(projected_grad.dtype).lerp_(projected_grad, 1 - beta1)
        store_(exp_avg, average, rounding)


def normalise_(
    projected_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Hyper,
    rounding: float | None = None,
) -> Tensor:
    """Updates the second moment and returns proj(M) / (sqrt(v) + eps).

    Args:
        projected_grad: proj(G); overwritten with the result.
        exp_avg: projected first moment, already updated.
        exp_avg_sq: second moment, updated in place.
        hyper: hyperparameters of the step.
        rounding: as of :func:`store_`.
    """
    second = decode(exp_avg_sq, projected_grad.dtype)
    second.mul_(hyper.beta2)
    second.addcmul_(projected_grad, projected_grad, value=1 - hyper.beta2)
    if second is not exp_avg_sq:
        store_(exp_avg_sq, second, rounding)
    denominator = torch.sqrt(second, out=projected_grad).add_(hyper.eps)
    return torch.div(exp_avg.to(denominator.dtype), denominator, out=denominator)


def apply_(param: Tensor, update: Tensor, step: int, hyper: Hyper) -> None:
    """``W <- W - step_size * update``, then the decay, in place."""
    step_size = hyper.step_size(step)
    if isinstance(step_size, Tensor):
        param.sub_(update * step_size.to(update.device))
    else:
        param.sub_(update, alpha=step_size)
    if hyper.weight_decay:
        keep = hyper.keep
        param.mul_(keep.to(param.device) if isinstance(keep, Tensor) else keep)


def project_back_and_apply_(
    param: Tensor, y: Tensor, basis: Tensor, right: bool, step: int, hyper: Hyper
) -> None:
    """:func:`project_back` and :func:`apply_` as one product accumulated into the weight.

    For weights and y of the basis's dtype and a learning rate that is a number; saves a tensor
    the size of the weight and two passes over it.
    """
    keep = float(hyper.keep)
    factor = -float(hyper.step_size(step)) * keep
    a, b = (y, basis.mT) if right else (basis, y)
    if param.ndim == 2:
        param.addmm_(a, b, beta=keep, alpha=factor)
    elif param.ndim == 3:
        param.baddbmm_(a, b, beta=keep, alpha=factor)
    else:  # its leading dimensions may be none that can be flattened without a copy
        apply_(param, project_back(y, basis, right), step, hyper)


def rotate_(x: Tensor, rotation: Tensor, right: bool) -> None:
    """Takes projected ``x`` from the basis Q to Q P in place: ``x P`` or ``P^T x``."""
    wide = x.to(rotation.dtype)
    x.copy_(exact_product(wide, rotation) if right else exact_product(rotation.mT, wide))
