"""Layer: integrations. FSDP2: shard placements with which Conda's steps send no gradients."""

import weakref
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from conda_dist.layout.moves import kept_dim
from conda_dist.routing import clean_name, route_model
from conda_dist.runtime import dtensor
from conda_dist.runtime.collectives import Mesh


def conda_shard_placement(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    conda: Sequence[str] = (),
    adamw: Sequence[str] = (),
    strict: bool = False,
) -> Callable[[nn.Parameter], Shard | None]:
    """Builds a ``shard_placement_fn`` that shards wide matrices by columns, all else by dim 0.

    Conda's projection commutes with slices of columns of a wide matrix (m < n), and with slices of
    rows of any other matrix. Shards of this form need no other rank in a step::

        place = conda_shard_placement(model, mesh)
        for block in model.layers:
            fully_shard(block, mesh=mesh, shard_placement_fn=place)
        fully_shard(model, mesh=mesh, shard_placement_fn=place)

    FSDP2 can shard a dimension other than the first only evenly. A wide matrix whose columns do not
    divide is sharded by rows, and its step exchanges the gradient; :meth:`Conda.report` shows it.
    Weights of three dimensions are sharded by the first, so that ranks have whole matrices. Shapes
    and placements alone decide, so all ranks decide alike. This function does not know the
    ``splits`` of ``param_groups``: a part may be wide where the weight is tall.

    Args:
        model: the module, after tensor parallelism and ``to_empty``, and before the first
            ``fully_shard``.
        mesh: the mesh for ``fully_shard``. Its last dimension shards.
        conda: see :func:`conda_dist.param_groups`.
        adamw: see :func:`conda_dist.param_groups`.
        strict: whether to raise for a wide matrix whose columns do not divide.

    Raises:
        TypeError: ``mesh`` is no DeviceMesh.
        ValueError: the mesh has more than two dimensions; a pattern matches no parameter; or, with
            ``strict``, the columns of a wide matrix do not divide. The returned function raises
            it for a parameter that ``model`` did not have.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim > 2:
        raise ValueError(
            f"fully_shard takes a mesh of one dimension (shard) or two (replicate, shard), got "
            f"{mesh.ndim}: {mesh}"
        )
    routed = route_model(model, conda, adamw)
    if routed.unmatched:
        raise ValueError(
            f"pattern {routed.unmatched[0]!r} matches no parameter of {type(model).__name__}"
        )
    columns = _find_column_shards(routed.conda, mesh.size(mesh.ndim - 1), strict)
    # fully_shard frees the unsharded parameters, and a new tensor may get the id of a freed one.
    # Weak references tell them apart and keep nothing alive.
    known = {
        id(param): (weakref.ref(param), columns.get(id(param))) for param in model.parameters()
    }

    def place(param: nn.Parameter) -> Shard | None:
        seen, shard = known.get(id(param), (lambda: None, None))
        if seen() is not param:
            raise ValueError(
                f"fully_shard got a parameter of shape {tuple(param.shape)} that the model did not "
                "have when conda_shard_placement was called: call it after parallelize_module and "
                "to_empty, and before the first fully_shard."
            )
        return shard

    return place


def _find_column_shards(
    weights: Sequence[tuple[str, Tensor]], shards: int, strict: bool
) -> dict[int, Shard]:
    """The placement Shard(1), by id, of the parameters that FSDP2 can and should shard by columns.

    Args:
        weights: (name, parameter) pairs of the conda path.
        shards: number of ranks that share a parameter.
        strict: see :func:`conda_shard_placement`.
    """
    columns: dict[int, Shard] = {}
    for name, param in weights:
        if param.ndim > 2 or kept_dim(tuple(param.shape)) != 1:
            continue
        sizes = _column_sizes(clean_name(name), param)
        if all(size % shards == 0 for size in sizes):
            columns[id(param)] = Shard(1)
        elif strict:
            raise ValueError(
                f"{clean_name(name)}: {tuple(param.shape)} is wide, but its columns "
                f"{sorted(sizes)} do not divide by {shards} ranks, and FSDP2 shards only the first "
                "dimension unevenly. Choose another number of ranks, or strict=False to shard it "
                "by rows."
            )
    return columns


def _column_sizes(name: str, param: Tensor) -> set[int]:
    """The numbers of columns of this weight on the ranks of its tensor-parallel mesh."""
    if not isinstance(param, DTensor):
        return {param.shape[-1]}
    mesh = Mesh.of_device_mesh(param.device_mesh)
    layout = dtensor.find_layout(name, param, mesh)
    return {layout.local_shape(coordinate)[-1] for coordinate in layout.coordinates()}
