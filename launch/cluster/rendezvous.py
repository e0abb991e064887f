"""A store without what an earlier start of the same job has left in it.

torchrun keeps one store for all its restarts, and torch.distributed looks into it under the same
names each time: a rank that is early finds the address of a rank that is dead
(https://github.com/pytorch/pytorch/issues/135712; torch 2.14). The count of restarts in the
environment does not help, as each host's torchrun counts its own. So the ranks agree on a name.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_POLL_S = 0.02


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """The store of this start of the job, this process's rank, and the number of ranks."""
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    return PrefixStore(f"conda_dist/start/{agree(store, rank, size, timeout)}", store), rank, size


def agree(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that is new, the same on all ranks.

    Each rank says one that nobody else can know, and rank 0 answers under that: nothing that is
    left from before can be taken for an answer. Raises DistStoreError if a rank is late.
    """
    own = uuid.uuid4().hex
    if rank != 0:
        store.set(f"conda_dist/hello/{rank}", own)
        store.wait([f"conda_dist/answer/{own}"], timeout)
        name = store.get(f"conda_dist/answer/{own}").decode()
        store.add(f"conda_dist/met/{name}", 1)
        return name
    deadline = time.monotonic() + timeout.total_seconds()
    answered: set[str] = set()
    while store.add(f"conda_dist/met/{own}", 0) < size - 1:
        for other in range(1, size):
            if store.check([hello := f"conda_dist/hello/{other}"]):
                said = store.get(hello).decode()
                if said not in answered:
                    store.set(f"conda_dist/answer/{said}", own)
                    answered.add(said)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"not all {size} ranks came within {timeout}")
        time.sleep(_POLL_S)
    return own
