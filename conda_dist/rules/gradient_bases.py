"""Conda with bases from gradients in place of the momentum, which is not in the paper."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conda_dist.numerics import arithmetic, decomposition, low_precision
from conda_dist.numerics.arithmetic import matrices
from conda_dist.options import Options
from conda_dist.rules.conda import CondaBase, CondaRule
from conda_dist.rules.hyperparameters import hyper_of
from conda_dist.rules.rule import StateSpec, WeightSlice
from conda_dist.rules.states import basis_dtype, moment_dtype, second_dtype

LEFT, RIGHT = "left", "right"


class GradientBasesRule(CondaBase):
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

    whole = True
    state_names = frozenset({"left_gram", "left_basis", "right_gram", "right_basis"})

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._begun: dict[str, int] = {}  # by name, the last step known to have all bases

    def states(self, m: int, n: int, dtype: torch.dtype) -> dict[str, StateSpec]:
        """See Rule."""
        basis = basis_dtype(dtype, self.options)
        states = {
            "exp_avg": StateSpec((m, n), moment_dtype(dtype, self.options), cut=True),
            self.second_key: StateSpec((m, n), second_dtype(dtype, self.options), cut=True),
        }
        for side in sides_of(m, n):
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

    def describe(self, group: Mapping[str, Any]) -> str:
        """See Rule."""
        return f"{self.name} from gradients every {group['update_proj_gap']} steps"

    def forget(self) -> None:
        """See Rule."""
        self._begun.clear()

    def update(self, weight: WeightSlice) -> Tensor:
        """See Rule. The first gradient that is not zero gives the bases, and is in no moment."""
        hyper, states, step = hyper_of(weight.group), weight.states, weight.step
        first, second = states["exp_avg"], states[self.second_key]
        arithmetic.check_alike(weight.name, {"gradient": weight.grad, "exp_avg": first})
        sides = sides_of(*weight.shape)
        kept = states[f"{sides[0]}_basis"].dtype
        dtype = torch.promote_types(kept, torch.float32)
        product = self.options.product_dtype or kept
        grad = weight.grad.to(dtype)  # (..., m, n)
        stochastic = self.options.stochastic_rounding
        rounding = low_precision.rounding_of(first, step - 1, stochastic)
        arithmetic.average_(first, grad, hyper.beta1, rounding)
        for side in sides:
            x = grad.mT if side == LEFT else grad
            arithmetic.average_gram_(states[f"{side}_gram"], x, hyper.beta2, product)
        for i in self._refresh(weight, sides):
            # In bases of its own, a square gradient is diagonal but for rounding errors, and a step
            # would divide these by each other. So this gradient is in neither moment.
            for x in (grad, first):
                matrices(x)[i].zero_()
        bases = [(states[f"{side}_basis"].to(product), side == RIGHT) for side in sides]
        momentum = first
        for basis, right in bases:
            grad = arithmetic.project(grad, basis, right, dtype)
            momentum = arithmetic.project(momentum, basis, right, dtype)
        rounding = low_precision.rounding_of(second, step, stochastic)
        update = arithmetic.normalise_(grad, momentum, second, hyper, rounding)
        for basis, right in bases:
            update = arithmetic.project_back(update, basis, right, dtype)
        return update

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


def conda_rule(options: Options) -> CondaBase:
    """The rule that ``options.basis_source`` names."""
    return GradientBasesRule(options) if options.basis_source == "gradients" else CondaRule(options)


def sides_of(m: int, n: int) -> tuple[str, ...]:
    """The sides of a matrix (m, n) that have a basis: the shorter one, or both."""
    return ((LEFT,) if m <= n else ()) + ((RIGHT,) if n <= m else ())
