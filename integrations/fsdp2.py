"""Layer: integrations. FSDP2: shards laid so that no Conda step moves a gradient."""

import weakref
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from conda_dist.layout.moves import kept_dim
from conda_dist.routing import clean_name, divide
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
    """A ``shard_placement_fn`` for ``fully_shard``: wide matrices by columns, all else by dim 0.

    Conda leaves the columns of a wide matrix (m < n) alone and the rows of any other, so shards of
    them step without a word to other ranks::

        place = conda_shard_placement(model, mesh)
        for block in model.layers:
            fully_shard(block, mesh=mesh, shard_placement_fn=place)
        fully_shard(model, mesh=mesh, shard_placement_fn=place)

    FSDP2 shards a dimension other than the first only where it divides evenly. A wide matrix that
    does not is left to rows: its step then exchanges the gradient, as :meth:`Conda.report` shows.
    What is decided depends on shapes and placements only, and so is the same on all ranks. Weights
    of three dimensions are left to the first, along which whole matrices are dealt out. Parts of
    weights that ``param_groups`` splits have shapes of their own, which this does not know.

    Args:
        model: the module, its parameters those that ``fully_shard`` is going to see: after
            tensor parallelism and ``to_empty``, before any ``fully_shard``.
        mesh: the mesh given to ``fully_shard``; its last dimension is the one that shards.
        conda: as of :func:`conda_dist.param_groups`.
        adamw: as of :func:`conda_dist.param_groups`.
        strict: whether a wide matrix that does not divide evenly is an error.

    Raises:
        TypeError: ``mesh`` is no DeviceMesh.
        ValueError: the mesh has more than two dimensions; a pattern matches no parameter; or,
            with ``strict``, a wide matrix does not divide. From ``fully_shard``: a parameter is
            not one that ``model`` had.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim > 2:
        raise ValueError(
            f"fully_shard takes a mesh of one dimension (shard) or two (replicate, shard), got "
            f"{mesh.ndim}: {mesh}"
        )
    division = divide(model, conda, adamw)
    if division.unmatched:
        raise ValueError(
            f"pattern {division.unmatched[0]!r} matches no parameter of {type(model).__name__}"
        )
    columns = _by_columns(division.conda, mesh.size(mesh.ndim - 1), strict)
    # Weak, for fully_shard frees the whole parameters it shards, and their ids may come again.
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


def _by_columns(weights: Sequence[tuple[str, Tensor]], ways: int, strict: bool) -> dict[int, Shard]:
    """By id of a parameter the placement of those that FSDP2 can and should shard by columns."""
    columns: dict[int, Shard] = {}
    for name, param in weights:
        if param.ndim > 2 or kept_dim(tuple(param.shape)) != 1:
            continue
        sizes = _column_sizes(clean_name(name), param)
        if all(size % ways == 0 for size in sizes):
            columns[id(param)] = Shard(1)
        elif strict:
            raise ValueError(
                f"{clean_name(name)}: {tuple(param.shape)} is wide, but its columns "
                f"{sorted(sizes)} do not divide by {ways} ranks, and FSDP2 shards no dimension but "
                "the first unevenly. Choose another number of ranks, or strict=False to leave it "
                "to rows."
            )
    return columns


def _column_sizes(name: str, param: Tensor) -> set[int]:
    """Columns that the ranks of a tensor-parallel mesh hold, each of which FSDP2 would shard."""
    if not isinstance(param, DTensor):
        return {param.shape[-1]}
    mesh = Mesh.of_device_mesh(param.device_mesh)
    layout = dtensor.find_layout(name, param, mesh)
    return {layout.local_shape(coordinate)[-1] for coordinate in layout.coordinates()}
