"""What Muon, NorMuon and NAMO share: the momentum of a whole matrix, orthogonalised."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from conda_dist.numerics.arithmetic import matrices
from conda_dist.options import LARGEST, check_number
from conda_dist.rules.rule import Rule, StateSpec, WeightSlice

LEAST_NORM = 1e-7
"""Lower bound of the norm that a matrix is divided by, where the rule has no option for it."""


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


class OrthogonalRule(Rule):
    """A rule on whole matrices whose update is made of the orthogonalised momentum.

    States: ``momentum_buffer`` (m, n), and what :meth:`second_shape` says.
    """

    whole = True
    hyperparameters: ClassVar[tuple[str, ...]] = (
        *("momentum", "nesterov", "ns_coefficients", "ns_steps"),
        "adamw_eps",
    )
    iteration_dtype: ClassVar[torch.dtype] = torch.bfloat16
    """Dtype of the Newton-Schulz iteration and of the update that is exchanged."""

    def second_shape(self, m: int, n: int) -> tuple[int, ...] | None:
        """Shape of the state ``second_moment`` of a matrix (m, n); None if there is none."""
        return None

    @abstractmethod
    def direction(
        self,
        momentum: Tensor,
        grad: Tensor,
        second: Tensor | None,
        group: Mapping[str, Any],
        step: int,
    ) -> tuple[Tensor, Tensor | None]:
        """The update of one matrix.

        Args:
            momentum: the momentum (m, n), ahead of the state if ``nesterov``; else the state.
            grad: the gradient (m, n).
            second: the second moment, to be updated in place.
            group: see :class:`WeightSlice`.
            step: see :class:`WeightSlice`.

        Returns:
            The update (m, n), and the extra tensor if the rule has one.
        """

    def states(self, m: int, n: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """See Rule."""
        states = {"momentum_buffer": StateSpec((m, n), dtype, cut=True)}
        if (shape := self.second_shape(m, n)) is not None:
            least = torch.promote_types(dtype, torch.float32)
            states["second_moment"] = StateSpec(shape, least)
        return states

    def exchange_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """See Rule. The gradient is exchanged as it is, the update as the iteration leaves it."""
        return dtype, self.iteration_dtype

    def update(self, weight: WeightSlice) -> Tensor:
        """See Rule."""
        group, buffer = weight.group, weight.states["momentum_buffer"]
        grad = weight.grad.to(buffer.dtype)
        buffer.lerp_(grad, 1 - group["momentum"])
        momentum = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        second = weight.states.get("second_moment")
        if momentum.ndim == 2:
            update, weight.extra = self.direction(momentum, grad, second, group, weight.step)
            return update
        update = torch.empty_like(momentum, dtype=self.iteration_dtype)
        outs, count = matrices(update), len(matrices(momentum))
        if second is not None:
            second = second.view(count, *second.shape[momentum.ndim - 2 :])
        extras = None
        if (shape := self.extra_shape(*weight.shape)) is not None:
            weight.extra = grad.new_empty((*grad.shape[:-2], *shape), dtype=torch.float32)
            extras = matrices(weight.extra)
        for i, (matrix, of) in enumerate(zip(matrices(momentum), matrices(grad), strict=True)):
            its_second = None if second is None else second[i]
            found, extra = self.direction(matrix, of, its_second, group, weight.step)
            outs[i].copy_(found)
            if extras is not None and extra is not None:
                extras[i].copy_(extra)
        return update

    def orthogonalise(self, matrix: Tensor, group: Mapping[str, Any]) -> Tensor:
        """The orthogonalised matrix, in :attr:`iteration_dtype`; ``matrix`` stays as it is."""
        x = matrix.to(self.iteration_dtype, copy=True)
        coefficients, steps = group["ns_coefficients"], group["ns_steps"]
        return newton_schulz(x, coefficients, steps, LEAST_NORM, x.dtype)

    def check(self, values: Mapping[str, Any], where: str) -> None:
        """See Rule."""
        check_number(f"{where}momentum", values.get("momentum", 0.0), below=1.0)
        check_number(f"{where}adamw_eps", values.get("adamw_eps", 0.0))
        check_number(f"{where}beta2", values.get("beta2", 0.0), below=1.0)
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
