"""Layer: integrations. Where DeepSpeed 0.19.8 keeps which elements of which parameter.

ZeRO flattens parameters and cuts what it gets into one range for each rank. Where is what follows
from shapes and offsets alone, so every rank knows the ranges of all others. What is read here of
DeepSpeed's objects was measured and is verified once against its own low-precision copies.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conda_dist.layout.flat import Flat
from conda_dist.layout.layout import Layout
from conda_dist.runtime.collectives import Mesh


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter as it was given to the optimizer.

    Attributes:
        name: its fully qualified name, or where it stands in the groups.
        shape: its shape, whatever ZeRO has made of the tensor.
        algorithm: "conda" or "adamw".
        splits: rows of the parts that are matrices of their own; () if it is whole.
        row: of a part the first of its rows in the parameter.
    """

    name: str
    shape: tuple[int, ...]
    algorithm: str
    splits: tuple[int, ...] = ()
    row: int = 0

    @property
    def parts(self) -> tuple["Member", ...]:
        """What is a matrix, or a vector, of its own: blocks of rows, or itself."""
        if not self.splits:
            return (self,)
        ends = itertools.accumulate(self.splits, initial=0)
        return tuple(
            replace(
                self,
                name=f"{self.name}[{start}:{stop}]",
                shape=(stop - start, *self.shape[1:]),
                splits=(),
                row=start,
            )
            for start, stop in itertools.pairwise(ends)
        )

    @property
    def before(self) -> int:
        """Elements of the parameter before it, if it is a part."""
        return self.row * math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Piece:
    """What a rank has of a parameter or part, in a tensor that the engine has its optimizer update.

    Attributes:
        member: the parameter, or the part.
        source: the engine's own tensor of it, in the model's dtype.
        index: which of the tensors of the call.
        layout: where its elements are.
        mesh: the ranks that share it.
        start: offset of the first element in a flat tensor, of the first row in the whole tensor of
            a parameter in parts; None if the tensor is its own.
        count: elements, or such rows, held here.
        begin: where in the flattened parameter the first element held here is.
    """

    member: Member
    source: Tensor
    index: int
    layout: Layout
    mesh: Mesh
    start: int | None
    count: int
    begin: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor like the engine's: a view."""
        return tensor if self.start is None else tensor.narrow(0, self.start, self.count)


def find_pieces(
    index: int, tensors: Sequence[Tensor], members: Mapping[Tensor, Member], replicas: Mesh
) -> list[Piece]:
    """What the tensors of one group hold.

    Args:
        index: place of the first of the tensors among those of the call.
        tensors: what the engine has put into the group.
        members: the parameters that the group was made with.
        replicas: the ranks that hold equal copies at stage 0.

    Raises:
        ValueError: the tensors are not what this version of DeepSpeed makes of them.
    """
    params = [p for p in members if p.requires_grad]
    filled = [p for p in params if all(members[p].shape)]
    zero3 = [p for p in filled if hasattr(p, "_z3_optimizer")]
    if all(tensor in members for tensor in tensors):  # stage 0
        return [
            piece
            for i, tensor in enumerate(tensors)
            if tensor in set(filled)
            for piece in _own(index + i, tensor, tensor, members[tensor], replicas)
        ]
    if [tuple(t.shape) for t in tensors] == [members[p].shape for p in filled]:
        return [  # stage 0 in low precision
            piece
            for i, (tensor, param) in enumerate(zip(tensors, filled, strict=True))
            for piece in _own(index + i, tensor, param, members[param], replicas)
        ]
    if len(tensors) == 1 and zero3:
        return _stage3(index, tensors[0], zero3[0]._z3_optimizer, members)
    if len(tensors) == 1 and filled and all(hasattr(p, "_dp_group") for p in filled):
        return _stage12(index, tensors[0], filled, members)
    raise ValueError(
        f"DeepSpeed steps {len(tensors)} tensors of shapes "
        f"{', '.join(str(tuple(t.shape)) for t in tensors[:3])} for {len(params)} parameters "
        f"({', '.join(members[p].name for p in params[:3])}, ...), which is no partition that "
        "Conda knows; it was made for DeepSpeed 0.19.8."
    )


def _own(index: int, tensor: Tensor, source: Tensor, member: Member, mesh: Mesh) -> list[Piece]:
    sizes, pieces = mesh.topology.sizes, []
    for part in member.parts:
        layout = Layout(part.shape, sizes, (None,) * len(sizes))
        start, count = (part.row, part.shape[0]) if member.splits else (None, tensor.numel())
        pieces.append(Piece(part, source, index, layout, mesh, start, count, part.before))
    return pieces


def _stage12(
    index: int, flat: Tensor, params: Sequence[Any], members: Mapping[Tensor, Member]
) -> list[Piece]:
    """Stages 1 and 2: the group's parameters are views of one buffer, each rank has an equal share.

    ``_hp_mapping``, DeepSpeed's own account of it, is wrong with round_robin_gradients; where a
    parameter is in the buffer is right.
    """
    mesh = Mesh.of_group(params[0]._dp_group)
    (rank,), (world,) = mesh.coordinate, mesh.topology.sizes
    size, origin = flat.numel(), min(param.storage_offset() for param in params)
    if len({param.untyped_storage().data_ptr() for param in params}) > 1:
        raise ValueError(f"{members[params[0]].name} and others are not views of one buffer")
    pieces: list[Piece] = []
    for param in params:
        begin, numel = param.storage_offset() - origin, param.numel()
        bounds = tuple(min(max(r * size - begin, 0), numel) for r in range(world + 1))
        start = min(max(begin - rank * size, 0), size)
        pieces += _flat(index, param, members[param], mesh, bounds, start)
    return pieces


def _stage3(index: int, flat: Tensor, zero: Any, members: Mapping[Tensor, Member]) -> list[Piece]:
    """Stage 3: a sub-group's flat tensor has a padded share of every parameter, one after another.

    The padding is not initialized: it belongs to no piece.
    """
    found = [i for i, other in enumerate(zero.fp32_partitioned_groups_flat) if other is flat]
    if len(found) != 1:
        raise ValueError("DeepSpeed steps a tensor that is none of its ZeRO-3 sub-groups")
    start, pieces = 0, list[Piece]()
    for param in zero.fp16_groups[found[0]]:
        if param not in members:
            raise ValueError(f"sub-group {found[0]} has a parameter that the optimizer has not")
        mesh = Mesh.of_group(param.ds_process_group)
        share, numel = int(param.partition_numel()), int(param.ds_numel)
        bounds = tuple(min(r * share, numel) for r in range(mesh.topology.sizes[0] + 1))
        pieces += _flat(index, param, members[param], mesh, bounds, start)
        start += share
    if start != flat.numel():
        raise ValueError(
            f"the shares of sub-group {found[0]} are {start} elements, its tensor {flat.numel()}"
        )
    return pieces


def _flat(
    index: int, param: Tensor, member: Member, mesh: Mesh, bounds: tuple[int, ...], start: int
) -> list[Piece]:
    """A parameter's parts: blocks of rows of a flat range are flat ranges themselves."""
    pieces, here = [], bounds[mesh.coordinate[0]]
    for part in member.parts:
        before, numel = part.before, math.prod(part.shape)
        clipped = tuple(min(max(bound - before, 0), numel) for bound in bounds)
        try:
            layout = Flat.of(part.shape, clipped)
        except ValueError as error:
            raise ValueError(f"{part.name}: {error}") from None
        first, last = layout.held(mesh.coordinate)
        begin = before + first
        offset = start + begin - here if first < last else start
        pieces.append(Piece(part, param, index, layout, mesh, offset, last - first, begin))
    return pieces


def verify(pieces: Sequence[Piece], tensors: Sequence[Tensor]) -> None:
    """Holds what was found against the engine's own copies in the model's dtype.

    Raises:
        ValueError: a piece does not fit into its tensor, two overlap, or the values differ.
    """
    ends: dict[int, int] = {}
    for piece in sorted(pieces, key=lambda p: (p.index, p.start or 0)):
        name, tensor = piece.member.name, tensors[piece.index]
        if piece.start is not None and piece.count:
            if piece.start < ends.get(piece.index, 0) or tensor.numel() < piece.start + piece.count:
                raise ValueError(
                    f"{name}: elements {piece.start} to {piece.start + piece.count} are not its own"
                )
            ends[piece.index] = piece.start + piece.count
        ours = piece.of(tensor).detach()
        theirs = _low_precision(piece)
        if not torch.allclose(ours.to(theirs.dtype), theirs.to(ours.device), 0, 0, equal_nan=True):
            raise ValueError(
                f"{name}: the elements that rank {piece.mesh.rank} is to update are not those of "
                "the model. Conda was made for DeepSpeed 0.19.8; or the model's weights were "
                "changed after deepspeed.initialize, which then has to be told of it by "
                "engine.optimizer.refresh_fp32_params()."
            )


def _low_precision(piece: Piece) -> Tensor:
    param: Any = piece.source
    if piece.start is None:
        return piece.source.detach()
    if hasattr(param, "ds_tensor") and hasattr(param, "_z3_optimizer"):
        share: Tensor = param.ds_tensor.detach()
        here = piece.mesh.coordinate[0] * int(param.partition_numel())
        return share.flatten()[piece.begin - here :][: piece.count]
    if not isinstance(piece.layout, Flat):
        return piece.of(piece.source.detach())
    return piece.source.detach().flatten()[piece.begin :][: piece.count]


def replica_mesh(group: dist.ProcessGroup | None) -> Mesh:
    """The ranks that hold equal copies at stage 0; alone where they are not known."""
    return Mesh() if group is None else Mesh.of_group(group)
