"""Conda: project the gradient, average, normalise, project back (arXiv 2509.24218)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conda_dist.numerics import arithmetic, decomposition, low_precision
from conda_dist.numerics.arithmetic import Hyper
from conda_dist.numerics.decomposition import Found
from conda_dist.options import Options
from conda_dist.rules.hyperparameters import hyper_of
from conda_dist.rules.rule import Buffers, RefreshedRule, StateSpec, WeightSlice
from conda_dist.rules.states import basis_dtype, moment_dtype, second_dtype, second_key


class CondaRule(RefreshedRule):
    """Conda's arithmetic on slices: rows for m >= n, columns for m < n.

    States: ``exp_avg`` (m, n), the projected first moment; ``exp_avg_sq`` (m, n), the second moment
    of the projected gradient; ``basis`` (r, r).

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

    def states(self, m: int, n: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """See Rule."""
        r, first = min(m, n), moment_dtype(dtype, self.options)
        states = {
            "exp_avg": StateSpec((m, n), first, cut=True),
            self.second_key: StateSpec((m, n), second_dtype(dtype, self.options), cut=True),
        }
        if self.is_async:
            states["snapshot"] = StateSpec((m, n), first, cut=True, optional=True)
        basis = StateSpec((r, r), basis_dtype(dtype, self.options), identity=True)
        return states | {"basis": basis}

    def exchange_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """See Rule. The matrix products round both to their own dtype anyway."""
        product = self._product_dtype or basis_dtype(dtype, self.options)
        smaller = min(dtype, product, key=lambda dtype: dtype.itemsize)
        return smaller, smaller

    def describe(self, group: Mapping[str, Any]) -> str:
        """See Rule."""
        return f"{self.name} every {group['update_proj_gap']} steps"

    def project(
        self,
        grad: Tensor,
        basis: Tensor,
        right: bool,
        buffers: Buffers | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        """See RefreshedRule; ``factor``: the basis in the dtype of the product, if it was cast."""
        if factor is None:
            factor = basis.to(self._product_dtype or basis.dtype)
        dtype = torch.promote_types(basis.dtype, torch.float32)
        out = None if buffers is None else buffers.take(0, grad, dtype)
        return arithmetic.project(grad, factor, right, dtype, out)

    def average(
        self, momentum: Tensor, projected: Tensor, group: Mapping[str, Any], step: int
    ) -> None:
        """See RefreshedRule."""
        rounding = low_precision.rounding_of(momentum, step - 1, self.options.stochastic_rounding)
        beta1 = float(group["betas"][0])
        arithmetic.average_(momentum, projected, beta1, rounding)

    def refresh(self, momentum: Tensor, right: bool, first: bool) -> Found:
        """See RefreshedRule. The new basis consists of singular vectors of the momentum."""
        method = "svd" if first else self.options.refresh_method
        measure = self.options.diagnostics_every > 0
        return decomposition.decompose(momentum, right, method, measure)

    def update(self, weight: WeightSlice) -> Tensor | None:
        """See Rule."""
        hyper, right, param = hyper_of(weight.group), weight.right, weight.param
        basis = weight.states["basis"]
        # Cast once for both products. It is not kept between steps: that would cost half of the
        # basis's memory again, and basis_dtype="bfloat16" needs no cast at all.
        factor = basis.to(self._product_dtype or basis.dtype)
        y = self._normalise(weight, factor, right, hyper)  # (m', n), or (m, n') if m < n
        alike = param is not None and (
            y.dtype == basis.dtype == factor.dtype == param.dtype
            or arithmetic.widens(factor, param.dtype)
        )
        if param is not None and alike and not isinstance(hyper.lr, Tensor):
            # W <- keep W - step_size keep (Y Q^T), one addmm: (m', n) @ (n, n); Q Y if m < n
            arithmetic.project_back_and_apply_(param, y, factor, right, weight.step, hyper)
            return None
        # (m', n) @ (n, n), or (m, m) @ (m, n') if m < n; exchanged in no wider dtype
        return arithmetic.project_back(y, factor, right, factor.dtype)

    def _normalise(self, weight: WeightSlice, factor: Tensor, right: bool, hyper: Hyper) -> Tensor:
        """Updates the moments and returns proj(M) / (sqrt(v) + eps)."""
        first, second = weight.states["exp_avg"], weight.states[self.second_key]
        projected = weight.grad
        if not weight.averaged:
            basis = weight.states["basis"]
            projected = self.project(weight.grad, basis, right, weight.buffers, factor)
            weight.grad = projected
            if arithmetic.can_fuse(projected, first, second):
                buffers, out = weight.buffers, None
                if buffers is not None:
                    out = buffers.take(1, projected, projected.dtype)
                return arithmetic.average_and_normalise_(projected, first, second, hyper, out)
            moments = {"exp_avg": first, self.second_key: second}
            arithmetic.check_alike(weight.name, {"gradient": projected, **moments})
            self.average(first, projected, weight.group, weight.step)
        rounding = low_precision.rounding_of(second, weight.step, self.options.stochastic_rounding)
        return arithmetic.normalise_(projected, first, second, hyper, rounding)

    def apply(
        self,
        param: Tensor,
        update: Tensor,
        group: Mapping[str, Any],
        step: int,
        shape: tuple[int, int],
        extra: Tensor | None = None,
    ) -> None:
        """See Rule."""
        arithmetic.apply_(param, update, step, hyper_of(group))
