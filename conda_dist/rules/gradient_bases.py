"""Conda with bases from gradients in place of the momentum, which is not in the paper."""

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from conda_dist.numerics import arithmetic, decomposition, low_precision
from conda_dist.numerics.arithmetic import matrices
from conda_dist.options import Options
from conda_dist.rules.hyperparameters import hyper_of
from conda_dist.rules.rule import Rule, StateSpec, WeightSlice
from conda_dist.rules.states import basis_dtype, moment_dtype, second_dtype, second_key

LEFT, RIGHT = "left", "right"


class GradientBasesRule(Rule):
    """Conda's arithmetic on whole matrices, in the coordinates of SOAP (arXiv 2409.11321).

    For G (m, n), proj(X) = X V if m > n, U^T X if m < n, and U^T X V if m = n. U has the
    eigenvectors of an average of G G^T, and V those of G^T G.

    States: ``exp_avg`` (m, n), the first moment, in the weight's own coordinates; ``exp_avg_sq``
    (m, n), the second moment of proj(G); and for each side that has a basis ``left_gram`` and
    ``left_basis`` (m, m), ``right_gram`` and ``right_basis`` (n, n). A basis is zero until there is
    a gradient that is not.

    Args:
        options: the optimizer's options.
    """

    name, title = "conda", "Conda"
    whole = True
    state_names = frozenset({"left_gram", "left_basis", "right_gram", "right_basis"})
    hyperparameters = ("scale", "update_proj_gap", "correct_bias", "nesterov")
    added: ClassVar[frozenset[str]] = frozenset({"nesterov"})
    factor = "scale"

    def __init__(self, options: Options) -> None:
        self.options = options
        self.second_key = second_key(options)
        self._begun: dict[str, int] = {}  # by name, the last step known to have all bases

    def states(self, m: int, n: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """See Rule."""
        basis = basis_dtype(dtype, self.options)
        states = {
            "exp_avg": StateSpec((m, n), moment_dtype(dtype, self.options), cut=True),
            self.second_key: StateSpec((m, n), second_dtype(dtype, self.options), cut=True),
        }
        for side in _sides(m, n):
            size = m if side == LEFT else n
            states[f"{side}_gram"] = StateSpec(
                (size, size), torch.promote_types(basis, torch.float32)
            )
            states[f"{side}_basis"] = StateSpec((size, size), basis)
        return states

    def exchange_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """See Rule. The gradient is averaged as it is, so it is not rounded on its way."""
        product = self.options.product_dtype or basis_dtype(dtype, self.options)
        return dtype, min(dtype, product, key=lambda dtype: dtype.itemsize)

    def settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """See Rule."""
        own = {"betas": group["betas"], **super().settings(group)}
        names = ("basis_source", "refresh_method", "preset")
        return own | {name: getattr(self.options, name) for name in names}

    def describe(self, group: Mapping[str, Any]) -> str:
        """See Rule."""
        return f"{self.name} from gradients every {group['update_proj_gap']} steps"

    def update(self, weight: WeightSlice) -> Tensor:
        """See Rule. The first gradient that is not zero gives the bases, and no update."""
        hyper, states, step = hyper_of(weight.group), weight.states, weight.step
        first, second = states["exp_avg"], states[self.second_key]
        arithmetic.check_alike(weight.name, {"gradient": weight.grad, "exp_avg": first})
        sides = _sides(*weight.shape)
        basis_dtype = states[f"{sides[0]}_basis"].dtype
        dtype = torch.promote_types(basis_dtype, torch.float32)
        product = self.options.product_dtype or basis_dtype
        grad = weight.grad.to(dtype)  # (..., m, n)
        stochastic = self.options.stochastic_rounding
        rounding = low_precision.rounding_of(first, step - 1, stochastic)
        arithmetic.average_(first, grad, hyper.beta1, rounding)
        for side in sides:
            x = grad.mT if side == LEFT else grad
            arithmetic.average_gram_(states[f"{side}_gram"], x, hyper.beta2, product)
        begun = self._refresh(weight, sides)
        bases = [(states[f"{side}_basis"].to(product), side == RIGHT) for side in sides]
        momentum = first
        for basis, right in bases:
            grad = arithmetic.project(grad, basis, right, dtype)
            momentum = arithmetic.project(momentum, basis, right, dtype)
        for i in begun:
            # In bases of its own, it is diagonal up to rounding errors, whose ratios are large.
            for x in (grad, momentum):
                matrices(x)[i].zero_()
        rounding = low_precision.rounding_of(second, step, stochastic)
        update = arithmetic.normalise_(grad, momentum, second, hyper, rounding)
        for basis, right in bases:
            update = arithmetic.project_back(update, basis, right, dtype)
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
        """See Rule."""
        arithmetic.apply_(param, update, step, hyper_of(group))

    def _refresh(self, weight: WeightSlice, sides: tuple[str, ...]) -> list[int]:
        """Takes new bases if they are due, or if a matrix has none yet.

        Returns:
            The matrices of the batch that took their first bases.
        """
        due = (weight.step - 1) % weight.group["update_proj_gap"] == 0
        if not due and self._begun.get(weight.name) == weight.step - 1:
            self._begun[weight.name] = weight.step
            return []
        grams, bases = (
            [matrices(weight.states[f"{side}_{kind}"]) for side in sides]
            for kind in ("gram", "basis")
        )
        had = bases[0].flatten(-2).any(-1).tolist()  # the host waits for the device
        taken = [
            (due or not before)
            and self._take_bases(weight, [x[i] for x in grams], [x[i] for x in bases], not before)
            for i, before in enumerate(had)
        ]
        if all(now or before for now, before in zip(taken, had, strict=True)):
            self._begun[weight.name] = weight.step
        return [i for i, before in enumerate(had) if taken[i] and not before]

    def _take_bases(
        self, weight: WeightSlice, grams: list[Tensor], bases: list[Tensor], first: bool
    ) -> bool:
        """Replaces the bases of one matrix by those of its Gram matrices; says whether it did.

        Both are replaced or none, with a warning if a Gram matrix cannot be decomposed.
        """
        method = "eigh64" if first else self.options.refresh_method
        new = []
        for gram, basis in zip(grams, bases, strict=True):
            outcome, found = decomposition.eigenbasis(gram, None if first else basis, method)
            if found is None:
                if outcome in decomposition.CAUSES:
                    warnings.warn(
                        f"{weight.name}: the bases could not be refreshed at step {weight.step}, "
                        f"because {decomposition.CAUSES[outcome]}. The old ones are kept.",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                return False
            new.append(found)
        for basis, found in zip(bases, new, strict=True):
            basis.copy_(found)
        return True


def _sides(m: int, n: int) -> tuple[str, ...]:
    """The sides of a matrix (m, n) that have a basis: the shorter one, or both."""
    return ((LEFT,) if m <= n else ()) + ((RIGHT,) if n <= m else ())
