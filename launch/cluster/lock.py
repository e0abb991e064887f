"""One job at a time writes a folder: a lock that ends with the process."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conda_dist.launch.cluster.process_group import JobError, World, from_main
from conda_dist.launch.job.config import ConfigError

PATIENCE_S = 5.0
"""Seconds to wait for a lock: a process that was killed keeps its own until the system has taken
its memory back, and jobs are resumed at once."""

LOCK = "lock"
"""The file; it stays, unless its folder is removed with it."""


@contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Keeps other jobs out of a folder while the block runs; rank 0 holds the lock.

    A folder that is made for the lock goes again if the block refuses the configuration.

    Raises:
        JobError: On every rank: another job holds it, or the file system has no locks.
    """
    held: list[int] = []
    made: list[Path] = []

    def take() -> str:
        made.extend(each for each in (folder, *folder.parents) if not each.exists())
        folder.mkdir(parents=True, exist_ok=True)
        # A record lock: on network file systems it holds between hosts, and no child inherits it.
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        held.append(descriptor)
        if not _taken(descriptor) or not _still(folder / LOCK, descriptor):
            return os.read(descriptor, 1000).decode(errors="replace").strip() or "of unknown host"
        with suppress(OSError):  # a full disk: the lock holds without a name in it
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return ""

    try:
        other = from_main(world, f"locking {folder / LOCK}", take)
        if other:
            raise JobError(
                f"another job writes {folder} ({other}): wait for its end, or give another --output"
            )
        yield
    except ConfigError:
        if made:
            with suppress(OSError):  # something else is there by now
                (folder / LOCK).unlink()
                for each in made:
                    each.rmdir()
        raise
    finally:
        for descriptor in held:
            os.close(descriptor)


def _still(file: Path, descriptor: int) -> bool:
    """Whether the file is the one that was locked, which a refused job may have removed."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _taken(descriptor: int) -> bool:
    """Whether the lock could be had in time."""
    begun = time.monotonic()
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() - begun > PATIENCE_S:
                return False
            time.sleep(0.1)
        else:
            return True
