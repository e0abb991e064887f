"""Conda: project the gradient, average, normalise, project back (arXiv 2509.24218)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor

from conda_dist.numerics import arithmetic, decomposition, low_precision
from conda_dist.numerics.arithmetic import Hyper, matrices
from conda_dist.numerics.decomposition import Found
from conda_dist.options import Options
from conda_dist.rules.hyperparameters import hyper_of
from conda_dist.rules.rule import RefreshedRule, Rule, StateSpec, WeightSlice
from conda_dist.rules.states import basis_dtype, moment_dtype, second_dtype, second_key

CACHE_BYTES = 2**18
"""Bytes of projected gradients and results that are computed together on a CPU."""


class CondaBase(Rule):
    """What Conda's rules share, wherever their bases come from.

    Args:
        options: the optimizer's options.
    """

    name, title = "conda", "Conda"
    hyperparameters = ("scale", "update_proj_gap", "correct_bias", "nesterov")
    added: ClassVar[frozenset[str]] = frozenset({"nesterov"})
    factor = "scale"

    def __init__(self, options: Options) -> None:
        self.options = options
        self.second_key = second_key(options)

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """See Rule."""
        own = {"betas": group["betas"], **super().settings(group)}
        names = ("refresh_method", "refresh_delay", "basis_source", "preset")
        return own | {name: getattr(self.options, name) for name in names}

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
        arithmetic.apply_(param, update, step, self.hyper_to_apply(group))

    def hyper_to_apply(self, group: Mapping[str, Any]) -> Hyper:
        """The hyperparameters with which :meth:`apply` subtracts an update."""
        return hyper_of(group)


class CondaRule(CondaBase, RefreshedRule):
    """Conda's arithmetic on slices: rows for m >= n, columns for m < n.

    States: ``exp_avg`` (m, n), the projected first moment; ``exp_avg_sq`` (m, n), the second moment
    of the projected gradient; ``basis`` (r, r).

    Args:
        options: the optimizer's options.
    """

    state_names = frozenset({"basis", "basis_step", "snapshot", "snapshot_step"})

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.is_async = options.is_async
        self._product_dtype = options.product_dtype
        self._room = options.task_bytes // 4
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

    def bases(self, m: int, n: int) -> tuple[str, ...]:
        """See Rule."""
        return ("basis",)

    def prepare(self, weight: WeightSlice) -> Tensor:
        """See RefreshedRule. Projects the gradient, and averages it in the momentum."""
        basis = weight.states["basis"]
        factor = basis.to(self._product_dtype or basis.dtype)
        dtype = torch.promote_types(basis.dtype, torch.float32)
        projected = arithmetic.project(weight.grad, factor, weight.right, dtype)
        self._average(weight, weight.states["exp_avg"], projected)
        return projected

    def sources(self, states: Mapping[str, Tensor], place: int) -> tuple[Tensor, ...]:
        """See RefreshedRule: the projected momentum."""
        return (matrices(states["exp_avg"])[place],)

    def refresh(self, sources: Sequence[Sequence[Tensor]], right: bool, first: bool) -> list[Found]:
        """See RefreshedRule. The new basis consists of singular vectors of the momentum."""
        momenta, measure = [momentum for (momentum,) in sources], self.options.diagnostics_every > 0
        return decomposition.decompose(momenta, right, self._method(first), measure)

    def refreshed_together(self, source: Tensor, first: bool) -> int:
        """See RefreshedRule. A batch takes no more than a task's memory.

        With the default ``buffer_bytes`` that is 20 square matrices in float32 for r = 512, 5 for
        1024, and 1 from 2048 on.
        """
        if not decomposition.is_batched(self._method(first), source.device):
            return 1
        return max(1, self.options.task_bytes // decomposition.batched_bytes(source))

    def _method(self, first: bool) -> str:
        return "svd" if first else self.options.refresh_method

    def update(self, weight: WeightSlice) -> Tensor | None:
        """See Rule."""
        return next(self._update([weight]))

    def update_many(
        self, weights: Iterable[WeightSlice]
    ) -> Iterator[tuple[WeightSlice, Tensor | None]]:
        """See Rule. Neighbours that are alike share the kernel of their moments.

        If a product fails, the moments of all slices that shared its kernel have changed.
        """
        chunk: list[WeightSlice] = []
        kind, most = None, 0
        for weight in weights:
            grad, states = weight.grad, weight.states
            dtypes = states["basis"].dtype, states["exp_avg"].dtype
            its_kind = id(weight.group), weight.shape, grad.shape, grad.device, *dtypes
            if chunk and (len(chunk) >= most or its_kind != kind):
                yield from zip(chunk, self._update(chunk), strict=True)
                chunk = []
            if its_kind != kind:
                kind, most = its_kind, self._most(weight)
            chunk.append(weight)
            del weight, grad, states  # so that the gradient can be freed
        if chunk:
            yield from zip(chunk, self._update(chunk), strict=True)

    def _most(self, weight: WeightSlice) -> int:
        """How many slices like this one are computed together.

        Their projected gradients and results take a part of a task's memory at most; on a CPU, what
        its caches hold.
        """
        grad, basis = weight.grad, weight.states["basis"]
        needed = 2 * grad.numel() * max(4, basis.itemsize)
        if self._product_dtype not in (None, basis.dtype):
            needed += basis.numel() * self._product_dtype.itemsize
        room = min(self._room, CACHE_BYTES) if grad.device.type == "cpu" else self._room
        return room // max(1, needed)

    def _update(self, weights: list[WeightSlice]) -> Iterator[Tensor | None]:
        """The updates of slices of one kind; each is projected back when it is taken."""
        hyper, right, buffers = hyper_of(weights[0].group), weights[0].right, weights[0].buffers
        count, shape, device = len(weights), weights[0].grad.shape, weights[0].grad.device
        dtype = torch.promote_types(weights[0].states["basis"].dtype, torch.float32)
        outs: list[Any] = [None] * count
        results: list[Tensor] = []
        together = None  # what holds the results of all slices
        if buffers is not None:
            memory = buffers.take((2 * count, *shape), dtype, device)
            together = memory[count:]
            outs, results = list(memory[:count].unbind()), list(together.unbind())
        factors, projected, firsts, seconds = [], [], [], []
        for weight, out in zip(weights, outs, strict=True):
            basis = weight.states["basis"]
            # Cast once for both products. It is not kept between steps: that would cost half of the
            # basis's memory again, and basis_dtype="bfloat16" needs no cast at all.
            factors.append(basis.to(self._product_dtype or basis.dtype))
            if not weight.averaged:
                weight.grad = arithmetic.project(weight.grad, factors[-1], right, dtype, out)
            projected.append(weight.grad)
            firsts.append(weight.states["exp_avg"])
            seconds.append(weight.states[self.second_key])
        # Each y is (m', n), or (m, n') if m < n.
        # With a small b1 the shared kernel would round the moment of Nesterov's momentum too much.
        apart = weights[0].averaged or (hyper.nesterov and hyper.beta1 < 0.5)
        if apart or not all(map(arithmetic.can_fuse, projected, firsts, seconds)):
            for weight, first, second in zip(weights, firsts, seconds, strict=True):
                parts = {"gradient": weight.grad, "exp_avg": first, self.second_key: second}
                arithmetic.check_alike(weight.name, parts)
            ys = list(map(self._normalise, weights, firsts, seconds, repeat(hyper)))
            together = None
        else:
            ys = arithmetic.average_and_normalise_(projected, firsts, seconds, hyper, results)
        return map(self._project_back, weights, ys, factors, repeat(right), repeat(hyper))

    def _normalise(
        self, weight: WeightSlice, first: Tensor, second: Tensor, hyper: Hyper
    ) -> Tensor:
        """Updates the moments of a projected slice and returns proj(M) / (sqrt(v) + eps)."""
        if not weight.averaged:
            self._average(weight, first, weight.grad)
        rounding = low_precision.rounding_of(second, weight.step, self.options.stochastic_rounding)
        return arithmetic.normalise_(weight.grad, first, second, hyper, rounding)

    def _average(self, weight: WeightSlice, momentum: Tensor, projected: Tensor) -> None:
        """Averages the projected gradient in the momentum, in place."""
        stochastic = self.options.stochastic_rounding
        rounding = low_precision.rounding_of(momentum, weight.step - 1, stochastic)
        arithmetic.average_(momentum, projected, float(weight.group["betas"][0]), rounding)

    def _project_back(
        self, weight: WeightSlice, y: Tensor, factor: Tensor, right: bool, hyper: Hyper
    ) -> Tensor | None:
        """Applies the normalised update of a slice, or returns it for those who store the slice."""
        param, basis = weight.param, weight.states["basis"]
        alike = param is not None and y.dtype == basis.dtype == factor.dtype == param.dtype
        if param is not None and alike and not isinstance(hyper.lr, Tensor):
            # W <- keep W - step_size keep (Y Q^T), one addmm: (m', n) @ (n, n); Q Y if m < n
            arithmetic.project_back_and_apply_(param, y, factor, right, weight.step, hyper)
            return None
        # (m', n) @ (n, n), or (m, m) @ (m, n') if m < n; exchanged in no wider dtype
        return arithmetic.project_back(y, factor, right, factor.dtype)
