"""conda_shard_placement: wide matrices by columns under the real fully_shard."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import models
import ranks
import traffic
from conda_dist import Conda, param_groups
from conda_dist.integrations.fsdp2 import conda_shard_placement


def _shard(shape: tuple[int, ...], **options: Any) -> Any:
    torch.manual_seed(0)
    model = models.Tiny(width=12, hidden=24)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    place = conda_shard_placement(model, mesh, **options)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    return fully_shard(model, mesh=mesh, shard_placement_fn=place)


def _steps(shape: tuple[int, ...]) -> tuple[dict[str, str], int, dict[str, torch.Tensor]]:
    model = _shard(shape)
    optimizer = Conda(param_groups(model), **{**models.SETTINGS, "update_proj_gap": 100})
    models.train(model, optimizer, range(1))
    with traffic.recorded() as calls:
        models.train(model, optimizer, range(1, 4))
    layouts = {row["name"]: row["layout"] for row in optimizer.report(show=False)}
    return layouts, len(calls), models.snapshot(model, optimizer, models.whole)


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)], ids=str)
def test_no_step_moves_a_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    alone = models.Tiny(width=12, hidden=24)
    optimizer = Conda(param_groups(alone), **{**models.SETTINGS, "update_proj_gap": 100})
    start = models.snapshot(alone, optimizer, models.whole)
    models.train(alone, optimizer, range(4))
    expected = models.snapshot(alone, optimizer, models.whole)
    for layouts, collectives, ended in ranks.run(torch.Size(shape).numel(), _steps, shape):
        assert collectives == 0
        assert layouts["blocks.0.down.weight"].endswith("Shard(1)]")
        assert layouts["blocks.0.up.weight"].endswith("Shard(0)]")
        assert layouts["head.weight"].endswith("Shard(0)]")
        assert layouts["blocks.0.experts"].endswith("Shard(0)]")
        assert models.farthest(ended, expected, start) < 1e-4


def _uneven(strict: bool) -> str:
    model = models.Tiny(width=12, hidden=22)
    mesh = init_device_mesh("cpu", (3,))
    try:
        place = conda_shard_placement(model, mesh, strict=strict)
    except ValueError as error:
        return str(error)
    return repr(place(model.blocks[0].down.weight))


def test_columns_that_do_not_divide() -> None:
    """On all ranks alike, before FSDP2 sees them."""
    assert ranks.run(3, _uneven, False) == ["None"] * 3
    said = ranks.run(3, _uneven, True)
    assert said == [said[0]] * 3
    assert said[0].startswith("blocks.0.down.weight: (12, 22) is wide, but its columns [22] do not")


def _tensor_parallel() -> tuple[list[Any], str]:
    """Row-wise tensor parallelism has cut the columns already, and unevenly."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = nn.Module()
    shapes = {"even": (6, 16), "uneven": (6, 14)}
    for name, shape in shapes.items():
        whole = distribute_tensor(torch.randn(shape), mesh["tp"], [Shard(1)])
        setattr(model, name, nn.Parameter(whole))
    place = conda_shard_placement(model, mesh["fsdp"])
    found = [place(getattr(model, name)) for name in shapes]
    fully_shard(model, mesh=mesh["fsdp"], shard_placement_fn=place)
    optimizer = Conda(param_groups(model))
    layouts = {row["name"]: row["compute"] == row["layout"] for row in optimizer.report(show=False)}
    return found, str(layouts)


def test_over_tensor_parallelism() -> None:
    for found, in_place in ranks.run(4, _tensor_parallel):
        assert found == [Shard(1), None]
        assert in_place == "{'even': True, 'uneven': False}"


def _replaced() -> str:
    with torch.device("meta"):
        model = models.Tiny(width=12, hidden=24)
    mesh = init_device_mesh("cpu", (2,))
    place = conda_shard_placement(model, mesh)
    model.to_empty(device="cpu")
    return models.attempt(lambda: fully_shard(model, mesh=mesh, shard_placement_fn=place))


def test_parameters_that_came_later_are_refused() -> None:
    """By rows they would train as well, but not as was asked for."""
    for said in ranks.run(2, _replaced):
        assert "after parallelize_module and to_empty" in said


def test_refusals() -> None:
    model = models.Tiny()
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got int"):
        conda_shard_placement(model, 4)  # type: ignore[arg-type]
    for said in ranks.run(2, _wrong_pattern):
        assert said == "pattern 'nothing' matches no parameter of Tiny"


def _wrong_pattern() -> str:
    with pytest.raises(ValueError, match="matches no") as caught:
        conda_shard_placement(models.Tiny(), init_device_mesh("cpu", (2,)), adamw=["nothing"])
    return str(caught.value)
