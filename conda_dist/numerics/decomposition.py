"""Decompositions: rotations to new bases, from projected momenta."""

import math
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from conda_dist.numerics.precision import exact_product, leaves_flags, matmul_precision


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
    Outcome.NOT_CONVERGED: "its momentum could be decomposed neither in its dtype nor in float64, "
    "nor on the CPU: no method converged, or there was no memory",
}
"""Why a basis could not be refreshed, for the warning."""


class Spectrum(NamedTuple):
    """How the energy of a projected momentum is spread, from its Gram matrix S (r, r).

    S is Q^T M^T M Q for m >= n, else Q^T M M^T Q. Its eigenvalues are s_i^2, the squared singular
    values of M. No product is needed for it: the decomposition has S, or finds its factors.

    Attributes:
        staleness: the share of |S|^2 (Frobenius) that is off the diagonal. It is 0 if the columns
            of Q are singular vectors of M, and at most 1 - 1/r. None if Q was the identity,
            because the matrix had no basis yet.
        effective_rank: (sum s_i^2)^2 / sum s_i^4 = trace(S)^2 / |S|^2. It is r if all singular
            values are equal, and 1 if there is only one.
    """

    staleness: float | None
    effective_rank: float

    @classmethod
    def of(cls, diagonal: Tensor, total: Tensor) -> "Spectrum":
        """From the diagonal of S and |S|^2, both in float64."""
        trace, on, all_of_it = torch.stack((diagonal.sum(), diagonal @ diagonal, total)).tolist()
        return cls(max(0.0, 1 - on / all_of_it), trace * trace / all_of_it)


class Found(NamedTuple):
    """The result of a decomposition.

    Attributes:
        outcome: the outcome.
        rotation: P (r, r), in at least float32, if the outcome is ``DONE``, else None.
        spectrum: the spectrum of the momentum if it was asked for and there is a rotation.
    """

    outcome: Outcome
    rotation: Tensor | None = None
    spectrum: Spectrum | None = None


def decompose(exp_avg: Tensor, right: bool, method: str = "svd", measure: bool = False) -> Found:
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
        measure: whether to find the spectrum, too.

    Returns:
        The result. A momentum that is exactly zero or not finite is not decomposed. If the method
        does not converge, runs out of memory or fails in CUDA's linear algebra libraries, it is
        tried again in float64, with another driver, and on the CPU.

    Raises:
        RuntimeError: another error occurred.
    """
    tall = (exp_avg if right else exp_avg.mT).to(torch.promote_types(exp_avg.dtype, torch.float32))
    # Not the 2-norm: the sum of squares of finite float32 values may overflow.
    largest = float(torch.linalg.vector_norm(tall, math.inf))
    if not math.isfinite(largest):
        return Found(Outcome.NOT_FINITE)
    if not largest:
        return Found(Outcome.ZERO)
    for device, dtype, driver in _attempts(tall, method):
        try:
            matrix = tall.to(device, dtype)
            if method == "svd":
                rotation, values = _right_singular_vectors(matrix, driver)
            else:
                scaled = matrix / largest  # so that squares neither overflow nor underflow
                if leaves_flags():
                    scaled = scaled.double()  # once for both factors, or there would be two copies
                # (r, max(m, n)) @ (max(m, n), r)
                gram = exact_product(scaled.mT, scaled).to(dtype)
                rotation = _eigenvectors(gram) if method == "eigh64" else _iterated(gram)
            # Some GPU drivers give NaN instead of an error.
            if math.isfinite(torch.linalg.vector_norm(rotation, math.inf)):
                spectrum = None
                if measure and method == "svd":
                    spectrum = _spectrum_of_factors(rotation, values)
                elif measure:
                    spectrum = Spectrum.of(gram.diagonal().double(), gram.double().square().sum())
                return Found(Outcome.DONE, rotation.to(tall.device, tall.dtype), spectrum)
        except RuntimeError as error:
            if not _may_be_retried(error):
                raise
    return Found(Outcome.NOT_CONVERGED)


DRIVERS = {"cuda": "gesvd"}
"""The driver of the SVD on each device; torch's default on all others.

On CUDA torch's default is gesvdj, Jacobi rotations until a tolerance is reached, and gesvd after it
if that does not converge. gesvd iterates by QR on a bidiagonal matrix: it converges in practice, in
a time that depends little on the spectrum. Published times of cuSOLVER: complex matrices whose
spectrum decays over ten decades took 863 ms for r = 1024 with gesvdj, and 270 ms for r = 1200 with
gesvd, on an A100; float64 for r = 256 took 12 and 23 ms there, and 84 and 28 ms on an RTX 3060.
This project has not measured it yet; ``bash tests/gpu.sh OUT refreshes`` does."""


def _attempts(tall: Tensor, method: str) -> Iterable[tuple[torch.device, torch.dtype, str | None]]:
    """The attempts to make, in this order: ``(device, dtype, cuSOLVER driver or None)`` of each."""
    here, cpu = tall.device, torch.device("cpu")
    # The eigenvectors of a Gram matrix need twice the bits of the momentum.
    dtype = torch.float64 if method == "eigh64" else tall.dtype
    # torch takes the name of a driver for cuSOLVER alone, not for ROCm.
    driver = DRIVERS.get(here.type) if method == "svd" and torch.version.cuda else None
    tried = [(here, dtype, driver), (here, torch.float64, None)]
    return dict.fromkeys([*tried, (cpu, dtype, None), (cpu, torch.float64, None)])


def _may_be_retried(error: RuntimeError) -> bool:
    """Whether another attempt may succeed after an error.

    It may if the method did not converge, there was no memory, or a CUDA library failed.
    """
    said = str(error).lower()
    return isinstance(error, LinAlgError | torch.OutOfMemoryError) or any(
        library in said for library in ("cusolver", "cublas")
    )


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
    rotation = cholesky_factor(gram) if gram.device.type in BY_CHOLESKY else None
    return householder_factor(gram) if rotation is None else rotation


BY_CHOLESKY = frozenset({"cuda"})
"""Devices on which :func:`cholesky_factor` is used instead of :func:`householder_factor`.

Householder's reflections are computed one after another, so they are slow on devices whose matrix
products are fast. For r = 256, 512 and 1024, one core of a CPU takes 1.8, 19 and 129 ms with
Householder, and 6.9, 45 and 335 ms with Cholesky. GPUs are not measured yet; ``bash tests/gpu.sh
OUT refreshes`` measures them."""


def householder_factor(gram: Tensor) -> Tensor:
    """The orthogonal factor of the QR decomposition of a matrix (r, r), by Householder reflections.

    Its signs are such that the diagonal of R is positive.
    """
    reflectors, factors = torch.geqrf(gram)  # only the diagonal of R is needed
    signs = torch.where(reflectors.diagonal() < 0, -1.0, 1.0).to(reflectors.dtype)
    rotation: Tensor = torch.linalg.householder_product(reflectors, factors).mul_(signs)
    return rotation


NEWTON_STEPS, SQUARED_AWAY = 3, 5e-4
"""The largest number of Newton steps, and the error before a step after which no other is needed: a
step leaves 3/4 of the square of the error. Matrices of low rank take two steps."""
SHIFT = 1e-5
"""This factor times the largest diagonal element is added to the diagonal of the Gram matrix, so
that it can be factorised in float32. It changes directions whose singular value is below 0.3 % of
the largest one, which the iteration does not resolve in float32 anyway."""


def cholesky_factor(gram: Tensor) -> Tensor | None:
    """Like :func:`householder_factor`, for a positive semidefinite matrix S (r, r).

    It uses only products, Cholesky factors and a triangular solve. Let S = A A^T and A^T A = B B^T
    be Cholesky decompositions (A and B lower triangular). Then A B^-T is orthogonal, B^T A^T is
    upper triangular, and S = (A B^-T) (B^T A^T) is the QR decomposition.

    Returns:
        The factor; None if a Cholesky decomposition fails or the error stays too large.
    """
    if leaves_flags():
        gram = gram.double()
    with matmul_precision("ieee"):  # triangular solves obey the flags, too
        shifted = gram.clone()
        shifted.diagonal().add_(gram.diagonal().amax(), alpha=SHIFT)
        first, wrong = torch.linalg.cholesky_ex(shifted)
        second, wrong_too = torch.linalg.cholesky_ex(first.mT @ first)
        failed = (wrong | wrong_too).to(gram.dtype)
        rotation: Tensor = torch.linalg.solve_triangular(second.mT, first, upper=True, left=False)
        for _ in range(NEWTON_STEPS):  # the iteration of :func:`orthonormal`
            off = rotation.mT @ rotation
            off.diagonal().sub_(1)
            rotation = torch.addmm(rotation, rotation, off, alpha=-0.5)
            # The host waits for both numbers at once.
            error, failures = torch.stack(
                (torch.linalg.vector_norm(off, math.inf), failed)
            ).tolist()
            if failures:
                return None
            if error < SQUARED_AWAY:
                return rotation
    return None


def _spectrum_of_factors(rotation: Tensor, values: Tensor) -> Spectrum:
    """The spectrum from the eigenvectors P (r, r) of S and the singular values s (r,)."""
    squares = (values / values[0]).double().square()  # so that squares do not overflow
    return Spectrum.of(rotation.double().square() @ squares, squares @ squares)


def _right_singular_vectors(tall: Tensor, driver: str | None) -> tuple[Tensor, Tensor]:
    """Right singular vectors of a matrix (m, n), m >= n.

    ``driver`` is torch's name of a cuSOLVER driver; None for its default.

    Returns:
        The vectors (n, n), as columns, and the singular values (n,), descending.
    """
    m, n = tall.shape
    if 3 * m > 5 * n:  # from here on a QR first is cheaper (Chan, doi:10.1145/355984.355990)
        # R (n, n) has the same right singular vectors, and the (m, n) factor is never formed.
        tall = torch.linalg.qr(tall, mode="r").R
    _, values, vectors = torch.linalg.svd(tall, full_matrices=False, driver=driver)
    return vectors.mT, values


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
    with matmul_precision("ieee"):
        # 1.5 P - 0.5 Q^T (Q P), all (r, r)
        return torch.addmm(rotation, Q.mT, Q @ rotation, beta=1.5, alpha=-0.5)
