"""The factory that trainers find by its import path makes what param_groups makes."""

from typing import Any

import pytest
import torch
from torch import nn

from conda_dist import Conda, param_groups
from conda_dist.integrations.factory import conda


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(16, 8),
            "q_proj": nn.Linear(8, 8),
            "k_proj": nn.Linear(8, 4, bias=False),
            "lm_head": nn.Linear(8, 16, bias=False),
        }
    )


def _groups(optimizer: Conda) -> list[tuple[Any, ...]]:
    return [
        (g["algorithm"], g["lr"], g["param_names"], g["splits"]) for g in optimizer.param_groups
    ]


def test_names_of_parameters() -> None:
    """Of a model and of its parameters(), which torchtune and verl pass."""
    made = model()
    expected = _groups(Conda(param_groups(made), lr=0.1))
    assert [group[2] for group in expected if group[0] == "conda"] == [
        ["q_proj.weight", "k_proj.weight"]
    ]
    for params in (made, made.parameters()):
        optimizer = conda(params, lr=0.1, update_proj_gap=3)
        assert _groups(optimizer) == expected
        assert optimizer.param_groups[0]["update_proj_gap"] == 3


def test_options_and_frozen_parameters() -> None:
    made = model()
    made.get_submodule("embed_tokens").requires_grad_(False)
    optimizer = conda(
        made.parameters(), adamw_params=["k_proj.*"], splits={"q_proj.weight": 2}, weight_decay=0.1
    )
    assert _groups(optimizer) == [
        ("conda", 1e-2, ["q_proj.weight"], (4, 4)),
        ("adamw", 1e-2, ["q_proj.bias", "k_proj.weight", "lm_head.weight"], None),
    ]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


def test_parameters_without_names() -> None:
    made = model()
    ended = made.parameters()
    assert len(list(ended)) == 5
    begun = made.parameters()
    next(begun)  # this parameter would be left out
    for params in (list(made.parameters()), (p for p in made.parameters()), begun, ended):
        with pytest.raises(TypeError, match=r"params must be a model or model\.parameters\(\)"):
            conda(params)
