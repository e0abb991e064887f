"""Elementwise work compiled: the same steps, in kernels made once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import models
import ranks
from conda_dist import Conda
from models import PLAIN, Layout

SHAPES = [(24, 16), (16, 40), (2, 16, 16), (1, 5), (9, 1), (1, 1), (12, 12)]
STEPS = 7


def _trained(shapes: list[tuple[int, ...]], **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    group = {"params": params, "algorithm": "conda"}
    optimizer = Conda([group], update_proj_gap=3, weight_decay=0.1, **options)
    for step in range(STEPS):
        group, lr = optimizer.param_groups[0], 0.1 / (step + 1)
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr
        group["betas"] = (0.9 - 0.01 * step, 0.99 - 0.001 * step)  # as OneCycleLR changes them
        for param in params:
            param.grad = torch.randn(param.shape)
        optimizer.step()
    return params


@pytest.mark.parametrize(
    "options",
    [{}, {"state_dtype": torch.bfloat16}, {"lr": torch.tensor(0.1)}],
    ids=["float32", "bfloat16", "tensor lr"],
)
def test_steps_are_the_same(options: dict[str, Any]) -> None:
    # Products are in float32 either way; a moment in bfloat16 may round to its other neighbour.
    tolerance = 1e-3 if "state_dtype" in options else 1e-5
    pairs = zip(_trained(SHAPES, compile=True, **options), _trained(SHAPES, **options), strict=True)
    for ours, usual in pairs:
        torch.testing.assert_close(ours, usual, rtol=0, atol=tolerance)


def test_one_kernel_serves_all_shapes_and_schedules() -> None:
    torch.compiler.reset()
    counters.clear()
    _trained(SHAPES, compile=True)
    assert counters["stats"]["unique_graphs"] == 2  # one for each moment
    _trained([(33, 17), (5, 70), (3, 8, 8)], compile=True)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_nothing_is_compiled_unasked() -> None:
    torch.compiler.reset()  # what was compiled before would not be counted again
    counters.clear()
    _trained(SHAPES)
    rounded = {"state_dtype": torch.bfloat16, "stochastic_rounding": True}
    _trained(SHAPES, compile=True, **rounded)
    _trained(SHAPES, compile=True, second_moment_dtype=torch.uint8, **rounded)
    assert not counters["stats"]


def _run(layout: Layout, compile: bool) -> Any:
    model, optimizer = models.build(layout, compile=compile)
    models.train(model, optimizer, range(8))
    assert bool(counters["stats"]["unique_graphs"]) is compile
    return models.snapshot(model, optimizer, models.whole)


def test_on_shards() -> None:
    counters.clear()
    usual = _run(PLAIN, False)
    for ours in ranks.run(2, _run, ("fsdp", (2,)), True):
        assert ours.keys() == usual.keys()
        for name in (name for name in ours if ":" not in name):  # signs of bases are free
            torch.testing.assert_close(ours[name], usual[name], rtol=0, atol=1e-5)
