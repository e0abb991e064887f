"""Faults inside a rank of a real job: `python injected.py FAULT RANK STEP CONFIG ...`.

From that step on, on that rank, one thing goes wrong; everything else is the job's own.
"""

import contextlib
import ctypes
import os
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.linalg import LinAlgError
from torch.nn.modules.module import register_module_forward_hook

import launch_jobs
from conda_dist.launch import pretrain
from conda_dist.launch.cluster import launcher
from conda_dist.launch.data.batches import TokenBatches
from launch_jobs import Result

SLOW_S = 0.6
"""Seconds that a slow rank takes to read its data."""
FILE_BYTES = 60_000
"""Size that no file may exceed, of a rank whose disk is full."""


class _Clock:
    """Which step is on its way, as the data's reader sees it."""

    def __init__(self, fault: str, rank: int, step: int) -> None:
        self.fault, self.step = fault, 0
        self._rank, self._first = rank, step

    def strikes(self) -> bool:
        rank = dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])
        return rank == self._rank and self.step >= self._first

    def factor(self) -> float:
        """What the gradient is multiplied by."""
        if self.fault == "bad steps":
            return {0: float("nan"), 2: 1e4}.get(self.step - self._first, 1.0)
        return float("nan")


def _cut() -> None:
    """Shuts down this process's connections, but for those to the rendezvous store."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as end:
            if end.getpeername()[1] != int(os.environ["MASTER_PORT"]):
                end.shutdown(socket.SHUT_RDWR)


def _fill(name: str) -> None:
    """Has the disk under a file that this process has open be full."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").endswith(name):
                with open("/dev/full", "wb") as full:
                    os.dup2(full.fileno(), int(number))


@contextlib.contextmanager
def injected(fault: str, rank: int, step: int) -> Iterator[None]:
    """Has a rank go wrong while the block runs.

    Args:
        fault: "nan": the gradient of a block's output is NaN. "nan weight": that of one weight
            alone. "bad steps": that of a block's output is NaN in one step, and 1e4 times too large
            two steps later. "no memory": a decomposition raises. "no svd": none converges, in two
            steps.
            "asleep": reading data never ends. "frozen": and no other thread of the process runs.
            "slow": it takes a while. "unread": it raises. "full": files cannot grow.
            "full metrics": metrics.jsonl cannot. "cut": its connections to other ranks are shut
            down.
        rank: The rank.
        step: Its first step in which it does, counted from 1.
    """
    clock = _Clock(fault, rank, step)
    rows, svd = TokenBatches.rows, torch.linalg.svd
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def read(self: Any, number: int, first: int, last: int) -> Any:
        clock.step = number + 1
        if clock.strikes():
            if fault == "frozen":
                ctypes.PyDLL(None).sleep(3600)  # unlike CDLL it lets no other thread run
            if fault in ("asleep", "slow"):
                time.sleep(SLOW_S if fault == "slow" else 3600.0)
            if fault == "unread":
                raise OSError("the disk has gone")
            if fault == "cut":
                _cut()
            if fault == "full metrics":
                _fill("metrics.jsonl")
            if fault == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, limits[1]))
        return rows(self, number, first, last)

    def decompose(*args: Any, **kwargs: Any) -> Any:
        if fault == "no memory" and clock.strikes():
            raise MemoryError("no room for a workspace")
        if fault == "no svd" and clock.strikes() and clock.step < step + 2:
            raise LinAlgError("linalg.svd: the algorithm failed to converge")
        return svd(*args, **kwargs)

    faults = {"nan": _spoil, "bad steps": _spoil, "nan weight": _spoil_weight}
    spoil = faults.get(fault, lambda clock: _leave)
    hook = register_module_forward_hook(spoil(clock))
    torch.linalg.svd = decompose
    TokenBatches.rows = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.linalg.svd = svd
        TokenBatches.rows = rows  # type: ignore[method-assign]
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        hook.remove()


def _leave(module: Any, args: Any, output: Any) -> None:
    """Does nothing."""


def _spoil(clock: _Clock) -> Callable[[Any, Any, Any], None]:
    def hook(module: Any, args: Any, output: Any) -> None:
        # FSDP2 puts its own name before a class's.
        block = type(module).__name__.endswith("LlamaDecoderLayer")
        if block and output.requires_grad and clock.strikes():
            factor = clock.factor()
            output.register_hook(lambda gradient: gradient * factor)

    return hook


def _spoil_weight(clock: _Clock) -> Callable[[Any, Any, Any], None]:
    def hook(module: Any, args: Any, output: Any) -> None:
        block = type(module).__name__.endswith("LlamaDecoderLayer")
        if block and module.self_attn.layer_idx == 1 and output.requires_grad and clock.strikes():
            module.mlp.up_proj.weight.register_hook(lambda gradient: gradient * float("nan"))

    return hook


def job(fault: str, rank: int, step: int, *arguments: str) -> Result:
    """Runs a job in this process; what it does not catch itself is in the result."""
    with injected(fault, rank, step):
        try:
            return launch_jobs.job(*arguments)
        except Exception:
            return Result(1, "", traceback.format_exc())


if __name__ == "__main__":
    with injected(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])):
        launcher.end(pretrain.main(sys.argv[4:]))
