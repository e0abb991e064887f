"""Muon is torch.optim.Muon, bit for bit, on every layout."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import models
import ranks
import rule_runs
from conda_dist import Muon, param_groups
from parallel import ALL, EXPERTS, MATRICES, S0, S1, Layout
from rule_runs import EVERY_LAYOUT, FUSED, SETTINGS, STEPS


def _torch_s(
    shapes: Mapping[str, tuple[int, ...]], splits: tuple[int, ...] | None = None, **settings: Any
) -> dict[str, Tensor]:
    """What torch.optim.Muon makes of every matrix by itself."""
    ended = {}
    for name, shape in shapes.items():
        whole = rule_runs.value(name, shape, -1)
        parts = [_rows(m, splits) for m in whole.reshape(-1, *shape[-2:])]
        matrices = [nn.Parameter(part) for cut in parts for part in cut]
        optimizer = torch.optim.Muon(matrices, **{**SETTINGS, **settings})
        for step in range(STEPS):
            grads = rule_runs.value(name, shape, step).reshape(-1, *shape[-2:])
            cut = [part for grad in grads for part in _rows(grad, splits)]
            for matrix, grad in zip(matrices, cut, strict=True):
                matrix.grad = grad
            optimizer.step()
        ended[name] = torch.cat(list(matrices)).detach().reshape(shape)
        if splits is not None and sum(splits) != shape[-2]:
            ended[name] = _woven([m.detach() for m in matrices], splits)
    return ended


def _rows(matrix: Tensor, splits: tuple[int, ...] | None) -> list[Tensor]:
    """The parts of a matrix whose splits repeat down it."""
    if splits is None:
        return [matrix.clone()]
    periods = [block.split(splits) for block in matrix.split(sum(splits))]
    return [torch.cat(pieces) for pieces in zip(*periods, strict=True)]


def _woven(parts: list[Tensor], splits: tuple[int, ...]) -> Tensor:
    pieces = [part.split(rows) for part, rows in zip(parts, splits, strict=True)]
    return torch.cat([piece for period in zip(*pieces, strict=True) for piece in period])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "momentum": 0.5},
        {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
        pytest.param(
            {"adjust_lr_fn": "spectral_unclamped", "ns_coefficients": (2.0, -1.5, 0.5)},
            marks=pytest.mark.skipif(
                torch.__version__.startswith("2.11."), reason="torch 2.11's Muon does not have it"
            ),
        ),
        {"lr": torch.tensor(0.03), "weight_decay": 0.0},
        {"eps": 100.0},
    ],
    ids=str,
)
def test_one_process_is_torch_s_muon(options: dict[str, Any]) -> None:
    assert not models.unequal(
        rule_runs.ended(MATRICES, None, **options), _torch_s(MATRICES, **options)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("nesterov", [True, False])
def test_other_dtypes_are_torch_s(dtype: torch.dtype, nesterov: bool) -> None:
    starts = [torch.randn(9, 5).to(dtype), torch.randn(4, 8).to(dtype)]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = (
        Muon([{"params": ours, "algorithm": "muon"}], nesterov=nesterov, **SETTINGS),
        torch.optim.Muon(theirs, nesterov=nesterov, **SETTINGS),
    )
    for step in range(STEPS):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for i, param in enumerate(params):
                param.grad = models.gradient(str(i), param, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert optimizers[0].state[ours[0]]["momentum_buffer"].dtype == dtype


@pytest.mark.parametrize(("layout", "shapes"), EVERY_LAYOUT, ids=str)
def test_layouts_are_torch_s_muon(layout: Layout, shapes: dict[str, tuple[int, ...]]) -> None:
    alone = _torch_s(shapes)
    for ended in ranks.run(torch.Size(layout[0]).numel(), rule_runs.ended, shapes, layout):
        assert not models.unequal(ended, alone)


@pytest.mark.parametrize("splits", [(8,), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", [None, ((3,), [S0]), ((2, 2), [ALL, S1])], ids=str)
def test_parts_are_matrices_of_their_own(layout: Layout | None, splits: tuple[int, ...]) -> None:
    expected = _torch_s(FUSED, splits)
    world = 1 if layout is None else torch.Size(layout[0]).numel()
    for ended in ranks.run(world, rule_runs.ended, FUSED, layout, {"splits": splits}):
        assert not models.unequal(ended, expected)


def test_kernels_are_matrices() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Conv2d(4, 6, 3)])})
    kernel = next(param for param in model.parameters() if param.ndim == 4)
    matrix = nn.Parameter(kernel.detach().clone().flatten(1))
    ours = Muon(param_groups(model, kernels=True, rule="muon"), **SETTINGS)
    theirs = torch.optim.Muon([matrix], **SETTINGS)
    for step in range(STEPS):
        kernel.grad = models.gradient("kernel", kernel, step)
        matrix.grad = kernel.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    assert torch.equal(kernel.flatten(1), matrix)


def _replicas() -> dict[str, Tensor]:
    return rule_runs.ended(MATRICES | EXPERTS, None, process_group=dist.group.WORLD)


def test_plain_parameters_with_a_process_group() -> None:
    for ended in ranks.run(2, _replicas):
        assert not models.unequal(ended, _torch_s(MATRICES | EXPERTS))


def test_coefficients_set_in_place_are_checked() -> None:
    param = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([("w", param)], ns_coefficients=[3.4, -4.7, 2.0])  # type: ignore[arg-type]
    for _ in range(2):
        param.grad = torch.ones(4, 6)
        optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["ns_coefficients"][0] = float("nan")
    with pytest.raises(ValueError, match=r"parameter group 0: ns_coefficients\[0\] must be"):
        optimizer.step()
    assert torch.equal(param.detach(), before)
