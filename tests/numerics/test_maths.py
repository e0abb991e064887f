"""The mathematics of a step, each identity by itself."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

import toys
from conda_dist import Conda
from conda_dist.numerics import arithmetic, decomposition
from conda_dist.numerics.arithmetic import Hyper
from conda_dist.numerics.decomposition import Outcome
from conda_dist.options import REFRESH_METHODS

DOUBLE = torch.float64
HYPER = Hyper(
    lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, scale=0.25, correct_bias=True
)
SIZES = st.integers(1, 12)
SHAPES = st.one_of(st.tuples(SIZES, SIZES), st.tuples(st.integers(1, 3), SIZES, SIZES))


def _basis(*shape: int, seed: int = 5, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Random orthogonal matrices."""
    return torch.linalg.qr(toys.random(*shape, seed=seed, dtype=DOUBLE)).Q.to(dtype)


def _orthonormality(matrix: Tensor) -> float:
    """How far the columns are from orthonormal."""
    matrix = matrix.double()
    return (matrix.mT @ matrix - torch.eye(matrix.shape[-1])).abs().max().item()


def _right(shape: tuple[int, ...]) -> bool:
    return shape[-2] >= shape[-1]


# Projection


@given(SHAPES, st.data())
@settings(max_examples=100, deadline=None)
def test_projection_commutes_with_slicing(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Rows for "right", columns for "left": a rank with a slice needs no other."""
    right, r = _right(shape), min(shape[-2:])
    x, basis = toys.random(*shape, dtype=DOUBLE), _basis(*shape[:-2], r, r)
    kept = -2 if right else -1
    start = data.draw(st.integers(0, shape[kept]))
    length = data.draw(st.integers(0, shape[kept] - start))
    for function in (arithmetic.project, arithmetic.project_back):
        part = function(x.narrow(kept, start, length), basis, right)
        whole = function(x, basis, right).narrow(kept, start, length)
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-13)


@given(SHAPES)
@settings(max_examples=60, deadline=None)
def test_project_back_inverts_project(shape: tuple[int, ...]) -> None:
    right, r = _right(shape), min(shape[-2:])
    x, basis = toys.random(*shape, dtype=DOUBLE), _basis(*shape[:-2], r, r)
    there = arithmetic.project(x, basis, right)
    assert there.shape == x.shape
    torch.testing.assert_close(arithmetic.project_back(there, basis, right), x, rtol=0, atol=1e-12)
    expected = x @ basis if right else basis.mT @ x
    torch.testing.assert_close(there, expected, rtol=0, atol=1e-13)


def test_projection_dtypes() -> None:
    """Products in the dtype asked for, results in the basis's; arguments stay as they are."""
    x, basis = toys.random(6, 4, dtype=torch.bfloat16), _basis(4, 4, dtype=torch.float32)
    copies = x.clone(), basis.clone()
    exact = arithmetic.project(x, basis, right=True)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact, x.float() @ basis)
    coarse = arithmetic.project(x, basis.bfloat16(), True)
    assert coarse.dtype == torch.float32
    assert torch.equal(coarse, (x @ basis.bfloat16()).float())
    assert 0 < (coarse - exact).abs().max() < 0.05
    assert torch.equal(x, copies[0])
    assert torch.equal(basis, copies[1])


@given(SHAPES, st.floats(0, 0.99), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_projected_momentum_obeys_its_own_recursion(
    shape: tuple[int, ...], beta: float, steps: int
) -> None:
    """proj(M_t) = b1 proj(M_t-1) + (1 - b1) proj(G_t) while the basis stays."""
    right, r = _right(shape), min(shape[-2:])
    basis = _basis(*shape[:-2], r, r)
    momentum = torch.zeros(shape, dtype=DOUBLE)
    projected = torch.zeros(shape, dtype=DOUBLE)
    for t in range(steps):
        grad = toys.random(*shape, seed=t, dtype=DOUBLE)
        momentum = beta * momentum + (1 - beta) * grad
        arithmetic.average_(projected, arithmetic.project(grad, basis, right), beta)
    afresh = arithmetic.project(momentum, basis, right)
    torch.testing.assert_close(projected, afresh, rtol=0, atol=1e-12)


@given(st.tuples(SIZES, SIZES))
@settings(max_examples=60, deadline=None)
def test_refreshing_in_projected_coordinates(shape: tuple[int, int]) -> None:
    """Q P is the basis of the SVD of M, and exp_avg P what projecting M afresh gives."""
    right, r = _right(shape), min(shape)
    momentum, basis = toys.random(*shape, dtype=DOUBLE), _basis(r, r)
    exp_avg = arithmetic.project(momentum, basis, right)
    outcome, rotation, _ = decomposition.decompose(exp_avg, right)
    assert outcome == Outcome.DONE
    assert rotation is not None
    new = basis @ rotation
    svd = torch.linalg.svd(momentum, full_matrices=False)
    expected = svd.Vh.mT if right else svd.U
    overlap = (new.mT @ expected).abs()
    torch.testing.assert_close(overlap, torch.eye(r, dtype=DOUBLE), rtol=0, atol=1e-6)
    arithmetic.rotate_(exp_avg, rotation, right)
    afresh = arithmetic.project(momentum, new, right)
    torch.testing.assert_close(exp_avg, afresh, rtol=0, atol=1e-12)
    back = arithmetic.project_back(exp_avg, new, right)
    torch.testing.assert_close(back, momentum, rtol=0, atol=1e-12)


def test_rotate_is_in_place_on_any_memory() -> None:
    rotation = _basis(4, 4)
    for right in (True, False):
        held = torch.zeros(12, 12, dtype=DOUBLE)
        x = held[1:9:2, 2:10:2]
        x.copy_(toys.random(4, 4, dtype=DOUBLE))
        expected = x @ rotation if right else rotation.mT @ x
        arithmetic.rotate_(x, rotation, right)
        torch.testing.assert_close(x, expected)
        torch.testing.assert_close(held[1:9:2, 2:10:2], expected)


def test_matrices() -> None:
    for shape, batch in [((4, 3), 1), ((2, 4, 3), 2), ((2, 5, 4, 3), 10)]:
        tensor = torch.zeros(shape)
        found = arithmetic.matrices(tensor)
        assert found.shape == (batch, 4, 3)
        found[-1] += 1  # a view: what is written to it is written to the tensor
        assert tensor.sum() == 12


# Decomposition


def _check_decomposition(momentum: Tensor, right: bool, tolerance: float) -> Tensor:
    """P has the singular vectors in descending order; returns it."""
    outcome, rotation, _ = decomposition.decompose(momentum, right)
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
        decomposition.decompose(toys.random(*shape), _right(shape))
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
        assert decomposition.decompose(momentum, _right(shape)) == (Outcome.ZERO, None, None)
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
        outcome, rotation, _ = decomposition.decompose(toys.random(*shape) * 1e-42, _right(shape))
        assert outcome == Outcome.DONE
        assert rotation is not None
        assert _orthonormality(rotation) < 1e-5


def test_decompose_of_ill_conditioned_momentum() -> None:
    """The Gram matrix would square the condition number: 1e-5 of the largest would be noise."""
    u, v = _basis(40, 8, seed=1), _basis(8, 8, seed=2)
    spectrum = torch.logspace(0, -5, 8, dtype=DOUBLE)
    momentum = ((u * spectrum) @ v.mT).float()
    _, rotation, _ = decomposition.decompose(momentum, True)
    assert rotation is not None
    overlap = (rotation.double().mT @ v).abs()
    assert (overlap.diag() - 1).abs().max() < 1e-2


def test_decompose_does_not_touch_its_argument() -> None:
    for shape in DECOMPOSED:
        momentum = toys.random(*shape)
        decomposition.decompose(momentum, _right(shape))
        assert torch.equal(momentum, toys.random(*shape))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(40, 8), (5, 5), (8, 40)])
def test_what_is_not_finite_has_no_basis(shape: tuple[int, int], bad: float) -> None:
    momentum = toys.random(*shape)
    momentum[-1, -1] = bad
    assert decomposition.decompose(momentum, _right(shape)) == (Outcome.NOT_FINITE, None, None)


def test_finite_momentum_whose_sum_overflows_is_finite() -> None:
    momentum = torch.full((4, 3), 3e38)
    outcome, *_ = decomposition.decompose(momentum, True)
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
    outcome, rotation, _ = decomposition.decompose(toys.random(6, 4), True)
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
        found = decomposition.decompose(toys.random(6, 4), True, method)
        assert found == (Outcome.NOT_CONVERGED, None, None)
    else:
        with pytest.raises(type(error), match=str(error)):
            decomposition.decompose(toys.random(6, 4), True, method)


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
        rotation = _basis(24, 24, seed=t, dtype=torch.float32)
        basis = basis @ decomposition.orthonormal(rotation, basis)
        drifting = drifting @ rotation
    assert _orthonormality(basis) < 1e-5
    assert _orthonormality(basis) < 0.5 * _orthonormality(drifting)


def test_orthonormal_corrects_and_changes_nothing_else() -> None:
    basis, rotation = _basis(8, 8), _basis(8, 8, seed=6)
    torch.testing.assert_close(
        decomposition.orthonormal(rotation, basis), rotation, rtol=0, atol=1e-14
    )
    off = basis + 1e-4 * toys.random(8, 8, seed=7, dtype=DOUBLE)
    assert _orthonormality(off @ rotation) > 1e-4
    assert _orthonormality(off @ decomposition.orthonormal(rotation, off)) < 1e-6


# The step


def test_step_size_and_keep() -> None:
    plain = Hyper(0.1, 0.9, 0.99, 1e-8, 0.5, 0.25, correct_bias=False)
    assert plain.step_size(3) == pytest.approx(0.025)
    assert plain.keep == pytest.approx(0.95)
    corrected = 0.1 * (1 - 0.99**3) ** 0.5 / (1 - 0.9**3)
    assert HYPER.step_size(3) == pytest.approx(0.25 * corrected)
    assert HYPER.step_size(10**7) == pytest.approx(0.25 * 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE], ids=str)
def test_normalise(dtype: torch.dtype) -> None:
    """Arithmetic in the basis's dtype; moments of fewer bits are rounded once."""
    work = torch.promote_types(dtype, torch.float32)
    grad, exp_avg = toys.random(5, 4, dtype=work), toys.random(5, 4, seed=1, dtype=dtype)
    exp_avg_sq = toys.random(5, 4, seed=2, dtype=dtype).square()
    second = 0.99 * exp_avg_sq.to(work) + (1 - 0.99) * grad**2
    expected = exp_avg.to(work) / (second.sqrt() + 1e-8)
    before, held = exp_avg.clone(), exp_avg_sq
    result = arithmetic.normalise_(grad, exp_avg, exp_avg_sq, HYPER)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(exp_avg_sq, second.to(dtype))
    assert held is exp_avg_sq
    assert result.dtype == work
    assert torch.equal(exp_avg, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_average(dtype: torch.dtype) -> None:
    exp_avg, grad = toys.random(5, 4, dtype=dtype), toys.random(5, 4, seed=1)
    expected = (0.9 * exp_avg.float() + 0.1 * grad).to(dtype)
    arithmetic.average_(exp_avg, grad, 0.9)
    torch.testing.assert_close(
        exp_avg, expected, rtol=1e-5 if dtype != torch.bfloat16 else 8e-3, atol=1e-6
    )
    assert exp_avg.dtype == dtype
    assert torch.equal(grad, toys.random(5, 4, seed=1))


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.0), (0.999999, 0.9999999)])
@pytest.mark.parametrize("shape", [(33, 17), (3, 5, 8), (1, 1)])
def test_one_pass_is_the_same_step(
    shape: tuple[int, ...], betas: tuple[float, float], out: bool
) -> None:
    """Also from zero, where eps is all there is below, and for what is not finite."""
    hyper = Hyper(0.1, *betas, eps=0.1, weight_decay=0.3, scale=0.25, correct_bias=True)
    for dtype in (torch.float32, DOUBLE):
        grad, exp_avg, exp_avg_sq = (toys.random(*shape, seed=i, dtype=dtype) for i in range(3))
        exp_avg_sq.square_()
        for moment in (exp_avg, exp_avg_sq):
            moment.view(-1)[::2] = 0
        grad.view(-1)[::3] = 0
        grad.view(-1)[5:6] = math.inf
        first, second, kept = exp_avg.clone(), exp_avg_sq.clone(), grad.clone()
        assert arithmetic.can_fuse(grad, exp_avg, exp_avg_sq)
        given = [torch.full_like(grad, math.nan)] if out else []
        tensors = [grad], [exp_avg], [exp_avg_sq]
        (result,) = arithmetic.average_and_normalise_(*tensors, hyper, given)
        assert not given or result is given[0]
        assert torch.equal(grad, kept)
        arithmetic.average_(first, grad, betas[0])
        expected = arithmetic.normalise_(grad, first, second, hyper)
        for ours, theirs in ((exp_avg, first), (exp_avg_sq, second), (result, expected)):
            rtol = 1e-5 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-4 * rtol, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"matmul_dtype": torch.bfloat16}], ids=str)
def test_weights_that_are_computed_together_step_as_they_do_alone(options: dict[str, Any]) -> None:
    """Bit for bit, among weights of other shapes, dtypes and groups, and one without a gradient."""
    shapes = [(9, 4), (4, 9), (9, 4), (4, 4), (9, 4), (2, 9, 4), (9, 4), (4, 9)]
    params = [*toys.parameters(*shapes), *toys.parameters((9, 4), (9, 4), dtype=DOUBLE)]
    twins, grads = toys.copies(params), toys.gradients(params, 4)
    for row in grads:
        row[2] = None  # type: ignore[call-overload]

    def groups(some: list[Any]) -> list[dict[str, Any]]:
        halves = (some[:4], {}), (some[4:], {"betas": (0.8, 0.9)})
        return [{"params": p, "algorithm": "conda", **own} for p, own in halves if p]

    toys.take(Conda(groups(params), **toys.OPTIONS, **options), params, grads)
    for i, (param, twin) in enumerate(zip(params, twins, strict=True)):
        alone = groups([twin]) if i < 4 else groups([*params[:4], twin])[1:]
        toys.take(Conda(alone, **toys.OPTIONS, **options), [twin], [[row[i]] for row in grads])
        assert torch.equal(param, twin)


def test_what_is_not_fused() -> None:
    x = torch.ones(4, 4)
    assert arithmetic.can_fuse(x, x)
    for y in (x.T, x[:, 2:], x[:0], x.bfloat16(), x.to("meta")):
        assert not arithmetic.can_fuse(y, y)
    assert not arithmetic.can_fuse(x, x.double())


@pytest.mark.parametrize("lr", [0.1, 0, torch.tensor(0.1, dtype=DOUBLE)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3, 10.0, 30.0])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 5, 3), (2, 3, 5)])
def test_one_product_into_the_weight_is_the_same_step(
    shape: tuple[int, ...], weight_decay: float, lr: float | Tensor
) -> None:
    """Up to a decay that forgets the weight (keep = 0), or worse."""
    hyper = Hyper(lr, 0.9, 0.99, 1e-8, weight_decay, 0.25, correct_bias=True)
    right, r = _right(shape), min(shape[-2:])
    y, basis = toys.random(*shape, dtype=DOUBLE), _basis(*shape[:-2], r, r)
    param, fused = (toys.random(*shape, seed=1, dtype=DOUBLE) for _ in range(2))
    update = arithmetic.project_back(y, basis, right)
    step_size = float(hyper.step_size(4))
    expected = (param - step_size * update) * (1 - float(lr) * weight_decay)
    arithmetic.apply_(param, update, 4, hyper)
    arithmetic.project_back_and_apply_(fused, y, basis, right, 4, hyper)
    torch.testing.assert_close(param, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", REFRESH_METHODS)
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_the_spectrum_of_a_momentum(shape: tuple[int, int], method: str) -> None:
    right, m, r = _right(shape), max(shape), min(shape)
    columns = _basis(m, m)[:, :r]

    def measured(tall: Tensor) -> Any:
        return decomposition.decompose(tall if right else tall.mT, right, method, True).spectrum

    values = torch.arange(1, r + 1, dtype=DOUBLE)
    squares = values.square()
    found = measured(1e-30 * columns * values)  # in the basis of its singular vectors
    assert found.staleness == pytest.approx(0, abs=1e-12)
    assert found.effective_rank == pytest.approx(float(squares.sum() ** 2 / (squares**2).sum()))
    turned = (columns * values).float() @ _basis(r, r).float()
    gram = (turned.mT @ turned).double()
    share = float((gram.diagonal().norm() / gram.norm()) ** 2)
    assert measured(turned) == pytest.approx((1 - share, found.effective_rank), 1e-4)
    assert measured(columns @ _basis(r, r)) == pytest.approx((0, r), abs=1e-12)
    worst = torch.ones(m, r, dtype=DOUBLE)  # one direction, the farthest from every axis
    assert measured(worst) == pytest.approx((1 - 1 / r, 1))
