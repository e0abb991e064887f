"""A job's checkpoints, damaged and forged."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from conda_dist.launch.job.checkpoint import complete_checkpoints, record_hash

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


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def forge(checkpoint: Path, name: str, content: bytes) -> None:
    """Puts a file into a checkpoint as whoever knows its format would."""
    file = checkpoint / name
    file.write_bytes(content)
    record = json.loads((checkpoint / "trainer.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    record["files"][name] = {"bytes": len(content), "sha256": digest}
    del record["sha256"]
    record["sha256"] = record_hash(record)
    (checkpoint / "trainer.json").write_text(json.dumps(record))
