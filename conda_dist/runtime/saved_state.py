"""Converts separate states (``plan.separate``) to the form of checkpoints, and back.

Checkpoints do not depend on compute groups. In them every state is a DTensor on the parameter's own
mesh: moments have the parameter's placements; bases and other copied states are split along their
first dimension. So a checkpoint loads on any number of ranks, with any compute groups. All ranks of
a mesh must convert together, because they exchange elements.
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
from conda_dist.runtime.collectives import Exchange, Mesh, await_all
from conda_dist.runtime.errors import agree
from conda_dist.runtime.weight import Weight


def to_saved(weights: Sequence[Weight]) -> dict[Tensor, dict[str, Tensor]]:
    """Converts the states of weights to the form of checkpoints.

    Args:
        weights: weights with separate states, of one mesh, in the same order on all ranks.

    Returns:
        The states by parameter and name. They are copies.
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
                # If nothing moved, this is the state itself; the next step changes it, so copy it.
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
    """Converts a state from the form of checkpoints.

    Args:
        weight: a weight with separate states.
        key: name of the state.
        value: the parameter's state in a checkpoint: a DTensor of any placements, on all ranks of
            the mesh, or a whole plain tensor.

    Returns:
        This rank's elements of the weight's state, in the dtype of ``value``.
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
    """Replaces separate states in a state dict by their form in checkpoints.

    Args:
        weights: the weights that have state.
        params: the optimizer's parameters, in order.
        states: the states of the state dict, by index of the parameter; changed in place.
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
    """A count in the form of checkpoints, copied if the other states of its parameter are copies.

    torch needs all states that are not 0-d on one device.
    """
    value = value.to(param.device) if value.ndim else value
    return value.clone() if copied else value


def agree_to_load(
    weights: Iterable[Weight],
    states: Mapping[Tensor, Mapping[str, Any]],
    error: Exception | None,
) -> None:
    """Checks, before elements of a state dict are exchanged, that all ranks can load it.

    Args:
        weights: the optimizer's weights.
        states: the states of each parameter in the state dict.
        error: the exception with which the state dict was refused on this rank, or None.

    Raises:
        RuntimeError: a rank has an error, or ranks have the states in different forms (DTensors and
            plain tensors). Raised on all ranks.
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
    """The weights with separate states, by mesh."""
    found: dict[Mesh, list[Weight]] = defaultdict(list)
    for weight in weights:
        if weight.plan.separate:
            found[weight.mesh].append(weight)
    return found
