"""One job at a time writes a folder: a lock that ends with the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from conda_dist.launch.cluster.process_group import JobError, World, from_main
from conda_dist.launch.job.config import ConfigError

# A process that was killed keeps its lock until the system has taken its memory back, and jobs are
# resumed at once.
PATIENCE_S = 5.0
LOCK = "lock"


@contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Keeps other jobs out of a folder while the block runs; rank 0 holds the lock.

    A folder that is made for the lock goes again if the block refuses the configuration.

    Raises:
        JobError: On every rank: another job holds it, or the file system has no locks.
    """
    lock = FileLock(folder / LOCK, timeout=PATIENCE_S, fallback_to_soft=False)
    made: list[Path] = []

    def take() -> bool:
        made.extend(each for each in (folder, *folder.parents) if not each.exists())
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            return False
        return True

    try:
        if not from_main(world, f"locking {folder / LOCK}", take):
            raise JobError(
                f"another job writes {folder}: wait for its end, or give another --output"
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
        lock.release()
