"""Ways to take a basis from the momentum: their accuracy, their signs, and on shards."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode

import golden
import ranks
import toys
from conda_dist import Conda
from conda_dist.numerics import decomposition
from conda_dist.numerics.decomposition import Outcome, decompose
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
    outcome, rotation, _ = decompose(momentum, right, method)
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
        found = decomposition.cholesky_factor(gram)
        assert found is not None
        r, quarter = len(gram), max(1, len(gram) // 4)
        torch.testing.assert_close(found.mT @ found, torch.eye(r), atol=1e-6, rtol=0)
        overlap = expected[:, :quarter].mT @ found[:, :quarter]
        assert torch.linalg.svdvals(overlap).min() > 0.9999
        assert residual(gram, found) < 1.01 * residual(gram, expected) + 1e-6


@pytest.mark.parametrize("rank", [1, 4, 40, None])
def test_cholesky_of_any_rank(rank: int | None) -> None:
    momentum = _momentum((200, 150), rank)
    found = decomposition.cholesky_factor(momentum.mT @ momentum)
    assert found is not None
    torch.testing.assert_close(found.mT @ found, torch.eye(150), atol=2e-6, rtol=0)


class Reads(TorchDispatchMode):
    """Counts how often one number is read from a tensor: there a host waits for its device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_the_host_reads_a_cholesky_factor_s_errors_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside it a refresh reads the momentum's largest element, and whether P is finite.

    A list of numbers is copied to the host at once, and not counted here.
    """
    monkeypatch.setattr(decomposition, "BY_CHOLESKY", {"cpu"})
    momentum = _momentum((30, 20)) + 0.1 * toys.random(30, 20)
    with Reads() as reads:
        outcome, *_ = decompose(momentum, True, "orthogonal_iteration")
    assert outcome == Outcome.DONE
    assert reads.count == 2


def test_what_cholesky_cannot_factorise_is_householders(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = _golden_grams()[0]
    assert decomposition.cholesky_factor(-gram) is None
    monkeypatch.setattr(decomposition, "BY_CHOLESKY", {"cpu"})
    for given in (gram, -gram):
        found = decomposition._iterated(given)
        expected = decomposition.householder_factor(given)
        torch.testing.assert_close(found.mT @ found, torch.eye(len(gram)), atol=1e-6, rtol=0)
        assert torch.equal(found, expected) == (given is not gram)


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
    assert decompose(torch.zeros(4, 3), True, method) == (Outcome.ZERO, None, None)
    for wrong in (math.nan, math.inf):
        momentum = _momentum((12, 12))
        momentum[3, 4] = wrong
        assert decompose(momentum, True, method) == (Outcome.NOT_FINITE, None, None)


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
