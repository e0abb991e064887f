"""Bases of momenta: decompositions, their failures and what they measure."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

import toys
from conda_dist.numerics import decomposition
from conda_dist.numerics.decomposition import Outcome
from conda_dist.options import REFRESH_METHODS

DOUBLE = torch.float64


def _orthonormality(matrix: Tensor) -> float:
    """How far the columns are from orthonormal."""
    matrix = matrix.double()
    return (matrix.mT @ matrix - torch.eye(matrix.shape[-1])).abs().max().item()


def _right(shape: tuple[int, ...]) -> bool:
    return shape[-2] >= shape[-1]


def _check_decomposition(momentum: Tensor, right: bool, tolerance: float) -> Tensor:
    """P has the singular vectors in descending order; returns it."""
    outcome, rotation, _ = decomposition.decompose([momentum], right)[0]
    assert outcome == Outcome.DONE
    assert rotation is not None
    r = min(momentum.shape)
    assert rotation.shape == (r, r)
    assert rotation.dtype == torch.promote_types(momentum.dtype, torch.float32)
    assert _orthonormality(rotation) < 1e-5
    tall = (momentum if right else momentum.mT).double()
    tall = tall / tall.abs().max()
    rotated = tall @ rotation.double()
    gram = rotated.mT @ rotated
    expected = torch.linalg.svdvals(tall)
    torch.testing.assert_close(rotated.norm(dim=0), expected, rtol=0, atol=tolerance)
    off = gram - gram.diag().diag()
    assert off.abs().max() < tolerance * max(1.0, expected[0].item() ** 2)
    return rotation


DECOMPOSED = [(40, 8), (20, 12), (13, 12), (12, 12), (12, 13), (12, 20), (8, 40), (1, 9), (9, 1)]
"""Both sides of 3 m = 5 n, where QR comes first."""


@pytest.mark.parametrize("shape", DECOMPOSED, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE], ids=str)
def test_decompose_is_the_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    momentum, right = toys.random(*shape, seed=3, dtype=dtype), _right(shape)
    tolerance = 1e-12 if dtype == DOUBLE else 2e-5
    rotation = _check_decomposition(momentum, right, tolerance)
    svd = torch.linalg.svd(momentum.double(), full_matrices=False)
    expected = svd.Vh.mT if right else svd.U
    overlap = (rotation.double().mT @ expected).abs()
    torch.testing.assert_close(
        overlap, torch.eye(min(shape), dtype=DOUBLE), rtol=0, atol=10 * tolerance
    )


def test_long_momenta_are_decomposed_by_their_triangle(monkeypatch: pytest.MonkeyPatch) -> None:
    """QR first: the SVD never sees, and never forms, more than (r, r)."""
    svd, seen = torch.linalg.svd, []

    def watching(matrix: Tensor, **kwargs: Any) -> Any:
        seen.append(tuple(matrix.shape))
        return svd(matrix, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", watching)
    for shape in [(40, 8), (8, 40), (20, 12), (13, 12), (12, 13)]:
        decomposition.decompose([toys.random(*shape)], _right(shape))
    assert seen == [(8, 8), (8, 8), (20, 12), (13, 12), (13, 12)]


def test_a_square_matrix_is_decomposed_from_the_side_asked_for() -> None:
    momentum = toys.random(6, 6, dtype=DOUBLE)
    svd = torch.linalg.svd(momentum)
    for right, expected in ((True, svd.Vh.mT), (False, svd.U)):
        rotation = _check_decomposition(momentum, right, 1e-12)
        overlap = (rotation.mT @ expected).abs()
        torch.testing.assert_close(overlap, torch.eye(6, dtype=DOUBLE), rtol=0, atol=1e-9)


@given(st.sampled_from(DECOMPOSED), st.integers(0, 5), st.sampled_from([torch.float32, DOUBLE]))
@settings(max_examples=80, deadline=None)
def test_decompose_of_low_rank(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    """Directions without momentum still get a whole orthonormal basis."""
    rank = min(rank, *shape)
    m, n = shape
    momentum = toys.random(m, rank, seed=1, dtype=dtype) @ toys.random(rank, n, seed=2, dtype=dtype)
    if not rank:
        assert decomposition.decompose([momentum], _right(shape))[0] == (Outcome.ZERO, None, None)
        return
    _check_decomposition(momentum, _right(shape), 1e-11 if dtype == DOUBLE else 2e-5)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e10, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("shape", [(40, 8), (12, 12), (8, 40), (10, 12)])
def test_decompose_of_any_scale(shape: tuple[int, int], scale: float) -> None:
    """Squares would overflow or vanish in float32."""
    momentum = toys.random(*shape, seed=4).clamp(-3, 3) * torch.tensor(scale)
    assert momentum.isfinite().all()
    _check_decomposition(momentum, _right(shape), 2e-5)


def test_decompose_of_denormal_numbers() -> None:
    """They have few bits left to take directions from, but the basis is one."""
    for shape in DECOMPOSED:
        tiny = toys.random(*shape) * 1e-42
        outcome, rotation, _ = decomposition.decompose([tiny], _right(shape))[0]
        assert outcome == Outcome.DONE
        assert rotation is not None
        assert _orthonormality(rotation) < 1e-5


def test_decompose_of_ill_conditioned_momentum() -> None:
    """The Gram matrix would square the condition number: 1e-5 of the largest would be noise."""
    u, v = toys.orthogonal(40, 8, seed=1), toys.orthogonal(8, 8, seed=2)
    spectrum = torch.logspace(0, -5, 8, dtype=DOUBLE)
    momentum = ((u * spectrum) @ v.mT).float()
    _, rotation, _ = decomposition.decompose([momentum], True)[0]
    assert rotation is not None
    overlap = (rotation.double().mT @ v).abs()
    assert (overlap.diag() - 1).abs().max() < 1e-2


def test_decompose_does_not_touch_its_argument() -> None:
    for shape in DECOMPOSED:
        momentum = toys.random(*shape)
        decomposition.decompose([momentum], _right(shape))
        assert torch.equal(momentum, toys.random(*shape))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(40, 8), (5, 5), (8, 40)])
def test_what_is_not_finite_has_no_basis(shape: tuple[int, int], bad: float) -> None:
    momentum = toys.random(*shape)
    momentum[-1, -1] = bad
    assert decomposition.decompose([momentum], _right(shape))[0] == (Outcome.NOT_FINITE, None, None)


def test_finite_momentum_whose_sum_overflows_is_finite() -> None:
    momentum = torch.full((4, 3), 3e38)
    outcome, *_ = decomposition.decompose([momentum], True)[0]
    assert outcome != Outcome.NOT_FINITE


@pytest.mark.parametrize("failing", ["raises", "returns_nan"])
@pytest.mark.parametrize("times", [1, 2])
def test_an_svd_that_does_not_converge(
    monkeypatch: pytest.MonkeyPatch, failing: str, times: int
) -> None:
    """It is tried again in float64; drivers of GPUs may give NaN in place of an error."""
    svd, seen = torch.linalg.svd, []

    def flaky(matrix: Tensor, **kwargs: Any) -> Any:
        seen.append(matrix.dtype)
        if len(seen) > times:
            return svd(matrix, **kwargs)
        if failing == "raises":
            raise LinAlgError("did not converge")
        found = svd(torch.ones_like(matrix), **kwargs)
        return type(found)([torch.full_like(part, torch.nan) for part in found])

    monkeypatch.setattr(torch.linalg, "svd", flaky)
    outcome, rotation, _ = decomposition.decompose([toys.random(6, 4)], True)[0]
    assert seen == [torch.float32, DOUBLE]
    if times == 1:
        assert outcome == Outcome.DONE
        assert rotation is not None
        assert rotation.dtype == torch.float32
        assert _orthonormality(rotation) < 1e-6
    else:
        assert (outcome, rotation) == (Outcome.NOT_CONVERGED, None)


RETRIED = (
    LinAlgError("linalg.svd: the algorithm failed to converge"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnSgesvd`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)
RAISED = (
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("out of memory"),
    ValueError("cusolver"),
)


@pytest.mark.parametrize("method", REFRESH_METHODS)
@pytest.mark.parametrize("error", [*RETRIED, *RAISED], ids=str)
def test_errors_of_an_attempt_and_others(
    monkeypatch: pytest.MonkeyPatch, method: str, error: Exception
) -> None:
    """A library that fails has not converged; what is wrong with the program or the GPU raises."""
    called = {"svd": "svd", "eigh64": "eigh", "orthogonal_iteration": "householder_product"}

    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch.linalg, called[method], broken)
    if error in RETRIED:
        found = decomposition.decompose([toys.random(6, 4)], True, method)[0]
        assert found == (Outcome.NOT_CONVERGED, None, None)
    else:
        with pytest.raises(type(error), match=str(error)):
            decomposition.decompose([toys.random(6, 4)], True, method)


def test_a_decomposition_that_fails_on_a_device_is_tried_on_the_cpu() -> None:
    attempts = [
        (device.type, dtype)
        for device, dtype, _ in decomposition._attempts(torch.empty(6, 4, device="meta"), "svd")
    ]
    elsewhere = [(kind, dtype) for kind in ("meta", "cpu") for dtype in (torch.float32, DOUBLE)]
    assert attempts == elsewhere


def test_outcomes_are_ordered_by_severity() -> None:
    """Ranks agree on the largest."""
    assert list(Outcome) == sorted(Outcome)
    assert min(Outcome) == Outcome.UNKNOWN
    assert max(Outcome) == Outcome.ERROR
    assert Outcome.DONE < Outcome.ZERO < Outcome.NOT_FINITE


def test_a_product_of_thousands_of_rotations_stays_orthonormal() -> None:
    """Uncorrected it drifts: the control says so."""
    basis = drifting = torch.eye(24)
    for t in range(2000):
        rotation = toys.orthogonal(24, 24, seed=t, dtype=torch.float32)
        basis = basis @ decomposition.orthonormal(rotation, basis)
        drifting = drifting @ rotation
    assert _orthonormality(basis) < 1e-5
    assert _orthonormality(basis) < 0.5 * _orthonormality(drifting)


def test_orthonormal_corrects_and_changes_nothing_else() -> None:
    basis, rotation = toys.orthogonal(8, 8), toys.orthogonal(8, 8, seed=6)
    torch.testing.assert_close(
        decomposition.orthonormal(rotation, basis), rotation, rtol=0, atol=1e-14
    )
    off = basis + 1e-4 * toys.random(8, 8, seed=7, dtype=DOUBLE)
    assert _orthonormality(off @ rotation) > 1e-4
    assert _orthonormality(off @ decomposition.orthonormal(rotation, off)) < 1e-6


@pytest.mark.parametrize("method", REFRESH_METHODS)
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_the_spectrum_of_a_momentum(shape: tuple[int, int], method: str) -> None:
    right, m, r = _right(shape), max(shape), min(shape)
    columns = toys.orthogonal(m, m)[:, :r]

    def measured(tall: Tensor) -> Any:
        (found,) = decomposition.decompose([tall if right else tall.mT], right, method, True)
        return found.spectrum

    values = torch.arange(1, r + 1, dtype=DOUBLE)
    squares = values.square()
    found = measured(1e-30 * columns * values)  # in the basis of its singular vectors
    assert found.staleness == pytest.approx(0, abs=1e-12)
    assert found.effective_rank == pytest.approx(float(squares.sum() ** 2 / (squares**2).sum()))
    turned = (columns * values).float() @ toys.orthogonal(r, r).float()
    gram = (turned.mT @ turned).double()
    share = float((gram.diagonal().norm() / gram.norm()) ** 2)
    assert measured(turned) == pytest.approx((1 - share, found.effective_rank), 1e-4)
    assert measured(columns @ toys.orthogonal(r, r)) == pytest.approx((0, r), abs=1e-12)
    worst = torch.ones(m, r, dtype=DOUBLE)  # one direction, the farthest from every axis
    assert measured(worst) == pytest.approx((1 - 1 / r, 1))
