"""Collectives: process groups, packed all-to-alls, and values of all ranks.

The only module that calls collectives. ``layout/redistribution`` has decided which elements go
where; here they are packed into one buffer, exchanged and unpacked. Every collective runs on a
process group of the parameters' own mesh, so no rank waits for a rank outside the mesh, such as
another pipeline stage.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from conda_dist.layout.layout import Coordinate, Topology
from conda_dist.layout.packing import Place
from conda_dist.layout.redistribution import Hop, Packing, Transfer


@dataclass(frozen=True)
class Mesh:
    """The ranks that share parameters, this rank's position among them, and their process groups.

    Attributes:
        topology: the ranks.
        coordinate: this rank's position.
        groups: for each mesh dimension the process group of the ranks along it that includes this
            rank.
        names: names of the mesh dimensions; () if they have none.
        home: the device of this rank's parameters.
    """

    topology: Topology = field(default_factory=Topology)
    coordinate: Coordinate = ()
    groups: tuple[dist.ProcessGroup, ...] = ()
    names: tuple[str, ...] = ()
    home: torch.device | None = field(default=None, compare=False)

    @classmethod
    def of_device_mesh(cls, mesh: DeviceMesh) -> "Mesh":
        """The mesh of a DTensor.

        Raises:
            ValueError: this rank is not in ``mesh``.
        """
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"rank {dist.get_rank()} is not part of the parameter's mesh {mesh}")
        topology = Topology(tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist()))
        names = tuple(mesh.mesh_dim_names or ())
        return cls(topology, tuple(coordinate), tuple(mesh.get_all_groups()), names)

    @classmethod
    def of_group(cls, group: dist.ProcessGroup) -> "Mesh":
        """A mesh of one dimension: the ranks of a process group, as in DDP.

        Raises:
            ValueError: this rank is not in ``group``.
        """
        if dist.get_rank(group) < 0:
            raise ValueError(
                f"rank {dist.get_rank()} is not part of process_group: pass a group that contains "
                "the rank, or None"
            )
        ranks = tuple(dist.get_process_group_ranks(group))
        return cls(Topology((len(ranks),), ranks), (dist.get_rank(group),), (group,))

    @property
    def rank(self) -> int:
        """Global rank of this process; 0 without torch.distributed."""
        return self.topology.rank_at(self.coordinate)

    @property
    def sort_key(self) -> tuple[object, ...]:
        """A key that sorts meshes in the same order on all ranks."""
        return (self.topology.ranks, self.topology.sizes, self.names)

    def device(self, mesh_dim: int, preferred: torch.device) -> torch.device:
        """The device on which tensors must be to be sent along a mesh dimension.

        It differs from ``preferred`` with CPU offload: the states are on the CPU, and the process
        groups are NCCL's.
        """
        carried = [device.type for device in self.groups[mesh_dim]._device_types]
        for device in (preferred, self.home, self.groups[mesh_dim].bound_device_id):
            if device is not None and device.type in carried:
                return device
        # All parameters are on the CPU. The current device is the only hint which device to use.
        return torch.device(carried[0], torch.accelerator.current_device_index())

    def shared_dims(self) -> list[int]:
        """The mesh dimensions that have more than one rank."""
        return [mesh_dim for mesh_dim, size in enumerate(self.topology.sizes) if size > 1]


class Exchange:
    """An exchange of tensors between two layouts. The first collective starts at construction.

    Args:
        mesh: the ranks that take part.
        hops: the plan, from :func:`conda_dist.layout.redistribution.plan_hops`.
        tensors: the local tensors; None for a tensor of which this rank holds nothing.
        dtypes: dtype of each tensor, the same on all ranks.
        device: device of the new local tensors.
    """

    def __init__(
        self,
        mesh: Mesh,
        hops: Sequence[Hop],
        tensors: Sequence[Tensor | None],
        dtypes: Sequence[torch.dtype],
        device: torch.device,
    ) -> None:
        self._mesh, self._device, self._dtypes = mesh, device, dtypes
        self._tensors = list(tensors)
        self._hops = list(hops)
        self._inflight: list[_Packed] = []
        if self._hops:
            self._start()

    def _start(self) -> None:
        """Runs local hops up to the first one that communicates, and starts that one."""
        while self._hops and not self._inflight:
            hop = self._hops.pop(0)
            if hop.is_local:
                for transfer in hop.transfers:
                    self._tensors[transfer.item] = self._slice(transfer)
                continue
            for packing in hop.packings(tuple(self._dtypes[t.item] for t in hop.transfers)):
                self._inflight.append(self._launch(hop.mesh_dim, packing))

    def _slice(self, transfer: Transfer) -> Tensor | None:
        """The new local tensor of a local hop, from elements that this rank has."""
        if transfer.shape is None:
            return None
        source = self._tensors[transfer.item]
        if source is not None and tuple(source.shape) == transfer.shape:
            return source
        output = self._empty(transfer)
        keep(transfer, source, output)
        return output

    def _empty(self, transfer: Transfer) -> Tensor:
        assert transfer.shape is not None
        return torch.empty(transfer.shape, dtype=self._dtypes[transfer.item], device=self._device)

    def _launch(self, mesh_dim: int, packing: Packing) -> "_Packed":
        """Packs tensors into a buffer, drops the references to them, and starts the collective."""
        dtype = self._dtypes[packing.transfers[0].item]
        carried = self._mesh.device(mesh_dim, self._device)
        send = self._buffer(sum(packing.send_sizes), dtype, carried)
        pack(packing, self._tensors, send)
        if carried.type != self._device.type:
            # torch reuses the pinned memory only after this copy has finished.
            send = send.to(carried, non_blocking=True)
        kept = [self._tensors[t.item] if packing.straight else None for t in packing.transfers]
        for transfer in packing.transfers:
            self._tensors[transfer.item] = None
        received = torch.empty(sum(packing.receive_sizes), dtype=dtype, device=carried)
        work = dist.all_to_all_single(
            received,
            send,
            None if packing.even else packing.receive_sizes,
            None if packing.even else packing.send_sizes,
            group=self._mesh.groups[mesh_dim],
            async_op=True,
        )
        return _Packed(work, packing, send, received, kept)

    def _buffer(self, numel: int, dtype: torch.dtype, carried: torch.device) -> Tensor:
        """A buffer on the tensors' device, pinned if it is copied from or to a CUDA device."""
        pinned = carried.type == "cuda" and self._device.type == "cpu"
        return torch.empty(numel, dtype=dtype, device=self._device, pin_memory=pinned)

    def _unpack(self, packed: "_Packed") -> None:
        """Waits for a collective, and unpacks the new local tensors."""
        if packed.work is not None:
            packed.work.wait()
        packed.work = packed.send = None
        received, packing = packed.received, packed.packing
        if received.device.type != self._device.type:
            received = self._buffer(len(received), received.dtype, received.device).copy_(received)
        outputs = {t.item: self._empty(t) for t in packing.transfers if t.shape is not None}
        unpack(packing, received, packed.kept, outputs)
        self._tensors = [outputs.get(i, tensor) for i, tensor in enumerate(self._tensors)]

    def wait(self) -> list[Tensor | None]:
        """Waits, and returns the new local tensors; None where this rank now holds nothing."""
        while self._inflight:
            while self._inflight:
                self._unpack(self._inflight.pop(0))
            self._start()
        return self._tensors


@dataclass
class _Packed:
    """A collective that has been started, with its buffers.

    Attributes:
        work: torch's handle; None from backends that finish at once.
        packing: the layout of the buffers.
        send: the buffer that is sent.
        received: the buffer that is received.
        kept: the old local tensors, if elements of them stay on this rank; else None.
    """

    work: Any
    packing: Packing
    send: Tensor | None
    received: Tensor
    kept: list[Tensor | None]


def pack(packing: Packing, tensors: Sequence[Tensor | None], buffer: Tensor) -> None:
    """Copies the elements that the peers get from the local tensors to a send buffer."""
    for transfer, copies in zip(packing.transfers, packing.packs, strict=True):
        source = tensors[transfer.item]
        for copy in copies:
            assert source is not None
            _view(buffer, copy.shape, copy.other).copy_(_view(source, copy.shape, copy.local))


def unpack(
    packing: Packing, buffer: Tensor, kept: Sequence[Tensor | None], outputs: dict[int, Tensor]
) -> None:
    """Fills the new local tensors from a receive buffer, and with elements that stay on this rank.

    Args:
        packing: the layout of the buffer.
        buffer: the receive buffer.
        kept: the old local tensors, where elements of them stay.
        outputs: the new local tensors, by item.
    """
    for transfer, copies, source in zip(packing.transfers, packing.unpacks, kept, strict=True):
        for copy in copies:
            target = _view(outputs[transfer.item], copy.shape, copy.local)
            target.copy_(_view(buffer, copy.shape, copy.other))
        if packing.straight:
            keep(transfer, source, outputs.get(transfer.item))


def keep(transfer: Transfer, source: Tensor | None, output: Tensor | None) -> None:
    """Copies the elements that stay on this rank from its old local tensor to the new one."""
    for copy in transfer.stays:
        assert source is not None
        assert output is not None
        _view(output, copy.shape, copy.other).copy_(_view(source, copy.shape, copy.local))


def _view(tensor: Tensor, shape: tuple[int, ...], place: Place) -> Tensor:
    offset, strides = place.elements(tensor.stride())
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


def is_distributed() -> bool:
    """Whether torch.distributed is initialized, even with a single rank."""
    return dist.is_available() and dist.is_initialized()


class SharedGroup:
    """A process group, or None, in an object that can be copied and pickled.

    A deep copy shares the group. A pickle has its ranks only.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedGroup":
        """Returns itself."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the ranks of the group."""
        ranks = [] if self.group is None else dist.get_process_group_ranks(self.group)
        return _find_group, (ranks, ranks == list(range(world())))


def _find_group(ranks: Sequence[int], whole: bool) -> SharedGroup:
    """Unpickles: the group of all ranks if it had all ranks, else no group."""
    if whole and is_distributed():
        return SharedGroup(dist.group.WORLD)
    if ranks:
        warnings.warn(
            f"the optimizer was saved with a process_group of ranks {list(ranks)}, which a pickle "
            "cannot hold: now each rank decomposes all plain parameters itself. To share that "
            "work, construct the optimizer with process_group and load its state_dict().",
            stacklevel=2,
        )
    return SharedGroup(None)


def world() -> int:
    """Number of ranks of torch.distributed; 1 if it is not initialized."""
    return dist.get_world_size() if is_distributed() else 1


def all_max(mesh: Mesh, values: Sequence[int]) -> list[int]:
    """The element-wise maximum of the values over all ranks of a mesh.

    Every rank must pass the same number of values. The host waits for the result.
    """
    result = torch.tensor(values, dtype=torch.int64, device="cpu")
    for mesh_dim in mesh.shared_dims():
        result = result.to(mesh.device(mesh_dim, torch.device("cpu")))
        dist.all_reduce(result, dist.ReduceOp.MAX, group=mesh.groups[mesh_dim])
    return [int(value) for value in result.tolist()]


def all_sum(mesh: Mesh, values: Tensor) -> Tensor:
    """The element-wise sum over all ranks of a mesh, in place or moved; the host does not wait."""
    for mesh_dim in mesh.shared_dims():
        values = values.to(mesh.device(mesh_dim, values.device))
        dist.all_reduce(values, group=mesh.groups[mesh_dim])
    return values


def all_texts(mesh: Mesh, text: str) -> dict[int, str]:
    """The text of every rank of a mesh, by global rank. Slow: only used to make an error."""
    texts = {mesh.rank: text}
    for mesh_dim in mesh.shared_dims():
        gathered: list[Any] = [None] * mesh.topology.sizes[mesh_dim]
        dist.all_gather_object(gathered, texts, group=mesh.groups[mesh_dim])
        texts = {rank: said for part in gathered for rank, said in part.items()}
    return dict(sorted(texts.items()))


ALL_CALL_WITHIN = timedelta(minutes=5)
"""How long the first rank waits for each other rank in :func:`await_all`. The others wait twice as
long for the first."""


def await_all(mesh: Mesh, call: str) -> None:
    """Waits until all ranks of a mesh have made a call in which they exchange data.

    Only gloo can tell which ranks have not made it. With other backends this returns at once, and
    the first collective of the call waits for as long as the process group's timeout says.

    Args:
        mesh: the ranks.
        call: name of the call, for the error.

    Raises:
        RuntimeError: some ranks did not make the call in time; raised on the ranks that did.
    """
    for mesh_dim in mesh.shared_dims():
        group = mesh.groups[mesh_dim]
        if dist.get_backend(group) != dist.Backend.GLOO:
            continue
        ranks = dist.get_process_group_ranks(group)
        if (who := _find_missing(ranks, group)) is not None:
            minutes = ALL_CALL_WITHIN.total_seconds() / 60
            raise RuntimeError(
                f"{who} has not called {call} within {minutes:g} minutes of the others of ranks "
                f"{ranks}. All ranks that share the parameters must call it, because it moves the "
                "state of weights in compute groups between them. Call it on all ranks, even if "
                "only one writes the result; or set basis_budget=None, so that no rank needs "
                "another."
            )


def _find_missing(ranks: Sequence[int], group: dist.ProcessGroup) -> str | None:
    """Says which rank of a gloo group does not call this in time; None if all do.

    Every rank sends a token to the first one, which names the sender of a token that does not come
    in time. gloo then closes the first rank's connections, so the others cannot learn the name.
    """
    first, *others = ranks
    token, answer = torch.zeros(2, 1, dtype=torch.int64, device="cpu")
    if dist.get_rank() != first:
        works = dist.irecv(answer, first, group), dist.isend(token, first, group)
        begun = time.monotonic()
        try:
            for work in works:
                assert work is not None
                work.wait(2 * ALL_CALL_WITHIN)
        except RuntimeError:
            alone = time.monotonic() - begun > 1.9 * ALL_CALL_WITHIN.total_seconds()
            return f"rank {first}" if alone else f"a rank (which rank {first} names)"
        return None
    end = time.monotonic() + ALL_CALL_WITHIN.total_seconds()
    for rank in others:
        asked = dist.irecv(token, rank, group)
        assert asked is not None
        try:
            asked.wait(timedelta(seconds=max(0.1, end - time.monotonic())))
        except RuntimeError:
            return f"rank {rank}"
    for rank in others:
        dist.send(answer, rank, group)
    return None
