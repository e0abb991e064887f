"""The ranks of a job that an MPI launcher (mpirun, mpiexec) has started.

MPI is asked who is who and finalised at once: everything after that is torch.distributed's. Were
it left to the end of the process, one that fails would wait in MPI_Finalize for all others, which
wait for it elsewhere.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store, TCPStore

from conda_dist.launch.cluster.launcher import mpi_rank_and_size
from conda_dist.launch.cluster.process_group import JobError

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rendezvous(timeout: timedelta) -> Store:
    """Lets the processes find each other; returns the store to form the process group with.

    Sets the variables that torchrun sets, for libraries that look for them.

    Raises:
        JobError: mpi4py is not installed or belongs to another MPI than the launcher; on every
            rank, rank 0 could not open a port; or this rank does not reach it there.
    """
    rank, size = mpi_rank_and_size()
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise JobError(
            f"an MPI launcher has started {size} processes, and mpi4py, which tells them who is "
            f"who, cannot be imported: {str(error).splitlines()[0]}. Do pip install "
            "mpi4py; if the launcher's MPI is not found, set MPI4PY_LIBMPI to its "
            "libmpi.so; or start the job with torchrun"
        ) from error
    ours = not MPI.Is_initialized()
    if ours:
        MPI.Init()
    try:
        world = MPI.COMM_WORLD
        if world.Get_size() != size:
            raise JobError(
                f"the launcher has started {size} processes, of which mpi4py sees "
                f"{world.Get_size()}: it belongs to another MPI, {_library(MPI)}. Use that one's "
                "mpirun, or set MPI4PY_LIBMPI to the libmpi.so of this mpirun's"
            )
        node = world.Split_type(MPI.COMM_TYPE_SHARED)
        local_rank, alone = node.Get_rank(), node.Get_size() == size
        node.Free()
        store, (address, port, problem) = _open(rank, size, alone, timeout)
        address, port, problem = world.bcast((address, port, problem), root=0)
    finally:
        if ours:
            MPI.Finalize()
    if problem:
        raise JobError(problem)
    values = (rank, size, local_rank, address, port)
    os.environ.update({name: str(v) for name, v in zip(_RENDEZVOUS, values, strict=True)})
    if store is not None:
        return store
    try:
        return TCPStore(address, port, size, is_master=False, timeout=timeout)
    except RuntimeError as error:
        raise JobError(
            f"{socket.gethostname()} cannot reach rank 0 at {address}, port {port}: {error}. "
            "Set GLOO_SOCKET_IFNAME on all hosts to the interface that joins them, or MASTER_ADDR "
            "to rank 0's address"
        ) from error


def _library(mpi: Any) -> str:
    """Name and version of the MPI that mpi4py has loaded."""
    said: str = mpi.Get_library_version()
    return " ".join(said.splitlines()[0].rstrip("\0").partition(",")[0].split())


def _open(
    rank: int, size: int, alone: bool, timeout: timedelta
) -> tuple[Store | None, tuple[str, int, str]]:
    """On rank 0 a store, its address, its port and what went wrong; nothing elsewhere."""
    if rank != 0:
        return None, ("", 0, "")
    # Hosts that have several addresses may be told which one to use.
    address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if alone else _own_address())
    given = os.environ.get("MASTER_PORT", "0")
    options: dict[str, Any] = {"is_master": True, "timeout": timeout, "wait_for_workers": False}
    try:
        store = TCPStore(address, int(given), size, **options)
    except (RuntimeError, ValueError, OverflowError, TypeError) as error:
        problem = (  # the others wait to be told
            f"rank 0 cannot open port {given} at {address}: {error}. Set MASTER_ADDR and "
            "MASTER_PORT to what it can"
        )
        return None, (address, 0, problem)
    return store, (address, store.port, "")


_SIOCGIFADDR = 0x8915  # of Linux's sockios.h


def _own_address() -> str:
    """Where other hosts find this one: on the interface that gloo is told of, else by its name.

    gloo does the same, so that a job whose hosts do not know each other's names needs one setting.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if not interface or sys.platform != "linux":
        return socket.gethostname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, request)
        except OSError:  # it has no such interface, or one with IPv6 only
            return socket.gethostname()
    return socket.inet_ntoa(answer[20:24])
