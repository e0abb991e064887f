"""The first step on several ranks, when one of them cannot plan it, and of mixed parameters."""

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ranks
import toys
from conda_dist import Conda


def _one_cannot_plan() -> tuple[str, str, float]:
    """Rank 1's matrix was flattened after construction."""
    (param,) = toys.parameters((6, 4))
    optimizer = Conda([("up.weight", param)], process_group=dist.group.WORLD)
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["params"][0] = param = nn.Parameter(torch.zeros(24))
    param.grad = torch.ones_like(param)
    began = time.monotonic()
    try:
        optimizer.step()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "", "", 0.0


def test_a_rank_that_cannot_plan_tells_the_others() -> None:
    """Before the first collective that could wait for it."""
    ranks.run(2, dist.get_rank)  # starts the processes, which takes as long as it takes
    for kind, said, seconds in ranks.run(2, _one_cannot_plan, timeout=30.0):
        assert kind in ("RuntimeError", "ValueError"), said
        assert "up.weight" in said
        assert "rank 1" in said
        assert seconds < 20


def _plain_beside_dtensors() -> bool:
    mesh = init_device_mesh("cpu", (2,))
    weight, plain, twin = toys.parameters((6, 4), (5, 3), (5, 3))
    twin.data.copy_(plain.data)
    sharded = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    optimizer = Conda([sharded, plain], process_group=mesh.get_group())
    grads = toys.gradients([plain], 4)
    toys.take(optimizer, [plain], grads)
    toys.take(Conda([twin]), [twin], grads)
    torch.testing.assert_close(plain, twin)
    return bool((plain - twin).abs().max() < 1e-5)


def test_plain_parameters_step_though_the_dtensors_beside_them_have_no_gradient() -> None:
    """Both are on equal meshes, which are not the same object."""
    assert ranks.run(2, _plain_beside_dtensors) == [True, True]
