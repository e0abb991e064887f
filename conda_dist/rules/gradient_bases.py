"""Conda with bases from gradients in place of the momentum, which is not in the paper."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conda_dist.numerics import arithmetic, decomposition, low_precision
from conda_dist.numerics.arithmetic import Hyper, matrices
from conda_dist.numerics.decomposition import CAUSES, Outcome
from conda_dist.numerics.refresh_hooks import call_refresh_hooks
from conda_dist.options import Options
from conda_dist.rules.conda import CondaBase, CondaRule
from conda_dist.rules.hyperparameters import hyper_of
from conda_dist.rules.rule import StateSpec, WeightSlice
from conda_dist.rules.states import basis_dtype, moment_dtype, second_dtype

LEFT, RIGHT = "left", "right"


class GradientBasesRule(CondaBase):
    """Conda's arithmetic on whole matrices, in the coordinates of SOAP (arXiv 2409.11321).

    For G (m, n), proj(X) = X V if m > n, U^T X if m < n, and U^T X V if m = n. U has the
    eigenvectors of an average of G G^T, and V those of G^T G. The averages decay by b2.

    A matrix takes its first bases in the step of its first gradient that is not zero. In these
    bases a square gradient is diagonal but for rounding errors, and the step would divide these by
    each other. So that gradient is in neither moment, and moves nothing. Later bases are taken
    every ``update_proj_gap`` steps. If a decomposition fails, the old bases stay, and every step
    tries again; after a resume, the next step that is due. A gradient whose Gram matrix is not
    finite is left out of the average of Gram matrices.

    States: ``exp_avg`` (m, n), the first moment, in the weight's own coordinates; ``exp_avg_sq``
    (m, n), the second moment of proj(G); and for each side that has a basis ``left_gram`` and
    ``left_basis`` (m, m), ``right_gram`` and ``right_basis`` (n, n). A matrix without bases has
    zeros in their place. ``averaged`` (1,) is the number of gradients in the moments, for the
    correction of their bias.

    Args:
        options: the optimizer's options.
    """

    whole = takes_bases = True
    state_names = frozenset({"left_gram", "left_basis", "right_gram", "right_basis", "averaged"})

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        # By name, the last step after which all matrices had bases, and none was to be tried again.
        self._settled: dict[str, int] = {}
        self._failed: set[tuple[str, int]] = set()  # matrices to be tried again, by name and index

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
        states["averaged"] = StateSpec((1,), torch.float32)
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
        self._settled.clear()
        self._failed.clear()

    def update(self, weight: WeightSlice) -> Tensor:
        """See Rule."""
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
        averaged = states["averaged"].add_(1)  # (..., 1)
        decomposed, begin = self._refresh(weight, sides)
        if begin:
            grad = grad.clone(memory_format=torch.contiguous_format)  # the caller's does not change
            for x in (grad, first, averaged[..., None]):
                _zero(x, begin)
        for _ in range(decomposed):
            call_refresh_hooks(weight.name)
        bases = [(states[f"{side}_basis"].to(product), side == RIGHT) for side in sides]
        momentum = first
        for basis, right in bases:
            grad = arithmetic.project(grad, basis, right, dtype)
            momentum = arithmetic.project(momentum, basis, right, dtype)
        rounding = low_precision.rounding_of(second, step, stochastic)
        update = arithmetic.normalise_(grad, momentum, second, hyper, rounding)
        if hyper.correct_bias:
            # The weights of all gradients in N = b1 M + (1 - b1) G add up to 1 - b1^(t + 1).
            t = averaged[..., None].to(dtype)
            shrunk = 1 - hyper.beta1 ** (t + 1 if hyper.nesterov else t)
            update.mul_((1 - hyper.beta2**t).sqrt() / shrunk)
        _zero(update, begin)  # they have no moments: these may be 0 / 0
        for basis, right in bases:
            update = arithmetic.project_back(update, basis, right, dtype)
        return update

    def hyper_to_apply(self, group: Mapping[str, Any]) -> Hyper:
        """See CondaBase. :meth:`update` has corrected the bias."""
        return replace(hyper_of(group), correct_bias=False)

    def _refresh(self, weight: WeightSlice, sides: Sequence[str]) -> tuple[int, list[int]]:
        """Takes new bases of the matrices that are due, have none yet or have failed.

        Returns:
            The number of matrices that took new bases; and those of the batch that had none before.
        """
        name, step = weight.name, weight.step
        due = (step - 1) % weight.group["update_proj_gap"] == 0
        if self._settled.pop(name, None) == step - 1 and not due:
            self._settled[name] = step
            return 0, []
        grams, bases = (
            [matrices(weight.states[f"{side}_{kind}"]) for side in sides]
            for kind in ("gram", "basis")
        )
        decomposed, settled = 0, True
        had = bases[0].flatten(-2).any(-1).tolist()  # the host waits for the device
        for i, has in enumerate(had):
            if has and not due and (name, i) not in self._failed:
                continue
            outcome = self._take_bases([x[i] for x in grams], [x[i] for x in bases], not has)
            decomposed += outcome == Outcome.DONE
            settled &= outcome == Outcome.DONE or (has and outcome == Outcome.ZERO)
            if outcome not in CAUSES:
                self._failed.discard((name, i))
            elif (name, i) not in self._failed:
                self._failed.add((name, i))
                which = f" (matrix {i} of the batch)" if weight.grad.ndim > 2 else ""
                warnings.warn(
                    f"{name}{which}: the bases could not be refreshed at step {step}, because "
                    f"{CAUSES[outcome].format('average of Gram matrices')}. They stay as they are. "
                    "Every step tries again, and says nothing more until it succeeds.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if settled:
            self._settled[name] = step
        return decomposed, [i for i, has in enumerate(had) if not has]

    def _take_bases(self, grams: list[Tensor], bases: list[Tensor], first: bool) -> Outcome:
        """Replaces the bases of one matrix by those of its Gram matrices: all of them or none."""
        method = "eigh64" if first else self.options.refresh_method
        new = []
        for gram, basis in zip(grams, bases, strict=True):
            outcome, found = decomposition.eigenbasis(gram, None if first else basis, method)
            if found is None:
                return outcome
            new.append(found)
        for basis, found in zip(bases, new, strict=True):
            basis.copy_(found)
        return Outcome.DONE


def _zero(batch: Tensor, which: Sequence[int]) -> None:
    """Sets some matrices of a batch to zero."""
    for i in which:
        matrices(batch)[i].zero_()


def conda_rule(options: Options) -> CondaBase:
    """The rule that ``options.basis_source`` names."""
    return GradientBasesRule(options) if options.basis_source == "gradients" else CondaRule(options)


def sides_of(m: int, n: int) -> tuple[str, ...]:
    """The sides of a matrix (m, n) that have a basis: the shorter one, or both."""
    return ((LEFT,) if m <= n else ()) + ((RIGHT,) if n <= m else ())
