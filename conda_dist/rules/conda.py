"""Conda: project the gradient, average, normalise, project back (arXiv 2509.24218)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conda_dist.numerics import arithmetic, decomposition, low_precision
from conda_dist.numerics.arithmetic import Hyper
from conda_dist.numerics.decomposition import Outcome
from conda_dist.options import Options
from conda_dist.rules.hyperparameters import hyper_of
from conda_dist.rules.rule import Buffers, Part, RefreshedRule, State
from conda_dist.rules.states import basis_dtype, moment_dtype, second_dtype, second_key


class CondaRule(RefreshedRule):
    """Conda's arithmetic on slices along the dimension that the projection leaves alone.

    States: ``exp_avg``, projected, and ``exp_avg_sq`` (m, n), and ``basis`` (r, r).

    Args:
        options: the optimizer's options.
    """

    name, title = "conda", "Conda"
    state_names = frozenset({"basis", "basis_step", "snapshot", "snapshot_step"})
    hyperparameters = ("scale", "update_proj_gap", "correct_bias")
    factor = "scale"

    def __init__(self, options: Options) -> None:
        self.options = options
        self.second_key = second_key(options)
        self.is_async = options.is_async
        self._product_dtype = options.product_dtype
        self.counts = ("basis_step", *(("snapshot_step",) if self.is_async else ()))

    def states(self, m: int, n: int, dtype: torch.dtype) -> dict[str, State]:
        """See Rule."""
        r, first = min(m, n), moment_dtype(dtype, self.options)
        states = {
            "exp_avg": State((m, n), first, cut=True),
            self.second_key: State((m, n), second_dtype(dtype, self.options), cut=True),
        }
        if self.is_async:
            states["snapshot"] = State((m, n), first, cut=True, optional=True)
        basis = State((r, r), basis_dtype(dtype, self.options), identity=True)
        return states | {"basis": basis}

    def exchange_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """See Rule. Both are rounded to the products' dtype anyway."""
        product = self._product_dtype or basis_dtype(dtype, self.options)
        travel = min(dtype, product, key=lambda dtype: dtype.itemsize)
        return travel, travel

    def describe(self, group: Mapping[str, Any]) -> str:
        """See Rule."""
        return f"{self.name} every {group['update_proj_gap']} steps"

    def project(
        self, grad: Tensor, basis: Tensor, right: bool, buffers: Buffers | None = None
    ) -> Tensor:
        """See RefreshedRule."""
        dtype = torch.promote_types(basis.dtype, torch.float32)
        out = None if buffers is None else buffers.take(0, grad, dtype)
        return arithmetic.project(grad, basis, right, self._product_dtype, out)

    def average(
        self, momentum: Tensor, projected: Tensor, group: Mapping[str, Any], step: int
    ) -> None:
        """See RefreshedRule."""
        rounding = low_precision.rounding_of(momentum, step - 1, self.options.stochastic_rounding)
        beta1 = float(group["betas"][0])
        arithmetic.average_(momentum, projected, beta1, rounding)

    def refresh(self, momentum: Tensor, right: bool, first: bool) -> tuple[Outcome, Tensor | None]:
        """See RefreshedRule. The rotation leads to the momentum's singular vectors."""
        method = "svd" if first else self.options.refresh_method
        return decomposition.decompose(momentum, right, method)

    def update(self, part: Part) -> Tensor | None:
        """See Rule."""
        hyper, right, dtype = hyper_of(part.group), part.right, self._product_dtype
        basis, param = part.states["basis"], part.param
        y = self._normalise(part, basis, right, hyper)
        if param is not None and {y.dtype, basis.dtype, dtype or param.dtype} == {param.dtype}:
            if not isinstance(hyper.lr, Tensor):
                arithmetic.project_back_and_apply_(param, y, basis, right, part.step, hyper)
                return None
            dtype = None
        return arithmetic.project_back(y, basis, right, dtype)

    def _normalise(self, part: Part, basis: Tensor, right: bool, hyper: Hyper) -> Tensor:
        """Updates the moments and returns proj(M) / (sqrt(v) + eps)."""
        first, second = part.states["exp_avg"], part.states[self.second_key]
        projected = part.grad
        if not part.averaged:
            projected = part.grad = self.project(part.grad, basis, right, part.buffers)
            if arithmetic.can_fuse(projected, first, second):
                buffers, out = part.buffers, None
                if buffers is not None:
                    out = buffers.take(1, projected, projected.dtype)
                return arithmetic.average_and_normalise_(projected, first, second, hyper, out)
            moments = {"exp_avg": first, self.second_key: second}
            arithmetic.check_alike(part.name, {"gradient": projected, **moments})
            self.average(first, projected, part.group, part.step)
        rounding = low_precision.rounding_of(second, part.step, self.options.stochastic_rounding)
        return arithmetic.normalise_(projected, first, second, hyper, rounding)

    def apply(
        self,
        param: Tensor,
        update: Tensor,
        group: Mapping[str, Any],
        step: int,
        shape: tuple[int, int],
        beside: Tensor | None = None,
    ) -> None:
        """See Rule."""
        arithmetic.apply_(param, update, step, hyper_of(group))
