"""Tensor, expert and hybrid parallelism, uneven and empty shards, against one process."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.two_tensor import TwoTensor

import ranks
from conda_dist import Conda
from parallel import EXPERTS, MATRICES, Layout, far, train

S0, S1, S2, ALL = Shard(0), Shard(1), Shard(2), Replicate()


def _strided(dim: int, factor: int) -> Placement:
    return _StridedShard(dim, split_factor=factor)


DENSE: list[Layout] = [
    ((2, 2), [_strided(0, 2), S0]),  # FSDP over column-wise TP
    ((2, 2), [_strided(1, 2), S1]),  # FSDP by columns over row-wise TP
    ((2, 2), [S0, S1]),  # FSDP over row-wise TP
    ((2, 2), [S0, ALL]),  # FSDP over what TP replicates
    ((2, 3), [_strided(0, 3), S0]),
    ((2, 2, 2), [ALL, _strided(0, 2), S0]),  # HSDP over column-wise TP
    ((2, 2, 2), [ALL, S0, S1]),  # HSDP over row-wise TP
    ((2, 1, 2), [S0, ALL, S1]),
]
BATCHES: list[Layout] = [
    ((4,), [S0]),  # more ranks than experts
    ((2, 2), [S0, S1]),
    ((2, 2), [S0, S2]),
    ((2, 2), [_strided(0, 2), S0]),  # expert parallelism
    ((2, 2), [S1, S0]),  # the same with more ranks than experts
    ((2, 2), [S2, S0]),
    ((2, 2, 2), [S1, _strided(0, 2), S0]),
]


@pytest.mark.parametrize("options", [{}, {"basis_budget": 0, "buffer_bytes": 1}], ids=str)
@pytest.mark.parametrize(
    ("layout", "shapes"),
    [*((at, MATRICES) for at in DENSE), *((at, EXPERTS) for at in BATCHES)],
    ids=str,
)
def test_follows_one_process(
    layout: Layout, shapes: dict[str, tuple[int, ...]], options: dict[str, Any]
) -> None:
    alone = train(None, shapes, {})
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
