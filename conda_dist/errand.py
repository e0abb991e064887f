"""A step of delegated weights: their owners multiply, all ranks do the rest on their shares."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from conda_dist import maths
from conda_dist.background import Background
from conda_dist.decomposition import Outcome
from conda_dist.delegate import Errand
from conda_dist.exchange import Exchange
from conda_dist.refresh import decompose, rotation_dtype
from conda_dist.weight import Weight

Tensors = list[Tensor | None]


def send(plan: Errand, weights: Sequence[Weight], grads: Iterable[Tensor]) -> Exchange:
    """Starts gradients and bases, and for new bases the first moments, to the owners.

    Args:
        plan: the plan.
        weights: its weights.
        grads: this rank's part of their gradients, in storage layout.
    """
    tensors = [*grads, *(weight.basis for weight in weights)]
    if plan.matrices:
        tensors += [weight.moments[0] for weight in weights]
    return Exchange(
        weights[0].mesh, plan.forward, tensors, _dtypes(tensors), weights[0].basis.device
    )


def run(
    plan: Errand, weights: Sequence[Weight], arriving: Exchange, background: Background
) -> Exchange:
    """Takes the step up to the updates, which it starts on their way back.

    Args:
        plan: the plan.
        weights: its weights.
        arriving: from :func:`send`.
        background: has the decompositions launched before.

    Raises:
        RuntimeError: see :func:`conda_dist.refresh.refresh`.
    """
    tensors, count = arriving.wait(), len(weights)
    dealing, counted = _deal(plan, weights, tensors, background)
    collecting = _collect(plan, weights, dealing.wait(), counted)
    return _return(plan, weights, collecting.wait(), tensors[count : 2 * count])


def _deal(
    plan: Errand, weights: Sequence[Weight], tensors: Tensors, background: Background
) -> tuple[Exchange, list[bool]]:
    """Projects gradients, which are used up, and starts them to where their moments are.

    Returns:
        The exchange, and for each weight whether its step counts.
    """
    count = len(weights)
    bases, momenta = tensors[count : 2 * count], tensors[2 * count :]
    projected: Tensors = [None] * count
    multiplied = _product_dtypes(weights)
    for i in plan.mine:
        basis, right = _there(bases[i]), weights[i].plan.right
        projected[i] = maths.project(_taken(tensors, i), basis, right, multiplied[i])
    counted = [True] * count
    if plan.matrices:
        outcomes = _refresh(plan, weights, projected, bases, momenta, background)
        counted = [
            bool(weight.step) or outcome != Outcome.ZERO
            for weight, outcome in zip(weights, outcomes, strict=True)
        ]
        projected += [*bases, *momenta]
        work = [rotation_dtype(weight.basis) for weight in weights]
        dtypes = [*work, *_dtypes(w.basis for w in weights), *_dtypes(_first(weights))]
    else:
        # Rounded to the products' dtype already: fewer bytes for the same numbers.
        dtypes = multiplied
        pairs = zip(projected, dtypes, strict=True)
        projected = [None if x is None else x.to(dtype) for x, dtype in pairs]
    device = weights[0].basis.device
    return Exchange(weights[0].mesh, plan.deal, projected, dtypes, device), counted


def _collect(
    plan: Errand, weights: Sequence[Weight], dealt: Tensors, counted: Sequence[bool]
) -> Exchange:
    """Updates the moments of this rank's shares and starts the normalised steps to the owners."""
    steps: Tensors = []
    count, multiplied = len(weights), _product_dtypes(weights)
    for i, weight in enumerate(weights):
        mine = _taken(dealt, i)
        if plan.matrices:
            weight.basis.copy_(_taken(dealt, count + i))
            weight.moments[0].copy_(_taken(dealt, 2 * count + i))
            step = weight.normalise(mine) if counted[i] else mine.zero_()
        else:
            step = weight.average_and_normalise(mine.to(rotation_dtype(weight.basis)))
        steps.append(step.to(multiplied[i]))
    device = weights[0].basis.device
    return Exchange(weights[0].mesh, plan.collect, steps, multiplied, device)


def _return(plan: Errand, weights: Sequence[Weight], steps: Tensors, bases: Tensors) -> Exchange:
    """Brings steps, which are used up, back from the bases, and starts the updates to all."""
    updates: Tensors = [None] * len(weights)
    multiplied = _product_dtypes(weights)
    for i in plan.mine:
        weight, basis = weights[i], _there(bases[i])
        update = maths.project_back(_taken(steps, i), basis, weight.plan.right, multiplied[i])
        updates[i] = update.to(weight.param.dtype)
    dtypes, device = [weight.param.dtype for weight in weights], weights[0].basis.device
    return Exchange(weights[0].mesh, plan.backward, updates, dtypes, device)


def finish(weights: Sequence[Weight], returning: Exchange) -> None:
    """Applies the updates when they are back."""
    for weight, update in zip(weights, returning.wait(), strict=True):
        if update is not None:
            weight.apply(update)


def _refresh(
    plan: Errand,
    weights: Sequence[Weight],
    projected: Tensors,
    bases: Tensors,
    momenta: Tensors,
    background: Background,
) -> list[Outcome]:
    """Takes what this rank owns to new bases: projected gradients, bases and first moments."""
    for i in plan.mine:
        weights[i].average(_there(momenta[i]), _there(projected[i]))
    rotations, outcomes = decompose(plan.matrices, weights, bases, momenta, background, {})
    for i in plan.mine:
        rotation, right = rotations[i], weights[i].plan.right
        if outcomes[i] == Outcome.DONE and rotation is not None:
            for tensor in (projected[i], momenta[i]):
                maths.rotate_(_there(tensor), rotation, right)
            maths.rotate_(_there(bases[i]), rotation, right=True)
    return outcomes


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _first(weights: Sequence[Weight]) -> list[Tensor]:
    return [weight.moments[0] for weight in weights]


def _taken(tensors: Tensors, index: int) -> Tensor:
    """A tensor that nobody else needs any more."""
    tensor, tensors[index] = tensors[index], None
    return _there(tensor)


def _product_dtypes(weights: Iterable[Weight]) -> list[torch.dtype]:
    return [weight.options.matmul_dtype or weight.basis.dtype for weight in weights]


def _dtypes(tensors: Iterable[Tensor]) -> list[torch.dtype]:
    return [tensor.dtype for tensor in tensors]
