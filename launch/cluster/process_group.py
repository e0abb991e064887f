"""The processes of one job: joining them, agreeing, failing together.

A job is one process started plainly or many started by torchrun (or anything that sets RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, such as DeepSpeed's launcher) or by mpirun. One
process forms a group of one, so that everything after this file has a single path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from conda_dist.launch.cluster import rendezvous
from conda_dist.launch.cluster.launcher import mpi_rank_and_size
from conda_dist.launch.job.config import ConfigError

T = TypeVar("T")

_PATIENCE = timedelta(days=1)
"""For work that one rank does while the rest wait. A peer that died is noticed at once all the
same, since its connection closes."""


class JobError(RuntimeError):
    """Something that ends the job on every rank at once, with the same message."""


@dataclass(frozen=True, slots=True)
class World:
    """This process's place in the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup  # of gloo, for small CPU messages: flags, errors, fingerprints
    patient: dist.ProcessGroup  # for waits that may be long: preparing a corpus can take hours

    @property
    def is_main(self) -> bool:
        """Whether this process does the printing and writing."""
        return self.rank == 0


def join(timeout_s: float) -> World:
    """Forms the process group and picks the device: CUDA with NCCL where there is one, else CPU.

    A group that a launcher has formed already is taken as it is.
    After `timeout_s` a collective that has not finished raises.

    Raises:
        JobError: There are more processes on this host than CUDA devices, or processes started
            by an MPI launcher cannot find each other.
    """
    timeout = timedelta(seconds=timeout_s)
    joined = dist.is_initialized()
    where = {} if joined else _meeting(timeout)
    device, backend = torch.device("cpu"), "gloo"
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise JobError(
                f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}; "
                "start at most that many processes on it"
            )
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if joined:
        local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    else:
        dist.init_process_group(backend, timeout=timeout, **where)
    control, patient = (
        cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=limit))
        for limit in (timeout, _PATIENCE)
    )
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, control, patient)


def _meeting(timeout: timedelta) -> dict[str, Any]:
    """Store, rank and world size; {} where torch.distributed finds them in the environment."""
    store: Store
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store, rank, size = rendezvous.meet(timeout)
    elif "RANK" in os.environ:
        return {}
    else:
        rank, size = mpi_rank_and_size()
        if size > 1:
            from conda_dist.launch.cluster import mpi

            store = mpi.rendezvous(timeout)
        else:
            store, rank, size = HashStore(), 0, 1
    return {"store": store, "rank": rank, "world_size": size}


def gather(world: World, item: Any, *, patient: bool = False) -> list[Any]:
    """Every rank's `item`, in rank order, on every rank."""
    items: list[Any] = [None] * world.size
    dist.all_gather_object(items, item, group=world.patient if patient else world.control)
    return items


def any_rank(world: World, *flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank; the same answer on all of them."""
    seen = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=world.control)
    return [bool(flag) for flag in seen.tolist()]


@contextmanager
def together(world: World, doing: str, *, patient: bool = False) -> Iterator[None]:
    """Runs a block that may fail on some ranks so that it then fails on all of them.

    The block itself must not communicate: a rank that fails inside would leave the others waiting.

    Args:
        world: The job.
        doing: What the block does, for the message ("reading the data").
        patient: Whether it may take some ranks longer than the job's timeout.

    Raises:
        JobError: On every rank; it names those on which the block raised.
        ConfigError: On every rank, with the same message, if it was nothing else on any.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    refusal = str(error) if isinstance(error, ConfigError) else None
    said = (f"{type(error).__name__}: {error}", refusal) if error else None
    everyone = gather(world, said, patient=patient)
    failed = {rank: each[0] for rank, each in enumerate(everyone) if each}
    refusals = [each[1] for each in everyone if each]
    if failed and None not in refusals:
        raise ConfigError("; ".join(dict.fromkeys(refusals))) from error
    if failed:
        ranks = ", ".join(map(str, failed))
        distinct = "; ".join(dict.fromkeys(failed.values()))
        raise JobError(f"{doing} failed on rank {ranks}: {distinct}") from error


def require_agreement(world: World, facts: Mapping[str, Any]) -> None:
    """Raises JobError on every rank, naming what differs, unless all hold the same facts."""
    everyone = gather(world, dict(facts))
    differing = []
    for name in sorted({name for held in everyone for name in held}):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, held in enumerate(everyone):
            ranks_by_value.setdefault(repr(held.get(name)), []).append(rank)
        if len(ranks_by_value) > 1:
            values = "; ".join(
                f"{value} on rank {ranks}" for value, ranks in ranks_by_value.items()
            )
            differing.append(f"{name}: {values}")
    if differing:
        raise JobError("the ranks of this job differ in " + "\n  ".join(["", *differing]))


def from_main(world: World, doing: str, function: Callable[[], T]) -> T:
    """Runs `function` on rank 0 and returns its result on every rank, or raises as `together`."""
    result: list[Any] = [None]
    with together(world, doing):
        if world.is_main:
            result[0] = function()
    dist.broadcast_object_list(result, src=0, group=world.control)
    return cast(T, result[0])
