"""Muon: the momentum of a whole matrix, orthogonalised. Equal to torch.optim.Muon bit for bit."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from conda_dist.numerics.arithmetic import matrices
from conda_dist.options import LARGEST, check_number
from conda_dist.rules.rule import Rule, StateSpec, WeightSlice

ADJUSTMENTS = ("original", "match_rms_adamw", "spectral_unclamped")


def newton_schulz(
    matrix: Tensor,
    coefficients: Sequence[float],
    steps: int,
    eps: float,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Orthogonalises a matrix (m, n) by Newton-Schulz iterations, in ``dtype``.

    The singular values of the result are near one. If the matrix has that dtype, it is divided by
    its norm in place, as in torch.

    Args:
        matrix: the matrix.
        coefficients: a, b and c of X <- a X + (b A + c A^2) X with A = X X^T.
        steps: number of iterations.
        eps: lower bound of the norm that the matrix is divided by.
        dtype: dtype of the computation and of the result.
    """
    a, b, c = coefficients
    x = matrix.to(dtype)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, gram, x, beta=a)
    return x.T if tall else x


def adjusted(how: str | None, shape: tuple[int, int]) -> float:
    """The factor on the learning rate of a matrix (m, n); ``how``: ``adjust_lr_fn``."""
    m, n = shape
    if how == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    return math.sqrt(m / n if how == "spectral_unclamped" else max(1, m / n))


class MuonRule(Rule):
    """Muon's arithmetic on whole matrices. StateSpec: ``momentum_buffer`` (m, n)."""

    name, title = "muon", "Muon"
    whole = True
    state_names = frozenset({"momentum_buffer"})
    hyperparameters = (
        *("momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn"),
        "adamw_eps",
    )

    def states(self, m: int, n: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """See Rule."""
        return {"momentum_buffer": StateSpec((m, n), dtype, cut=True)}

    def exchange_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """See Rule. The gradient is exchanged as it is; the update is bfloat16 already."""
        return dtype, torch.bfloat16

    def update(self, weight: WeightSlice) -> Tensor:
        """See Rule."""
        group, buffer = weight.group, weight.states["momentum_buffer"]
        grad = weight.grad.to(buffer.dtype)
        buffer.lerp_(grad, 1 - group["momentum"])
        momentum = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        iteration = group["ns_coefficients"], group["ns_steps"], group["eps"]
        if momentum.ndim == 2:
            return newton_schulz(momentum, *iteration)
        update = torch.empty_like(momentum, dtype=torch.bfloat16)
        for matrix, out in zip(matrices(momentum), matrices(update), strict=True):
            out.copy_(newton_schulz(matrix, *iteration))
        return update

    def apply(
        self,
        param: Tensor,
        update: Tensor,
        group: Mapping[str, Any],
        step: int,
        shape: tuple[int, int],
        extra: Tensor | None = None,
    ) -> None:
        """See Rule. Weight decay is applied before the update."""
        lr = group["lr"]
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
        rate, keep = lr * adjusted(group["adjust_lr_fn"], shape), 1 - lr * group["weight_decay"]
        on_device = isinstance(rate, Tensor) and rate.device.type != "cpu"
        if group["weight_decay"]:
            param.mul_(keep.to(param.device) if on_device else keep)
        if on_device:
            # As an alpha, the rate would be read on the host, which would wait for the device.
            param.sub_(update.to(param.dtype) * rate.to(param.device))
        else:
            param.add_(update, alpha=-float(rate))

    def check(self, values: Mapping[str, Any], where: str) -> None:
        """See Rule."""
        check_number(f"{where}momentum", values.get("momentum", 0.0), below=1.0)
        check_number(f"{where}adamw_eps", values.get("adamw_eps", 0.0))
        if not isinstance(nesterov := values.get("nesterov", True), bool):
            raise TypeError(f"{where}nesterov must be a bool, got {nesterov!r}")
        coefficients = values.get("ns_coefficients", (1, 1, 1))
        if not isinstance(coefficients, tuple | list) or len(coefficients) != 3:
            raise TypeError(f"{where}ns_coefficients must be three numbers, got {coefficients!r}")
        for i, number in enumerate(coefficients):
            check_number(f"{where}ns_coefficients[{i}]", number, least=-LARGEST)
        steps = values.get("ns_steps", 1)
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(f"{where}ns_steps must be an int, got {steps!r}")
        if not 0 <= steps < 100:
            raise ValueError(f"{where}ns_steps must be at least 0 and below 100, got {steps}")
        how = values.get("adjust_lr_fn")
        if how is not None and not (isinstance(how, str) and how in ADJUSTMENTS):
            raise ValueError(
                f"{where}adjust_lr_fn must be one of {', '.join(ADJUSTMENTS)}, or None for the "
                f"first; got {how!r}"
            )
