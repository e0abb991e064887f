"""Bases from gradients: when a matrix gets its first ones, and when it keeps those it has."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rule_runs
from conda_dist import Conda, register_refresh_hook
from conda_dist.numerics import arithmetic


def _from_gradients(shape: tuple[int, ...], **options: Any) -> tuple[nn.Parameter, Any]:
    weight = nn.Parameter(rule_runs.value("w", shape, -1))
    return weight, rule_runs.make("gradients", {"w": weight}, **options)


def test_an_idle_expert_gets_its_bases_with_its_first_gradient() -> None:
    """Whenever that is, and none before; its first gradient does not move it, its second does."""
    weight, optimizer = _from_gradients((2, 6, 6), update_proj_gap=100, weight_decay=0.0)
    begins = (0, 3)
    moved, based = [], []
    for step in range(6):
        before = weight.detach().clone()
        weight.grad = rule_runs.value("w", (2, 6, 6), step)
        for expert, first in enumerate(begins):
            weight.grad[expert] *= step >= first
        optimizer.step()
        moved.append((weight.detach() != before).flatten(1).any(1).tolist())
        based.append((optimizer.state[weight]["basis_step"] >= 0).tolist())
    for expert, first in enumerate(begins):
        assert [row[expert] for row in based] == [step >= first for step in range(6)]
        assert [row[expert] for row in moved] == [step > first for step in range(6)]


def test_a_refresh_that_fails_is_tried_again_in_every_step() -> None:
    """A warning says which matrix it was, and the third failure in a row ends the run."""
    weight, optimizer = _from_gradients((3, 4, 4), update_proj_gap=4)
    rule_runs.train({"w": weight}, optimizer, range(4))
    state = optimizer.state[weight]
    before, gram = state["left_basis"].clone(), state["left_gram"].clone()
    state["left_gram"][1] = float("nan")
    for step in (4, 5):
        said = rf"w \(matrix 1 of the batch\): the basis could not be refreshed at step {step}, "
        said += f"because its average of Gram matrices is not finite.*Failure {step - 3} in a row"
        with pytest.warns(RuntimeWarning, match=said):
            rule_runs.train({"w": weight}, optimizer, [step])
    assert _same(state["left_basis"], before) == [False, True, False]
    before = state["left_basis"].clone()
    state["left_gram"].copy_(gram)
    rule_runs.train({"w": weight}, optimizer, [6])
    assert _same(state["left_basis"], before) == [True, False, True]
    before = state["left_basis"].clone()
    rule_runs.train({"w": weight}, optimizer, [7])
    assert _same(state["left_basis"], before) == [True, True, True]
    state["left_gram"][1] = float("nan")
    for step in (8, 9):
        with pytest.warns(RuntimeWarning, match=f"Failure {step - 7} in a row"):
            rule_runs.train({"w": weight}, optimizer, [step])
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="Failure 3 in a row"):
        rule_runs.train({"w": weight}, optimizer, [10])


def _same(batch: Tensor, before: Tensor) -> list[bool]:
    """Which matrices are as they were."""
    same: list[bool] = (batch == before).flatten(1).all(1).tolist()
    return same


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
@pytest.mark.parametrize("at", [0, 2])
def test_a_gradient_that_is_not_finite_is_in_no_average_of_gram_matrices(
    bad: float, at: int
) -> None:
    """Nor is one whose square is not. If it is the first, the next one gives the bases."""
    weight, optimizer = _from_gradients((2, 4, 4), update_proj_gap=1)
    rule_runs.train({"w": weight}, optimizer, range(at))
    before = optimizer.state[weight].get("left_gram", torch.zeros(2, 4, 4)).clone()
    weight.grad = rule_runs.value("w", (2, 4, 4), at)
    weight.grad[1, 0, 0] = bad
    optimizer.step()
    state = optimizer.state[weight]
    assert _same(state["left_gram"], before) == [False, True]
    rule_runs.train({"w": weight}, optimizer, range(at + 1, at + 4))
    assert state["left_basis"].isfinite().all()
    assert state["left_basis"].flatten(1).any(1).all()
    assert weight[0].isfinite().all()
    assert weight[1].isfinite().all() == (at == 0 or bad == 1e20)


def test_hooks_are_told_of_each_matrix() -> None:
    weight, optimizer = _from_gradients((2, 6, 4), update_proj_gap=3)
    told: list[str] = []
    with register_refresh_hook(told.append):
        rule_runs.train({"w": weight}, optimizer, range(7))
    assert told == ["w"] * 6


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_constant_gradient_moves_a_number_by_the_rate(nesterov: bool) -> None:
    """The bias is corrected for the gradients that are in the moments: not for the first one."""
    weight, optimizer = _from_gradients(
        (1, 1), nesterov=nesterov, weight_decay=0.0, lr=0.5, scale=0.5, eps=0.0, betas=(0.9, 0.99)
    )
    before = weight.detach().clone()
    for step in range(5):
        weight.grad = torch.full((1, 1), 3.0)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), before - 0.25 * step)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_bias_is_corrected_for_each_matrix(nesterov: bool) -> None:
    """One whose gradients begin later takes the same steps, only later."""
    ended = []
    for begins in (0, 3):
        weight, optimizer = _from_gradients(
            (2, 4, 4), nesterov=nesterov, weight_decay=0.0, update_proj_gap=100
        )
        for step in range(8):
            weight.grad = rule_runs.value("w", (2, 4, 4), step)
            weight.grad[1] = rule_runs.value("late", (4, 4), step - begins) * (step >= begins)
            optimizer.step()
            if step == begins + 4:
                ended.append(weight[1].detach().clone())
        assert optimizer.state[weight]["averaged"].tolist() == [[7], [7 - begins]]
    torch.testing.assert_close(*ended)


def test_an_idle_matrix_does_not_move_without_eps() -> None:
    """Neither before its first gradient nor with it, which is in no moment: both are 0 / 0."""
    weight, optimizer = _from_gradients((2, 4, 4), weight_decay=0.0, eps=0.0)
    before = weight.detach().clone()
    for step in range(3):
        weight.grad = rule_runs.value("w", (2, 4, 4), step)
        weight.grad[1] *= step > 1
        optimizer.step()
        assert torch.equal(weight[1], before[1])
        assert torch.equal(weight[0], before[0]) == (step == 0)
        assert weight.isfinite().all()


def test_gradients_of_any_strides_give_the_same() -> None:
    ended = []
    for order in ((0, 1, 2, 3), (1, 0, 2, 3), (0, 1, 3, 2)):
        weight, optimizer = _from_gradients((2, 3, 5, 5), update_proj_gap=2)
        for step in range(4):
            grad = rule_runs.value("w", (2, 3, 5, 5), step)
            inverse = [order.index(d) for d in range(4)]
            weight.grad = grad.permute(order).contiguous().permute(inverse)
            assert torch.equal(weight.grad, grad)
            optimizer.step()
        ended.append(weight.detach())
    for other in ended[1:]:
        torch.testing.assert_close(ended[0], other)


@pytest.mark.parametrize("batch", [(), (2,), (2, 2)])
def test_a_gram_matrix_of_rounded_gradients_is_not_rounded(batch: tuple[int, ...]) -> None:
    """A product in bfloat16 would lose the eigenvalues below 1/256 of the greatest."""
    torch.manual_seed(0)
    spectrum = torch.logspace(0, -3, 8)
    x = torch.linalg.qr(torch.randn(*batch, 32, 8)).Q * spectrum
    x = (x @ torch.linalg.qr(torch.randn(8, 8)).Q).bfloat16()
    gram = torch.zeros(*batch, 8, 8)
    arithmetic.average_gram_(gram, x.float(), 0.5, torch.bfloat16)
    exact = 0.5 * x.double().mT @ x.double()
    torch.testing.assert_close(gram.double(), exact, rtol=1e-5, atol=1e-7)


def test_a_loaded_expert_without_bases_gets_them_with_its_first_gradient() -> None:
    """Also if the optimizer that loads it has bases of all experts, and has taken as many steps."""

    def trained(experts: int) -> tuple[nn.Parameter, Any]:
        weight, optimizer = _from_gradients((2, 6, 6), update_proj_gap=100)
        for step in range(3):
            weight.grad = rule_runs.value("w", (2, 6, 6), step)
            weight.grad[experts:] = 0
            optimizer.step()
        return weight, optimizer

    _, saved = trained(1)
    weight, optimizer = trained(2)
    optimizer.load_state_dict(saved.state_dict())
    assert (optimizer.state[weight]["basis_step"] >= 0).tolist() == [True, False]
    weight.grad = rule_runs.value("w", (2, 6, 6), 3)
    optimizer.step()
    assert (optimizer.state[weight]["basis_step"] >= 0).tolist() == [True, True]


def test_a_checkpoint_of_another_source_is_refused() -> None:
    """The error says which source to give, and nothing has changed."""
    for splits in (None, (2, 4)):
        made: list[tuple[nn.Parameter, Any]] = []
        for source in ("gradients", "momentum"):
            weight = nn.Parameter(rule_runs.value("w", (6, 6), -1))
            group = {"splits": splits}
            options = {"basis_source": source, "refresh_method": "svd"}
            made.append((weight, rule_runs.make("gradients", {"w": weight}, group, **options)))
            rule_runs.train({"w": weight}, made[-1][1], range(2))
        pairs = zip(made, made[::-1], ("momentum", "gradients"), strict=True)
        for (weight, optimizer), (_, other), source in pairs:
            before = {key: each.clone() for key, each in optimizer.state[weight].items()}
            with pytest.raises(
                ValueError, match=f'w: the checkpoint.*give basis_source="{source}"'
            ):
                optimizer.load_state_dict(other.state_dict())
            after = optimizer.state[weight]
            assert all(torch.equal(each, after[key]) for key, each in before.items())


def _by_orthogonal_iteration(weight: Tensor, grads: list[Tensor], gap: int) -> Tensor:
    """The steps with bases from gradients, in float64.

    With b1 = b2 = 0.9, rate 0.1, without decay and eps.
    """
    w = weight.clone()
    m, n = w.shape
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    sizes = {side: size for side, size, has in (("l", m, m <= n), ("r", n, n <= m)) if has}
    grams = {side: torch.zeros(size, size, dtype=w.dtype) for side, size in sizes.items()}
    bases: dict[str, Tensor] = {}
    for step, grad in enumerate(grads):
        first = 0.9 * first + 0.1 * grad
        for side in grams:
            grams[side] = 0.9 * grams[side] + 0.1 * (
                grad @ grad.T if side == "l" else grad.T @ grad
            )
        if not step:
            bases = {side: torch.linalg.eigh(gram)[1].flip(1) for side, gram in grams.items()}
            first.zero_()
            continue
        if step % gap == 0:
            bases = {side: torch.linalg.qr(gram @ bases[side]).Q for side, gram in grams.items()}
        left = bases.get("l", torch.eye(m, dtype=w.dtype))
        right = bases.get("r", torch.eye(n, dtype=w.dtype))
        second = 0.9 * second + 0.1 * (left.T @ grad @ right) ** 2
        update = left @ ((left.T @ first @ right) / second.sqrt()) @ right.T
        w -= 0.1 * math.sqrt(1 - 0.9**step) / (1 - 0.9**step) * update
    return w


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_orthogonal_iteration_is_a_qr_decomposition_of_the_gram_matrix(
    shape: tuple[int, int],
) -> None:
    weight = nn.Parameter(rule_runs.value("w", shape, -1).double())
    grads = [rule_runs.value("w", shape, step).double() for step in range(12)]
    expected = _by_orthogonal_iteration(weight.detach(), grads, 2)
    optimizer = Conda(
        [{"params": [("w", weight)], "algorithm": "conda"}],
        basis_source="gradients",
        refresh_method="orthogonal_iteration",
        update_proj_gap=2,
        betas=(0.9, 0.9),
        lr=0.1,
        scale=1.0,
        eps=0.0,
    )
    for grad in grads:
        weight.grad = grad
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-8, atol=1e-9)
