"""Bases from gradients: when a matrix gets its first ones, and when it keeps those it has."""

from typing import Any

import pytest
import torch
from torch import nn

import rule_runs


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
        based.append(optimizer.state[weight]["left_basis"].flatten(1).any(1).tolist())
    for expert, first in enumerate(begins):
        assert [row[expert] for row in based] == [step >= first for step in range(6)]
        assert [row[expert] for row in moved] == [step > first for step in range(6)]


def test_bases_of_gradients_that_are_not_finite_are_kept() -> None:
    weight, optimizer = _from_gradients((4, 4), update_proj_gap=1)
    rule_runs.train({"w": weight}, optimizer, range(2))
    before = optimizer.state[weight]["left_basis"].clone()
    weight.grad = torch.full((4, 4), float("nan"))
    with pytest.warns(RuntimeWarning, match="w: the bases could not be refreshed at step 3.*NaN"):
        optimizer.step()
    assert torch.equal(optimizer.state[weight]["left_basis"], before)
    assert before.any()


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
    basis = optimizer.state[weight]["left_basis"]
    assert basis.flatten(1).any(1).tolist() == [True, False]
    weight.grad = rule_runs.value("w", (2, 6, 6), 3)
    optimizer.step()
    assert basis.flatten(1).any(1).tolist() == [True, True]
