"""From torch's tensors to layouts and back: what a plain tensor or a DTensor holds on this rank."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from conda_dist.layout.layout import Coordinate, Layout, Split
from conda_dist.runtime.collectives import Mesh


def find_mesh(tensor: Tensor, group: dist.ProcessGroup | None) -> Mesh:
    """The ranks that share a parameter: a DTensor's mesh, or ``group`` for a plain tensor.

    Args:
        tensor: the parameter.
        group: ranks that hold equal copies of plain tensors (DDP). None: replicas do not share
            refresh work, so each rank is a mesh of its own.

    Raises:
        ValueError: this rank is not among them.
    """
    if isinstance(tensor, DTensor):
        mesh = Mesh.of_device_mesh(tensor.device_mesh)
    else:
        mesh = Mesh() if group is None else Mesh.of_group(group)
    return replace(mesh, home=local(tensor).device)


def find_layout(name: str, tensor: Tensor, mesh: Mesh) -> Layout:
    """The layout of a parameter.

    Args:
        name: fully qualified name, for errors.
        tensor: the parameter.
        mesh: from :func:`find_mesh`.

    Raises:
        ValueError: an optimizer cannot update a tensor with such placements; the placements do not
            fit the shape of the local tensor; or the local tensor is a tensor subclass.
    """
    shape = tuple(tensor.shape)
    if is_traceable_wrapper_subclass(local(tensor)):
        raise ValueError(
            f"{name}: its elements are a {type(local(tensor)).__name__}, but only plain "
            "floating-point tensors can be updated: arithmetic on a subclass may differ from "
            "arithmetic on the numbers it represents. Do not convert this parameter (for example "
            "to a float8 all-gather)."
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
    """A DTensor placement as a layout's placement."""
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, _StridedShard):
        return Split(placement.dim % tensor.ndim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Split(placement.dim % tensor.ndim)
    raise ValueError(
        f"{name}: placement {placement!r} is not supported; redistribute the parameter to Shard "
        "or Replicate first."
    )


def placements(layout: Layout) -> tuple[Placement, ...]:
    """A layout's placements as DTensor placements; the layout must not have an ``among``."""
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


def local(tensor: Tensor) -> Tensor:
    """The local tensor of this rank, detached; it shares the parameter's memory."""
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held.detach() if held.requires_grad else held


def like(param: Tensor, layout: Layout, elements: Tensor) -> Tensor:
    """Wraps a local tensor like the parameter: as a DTensor on its mesh, or not at all.

    Args:
        param: the parameter.
        layout: the layout of the new tensor.
        elements: this rank's local tensor, contiguous.
    """
    if not isinstance(param, DTensor):
        return elements
    stride = torch.empty(layout.shape, device="meta").stride()
    return _wrap(elements, param.device_mesh, placements(layout), layout.shape, stride)


def copy_blocks(elements: Tensor, layout: Layout, coordinate: Coordinate, whole: Tensor) -> None:
    """Copies the elements that a coordinate holds from a whole tensor to its local tensor."""
    for block in layout.blocks(coordinate):
        here = tuple(slice(s, s + n) for s, n in zip(block.local, block.shape, strict=True))
        there = tuple(slice(s, s + n) for s, n in zip(block.start, block.shape, strict=True))
        elements[here].copy_(whole[there])


def form(param: Tensor) -> tuple[object, ...]:
    """The properties of a parameter on which plans and kernels depend.

    The result changes if the parameter is replaced, frozen, resized, cast, moved or resharded, also
    through ``.data``, ``torch.utils.swap_tensors`` or the local tensor of a DTensor. Comparing two
    results reads no elements.
    """
    given = (
        id(param),
        type(param),
        param.requires_grad,
        param.dtype,
        param.device,
        param.shape,
        param.stride(),
    )
    if not isinstance(param, DTensor):
        return given
    here = param.to_local()
    shards = param.device_mesh, param.placements, here.shape, here.stride(), here.device, type(here)
    return given + shards


def check_state(name: str, param: Tensor, key: str, held: Tensor, layout: Layout) -> None:
    """Checks that a state of a parameter has the device and the placements that its layout says.

    Args:
        name: fully qualified name of the parameter.
        param: the parameter.
        key: name of the state.
        held: the state.
        layout: the layout that the state should have.

    Raises:
        ValueError: the state was made for another device, or for other shards of the parameter.
    """
    advice = (
        "Shard, move and resize the model before the optimizer has state: before its first step "
        "and before a checkpoint is loaded into it. Otherwise drop the state (del "
        "optimizer.state[param]) or load a checkpoint afterwards."
    )
    if isinstance(held, DTensor) != isinstance(param, DTensor):
        raise ValueError(
            f"{name}: its {key} is a {type(held).__name__}, but the parameter is a "
            f"{type(param).__name__}: the parameter was sharded after its state was made. {advice}"
        )
    if isinstance(held, DTensor) and isinstance(param, DTensor):
        found = held.device_mesh, held.placements
        if found != (param.device_mesh, placements(layout)):
            raise ValueError(
                f"{name}: its {key} has the placements {found[1]} on {found[0]}, but should have "
                f"{placements(layout)} on {param.device_mesh}: the parameter was resharded after "
                f"its state was made. {advice}"
            )
    if (there := local(held).device) != (here := local(param).device):
        raise ValueError(
            f"{name}: its {key} is on {there}, but the parameter is on {here}: the parameter was "
            f"moved after its state was made. {advice}"
        )


def check_gradient(name: str, param: Tensor) -> None:
    """Checks that a gradient fits its parameter.

    Raises:
        RuntimeError: the gradient is sparse, not floating-point, or on the meta device; has another
            shape or device than the parameter; is a DTensor and the parameter is not, or the other
            way round; or is a DTensor on another mesh or with other shards.
    """
    grad = param.grad
    if grad is None:
        return
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{name}: the optimizer needs dense gradients, got {grad.layout}; build the "
            "embedding with sparse=False."
        )
    if not grad.dtype.is_floating_point:
        raise RuntimeError(
            f"{name}: its gradient must be floating-point (real numbers), got {grad.dtype}."
        )
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
    if grad.shape != param.shape:
        raise RuntimeError(
            f"{name}: its gradient has shape {tuple(grad.shape)}, but the parameter has shape "
            f"{tuple(param.shape)}; set the gradient to None when the parameter is resized."
        )
    if grad.device != param.device:
        raise RuntimeError(
            f"{name}: its gradient is on {grad.device}, but the parameter is on {param.device}; "
            "set the gradient to None when the parameter is moved."
        )
    if isinstance(grad, DTensor) and isinstance(param, DTensor):
        # Equal meshes are nearly always the same object; comparing distinct objects takes time.
        meshes = grad.device_mesh, param.device_mesh
        if meshes[0] is not meshes[1] and meshes[0] != meshes[1]:
            raise RuntimeError(
                f"{name}: its gradient is on {meshes[0]}, but the parameter is on {meshes[1]}; "
                "both must be on the same mesh."
            )
        held, expected = grad.to_local().shape, local(param).shape
        if held != expected and grad.placements == param.placements:
            raise RuntimeError(
                f"{name}: this rank holds {tuple(held)} of its gradient, but {tuple(expected)} of "
                "the parameter; make the gradient's DTensor from shards of the parameter's shapes."
            )


def local_gradient(name: str, param: Tensor) -> Tensor | None:
    """The local tensor of a parameter's gradient, redistributed to the parameter's placements.

    Returns:
        The local tensor, of the parameter's local shape; None if there is no gradient.

    Raises:
        RuntimeError: see :func:`check_gradient`.
    """
    grad = param.grad
    if grad is None:
        return None
    if (  # nearly all gradients pass this one test, without the slower check
        grad.dtype is param.dtype
        and grad.layout is torch.strided
        and grad.shape == param.shape
        and grad.device == param.device
        and not grad.is_meta
    ):
        if type(grad) is Tensor and not isinstance(param, DTensor):
            return grad
        if (
            isinstance(grad, DTensor)
            and isinstance(param, DTensor)
            and grad.device_mesh is param.device_mesh
            and grad.placements == param.placements
        ):
            held = grad.to_local()
            if held.shape == param.to_local().shape:
                return held
    check_gradient(name, param)
    if not isinstance(grad, DTensor) or not isinstance(param, DTensor):
        return grad
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return grad.to_local()


def meta_like(grad: DTensor) -> DTensor:
    """A DTensor with the same placements, shape and dtype, whose elements are on "meta"."""
    with torch.no_grad():
        return _from_local(grad, grad.to_local().to("meta"))


def reduce_zeros(param: Tensor, example: DTensor) -> None:
    """Takes part, with zeros, in the reduction of a partial gradient that other ranks have.

    Args:
        param: the parameter, of which this rank has no gradient.
        example: a gradient without elements, from :func:`meta_like`.
    """
    assert isinstance(param, DTensor)
    zeros = torch.zeros_like(example.to_local(), device=local(param).device)
    _from_local(example, zeros).redistribute(placements=param.placements)


def _from_local(like: DTensor, elements: Tensor) -> DTensor:
    return _wrap(elements, like.device_mesh, like.placements, like.shape, like.stride())


def _wrap(
    elements: Tensor,
    mesh: DeviceMesh,
    placed: tuple[Placement, ...],
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> DTensor:
    """A DTensor with this local tensor, which stays on its device.

    ``DTensor.from_local`` would move it to the device type of the mesh. With FSDP2's CPU offload,
    parameters and states are on the CPU, but their mesh is one of GPUs.
    """
    meta = TensorMeta(torch.Size(shape), stride, elements.dtype)
    wrapped: DTensor = DTensor(elements, DTensorSpec(mesh, placed, meta), requires_grad=False)
    return wrapped
