"""A step of delegated weights: their owners multiply, all ranks do the rest on their shares."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from conda_dist import maths
from conda_dist.background import Background
from conda_dist.delegate import Errand
from conda_dist.exchange import Exchange
from conda_dist.maths import Outcome
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
    mesh, device, count = weights[0].mesh, weights[0].basis.device, len(weights)
    work = [rotation_dtype(weight.basis) for weight in weights]
    multiplied = [_product_dtype(weight) for weight in weights]
    tensors = arriving.wait()
    bases, momenta = tensors[count : 2 * count], tensors[2 * count :]
    projected: Tensors = [None] * count
    for i in plan.mine:
        grad, basis = _there(tensors[i]), _there(bases[i])
        projected[i] = maths.project(grad, basis, weights[i].plan.right, multiplied[i])
    counted = [True] * count
    if plan.matrices:
        outcomes = _refresh(plan, weights, projected, bases, momenta, background)
        pairs = zip(weights, outcomes, strict=True)
        counted = [bool(weight.step) or outcome != Outcome.ZERO for weight, outcome in pairs]
        dealt = [*projected, *bases, *momenta]
        dtypes = [*work, *_dtypes(w.basis for w in weights), *_dtypes(_first(weights))]
    else:
        # Rounded to the products' dtype already: fewer bytes for the same numbers.
        dealt = [None if x is None else x.to(d) for x, d in zip(projected, multiplied, strict=True)]
        dtypes = multiplied
    dealt = Exchange(mesh, plan.deal, dealt, dtypes, device).wait()

    steps: Tensors = []
    for i, weight in enumerate(weights):
        mine = _there(dealt[i])
        if plan.matrices:
            weight.basis.copy_(_there(dealt[count + i]))
            weight.moments[0].copy_(_there(dealt[2 * count + i]))
        else:
            weight.average(weight.moments[0], mine := mine.to(work[i]))
        step = weight.normalise(mine) if counted[i] else mine.zero_()
        steps.append(step.to(multiplied[i]))
    steps = Exchange(mesh, plan.collect, steps, multiplied, device).wait()

    updates: Tensors = [None] * count
    for i in plan.mine:
        weight, step, basis = weights[i], _there(steps[i]), _there(bases[i])
        update = maths.project_back(step, basis, weight.plan.right, multiplied[i])
        updates[i] = update.to(weight.param.dtype)
    dtypes = [weight.param.dtype for weight in weights]
    return Exchange(mesh, plan.backward, updates, dtypes, device)


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
    rotations, outcomes = decompose(plan.matrices, weights, bases, momenta, background)
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


def _product_dtype(weight: Weight) -> torch.dtype:
    return weight.options.matmul_dtype or weight.basis.dtype


def _dtypes(tensors: Iterable[Tensor]) -> list[torch.dtype]:
    return [tensor.dtype for tensor in tensors]
