"""Weights of any placements on any mesh, trained on the same gradients as in one process."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import models
from conda_dist import Conda

MATRICES = {"square": (7, 7), "tall": (13, 5), "wide": (5, 13), "even": (8, 16), "short": (2, 9)}
EXPERTS = {"up": (3, 9, 4), "down": (3, 4, 9), "even": (4, 8, 6), "one": (1, 5, 8)}
STEPS = 5
Layout = tuple[tuple[int, ...], list[Placement]]
S0, S1, S2, ALL = Shard(0), Shard(1), Shard(2), Replicate()


def strided(dim: int, factor: int) -> Placement:
    """A shard as FSDP leaves it of what tensor parallelism has cut before."""
    return _StridedShard(dim, split_factor=factor)


DENSE: list[Layout] = [
    ((4,), [S0]),  # FSDP; of some matrices a rank has no row
    ((3,), [S1]),
    ((2, 2), [ALL, S0]),  # HSDP
    ((2, 2), [strided(0, 2), S0]),  # FSDP over column-wise TP
    ((2, 2), [strided(1, 2), S1]),  # FSDP by columns over row-wise TP
    ((2, 2), [S0, S1]),  # FSDP over row-wise TP
    ((2, 2), [S0, ALL]),  # FSDP over what TP replicates
    ((2, 3), [strided(0, 3), S0]),
]
"""Meshes and placements of matrices."""
CUBES: list[Layout] = [
    ((2, 2, 2), [ALL, strided(0, 2), S0]),  # HSDP over column-wise TP
    ((2, 2, 2), [ALL, S0, S1]),  # HSDP over row-wise TP
    ((2, 1, 2), [S0, ALL, S1]),
]
"""The same on meshes of three dimensions."""
BATCHES: list[Layout] = [
    ((4,), [S0]),  # more ranks than experts
    ((3,), [S2]),
    ((2, 2), [S0, S1]),
    ((2, 2), [S0, S2]),
    ((2, 2), [strided(0, 2), S0]),  # expert parallelism
    ((2, 2), [S1, S0]),  # the same with more ranks than experts
    ((2, 2), [S2, S0]),
    ((2, 3), [S1, S2]),
]
"""Meshes and placements of batches of matrices."""


def train(layout: Layout | None, shapes: dict[str, tuple[int, ...]], options: Any) -> Any:
    params: dict[str, nn.Parameter] = {}
    mesh = init_device_mesh("cpu", layout[0]) if layout is not None else None
    for name, shape in shapes.items():
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(len(params)))
        if layout is not None and mesh is not None:
            start = [Replicate()] * mesh.ndim
            replicated = DTensor.from_local(whole, mesh, start, run_check=False)
            whole = replicated.redistribute(mesh, layout[1])
        params[name] = nn.Parameter(whole)
    group = {"params": list(params.items()), "algorithm": "conda"}
    optimizer = Conda([group], lr=0.02, weight_decay=0.1, update_proj_gap=2, **options)
    for step in range(STEPS):
        for name, param in params.items():
            generator = torch.Generator().manual_seed(100 * step + len(name))
            grad = torch.randn(param.shape, generator=generator)
            if isinstance(param, DTensor):
                partial = grad / param.device_mesh.size()
                grad = DTensor.from_local(
                    partial, param.device_mesh, [Partial()] * param.device_mesh.ndim
                ).redistribute(placements=_gradient_placements(param))
            param.grad = grad
        optimizer.step()
    return {name: models.whole(param) for name, param in params.items()}


def _gradient_placements(param: DTensor) -> list[Placement]:
    """Those of the parameter, but what is replicated is not summed up yet."""
    return [Partial() if p.is_replicate() else p for p in param.placements]


def far(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)
