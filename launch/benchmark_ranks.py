"""Layer: launch. CPU time of a step over all ranks against the same step of one process.

    python -m conda_dist.launch.benchmark --ranks 4

Every way steps in turn with one process's, which rank 0 takes while the others wait: what is
compared is the CPU time of all ranks together, so that ranks may outnumber cores. Work that ranks
repeat shows as a ratio above 1.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from conda_dist import Conda

NEVER = 10**9
ALONE = "one process"
Way = tuple[Callable[[], Any], int, int]
"""A step, bytes of state on this rank and bytes it sends in a step."""


def measure(sizes: Sequence[tuple[int, int]], ranks: int, rounds: int) -> Table:
    """Runs the benchmark on as many processes of this host.

    Args:
        sizes: shapes of the matrices.
        ranks: processes.
        rounds: steps of every way.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, list(sizes), rounds, folder)
        mp.spawn(_work, arguments, nprocs=ranks)  # type: ignore[attr-defined, no-untyped-call]
        taken, facts = torch.load(f"{folder}/taken.pt")
    table = Table(title=f"{len(sizes)} matrices on {ranks} ranks: CPU time of all ranks together")
    for heading in (
        "step of", "median ms", "quartiles ms", f"times {ALONE}'s",
        "state of a rank MiB", "sent by a rank MiB",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "step of" else "right")
    for name, seconds in taken.items():
        low, median, high = (1e3 * s for s in statistics.quantiles(seconds, n=4))
        pairs = zip(seconds, taken[ALONE], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        state, sent = (f"{count / 2**20:.1f}" for count in facts[name])
        table.add_row(name, f"{median:.1f}", f"{low:.1f} - {high:.1f}", f"{ratio:.3f}", state, sent)
    return table


def _work(rank: int, ranks: int, sizes: list[tuple[int, int]], rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    ways = _ways(mesh, sizes, rank)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):  # the first two steps plan, allocate and take the bases
        for name, (step, _, _) in ways.items():
            dist.barrier()
            start = time.process_time()
            step()
            spent = torch.tensor(time.process_time() - start, dtype=torch.float64)
            dist.all_reduce(spent)
            if turn >= 2:
                taken[name].append(float(spent))
    if rank == 0:
        facts = {name: (state, sent) for name, (_, state, sent) in ways.items()}
        torch.save((taken, facts), f"{folder}/taken.pt")
    dist.destroy_process_group()


def _ways(mesh: DeviceMesh, sizes: Sequence[tuple[int, int]], rank: int) -> dict[str, Way]:
    torch.manual_seed(0)
    wholes = [(torch.randn(size) * 0.02, torch.randn(size)) for size in sizes]

    def way(placed: Callable[[Tensor], Tensor], **options: Any) -> Way:
        params = [nn.Parameter(placed(weight)) for weight, _ in wholes]
        for param, (_, grad) in zip(params, wholes, strict=True):
            param.grad = placed(grad)
        group = {"params": params, "algorithm": "conda"}
        optimizer = Conda([group], update_proj_gap=NEVER, **options)
        report = optimizer.report(show=False)
        state = sum(row["state_bytes"] for row in report)
        return optimizer.step, state, sum(row["step_bytes"] for row in report)

    def sharded(whole: Tensor, dim: int = 0) -> Tensor:
        start = DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
        return start.redistribute(placements=[Shard(dim)])

    def kept(whole: Tensor) -> Tensor:
        """As `conda_shard_placement` has it."""
        return sharded(whole, int(whole.shape[0] < whole.shape[1]))

    def gathered() -> Way:
        """What an optimizer of whole matrices has to do with shards: every rank steps them all."""
        params = [nn.Parameter(sharded(weight)) for weight, _ in wholes]
        grads = [sharded(grad) for _, grad in wholes]
        twins = [nn.Parameter(weight.clone()) for weight, _ in wholes]
        optimizer = Conda([{"params": twins, "algorithm": "conda"}], update_proj_gap=NEVER)
        state = sum(row["state_bytes"] for row in optimizer.report(show=False))

        def step() -> None:
            for param, grad, twin in zip(params, grads, twins, strict=True):
                twin.data = cast(DTensor, param.detach()).full_tensor()
                twin.grad = cast(DTensor, grad).full_tensor()
            optimizer.step()
            with torch.no_grad():
                for param, twin in zip(params, twins, strict=True):
                    cast(DTensor, param).to_local().copy_(cast(DTensor, sharded(twin)).to_local())

        held = sum(p.to_local().nbytes for p in params if isinstance(p, DTensor))
        return step, state, 2 * (dist.get_world_size() - 1) * held  # weight and gradient, to each

    alone: Way = way(Tensor.clone)
    if rank:
        alone = (lambda: None, 0, 0)
    return {
        ALONE: alone,
        "FSDP rows": way(sharded),
        "FSDP, wide ones by columns": way(kept),
        "FSDP rows, bases split": way(sharded, basis_placement="shard"),
        "FSDP rows, owners multiply": way(sharded, basis_placement="owner"),
        "whole on every rank (DDP)": way(Tensor.clone, process_group=dist.group.WORLD),
        "FSDP rows, gathered whole": gathered(),
    }
