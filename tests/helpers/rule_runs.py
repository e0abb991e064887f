"""Matrices that a rule trains on given gradients, in one process or on a layout."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import models
from conda_dist import NAMO, NAMO_D, Conda, Muon, NorMuon
from parallel import ALL, BATCHES, DENSE, EXPERTS, MATRICES, Layout

SETTINGS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
STEPS = 4
OPTIMIZERS: dict[str, Any] = {"muon": Muon, "normuon": NorMuon, "namo": NAMO, "namo_d": NAMO_D}
RIVALS = ("normuon", "namo", "namo_d")
FROM_GRADIENTS: dict[str, Any] = {
    "basis_source": "gradients",
    "update_proj_gap": 2,
    "nesterov": True,
    "refresh_method": "orthogonal_iteration",
}
WHOLE = (*RIVALS, "gradients")
"""Rules on whole matrices that have states of other shapes than (m, n)."""
EVERY_LAYOUT = [*((at, MATRICES) for at in DENSE), *((at, EXPERTS) for at in BATCHES)]
FUSED = {"qkv": (16, 6), "wide": (8, 20)}


def value(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """A gradient; of step -1, the weight to start from."""
    return models.gradient(name, torch.empty(shape), step)


def parameters(shapes: Mapping[str, tuple[int, ...]], layout: Layout | None) -> Any:
    params: dict[str, nn.Parameter] = {}
    mesh = init_device_mesh("cpu", layout[0]) if layout is not None else None
    for name, shape in shapes.items():
        whole = value(name, shape, -1)
        params[name] = nn.Parameter(placed(whole, mesh, layout))
    return params


def placed(whole: Tensor, mesh: Any, layout: Layout | None) -> Tensor:
    if layout is None:
        return whole
    start = [ALL] * mesh.ndim
    replicated = DTensor.from_local(whole, mesh, start, run_check=False)
    return replicated.redistribute(mesh, layout[1])


def make(rule: str, params: Mapping[str, nn.Parameter], group: Any = None, **options: Any) -> Any:
    """An optimizer of matrices; ``group``: further keys of their group.

    "gradients" is Conda with bases from gradients.
    """
    options = {**SETTINGS, **options}
    named = {"params": list(params.items()), **(group or {})}
    if rule == "gradients":
        return Conda([{**named, "algorithm": "conda"}], **{**FROM_GRADIENTS, **options})
    return OPTIMIZERS[rule]([{**named, "algorithm": rule}], **options)


def train(
    params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range
) -> None:
    for step in steps:
        for name, param in params.items():
            grad = value(name, tuple(param.shape), step).to(param.dtype)
            if isinstance(param, DTensor):
                layout = (tuple(param.device_mesh.shape), list(param.placements))
                grad = placed(grad, param.device_mesh, layout)
            param.grad = grad
        optimizer.step()


def ended(
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout | None,
    group: Any = None,
    rule: str = "muon",
    **options: Any,
) -> dict[str, Tensor]:
    """The whole weights after STEPS steps; ``group``: further keys of their group."""
    params = parameters(shapes, layout)
    optimizer = make(rule, params, group, **options)
    train(params, optimizer, range(STEPS))
    if group is None and rule in OPTIMIZERS:  # parts have states of their own names
        more = {"second_moment"} if rule in RIVALS else set()
        assert set(next(iter(optimizer.state.values()))) == {"step", "momentum_buffer"} | more
    return {name: models.whole(param) for name, param in params.items()}
