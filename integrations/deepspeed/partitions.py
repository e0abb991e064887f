"""Layer: integrations. Which elements of which parameter DeepSpeed 0.19.8 keeps on which rank.

ZeRO flattens parameters, concatenates them and gives each rank one range of the result. Shapes and
offsets alone determine the ranges, so every rank knows the ranges of all others. DeepSpeed does not
document the attributes that this file reads; :func:`verify_shards` compares the values it finds
there once with the model's own.
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
class ParameterInfo:
    """A parameter that the optimizer was given, or one part of it that ``splits`` cut.

    Attributes:
        name: its fully qualified name, or its place in the groups if it has none.
        shape: its full shape, before ZeRO partitioned it.
        algorithm: "conda" or "adamw".
        splits: the rows of each part; () if it is not split.
        first_row: the row of the parameter where this part begins.
    """

    name: str
    shape: tuple[int, ...]
    algorithm: str
    splits: tuple[int, ...] = ()
    first_row: int = 0

    @property
    def parts(self) -> tuple["ParameterInfo", ...]:
        """The parts, which are blocks of rows, or the parameter itself if it is not split."""
        if not self.splits:
            return (self,)
        ends = itertools.accumulate(self.splits, initial=0)
        return tuple(
            replace(
                self,
                name=f"{self.name}[{start}:{stop}]",
                shape=(stop - start, *self.shape[1:]),
                splits=(),
                first_row=start,
            )
            for start, stop in itertools.pairwise(ends)
        )

    @property
    def offset(self) -> int:
        """The index of this part's first element in the flattened parameter."""
        return self.first_row * math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """This rank's elements of a parameter, or of a part, in a tensor that the engine steps.

    Attributes:
        info: the parameter or part.
        param: the model's parameter, in the model's dtype.
        tensor_index: index of the engine's tensor among those of one call of ``step()``.
        layout: which elements each rank has.
        mesh: the ranks that share the parameter.
        start: where the shard begins in the engine's tensor: the index of its first element in a
            flat tensor, or of its first row in the tensor of a split parameter; None if the
            shard is the whole tensor.
        length: number of elements, or of such rows.
        first: index of the shard's first element in the flattened parameter.
    """

    info: ParameterInfo
    param: Tensor
    tensor_index: int
    layout: Layout
    mesh: Mesh
    start: int | None
    length: int
    first: int = 0

    def view(self, tensor: Tensor) -> Tensor:
        """A view of the shard's elements in a tensor that has the form of the engine's."""
        return tensor if self.start is None else tensor.narrow(0, self.start, self.length)


def find_shards(
    first_index: int,
    tensors: Sequence[Tensor],
    infos: Mapping[Tensor, ParameterInfo],
    replicas: Mesh,
) -> list[ParameterShard]:
    """Finds what the engine's tensors of one parameter group contain.

    Args:
        first_index: index of the first of these tensors among those of the call of ``step()``.
        tensors: the tensors that the engine has put into the group.
        infos: the parameters with which the group was made.
        replicas: at stage 0: the ranks with equal copies.

    Raises:
        ValueError: the tensors do not have the form that DeepSpeed 0.19.8 gives them.
    """
    params = [p for p in infos if p.requires_grad]
    filled = [p for p in params if all(infos[p].shape)]  # parameters with elements
    zero3 = [p for p in filled if hasattr(p, "_z3_optimizer")]
    if all(tensor in infos for tensor in tensors):  # stage 0
        return [
            shard
            for i, tensor in enumerate(tensors)
            if tensor in set(filled)
            for shard in _unpartitioned(first_index + i, tensor, tensor, infos[tensor], replicas)
        ]
    if [tuple(t.shape) for t in tensors] == [infos[p].shape for p in filled]:
        return [  # stage 0 with float32 copies of low-precision parameters
            shard
            for i, (tensor, param) in enumerate(zip(tensors, filled, strict=True))
            for shard in _unpartitioned(first_index + i, tensor, param, infos[param], replicas)
        ]
    if len(tensors) == 1 and zero3:
        return _stage3(first_index, tensors[0], zero3[0]._z3_optimizer, infos)
    if len(tensors) == 1 and filled and all(hasattr(p, "_dp_group") for p in filled):
        return _stages_1_and_2(first_index, tensors[0], filled, infos)
    raise ValueError(
        f"DeepSpeed steps {len(tensors)} tensors of shapes "
        f"{', '.join(str(tuple(t.shape)) for t in tensors[:3])} for {len(params)} parameters "
        f"({', '.join(infos[p].name for p in params[:3])}, ...), which is no partition that "
        "Conda knows: it supports DeepSpeed 0.19.8."
    )


def _unpartitioned(
    index: int, tensor: Tensor, param: Tensor, info: ParameterInfo, mesh: Mesh
) -> list[ParameterShard]:
    """The shards of a parameter that the engine's tensor has whole."""
    sizes, shards = mesh.topology.sizes, []
    for part in info.parts:
        layout = Layout(part.shape, sizes, (None,) * len(sizes))
        start, length = (part.first_row, part.shape[0]) if info.splits else (None, tensor.numel())
        shards.append(ParameterShard(part, param, index, layout, mesh, start, length, part.offset))
    return shards


def _stages_1_and_2(
    index: int, flat: Tensor, params: Sequence[Any], infos: Mapping[Tensor, ParameterInfo]
) -> list[ParameterShard]:
    """At stages 1 and 2, parameters are views of one buffer, and each rank has an equal share.

    DeepSpeed's own record, ``_hp_mapping``, is wrong with round_robin_gradients, so use each
    parameter's offset in the buffer.
    """
    mesh = Mesh.of_group(params[0]._dp_group)
    (rank,), (world,) = mesh.coordinate, mesh.topology.sizes
    size, origin = flat.numel(), min(param.storage_offset() for param in params)
    if len({param.untyped_storage().data_ptr() for param in params}) > 1:
        raise ValueError(f"{infos[params[0]].name} and others are not views of one buffer")
    shards: list[ParameterShard] = []
    for param in params:
        begin, numel = param.storage_offset() - origin, param.numel()
        # Rank r has the elements [bounds[r], bounds[r + 1]) of the flattened parameter.
        bounds = tuple(min(max(r * size - begin, 0), numel) for r in range(world + 1))
        start = min(max(begin - rank * size, 0), size)
        shards += _flat_shards(index, param, infos[param], mesh, bounds, start)
    return shards


def _stage3(
    index: int, flat: Tensor, zero: Any, infos: Mapping[Tensor, ParameterInfo]
) -> list[ParameterShard]:
    """At stage 3, a sub-group's flat tensor has a padded share of each parameter, in order.

    The padding is not initialized and belongs to no shard.
    """
    found = [i for i, other in enumerate(zero.fp32_partitioned_groups_flat) if other is flat]
    if len(found) != 1:
        raise ValueError("DeepSpeed steps a tensor that is none of its ZeRO-3 sub-groups")
    start, shards = 0, list[ParameterShard]()
    for param in zero.fp16_groups[found[0]]:
        if param not in infos:
            raise ValueError(
                f"sub-group {found[0]} has a parameter of shape {tuple(param.ds_shape)} that the "
                "optimizer does not have"
            )
        mesh = Mesh.of_group(param.ds_process_group)
        share, numel = int(param.partition_numel()), int(param.ds_numel)
        # Rank r has the elements [bounds[r], bounds[r + 1]) of the flattened parameter.
        bounds = tuple(min(r * share, numel) for r in range(mesh.topology.sizes[0] + 1))
        shards += _flat_shards(index, param, infos[param], mesh, bounds, start)
        start += share
    if start != flat.numel():
        raise ValueError(
            f"the parameters of sub-group {found[0]} have {start} elements on this rank, but its "
            f"tensor has {flat.numel()}"
        )
    return shards


def _flat_shards(
    index: int,
    param: Tensor,
    info: ParameterInfo,
    mesh: Mesh,
    bounds: tuple[int, ...],
    start: int,
) -> list[ParameterShard]:
    """The shards of a flattened parameter, one for each part.

    A part is a block of rows, so a rank's range of the parameter cuts it into a range, too.

    Args:
        index: index of the engine's tensor.
        param: the model's parameter.
        info: the parameter.
        mesh: the ranks that share it.
        bounds: rank r has the elements [bounds[r], bounds[r + 1]) of the flattened parameter.
        start: index of this rank's first element of the parameter in the engine's tensor.

    Raises:
        ValueError: :class:`Flat` cannot describe a part's layout.
    """
    shards, first_here = [], bounds[mesh.coordinate[0]]
    for part in info.parts:
        numel = math.prod(part.shape)
        in_part = tuple(min(max(bound - part.offset, 0), numel) for bound in bounds)
        try:
            layout = Flat.of(part.shape, in_part)
        except ValueError as error:
            raise ValueError(f"{part.name}: {error}") from None
        begin, end = layout.held(mesh.coordinate)
        first = part.offset + begin
        at = start + first - first_here if begin < end else start
        shards.append(ParameterShard(part, param, index, layout, mesh, at, end - begin, first))
    return shards


def verify_shards(shards: Sequence[ParameterShard], tensors: Sequence[Tensor]) -> None:
    """Compares the shards of the engine's tensors with the model's own parameters.

    Args:
        shards: from :func:`find_shards`.
        tensors: the engine's tensors of the call of ``step()``.

    Raises:
        ValueError: a shard is not inside its tensor, two shards overlap, or values differ.
    """
    ends: dict[int, int] = {}  # by tensor: the end of the last shard
    for shard in sorted(shards, key=lambda s: (s.tensor_index, s.start or 0)):
        name, tensor = shard.info.name, tensors[shard.tensor_index]
        if shard.start is not None and shard.length:
            end = shard.start + shard.length
            if shard.start < ends.get(shard.tensor_index, 0) or tensor.numel() < end:
                raise ValueError(
                    f"{name}: its elements {shard.start} to {end} of the engine's tensor belong to "
                    "another parameter, or are outside of it"
                )
            ends[shard.tensor_index] = end
        ours = shard.view(tensor).detach()
        theirs = _model_values(shard)
        if not torch.allclose(ours.to(theirs.dtype), theirs.to(ours.device), 0, 0, equal_nan=True):
            raise ValueError(
                f"{name}: the elements that rank {shard.mesh.rank} would update are not those of "
                "the model. Either this is not DeepSpeed 0.19.8, or the model's weights were "
                "changed after deepspeed.initialize: then call "
                "engine.optimizer.refresh_fp32_params()."
            )


def _model_values(shard: ParameterShard) -> Tensor:
    """The values of a shard in the model, in the model's dtype."""
    param: Any = shard.param
    if shard.start is None:
        return shard.param.detach()
    if hasattr(param, "ds_tensor") and hasattr(param, "_z3_optimizer"):
        on_this_rank: Tensor = param.ds_tensor.detach()
        first_here = shard.mesh.coordinate[0] * int(param.partition_numel())
        return on_this_rank.flatten()[shard.first - first_here :][: shard.length]
    if not isinstance(shard.layout, Flat):
        return shard.view(shard.param.detach())
    return shard.param.detach().flatten()[shard.first :][: shard.length]


def replica_mesh(group: dist.ProcessGroup | None) -> Mesh:
    """The ranks with equal copies at stage 0; this rank alone if the engine has no such group."""
    return Mesh() if group is None else Mesh.of_group(group)
