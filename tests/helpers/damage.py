"""A job's checkpoints, damaged."""

import random
from collections.abc import Callable
from pathlib import Path

from conda_dist.launch.job.checkpoint import complete_checkpoints

Damage = Callable[[Path], None]


def delete(path: Path) -> None:
    """Removes a file."""
    path.unlink()


def truncate(path: Path) -> None:
    """Cuts the end of a file off."""
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """Changes one bit, and not the size."""
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 4
    path.write_bytes(content)


def newest(run: Path) -> Path:
    return complete_checkpoints(run / "checkpoints")[-1]
