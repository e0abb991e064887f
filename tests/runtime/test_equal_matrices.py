"""Equal matrices of a task are decomposed together, by Cholesky, as on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import ranks
import toys
from conda_dist import Conda, register_refresh_hook
from conda_dist.numerics import decomposition
from conda_dist.options import Options
from conda_dist.rules.conda import CondaRule
from models import attempt
from parallel import far, train

SHAPES = {"a": (12, 8), "b": (12, 8), "wide": (8, 12), "experts": (4, 12, 8), "c": (12, 8)}
"""Seven equal matrices, and another one."""


@pytest.fixture(autouse=True)
def _by_cholesky(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition, "BY_CHOLESKY", {"cpu"})


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each call decomposes."""
    found: list[int] = []
    decompose = decomposition.decompose

    def counted(momenta: Any, *args: Any) -> Any:
        found.append(len(momenta))
        return decompose(momenta, *args)

    monkeypatch.setattr(decomposition, "decompose", counted)
    return found


def _conda(
    shapes: dict[str, tuple[int, ...]] = SHAPES, **options: Any
) -> tuple[list[nn.Parameter], Conda]:
    params = toys.parameters(*shapes.values())
    group = {"params": list(zip(shapes, params, strict=True)), "algorithm": "conda"}
    given = {"refresh_method": "orthogonal_iteration", "update_proj_gap": 1, **options}
    return params, Conda([group], **given)


def _trained(**options: Any) -> list[Tensor]:
    params, optimizer = _conda(**options)
    toys.take(optimizer, params, toys.gradients(params, 5))
    return params


def test_the_step_is_the_same_as_one_by_one(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit. The first bases are from the SVD, one after another."""
    together = _trained()
    assert sizes == [1] * 8 + [7, 1] * 4
    sizes.clear()
    monkeypatch.setattr(CondaRule, "refreshed_together", lambda *_: 1)
    alone = _trained()
    assert sizes == [1] * 8 * 5
    assert toys.same(together, alone)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_batch_takes_no_more_than_a_tasks_memory(at_once: int, sizes: list[int]) -> None:
    needed = decomposition.batched_bytes(torch.empty(12, 8))
    buffer = 5 * (at_once + 1) * needed // 2 - 5
    assert Options(buffer_bytes=buffer).task_bytes // needed == at_once
    _trained(buffer_bytes=buffer)
    assert max(sizes) == at_once
    assert sum(sizes) == 8 * 5


def test_each_matrix_has_its_own_outcome() -> None:
    params, optimizer = _conda()
    toys.take(optimizer, params, toys.gradients(params, 2))
    a, b, _, experts, c = params
    grads = toys.gradients(params, 1, seed=2)
    grads[0][0][3, 4] = torch.nan
    for moment in (optimizer.state[b]["exp_avg"], optimizer.state[experts]["exp_avg"][2]):
        moment.zero_()
    grads[0][1].zero_()
    grads[0][3][2] = 0
    before = {param: optimizer.state[param]["basis"].clone() for param in params}
    with pytest.warns(RuntimeWarning, match="a: the basis could not be refreshed at step 2"):
        toys.take(optimizer, params, grads)
    changed = {param: optimizer.state[param]["basis"] != before[param] for param in params}
    assert not changed[a].any()
    assert not changed[b].any()
    assert changed[c].any()
    assert [bool(each.any()) for each in changed[experts]] == [True, True, False, True]
    assert optimizer.state[a]["basis_step"] == 1
    assert optimizer.state[b]["basis_step"] == 2
    assert optimizer.state[c]["basis_step"] == 2


def test_hooks_are_told_of_each_matrix() -> None:
    params, optimizer = _conda()
    grads = toys.gradients(params, 3)
    toys.take(optimizer, params, grads[:1])
    told: list[str] = []
    with register_refresh_hook(told.append):
        toys.take(optimizer, params, grads[1:2])
    assert sorted(told) == ["a", "b", "c", *["experts"] * 4, "wide"]

    def refuse(name: str) -> None:
        if name == "b":
            raise ValueError(f"no more of {name}")

    with register_refresh_hook(refuse):
        said = attempt(toys.take, optimizer, params, grads[2:])
    assert "Conda could not refresh its bases: rank 0: ValueError: no more of b" in said
    toys.take(optimizer, params, grads[2:])


def test_an_error_names_the_matrices_of_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = _conda({"a": (12, 8), "b": (12, 8), "other": (9, 8)})
    grads = toys.gradients(params, 2)
    toys.take(optimizer, params, grads[:1])
    factors = decomposition.cholesky_factors

    def broken(grams: Tensor) -> Any:
        if len(grams) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return factors(grams)

    monkeypatch.setattr(decomposition, "cholesky_factors", broken)
    said = attempt(toys.take, optimizer, params, grads[1:])
    assert "an illegal memory access was encountered" in said
    assert "while decomposing the momentum of a, b)" in said


def test_diagnostics_are_the_same_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def spectra() -> list[Any]:
        params, optimizer = _conda(diagnostics_every=1)
        toys.take(optimizer, params, toys.gradients(params, 3))
        return [weight.spectra for weight in optimizer._path.weights]

    together = spectra()
    assert [len(each) for each in together] == [1, 1, 1, 4, 1]
    monkeypatch.setattr(CondaRule, "refreshed_together", lambda *_: 1)
    assert spectra() == together


def _train_by_cholesky(layout: Any, options: dict[str, Any]) -> tuple[Any, int]:
    """The trained weights, and the largest number of matrices that this rank decomposed at once."""
    largest, factors = [0], decomposition.cholesky_factors
    before = decomposition.BY_CHOLESKY

    def counted(grams: Tensor) -> Any:
        largest.append(len(grams))
        return factors(grams)

    decomposition.BY_CHOLESKY, decomposition.cholesky_factors = frozenset({"cpu"}), counted
    try:
        given = {"refresh_method": "orthogonal_iteration", **options}
        return train(layout, SHAPES, given), max(largest)
    finally:
        decomposition.BY_CHOLESKY, decomposition.cholesky_factors = before, factors


@pytest.mark.parametrize("options", [{}, {"basis_budget": 0, "buffer_bytes": 1}], ids=str)
def test_on_shards(options: dict[str, Any]) -> None:
    """A rank has other matrices beside each one than a single process has."""
    alone, together = _train_by_cholesky(None, {})
    assert together == 7
    for ended, largest in ranks.run(2, _train_by_cholesky, ((2,), [Shard(0)]), options):
        assert far(ended, alone) < 1e-5
        assert (largest > 1) == (not options)
