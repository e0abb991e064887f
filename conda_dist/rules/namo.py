"""NAMO and NAMO-D (arXiv 2602.17080): the orthogonalised momentum at the rate of an Adam."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from conda_dist.rules.orthogonal import OrthogonalRule


class _AdaptiveRule(OrthogonalRule):
    """What NAMO and NAMO-D share: the extra tensor has the factors on ``lr``.

    The released code differs from the paper, and the rules follow the code: the momentum N is
    Nesterov's, the update is multiplied by 0.2 sqrt(max(m, n)), and no rate is above one. Unlike in
    the code, the factors are computed in at least float32, rates are not rounded to bfloat16, and
    decay multiplies no weight by less than zero (the code has this bound for NAMO-D only; it is
    reached only if ``weight_decay`` is above one).
    """

    state_names = frozenset({"momentum_buffer", "second_moment"})
    hyperparameters: ClassVar[tuple[str, ...]] = (*OrthogonalRule.hyperparameters, "beta2", "scale")
    factor = "scale"

    @abstractmethod
    def factors(
        self, momentum: Tensor, grad: Tensor, second: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        """Updates the second moment; returns the factors (1, n) or (1, 1), not corrected."""

    def direction(
        self,
        momentum: Tensor,
        grad: Tensor,
        second: Tensor | None,
        group: Mapping[str, Any],
        step: int,
    ) -> tuple[Tensor, Tensor | None]:
        """See OrthogonalRule."""
        assert second is not None
        corrected = math.sqrt(1 - group["beta2"] ** step) / (1 - group["momentum"] ** step)
        factors = self.factors(momentum, grad, second, group) * corrected
        # Layouts exchange the factors in float32. Only an iteration in float64 keeps theirs.
        exact = self.iteration_dtype == torch.float64
        return self.orthogonalise(momentum, group), factors if exact else factors.float()

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
        assert extra is not None
        lr = group["lr"]
        rate = extra * (lr.reshape(()) if isinstance(lr, Tensor) else lr)
        if group["weight_decay"]:
            param.mul_((1 - group["weight_decay"] * rate.clamp(max=1)).clamp_(min=0))
        rate = (rate * (group["scale"] * math.sqrt(max(shape)))).clamp_(max=1)
        param.sub_(update * rate)


class NAMORule(_AdaptiveRule):
    """NAMO's arithmetic on whole matrices: one rate for a matrix.

    States: ``momentum_buffer`` (m, n); ``second_moment`` (1,), of the gradient's Frobenius norm.
    """

    name, title = "namo", "NAMO"

    def second_shape(self, m: int, n: int) -> tuple[int, ...]:
        """See OrthogonalRule."""
        return (1,)

    def extra_shape(self, m: int, n: int) -> tuple[int, int]:
        """See Rule."""
        return (1, 1)

    def factors(
        self, momentum: Tensor, grad: Tensor, second: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        """See _AdaptiveRule."""
        norm = torch.linalg.vector_norm
        second.lerp_(norm(grad, dtype=second.dtype).square(), 1 - group["beta2"])
        factors: Tensor = norm(momentum, dtype=second.dtype) / (second.sqrt() + group["eps"])
        return factors.view(1, 1)


class NAMODRule(_AdaptiveRule):
    """NAMO-D's arithmetic on whole matrices: a rate for each column, within bounds of their mean.

    States: ``momentum_buffer`` (m, n); ``second_moment`` (n,), of the norms of the gradient's
    columns.
    """

    name, title = "namo_d", "NAMO_D"
    hyperparameters: ClassVar[tuple[str, ...]] = (*_AdaptiveRule.hyperparameters, "clamp")

    def second_shape(self, m: int, n: int) -> tuple[int, ...]:
        """See OrthogonalRule."""
        return (n,)

    def extra_shape(self, m: int, n: int) -> tuple[int, int]:
        """See Rule."""
        return (1, n)

    def factors(
        self, momentum: Tensor, grad: Tensor, second: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        """See _AdaptiveRule."""
        norm = torch.linalg.vector_norm
        second.lerp_(norm(grad, dim=0, dtype=second.dtype).square(), 1 - group["beta2"])
        factors: Tensor = norm(momentum, dim=0, dtype=second.dtype) / (second.sqrt() + group["eps"])
        mean = factors.mean()
        return factors.clamp(mean * group["clamp"], mean / group["clamp"]).view(1, -1)

    def check(self, values: Mapping[str, Any], where: str) -> None:
        """See Rule."""
        super().check(values, where)
        clamp = values.get("clamp", 1.0)
        if not isinstance(clamp, float | int) or isinstance(clamp, bool):
            raise TypeError(f"{where}clamp must be a number, got {clamp!r}")
        if not 0 < clamp <= 1:
            raise ValueError(f"{where}clamp must be above 0 and at most 1, got {clamp}")
