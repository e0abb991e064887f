"""Refreshes: new bases of matrices.

Ranks send each projected momentum (m, n) to its owner; if the rule computes whole matrices, the
owner has what it decomposes. The owners decompose in parallel. All ranks agree on the outcomes with
one all-reduce; an owner that failed takes part, too, so no rank waits for it. Then the rotations P
(r, r) of each matrix are sent to the ranks that compute it.

A synchronous refresh happens within a step. An asynchronous one is started in a step, from a
snapshot of the momentum, and its rotation is taken some steps later.
"""

import struct
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from conda_dist.layout.redistribution import Hop
from conda_dist.numerics import arithmetic, decomposition
from conda_dist.numerics.arithmetic import matrices
from conda_dist.numerics.decomposition import Found, Outcome, Spectrum
from conda_dist.numerics.refresh_hooks import call_refresh_hooks
from conda_dist.plan.calendar import NO_BASIS
from conda_dist.plan.schedule import AsyncRefresh, Matrix, Task
from conda_dist.runtime.background import Background
from conda_dist.runtime.collectives import Exchange, all_max
from conda_dist.runtime.errors import raise_together
from conda_dist.runtime.weight import MAX_FAILURES, Weight

RuleStates = Mapping[str, Tensor]
"""The states of a weight's local batch, by the rule's names."""


def start_in_background(
    plan: AsyncRefresh, weights: Sequence[Weight], background: Background
) -> None:
    """Gathers snapshots of momenta on their owners, which start to decompose them.

    Args:
        plan: the plan.
        weights: the weights of the plan.
        background: runs the decompositions; their key is (weight, index of the matrix).
    """
    snapshots = [weight.snapshot for weight in weights]
    parts = [_local_matrix(snapshots[matrix.position], matrix) for matrix in plan.refreshed]
    whole = _gather(plan.refreshed, plan.gather, weights, parts)
    for matrix, momentum in zip(plan.refreshed, whole, strict=True):
        weight = weights[matrix.position]
        find = partial(_decompose_one, weight)
        background.start((weight, matrix.index), momentum if matrix.mine else None, find)


def _decompose_one(weight: Weight, momentum: Tensor) -> Found:
    """Decomposes one momentum (m, n) of a weight that has a basis."""
    (found,) = weight.refreshed_rule.refresh([(momentum,)], weight.plan.right, first=False)
    return found


def _gather(
    taking: Sequence[Matrix],
    hops: Sequence[Hop],
    weights: Sequence[Weight],
    parts: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gathers projected momenta on their owners.

    Args:
        taking: the matrices.
        hops: the exchanges, with ``taking`` as items.
        weights: the weights of the matrices.
        parts: for each matrix this rank's slice of the projected momentum; None if it has nothing.

    Returns:
        For each matrix the whole momentum (m, n) if this rank is its owner, else None. Matrices in
        the background are not gathered.
    """
    dtypes = [weights[matrix.position].first_dtype for matrix in taking]
    return Exchange(weights[0].mesh, hops, parts, dtypes, weights[0].nothing.device).wait()


def refresh(
    task: Task,
    weights: Sequence[Weight],
    bases: Sequence[Tensor],
    prepared: Sequence[Tensor],
    background: Background,
    begun: bool,
) -> list[bool]:
    """Rotates the matrices of a task to new bases.

    Args:
        task: the plan.
        weights: the weights of the task; their averages include this step's gradient.
        bases: the whole state "basis" (..., r, r) of each weight, if there is one; rotated in
            place.
        prepared: what :meth:`Weight.prepare` returned for each weight; rotated in place.
        background: has the decompositions that were started in earlier steps.
        begun: whether a weight of this mesh has taken a step before.

    Returns:
        For each weight whether its step counts. It does not if the weight has taken no step and
        what is decomposed is zero.

    Raises:
        RuntimeError: a decomposition raised an error, or a matrix failed too often in a row. Raised
            on all ranks of the mesh.
    """
    states = [w.begin(basis, w.nothing).states for w, basis in zip(weights, bases, strict=True)]
    sources = [_sources(matrix, weights, states) for matrix in task.refreshed]
    new = [m for m in task.refreshed if weights[m.position].basis_step(m.index) == NO_BASIS]
    if not weights[0].rule.whole:
        parts = [each[0] if each else None for each in sources]
        if begun and len(new) == len(task.refreshed) and _all_are_zero(parts, weights):
            _record(task.refreshed, weights, [Outcome.ZERO] * len(task.refreshed))
            return [bool(weight.step) for weight in weights]
        whole = _gather(task.refreshed, task.gather, weights, parts)
        sources = [() if momentum is None else (momentum,) for momentum in whole]
        del whole
    found, outcomes = _decompose(task.refreshed, weights, states, sources, background)
    del sources
    for rotations in task.rotations:
        part = slice(rotations.start, rotations.stop)
        sending = [weights[matrix.position] for matrix in task.refreshed[part]]
        dtypes = [weight.rotation_dtype for weight in sending for _ in range(weight.plan.bases)]
        sent = [rotation for each in found[part] for rotation in each]
        device = weights[0].nothing.device
        arrived = iter(Exchange(weights[0].mesh, rotations.hops, sent, dtypes, device).wait())
        taken: dict[int, dict[int, list[Tensor]]] = defaultdict(dict)
        for matrix, outcome in zip(task.refreshed[part], outcomes[part], strict=True):
            each = [next(arrived) for _ in range(weights[matrix.position].plan.bases)]
            rotated = [rotation for rotation in each if rotation is not None]
            if outcome == Outcome.DONE and matrix.local is not None and rotated:
                taken[matrix.position][matrix.local] = rotated
        for position, of_weight in taken.items():
            _rotate(weights[position], states[position], prepared[position], of_weight)
    for m in new:
        if m.local is not None:
            weights[m.position].refreshed_rule.leave_out(states[m.position], m.local)
    moved = {m.position for m, o in zip(task.refreshed, outcomes, strict=True) if o != Outcome.ZERO}
    return [bool(weight.step) or i in moved for i, weight in enumerate(weights)]


def _all_are_zero(parts: Sequence[Tensor | None], weights: Sequence[Weight]) -> bool:
    """Whether the momenta of matrices without bases are still zero on all ranks.

    That is so for experts that get no tokens, which are due in every step. For them a refresh costs
    this check (one all-reduce), and nothing more.
    """
    moved = any(bool(momentum.any()) for momentum in parts if momentum is not None)
    return not any(all_max(weights[0].mesh, [int(moved)]))


def _sources(
    matrix: Matrix, weights: Sequence[Weight], states: Sequence[RuleStates]
) -> tuple[Tensor, ...]:
    """This rank's part of what is decomposed of a matrix, see RefreshedRule; () without any."""
    if matrix.local is None or matrix.in_background:
        return ()
    rule = weights[matrix.position].refreshed_rule
    return rule.sources(states[matrix.position], matrix.local)


def _rotate(
    weight: Weight,
    states: RuleStates,
    prepared: Tensor,
    rotations: Mapping[int, Sequence[Tensor]],
) -> None:
    """Rotates the bases of matrices, in place, and what is in their coordinates.

    That is the first moment and the gradient, if the rule is not ``whole``.

    Args:
        weight: the weight.
        states: its states, with the whole state "basis".
        prepared: the gradient that :meth:`Weight.prepare` returned.
        rotations: P (r, r) of each basis, by index in this rank's local batch.
    """
    for place, each in rotations.items() if weight.computes else ():
        for tensor in () if weight.rule.whole else (weight.moments[0], prepared):
            arithmetic.rotate_(matrices(tensor)[place], each[0], weight.plan.right)
        for basis, rotation in zip(_bases_at(weight, states, place), each, strict=True):
            arithmetic.rotate_(basis, rotation, right=True)
    kept, basis = weight.basis, states.get("basis", weight.nothing)
    was_gathered = kept.data_ptr() != basis.data_ptr()
    if rotations and was_gathered:  # store this rank's rows of it
        for block in weight.plan.basis.blocks(weight.mesh.coordinate):
            here, there = block.local[-2], block.start[-2]
            rows = basis.narrow(-2, there, block.shape[-2])
            kept.narrow(-2, here, block.shape[-2]).copy_(rows)


def _local_matrix(computed: Tensor | None, matrix: Matrix) -> Tensor | None:
    """This rank's slice of one matrix of a batch, in compute layout; None if it holds nothing."""
    if matrix.local is None or computed is None:
        return None
    return matrices(computed)[matrix.local]


def _decompose(
    taking: Sequence[Matrix],
    weights: Sequence[Weight],
    states: Sequence[RuleStates],
    sources: Sequence[Sequence[Tensor]],
    background: Background,
) -> tuple[list[list[Tensor | None]], list[Outcome]]:
    """Decomposes matrices on their owners, and lets all ranks agree on the outcomes.

    Args:
        taking: the matrices.
        weights: the weights of the matrices.
        states: the rule's states of each weight, with the whole state "basis".
        sources: for each matrix what its owner decomposes; () if this rank has nothing of it.
        background: has the decompositions that were started in earlier steps.

    Returns:
        For each matrix the rotation (r, r) of each basis, None if this rank is not its owner; and
        for each matrix the outcome, the same on all ranks.

    Raises:
        RuntimeError: see :func:`refresh`.
    """
    mesh = weights[0].mesh
    ours, error = _decompose_mine(taking, weights, states, sources, background)
    sent = [int(found.outcome) for found in ours]
    if weights[0].options.diagnostics_every and not weights[0].rule.whole:
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
    rotations: list[list[Tensor | None]] = []
    for matrix, found in zip(taking, ours, strict=True):
        count, rotation = weights[matrix.position].plan.bases, found.rotation
        rotations.append([None] * count if rotation is None else [*_each(rotation)])
    return rotations, outcomes


def _each(rotation: Tensor) -> list[Tensor]:
    """The rotations of the bases of one matrix: (r, r), or (k, r, r) of k bases."""
    return list(rotation.view(-1, *rotation.shape[-2:]).unbind())


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
    states: Sequence[RuleStates],
    sources: Sequence[Sequence[Tensor]],
    background: Background,
) -> tuple[list[Found], Exception | None]:
    """Decomposes this rank's matrices, or takes the results of the background.

    Returns:
        For each matrix the result, with identities as its rotations if the decomposition gave
        none; and the first exception that was raised, or None. Matrices of other owners have the
        outcome ``UNKNOWN`` and no rotation.
    """
    results = [Found(Outcome.UNKNOWN)] * len(taking)
    error: Exception | None = None
    for first, batch in _batches(taking, weights, sources):
        alike = [weights[taking[k].position] for k in batch]
        names = [weight.plan.name for weight in alike]
        try:
            if taking[batch[0]].in_background:
                found = [background.take((alike[0], taking[batch[0]].index))]
            else:
                right = alike[0].plan.right
                found = alike[0].refreshed_rule.refresh([sources[k] for k in batch], right, first)
                for name in names:
                    call_refresh_hooks(name)
            for k, weight, result in zip(batch, alike, found, strict=True):
                if result.rotation is not None:
                    rotation = result.rotation.to(weight.rotation_dtype).contiguous()
                    if not first and weight.must_orthonormalise:
                        bases = _bases(taking[k], weights, states)
                        pairs = zip(_each(rotation), bases, strict=True)
                        rotation = torch.stack([decomposition.orthonormal(*p) for p in pairs])
                    result = result._replace(rotation=rotation)
                results[k] = result
        except Exception as caught:  # raised later, after the other ranks were told
            error = error or caught
            # Memory may be short: free the tensors that the traceback holds.
            traceback.clear_frames(caught.__traceback__)
            decomposed = alike[0].refreshed_rule.decomposed
            error.add_note(
                f"while decomposing the {decomposed} of {', '.join(dict.fromkeys(names))}"
            )
            for k in batch:
                results[k] = Found(Outcome.ERROR)
    for k, matrix in enumerate(taking):
        if matrix.mine and results[k].rotation is None:  # the planned exchange needs tensors
            dtype, bases = weights[matrix.position].rotation_dtype, _bases(matrix, weights, states)
            identities = [torch.eye(len(b), dtype=dtype, device=b.device) for b in bases]
            results[k] = results[k]._replace(rotation=torch.stack(identities))
    return results, error


def _batches(
    taking: Sequence[Matrix], weights: Sequence[Weight], sources: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[bool, list[int]]]:
    """The matrices that concern this rank, in batches of one shape, dtype and device.

    One call decomposes a batch of this rank's own. A matrix that is decomposed in the background is
    a batch by itself, on all ranks.

    Yields:
        Whether the matrices of a batch have no basis yet, and their indices in ``taking``.
    """
    alike: dict[tuple[tuple[int, int], torch.dtype, torch.device, bool], list[int]] = defaultdict(
        list
    )
    for k, (matrix, of_matrix) in enumerate(zip(taking, sources, strict=True)):
        if matrix.in_background:
            yield False, [k]
        elif matrix.mine:
            weight, source = weights[matrix.position], of_matrix[0]
            first = weight.basis_step(matrix.index) == NO_BASIS
            alike[weight.shape, source.dtype, source.device, first].append(k)
    for (*_, first), indices in alike.items():
        weight, source = weights[taking[indices[0]].position], sources[indices[0]][0]
        most = weight.refreshed_rule.refreshed_together(source, first)
        for start in range(0, len(indices), most):
            yield first, indices[start : start + most]


def _bases(matrix: Matrix, weights: Sequence[Weight], states: Sequence[RuleStates]) -> list[Tensor]:
    """The bases (r, r) of a matrix that this rank owns."""
    assert matrix.local is not None
    return _bases_at(weights[matrix.position], states[matrix.position], matrix.local)


def _bases_at(weight: Weight, states: RuleStates, place: int) -> list[Tensor]:
    """The bases (r, r) of the matrix at a place of this rank's local batch."""
    return [matrices(states[name])[place] for name in weight.bases]


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
