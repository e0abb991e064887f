"""Tensor, expert and hybrid parallelism, uneven and empty shards, against one process."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import ranks
from conda_dist import Conda
from parallel import (
    BATCHES,
    CUBES,
    DENSE,
    EXPERTS,
    MATRICES,
    S0,
    S1,
    Layout,
    far,
    strided,
    train,
)

CUBE: Layout = ((2, 2, 2), [S1, strided(0, 2), S0])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"basis_budget": 0, "buffer_bytes": 1},
    {"nesterov": True},
    {"basis_budget": 0, "buffer_bytes": 1, "nesterov": True},
]
STEP = ("nesterov",)
"""Options that change the step, on one process as well."""


@pytest.mark.parametrize(
    ("layout", "shapes", "options"),
    [
        (at, shapes, OPTIONS[i % 4])
        for shapes, layouts in ((MATRICES, DENSE + CUBES), (EXPERTS, [*BATCHES, CUBE]))
        for i, at in enumerate(layouts)
    ],
    ids=str,
)
def test_follows_one_process(
    layout: Layout, shapes: dict[str, tuple[int, ...]], options: dict[str, Any]
) -> None:
    alone = train(None, shapes, {name: options[name] for name in STEP if name in options})
    world = torch.Size(layout[0]).numel()
    for ended in ranks.run(world, train, layout, shapes, options, timeout=90):
        assert far(ended, alone) < 1e-5


def test_elements_that_are_not_numbers_are_refused() -> None:
    """Such as weights that are cast to float8 as they are gathered."""
    inner = torch.randn(4, 4)
    param = nn.Parameter(TwoTensor(inner, inner.clone()))
    optimizer = Conda([{"params": [("w", param)], "algorithm": "conda"}])
    with pytest.raises(ValueError, match="w: its elements are a TwoTensor"):
        optimizer.report(show=False)
