"""Conda with bases from gradients in place of the momentum, which is not in the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conda_dist.numerics import arithmetic, decomposition, low_precision
from conda_dist.numerics.arithmetic import Hyper, matrices
from conda_dist.numerics.decomposition import Found, Outcome
from conda_dist.options import Options
from conda_dist.rules.conda import CondaBase, CondaRule
from conda_dist.rules.hyperparameters import hyper_of
from conda_dist.rules.rule import RefreshedRule, StateSpec, WeightSlice
from conda_dist.rules.states import basis_dtype, moment_dtype, second_dtype

LEFT, RIGHT = "left", "right"


class GradientBasesRule(CondaBase, RefreshedRule):
    """Conda's arithmetic on whole matrices, in the coordinates of SOAP (arXiv 2409.11321).

    For G (m, n), proj(X) = X V if m > n, U^T X if m < n, and U^T X V if m = n. U has the
    eigenvectors of an average of G G^T, and V those of G^T G. The averages decay by b2.

    A matrix takes its first bases in the step of its first gradient that is not zero. In these
    bases a square gradient is diagonal but for rounding errors, and the step would divide these by
    each other. So that gradient is in neither moment, and moves nothing. Later bases are taken
    every ``update_proj_gap`` steps. A gradient whose Gram matrix is not finite is left out of the
    average of Gram matrices.

    States: ``exp_avg`` (m, n), the first moment, in the weight's own coordinates; ``exp_avg_sq``
    (m, n), the second moment of proj(G); and for each side that has a basis ``left_gram`` and
    ``left_basis`` (m, m), ``right_gram`` and ``right_basis`` (n, n). ``averaged`` (1,) is
    the number of gradients in the moments, for the correction of their bias.

    Args:
        options: the optimizer's options.
    """

    whole = True
    state_names = frozenset({"left_gram", "left_basis", "right_gram", "right_basis", "averaged"})
    counts = ("basis_step",)
    decomposed = "average of Gram matrices"

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
            states[f"{side}_basis"] = StateSpec((size, size), basis, identity=True)
        states["averaged"] = StateSpec((1,), torch.float32)
        return states

    def exchange_dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """See Rule. The gradient is averaged as it is, so it is not rounded on its way."""
        product = self.options.product_dtype or basis_dtype(dtype, self.options)
        return dtype, min(dtype, product, key=lambda dtype: dtype.itemsize)

    def describe(self, group: Mapping[str, Any]) -> str:
        """See Rule."""
        return f"{self.name} from gradients every {group['update_proj_gap']} steps"

    def bases(self, m: int, n: int) -> tuple[str, ...]:
        """See Rule."""
        return tuple(f"{side}_basis" for side in sides_of(m, n))

    def prepare(self, weight: WeightSlice) -> Tensor:
        """See RefreshedRule. Averages the gradient and its Gram matrices."""
        hyper, states, first = hyper_of(weight.group), weight.states, weight.states["exp_avg"]
        arithmetic.check_alike(weight.name, {"gradient": weight.grad, "exp_avg": first})
        sides = sides_of(*weight.shape)
        kept = states[f"{sides[0]}_basis"].dtype
        grad = weight.grad.to(torch.promote_types(kept, torch.float32))  # (..., m, n)
        stochastic = self.options.stochastic_rounding
        rounding = low_precision.rounding_of(first, weight.step - 1, stochastic)
        arithmetic.average_(first, grad, hyper.beta1, rounding)
        for side in sides:
            x = grad.mT if side == LEFT else grad
            product = self.options.product_dtype or kept
            arithmetic.average_gram_(states[f"{side}_gram"], x, hyper.beta2, product)
        states["averaged"].add_(1)
        return weight.grad

    def sources(self, states: Mapping[str, Tensor], place: int) -> tuple[Tensor, ...]:
        """See RefreshedRule: a Gram matrix and a basis for each side that has one."""
        sides = [side for side in (LEFT, RIGHT) if f"{side}_gram" in states]
        names = [f"{side}_{kind}" for side in sides for kind in ("gram", "basis")]
        return tuple(matrices(states[name])[place] for name in names)

    def refresh(self, sources: Sequence[Sequence[Tensor]], right: bool, first: bool) -> list[Found]:
        """See RefreshedRule. Either all bases of a matrix are rotated, or none."""
        return [self._decompose(*each, first=first) for each in sources]

    def _decompose(self, *grams_and_bases: Tensor, first: bool) -> Found:
        method = "eigh64" if first else self.options.refresh_method
        rotations = []
        for gram, basis in zip(grams_and_bases[::2], grams_and_bases[1::2], strict=True):
            found = decomposition.decompose_gram(gram, None if first else basis, method)
            if found.rotation is None:
                return found
            rotations.append(found.rotation)
        return Found(Outcome.DONE, torch.stack(rotations))

    def leave_out(self, states: Mapping[str, Tensor], place: int) -> None:
        """See RefreshedRule. The gradient is in neither moment."""
        for batch in (states["exp_avg"], states["averaged"][..., None]):
            matrices(batch)[place].zero_()

    def update(self, weight: WeightSlice) -> Tensor:
        """See Rule."""
        grad = weight.grad if weight.averaged else self.prepare(weight)
        hyper, states = hyper_of(weight.group), weight.states
        second = states[self.second_key]
        kept = states[self.bases(*weight.shape)[0]].dtype
        dtype = torch.promote_types(kept, torch.float32)
        averaged = states["averaged"][..., None].to(dtype)  # (..., 1, 1)
        grad, momentum = grad.to(dtype), states["exp_avg"]
        if weight.averaged:  # only then are there matrices of which no gradient is in the moments
            grad = torch.where(averaged > 0, grad, 0)
        bases = [
            (states[f"{side}_basis"].to(self.options.product_dtype or kept), side == RIGHT)
            for side in sides_of(*weight.shape)
        ]
        for basis, right in bases:
            grad = arithmetic.project(grad, basis, right, dtype)
            momentum = arithmetic.project(momentum, basis, right, dtype)
        stochastic = self.options.stochastic_rounding
        rounding = low_precision.rounding_of(second, weight.step, stochastic)
        update = arithmetic.normalise_(grad, momentum, second, hyper, rounding)
        if hyper.correct_bias:
            # The weights of all gradients in N = b1 M + (1 - b1) G add up to 1 - b1^(t + 1).
            shrunk = 1 - hyper.beta1 ** (averaged + 1 if hyper.nesterov else averaged)
            update.mul_((1 - hyper.beta2**averaged).sqrt() / shrunk)
        if weight.averaged:
            update = torch.where(averaged > 0, update, 0)  # without moments it may be 0 / 0
        for basis, right in bases:
            update = arithmetic.project_back(update, basis, right, dtype)
        return update

    def hyper_to_apply(self, group: Mapping[str, Any]) -> Hyper:
        """See CondaBase. :meth:`update` has corrected the bias."""
        return replace(hyper_of(group), correct_bias=False)


def conda_rule(options: Options) -> CondaBase:
    """The rule that ``options.basis_source`` names."""
    return GradientBasesRule(options) if options.basis_source == "gradients" else CondaRule(options)


def sides_of(m: int, n: int) -> tuple[str, ...]:
    """The sides of a matrix (m, n) that have a basis: the shorter one, or both."""
    return ((LEFT,) if m <= n else ()) + ((RIGHT,) if n <= m else ())
