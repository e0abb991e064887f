"""New bases from momenta: decompositions as functions of tensors."""

import math
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]


class Outcome(IntEnum):
    """What came of a decomposition. Larger is worse; ranks agree on the largest."""

    UNKNOWN = 0
    DONE = 1
    ZERO = 2
    NOT_FINITE = 3
    NOT_CONVERGED = 4
    ERROR = 5


CAUSES = {
    Outcome.NOT_FINITE: "its momentum is not finite: look for NaN or inf in the gradients, clip "
    "them, lower the learning rate or skip such steps",
    Outcome.NOT_CONVERGED: "the SVD of its momentum converged neither in float32 nor in float64",
}
"""Why a basis could not be refreshed, in words."""


def decompose(exp_avg: Tensor, right: bool, method: str = "svd") -> tuple[Outcome, Tensor | None]:
    """Rotation P (r, r) from the basis in use to the next.

    If proj(M) = A S P^T (right) then V(M) = Q P; left likewise, with U. The singular vectors
    come in descending order and with free signs.

    Args:
        exp_avg: the whole projected momentum of one matrix, (m, n).
        right: whether m >= n.
        method: "svd"; "eigh64", the eigenvectors of the Gram matrix in float64, for which its
            squared condition number leaves enough bits; or "orthogonal_iteration", one step of
            subspace iteration, which approaches them from the basis in use.

    Returns:
        The outcome and, if it is DONE, P in at least float32. A momentum that is exactly zero or
        not finite has no basis to give. What does not converge is tried once more in float64.
    """
    tall = (exp_avg if right else exp_avg.mT).to(torch.promote_types(exp_avg.dtype, torch.float32))
    # A sum of squares of finite float32 values may overflow; the largest value cannot.
    largest = float(tall.abs().amax())
    if not math.isfinite(largest):
        return Outcome.NOT_FINITE, None
    if not largest:
        return Outcome.ZERO, None
    if method == "svd":
        return _first_finite(_right_singular_vectors, tall)
    # Eigenvectors of a Gram matrix need twice the bits of the momentum.
    dtype = torch.float64 if method == "eigh64" else tall.dtype
    scaled = tall.to(dtype) / largest  # the squares of small or large numbers leave the range
    find = {"eigh64": _eigenvectors, "orthogonal_iteration": _iterated}[method]
    outcome, rotation = _first_finite(find, scaled.mT @ scaled)
    return outcome, None if rotation is None else rotation.to(tall.dtype)


def _first_finite(
    find: Callable[[Tensor], Tensor], matrix: Tensor
) -> tuple[Outcome, Tensor | None]:
    """What is found in the matrix's dtype or else, once more, in float64."""
    for computed in (matrix.dtype, torch.float64):
        try:
            rotation = find(matrix.to(computed))
        except LinAlgError:
            continue
        # Some GPU drivers give NaN instead of an error.
        if math.isfinite(rotation.abs().amax()):
            return Outcome.DONE, rotation.to(matrix.dtype)
    return Outcome.NOT_CONVERGED, None


def _eigenvectors(gram: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(-1)  # ascending, but slot i of the second moment is the i-th largest


def _iterated(gram: Tensor) -> Tensor:
    """The orthogonal factor of the Gram matrix, its signs such that it is near the identity.

    One step of orthogonal iteration (Golub and Van Loan 2013, section 8.2.4), warm-started: the
    momentum is in the coordinates of the basis in use, in which that is the identity.
    """
    reflectors, factors = torch.geqrf(gram)  # of R only the diagonal is needed
    signs = torch.where(reflectors.diagonal() < 0, -1.0, 1.0).to(reflectors.dtype)
    rotation: Tensor = torch.linalg.householder_product(reflectors, factors).mul_(signs)
    return rotation


def _right_singular_vectors(tall: Tensor) -> Tensor:
    m, n = tall.shape
    if 3 * m > 5 * n:  # Chan's crossover (doi:10.1145/355984.355990): here it is cheaper
        # R has the right singular vectors of its matrix, and the (m, n) factor is never formed.
        tall = torch.linalg.qr(tall, mode="r").R
    rotation: Tensor = torch.linalg.svd(tall, full_matrices=False).Vh.mT
    return rotation


def orthonormal(rotation: Tensor, basis: Tensor) -> Tensor:
    """P corrected so that Q P is orthonormal again.

    Q is a product of all rotations so far and would drift. (3 I - Q^T Q) / 2 is the first step
    of Newton's iteration for the polar factor: it squares an error that is at rounding level
    already.
    """
    Q = basis.to(rotation.dtype)
    return torch.addmm(rotation, Q.mT, Q @ rotation, beta=1.5, alpha=-0.5)
