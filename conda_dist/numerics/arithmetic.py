"""The arithmetic of a Conda step, as functions of tensors.

Notation, for one weight W (m, n): G is the gradient, M the first moment, Q the basis (r, r) with
r = min(m, n). The projection is proj(X) = X Q for m >= n ("right") and Q^T X for m < n ("left").

Every function works on a slice of the weight in the same way as on the whole weight: on rows
(m', n) for m >= n, on columns (m, n') for m < n. The projection commutes with such slicing. Leading
dimensions are batches of matrices. The first moment is stored projected, because it then follows a
recursion of its own: proj(M) <- b1 proj(M) + (1 - b1) proj(G). Elementwise operations are computed
in float32, or in float64 if the basis is float64, whatever the dtypes of moments and bases are.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from conda_dist.numerics.low_precision import decode, store_
from conda_dist.numerics.precision import exact_product


@dataclass(frozen=True, slots=True)
class Hyper:
    """Hyperparameters of one step; see :class:`conda_dist.Conda` for what they mean."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: float
    correct_bias: bool
    nesterov: bool = False

    def step_size(self, step: int) -> float | Tensor:
        """Factor on the normalised update.

        Args:
            step: number of steps taken, this one included, so from 1.
        """
        factor = self.scale
        if self.correct_bias:
            # The weights of all gradients in N = b1 M + (1 - b1) G add up to 1 - b1^(t + 1).
            averaged = step + 1 if self.nesterov else step
            factor *= math.sqrt(1 - self.beta2**step) / (1 - self.beta1**averaged)
        return self.lr * factor

    @property
    def keep(self) -> float | Tensor:
        """The factor with which decoupled weight decay multiplies a weight."""
        return 1 - self.lr * self.weight_decay


def matrices(tensor: Tensor) -> Tensor:
    """A view of a tensor (..., m, n) as a batch of matrices (b, m, n)."""
    return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.flatten(0, -3)


def project(
    x: Tensor,
    basis: Tensor,
    right: bool,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Projects a tensor: ``x Q`` or ``Q^T x``.

    Args:
        x: the tensor, (..., m', n) if ``right``, else (..., m, n').
        basis: Q, (..., r, r), in the dtype of the product, to which x is rounded.
        right: whether Q is multiplied from the right (m >= n).
        dtype: dtype of the result; None for at least float32.
        out: takes the result, of x's shape, if given.

    Returns:
        The projected tensor, of x's shape.
    """
    x = x.to(basis.dtype)
    a, b = (x, basis) if right else (basis.mT, x)
    if out is not None:
        dtype = out.dtype
    elif dtype is None:
        dtype = torch.promote_types(basis.dtype, torch.float32)
    if dtype == basis.dtype:
        return torch.matmul(a, b, out=out)
    if widens(a, dtype):
        multiply = torch.mm if a.ndim == 2 else torch.bmm
        return multiply(a, b, out_dtype=dtype, out=out)
    return (a @ b).to(dtype) if out is None else out.copy_(a @ b)


def widens(a: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch can write products of a's dtype in ``dtype`` at once: bfloat16 in float32.

    Then the sums, which kernels keep in float32 anyway, are not rounded, and no second kernel has
    to read and widen them. torch has this on CUDA for up to three dimensions, but not on CPUs or
    with its TunableOp.
    """
    if (
        a.ndim > 3
        or (a.dtype, dtype) != (torch.bfloat16, torch.float32)
        or torch.cuda.tunable.is_enabled()
    ):
        return False
    return _can_widen(a.device)


@functools.cache
def _can_widen(device: torch.device) -> bool:
    """Tries such a product on a device."""
    ones = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(ones, ones, out_dtype=torch.float32)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


def project_back(y: Tensor, basis: Tensor, right: bool, dtype: torch.dtype | None = None) -> Tensor:
    """``y Q^T`` or ``Q y``: the inverse of :func:`project`, with the same arguments."""
    return project(y, basis.mT, right, dtype)


FUSED_DEVICES = frozenset(_get_fused_kernels_supported_devices())
FUSED_DTYPES = frozenset({torch.float32, torch.float64})


def can_fuse(first: Tensor, *others: Tensor) -> bool:
    """Whether torch's fused AdamW kernel can take these tensors.

    They must be contiguous, and of one shape, dtype and device. The kernel does not check this, and
    would read and write beyond the end of shorter tensors.
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
    """Checks that tensors of a parameter have one shape and one device.

    Otherwise kernels would broadcast them, or read and write beyond their ends.

    Args:
        name: fully qualified name of the parameter.
        parts: the tensors, by what to call them in an error.

    Raises:
        ValueError: two of them differ.
    """
    (what, first), *others = parts.items()
    for key, tensor in others:
        if tensor.shape != first.shape or tensor.device != first.device:
            raise ValueError(
                f"{name}: its {key} has shape {tuple(tensor.shape)} on {tensor.device}, but its "
                f"{what} has shape {tuple(first.shape)} on {first.device}; after resizing or "
                "moving a parameter, drop its state (del optimizer.state[param])."
            )


def average_and_normalise_(
    projected_grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    hyper: Hyper,
    outs: list[Tensor],
) -> list[Tensor]:
    """:func:`average_` and :func:`normalise_` in one kernel, for tensors that :func:`can_fuse`.

    The kernel is shared by several slices, because a call costs the host more than the arithmetic
    of a small slice.

    With ``hyper.nesterov``, N = b1 proj(M) + (1 - b1) proj(G) takes the place of proj(M). The
    kernel computes N, and proj(M) is computed from it, which multiplies rounding errors by 1 / b1.
    So b1 must not be small.

    If the square of an element overflows, its update is 0 on a CPU, as in :func:`normalise_`.
    torch's CUDA kernel gives NaN, because it computes fma(-b2, g^2, g^2).

    Args:
        projected_grads: for each slice proj(G), of its shape, as all other tensors of it; all on
            one device and of one dtype.
        exp_avgs: projected first moments, updated in place.
        exp_avg_sqs: second moments, updated in place.
        hyper: hyperparameters of the step.
        outs: for each slice what takes the result: contiguous, with memory of its own; or [].

    Returns:
        proj(M) / (sqrt(v) + eps) of each slice, with N in place of proj(M) if ``hyper.nesterov``.
    """
    results = outs or list(map(torch.empty_like, projected_grads))
    torch._foreach_zero_(results)
    beta1 = hyper.beta1
    # N = b1^2 M' + (1 - b1^2) G, with M' the moment before this step.
    given = replace(hyper, beta1=beta1**2) if hyper.nesterov else hyper
    # This is AdamW's step from 0 with lr -1, after infinitely many steps (no bias correction).
    fused_adamw_(results, projected_grads, exp_avgs, exp_avg_sqs, math.inf, -1.0, given)
    if hyper.nesterov:  # the kernel has left N: M = N / b1 - G (1 - b1) / b1
        torch._foreach_lerp_(exp_avgs, projected_grads, 1 - 1 / beta1)
    return results


@functools.cache
def _infinity(device: torch.device) -> Tensor:
    """A number of steps after which nothing is left of the bias; kernels only read it."""
    return torch.full((), math.inf, dtype=torch.float32, device=device)


def fused_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: float,
    lr: float | Tensor,
    hyper: Hyper,
) -> None:
    """An AdamW step without weight decay, in one kernel that needs no temporary memory.

    ``hyper.eps`` is added to the square root of the second moment before the bias correction.
    torch's kernel adds its eps after the correction, so it gets eps divided by the correction.

    Args:
        params: parameters of any shapes, on one device, updated in place. Each has the same dtype
            (float32 or float64) as its gradient and moments, and all are contiguous
            (:func:`can_fuse`).
        grads: the gradients.
        exp_avgs: the first moments, updated in place.
        exp_avg_sqs: the second moments, updated in place.
        step: number of steps taken, this one included; infinity for no bias correction.
        lr: the learning rate.
        hyper: betas and eps.
    """
    device = params[0].device
    taken = (
        _infinity(device)
        if step == math.inf
        else torch.full((), step, dtype=torch.float32, device=device)
    )
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [taken] * len(params),
        lr=lr.float() if isinstance(lr, Tensor) else lr,  # CUDA's kernel takes no other dtype
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
    """Updates the projected first moment in place: proj(M) <- b1 proj(M) + (1 - b1) proj(G).

    Args:
        exp_avg: the projected first moment.
        projected_grad: proj(G), of the same shape.
        beta1: b1.
        rounding: see :func:`conda_dist.numerics.low_precision.store_`.
    """
    if exp_avg.dtype == projected_grad.dtype:
        exp_avg.lerp_(projected_grad, 1 - beta1)
    else:  # compute in the gradient's dtype, and round a moment of fewer bits once
        average = exp_avg.to(projected_grad.dtype).lerp_(projected_grad, 1 - beta1)
        store_(exp_avg, average, rounding)


def normalise_(
    projected_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Hyper,
    rounding: float | None = None,
) -> Tensor:
    """Updates the second moment v in place, and returns proj(M) / (sqrt(v) + eps).

    With ``hyper.nesterov`` N = b1 proj(M) + (1 - b1) proj(G) takes the place of proj(M).

    Args:
        projected_grad: proj(G); overwritten with the result.
        exp_avg: projected first moment, already updated.
        exp_avg_sq: second moment: v <- b2 v + (1 - b2) proj(G)^2.
        hyper: hyperparameters of the step.
        rounding: see :func:`conda_dist.numerics.low_precision.store_`.
    """
    first = exp_avg.to(projected_grad.dtype)
    if hyper.nesterov:
        first = first.lerp(projected_grad, 1 - hyper.beta1)
    second = decode(exp_avg_sq, projected_grad.dtype)
    second.mul_(hyper.beta2)
    second.addcmul_(projected_grad, projected_grad, value=1 - hyper.beta2)
    if second is not exp_avg_sq:
        store_(exp_avg_sq, second, rounding)
    denominator = torch.sqrt(second, out=projected_grad).add_(hyper.eps)
    return torch.div(first, denominator, out=denominator)


def average_gram_(gram: Tensor, x: Tensor, beta: float, dtype: torch.dtype) -> None:
    """Updates an average of Gram matrices in place: S <- beta S + (1 - beta) X^T X.

    Args:
        gram: S, (..., r, r), in at least float32.
        x: X, (..., k, r).
        beta: decay rate of the average.
        dtype: dtype to which X is rounded for the product. The product is never rounded to fewer
            bits than S has: that would lose the small eigenvalues.

    A product that is not finite is left out: S would never be finite again.
    """
    x = x.to(dtype)
    if not widens(x, gram.dtype):
        x = x.to(gram.dtype)
    product = project(x.mT, x, right=True, dtype=gram.dtype)
    finite = product.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    gram.lerp_(torch.where(finite, product, gram), 1 - beta)


def apply_(param: Tensor, update: Tensor, step: int, hyper: Hyper) -> None:
    """``W <- (W - step_size * update) * keep``: the update, then weight decay, in place.

    Args:
        param: the weight or any elements of it.
        update: the update of the same elements.
        step: number of steps taken, this one included.
        hyper: hyperparameters of the step.
    """
    step_size = hyper.step_size(step)
    if isinstance(step_size, Tensor):
        # A factor without dimensions would not widen the dtype of the update.
        wide = update.to(torch.promote_types(update.dtype, param.dtype))
        param.sub_(wide * step_size.to(param.device))
    else:
        param.sub_(update, alpha=step_size)
    if hyper.weight_decay:
        keep = hyper.keep
        param.mul_(keep.to(param.device) if isinstance(keep, Tensor) else keep)


def project_back_and_apply_(
    param: Tensor, y: Tensor, basis: Tensor, right: bool, step: int, hyper: Hyper
) -> None:
    """:func:`project_back` and :func:`apply_` as one product that is added to the weight.

    It saves a tensor of the weight's size and two passes over it.

    Args:
        param: a slice of the weight, updated in place; of the same dtype as y and the basis.
        y: the update in projected coordinates, of the slice's shape.
        basis: Q, (..., r, r).
        right: whether Q is multiplied from the right (m >= n).
        step: number of steps taken, this one included.
        hyper: hyperparameters of the step; the learning rate must be a number.
    """
    keep = float(hyper.keep)
    factor = -float(hyper.step_size(step)) * keep
    a, b = (y, basis.mT) if right else (basis, y)  # (m', n) @ (n, n), or (m, m) @ (m, n')
    if param.ndim == 2:
        param.addmm_(a, b, beta=keep, alpha=factor)
    elif param.ndim == 3:
        param.baddbmm_(a, b, beta=keep, alpha=factor)
    else:  # leading dimensions cannot always be flattened without a copy
        apply_(param, project_back(y, basis, right), step, hyper)


def rotate_(x: Tensor, rotation: Tensor, right: bool) -> None:
    """Rotates projected ``x`` from the basis Q to the basis Q P, in place: ``x P`` or ``P^T x``.

    Args:
        x: the projected tensor, (m', n) if ``right``, else (m, n').
        rotation: P, (r, r).
        right: whether the basis is multiplied from the right (m >= n).
    """
    wide = x.to(rotation.dtype)
    x.copy_(exact_product(wide, rotation) if right else exact_product(rotation.mT, wide))
