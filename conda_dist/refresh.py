"""New bases: momenta to their owners, decompositions in parallel, rotations back to all.

Where that is less, the owners get the parts of the momenta's Gram matrices instead, and add up.

Two packed exchanges and one agreement on what came of it. An owner that fails says so in the
agreement, as does a rank that cannot make its part, so no rank ever waits for them. A refresh is
one step's, or is launched in one, from a snapshot of the momenta, and its rotations are taken some
steps later.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from conda_dist import decomposition
from conda_dist.background import Background, Found
from conda_dist.decomposition import Outcome, gram_dtype, gram_part
from conda_dist.exchange import Exchange, Mesh, all_max, all_texts
from conda_dist.maths import matrices
from conda_dist.transfer import Hop
from conda_dist.waves import Launch, Matrix, Wave, packed_numel
from conda_dist.weight import NEVER, Weight


def launch(plan: Launch, weights: Sequence[Weight], background: Background) -> None:
    """Has owners start to decompose the momenta of which their weights have snapshots.

    Args:
        plan: the plan.
        weights: its weights.
        background: takes the decompositions, by weight and matrix.
    """
    mesh, snapshots = weights[0].mesh, [weight.snapshot for weight in weights]
    dtypes, device = [snapshot.dtype for snapshot in snapshots], snapshots[0].device
    computed = Exchange(mesh, plan.forward, snapshots, dtypes, device).wait()
    whole, failed = _gather(plan.matrices, plan.gather, weights, computed)
    for i, (matrix, momentum) in enumerate(zip(plan.matrices, whole, strict=True)):
        weight = weights[matrix.position]
        key = weight, matrix.index
        if i in failed:
            background.fail(key, failed[i])
            continue
        ours = momentum if matrix.mine else None
        find = partial(_find, weight, matrix.summed, weight.options.refresh_method)
        background.start(key, ours, find)


def _gather(
    wave: Sequence[Matrix],
    hops: Sequence[Hop],
    weights: Sequence[Weight],
    moments: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], dict[int, Exception]]:
    """Sends momenta, in compute layout, or parts of their Gram matrices to the owners.

    Returns:
        What this rank owns of them, by matrix, those launched before left out; and, for those of
        which it could not make its part, why: the others must be told when they wait for nothing.
    """
    sent: list[Tensor | None] = []
    failed: dict[int, Exception] = {}
    dtypes, device = [], weights[0].basis.device
    for i, matrix in enumerate(wave):
        weight, moment = weights[matrix.position], moments[matrix.position]
        shard = None if matrix.launched else _local_matrix(moment, matrix)
        dtype, method = weight.first_dtype, weight.options.refresh_method
        if matrix.summed:
            dtype, given = gram_dtype(dtype, method), shard if matrix.gives else None
            shard = None
            if given is not None:
                try:
                    shard = gram_part(given, weight.plan.right, method)
                except Exception as caught:
                    failed[i] = caught
                    count = packed_numel(min(weight.plan.storage.shape[-2:]))
                    shard = torch.full((1, count), math.nan, dtype=dtype, device=device)
        sent.append(shard)
        dtypes.append(dtype)
    return Exchange(weights[0].mesh, hops, sent, dtypes, device).wait(), failed


def _find(weight: Weight, summed: bool, method: str, whole: Tensor) -> Found:
    """Decomposes a whole momentum, or one of which the parts of the Gram matrix are here."""
    if not summed:
        return decomposition.decompose(whole, weight.plan.right, method)
    return decomposition.decompose_sum(whole, min(weight.plan.storage.shape[-2:]), method)


def refresh(
    wave: Wave,
    weights: Sequence[Weight],
    bases: Sequence[Tensor],
    projected: Sequence[Tensor],
    background: Background,
    begun: bool,
) -> list[bool]:
    """Takes the weights of a wave to new bases.

    Args:
        wave: the plan.
        weights: the weights of its bucket, with their first moments updated.
        bases: the whole basis of each; replaced in place.
        projected: the projected gradient of each, in compute layout; replaced in place.
        background: has the decompositions launched before.
        begun: whether a weight of this mesh has moved in an earlier step.

    Returns:
        For each weight whether its step counts: not while it is the first and all momentum zero.

    Raises:
        RuntimeError: an owner's decomposition raised, or a matrix failed too often in a row; on
            every rank of the mesh.
    """
    mesh = weights[0].mesh
    if begun and _nothing_yet(wave, weights):
        _settle(wave.matrices, weights, [Outcome.ZERO] * len(wave.matrices))
        return [bool(weight.step) for weight in weights]
    moments, device = [weight.moments[0] for weight in weights], weights[0].basis.device
    whole, failed = _gather(wave.matrices, wave.gather, weights, moments)
    found, outcomes = decompose(wave.matrices, weights, bases, whole, background, failed)
    del whole
    dtypes = [rotation_dtype(bases[m.position]) for m in wave.matrices]
    for scatter in wave.scatters:
        part = slice(scatter.start, scatter.stop)
        rotations = Exchange(mesh, scatter.hops, found[part], dtypes[part], device).wait()
        taken: dict[int, dict[int, Tensor]] = defaultdict(dict)
        for matrix, outcome, rotation in zip(
            wave.matrices[part], outcomes[part], rotations, strict=True
        ):
            if outcome == Outcome.DONE and matrix.local is not None and rotation is not None:
                taken[matrix.position][matrix.local] = rotation
        for position, rotated in taken.items():
            weights[position].rotate(bases[position], projected[position], rotated)
    moved = {m.position for m, o in zip(wave.matrices, outcomes, strict=True) if o != Outcome.ZERO}
    return [bool(weight.step) or i in moved for i, weight in enumerate(weights)]


def _nothing_yet(wave: Wave, weights: Sequence[Weight]) -> bool:
    """Whether all that is due waits for its first momentum still, the same on all ranks.

    As do experts that get no tokens, which are asked in every step: this is all that it costs.
    """
    if any(m.launched or weights[m.position].taken(m.index) != NEVER for m in wave.matrices):
        return False
    local = (_local_matrix(weights[m.position].moments[0], m) for m in wave.matrices)
    moved = any(bool(momentum.any()) for momentum in local if momentum is not None)
    return not any(all_max(weights[0].mesh, [int(moved)]))


def rotation_dtype(basis: Tensor) -> torch.dtype:
    """A rotation is rounded once, with the basis it makes."""
    return torch.promote_types(basis.dtype, torch.float32)


def _local_matrix(computed: Tensor | None, matrix: Matrix) -> Tensor | None:
    """This rank's part, in compute layout, of one matrix of a batch."""
    if matrix.local is None or computed is None:
        return None
    return matrices(computed)[matrix.local]


def decompose(
    wave: Sequence[Matrix],
    weights: Sequence[Weight],
    bases: Sequence[Tensor | None],
    whole: Sequence[Tensor | None],
    background: Background,
    failed: Mapping[int, Exception],
) -> tuple[list[Tensor | None], list[Outcome]]:
    """Decomposes matrices on their owners, and has all ranks know what came of it.

    Args:
        wave: the matrices.
        weights: their weights.
        bases: the whole basis of each weight, where this rank owns it at least.
        whole: the whole projected momentum of each matrix that this rank owns, or the parts of
            its Gram matrix.
        background: has the decompositions launched before.
        failed: what was raised here when parts of Gram matrices were made, by matrix.

    Returns:
        For each matrix its rotation where this rank owns it, and the outcome.

    Raises:
        RuntimeError: see :func:`refresh`.
    """
    mesh = weights[0].mesh
    found, ours, error = _decompose_mine(wave, weights, bases, whole, background, failed)
    outcomes = [Outcome(worst) for worst in all_max(mesh, ours)]
    if Outcome.ERROR in outcomes:
        _raise_together(mesh, error)
    _settle(wave, weights, outcomes)
    return found, outcomes


def _decompose_mine(
    wave: Sequence[Matrix],
    weights: Sequence[Weight],
    bases: Sequence[Tensor | None],
    whole: Sequence[Tensor | None],
    background: Background,
    failed: Mapping[int, Exception],
) -> tuple[list[Tensor | None], list[int], Exception | None]:
    """Decomposes the momenta this rank owns, or takes what the background has found of them.

    Returns:
        Rotations (the identity where there is none) and outcomes by matrix, None and UNKNOWN for
        those of others, unless this rank has failed them; the first exception that was raised.
    """
    found: list[Tensor | None] = [None] * len(wave)
    outcomes = [int(Outcome.UNKNOWN)] * len(wave)
    error: Exception | None = None
    for i, (matrix, momentum) in enumerate(zip(wave, whole, strict=True)):
        weight = weights[matrix.position]
        first = weight.taken(matrix.index) == NEVER
        outcome, rotation = Outcome.UNKNOWN, None
        try:
            if i in failed:
                raise failed[i]
            if matrix.launched:
                outcome, rotation = background.take((weight, matrix.index))
            elif matrix.mine:
                assert momentum is not None
                method = "svd" if first else weight.options.refresh_method
                outcome, rotation = _find(weight, matrix.summed, method, momentum)
            if rotation is not None:
                basis = _basis(bases, matrix)
                rotation = rotation.to(rotation_dtype(basis))
                if not first and weight.drifts:
                    rotation = decomposition.orthonormal(rotation, basis)
                found[i] = rotation.contiguous()
        except Exception as caught:  # the other ranks are waiting: tell them first
            outcome, error = Outcome.ERROR, error or caught
            error.add_note(f"while decomposing the momentum of {weight.plan.name}")
        if matrix.mine and found[i] is None:  # the exchange of rotations has a place for it
            basis = _basis(bases, matrix)
            dtype, device = rotation_dtype(basis), basis.device
            found[i] = torch.eye(basis.shape[-1], dtype=dtype, device=device)
        outcomes[i] = int(outcome)
    return found, outcomes, error


def _basis(bases: Sequence[Tensor | None], matrix: Matrix) -> Tensor:
    """The basis of a matrix that this rank owns."""
    whole = bases[matrix.position]
    assert whole is not None
    assert matrix.local is not None
    return matrices(whole)[matrix.local]


def _raise_together(mesh: Mesh, error: Exception | None) -> None:
    notes = "; ".join(getattr(error, "__notes__", []))
    text = f"{type(error).__name__}: {error} ({notes})" if error else ""
    said = "; ".join(f"rank {r}: {t}" for r, t in all_texts(mesh, text).items() if t)
    raise RuntimeError(f"Conda could not refresh its bases: {said}") from error


def _settle(wave: Sequence[Matrix], weights: Sequence[Weight], outcomes: Sequence[Outcome]) -> None:
    """Has every weight take note of its outcomes; warns on the first rank, raises on all.

    Where it raises no matrix has taken its basis: the others stay due.
    """
    failed = [pair for pair in zip(wave, outcomes, strict=True) if pair[1] > Outcome.ZERO]
    complaints = [
        weights[matrix.position].settle(matrix.index, outcome, matrix.launched)
        for matrix, outcome in failed
    ]
    said = "\n".join(filter(None, complaints))
    if said and not any(weights[0].mesh.coordinate):
        warnings.warn(said, RuntimeWarning, stacklevel=2)
    limit = weights[0].options.max_refresh_failures
    if any(count >= limit for weight in weights for count in weight.failures.values()):
        raise RuntimeError(said)
    for matrix, outcome in zip(wave, outcomes, strict=True):
        if outcome <= Outcome.ZERO:
            weights[matrix.position].settle(matrix.index, outcome, matrix.launched)
