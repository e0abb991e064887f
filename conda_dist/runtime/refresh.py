"""Refreshes: new bases from momenta.

Ranks send each projected momentum (m, n) to its owner. The owners decompose them in parallel. All
ranks agree on the outcomes with one all-reduce; an owner that failed takes part, too, so no rank
waits for it. Then each rotation P (r, r) is sent to the ranks that compute its weight.

A synchronous refresh happens within a step. An asynchronous one is started in a step, from a
snapshot of the momentum, and its rotation is taken some steps later.
"""

import struct
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from conda_dist.layout.redistribution import Hop
from conda_dist.numerics import decomposition
from conda_dist.numerics.arithmetic import matrices
from conda_dist.numerics.decomposition import Found, Outcome, Spectrum
from conda_dist.numerics.refresh_hooks import call_refresh_hooks
from conda_dist.plan.calendar import NO_BASIS
from conda_dist.plan.schedule import AsyncRefresh, Matrix, Task
from conda_dist.runtime.background import Background
from conda_dist.runtime.collectives import Exchange, all_max
from conda_dist.runtime.errors import raise_together
from conda_dist.runtime.weight import MAX_FAILURES, Weight


def start_in_background(
    plan: AsyncRefresh, weights: Sequence[Weight], background: Background
) -> None:
    """Gathers snapshots of momenta on their owners, which start to decompose them.

    Args:
        plan: the plan.
        weights: the weights of the plan.
        background: runs the decompositions; their key is (weight, index of the matrix).
    """
    whole = _gather(plan.refreshed, plan.gather, weights, [weight.snapshot for weight in weights])
    for matrix, momentum in zip(plan.refreshed, whole, strict=True):
        weight = weights[matrix.position]
        find = partial(_decompose_one, weight)
        background.start((weight, matrix.index), momentum if matrix.mine else None, find)


def _decompose_one(weight: Weight, momentum: Tensor) -> Found:
    """Decomposes one momentum (m, n) of a weight that has a basis."""
    (found,) = weight.refreshed_rule.refresh([momentum], weight.plan.right, first=False)
    return found


def _gather(
    taking: Sequence[Matrix],
    hops: Sequence[Hop],
    weights: Sequence[Weight],
    moments: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gathers projected momenta on their owners.

    Args:
        taking: the matrices.
        hops: the exchanges, with ``taking`` as items.
        weights: the weights of the matrices.
        moments: this rank's elements of each weight's projected momentum, in compute layout.

    Returns:
        For each matrix the whole momentum (m, n) if this rank is its owner, else None. Matrices in
        the background are not gathered.
    """
    sent = [
        None if matrix.in_background else _local_matrix(moments[matrix.position], matrix)
        for matrix in taking
    ]
    dtypes = [weights[matrix.position].first_dtype for matrix in taking]
    return Exchange(weights[0].mesh, hops, sent, dtypes, weights[0].basis.device).wait()


def refresh(
    task: Task,
    weights: Sequence[Weight],
    bases: Sequence[Tensor],
    projected: Sequence[Tensor],
    background: Background,
    begun: bool,
) -> list[bool]:
    """Rotates the matrices of a task to new bases.

    Args:
        task: the plan.
        weights: the weights of the task; their first moments include this step's gradient.
        bases: the whole basis (..., r, r) of each weight; rotated in place.
        projected: the projected gradient of each weight, in compute layout; rotated in place.
        background: has the decompositions that were started in earlier steps.
        begun: whether a weight of this mesh has taken a step before.

    Returns:
        For each weight whether its step counts. It does not if the weight has taken no step and its
        momentum is zero.

    Raises:
        RuntimeError: a decomposition raised an error, or a matrix failed too often in a row. Raised
            on all ranks of the mesh.
    """
    if begun and _all_are_zero(task, weights):
        _record(task.refreshed, weights, [Outcome.ZERO] * len(task.refreshed))
        return [bool(weight.step) for weight in weights]
    moments = [weight.moments[0] for weight in weights]
    whole = _gather(task.refreshed, task.gather, weights, moments)
    found, outcomes = _decompose(task.refreshed, weights, bases, whole, background)
    del whole
    dtypes = [rotation_dtype(bases[m.position]) for m in task.refreshed]
    for rotations in task.rotations:
        part = slice(rotations.start, rotations.stop)
        arrived = Exchange(
            weights[0].mesh, rotations.hops, found[part], dtypes[part], weights[0].basis.device
        ).wait()
        taken: dict[int, dict[int, Tensor]] = defaultdict(dict)
        for matrix, outcome, rotation in zip(
            task.refreshed[part], outcomes[part], arrived, strict=True
        ):
            if outcome == Outcome.DONE and matrix.local is not None and rotation is not None:
                taken[matrix.position][matrix.local] = rotation
        for position, rotated in taken.items():
            weights[position].rotate(bases[position], projected[position], rotated)
    moved = {m.position for m, o in zip(task.refreshed, outcomes, strict=True) if o != Outcome.ZERO}
    return [bool(weight.step) or i in moved for i, weight in enumerate(weights)]


def _all_are_zero(task: Task, weights: Sequence[Weight]) -> bool:
    """Whether no matrix of the task has a basis, and all their momenta are still zero on all ranks.

    That is so for experts that get no tokens, which are due in every step. For them a refresh costs
    this check (one all-reduce), and nothing more.
    """
    if any(
        m.in_background or weights[m.position].basis_step(m.index) != NO_BASIS
        for m in task.refreshed
    ):
        return False
    local = (_local_matrix(weights[m.position].moments[0], m) for m in task.refreshed)
    moved = any(bool(momentum.any()) for momentum in local if momentum is not None)
    return not any(all_max(weights[0].mesh, [int(moved)]))


def rotation_dtype(basis: Tensor) -> torch.dtype:
    """The dtype of rotations: at least float32, so that only the new basis is rounded."""
    return torch.promote_types(basis.dtype, torch.float32)


def _local_matrix(computed: Tensor | None, matrix: Matrix) -> Tensor | None:
    """This rank's slice of one matrix of a batch, in compute layout; None if it holds nothing."""
    if matrix.local is None or computed is None:
        return None
    return matrices(computed)[matrix.local]


def _decompose(
    taking: Sequence[Matrix],
    weights: Sequence[Weight],
    bases: Sequence[Tensor],
    whole: Sequence[Tensor | None],
    background: Background,
) -> tuple[list[Tensor | None], list[Outcome]]:
    """Decomposes momenta on their owners, and lets all ranks agree on the outcomes.

    Args:
        taking: the matrices.
        weights: the weights of the matrices.
        bases: the whole basis of each weight.
        whole: for each matrix the whole projected momentum (m, n), if this rank is its owner.
        background: has the decompositions that were started in earlier steps.

    Returns:
        For each matrix its rotation (r, r), if this rank is its owner; and for each matrix the
        outcome, the same on all ranks.

    Raises:
        RuntimeError: see :func:`refresh`.
    """
    mesh = weights[0].mesh
    ours, error = _decompose_mine(taking, weights, bases, whole, background)
    sent = [int(found.outcome) for found in ours]
    if weights[0].options.diagnostics_every:
        sent += [word for found in ours for word in _words(found.spectrum)]
    agreed = all_max(mesh, sent)
    outcomes = [Outcome(worst) for worst in agreed[: len(taking)]]
    if Outcome.ERROR in outcomes:
        raise_together(mesh, error, "Conda could not refresh its bases")
    words = iter(agreed[len(taking) :])
    for matrix, outcome, pair in zip(
        taking, outcomes, zip(words, words, strict=True), strict=False
    ):
        if outcome == Outcome.DONE:
            _keep_spectrum(weights[matrix.position], matrix.index, pair)
    _record(taking, weights, outcomes)
    return [found.rotation for found in ours], outcomes


def _words(spectrum: Spectrum | None) -> tuple[int, int]:
    """A spectrum as integers of the same order: the bits of numbers that are not negative.

    So the maximum over the ranks is the owner's; the others pass zeros.
    """
    if spectrum is None:
        return 0, 0
    staleness, rank = struct.unpack("<qq", struct.pack("<dd", *spectrum))
    return staleness, rank


def _keep_spectrum(weight: Weight, index: int, words: tuple[int, int]) -> None:
    """Stores what the owner of a matrix has said of its momentum, before the basis is recorded."""
    staleness, rank = struct.unpack("<dd", struct.pack("<qq", *words))
    first = weight.basis_step(index) == NO_BASIS
    weight.spectra[index] = Spectrum(None if first else staleness, rank)


def _decompose_mine(
    taking: Sequence[Matrix],
    weights: Sequence[Weight],
    bases: Sequence[Tensor],
    whole: Sequence[Tensor | None],
    background: Background,
) -> tuple[list[Found], Exception | None]:
    """Decomposes this rank's momenta, or takes the results of the background.

    Returns:
        For each matrix the result, with the identity as its rotation if the decomposition gave
        none; and the first exception that was raised, or None. Matrices of other owners have the
        outcome ``UNKNOWN`` and no rotation.
    """
    results = [Found(Outcome.UNKNOWN)] * len(taking)
    error: Exception | None = None
    for first, batch in _batches(taking, weights, whole):
        alike = [weights[taking[k].position] for k in batch]
        names = [weight.plan.name for weight in alike]
        try:
            if taking[batch[0]].in_background:
                found = [background.take((alike[0], taking[batch[0]].index))]
            else:
                momenta = [momentum for k in batch if (momentum := whole[k]) is not None]
                found = alike[0].refreshed_rule.refresh(momenta, alike[0].plan.right, first)
                for name in names:
                    call_refresh_hooks(name)
            for k, weight, result in zip(batch, alike, found, strict=True):
                if result.rotation is not None:
                    basis = _basis(bases, taking[k])
                    rotation = result.rotation.to(rotation_dtype(basis))
                    if not first and weight.must_orthonormalise:
                        rotation = decomposition.orthonormal(rotation, basis)
                    result = result._replace(rotation=rotation.contiguous())
                results[k] = result
        except Exception as caught:  # raised later, after the other ranks were told
            error = error or caught
            error.add_note(f"while decomposing the momentum of {', '.join(dict.fromkeys(names))}")
            for k in batch:
                results[k] = Found(Outcome.ERROR)
    for k, matrix in enumerate(taking):
        if matrix.mine and results[k].rotation is None:  # the planned exchange needs a tensor
            basis = _basis(bases, matrix)
            dtype, device = rotation_dtype(basis), basis.device
            identity = torch.eye(basis.shape[-1], dtype=dtype, device=device)
            results[k] = results[k]._replace(rotation=identity)
    return results, error


def _batches(
    taking: Sequence[Matrix], weights: Sequence[Weight], whole: Sequence[Tensor | None]
) -> Iterator[tuple[bool, list[int]]]:
    """The matrices that concern this rank, in batches of one shape, dtype and device.

    One call decomposes a batch of this rank's own. A matrix that is decomposed in the background is
    a batch by itself, on all ranks.

    Yields:
        Whether the matrices of a batch have no basis yet, and their indices in ``taking``.
    """
    alike: dict[tuple[torch.Size, torch.dtype, torch.device, bool], list[int]] = defaultdict(list)
    for k, (matrix, momentum) in enumerate(zip(taking, whole, strict=True)):
        if matrix.in_background:
            yield False, [k]
        elif matrix.mine:
            assert momentum is not None
            first = weights[matrix.position].basis_step(matrix.index) == NO_BASIS
            alike[momentum.shape, momentum.dtype, momentum.device, first].append(k)
    for (*_, first), indices in alike.items():
        weight, momentum = weights[taking[indices[0]].position], whole[indices[0]]
        assert momentum is not None
        most = weight.refreshed_rule.refreshed_together(momentum, first)
        for start in range(0, len(indices), most):
            yield first, indices[start : start + most]


def _basis(bases: Sequence[Tensor], matrix: Matrix) -> Tensor:
    """The basis of a matrix that this rank owns."""
    assert matrix.local is not None
    return matrices(bases[matrix.position])[matrix.local]


def _record(
    taking: Sequence[Matrix], weights: Sequence[Weight], outcomes: Sequence[Outcome]
) -> None:
    """Records the outcomes in the weights. Warns of failures, on the first rank of the mesh.

    Raises:
        RuntimeError: a matrix failed too often in a row; raised on all ranks. Then no matrix has
            taken a new basis, and all stay due.
    """
    failed = [pair for pair in zip(taking, outcomes, strict=True) if pair[1] > Outcome.ZERO]
    complaints = [
        weights[matrix.position].record_outcome(matrix.index, outcome, matrix.in_background)
        for matrix, outcome in failed
    ]
    said = "\n".join(filter(None, complaints))
    if said and not any(weights[0].mesh.coordinate):
        warnings.warn(said, RuntimeWarning, stacklevel=2)
    if any(count >= MAX_FAILURES for weight in weights for count in weight.failures.values()):
        raise RuntimeError(said)
    for matrix, outcome in zip(taking, outcomes, strict=True):
        if outcome <= Outcome.ZERO:
            weights[matrix.position].record_outcome(matrix.index, outcome, matrix.in_background)
