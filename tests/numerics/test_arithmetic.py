"""The arithmetic of a step, each identity by itself."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import toys
from conda_dist import Conda
from conda_dist.numerics import arithmetic, decomposition
from conda_dist.numerics.arithmetic import Hyper
from conda_dist.numerics.decomposition import Outcome

DOUBLE = torch.float64
HYPER = Hyper(
    lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, scale=0.25, correct_bias=True
)
SIZES = st.integers(1, 12)
SHAPES = st.one_of(st.tuples(SIZES, SIZES), st.tuples(st.integers(1, 3), SIZES, SIZES))


def _right(shape: tuple[int, ...]) -> bool:
    return shape[-2] >= shape[-1]


# Projection


@given(SHAPES, st.data())
@settings(max_examples=100, deadline=None)
def test_projection_commutes_with_slicing(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Rows for "right", columns for "left": a rank with a slice needs no other."""
    right, r = _right(shape), min(shape[-2:])
    x, basis = toys.random(*shape, dtype=DOUBLE), toys.orthogonal(*shape[:-2], r, r)
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
    x, basis = toys.random(*shape, dtype=DOUBLE), toys.orthogonal(*shape[:-2], r, r)
    there = arithmetic.project(x, basis, right)
    assert there.shape == x.shape
    torch.testing.assert_close(arithmetic.project_back(there, basis, right), x, rtol=0, atol=1e-12)
    expected = x @ basis if right else basis.mT @ x
    torch.testing.assert_close(there, expected, rtol=0, atol=1e-13)


def test_projection_dtypes() -> None:
    """Products in the dtype asked for, results in the basis's; arguments stay as they are."""
    x, basis = toys.random(6, 4, dtype=torch.bfloat16), toys.orthogonal(4, 4, dtype=torch.float32)
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
    basis = toys.orthogonal(*shape[:-2], r, r)
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
    momentum, basis = toys.random(*shape, dtype=DOUBLE), toys.orthogonal(r, r)
    exp_avg = arithmetic.project(momentum, basis, right)
    outcome, rotation, _ = decomposition.decompose([exp_avg], right)[0]
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
    rotation = toys.orthogonal(4, 4)
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


# The step


def test_step_size_and_keep() -> None:
    plain = Hyper(0.1, 0.9, 0.99, 1e-8, 0.5, 0.25, correct_bias=False)
    assert plain.step_size(3) == pytest.approx(0.025)
    assert plain.keep == pytest.approx(0.95)
    corrected = 0.1 * (1 - 0.99**3) ** 0.5 / (1 - 0.9**3)
    assert HYPER.step_size(3) == pytest.approx(0.25 * corrected)
    assert HYPER.step_size(10**7) == pytest.approx(0.25 * 0.1)
    ahead = replace(HYPER, nesterov=True)
    corrected = 0.1 * (1 - 0.99**3) ** 0.5 / (1 - 0.9**4)
    assert ahead.step_size(3) == pytest.approx(0.25 * corrected)
    assert replace(ahead, correct_bias=False).step_size(3) == pytest.approx(0.025)


def test_the_first_step_of_nesterov_is_that_of_the_gradient() -> None:
    """With bias correction: N is then the gradient alone, as M is."""
    params, twins = (toys.parameters((6, 4), (3, 5), dtype=DOUBLE) for _ in range(2))
    grads = toys.gradients(params, 1)
    for some, ahead in ((params, False), (twins, True)):
        group = {"params": some, "algorithm": "conda"}
        toys.take(Conda([group], nesterov=ahead, **toys.OPTIONS), some, grads)
    for ours, theirs in zip(params, twins, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE], ids=str)
def test_normalise(dtype: torch.dtype, nesterov: bool) -> None:
    """Arithmetic in the basis's dtype; moments of fewer bits are rounded once."""
    work = torch.promote_types(dtype, torch.float32)
    grad, exp_avg = toys.random(5, 4, dtype=work), toys.random(5, 4, seed=1, dtype=dtype)
    exp_avg_sq = toys.random(5, 4, seed=2, dtype=dtype).square()
    second = 0.99 * exp_avg_sq.to(work) + (1 - 0.99) * grad**2
    first = 0.9 * exp_avg.to(work) + 0.1 * grad if nesterov else exp_avg.to(work)
    expected = first / (second.sqrt() + 1e-8)
    before, held = exp_avg.clone(), exp_avg_sq
    result = arithmetic.normalise_(grad, exp_avg, exp_avg_sq, replace(HYPER, nesterov=nesterov))
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
@pytest.mark.parametrize(
    ("betas", "nesterov"),
    [
        *(((0.9, 0.99), False), ((0.0, 0.0), False), ((0.999999, 0.9999999), False)),
        *(((0.9, 0.99), True), ((0.5, 0.9), True), ((0.99, 0.999), True)),
    ],
)
@pytest.mark.parametrize("shape", [(33, 17), (3, 5, 8), (1, 1)])
def test_one_pass_is_the_same_step(
    shape: tuple[int, ...], betas: tuple[float, float], nesterov: bool, out: bool
) -> None:
    """Also from zero, where eps is all there is below, and for what is not finite."""
    hyper = Hyper(0.1, *betas, 0.1, 0.3, 0.25, correct_bias=True, nesterov=nesterov)
    for dtype in (torch.float32, DOUBLE):
        grad, exp_avg, exp_avg_sq = (toys.random(*shape, seed=i, dtype=dtype) for i in range(3))
        exp_avg_sq.square_()
        for moment in (exp_avg, exp_avg_sq):
            moment.view(-1)[::2] = 0
        grad.view(-1)[::3] = 0
        if not nesterov:  # its M is NaN then: inf - inf
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


@pytest.mark.parametrize(
    "options",
    [{}, {"matmul_dtype": torch.bfloat16}, {"nesterov": True}],
    ids=str,
)
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
    y, basis = toys.random(*shape, dtype=DOUBLE), toys.orthogonal(*shape[:-2], r, r)
    param, fused = (toys.random(*shape, seed=1, dtype=DOUBLE) for _ in range(2))
    update = arithmetic.project_back(y, basis, right)
    step_size = float(hyper.step_size(4))
    expected = (param - step_size * update) * (1 - float(lr) * weight_decay)
    arithmetic.apply_(param, update, 4, hyper)
    arithmetic.project_back_and_apply_(fused, y, basis, right, 4, hyper)
    torch.testing.assert_close(param, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-13)
