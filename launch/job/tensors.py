"""Tensors on disk in torch's distributed checkpoint format.

DCP stores each rank's shards and an index; any number of ranks can read them back. The index is a
pickle: load checkpoints that you trust.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from conda_dist.launch.cluster.process_group import JobError, World


def save_tensors(folder: Path, state: dict[str, Any], world: World) -> None:
    """Writes nested dicts of tensors into an existing folder; every rank calls it.

    Raises:
        JobError: On every rank, if writing failed on any.
    """
    try:
        save(state, checkpoint_id=folder, process_group=world.control)
    except CheckpointException as error:
        raise JobError(f"saving to {folder} failed: {_causes(error)}") from error


def load_tensors(folder: Path, state: dict[str, Any], world: World) -> None:
    """Reads what `save_tensors` wrote into the tensors of `state`, in place.

    Raises:
        JobError: On every rank, if reading failed on any.
    """
    try:
        load(state, checkpoint_id=folder, process_group=world.control)
    except CheckpointException as error:
        raise JobError(_causes(error)) from error


def _causes(error: CheckpointException) -> str:
    """The distinct errors of all ranks, in words."""
    causes = {f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}
    return "; ".join(sorted(causes))
