"""Decompositions: rotations to new bases, from projected momenta."""

import math
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from conda_dist.numerics.precision import exact_product, leaves_flags, matmul_precision

Measured = TypeVar("Measured")


class Outcome(IntEnum):
    """Outcome of a decomposition. A larger value is worse; ranks agree on the largest one."""

    UNKNOWN = 0
    DONE = 1
    ZERO = 2
    NOT_FINITE = 3
    NOT_CONVERGED = 4
    ERROR = 5


CAUSES = {
    Outcome.NOT_FINITE: "its {} is not finite: look for NaN or inf in the gradients, clip "
    "them, lower the learning rate or skip such steps",
    Outcome.NOT_CONVERGED: "its {} could be decomposed neither in its dtype nor in float64, "
    "nor on the CPU: no method converged, or there was no memory",
}
"""Why a basis could not be refreshed, for the warning. The braces take what was decomposed."""


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
    def of_grams(cls, grams: Tensor) -> list["Spectrum"]:
        """From k matrices S, (k, r, r)."""
        total = torch.linalg.vector_norm(grams, dim=(-2, -1), dtype=torch.float64).square()
        return cls.of(grams.diagonal(dim1=-2, dim2=-1).double(), total)

    @classmethod
    def of(cls, diagonals: Tensor, totals: Tensor) -> list["Spectrum"]:
        """From the diagonals of k matrices S, (k, r), and their |S|^2, (k,), in float64."""
        traces, on = diagonals.sum(-1), diagonals.square().sum(-1)
        read = torch.stack((traces, on, totals), -1).tolist()  # the host waits for all at once
        return [cls(max(0.0, 1 - own / total), trace**2 / total) for trace, own, total in read]


class Found(NamedTuple):
    """The result of a decomposition.

    Attributes:
        outcome: the outcome.
        rotation: P (r, r), in at least float32, if the outcome is ``DONE``, else None. If a matrix
            has k bases, (k, r, r).
        spectrum: the spectrum of the momentum if it was asked for and there is a rotation.
    """

    outcome: Outcome
    rotation: Tensor | None = None
    spectrum: Spectrum | None = None


def decompose(
    momenta: Sequence[Tensor], right: bool, method: str = "svd", measure: bool = False
) -> list[Found]:
    """Computes the rotation P (r, r) from the current basis Q of each matrix to the next, Q P.

    If proj(M) = A S P^T is the SVD of the projected momentum (m >= n), then Q P has the right
    singular vectors of M. For m < n it has the left ones. They are in descending order of the
    singular values, with arbitrary signs.

    On a device of ``BY_CHOLESKY``, orthogonal iteration decomposes all matrices in the same
    kernels, and the host waits for all at once; :func:`batched_bytes` says what memory that takes.
    Otherwise the matrices are decomposed one after another. On a CPU, a matrix gets the same
    rotation, bit for bit, alone as beside others. On CUDA, torch takes other kernels for several
    matrices than for one, which may round the last bits differently.

    Args:
        momenta: the whole projected momenta of some matrices, each (m, n), of one dtype and device.
        right: whether m >= n.
        method: "svd"; "eigh64": the eigenvectors of the Gram matrix, in float64, because a Gram
            matrix has the squared condition number; or "orthogonal_iteration": one step of subspace
            iteration, which brings Q closer to the singular vectors.
        measure: whether to find the spectrum, too.

    Returns:
        The result of each matrix. A momentum that is exactly zero or not finite is not decomposed.
        If a batch runs out of memory or fails in CUDA's linear algebra libraries, its halves are
        tried. A matrix that fails alone is tried again: by Householder's reflections in place of
        Cholesky factors, in float64, with another driver, and on the CPU.

    Raises:
        RuntimeError: another error occurred.
    """
    dtype = torch.promote_types(momenta[0].dtype, torch.float32)
    tall = [(momentum if right else momentum.mT).to(dtype) for momentum in momenta]
    # Not the 2-norm: the sum of squares of finite float32 values may overflow.
    norms = [torch.linalg.vector_norm(matrix, math.inf) for matrix in tall]
    largest = torch.stack(norms).tolist()  # the host waits for all at once
    found = [
        None if 0 < norm < math.inf else Found(Outcome.NOT_FINITE if norm else Outcome.ZERO)
        for norm in largest
    ]
    usable = [i for i, each in enumerate(found) if each is None]
    if usable and is_batched(method, momenta[0].device):
        together = _iterated_together(
            [tall[i] for i in usable], [norms[i] for i in usable], measure
        )
        for i, each in zip(usable, together, strict=True):
            found[i] = each
    return [
        each or _decompose_alone(matrix, norm, method, measure)
        for each, matrix, norm in zip(found, tall, largest, strict=True)
    ]


def is_batched(method: str, device: torch.device) -> bool:
    """Whether :func:`decompose` shares kernels between matrices."""
    return method == "orthogonal_iteration" and device.type in BY_CHOLESKY


def batched_bytes(momentum: Tensor) -> int:
    """Bytes of memory that each momentum (m, n) takes where they share kernels.

    A copy in at least float32, a scaled copy, and up to eight matrices (r, r) at a time in
    :func:`cholesky_factors`.
    """
    itemsize = max(4, momentum.dtype.itemsize)
    return itemsize * (2 * momentum.numel() + 8 * min(momentum.shape) ** 2)


def _iterated_together(
    tall: Sequence[Tensor], norms: Sequence[Tensor], measure: bool
) -> list[Found | None]:
    """One step of orthogonal iteration of k matrices (m, n), m >= n, by :func:`cholesky_factors`.

    Args:
        tall: the matrices.
        norms: the largest absolute element of each, (), finite and positive.
        measure: whether to find the spectra, too.

    Returns:
        For each matrix the result, or None if it must be decomposed in another way.
    """
    try:
        return _iterated_batch(tall, norms, measure)
    except RuntimeError as error:
        if not _may_be_retried(error):
            raise
    if len(tall) == 1:
        return [None]
    half = len(tall) // 2  # which needs half of the memory
    return [
        *_iterated_together(tall[:half], norms[:half], measure),
        *_iterated_together(tall[half:], norms[half:], measure),
    ]


def _iterated_batch(
    tall: Sequence[Tensor], norms: Sequence[Tensor], measure: bool
) -> list[Found | None]:
    """:func:`_iterated_together`, without another attempt after an error."""
    # Scaled so that squares neither overflow nor underflow.
    grams = _gram(torch.stack(tuple(tall)).div_(torch.stack(tuple(norms))[:, None, None]))
    rotations = cholesky_factors(grams)
    spectra = Spectrum.of_grams(grams) if measure else [None] * len(tall)
    return [
        None if rotation is None else Found(Outcome.DONE, rotation.to(grams.dtype), spectrum)
        for rotation, spectrum in zip(rotations, spectra, strict=True)
    ]


def _gram(tall: Tensor) -> Tensor:
    """The Gram matrices S (..., r, r) of matrices (..., m, r), in their dtype."""
    # Cast once for both factors, or there would be two copies.
    wide = tall.double() if leaves_flags() else tall
    return exact_product(wide.mT, wide).to(tall.dtype)  # (..., r, m) @ (..., m, r)


def _decompose_alone(tall: Tensor, largest: float, method: str, measure: bool) -> Found:
    """Decomposes one matrix (m, n), m >= n; ``largest`` is its largest absolute element."""

    def attempt(
        device: torch.device, dtype: torch.dtype, driver: str | None
    ) -> tuple[Tensor, Spectrum | None]:
        matrix = tall.to(device, dtype)
        if method == "svd":
            rotation, values = _right_singular_vectors(matrix, driver)
            return rotation, _spectrum_of_factors(rotation, values) if measure else None
        gram = _gram(matrix / largest)  # squares neither overflow nor underflow
        # One step of orthogonal iteration, see `householder_factor`.
        rotation = _eigenvectors(gram) if method == "eigh64" else householder_factor(gram)
        return rotation, Spectrum.of_grams(gram[None])[0] if measure else None

    found = _first_that_works(tall, method, attempt)
    return Found(Outcome.NOT_CONVERGED) if found is None else Found(Outcome.DONE, *found)


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


def _first_that_works(
    matrix: Tensor,
    method: str,
    attempt: Callable[[torch.device, torch.dtype, str | None], tuple[Tensor, Measured]],
) -> tuple[Tensor, Measured] | None:
    """The result of the first attempt that succeeds; None if none does.

    Args:
        matrix: what is decomposed.
        method: see :func:`decompose`.
        attempt: makes one of :func:`_attempts`. Returns a tensor, and what it measured.

    Returns:
        The tensor, in ``matrix``'s dtype and on its device; and what was measured.
    """
    for device, dtype, driver in _attempts(matrix, method):
        try:
            found, measured = attempt(device, dtype, driver)
            # Some GPU drivers give NaN instead of an error.
            if math.isfinite(torch.linalg.vector_norm(found, math.inf)):
                return found.to(matrix.device, matrix.dtype), measured
        except RuntimeError as error:
            if not _may_be_retried(error):
                raise
    return None


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


BY_CHOLESKY = frozenset({"cuda"})
"""Devices on which :func:`cholesky_factors` is used in place of :func:`householder_factor`.

Householder's reflections are computed one after another, so they are slow on devices whose matrix
products are fast. For r = 256, 512 and 1024, one core of a CPU takes 1.8, 19 and 129 ms with
Householder, and 6.9, 45 and 335 ms with Cholesky. GPUs are not measured yet; ``bash tests/gpu.sh
OUT refreshes`` measures them."""


def householder_factor(gram: Tensor) -> Tensor:
    """The orthogonal factor of the QR decomposition of a matrix (r, r), by Householder reflections.

    For a Gram matrix that is one step of orthogonal iteration (Golub and Van Loan 2013, section
    8.2.4). It starts from the current basis, which is the identity in projected coordinates. Signs
    are chosen so that R's diagonal is positive: then the rotation is near the identity, and the
    second moment keeps its meaning.
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


def cholesky_factors(grams: Tensor) -> list[Tensor | None]:
    """Like :func:`householder_factor`, for k positive semidefinite matrices S, (k, r, r).

    It uses only products, Cholesky factors and a triangular solve. Let S = A A^T and A^T A = B B^T
    be Cholesky decompositions (A and B lower triangular). Then A B^-T is orthogonal, B^T A^T is
    upper triangular, and S = (A B^-T) (B^T A^T) is the QR decomposition.

    Returns:
        The factor (r, r) of each matrix, a slice of one tensor; None if a Cholesky decomposition
        fails or the error stays too large.
    """
    if leaves_flags():
        grams = grams.double()
    with matmul_precision("ieee"):  # triangular solves obey the flags, too
        shifted = grams.clone()
        diagonals = shifted.diagonal(dim1=-2, dim2=-1)  # (k, r)
        diagonals.add_(diagonals.amax(-1, keepdim=True), alpha=SHIFT)
        first, wrong = torch.linalg.cholesky_ex(shifted)
        second, wrong_too = torch.linalg.cholesky_ex(first.mT @ first)
        failed = (wrong | wrong_too) != 0
        rotations: Tensor = torch.linalg.solve_triangular(second.mT, first, upper=True, left=False)
        del shifted, diagonals, first, second
        done = torch.zeros_like(failed)
        converged = [False] * len(grams)
        for _ in range(NEWTON_STEPS):  # the iteration of :func:`orthonormal`
            off = rotations.mT @ rotations
            off.diagonal(dim1=-2, dim2=-1).sub_(1)
            error = torch.linalg.vector_norm(off, math.inf, dim=(-2, -1))
            off.masked_fill_(done[:, None, None], 0)  # what has converged stays as it is
            rotations = torch.baddbmm(rotations, rotations, off, alpha=-0.5)
            done = done | (error < SQUARED_AWAY)
            # The host waits for all numbers at once.
            converged, ended = torch.stack((done & ~failed, done | failed)).tolist()
            if all(ended):
                break
    return [rotation if good else None for rotation, good in zip(rotations, converged, strict=True)]


def _spectrum_of_factors(rotation: Tensor, values: Tensor) -> Spectrum:
    """The spectrum from the eigenvectors P (r, r) of S and the singular values s (r,)."""
    squares = (values / values[0]).double().square()  # so that squares do not overflow
    diagonal = rotation.double().square() @ squares
    (spectrum,) = Spectrum.of(diagonal[None], (squares @ squares)[None])
    return spectrum


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


def decompose_gram(gram: Tensor, basis: Tensor | None, method: str) -> Found:
    """Computes the rotation P (r, r) from the basis Q to eigenvectors Q P of a Gram matrix.

    Args:
        gram: the Gram matrix (r, r), in at least float32.
        basis: Q, (r, r); None if there is no basis, so that Q is the identity.
        method: "orthogonal_iteration" takes one step of subspace iteration, if there is a basis.
            All others compute the eigenvectors in float64, in descending order of the eigenvalues.

    Returns:
        The result; the rotation is in ``gram``'s dtype.

    Raises:
        RuntimeError: see :func:`decompose`.
    """
    largest = float(torch.linalg.vector_norm(gram, math.inf))  # the host waits for the device
    if not 0 < largest < math.inf:
        return Found(Outcome.NOT_FINITE if largest else Outcome.ZERO)
    iterated = basis is not None and method == "orthogonal_iteration"

    def attempt(device: torch.device, dtype: torch.dtype, _: str | None) -> tuple[Tensor, None]:
        projected = (gram / largest).to(device, dtype)
        if basis is not None:
            old = basis.to(device, dtype)
            projected = exact_product(old.mT, exact_product(projected, old))
        return (_orthogonal_factor if iterated else _eigenvectors)(projected), None

    found = _first_that_works(gram, method if iterated else "eigh64", attempt)
    return Found(Outcome.NOT_CONVERGED) if found is None else Found(Outcome.DONE, found[0])


def _orthogonal_factor(gram: Tensor) -> Tensor:
    """The orthogonal factor (r, r) of the QR decomposition of a Gram matrix (r, r)."""
    if gram.device.type in BY_CHOLESKY:
        (factor,) = cholesky_factors(gram[None])
        if factor is not None:
            return factor.to(gram.dtype)
    return householder_factor(gram)
