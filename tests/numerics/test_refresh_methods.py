"""Ways to take a basis from the momentum: their accuracy, their signs, and on shards."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Shard

import golden
import ranks
import toys
from conda_dist import Conda
from conda_dist.numerics import decomposition
from conda_dist.numerics.decomposition import Found, Outcome, decompose
from conda_dist.options import REFRESH_METHODS
from parallel import MATRICES, far, train

SHAPES = [(12, 12), (40, 9), (9, 40)]


def _momentum(shape: tuple[int, int], rank: int | None = None) -> Tensor:
    """Of well-separated singular values, the last ones zero if a rank is given."""
    r = min(shape)
    u, _ = torch.linalg.qr(toys.random(shape[0], r, seed=1))
    v, _ = torch.linalg.qr(toys.random(shape[1], r, seed=2))
    values = 2.0 ** -torch.arange(r)
    values[rank if rank is not None else r :] = 0
    return (u * values) @ v.mT


def _basis(momentum: Tensor, method: str) -> Tensor:
    right = momentum.shape[0] >= momentum.shape[1]
    outcome, rotation, _ = decompose([momentum], right, method)[0]
    assert outcome == Outcome.DONE
    assert rotation is not None
    return rotation


def _singular(momentum: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(momentum.double(), full_matrices=False)
    return (vh.mT if momentum.shape[0] >= momentum.shape[1] else u).float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eigenvectors_of_the_gram_matrix_are_singular_vectors(shape: tuple[int, int]) -> None:
    """In their order, which slots of the second moment rely on; the signs are free."""
    momentum = _momentum(shape)
    overlap = _basis(momentum, "eigh64").mT @ _singular(momentum)
    torch.testing.assert_close(overlap.abs(), torch.eye(min(shape)), atol=2e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_iteration_comes_to_the_singular_vectors(shape: tuple[int, int]) -> None:
    momentum, right = _momentum(shape), shape[0] >= shape[1]
    basis, projected = torch.eye(min(shape)), momentum
    for _ in range(25):
        rotation = _basis(projected, "orthogonal_iteration")
        torch.testing.assert_close(rotation.mT @ rotation, torch.eye(min(shape)), atol=1e-5, rtol=0)
        basis = basis @ rotation
        projected = projected @ rotation if right else rotation.mT @ projected
    overlap = basis.mT @ _singular(momentum)
    torch.testing.assert_close(overlap.abs(), torch.eye(min(shape)), atol=1e-3, rtol=0)
    # There it stays, signs and all: what the second moment has learnt keeps its meaning.
    stays = _basis(projected, "orthogonal_iteration")
    torch.testing.assert_close(stays, torch.eye(min(shape)), atol=1e-3, rtol=0)


def _golden_grams() -> list[Tensor]:
    """Gram matrices of the authors' momenta, in the bases that iterations have come to."""
    grams = []
    for name in golden.CASES:
        grads = golden.Case.load(name).tensors["grads"].float()
        momentum, basis = torch.zeros_like(grads[0]), None
        for grad in grads if min(grads[0].shape) > 1 else ():
            momentum = 0.9 * momentum + 0.1 * grad
            tall = momentum if momentum.shape[0] >= momentum.shape[1] else momentum.mT
            if basis is None:
                basis = _singular(momentum)
                continue
            projected = tall @ basis
            projected /= projected.abs().max()
            grams.append(projected.mT @ projected)
            basis = basis @ decomposition.householder_factor(grams[-1])
    return grams


def test_cholesky_agrees_with_householder_on_real_momenta() -> None:
    """In the leading directions, and in how near the momentum comes to diagonal."""

    def residual(gram: Tensor, rotation: Tensor) -> float:
        rotated = rotation.mT @ gram @ rotation
        return float((rotated - rotated.diag().diag()).norm() / rotated.norm())

    grams = _golden_grams()
    assert len(grams) > 100
    for gram in grams:
        expected = decomposition.householder_factor(gram)
        (found,) = decomposition.cholesky_factors(gram[None])
        assert found is not None
        r, quarter = len(gram), max(1, len(gram) // 4)
        torch.testing.assert_close(found.mT @ found, torch.eye(r), atol=1e-6, rtol=0)
        overlap = expected[:, :quarter].mT @ found[:, :quarter]
        assert torch.linalg.svdvals(overlap).min() > 0.9999
        assert residual(gram, found) < 1.01 * residual(gram, expected) + 1e-6


@pytest.mark.parametrize("rank", [1, 4, 40, None])
def test_cholesky_of_any_rank(rank: int | None) -> None:
    momentum = _momentum((200, 150), rank)
    (found,) = decomposition.cholesky_factors((momentum.mT @ momentum)[None])
    assert found is not None
    torch.testing.assert_close(found.mT @ found, torch.eye(150), atol=2e-6, rtol=0)


@pytest.fixture
def by_cholesky(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, as on a GPU."""
    monkeypatch.setattr(decomposition, "BY_CHOLESKY", {"cpu"})


def _count(monkeypatch: pytest.MonkeyPatch, where: Any, *names: str) -> list[str]:
    """A list that gets the name of each function that is called."""
    called: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(where, name, counted(name, getattr(where, name)))
    return called


READS = "tolist", "item", "__float__", "__int__", "__bool__"
"""Methods of a tensor in which a host waits for its device."""


def _equal_ones(count: int, m: int = 30, n: int = 20) -> list[Tensor]:
    """Momenta for which one Newton step is enough."""
    return [_momentum((m, n)) + 0.1 * toys.random(m, n, seed=i) for i in range(count)]


def _slow_one(m: int = 120, n: int = 90) -> Tensor:
    """A momentum that takes two Newton steps."""
    return toys.random(m, 10) @ toys.random(10, n, seed=9)


@pytest.mark.usefixtures("by_cholesky")
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_matrices_share_kernels_and_the_waits_of_the_host(
    count: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wait for all norms, one for all errors of each Newton step, and one for all spectra."""
    momenta = _equal_ones(count, 120, 90)
    if steps == 2:
        momenta[-1] = _slow_one()
    reads = _count(monkeypatch, Tensor, *READS)
    factors = _count(monkeypatch, torch.linalg, "cholesky_ex", "solve_triangular")
    found = decompose(momenta, True, "orthogonal_iteration")
    assert [outcome for outcome, *_ in found] == [Outcome.DONE] * count
    assert factors == ["cholesky_ex", "cholesky_ex", "solve_triangular"]
    assert reads == ["tolist"] * (1 + steps)
    decompose(momenta, True, "orthogonal_iteration", measure=True)
    assert reads == ["tolist"] * (2 * (1 + steps) + 1)


def _is_same(found: Found, expected: Found) -> bool:
    """Bit for bit."""
    if found.rotation is None or expected.rotation is None:
        return found == expected
    same = torch.equal(found.rotation, expected.rotation)
    return same and found._replace(rotation=None) == expected._replace(rotation=None)


@pytest.mark.usefixtures("by_cholesky")
@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 2), (5, 3), *SHAPES, (120, 90)], ids=str)
def test_a_matrix_gets_the_same_rotation_alone_and_beside_others(
    shape: tuple[int, int], dtype: torch.dtype, measure: bool
) -> None:
    """Also where others need fewer Newton steps, or more."""
    right, (m, n) = shape[0] >= shape[1], shape
    momenta = [toys.random(m, n, seed=i) for i in range(5)]
    momenta += [_momentum(shape), 1e30 * _momentum(shape), torch.ones(m, n), _slow_one(m, n)]
    momenta = [momentum.to(dtype) for momentum in momenta]
    before = [momentum.clone() for momentum in momenta]
    found = decompose(momenta, right, "orthogonal_iteration", measure)
    alone = [decompose([each], right, "orthogonal_iteration", measure)[0] for each in momenta]
    assert all(map(_is_same, found, alone))
    assert all(each.spectrum is not None for each in found) == measure
    assert all(map(torch.equal, momenta, before))


@pytest.mark.usefixtures("by_cholesky")
def test_a_matrix_that_fails_leaves_the_others_what_they_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decomposition, "SHIFT", 0.0)  # so that a low rank is not factorised
    good = _equal_ones(3)
    deficient = torch.zeros(30, 20)
    deficient[:, 0] = 1
    broken = [good[0].clone() for _ in range(2)]
    broken[0][3, 4], broken[1][0, 0] = math.nan, math.inf
    householder = _count(monkeypatch, decomposition, "householder_factor")
    expected = [decompose([each], True, "orthogonal_iteration", True)[0] for each in good]
    assert not householder
    momenta = [good[0], torch.zeros(30, 20), broken[0], good[1], deficient, broken[1], good[2]]
    found = decompose(momenta, True, "orthogonal_iteration", True)
    assert householder == ["householder_factor"]
    assert all(map(_is_same, [found[i] for i in (0, 3, 6)], expected))
    assert found[1] == (Outcome.ZERO, None, None)
    assert found[2] == found[5] == (Outcome.NOT_FINITE, None, None)
    monkeypatch.setattr(decomposition, "BY_CHOLESKY", set())
    assert _is_same(found[4], decompose([deficient], True, "orthogonal_iteration", True)[0])


@pytest.mark.usefixtures("by_cholesky")
@pytest.mark.parametrize("fits", [4, 1, 0])
def test_halves_of_a_batch_need_less_memory(fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven matrices; only those that do not fit even alone take Householder's reflections."""
    momenta = _equal_ones(7)
    expected = [decompose([each], True, "orthogonal_iteration", True)[0] for each in momenta]
    sizes, factorise = [], torch.linalg.cholesky_ex

    def limited(matrices: Tensor) -> Any:
        sizes.append(len(matrices))
        if len(matrices) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return factorise(matrices)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", limited)
    householder = _count(monkeypatch, decomposition, "householder_factor")
    found = decompose(momenta, True, "orthogonal_iteration", True)
    assert [each.outcome for each in found] == [Outcome.DONE] * 7
    assert len(householder) == (0 if fits else 7)
    if fits:
        assert all(map(_is_same, found, expected))
        assert sum(size for size in sizes if size <= fits) == 2 * 7  # two factors of each


@pytest.mark.usefixtures("by_cholesky")
@pytest.mark.parametrize("steps", [0, 1])
def test_an_error_that_stays_too_large_is_householders(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decomposition, "NEWTON_STEPS", steps)
    momenta = [*_equal_ones(1, 120, 90), _slow_one()]
    householder = _count(monkeypatch, decomposition, "householder_factor")
    for outcome, rotation, _ in decompose(momenta, True, "orthogonal_iteration"):
        assert outcome == Outcome.DONE
        assert rotation is not None
        torch.testing.assert_close(rotation.mT @ rotation, torch.eye(90), atol=2e-6, rtol=0)
    assert len(householder) == 2 - steps


@pytest.mark.usefixtures("by_cholesky")
@pytest.mark.parametrize(
    ("error", "is_retried"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
    ids=str,
)
def test_errors_where_matrices_are_decomposed_together(
    error: Exception, is_retried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch.linalg, "cholesky_ex", broken)
    momenta = _equal_ones(3)
    if not is_retried:
        with pytest.raises(RuntimeError, match=str(error)):
            decompose(momenta, True, "orthogonal_iteration")
        return
    found = decompose(momenta, True, "orthogonal_iteration")
    monkeypatch.setattr(decomposition, "BY_CHOLESKY", set())
    assert all(map(_is_same, found, decompose(momenta, True, "orthogonal_iteration")))


def test_what_cholesky_cannot_factorise() -> None:
    gram = _golden_grams()[0]
    found, failed = decomposition.cholesky_factors(torch.stack([gram, -gram]))
    assert failed is None
    assert found is not None
    torch.testing.assert_close(found.mT @ found, torch.eye(len(gram)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["orthogonal_iteration"])
def test_training_by_cholesky_is_as_good(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> list[Tensor]:
        params = toys.parameters((24, 16), (12, 20))
        group = {"params": params, "algorithm": "conda"}
        optimizer = Conda([group], refresh_method=method, update_proj_gap=1)
        toys.take(optimizer, params, toys.gradients(params, 12))
        return params

    expected = trained()
    monkeypatch.setattr(decomposition, "BY_CHOLESKY", {"cpu"})
    for ours, theirs in zip(trained(), expected, strict=True):
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", REFRESH_METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("rank", [1, 4, None])
def test_bases_are_orthonormal_whatever_the_momentum(
    method: str, scale: float, rank: int | None
) -> None:
    for shape in SHAPES:
        rotation = _basis(_momentum(shape, rank) * scale, method)
        torch.testing.assert_close(rotation.mT @ rotation, torch.eye(min(shape)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", REFRESH_METHODS)
def test_what_has_no_basis(method: str) -> None:
    assert decompose([torch.zeros(4, 3)], True, method)[0] == (Outcome.ZERO, None, None)
    for wrong in (math.nan, math.inf):
        momentum = _momentum((12, 12))
        momentum[3, 4] = wrong
        assert decompose([momentum], True, method)[0] == (Outcome.NOT_FINITE, None, None)


@pytest.mark.parametrize("method", REFRESH_METHODS)
def test_the_first_basis_is_the_svds(method: str) -> None:
    (param,) = toys.parameters((6, 4))
    optimizer = Conda([{"params": [param], "algorithm": "conda"}], refresh_method=method)
    toys.take(optimizer, [param], toys.gradients([param], 1))
    (twin,) = toys.parameters((6, 4))
    other = Conda([{"params": [twin], "algorithm": "conda"}])
    toys.take(other, [twin], toys.gradients([twin], 1))
    assert torch.equal(optimizer.state[param]["basis"], other.state[twin]["basis"])


@pytest.mark.parametrize("layout", [((4,), [Shard(0)]), ((2, 2), [Shard(0), Shard(1)])], ids=str)
@pytest.mark.parametrize("method", ["orthogonal_iteration", "eigh64"])
def test_on_shards(method: str, layout: Any) -> None:
    options = {"refresh_method": method}
    alone = train(None, MATRICES, options)
    for ended in ranks.run(4, train, layout, MATRICES, options):
        assert far(ended, alone) < 1e-5
    if method == "orthogonal_iteration":
        assert far(train(None, MATRICES, {}), alone) > 1e-3


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="refresh_method must be one of svd, orthogonal_iteration"):
        Conda(toys.parameters(), refresh_method="qr")
