"""Tensors on disk in torch's distributed checkpoint format, read without pickle.

DCP stores each rank's shards and an index; any number of ranks can read them back.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from conda_dist.launch.cluster.process_group import JobError, World


def save_tensors(folder: Path, state: dict[str, Any], world: World) -> None:
    """Writes nested dicts of tensors into an existing folder; every rank calls it.

    Raises:
        JobError: On every rank, if writing failed on any.
    """
    try:
        save(state, storage_writer=FileSystemWriter(folder), process_group=world.control)
    except CheckpointException as error:
        raise JobError(f"saving to {folder} failed: {_causes(error)}") from error


def load_tensors(folder: Path, state: dict[str, Any], world: World) -> None:
    """Reads what `save_tensors` wrote into the tensors of `state`, in place.

    Raises:
        JobError: On every rank, if reading failed on any.
    """
    try:
        load(
            state,
            storage_reader=_SafeReader(folder),
            planner=_TensorsOnly(),
            process_group=world.control,
        )
    except CheckpointException as error:
        raise JobError(_causes(error)) from error


def _causes(error: CheckpointException) -> str:
    """The distinct errors of all ranks, in words."""
    causes = {f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}
    return "; ".join(sorted(causes))


class _SafeReader(FileSystemReader):
    """torch's reader, except that the index file, a pickle, may name only what an index needs.

    The tensors themselves are read with weights_only already.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's index; raises pickle.UnpicklingError on anything else in its file."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"found a {type(metadata).__name__} for the index")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorsOnly(DefaultLoadPlanner):
    """torch's planner, except that nothing is unpickled where the index says "bytes".

    torch would do so without weights_only, and for any key, whatever is to be loaded into.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raises pickle.UnpicklingError: the job saves tensors only."""
        raise pickle.UnpicklingError(
            f"the index has a pickle for {read_item.dest_index.fqn}, which is a tensor"
        )


class _IndexUnpickler(pickle.Unpickler):
    """Resolves the classes of DCP's index and no other name, so that loading runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of an index entry; raises pickle.UnpicklingError for any other name."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which no index needs")


_INDEX_NAMES = {
    "pathlib": {"PosixPath", "WindowsPath"},
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}
