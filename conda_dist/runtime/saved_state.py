"""The state of separate weights as checkpoints have it, which know no compute groups.

Every state becomes a DTensor on the parameter's own mesh: moments are placed as the parameter is,
bases and other copied states are split by rows. So a checkpoint that was written under any
grouping, on any number of ranks, loads under any other. Both ways are for all ranks of a mesh to go
together.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from conda_dist.layout.redistribution import plan_hops, redistribution
from conda_dist.plan.weight_plan import (
    copy_from_saved,
    copy_to_saved,
    moments_to_saved,
    saved_copy,
)
from conda_dist.runtime import dtensor
from conda_dist.runtime.collectives import Exchange, Mesh, agree, await_all
from conda_dist.runtime.weight import Weight


def to_saved(weights: Sequence[Weight]) -> dict[Tensor, dict[str, Tensor]]:
    """The states of separate weights, by parameter and name, as a checkpoint has them.

    Args:
        weights: in the same order on all ranks of a mesh.
    """
    saved: dict[Tensor, dict[str, Tensor]] = {}
    for weight in weights:
        plan, layouts = weight.plan, weight.state_layouts()
        states = saved.setdefault(weight.param, {})
        tensors = [dtensor.local(weight.state[key]) for key in layouts]
        specs = [weight.specs[weight.names[key]] for key in layouts]
        routes = [
            moments_to_saved(plan) if spec.cut else copy_to_saved(plan, spec.shape)
            for spec in specs
        ]
        hops = plan_hops(routes, weight.mesh.coordinate)
        dtypes = [tensor.dtype for tensor in tensors]
        arrived = Exchange(weight.mesh, hops, tensors, dtypes, tensors[0].device).wait()
        for key, spec, elements in zip(layouts, specs, arrived, strict=True):
            assert elements is not None
            if not spec.cut:
                layout = saved_copy(plan, spec.shape)
                # What nothing moved is the state itself, which the next step changes.
                kept = elements.clone() if elements is weight.state[key] else elements
                states[key] = dtensor.like(weight.param, layout, kept)
                continue
            name = weight.saved_key(key)
            if name not in states:
                layout = weight.plan.storage.whole
                local = torch.zeros(
                    layout.local_shape(weight.mesh.coordinate),
                    dtype=elements.dtype,
                    device=elements.device,
                )
                states[name] = dtensor.like(weight.param, layout, local)
            weight.set_rows(dtensor.local(states[name]), elements)
    return saved


def from_saved(weight: Weight, key: str, value: Tensor) -> Tensor:
    """This rank's elements of a state of a separate weight, in the value's dtype.

    Args:
        weight: the weight.
        key: which of its states.
        value: the state that a checkpoint has of the parameter: a DTensor of any layout, which all
            ranks of the mesh must have, or the whole as a plain tensor.
    """
    plan, coordinate = weight.plan, weight.mesh.coordinate
    device, spec = dtensor.local(weight.param).device, weight.specs[weight.names[key]]
    if isinstance(value, DTensor) and value.device_mesh == getattr(
        weight.param, "device_mesh", None
    ):
        saved = plan.storage.whole if spec.cut else saved_copy(plan, spec.shape)
        wanted = dtensor.placements(saved)
        if value.placements != wanted:
            value = value.redistribute(placements=wanted)
        local = value.to_local().to(device)
        legs = redistribution(plan.moves) if spec.cut else copy_from_saved(plan, spec.shape)
        local = weight.rows(local) if spec.cut else local
        hops = plan_hops([legs], coordinate)
        arrived = Exchange(weight.mesh, hops, [local], [local.dtype], device).wait()[0]
        assert arrived is not None
        return arrived
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    if spec.cut and plan.seen_as_matrix:
        whole = whole.flatten(1)
    if spec.cut and plan.storage.window is not None:
        runs = plan.storage.window[0]
        whole = torch.cat([whole[..., run.start : run.stop, :] for run in runs], -2)
    layout = weight.state_layouts()[key]
    elements = torch.empty(layout.local_shape(coordinate), dtype=whole.dtype, device=device)
    dtensor.copy_blocks(elements, layout, coordinate, whole)
    return elements


COUNTS = ("step", "basis_step", "snapshot_step")
"""States that are counts, on the CPU."""


def convert(
    weights: Iterable[Weight], params: Sequence[Tensor], states: MutableMapping[int, Any]
) -> None:
    """Puts states as checkpoints have them in the place of those that only this rank knows.

    Args:
        weights: those with state.
        params: the optimizer's parameters, in order.
        states: of a state dict, by index of the parameter; changed.
    """
    saved: dict[Tensor, dict[str, Tensor]] = {}
    local: dict[Tensor, set[str]] = defaultdict(set)
    for mesh, separate in _separate(weights).items():
        await_all(mesh, "state_dict()")
        agree(mesh, [str(w.plan) for w in separate], None, "cannot make its state dict")
        saved |= to_saved(separate)
        for weight in separate:
            local[weight.param] |= weight.state_layouts().keys()
    for index, param in enumerate(params):
        if index in states:
            kept = {k: v for k, v in states[index].items() if k not in local[param]}
            states[index] = {
                key: _count(value, param, bool(local[param])) if key in COUNTS else value
                for key, value in {**kept, **saved.get(param, {})}.items()
            }


def _count(value: Tensor, param: Tensor, copied: bool) -> Tensor:
    """A count as checkpoints have it; a copy where the other states of its parameter are copies.

    torch wants all states of a dimension or more on one device.
    """
    value = value.to(param.device) if value.ndim else value
    return value.clone() if copied else value


def agree_to_load(
    weights: Iterable[Weight],
    states: Mapping[Tensor, Mapping[str, Any]],
    error: Exception | None,
) -> None:
    """Has all ranks that will exchange elements of a state dict know that all can load it.

    Args:
        weights: the optimizer's.
        states: what the state dict has of each parameter.
        error: what is wrong with it on this rank, or None.

    Raises:
        RuntimeError: it does not fit on some rank, or is given in another form; on all alike.
    """
    for mesh, separate in _separate(weights).items():
        lines = [
            f"{w.plan} loads {sorted(f'{k} {type(v).__name__}' for k, v in values.items())}"
            for w in separate
            if (values := states.get(w.param))
        ]
        await_all(mesh, "load_state_dict()")
        agree(mesh, lines, error, "cannot load the state dict")


def _separate(weights: Iterable[Weight]) -> dict[Mesh, list[Weight]]:
    found: dict[Mesh, list[Weight]] = defaultdict(list)
    for weight in weights:
        if weight.plan.separate:
            found[weight.mesh].append(weight)
    return found
