"""Ways to take a basis from the momentum: their accuracy, their signs, and on shards."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Shard

import ranks
import toys
from conda_dist import Conda
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
    outcome, rotation = decompose(momentum, right, method)
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
    assert decompose(torch.zeros(4, 3), True, method) == (Outcome.ZERO, None)
    for wrong in (math.nan, math.inf):
        momentum = _momentum((12, 12))
        momentum[3, 4] = wrong
        assert decompose(momentum, True, method) == (Outcome.NOT_FINITE, None)


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
