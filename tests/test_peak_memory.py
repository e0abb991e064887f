"""What a step holds beside state, gradients and parameters: some buckets, whatever the model."""

import pytest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import ranks
import toys
from conda_dist import Conda


def _peak(placement: str, count: int, shape: tuple[int, int]) -> float:
    """Most bytes that a steady step allocates at once, in buckets of two shards' gradients."""
    mesh = init_device_mesh("cpu", (2,))
    params = []
    for _ in range(count):
        params.append(nn.Parameter(distribute_tensor(toys.random(*shape), mesh, [Shard(0)])))
        params[-1].grad = distribute_tensor(toys.random(*shape, seed=1), mesh, [Shard(0)])
    bucket = 2 * params[0].to_local().nbytes  # type: ignore[attr-defined]
    optimizer = Conda(
        [{"params": params, "algorithm": "conda"}],
        update_proj_gap=1000,
        basis_placement=placement,
        bucket_bytes=bucket,
    )
    for _ in range(2):
        optimizer.step()
    return toys.peak(optimizer.step) / bucket


@pytest.mark.parametrize(
    ("placement", "shape", "most"),
    [
        ("replicate", (64, 32), 0.6),  # tall: one weight after another
        ("replicate", (32, 64), 12),
        ("shard", (64, 32), 8),
        ("shard", (32, 64), 16),
        ("owner", (64, 32), 20),
        ("owner", (32, 64), 20),
    ],
)
def test_a_step_holds_some_buckets(placement: str, shape: tuple[int, int], most: float) -> None:
    """One is computed while another comes and a third goes, each packed and unpacked."""
    # 16 and 48 buckets' worth of gradients. How many are held depends on how fast they travel.
    for count in (32, 96):
        for peak in ranks.run(2, _peak, placement, count, shape):
            assert 0 < peak < most
