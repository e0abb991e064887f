"""Between torch's tensors and layouts: what a plain tensor or a DTensor holds on this rank."""

from collections.abc import Container

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from conda_dist.exchange import Mesh
from conda_dist.layout import Coordinate, Layout, Split


def find_mesh(tensor: Tensor, group: dist.ProcessGroup | None) -> Mesh:
    """The ranks that share a parameter.

    Args:
        tensor: a DTensor, whose mesh it is, or a plain tensor.
        group: ranks that hold equal copies of the plain tensors (DDP); None if they shall not
            be told of each other.

    Raises:
        ValueError: this rank is not among them.
    """
    if isinstance(tensor, DTensor):
        return Mesh.of_device_mesh(tensor.device_mesh)
    return Mesh() if group is None else Mesh.of_group(group)


def find_layout(name: str, tensor: Tensor, mesh: Mesh) -> Layout:
    """Where the elements of a parameter are.

    Raises:
        ValueError: its placements are none that an optimizer can update, or they do not describe
            the local tensor, or that is a tensor subclass.
    """
    shape = tuple(tensor.shape)
    if is_traceable_wrapper_subclass(local(tensor)):
        raise ValueError(
            f"{name}: its elements are a {type(local(tensor)).__name__}, whose arithmetic is not "
            "that of the numbers it stands for; Conda updates plain floating-point tensors. Leave "
            "the conversion (such as float8 all-gather) of this parameter out."
        )
    if not isinstance(tensor, DTensor):
        return Layout(shape, mesh.topology.sizes, (None,) * len(mesh.topology.sizes))
    splits = tuple(_split(name, tensor, placement) for placement in tensor.placements)
    layout = Layout(shape, mesh.topology.sizes, splits)
    held, expected = tuple(local(tensor).shape), layout.local_shape(mesh.coordinate)
    if held != expected:
        raise ValueError(
            f"{name}: its placements {tensor.placements} give rank {mesh.rank} the local shape "
            f"{expected}, but it holds {held}. Let fully_shard or distribute_tensor make the "
            "shards, or pass shape= and stride= to DTensor.from_local."
        )
    return layout


def _split(name: str, tensor: DTensor, placement: Placement) -> Split | None:
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, _StridedShard):
        return Split(placement.dim % tensor.ndim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Split(placement.dim % tensor.ndim)
    raise ValueError(
        f"{name}: placement {placement!r} cannot be updated by an optimizer; redistribute the "
        "parameter to Shard or Replicate first."
    )


def placements(layout: Layout) -> tuple[Placement, ...]:
    """DTensor's words for a layout of which every rank along a mesh dimension holds a piece."""
    found: list[Placement] = []
    for split in layout.placements:
        assert split is None or (isinstance(split, Split) and split.among is None)
        if split is None:
            found.append(Replicate())
        elif split.stride == 1:
            found.append(Shard(split.dim))
        else:
            found.append(_StridedShard(split.dim, split_factor=split.stride))
    return tuple(found)


def is_split(tensor: Tensor, dims: Container[int]) -> bool:
    """Whether any of these dimensions of a tensor is split over ranks."""
    return isinstance(tensor, DTensor) and any(
        isinstance(p, Shard | _StridedShard) and p.dim in dims for p in tensor.placements
    )


def local(tensor: Tensor) -> Tensor:
    """The elements this rank holds, sharing their memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def like(param: Tensor, layout: Layout, elements: Tensor) -> Tensor:
    """Wraps this rank's ``elements`` as the parameter is wrapped: DTensor on its mesh, or plain."""
    if not isinstance(param, DTensor):
        return elements
    # The stride is that of a contiguous tensor: local tensors are made here, and are.
    stride = torch.empty(layout.shape, device="meta").stride()
    return DTensor.from_local(
        elements,
        param.device_mesh,
        placements(layout),
        run_check=False,
        shape=torch.Size(layout.shape),
        stride=stride,
    )


def copy_blocks(elements: Tensor, layout: Layout, coordinate: Coordinate, whole: Tensor) -> None:
    """Copies what a coordinate holds of a whole tensor into its local one."""
    for block in layout.blocks(coordinate):
        here = tuple(slice(s, s + n) for s, n in zip(block.local, block.shape, strict=True))
        there = tuple(slice(s, s + n) for s, n in zip(block.start, block.shape, strict=True))
        elements[here].copy_(whole[there])


def local_gradient(name: str, param: Tensor) -> Tensor | None:
    """This rank's part of a parameter's gradient, where the parameter's own elements are.

    Raises:
        RuntimeError: the gradient is sparse, not of real numbers or without any, or a plain tensor
            where the parameter is a DTensor.
    """
    grad = param.grad
    if grad is None:
        return None
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{name}: Conda needs dense gradients, got {grad.layout}; build the embedding with "
            "sparse=False."
        )
    if not grad.dtype.is_floating_point:
        raise RuntimeError(f"{name}: its gradient has to be of real numbers, got {grad.dtype}.")
    if grad.is_meta:
        raise RuntimeError(
            f"{name}: it is on the meta device, where it has no elements; materialize the model "
            "(module.to_empty) and initialize it before training."
        )
    if isinstance(param, DTensor) != isinstance(grad, DTensor):
        raise RuntimeError(
            f"{name}: the parameter is a {type(param).__name__} but its gradient is a "
            f"{type(grad).__name__}; both must be DTensors or neither."
        )
    if isinstance(grad, DTensor) and isinstance(param, DTensor):
        if grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)
        return grad.to_local()
    return grad
