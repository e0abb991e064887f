"""Layer: launch. torch.optim.Muon over sharded matrices: whole ones, dealt out to the ranks.

Muon orthogonalises whole matrices. Stepping `torch.optim.Muon` on DTensors works in principle,
but turns each of its fifteen small products into collectives of its own, sums bfloat16 partial
results across ranks (so the outcome depends on how many there are) and fails on empty shards.
Here each matrix has an owner; one packed all-to-all brings the owners their matrices, they run
torch's own iteration, and a second one takes the results back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon for DTensors sharded by rows on one mesh (FSDP2 and HSDP).

    State is torch's: `momentum_buffer`, sharded like the parameter. The result is that of
    torch.optim.Muon on the full matrices, on any number of ranks.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step; see torch.optim.Muon."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            buffers: list[Tensor] = []
            self._init_group(group, parameters, gradients, buffers)
            if not parameters:
                continue
            updates = []
            for gradient, buffer in zip(gradients, buffers, strict=True):
                buffer.lerp_(gradient, 1 - group["momentum"])
                nesterov = gradient.lerp(buffer, group["momentum"])
                updates.append(nesterov if group["nesterov"] else buffer)
            iteration = partial(
                _zeropower_via_newtonschulz,
                ns_coefficients=group["ns_coefficients"],
                ns_steps=group["ns_steps"],
                eps=group["eps"],
            )
            shards = orthogonalise([cast(DTensor, update) for update in updates], iteration)
            for parameter, shard in zip(parameters, shards, strict=True):
                rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
                local = cast(DTensor, parameter).to_local()
                local.mul_(1 - group["lr"] * group["weight_decay"])
                local.add_(shard, alpha=-rate)
        return loss


def orthogonalise(matrices: list[DTensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Applies `function` to each whole matrix and returns this rank's rows of the results.

    Args:
        matrices: DTensors (m, n) on one mesh, sharded by rows over its last dimension.
        function: From a bfloat16 matrix to one of the same shape and type.

    Returns:
        Local shards, in bfloat16, the type in which the iteration runs and travels.

    Raises:
        ValueError: A matrix has other placements.
    """
    mesh = matrices[0].device_mesh
    expected = (*[Replicate()] * (mesh.ndim - 1), Shard(0))
    for matrix in matrices:
        if matrix.placements != expected:
            raise ValueError(f"Muon needs placements {expected}, found {matrix.placements}")
    group = mesh.get_group(mesh.ndim - 1)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rows = [_shard_rows(matrix.shape[0], size) for matrix in matrices]
    columns = [matrix.shape[1] for matrix in matrices]
    local = [matrix.to_local().bfloat16() for matrix in matrices]
    owned = [range(owner, len(matrices), size) for owner in range(size)]
    mine = owned[rank]

    # There: to each owner, this rank's rows of its matrices.
    outgoing = [[local[i] for i in owned[peer]] for peer in range(size)]
    counts = [[rows[i][peer] * columns[i] for i in mine] for peer in range(size)]
    parts = _exchange(outgoing, counts, group)
    whole = [
        torch.cat([parts[peer][slot] for peer in range(size)]).view(-1, columns[i])
        for slot, i in enumerate(mine)
    ]
    results = [
        torch.split(function(matrix), rows[i]) for i, matrix in zip(mine, whole, strict=True)
    ]

    # And back: to each rank its rows of the results.
    outgoing = [[result[peer] for result in results] for peer in range(size)]
    counts = [[local[i].numel() for i in owned[peer]] for peer in range(size)]
    parts = _exchange(outgoing, counts, group)
    shards: dict[int, Tensor] = {}
    for peer in range(size):
        for i, shard in zip(owned[peer], parts[peer], strict=True):
            shards[i] = shard.view(local[i].shape)
    return [shards[i] for i in range(len(matrices))]


def _shard_rows(rows: int, size: int) -> list[int]:
    """Rows of each rank under Shard(0): ceil-sized chunks, the last ones short or empty."""
    chunk = -(-rows // size)
    return [max(0, min(chunk, rows - rank * chunk)) for rank in range(size)]


def _exchange(
    outgoing: list[list[Tensor]], counts: list[list[int]], group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """Sends each peer its tensors, packed into one message.

    Args:
        outgoing: Tensors for each rank of the group.
        counts: Elements of each tensor to come from each rank.
        group: The ranks.

    Returns:
        Flat tensors from each rank.
    """
    packed = torch.cat([tensor.flatten() for tensors in outgoing for tensor in tensors])
    sent = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    due = [sum(elements) for elements in counts]
    received = packed.new_empty(sum(due))
    dist.all_to_all_single(received, packed, due, sent, group=group)
    return [
        list(torch.split(part, elements))
        for part, elements in zip(torch.split(received, due), counts, strict=True)
    ]
