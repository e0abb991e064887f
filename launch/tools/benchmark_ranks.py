"""CPU time of a step over all ranks against the same step of one process.

    python -m conda_dist.launch.benchmark --ranks 4

Every way steps in turn with one process's, which rank 0 takes while the others wait: what is
compared is the CPU time of all ranks together, so that ranks may outnumber cores. Work that ranks
repeat shows as a ratio above 1. So does what cores share, caches and vector units of two threads,
which a process that steps while the others wait has to itself: the second ratio is to a process
that steps while the others do, too, each its own copy of the whole.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from conda_dist import Conda
from conda_dist.launch.cluster import launcher, process_group
from conda_dist.launch.tools.footprint import count_exactly, peak_bytes

NEVER = 10**9
ALONE = "one process"
WHOLE = "whole on every rank (DDP)"


@dataclass(frozen=True, slots=True)
class Way:
    """A step, and what it takes on this rank."""

    step: Callable[[], Any]
    state: int = 0
    """Bytes of state."""
    sent: int = 0
    """Bytes that it sends in a step."""
    refresh: int = 0
    """Bytes that it sends besides in a step with a refresh."""
    peak: int | None = None
    """Bytes by which the process grows in a step; None where the system does not say."""


Taken = dict[str, list[float]]


def measure(
    sizes: Sequence[tuple[int, int]], ranks: int, rounds: int
) -> tuple[Taken, dict[str, Way]]:
    """Runs the benchmark on as many processes of this host.

    Args:
        sizes: shapes of the matrices.
        ranks: processes.
        rounds: steps of every way.

    Returns:
        CPU seconds of all ranks together in every round, and rank 0's numbers, by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        for work in (_time, _weigh):
            arguments = (work, ranks, list(sizes), rounds, folder)
            mp.spawn(_work, arguments, nprocs=ranks)  # type: ignore[attr-defined, no-untyped-call]
        taken: Taken = torch.load(f"{folder}/_time.pt")
        numbers: dict[str, dict[str, Any]] = torch.load(f"{folder}/_weigh.pt")
    return taken, {name: Way(_nothing, **found) for name, found in numbers.items()}


def table(taken: Taken, ways: dict[str, Way], ranks: int, title: str) -> Table:
    """What `measure` has found."""
    made = Table(title=title)
    for heading in (
        "step of", "median ms", "quartiles ms", f"x {ALONE}", "x one as busy",
        "state MiB", "peak MiB", "sent MiB", "refresh MiB",
    ):  # fmt: skip
        made.add_column(heading, justify="left" if heading == "step of" else "right", no_wrap=True)
    for name, seconds in taken.items():
        low, median, high = (1e3 * s for s in statistics.quantiles(seconds, n=4))
        alone, busy = (
            statistics.median(a / b for a, b in zip(seconds, taken[other], strict=True))
            for other in (ALONE, WHOLE)
        )
        way = ways[name]
        numbers = (way.state, way.peak, way.sent, way.refresh)
        mib = ["" if count is None else f"{count / 2**20:.1f}" for count in numbers]
        made.add_row(
            name,
            f"{median:.1f}",
            f"{low:.1f} - {high:.1f}",
            f"{alone:.3f}",
            f"{ranks * busy:.3f}",
            *mib,
        )
    return made


def _nothing() -> None:
    """What other ranks do while one process steps."""


def _work(
    rank: int,
    work: Callable[[dict[str, Way], int], Any],
    ranks: int,
    sizes: list[tuple[int, int]],
    rounds: int,
    folder: str,
) -> None:
    """Does one kind of work on a rank; the first keeps what has come of it."""
    torch.set_num_threads(1)
    if work is _weigh:
        count_exactly()
    store = f"file://{folder}/{work.__name__}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    found = work(_ways(init_device_mesh("cpu", (ranks,)), sizes, rank), rounds)
    if rank == 0:
        torch.save(found, f"{folder}/{work.__name__}.pt")
    process_group.leave()
    launcher.end(0)


def _time(ways: dict[str, Way], rounds: int) -> Taken:
    """CPU seconds of all ranks together."""
    taken: Taken = {name: [] for name in ways}
    for turn in range(rounds + 2):  # the first two steps plan, allocate and take the bases
        for name, way in ways.items():
            dist.barrier()
            start = time.process_time()
            way.step()
            spent = torch.tensor(time.process_time() - start, dtype=torch.float64)
            dist.all_reduce(spent)
            if turn >= 2:
                taken[name].append(float(spent))
    return taken


def _weigh(ways: dict[str, Way], rounds: int) -> dict[str, dict[str, Any]]:
    """Bytes, by the names of a Way's."""
    found = {}
    for name, way in ways.items():
        way.step()
        bytes_of = {"state": way.state, "sent": way.sent, "refresh": way.refresh}
        found[name] = {**bytes_of, "peak": peak_bytes(way.step)}
    return found


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
        sent = sum(row["step_bytes"] for row in report)
        refresh = sum(row["refresh_bytes"] for row in report)
        return Way(optimizer.step, state, sent, refresh)

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
        # Weight and gradient, to each.
        return Way(step, state, 2 * (dist.get_world_size() - 1) * held)

    return {
        ALONE: Way(_nothing) if rank else way(Tensor.clone),
        "FSDP rows": way(sharded),
        "FSDP, wide ones by columns": way(kept),
        "FSDP rows, in groups": way(sharded, basis_budget=0),
        WHOLE: way(Tensor.clone, process_group=dist.group.WORLD),
        "FSDP rows, gathered whole": gathered(),
    }
