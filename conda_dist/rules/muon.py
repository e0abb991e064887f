"""Muon: the momentum of a whole matrix, orthogonalised. Equal to torch.optim.Muon bit for bit."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from conda_dist.rules.orthogonal import OrthogonalRule, newton_schulz

ADJUSTMENTS = ("original", "match_rms_adamw", "spectral_unclamped")


def adjusted(how: str | None, shape: tuple[int, int]) -> float:
    """The factor on the learning rate of a matrix (m, n); ``how``: ``adjust_lr_fn``."""
    m, n = shape
    if how == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    return math.sqrt(m / n if how == "spectral_unclamped" else max(1, m / n))


class MuonRule(OrthogonalRule):
    """Muon's arithmetic on whole matrices. States: ``momentum_buffer`` (m, n)."""

    name, title = "muon", "Muon"
    state_names = frozenset({"momentum_buffer"})
    hyperparameters: ClassVar[tuple[str, ...]] = (*OrthogonalRule.hyperparameters, "adjust_lr_fn")

    def direction(
        self,
        momentum: Tensor,
        grad: Tensor,
        second: Tensor | None,
        group: Mapping[str, Any],
        step: int,
    ) -> tuple[Tensor, Tensor | None]:
        """See OrthogonalRule."""
        coefficients, steps = group["ns_coefficients"], group["ns_steps"]
        return newton_schulz(
            momentum, coefficients, steps, group["eps"], self.iteration_dtype
        ), None

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
        super().check(values, where)
        how = values.get("adjust_lr_fn")
        if how is not None and not (isinstance(how, str) and how in ADJUSTMENTS):
            raise ValueError(
                f"{where}adjust_lr_fn must be one of {', '.join(ADJUSTMENTS)}, or None for the "
                f"first; got {how!r}"
            )
