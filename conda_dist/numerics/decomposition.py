"""Decompositions: rotations to new bases, from projected momenta."""

import math
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]


class Outcome(IntEnum):
    """Outcome of a decomposition. A larger value is worse; ranks agree on the largest one."""

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
"""Why a basis could not be refreshed, for the warning."""


def decompose(exp_avg: Tensor, right: bool, method: str = "svd") -> tuple[Outcome, Tensor | None]:
    """Computes the rotation P (r, r) from the current basis Q to the next basis Q P.

    If proj(M) = A S P^T is the SVD of the projected momentum (m >= n), then Q P has the right
    singular vectors of M. For m < n it has the left ones. They are in descending order of the
    singular values, with arbitrary signs.

    Args:
        exp_avg: the whole projected momentum of one matrix, (m, n).
        right: whether m >= n.
        method: "svd"; "eigh64": the eigenvectors of the Gram matrix, in float64, because a Gram
            matrix has the squared condition number; or "orthogonal_iteration": one step of subspace
            iteration, which brings Q closer to the singular vectors.

    Returns:
        The outcome, and P in at least float32 if the outcome is DONE, else None. A momentum that is
        exactly zero or not finite is not decomposed. If the method does not converge, it is tried
        once more in float64.
    """
    tall = (exp_avg if right else exp_avg.mT).to(torch.promote_types(exp_avg.dtype, torch.float32))
    # Not a norm: the sum of squares of finite float32 values may overflow.
    largest = float(tall.abs().amax())
    if not math.isfinite(largest):
        return Outcome.NOT_FINITE, None
    if not largest:
        return Outcome.ZERO, None
    if method == "svd":
        return _first_finite(_right_singular_vectors, tall)
    # The eigenvectors of a Gram matrix need twice the bits of the momentum.
    dtype = torch.float64 if method == "eigh64" else tall.dtype
    scaled = tall.to(dtype) / largest  # so that squares neither overflow nor underflow
    find = {"eigh64": _eigenvectors, "orthogonal_iteration": _iterated}[method]
    outcome, rotation = _first_finite(find, scaled.mT @ scaled)  # (r, max(m, n)) @ (max(m, n), r)
    return outcome, None if rotation is None else rotation.to(tall.dtype)


def _first_finite(
    find: Callable[[Tensor], Tensor], matrix: Tensor
) -> tuple[Outcome, Tensor | None]:
    """The result of ``find`` in the matrix's dtype, or else in float64, if it is finite."""
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
    """Eigenvectors of a Gram matrix (r, r), in descending order of the eigenvalues."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(-1)  # eigh's order is ascending


def _iterated(gram: Tensor) -> Tensor:
    """One step of orthogonal iteration (Golub and Van Loan 2013, section 8.2.4).

    The result is the factor Q' of the QR decomposition of the Gram matrix (r, r). It starts from
    the current basis, which is the identity in projected coordinates. Signs are chosen so that R's
    diagonal is positive: then the rotation is near the identity, and the second moment keeps its
    meaning.
    """
    reflectors, factors = torch.geqrf(gram)  # only the diagonal of R is needed
    signs = torch.where(reflectors.diagonal() < 0, -1.0, 1.0).to(reflectors.dtype)
    rotation: Tensor = torch.linalg.householder_product(reflectors, factors).mul_(signs)
    return rotation


def _right_singular_vectors(tall: Tensor) -> Tensor:
    """Right singular vectors (n, n) of a matrix (m, n), m >= n, as columns, descending."""
    m, n = tall.shape
    if 3 * m > 5 * n:  # from here on a QR first is cheaper (Chan, doi:10.1145/355984.355990)
        # R (n, n) has the same right singular vectors, and the (m, n) factor is never formed.
        tall = torch.linalg.qr(tall, mode="r").R
    rotation: Tensor = torch.linalg.svd(tall, full_matrices=False).Vh.mT
    return rotation


def orthonormal(rotation: Tensor, basis: Tensor) -> Tensor:
    """Corrects a rotation P so that Q P is orthonormal.

    Q is the product of all rotations so far, so rounding errors would add up. P is multiplied by
    (3 I - Q^T Q) / 2, one step of Newton's iteration for the polar factor of Q. It squares the
    error, which is at rounding level already.

    Args:
        rotation: P, (r, r), in at least float32.
        basis: Q, (r, r).
    """
    Q = basis.to(rotation.dtype)
    # 1.5 P - 0.5 Q^T (Q P), all (r, r)
    return torch.addmm(rotation, Q.mT, Q @ rotation, beta=1.5, alpha=-0.5)
