"""What a launcher tells a process in its environment; needs neither torch nor the other ranks."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

_MPI = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",  # Open MPI
    "PMI_SIZE": "PMI_RANK",  # MPICH and its relatives
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",  # MVAPICH
}
"""Variables that say how many processes an MPI launcher has started, and which of them this is."""

_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
"""Where launchers say a rank's number on its host: torchrun, `deepspeed`, Open MPI, MPICH."""


def mpi_rank_and_size() -> tuple[int, int]:
    """Rank and number of processes by what an MPI launcher has set; (0, 0) without one."""
    for size, rank in _MPI.items():
        if size in os.environ:
            return int(os.environ.get(rank, "0")), int(os.environ[size])
    return 0, 0


def launched_rank() -> int:
    """This process's rank by its launcher's word, before it has joined the others."""
    return int(os.environ.get("RANK", mpi_rank_and_size()[0]))


def is_first_of_host() -> bool:
    """Whether this is the first of its host's ranks, by its launcher's word."""
    return any(os.environ.get(name) == "0" for name in _LOCAL_RANKS)


def shutdown_timeout(seconds: int) -> list[str]:
    """torchrun's option that gives stopped ranks this long to save, if this torchrun has it.

    torch 2.11's has not: it kills ranks 30 s after it has passed on a signal.
    """
    torch = importlib.util.find_spec("torch")  # importing it takes seconds
    assert torch is not None
    assert torch.origin is not None
    source = Path(torch.origin).with_name("distributed") / "run.py"
    name = "--shutdown-timeout"
    return [f"{name}={seconds}"] if name in source.read_text(encoding="utf-8") else []


def end(code: int) -> NoReturn:
    """Ends this process as it is.

    DeepSpeed and caches of meshes keep process groups to the interpreter's end, where their
    threads abort it now and then: the status of work that is complete must not depend on that.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


if __name__ == "__main__":  # for scripts: what to give torchrun
    print(*shutdown_timeout(int(sys.argv[1])))
